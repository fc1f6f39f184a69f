"""A full disk: each call that fails says so, and calls work when there is space again."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
import urllib.error
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from datasphere_emulator import Emulator, LogLine, Script, scheduler
from stub_client import Client, raises_status, unpack
from waits import wait_until

if TYPE_CHECKING:
    from pathlib import Path

ROOM = 1 << 30


def allow_pages(emulator: Emulator, pages: int) -> None:
    """Limit the database to so many pages; beyond them its errors are those of a full disk."""
    database = emulator.state.database._connection
    emulator._run(database.execute, f"PRAGMA max_page_count={pages}")


def fill(emulator: Emulator) -> None:
    allow_pages(emulator, 1)  # fewer than there are means: as many as there are

    def put(size: int) -> None:
        for number in range(100_000):
            emulator.state.database.put("filling", f"{size} {number}", "x" * size)

    for size in (1000, 10):  # the last page, too
        with pytest.raises(sqlite3.OperationalError, match="full"):
            emulator._run(put, size)


def test_calls_say_it_and_work_again(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script())
    fill(emulator)
    for _ in range(2):
        with raises_status("INTERNAL", "The emulator's disk is full: database or disk is full"):
            client.call("Clone", "key", source_job_id=source)
        with raises_status("INTERNAL", "The emulator's disk is full"):
            client.call("Execute", "key", job_id=source)
    assert emulator.jobs(parent=source) == []
    assert emulator.executions(source) == 0

    allow_pages(emulator, ROOM)
    (first, second) = (client.done(client.call("Clone", "key", source_job_id=source)) for _ in range(2))
    assert first.id == second.id
    (fork,) = emulator.jobs(parent=source)
    assert client.run(fork.id).result.return_code == 0
    assert client.run(source).result.return_code == 0
    assert emulator.executions(source) == 1


def wait_until_saving_fails(emulator: Emulator, job_id: str, caplog: pytest.LogCaptureFixture) -> None:
    """Wait until the end of a job couldn't be saved several times; meanwhile the job doesn't end."""
    wait_until(lambda: caplog.text.count(f"Failed to save the end of job {job_id}: ") >= 3)
    with pytest.raises(TimeoutError):
        emulator.wait_job(job_id, None, timeout=0.1)


def test_the_end_of_a_job_is_saved_when_there_is_space(
    client: Client, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler, "_SAVE_RETRY_SECONDS", 0.05)
    job_id = emulator.create_scripted_job(Script(executing_seconds=1.0), execute=True)
    operation_id = emulator.operation_of(job_id)
    emulator.wait_job(job_id, "EXECUTING")
    fill(emulator)
    wait_until_saving_fails(emulator, job_id, caplog)
    allow_pages(emulator, ROOM)
    job = emulator.wait_job(job_id, None)
    operation = client.done(client.operation(operation_id))
    # Whether its last statuses found a place in pages that were there already is SQLite's affair.
    assert (job.status == jobs_pb2.SUCCESS) == operation.HasField("response")
    assert (job.status == jobs_pb2.ERROR) == ("disk is full" in operation.error.message)


def test_a_log_that_can_not_be_kept_ends_the_job_with_the_reason(
    client: Client, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler, "_SAVE_RETRY_SECONDS", 0.05)
    lines = [LogLine(0.5 + number / 100, "x" * 5000) for number in range(20)]
    job_id = emulator.create_scripted_job(Script(log=lines), execute=True)
    fill(emulator)
    wait_until_saving_fails(emulator, job_id, caplog)
    allow_pages(emulator, ROOM)
    job = emulator.wait_job(job_id, None)
    assert "The emulator's disk is full" in job.status_details
    assert client.done(client.operation(emulator.operation_of(job_id))).error.code == 13


def full_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new files of the storage take nothing."""
    really = tempfile.mkstemp

    def full(*arguments: Any, **options: Any) -> tuple[int, str]:
        descriptor, name = really(*arguments, **options)
        os.close(descriptor)
        return os.open("/dev/full", os.O_WRONLY), name

    monkeypatch.setattr(tempfile, "mkstemp", full)


def test_an_upload_fails_with_507(client: Client, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"x" * 3_000_000
    file = jobs_pb2.File(
        desc=jobs_pb2.FileDesc(path="a"), sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
    )
    parameters = jobs_pb2.JobParameters(
        cmd="true", input_files=[file], cloud_instance_types=[jobs_pb2.CloudInstanceType(name="c1.4")]
    )
    operation = client.done(client.call("Create", project_id=emulator.project_id, job_parameters=parameters))
    (upload,) = unpack(operation, project_job_service_pb2.CreateProjectJobResponse()).upload_files
    with monkeypatch.context() as patch:
        full_files(patch)
        with pytest.raises(urllib.error.HTTPError) as caught:
            client.http(upload.url, content, "PUT")
        assert caught.value.code == 507
        assert "The emulator&#x27;s disk is full: [Errno 28] No space left" in caught.value.read().decode()
    client.http(upload.url, content, "PUT")
    assert client.run(operation_job(operation)).result.return_code == 0


def operation_job(operation: Any) -> str:
    return unpack(operation, project_job_service_pb2.CreateProjectJobResponse()).job_id


def test_calls_work_without_the_journals_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Emulator(tls=False, state_dir=tmp_path / "state") as emulator:
        job_id = emulator.create_job("true")
        written = emulator.journal._file
        emulator.journal._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        client = Client(emulator)
        assert client.call("Get", job_id=job_id).id == job_id
        assert emulator.journal.count("Get", code="OK") == 1
        with pytest.raises(grpc.RpcError):
            client.call("Get", job_id="none")
        emulator.journal._file = written
    assert "No space left" in caplog.text
