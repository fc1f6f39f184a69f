# Needs Python >= 3.10, git and make; everything else is installed into .venv from the package index.
# `make help` lists what can be made.

VENV := .venv
BIN := $(VENV)/bin
# Set when everything that pyproject.toml asks for is in $(VENV).
STAMP := $(VENV)/.set-up
# The development environment's Airflow: the newest 3.x. Older ones are made by the tests that need them (tests/support/harness).
AIRFLOW ?= apache-airflow>=3.3,<4
# Compiled at once: an import of Airflow takes half the time, also where Python may not write bytecode.
SYNC := install --quiet --compile-bytecode --editable '.[emulator]' --group test --group lint '$(AIRFLOW)'

# The first interpreter that runs and suits Airflow; `make setup PYTHON=/path/to/python` decides otherwise.
SUITABLE := import sys, venv; raise SystemExit(not (3, 10) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3.14 python3 python; do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && echo "$$python" && break; done)

# Airflow reads files of the user's home folder otherwise, and pytest plugins of other installations could join in.
export AIRFLOW_HOME ?= $(CURDIR)/.airflow
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help setup lint format test-unit check test-airflow test-cluster test test-long chaos docs docs-update docs-serve docs-look screenshots release-check bench packages demo demo-all demo-ui matrix wheel clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(STAMP) ## Make .venv with the newest Airflow 3.x, this provider, the emulator, test and lint tools

$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "make setup: found no Python 3.10 to 3.14; name one: make setup PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5.24'

$(STAMP): pyproject.toml | $(BIN)/uv
	@echo "Installing Airflow, the provider and its tools into $(VENV) (a few minutes the first time)"
	@$(BIN)/uv pip $(SYNC) --python $(BIN)/python
	@touch $@

lint: setup ## Check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Tests without an Airflow wait more than they compute; those with one nearly fill a core each.
FAST := tests/unit tests/component tests/emulator
SLOW := tests/airflow tests/install tests/sdk_parity
# A cluster is a dozen processes, which need both cores for themselves.
CLUSTER := tests/cluster

test-unit: setup ## Run the tests without I/O, in seconds
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

check: lint ## Check what can be checked without an Airflow, in minutes
	$(BIN)/python -m pytest $(FAST) -n 4 --dist worksteal $(PYTEST_ARGS)

test-airflow: setup packages ## Run the tests on real Airflows, installations, SDK and CLI; PYTEST_ARGS='-k kill -x' picks some
	$(BIN)/python -m pytest $(SLOW) -n 2 --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

test-cluster: setup packages ## Run the tests on a cluster: Celery, Redis, PostgreSQL, two of each component, logs in S3
	$(BIN)/python -m pytest $(CLUSTER) $(PYTEST_ARGS)

test: check docs test-airflow test-cluster ## Run all that CI runs

test-long: setup packages ## Run the tests that take an hour or more: the scenario table, every way to be killed, leaks
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

matrix: setup ## Install the wheel beside each supported Airflow, list it, connect, import the examples, fork a job
	$(BIN)/python -m pytest --verbose tests/install/test_install.py -k test_it_installs_beside_airflow $(PYTEST_ARGS)

N ?= 200
SEED ?= 1
chaos: setup packages ## Kill everything at named moments, N=200 times by SEED=1, and judge; VERSION=2.11.2 for that Airflow
	PYTHONPATH=tests/support $(BIN)/python -m chaos --runs $(N) --seed $(SEED) $(if $(VERSION),--version $(VERSION))

docs: setup ## Build the documentation's site in English and Russian into dist/docs
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group docs
	@$(BIN)/python tools/build_docs.py

docs-update: setup ## Write new and changed paragraphs of the pages into the Russian catalogues
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group docs
	@$(BIN)/python tools/build_docs.py --update

docs-serve: docs ## The same, and serve it on localhost until Ctrl-C
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory dist/docs 8000

docs-look: docs packages ## The same, and look at it in a real browser: wide, narrow, light, dark; search in it
	@$(BIN)/python tools/check_site.py

screenshots: setup packages ## Take the documentation's pictures anew, in a real browser
	SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/airflow/test_browser.py

TAG ?=
release-check: setup ## Build sdist and wheel, check and install each, fork a job; TAG=v1.2.3 must be the version
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group release
	@$(BIN)/python tools/release_check.py --tag '$(TAG)'

bench: setup ## Run all benchmarks, on a quiet machine; the figures go to build/benchmarks.json
	$(BIN)/python benchmarks/all.py --json build/benchmarks.json

# Chromium for the tests that click, PostgreSQL for the Airflows, Redis for the cluster. Without Chromium the tests that
# click are skipped, without Redis or PostgreSQL those on a cluster; without PostgreSQL the other Airflows keep their data
# in SQLite.
packages:
	@tests/packages.sh

demo: setup ## Fork a job on a real Airflow against the emulator and show its log and result
	@PYTHONPATH=tests/support $(BIN)/python tools/demo.py

demo-all: setup ## The same for all three patterns of the documentation, and new jobs
	@PYTHONPATH=tests/support $(BIN)/python tools/demo.py --all

demo-ui: setup ## The same, with Airflow's pages left running until Ctrl-C
	@PYTHONPATH=tests/support $(BIN)/python tools/demo.py --ui

wheel: setup ## Build the wheel into dist/
	@$(BIN)/uv build --wheel --quiet --out-dir dist .

clean: ## Remove everything that was made here
	rm -rf .venv .venvs .demo .airflow dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
