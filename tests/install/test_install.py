"""The wheel, installed with pip's rules beside every supported Airflow, is found, imports and forks a job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from datasphere_emulator import Emulator
from harness import NEWEST, SUPPORTED, AirflowVenv, RealAirflow, uv
from harness.home import AirflowHome
from harness.venvs import PROJECT

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(600)]

OLDEST = SUPPORTED[0]
EXAMPLES = sorted((PROJECT / "example_dags").glob("*.py"))
PROBE = PROJECT / "tests" / "support" / "harness" / "probe.py"
# What Managed Airflow's images of 3.0 and 3.1 pin.
IMAGE_PINS = ["yandexcloud==0.328.0", "protobuf==4.25.8"]
FORK = """
import datetime

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator

with DAG("fork", schedule=None, start_date=datetime.datetime(2026, 1, 1)) as fork:
    job = ForkJobOperator(task_id="job", source_job_id="{source}", args={{"RANGE": "1"}}, poll_interval=1)
    DownloadJobResultsOperator(task_id="results", job_id=job.output, destination="{destination}")
"""

# Several commands of Airflow's CLI in one process, each as a person types it: starting it takes longer than they do.
CLI = """
import json, sys
from airflow.__main__ import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["airflow", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built now."""
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--quiet", "--out-dir", folder, PROJECT)
    return next(folder.glob("*.whl"))


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as running:
        yield running


Install = Callable[..., AirflowVenv]


@pytest.fixture
def install(wheel: Path, tmp_path: Path) -> Install:
    """Makes an environment with an Airflow, the wheel and further requirements, and checks that they agree."""

    def make(version: str, *requirements: str, pythons: Sequence[str] = (), before: Sequence[str] = ()) -> AirflowVenv:
        venv = AirflowVenv.create(tmp_path / "venv", version, pythons)
        if before:
            venv.install(*before)
        venv.install(f"airflow-provider-datasphere[emulator] @ {wheel.as_uri()}", *requirements)
        return venv

    return make


def check(venv: AirflowVenv) -> None:
    """``pip check``: every installed package finds what it asks for. Raises otherwise."""
    uv("pip", "check", "--python", venv.bin / "python", cwd=Path("/"))


def python(venv: AirflowVenv, home: Path, *arguments: str | Path) -> str:
    environment = AirflowHome(venv, home).prepare().environment()
    command = [venv.bin / "python", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def probe(venv: AirflowVenv, tmp_path: Path) -> dict[str, Any]:
    # -I: the probe's folder holds a module named airflow, which must not be the one that gets imported.
    answer = python(venv, tmp_path / "home", "-I", PROBE, *EXAMPLES)
    return dict(json.loads(answer.strip().rpartition("\n")[2]))


def cli(venv: AirflowVenv, home: Path, *commands: list[str]) -> str:
    """What Airflow's CLI prints for these commands, one after another."""
    return python(venv, home, "-c", CLI, json.dumps(commands))


def assert_forks(venv: AirflowVenv, emulator: Emulator, tmp_path: Path) -> None:
    """A task forks a job that really runs, and a second one brings its output home."""
    program = 'import sys; print("range", sys.argv[1]); open("result.txt", "w").write("seen " + sys.argv[1])'
    source = emulator.create_job(
        cmd="python main.py ${RANGE}", files={"main.py": program}, outputs=["result.txt"], args={"RANGE": "10"}
    )
    destination = tmp_path / "results"
    connections = {"datasphere_default": {"conn_type": "datasphere", "extra": emulator.connection_extra()}}
    with RealAirflow(venv.version, venv=venv, connections=connections) as airflow:
        airflow.add_dag("fork", FORK.format(source=source, destination=destination))
        run_id = airflow.trigger("fork")
        assert airflow.wait_run("fork", run_id, timeout=240) == "success", airflow.task_log("fork", run_id, "job")
        assert "range 1" in airflow.task_log("fork", run_id, "job")
        (forked,) = emulator.jobs(parent=source)
        assert airflow.xcom("fork", run_id, "job") == forked.id
        assert airflow.xcom("fork", run_id, "job", "result")["status"] == "SUCCESS"
    assert (destination / "result.txt").read_text() == "seen 1"


def console_blocks(document: str) -> list[str]:
    return re.findall(r"```console\n(.*?)```", (PROJECT / document).read_text(), re.DOTALL)


def follow(commands: str, venv: AirflowVenv, folder: Path, **variables: str) -> None:
    """Do in an environment what a document says, with uv's quick pip."""
    path = f"{Path(sys.prefix, 'bin')}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"VIRTUAL_ENV": str(venv.path), "PATH": path} | variables
    script = f'set -euo pipefail\npip() {{ uv pip "$@"; }}\n{commands}'
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {"airflow_provider_datasphere", "datasphere_emulator"}
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("version", SUPPORTED)
def test_it_installs_beside_airflow(version: str, install: Install, emulator: Emulator, tmp_path: Path) -> None:
    venv = install(version)
    check(venv)
    extra = emulator.connection_extra()
    said = cli(
        venv,
        tmp_path / "home",
        ["providers", "list", "--output", "plain"],
        ["providers", "get", "airflow-provider-datasphere"],
        ["connections", "add", "by_cli", "--conn-type", "datasphere", "--conn-extra", json.dumps(extra)],
        ["connections", "get", "by_cli", "--output", "json"],
        ["connections", "test", "by_cli"],
    )
    assert said.count("airflow-provider-datasphere") >= 2
    assert "Successfully added `conn_id`=by_cli" in said
    assert extra["endpoint"] in said.partition("Successfully added")[2]
    assert "Connection success!" in said
    assert emulator.journal.count("List") == 1  # the test button's word is the service's
    seen = probe(venv, tmp_path)
    assert seen["hook"] == "airflow_provider_datasphere.hooks.datasphere.DataSphereHook Yandex DataSphere"
    assert seen["connection types"] == ["datasphere"]
    operators = {"ForkJobOperator", "CancelJobOperator", "DownloadJobResultsOperator"}
    others = {"DataSphereHook", "DataSphereJobSensor", "DataSphereJobTrigger"}
    assert operators | others <= set(seen["classes"])
    assert seen["links"] == ["airflow_provider_datasphere.links.jobs.DataSphereJobLink"]
    assert seen["schema errors"] == []
    assert seen["metadata imports"] == []
    assert seen["operator imports"] == []
    assert seen["dag errors"] == {}
    assert_forks(venv, emulator, tmp_path)


@pytest.mark.parametrize("version", SUPPORTED)
def test_it_installs_beside_the_yandex_provider(version: str, install: Install, tmp_path: Path) -> None:
    venv = install(version, "apache-airflow-providers-yandex")
    check(venv)
    seen = probe(venv, tmp_path)
    assert seen["connection types"] == ["datasphere", "yandexcloud"]
    assert seen["operator imports"] == []
    assert seen["dag errors"] == {}


@pytest.mark.parametrize(("version", "pythons"), [(OLDEST, ["3.10", "3.11"]), ("3.1.8", [])])
def test_it_works_with_what_managed_airflow_pins(
    version: str, pythons: list[str], install: Install, emulator: Emulator, tmp_path: Path
) -> None:
    venv = install(version, *IMAGE_PINS, pythons=pythons)
    check(venv)
    assert_forks(venv, emulator, tmp_path)


def test_it_works_with_the_oldest_packages_that_it_allows(wheel: Path, emulator: Emulator, tmp_path: Path) -> None:
    venv = AirflowVenv.create(tmp_path / "venv", "2.11.0", ["3.10", "3.11"])
    venv.install("--resolution", "lowest-direct", "-r", PROJECT / "pyproject.toml", "--extra", "emulator")
    venv.install("--no-deps", wheel)
    check(venv)
    installed = uv("pip", "freeze", "--python", venv.bin / "python", cwd=Path("/"))
    assert {"apache-airflow==2.11.0", "yandexcloud==0.328.0"} <= set(installed.split())
    assert_forks(venv, emulator, tmp_path)


@pytest.mark.parametrize(("version", "sdk"), [(NEWEST, "0.5"), (OLDEST, "0.5"), ("3.0.6", "0.10.0")])
def test_it_works_where_the_sdk_is_already(
    version: str, sdk: str, install: Install, emulator: Emulator, tmp_path: Path
) -> None:
    venv = install(version, f"datasphere=={sdk}", before=[f"datasphere=={sdk}"], pythons=["3.11"])
    check(venv)
    assert_forks(venv, emulator, tmp_path)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_documentation_repairs_what_uninstalling_the_old_sdk_breaks(
    version: str, install: Install, tmp_path: Path
) -> None:
    (repair,) = [block for block in console_blocks("docs/sdk.md") if "--force-reinstall" in block]
    venv = install(version, before=["datasphere==0.5"])
    uv("pip", "uninstall", "--python", venv.bin / "python", "datasphere", cwd=Path("/"))
    stubs = "import yandex.cloud.datasphere.v2.jobs.project_job_service_pb2"
    broken = subprocess.run([venv.bin / "python", "-c", stubs], capture_output=True, text=True)
    assert broken.returncode, "nothing is broken any more: the advice in docs/sdk.md can go"

    follow(repair, venv, tmp_path)
    check(venv)
    subprocess.run([venv.bin / "python", "-c", stubs], check=True)


def documented_ways_to_install_the_sdk() -> list[str]:
    return [block for block in console_blocks("docs/sdk.md") if "datasphere>=0.10" in block or "[sdk]" in block]


@pytest.mark.parametrize("commands", documented_ways_to_install_the_sdk(), ids=["without requirements", "override"])
def test_the_sdk_installs_as_documented(commands: str, install: Install, wheel: Path, tmp_path: Path) -> None:
    venv = install(NEWEST)
    # This project isn't on the package index yet.
    follow(commands, venv, tmp_path, UV_FIND_LINKS=str(wheel.parent))
    answer = python(venv, tmp_path / "home", "-c", "from datasphere import SDK; print(SDK.fork_job.__name__)")
    assert answer.strip() == "fork_job"
    installed = uv("pip", "freeze", "--python", venv.bin / "python", cwd=Path("/"))
    assert f"apache-airflow=={venv.version}" in installed.split()


def test_the_quick_start_is_green_by_copying(install: Install, tmp_path: Path) -> None:
    """Its console blocks and its DAG as they are printed, but for ports and the id that a reader puts in."""
    page = (PROJECT / "docs" / "quickstart.md").read_text()
    serve, prepare, run = (
        next(text for text in console_blocks("docs/quickstart.md") if word in text)
        for word in ("serve", "db migrate", "dags test")
    )
    (dag,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    venv = install(NEWEST)
    words = [*without_prompts(serve).split()[1:], "--port", "0", "--http-port", "0", "--ready-file", "ready.json"]
    server = subprocess.Popen([venv.bin / "datasphere-emulator", *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready.json").exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        facts = json.loads((tmp_path / "ready.json").read_text())
        (tmp_path / "dags").mkdir()
        (tmp_path / "dags" / "first.py").write_text(dag)
        commands = without_prompts(prepare + run).replace("<id>", facts["sample_job_id"]).replace("mkdir dags", "true")
        environment = {
            "PATH": f"{venv.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "AIRFLOW_CONN_DATASPHERE_DEFAULT": json.dumps(facts["connection"]),
        }
        # A task that fails would be repeated in five minutes.
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{commands}"],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=200,
        )
    finally:
        server.terminate()
        server.wait(30)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "read 1 rows" in said


def without_prompts(block: str) -> str:
    return "".join(line.removeprefix("$ ") for line in block.splitlines(keepends=True))
