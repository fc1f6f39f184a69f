"""No room: jobs that are refused when they are to run, and instance types that can't be had."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator, Script, Settings
from stub_client import Client, raises_status

if TYPE_CHECKING:
    from pathlib import Path

Status = jobs_pb2.JobStatus
TYPES = {"cloud_instance_types": ["gt4.1"]}
WORDS = "Instance types gt4.1 are not available for your community"


def wait_status(client: Client, job_id: str, status: int) -> jobs_pb2.Job:
    deadline = time.monotonic() + 20
    while (job := client.call("Get", job_id=job_id)).status != status:
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return job


def refused_fork(client: Client, emulator: Emulator, **fields: Any) -> str:
    """A fork that finds no room."""
    emulator.settings.max_running_jobs = 0
    job_id = client.fork(emulator.create_scripted_job(Script(), outputs=["o"], **fields))
    with raises_status("RESOURCE_EXHAUSTED", "Job execution quota exhausted"):
        client.call("Execute", job_id=job_id)
    return job_id


def test_a_refused_job_may_soon_show_an_error(client: Client, emulator: Emulator) -> None:
    emulator.settings.update({"refused_job": "error", "refused_job_seconds": 0.5})
    job_id = refused_fork(client, emulator)
    assert client.call("Get", job_id=job_id).status == Status.CREATING

    job = wait_status(client, job_id, Status.ERROR)
    assert not job.HasField("started_at")
    assert job.finished_at.ToMicroseconds() - job.created_at.ToMicroseconds() >= 500_000
    assert [(file.desc.path, file.size_bytes) for file in job.log_files] == [("stdout.txt", 0), ("stderr.txt", 0)]
    assert client.download(job_id, *job.log_files) == [b"", b""]
    assert list(job.output_files) == []
    assert client.logs(job_id) == {}
    listed = client.call("List", project_id=emulator.project_id, filter="status IN (ERROR)").jobs
    assert [item.id for item in listed] == [job_id]

    emulator.settings.max_running_jobs = None
    with raises_status("RESOURCE_EXHAUSTED", "Job execution quota exhausted"):
        client.call("Execute", job_id=job_id)
    with raises_status("FAILED_PRECONDITION", "ERROR"):
        client.call("Cancel", job_id=job_id)
    assert emulator.executions(job_id) == 0
    assert client.run(client.fork(job_id)).result.return_code == 0


def test_a_refused_job_may_stay(client: Client, emulator: Emulator) -> None:
    emulator.settings.refused_job_seconds = 0.0
    job_id = refused_fork(client, emulator)
    assert client.call("Get", job_id=job_id).status == Status.CREATING
    emulator.settings.max_running_jobs = None
    assert client.run(job_id).result.return_code == 0


def test_the_first_executes_of_each_account_may_find_no_room(client: Client, emulator: Emulator) -> None:
    emulator.settings.update({"room_refusals": 2, "quota_code": "UNAVAILABLE"})
    other = emulator.iam.add_service_account("other")
    emulator.iam.set_role(other, emulator.project_id, "developer")
    source = emulator.create_scripted_job(Script())
    for account in (client, Client(emulator, emulator.iam.issue_token(other))):
        job_id = account.fork(source)
        for _ in range(2):
            with raises_status("UNAVAILABLE", "Job execution quota exhausted"):
                account.call("Execute", job_id=job_id)
        assert account.run(job_id).result.return_code == 0


def test_a_refusal_survives_a_restart(tmp_path: Path) -> None:
    settings = Settings(refused_job="error", refused_job_seconds=0.3)
    with Emulator(settings, tls=False, state_dir=tmp_path) as emulator:
        job_id = refused_fork(Client(emulator), emulator)
        emulator.kill()
        emulator.start()
        wait_status(Client(emulator), job_id, Status.ERROR)


@pytest.mark.parametrize("method", ["Create", "Clone", "Execute"])
def test_instance_types_that_are_always_unavailable(client: Client, emulator: Emulator, method: str) -> None:
    source = emulator.create_scripted_job(Script(), **TYPES)
    emulator.settings.update({"unavailable_instance_types": ["gt4.1"], "instance_types_checked_by": [method]})
    call(client, method, source, refused=True)
    call(client, method, source, refused=True)
    others = {"Create", "Clone", "Execute"} - {method}
    for other in sorted(others):
        call(client, other, source, refused=False)


def test_instance_types_refused_for_some_calls_of_each_account(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(), **TYPES)
    emulator.settings.update({"unavailable_instance_types": ["gt4.1", "g2.2"], "unavailable_calls": 2})
    other = emulator.iam.add_service_account("other")
    emulator.iam.set_role(other, emulator.project_id, "developer")
    for account in (client, Client(emulator, emulator.iam.issue_token(other))):
        for refused in (True, True, False, False):
            call(account, "Clone", source, refused=refused)
    call(client, "Create", source, refused=True)


def test_instance_types_refused_for_a_while(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(), **TYPES)
    emulator.settings.update({"unavailable_instance_types": ["gt4.1"], "unavailable_seconds": 0.6})
    call(client, "Clone", source, refused=True)
    time.sleep(0.7)
    call(client, "Clone", source, refused=False)


def test_instance_types_that_the_community_does_not_allow(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(), **TYPES)
    emulator.settings.update({"allowed_instance_types": ["c1.4"], "unavailable_calls": 0})
    call(client, "Clone", source, refused=True)
    client.fork(source, cloud_instance_types=[jobs_pb2.CloudInstanceType(name="c1.4")])


def call(client: Client, method: str, source: str, *, refused: bool) -> None:
    """Make a job of type gt4.1, or run one."""
    if method == "Create":
        parameters = client.call("Get", job_id=source).job_parameters
        fields: dict[str, Any] = {"project_id": client.emulator.project_id, "job_parameters": parameters}
    elif method == "Clone":
        fields = {"source_job_id": source}
    else:
        fields = {"job_id": client.emulator.create_scripted_job(Script(), **TYPES)}
    if refused:
        with raises_status("INVALID_ARGUMENT", WORDS):
            client.call(method, **fields)
    else:
        client.call(method, **fields)
