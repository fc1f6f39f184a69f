# Needs Python >= 3.10, git and make; everything else is installed into .venv from the package index.
# `make help` lists what can be made.

VENV := .venv
BIN := $(VENV)/bin
# Set when everything that pyproject.toml asks for is in $(VENV).
STAMP := $(VENV)/.set-up
# The development environment's Airflow: the newest 3.x. Older ones are made by the tests that need them (tests/harness).
AIRFLOW ?= apache-airflow>=3.3,<4
SYNC := install --quiet --editable '.[emulator]' --group test --group lint '$(AIRFLOW)'

# The first interpreter that runs and suits Airflow; `make setup PYTHON=/path/to/python` decides otherwise.
SUITABLE := import sys, venv; raise SystemExit(not (3, 10) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3.14 python3 python; do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && echo "$$python" && break; done)

# Airflow reads files of the user's home folder otherwise, and pytest plugins of other installations could join in.
export AIRFLOW_HOME ?= $(CURDIR)/.airflow
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-long chaos chromium demo demo-all demo-ui matrix wheel clean

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

test: setup chromium ## Run the tests; PYTEST_ARGS='-k fork -x' picks some
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: setup chromium ## Run the tests that take an hour or more: the scenario table, every way to be killed, leaks
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

matrix: setup ## Install the wheel beside each supported Airflow, list it, connect, import the examples, fork a job
	$(BIN)/python -m pytest --verbose tests/integration/test_install.py -k test_it_installs_beside_airflow $(PYTEST_ARGS)

N ?= 200
SEED ?= 1
chaos: setup ## Kill everything at named moments, N=200 times by SEED=1, and judge; VERSION=2.11.2 for that Airflow
	PYTHONPATH=tests $(BIN)/python -m chaos --runs $(N) --seed $(SEED) $(if $(VERSION),--version $(VERSION))

# For the tests that click. Where it's missing and can't be had, they are skipped and say so.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null || exit 0; \
	echo "Installing Chromium"; \
	{ apt-get -qq -o Acquire::http::Timeout=30 update && \
	DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install chromium; } >/dev/null 2>&1 || \
	echo "It can't be had: the tests in a browser will be skipped"

demo: setup ## Fork a job on a real Airflow against the emulator and show its log and result
	@PYTHONPATH=tests $(BIN)/python tools/demo.py

demo-all: setup ## The same for all three patterns of the documentation: wait, let a sensor wait, chain two jobs
	@PYTHONPATH=tests $(BIN)/python tools/demo.py --all

demo-ui: setup ## The same, with Airflow's pages left running until Ctrl-C
	@PYTHONPATH=tests $(BIN)/python tools/demo.py --ui

wheel: setup ## Build the wheel into dist/
	@$(BIN)/uv build --wheel --quiet --out-dir dist .

clean: ## Remove everything that was made here
	rm -rf .venv .venvs .demo .airflow dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
