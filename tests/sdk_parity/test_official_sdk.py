"""``get_sdk()``: the real ``datasphere`` package on our channels, in an environment of its own (no Airflow in it)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasphere_emulator import Emulator, LogLine, Progress, Script
from harness.venvs import CACHE, PROJECT, find_python, locked, uv

PACKAGES = ["datasphere>=0.10", "yandexcloud>=0.328", "tenacity", "pyjwt[crypto]", "setuptools<81"]

PRELUDE = """
import json, logging, os, sys, tempfile, time
from pathlib import Path
from airflow_provider_datasphere.client import official_sdk
from airflow_provider_datasphere.client.connection.channels import Channels
from airflow_provider_datasphere.client.connection.settings import Settings

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="LOG %(name)s %(message)s")
extra, arguments = json.loads(sys.argv[1])
official_sdk.POLL_SECONDS = 0.1

def state():
    root = logging.getLogger()
    names = [
        name
        for name, logger in root.manager.loggerDict.items()
        if any(not isinstance(handler, logging.NullHandler) for handler in getattr(logger, "handlers", ()))
    ]
    return [repr(root.handlers), root.level, names, sorted(os.listdir(tempfile.gettempdir()))]

before = state()
sdk = official_sdk.make_sdk(Channels(Settings.from_extra(extra)))
after = state()
"""


@pytest.fixture(scope="session")
def sdk_python() -> Path:
    """The interpreter of an environment with the SDK; made once and kept."""
    python = find_python("3.11", "3.10")
    if python is None:
        pytest.skip("datasphere 0.10 needs Python 3.10 or 3.11")
    path = CACHE / "sdk"
    with locked(CACHE / ".sdk.lock"):
        if not (path / ".made").exists():
            uv("venv", "--quiet", "--clear", "--python", python, path)
            uv("pip", "install", "--python", path / "bin" / "python", *PACKAGES, cwd=Path("/"))
            (path / ".made").touch()
    return path / "bin" / "python"


@pytest.fixture
def run(sdk_python: Path, datasphere_emulator: Emulator, tmp_path: Path) -> Callable[..., str]:
    """Runs lines with ``sdk`` in that environment; returns what they print."""
    (tmp_path / "tmp").mkdir()

    def run(lines: str, **arguments: Any) -> str:
        key = json.dumps(datasphere_emulator.service_account_key())
        extra = datasphere_emulator.connection_extra(iam_token=None, service_account_json=key)
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT / "src"),
            "TMPDIR": str(tmp_path / "tmp"),
            "REQUESTS_CA_BUNDLE": str(datasphere_emulator.root_certificates),
        }
        command = [str(sdk_python), "-c", PRELUDE + lines, json.dumps([extra, arguments])]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_documentations_snippet(run: Callable[..., str], datasphere_emulator: Emulator, tmp_path: Path) -> None:
    source = datasphere_emulator.create_job(
        "python main.py ${RANGE}",
        files={"main.py": "import sys\nprint('range', sys.argv[1])\nopen('result.txt', 'w').write(sys.argv[1])\n"},
        args={"RANGE": "0"},
        outputs=["result.txt"],
    )
    lines = """
job = sdk.fork_job(arguments["source"], args={"RANGE": "1"})
print("FORKED", job.id, bool(job.operation_id))
job.wait()
print("DONE", sdk.get_job(job.id).done)
print("RESULT", Path("result.txt").read_text())
Path("again").mkdir()
sdk.download_job_files(job.id, output_dir="again")
print("AGAIN", Path("again/result.txt").read_text())
"""
    printed = run(lines, source=source)
    (fork,) = datasphere_emulator.jobs(parent=source)
    assert f"FORKED {fork.id} True" in printed
    assert "DONE True" in printed
    assert "RESULT 1" in printed
    assert "AGAIN 1" in printed
    assert f"job link: {datasphere_emulator.url}/communities/" in printed
    calls = datasphere_emulator.journal.calls("Clone") + datasphere_emulator.journal.calls("Operation.Get")
    assert {call.subject for call in calls} == {datasphere_emulator.service_account_id}
    assert all(call.deadline for call in calls)


def test_the_process_stays_as_it_was(run: Callable[..., str]) -> None:
    printed = run("print('SAME', before == after, before, after, 'datasphere.sdk' in sys.modules)")
    assert "SAME True" in printed, printed
    assert printed.rstrip().endswith("True")


def test_progress_is_told_once(run: Callable[..., str], datasphere_emulator: Emulator) -> None:
    script = Script(executing_seconds=1.5, log=[LogLine(0.0, "hello\n")], progress=[Progress(0.1, 37, "training")])
    source = datasphere_emulator.create_scripted_job(script)
    printed = run("sdk.fork_job(arguments['source']).wait()", source=source)
    assert printed.count("training") <= 2  # the operation's, and the line of job_progress.jsonl in the log
    assert "training" in printed


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED"])
def test_wait_ends_when_the_job_is_out_of_sight(
    run: Callable[..., str], datasphere_emulator: Emulator, code: str
) -> None:
    source = datasphere_emulator.create_scripted_job(Script(never_ends=True))
    datasphere_emulator.faults.inject("Operation.Get", code=code, skip=3)
    lines = """
from airflow_provider_datasphere.client.errors import JobLostError
assert official_sdk.DENIED_GRACE_SECONDS == 60
official_sdk.DENIED_GRACE_SECONDS = 1.0
job = sdk.fork_job(arguments["source"])
begun = time.monotonic()
try:
    job.wait()
except JobLostError as error:
    print("LOST", error, "AFTER", time.monotonic() - begun >= 1.0)
"""
    printed = run(lines, source=source)
    assert re.search(rf"Lost access to operation \w+ \({code}", printed)
    assert "AFTER True" in printed


def test_wait_survives_an_outage_and_a_revoked_token(run: Callable[..., str], datasphere_emulator: Emulator) -> None:
    source = datasphere_emulator.create_scripted_job(Script(executing_seconds=2.0))
    datasphere_emulator.faults.inject("Operation.Get", code="UNAVAILABLE", skip=2, times=3)
    datasphere_emulator.faults.inject("Operation.Get", code="UNAUTHENTICATED", skip=7, times=1)
    assert "OVER" in run("sdk.fork_job(arguments['source']).wait(); print('OVER')", source=source)
    assert datasphere_emulator.journal.calls("Operation.Get", code="UNAUTHENTICATED")


def test_failures_are_the_sdks_own(run: Callable[..., str], datasphere_emulator: Emulator) -> None:
    failing = datasphere_emulator.create_scripted_job(Script(return_code=3))
    broken = datasphere_emulator.create_scripted_job(Script(error=("INTERNAL", "no machine")))
    lines = """
from datasphere.client import OperationError, ProgramError
for kind, source in ((ProgramError, arguments["failing"]), (OperationError, arguments["broken"])):
    try:
        sdk.fork_job(source).wait()
    except kind as error:
        print("FAILED", kind.__name__, error)
"""
    printed = run(lines, failing=failing, broken=broken)
    assert "FAILED ProgramError Program returned code 3" in printed
    assert "no machine" in printed.partition("FAILED OperationError")[2]


def test_an_old_package_is_named() -> None:
    program = (
        "import sys, types\n"
        "sys.modules['datasphere'] = types.ModuleType('datasphere')\n"  # as of 0.5: no sdk in it
        "from airflow_provider_datasphere.client.official_sdk import make_sdk\n"
        "try: make_sdk(None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("JobRequestError get_sdk() needs the package datasphere 0.10"), done
