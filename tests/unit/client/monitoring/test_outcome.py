"""From what the service says of an ended job to a result or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2
from yandex.cloud.operation import operation_pb2

from airflow_provider_datasphere.client.errors import (
    JobCancelledError,
    JobFailedError,
    JobInfrastructureError,
    MissingOutputsError,
)
from airflow_provider_datasphere.client.model import status_name
from airflow_provider_datasphere.client.monitoring.outcome import (
    Outcome,
    OutcomePolicy,
    evaluate_outcome,
    return_code_of,
)

LINK = "https://ui/job/bt1job"
NOT_FOUND = jobs_pb2.FileUploadError.NOT_FOUND
UPLOAD_FAILED = jobs_pb2.FileUploadError.UPLOAD_FAILED


def file(path: str, var: str = "", size: int = 5) -> jobs_pb2.File:
    return jobs_pb2.File(desc=jobs_pb2.FileDesc(path=path, var=var), sha256="ab" * 32, size_bytes=size)


def upload_error(path: str, kind: Any = NOT_FOUND) -> jobs_pb2.FileUploadError:
    desc = jobs_pb2.FileDesc(path=path)
    return jobs_pb2.FileUploadError(output_file_desc=desc, type=kind, description=f"{path} failed")


def job(status: Any = jobs_pb2.SUCCESS, **fields: Any) -> jobs_pb2.Job:
    message = jobs_pb2.Job(id="bt1job", status=status, **fields)
    message.started_at.FromJsonString("2026-11-22T10:00:00Z")
    message.finished_at.FromJsonString("2026-11-22T10:05:00.5Z")
    message.actual_cloud_instance_type.name = "g1.1"
    return message


def ended(return_code: int = 0, **fields: Any) -> operation_pb2.Operation:
    operation = operation_pb2.Operation(id="bt1op", done=True)
    result = jobs_pb2.JobResult(return_code=return_code)
    operation.response.Pack(service_pb2.ExecuteProjectJobResponse(result=result, **fields))
    return operation


def failed(code: int, message: str = "no capacity") -> operation_pb2.Operation:
    operation = operation_pb2.Operation(id="bt1op", done=True)
    operation.error.code = code
    operation.error.message = message
    return operation


def outcome(operation: Any, ended_job: Any, **policy: Any) -> Outcome:
    return evaluate_outcome("bt1job", operation, ended_job, OutcomePolicy.of(**{**_STRICT, **policy}), link=LINK)


_STRICT = {"fail_on_missing_outputs": True, "skip_on_exit_code": None}


def test_a_success_is_a_plain_result() -> None:
    dataset = jobs_pb2.OutputDataset(id="bt1data", desc=jobs_pb2.OutputDatasetDesc(name="set", size_gb=3))
    found = outcome(ended(), job(output_files=[file("out.csv", "RESULT"), file("x")], output_datasets=[dataset]))
    assert found.error is None
    assert found.skip is None
    result = found.result.to_dict()
    assert json.loads(json.dumps(result)) == result
    assert result == {
        "job_id": "bt1job",
        "status": "SUCCESS",
        "return_code": 0,
        "status_details": "",
        "started_at": "2026-11-22T10:00:00+00:00",
        "finished_at": "2026-11-22T10:05:00.500000+00:00",
        "instance_type": "g1.1",
        "output_files": [
            {"path": "out.csv", "var": "RESULT", "size_bytes": 5, "sha256": "ab" * 32},
            {"path": "x", "var": None, "size_bytes": 5, "sha256": "ab" * 32},
        ],
        "missing_outputs": [],
        "output_datasets": [{"id": "bt1data", "name": "set", "size_gb": 3}],
        "queued_seconds": None,
        "setup_seconds": None,
        "run_seconds": 300.5,
    }


def test_the_result_tells_where_the_time_went() -> None:
    operation = ended()
    operation.created_at.FromJsonString("2026-11-22T09:58:30Z")
    found = evaluate_outcome("bt1job", operation, job(), OutcomePolicy(), queued_seconds=12.25).result
    assert (found.queued_seconds, found.setup_seconds, found.run_seconds) == (12.25, 90.0, 300.5)


def test_a_job_that_never_ran_has_no_run_time() -> None:
    operation = failed(8)
    operation.created_at.FromJsonString("2026-11-22T09:58:30Z")
    found = outcome(operation, jobs_pb2.Job(id="bt1job", status=jobs_pb2.ERROR)).result
    assert (found.setup_seconds, found.run_seconds) == (None, None)


@pytest.mark.parametrize("status", [jobs_pb2.ERROR, jobs_pb2.SUCCESS])
def test_a_return_code_fails_whatever_the_status_says(status: Any) -> None:
    found = outcome(ended(3), job(status, status_details="exit 3"))
    assert isinstance(found.error, JobFailedError)
    assert found.result.return_code == 3
    for part in ("bt1job", LINK, "return code 3", "exit 3"):
        assert part in str(found.error)


def test_a_return_code_may_mean_a_skip() -> None:
    for codes in (99, [99], {98, 99}):
        found = outcome(ended(99), job(jobs_pb2.ERROR), skip_on_exit_code=codes)
        assert found.error is None
        assert "99" in str(found.skip)
    assert outcome(ended(98), job(jobs_pb2.ERROR), skip_on_exit_code=99).skip is None
    assert outcome(ended(0), job(), skip_on_exit_code=0).skip is None


def test_an_operation_error_is_the_services() -> None:
    found = outcome(failed(13), job(jobs_pb2.ERROR, status_details="VM allocation"))
    assert isinstance(found.error, JobInfrastructureError)
    assert found.result.return_code is None
    for part in ("INTERNAL", "no capacity", "VM allocation", LINK):
        assert part in str(found.error)
    assert "code 77" in str(outcome(failed(77, "code 77"), job(jobs_pb2.ERROR)).error)


@pytest.mark.parametrize("code", [1, 10, 13])
def test_a_cancelled_job_is_told_by_its_status_or_its_operation(code: int) -> None:
    assert isinstance(outcome(failed(code), job(jobs_pb2.CANCELLED)).error, JobCancelledError)
    assert isinstance(outcome(ended(143), job(jobs_pb2.CANCELLED)).error, JobCancelledError)


def never_ran(status: Any = jobs_pb2.ERROR, **fields: Any) -> jobs_pb2.Job:
    """A job as it shows itself after Execute was refused for room."""
    message = job(status, log_files=[file("stdout.txt", size=0), file("stderr.txt", size=0)], **fields)
    message.ClearField("started_at")
    return message


def test_a_job_that_never_ran_found_no_room() -> None:
    found = outcome(None, never_ran(status_details="Quota."))
    assert type(found.error) is JobInfrastructureError
    for part in ("had no capacity for job bt1job", LINK, "never ran (Quota)", "A retry may succeed"):
        assert part in str(found.error)
    assert found.result.status == "ERROR"
    assert found.result.return_code is None


def test_a_lack_of_room_is_told_by_the_operation_too() -> None:
    found = outcome(failed(8, "no free instances"), never_ran())
    assert type(found.error) is JobInfrastructureError
    for part in ("had no capacity for job bt1job", "RESOURCE_EXHAUSTED", "no free instances"):
        assert part in str(found.error)
    assert "had no capacity" in str(outcome(failed(8), None).error)


def test_what_is_no_lack_of_room() -> None:
    assert "had no capacity" not in str(outcome(failed(13), never_ran()).error)
    assert "had no capacity" not in str(outcome(failed(8), job(jobs_pb2.ERROR)).error)
    assert type(outcome(ended(3), never_ran()).error) is JobFailedError
    # It has left something, so it has run, whatever became of started_at.
    wrote = never_ran()
    wrote.log_files[0].size_bytes = 1
    assert type(outcome(None, wrote).error) is JobFailedError
    assert type(outcome(None, never_ran(output_files=[file("out.csv")])).error) is JobFailedError
    for operation in (None, failed(8), failed(1)):
        assert type(outcome(operation, never_ran(jobs_pb2.CANCELLED)).error) is JobCancelledError


def test_a_cancelled_operation_suffices_when_the_job_is_gone() -> None:
    assert isinstance(outcome(failed(1), None).error, JobCancelledError)
    assert isinstance(outcome(failed(13), None).error, JobInfrastructureError)


def test_missing_outputs_fail_or_warn() -> None:
    operation = ended(output_files_errors=[upload_error("out.csv"), upload_error("model")])
    found = outcome(operation, job(file_errors=[upload_error("out.csv")]))
    assert isinstance(found.error, MissingOutputsError)
    assert found.result.missing_outputs == ("out.csv", "model")
    assert "out.csv, model" in str(found.error)
    found = outcome(operation, job(), fail_on_missing_outputs=False)
    assert found.error is None
    assert len(found.warnings) == 1
    assert "out.csv, model" in found.warnings[0]


def test_missing_outputs_are_seen_without_the_operation() -> None:
    assert isinstance(outcome(None, job(file_errors=[upload_error("out.csv")])).error, MissingOutputsError)


def test_a_failed_program_is_not_blamed_for_missing_outputs() -> None:
    operation = ended(1, output_files_errors=[upload_error("out.csv")])
    found = outcome(operation, job(jobs_pb2.ERROR))
    assert type(found.error) is JobFailedError
    assert found.result.missing_outputs == ("out.csv",)


def test_an_output_that_could_not_be_stored_is_the_services_fault() -> None:
    operation = ended(output_files_errors=[upload_error("out.csv", UPLOAD_FAILED)])
    found = outcome(operation, job(), fail_on_missing_outputs=False)
    assert isinstance(found.error, JobInfrastructureError)
    assert "out.csv failed" in str(found.error)


def test_an_output_that_could_not_be_stored_may_show_as_an_error() -> None:
    details = "Some output files were not uploaded due to errors: *.pt (Error while processing file)"
    errors = [upload_error("*.pt", UPLOAD_FAILED)]
    ended_job = job(jobs_pb2.ERROR, status_details=details, file_errors=errors)
    for operation in (ended(output_files_errors=errors), None):
        found = outcome(operation, ended_job)
        assert type(found.error) is JobInfrastructureError
        assert "couldn't store outputs of job bt1job" in str(found.error)
        assert "*.pt failed" in str(found.error)
    assert type(outcome(ended(2, output_files_errors=errors), ended_job).error) is JobFailedError


def test_a_log_file_that_could_not_be_stored_is_a_warning() -> None:
    lost = jobs_pb2.FileUploadError(log_file_name="train.log", type=UPLOAD_FAILED, description="too large")
    found = outcome(ended(output_files_errors=[lost]), job())
    assert found.error is None
    assert "train.log" in found.warnings[0]
    assert "too large" in found.warnings[0]


def test_with_the_job_alone_a_success_has_return_code_0_and_a_failure_none() -> None:
    assert outcome(None, job()).result.return_code == 0
    found = outcome(None, job(jobs_pb2.ERROR))
    assert isinstance(found.error, JobFailedError)
    assert found.result.return_code is None


def test_with_the_operation_alone_the_files_are_the_responses() -> None:
    operation = ended(output_files=[jobs_pb2.StorageFile(file=file("out.csv", "RESULT"), url="https://secret")])
    metadata = service_pb2.ExecuteProjectJobMetadata()
    metadata.metadata.started_at.CopyFrom(Timestamp(seconds=1))
    operation.metadata.Pack(metadata)
    result = outcome(operation, None).result
    assert result.status == "SUCCESS"
    assert result.started_at == "1970-01-01T00:00:01+00:00"
    assert [found.path for found in result.output_files] == ["out.csv"]
    assert "secret" not in json.dumps(result.to_dict())
    assert outcome(ended(2), None).result.status == "ERROR"


def test_a_status_that_never_settled_is_that_of_the_operation() -> None:
    assert outcome(ended(), job(jobs_pb2.UPLOADING_OUTPUT)).result.status == "SUCCESS"
    assert outcome(ended(), job(77)).error is None


def test_return_code_0_with_status_error_is_the_services_fault() -> None:
    found = outcome(ended(), job(jobs_pb2.ERROR, status_details="disk full"))
    assert isinstance(found.error, JobInfrastructureError)
    assert "disk full" in str(found.error)


def test_unknown_statuses_stay_visible() -> None:
    assert status_name(jobs_pb2.EXECUTING) == "EXECUTING"
    assert status_name(77) == "JOB_STATUS_77"


def test_only_a_response_knows_the_return_code() -> None:
    assert return_code_of(ended(3)) == 3
    assert return_code_of(failed(13)) is None
    assert return_code_of(operation_pb2.Operation()) is None
