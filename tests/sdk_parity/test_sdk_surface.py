"""Code written for the official SDK runs on our client, and finds its process as it was."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from airflow_provider_datasphere import exceptions as airflow_errors
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import DataSphereError, JobFailedError, JobLostError, JobRequestError
from airflow_provider_datasphere.client.monitoring import polling as polling_module
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from airflow_provider_datasphere.exceptions import airflow_exceptions
from datasphere_emulator import Emulator, Script

MAIN = """\
import sys
data, result, count = sys.argv[1:]
text = open(data).read()
print("read", text)
open(result, "w").write(text * int(count))
"""


@pytest.fixture
def source(emulator: Emulator) -> str:
    """A job that runs a real program."""
    return emulator.create_job(
        f"{sys.executable} main.py ${{INPUT_DATA}} ${{RESULT}} ${{RANGE}}",
        files={"main.py": MAIN, "data.txt": "old"},
        inputs=["main.py", ("data.txt", "INPUT_DATA")],
        outputs=[("result.txt", "RESULT")],
        args={"RANGE": "2"},
    )


@pytest.fixture
def client(emulator: Emulator) -> Iterator[DataSphereClient]:
    """A client of the emulator."""
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()))
    yield client
    client.close()


@pytest.fixture
def SDK(client: DataSphereClient) -> Any:
    """What takes the place of the SDK's class."""
    return lambda: client


def test_the_documentations_examples_run(
    SDK: Any, emulator: Emulator, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Blocking.
    sdk = SDK()
    job = sdk.fork_job(source, args={"RANGE": "1"})
    job.wait()
    # Asynchronous, with a sensor.
    job = SDK().fork_job(source, args={"RANGE": "3"})
    assert job.id
    assert job.operation_id == emulator.operation_of(job.id)
    emulator.wait_job(job.id)
    assert SDK().get_job(job.id).done
    # A chain.
    SDK().download_job_files(job.id)
    assert (tmp_path / "result.txt").read_text() == "oldoldold"
    other = SDK().fork_job(source, vars={"INPUT_DATA": "result.txt"})
    other.wait()
    SDK().download_job_files(other.id, with_logs=True, with_diagnostics=True, output_dir="other")
    assert (tmp_path / "other" / "result.txt").read_text() == "oldoldold" * 2
    assert b"read oldoldold" in b"".join(content for _, _, content in emulator.log_text(other.id))


def test_every_argument_of_the_sdk_is_taken(SDK: Any, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(), args={"A": "1"}, outputs=[("out.txt", "OUT")])
    docker = {"image": "cr.yandex/x:1", "username": "me", "password": {"secret-id": "registry"}}
    for given in (docker, {"docker": docker}):
        job = SDK().fork_job(
            source,
            {"A": "2"},
            {"OUT": "new.txt"},
            {"DEBUG": "1"},
            "name",
            "desc",
            given,
            {"type": "SSD", "size": "100GB"},
            ["g1.1"],
        )
        made = emulator.job(job.id)
        parameters = made.job_parameters
        assert (made.name, made.desc) == ("name", "desc")
        assert parameters.arguments[0].value == "2"
        assert parameters.output_files[0].path == "new.txt"
        assert dict(parameters.env.vars) == {"DEBUG": "1"}
        assert parameters.env.docker_image_spec.password_ds_secret_name == "registry"
        assert parameters.extended_working_storage.size_gb == 100
        assert [instance.name for instance in parameters.cloud_instance_types] == ["g1.1"]
    for given in ("system-python-3-10", {"docker": "system-python-3-10"}):
        job = SDK().fork_job(source, docker=given)
        assert emulator.job(job.id).job_parameters.env.docker_image_resource_id == "system-python-3-10"


def test_a_job_knows_itself(SDK: Any, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(never_ends=True))
    job = SDK().fork_job(source)
    emulator.wait_job(job.id, "EXECUTING")
    assert not job.done
    assert job.status == "EXECUTING"
    looked_up = SDK().get_job(job.id)
    assert not looked_up.done
    assert looked_up.operation_id is None
    job.cancel()
    emulator.wait_job(job.id, "CANCELLED")
    assert job.done
    assert job.status == "CANCELLED"
    assert not looked_up.done, "a snapshot, as the SDK's"
    with pytest.raises(DataSphereError, match="cancelled"):
        looked_up.wait()


def test_a_looked_up_job_can_be_waited_for(SDK: Any, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(executing_seconds=0.3), execute=True)
    result = SDK().get_job(job_id).wait()
    assert (result.job_id, result.status, result.return_code) == (job_id, "SUCCESS", 0)


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED"])
def test_a_refused_wait_ends(SDK: Any, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(polling_module, "DENIED_GRACE_SECONDS", 1.0)
    job = SDK().fork_job(emulator.create_scripted_job(Script(never_ends=True)))
    emulator.faults.inject("*", code=code)
    with pytest.raises(JobLostError, match=job.id):
        job.wait()


def test_errors_may_be_raised_as_others(emulator: Emulator) -> None:
    """The hook's client raises Airflow's side of each error."""
    source = emulator.create_scripted_job(Script(return_code=1))
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()), translate_errors=airflow_exceptions)
    with pytest.raises(airflow_errors.JobRequestError):
        client.get_job("bt1nowhere")
    with pytest.raises(airflow_errors.JobRequestError):
        client.fork_job("")
    with pytest.raises(airflow_errors.ResultsError):
        client.download_job_files(source)
    job = client.fork_job(source)
    with pytest.raises(airflow_errors.JobFailedError):
        job.wait()
    with pytest.raises(airflow_errors.JobRequestError):
        job.cancel()
    emulator.delete_job(job.id)
    with pytest.raises(airflow_errors.JobRequestError):
        assert job.status
    client.close()


