"""Scripted jobs."""

from __future__ import annotations

import io
import json
import time
import zipfile
from typing import TYPE_CHECKING

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from datasphere_emulator import LogLine, Progress, Script, ScriptedOutput
from datasphere_emulator.job_draft import JobDraft
from stub_client import metadata_of, raises_status

if TYPE_CHECKING:
    from datasphere_emulator import Emulator
    from stub_client import Client

Status = jobs_pb2.JobStatus
Errors = jobs_pb2.FileUploadError.ErrorType


def test_outputs(client: Client, emulator: Emulator) -> None:
    script = Script(
        outputs={
            "text": ScriptedOutput(text="hello"),
            "BIG": 3_000_000,
            "folder": ScriptedOutput(directory={"a": 5, "b/c": 2_000_000}),
        },
        missing_outputs=["gone"],
        failed_uploads=["F"],
    )
    outputs = ["text", ("big.bin", "BIG"), "folder", "gone", ("failed", "F"), "other"]
    job_id = emulator.create_scripted_job(script, outputs=outputs)
    result = client.run(job_id)
    files = {item.file.desc.path: item for item in result.output_files}
    assert set(files) == {"text", "big.bin", "folder", "other"}
    assert client.http(files["text"].url) == b"hello"
    assert len(client.http(files["big.bin"].url)) == files["big.bin"].file.size_bytes == 3_000_000
    with zipfile.ZipFile(io.BytesIO(client.http(files["folder"].url))) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    assert sizes == {"folder/a": 5, "folder/b/c": 2_000_000}
    errors = {error.output_file_desc.path: error.type for error in result.output_files_errors}
    assert errors == {"gone": Errors.NOT_FOUND, "failed": Errors.UPLOAD_FAILED}


def test_content_depends_on_seed_and_name_alone(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(), outputs=["a", "b"])
    seeded = emulator.create_scripted_job(Script(outputs={"a": ScriptedOutput(seed=1)}), outputs=["a"])
    sums = [
        [item.file.sha256 for item in client.run(job_id).output_files]
        for job_id in (source, client.fork(source), seeded)
    ]
    assert sums[0] == sums[1]
    assert len({*sums[0], *sums[2]}) == 3


@pytest.mark.parametrize("code", [13, "INTERNAL"])
def test_operation_error(client: Client, emulator: Emulator, code: int | str) -> None:
    script = Script(error=(code, "No capacity."))  # type: ignore[arg-type]
    job_id = emulator.create_scripted_job(script, outputs=["o"])
    assert client.failed(client.call("Execute", job_id=job_id)) == (13, "No capacity.")
    job = emulator.job(job_id)
    assert (job.status, job.status_details, len(job.output_files)) == (Status.ERROR, "No capacity.", 0)


def test_unknown_statuses(client: Client, emulator: Emulator) -> None:
    script = Script(statuses=[(0.0, 77), (0.4, 2)], executing_seconds=0.6, final_status=99, status_details="odd")
    job_id = emulator.create_scripted_job(script)
    operation = client.call("Execute", job_id=job_id)
    seen = []
    while not operation.done:
        operation = client.operation(operation.id)
        seen.append(metadata_of(operation).metadata.status)
        time.sleep(0.02)
    assert [status for status in dict.fromkeys(seen) if status not in (Status.PREPARING, 3)] == [77, 2, 99]
    assert client.call("Get", job_id=job_id).status_details == "odd"


def test_progress(client: Client, emulator: Emulator) -> None:
    script = Script(progress=[Progress(0, 10), Progress(0.2, 90, "nearly")], executing_seconds=0.3)
    job_id = emulator.create_scripted_job(script)
    operation = client.done(client.call("Execute", job_id=job_id))
    progress = metadata_of(operation).progress
    assert (progress.progress, progress.message) == (90, "nearly")
    assert progress.HasField("create_time")


def test_scripts_are_json(client: Client, emulator: Emulator) -> None:
    script = Script(
        log=["a", LogLine(1, b"\xff", "stderr")],
        outputs={"x": 5, "y": "text", "z": ScriptedOutput(directory={"a": 1})},
        error=("UNAVAILABLE", "m"),
        statuses=[(0.1, 42)],
        progress=[Progress(1, 5)],
    )
    assert Script.from_json(json.loads(json.dumps(script.to_json()))) == script
    with pytest.raises(ValueError, match="no field colour"):
        Script.from_json({"colour": "red"})


def test_many_at_once(client: Client, emulator: Emulator) -> None:
    count = 300
    source = emulator.create_scripted_job(Script(executing_seconds=0.5, log=["x"]), outputs=["o"])
    operations = []
    for _ in range(count):
        fork = client.fork(source)
        operations.append(client.call("Execute", job_id=fork))
    for operation in operations:
        assert client.done(operation).HasField("response")
    assert {job.status for job in emulator.jobs(parent=source)} == {Status.SUCCESS}
    assert len(emulator.jobs(parent=source)) == count


def test_no_capacity(client: Client, emulator: Emulator) -> None:
    script = Script(preparing_seconds=0.2, error=("RESOURCE_EXHAUSTED", "No hosts."), error_in="PREPARING")
    job_id = emulator.create_scripted_job(script)
    assert client.failed(client.call("Execute", job_id=job_id)) == (8, "No hosts.")
    assert not emulator.job(job_id).HasField("started_at")


def test_error_shows_before_the_operation_is_done(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(error=(13, "Rolling back."), error_ahead_seconds=0.4))
    operation = client.call("Execute", job_id=job_id)
    seen = set()
    while not operation.done:
        operation = client.operation(operation.id)
        seen.add((operation.done, operation.HasField("error")))
        time.sleep(0.02)
    assert {(False, True), (True, True)} <= seen


def test_new_jobs_of_a_name_are_scripted(emulator: Emulator, client: Client) -> None:
    control = emulator.control_client()
    control.script_new_jobs("nightly", [Script(return_code=3), Script()])
    request, _ = JobDraft("cmd that isn't there", name="nightly", project_id=emulator.project_id).request()
    fields = {"project_id": request.project_id, "name": "nightly", "job_parameters": request.job_parameters}
    codes = []
    for _ in range(3):
        operation = client.done(client.call("Create", **fields))
        made = service_pb2.CreateProjectJobResponse()
        operation.response.Unpack(made)
        codes.append(client.run(made.job_id).result.return_code)
    assert codes == [3, 0, 0]
    with pytest.raises(ValueError, match="name is empty"):
        emulator.script_new_jobs("", Script())
    with pytest.raises(ValueError, match="the list is empty"):
        emulator.script_new_jobs("x", [])


def test_a_fault_may_concern_one_project(emulator: Emulator, client: Client) -> None:
    other = emulator.add_project("other")
    emulator.iam.set_role(emulator.service_account_id, other, "developer")
    emulator.faults.inject("List", code="UNAVAILABLE", project_id=other)
    assert list(client.call("List", project_id=emulator.project_id).jobs) == []
    with raises_status("UNAVAILABLE"):
        client.call("List", project_id=other)