def test_waiting_downloads_nothing(
    SDK: Any, emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SDK().fork_job(emulator.create_scripted_job(Script(), outputs=["out.txt"])).wait()
    assert list(tmp_path.iterdir()) == []
    assert emulator.journal.count("storage.get") == 0


def test_two_clients_carry_their_own_tokens(emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(executing_seconds=0.5, log=["hello"]))
    clients: dict[str, DataSphereClient] = {}
    for name in ("one", "two"):
        account = emulator.iam.add_service_account(name)
        emulator.iam.set_role(account, emulator.project_id, "developer")
        token = emulator.iam.issue_token(account)
        clients[account] = DataSphereClient(Settings.from_extra(emulator.connection_extra(iam_token=token)))
    jobs: dict[str, str] = {}

    def fork_and_wait(account: str) -> None:
        job = clients[account].fork_job(source)
        jobs[job.id] = account
        job.wait()

    threads = [threading.Thread(target=fork_and_wait, args=(account,)) for account in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(jobs.values()) == sorted(clients)
    for job_id, account in jobs.items():
        assert emulator.job(job_id).created_by_id == account
        calls = [*emulator.journal.calls(job_id=job_id)]
        calls += emulator.journal.calls("Operation.Get", operation_id=emulator.operation_of(job_id))
        assert {"Clone", "Execute", "ReadLogs", "Operation.Get", "Get"} <= {call.method for call in calls}
        assert {call.subject for call in calls} == {account}
    for client in clients.values():
        client.close()


def logging_tree() -> dict[str, Any]:
    """Every logger with its handlers, level and filters."""
    loggers = {"": logging.getLogger(), **logging.Logger.manager.loggerDict}
    return {
        name: (logger.level, list(logger.handlers), logger.propagate, logger.disabled, list(logger.filters))
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger)
        and (logger.handlers or logger.level or logger.disabled or not logger.propagate or logger.filters)
    }


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder  # type: ignore[return-value]


def test_the_process_stays_as_it_was(
    client: DataSphereClient, emulator: Emulator, tmp_path: Path, own_temporary_folder: Path
) -> None:
    source = emulator.create_scripted_job(
        [Script(log=["one"]), Script(log=["one"]), Script(return_code=1)],
        files={"in.csv": "1"},
        inputs=[("in.csv", "DATA")],
        outputs=["out.txt"],
    )
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "file.txt").write_text("zipped")
    client.fork_job(source).wait()  # opens what stays open: the client's connections
    assert client.http  # and keeps presigned URLs out of the HTTP library's log from now on

    def process() -> dict[str, Any]:
        files = {file.path for file in psutil.Process().open_files()}
        return {
            "logging": logging_tree(),
            "files": {path for path in files if not path.startswith(str(emulator.state_dir))},
            "temporary": sorted(own_temporary_folder.rglob("*")),
            "threads": {thread.name for thread in threading.enumerate()},
            "environment": dict(os.environ),
            "folder": os.getcwd(),
        }

    before = process()
    client.fork_job(source, vars={"DATA": str(folder)}).wait()
    with pytest.raises(JobFailedError):
        client.fork_job(source).wait()
    with pytest.raises(JobRequestError):
        client.fork_job(source, vars={"DATA": "/nowhere"})
    emulator.faults.inject("storage.put", status=400)
    (folder / "file.txt").write_text("another content")
    with pytest.raises(DataSphereError):
        client.fork_job(source, vars={"DATA": str(folder)})
    deadline = time.monotonic() + 60
    while any(thread.name == "datasphere-http" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the watchdog of transfers ends a moment after the last one"
        time.sleep(0.1)
    after = process()
    # Names of pool threads, and loggers that were merely asked for, come and go.
    after["threads"] = {name for name in after["threads"] if name in before["threads"] or "datasphere" in name}
    before["threads"] &= after["threads"]
    assert after == before


def test_the_sdk_needs_not_be_there(emulator: Emulator) -> None:
    """In a fresh interpreter, where ``import datasphere`` fails."""
    source = emulator.create_scripted_job(Script(log=["hello"]), outputs=["out.txt"])
    extra = emulator.connection_extra()
    program = f"""
import sys, tempfile
sys.modules["datasphere"] = None
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from airflow_provider_datasphere.client.connection.settings import Settings
client = DataSphereClient(Settings.from_extra({extra!r}))
job = client.fork_job({source!r})
job.wait()
assert client.get_job(job.id).done
with tempfile.TemporaryDirectory() as folder:
    client.download_job_files(job.id, output_dir=folder)
airflow = [name for name in sys.modules if name.split(".")[0] == "airflow"]
assert not airflow, f"the client needs no Airflow, but imported {{airflow[:5]}}"
print(job.id)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [job.id for job in emulator.jobs(source)] == done.stdout.split()
