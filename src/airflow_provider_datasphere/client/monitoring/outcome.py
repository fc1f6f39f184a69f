"""How a job ended: from the service's operation and job to a result, and to an error where there is one. Pure: no I/O.

Every mode of operators and sensor ends here, so that the same job means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timezone
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    JobCancelledError,
    JobFailedError,
    JobInfrastructureError,
    MissingOutputsError,
)
from airflow_provider_datasphere.client.model import TERMINAL, JobRef, JobResult, OutputDataset, OutputFile, status_name
from airflow_provider_datasphere.client.rpc import status_code_name

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from yandex.cloud.operation import operation_pb2

    from airflow_provider_datasphere.client.logger import LoggerLike

_GRPC_CANCELLED = 1
_GRPC_RESOURCE_EXHAUSTED = 8


@dataclass(frozen=True)
class OutcomePolicy:
    """Which ends of a job fail or skip the task.

    :param fail_on_missing_outputs: fail when a declared output is missing; otherwise warn.
    :param skip_on_exit_code: return codes that skip the task instead of failing it.
    :param proof: path of the output without which a success isn't adopted; empty: there is no such output.
    """

    fail_on_missing_outputs: bool = True
    skip_on_exit_code: Collection[int] = frozenset()
    proof: str = ""

    @classmethod
    def of(
        cls, *, fail_on_missing_outputs: bool, skip_on_exit_code: int | Iterable[int] | None, proof: str = ""
    ) -> OutcomePolicy:
        """Build the policy from an operator's arguments."""
        if skip_on_exit_code is None:
            codes: frozenset[int] = frozenset()
        elif isinstance(skip_on_exit_code, int):
            codes = frozenset({skip_on_exit_code})
        else:
            codes = frozenset(skip_on_exit_code)
        return cls(fail_on_missing_outputs, codes, proof)

    def has_proof(self, job: jobs_pb2.Job) -> bool:
        """Return whether an ended job has left the output that shows its success."""
        return not self.proof or any(file.desc.path == self.proof for file in job.output_files)


@dataclass(frozen=True)
class Outcome:
    """The result of a job, and what the task does: raise ``error``, skip with the message ``skip``, or succeed."""

    result: JobResult
    error: DataSphereError | None = None
    skip: str | None = None
    warnings: tuple[str, ...] = ()

    def log_warnings(self, logger: LoggerLike) -> None:
        """Log each warning."""
        for warning in self.warnings:
            logger.warning("%s", warning)


def evaluate_outcome(
    job_id: str,
    operation: operation_pb2.Operation | None,
    job: jobs_pb2.Job | None,
    policy: OutcomePolicy,
    *,
    link: str | None = None,
    queued_seconds: float | None = None,
) -> Outcome:
    """Evaluate how a job ended.

    :param operation: the Execute operation, done; ``None`` when it isn't known.
    :param job: the job, ended; ``None`` when only the operation could be read.
    :param link: the job's page, for messages.
    :param queued_seconds: how long it waited for room, for the result; ``None``: not known.
    """
    response = _response(operation)
    result = _result(job_id, operation, response, job, queued_seconds)
    ref = JobRef(job_id, link)
    upload_errors = _upload_errors(response, job)
    warnings = [
        f"Log file {error.log_file_name} of job {job_id} wasn't stored: {error.description}"
        for error in upload_errors
        if error.HasField("log_file_name")
    ]
    skip = _skip(ref, result, policy)
    error = None if skip else _failure(ref, result, operation, job, _unstored_outputs(upload_errors))
    if skip is None and error is None and result.missing_outputs:
        missing = ", ".join(result.missing_outputs)
        text = f"The program of job {ref} ended with return code 0 but didn't create {missing}"
        if policy.fail_on_missing_outputs:
            error = MissingOutputsError(
                f"{text}. Fix the program or the output path, or set fail_on_missing_outputs=False if that is expected."
            )
        else:
            warnings.append(f"{text}.")
    return Outcome(result, error, skip, tuple(warnings))


def _skip(ref: JobRef, result: JobResult, policy: OutcomePolicy) -> str | None:
    """Return why the task is skipped; ``None``: it isn't."""
    if result.status == "CANCELLED" or not result.return_code or result.return_code not in policy.skip_on_exit_code:
        return None
    return f"Job {ref} ended with return code {result.return_code}: skipping the task (skip_on_exit_code)."


def _failure(
    ref: JobRef,
    result: JobResult,
    operation: operation_pb2.Operation | None,
    job: jobs_pb2.Job | None,
    not_stored: list[jobs_pb2.FileUploadError],
) -> DataSphereError | None:
    """Return why the job failed; ``None`` for a success, whose outputs may be missing."""
    details = f" ({_phrase(result.status_details)})" if result.status_details else ""
    if result.status == "CANCELLED":
        return JobCancelledError(f"Job {ref} was cancelled{details}. Clear the task to run a new job.")
    if result.return_code:
        return JobFailedError(
            f"The program of job {ref} ended with return code {result.return_code}{details}. Its output is in this "
            "log and on the job's page; the output files that it created can still be downloaded."
        )
    operation_error = _operation_error(operation)
    if _had_no_capacity(operation, job, result):
        reason = f": {operation_error}" if operation_error else ""
        return JobInfrastructureError(
            f"DataSphere had no capacity for job {ref}, and it never ran{reason}{details}. A retry may succeed."
        )
    if operation_error:
        return JobInfrastructureError(
            f"DataSphere ended job {ref} with an error: {operation_error}{details}. Often there is no free instance: "
            "retry, or allow more cloud_instance_types."
        )
    if not_stored:
        listed = "; ".join(
            f"{error.output_file_desc.path}: {_phrase(error.description or 'upload failed')}" for error in not_stored
        )
        return JobInfrastructureError(
            f"DataSphere couldn't store outputs of job {ref}: {listed}. The others can be downloaded; a retry "
            "runs a new job."
        )
    if result.status == "SUCCESS":
        return None
    if result.return_code is None:
        return JobFailedError(
            f"Job {ref} ended with status {result.status}{details}. See its page and its log files for the reason; "
            "its return code isn't available without operation_id."
        )
    return JobInfrastructureError(
        f"The program of job {ref} ended with return code 0, but the job's status is {result.status}{details}."
    )


def _operation_error(operation: operation_pb2.Operation | None) -> str | None:
    """The error that ended the operation, as part of a sentence."""
    if operation is None or not operation.HasField("error"):
        return None
    return f"{status_code_name(operation.error.code)}: {_phrase(operation.error.message or 'no message')}"


def _had_no_capacity(operation: operation_pb2.Operation | None, job: jobs_pb2.Job | None, result: JobResult) -> bool:
    """Whether status ERROR means a lack of capacity: the program never ran, so it can't have failed.

    A job whose Execute was rejected for capacity shows ERROR a few seconds later: no start, no operation, empty log
    files.
    """
    if result.status != "ERROR" or result.return_code is not None or result.started_at is not None:
        return False
    if operation is not None:
        return operation.HasField("error") and operation.error.code == _GRPC_RESOURCE_EXHAUSTED
    return job is not None and not job.output_files and not any(file.size_bytes for file in job.log_files)


def _phrase(text: str) -> str:
    """Make a text of the service part of a sentence."""
    return text.rstrip().rstrip(".")


def has_unstored_outputs(job: jobs_pb2.Job) -> bool:
    """Whether the service failed to store an output of this ended job; a new job may succeed."""
    return bool(_unstored_outputs(job.file_errors))


def execute_metadata(
    operation: operation_pb2.Operation,
) -> project_job_service_pb2.ExecuteProjectJobMetadata:
    """Return the metadata of an Execute operation: status and progress of the job while it runs."""
    metadata = project_job_service_pb2.ExecuteProjectJobMetadata()
    operation.metadata.Unpack(metadata)
    return metadata


def mismatched_owner(operation: operation_pb2.Operation, job_id: str) -> str | None:
    """Describe an operation that isn't an Execute operation of the job; ``None``: nothing says that it isn't."""
    expected = project_job_service_pb2.ExecuteProjectJobMetadata.DESCRIPTOR
    package, _, name = operation.metadata.TypeName().rpartition(".")
    if package == expected.file.package and name != expected.name:
        return f"a {name.removesuffix('Metadata')} operation"
    metadata = execute_metadata(operation)
    owner = metadata.metadata.id or metadata.job.id
    return f"the operation of job {owner}" if owner and owner != job_id else None


def return_code_of(operation: operation_pb2.Operation) -> int | None:
    """Return the program's return code, which only the Execute operation has; ``None`` if it hasn't."""
    response = _response(operation)
    return None if response is None else int(response.result.return_code)


def _response(
    operation: operation_pb2.Operation | None,
) -> project_job_service_pb2.ExecuteProjectJobResponse | None:
    if operation is None or not operation.HasField("response"):
        return None
    response = project_job_service_pb2.ExecuteProjectJobResponse()
    operation.response.Unpack(response)
    return response


def _result(
    job_id: str,
    operation: operation_pb2.Operation | None,
    response: project_job_service_pb2.ExecuteProjectJobResponse | None,
    job: jobs_pb2.Job | None,
    queued_seconds: float | None,
) -> JobResult:
    status = _status(operation, response, job)
    # A deleted job has nearly all of its fields in the operation's metadata.
    described: Any = job if job is not None else (execute_metadata(operation).metadata if operation else jobs_pb2.Job())
    if response is not None:
        return_code: int | None = response.result.return_code
    else:
        return_code = 0 if operation is None and status == jobs_pb2.SUCCESS else None
    files: Iterable[jobs_pb2.File] = ()
    if job is not None and job.output_files:
        files = job.output_files
    elif response is not None:
        files = [stored.file for stored in response.output_files]
    datasets: Iterable[jobs_pb2.OutputDataset] = ()
    if job is not None and job.output_datasets:
        datasets = job.output_datasets
    elif response is not None:
        datasets = response.output_datasets
    return JobResult(
        job_id=job_id,
        status=status_name(status),
        return_code=return_code,
        status_details=described.status_details,
        started_at=_iso(described, "started_at"),
        finished_at=_iso(described, "finished_at"),
        instance_type=(job.actual_cloud_instance_type.name or None) if job is not None else None,
        output_files=tuple(
            OutputFile(file.desc.path, file.desc.var or None, file.size_bytes, file.sha256) for file in files
        ),
        missing_outputs=tuple(
            dict.fromkeys(
                error.output_file_desc.path
                for error in _upload_errors(response, job)
                if error.HasField("output_file_desc") and error.type == jobs_pb2.FileUploadError.NOT_FOUND
            )
        ),
        output_datasets=tuple(OutputDataset(d.id, d.desc.name, d.desc.size_gb) for d in datasets),
        queued_seconds=queued_seconds,
        # The operation is created when Execute is accepted.
        setup_seconds=_seconds_between(operation, "created_at", described, "started_at"),
        run_seconds=_seconds_between(described, "started_at", described, "finished_at"),
    )


def _status(
    operation: operation_pb2.Operation | None,
    response: project_job_service_pb2.ExecuteProjectJobResponse | None,
    job: jobs_pb2.Job | None,
) -> int:
    """Return the job's own terminal status, else the one that the ended operation implies."""
    if job is not None and job.status in TERMINAL:
        return job.status
    if response is not None:
        return jobs_pb2.ERROR if response.result.return_code else jobs_pb2.SUCCESS
    if operation is not None and operation.HasField("error") and operation.error.code == _GRPC_CANCELLED:
        return jobs_pb2.CANCELLED
    return jobs_pb2.ERROR if operation is not None or job is None else job.status


def _upload_errors(
    response: project_job_service_pb2.ExecuteProjectJobResponse | None, job: jobs_pb2.Job | None
) -> list[jobs_pb2.FileUploadError]:
    errors: Mapping[bytes, jobs_pb2.FileUploadError] = {
        error.SerializeToString(deterministic=True): error
        for error in (*(response.output_files_errors if response else ()), *(job.file_errors if job else ()))
    }
    return list(errors.values())


def _unstored_outputs(errors: Iterable[jobs_pb2.FileUploadError]) -> list[jobs_pb2.FileUploadError]:
    missing = jobs_pb2.FileUploadError.NOT_FOUND
    return [error for error in errors if error.HasField("output_file_desc") and error.type != missing]


def _iso(described: Any, name: str) -> str | None:
    if not described.HasField(name):
        return None
    moment: Timestamp = getattr(described, name)
    return str(moment.ToDatetime(tzinfo=timezone.utc).isoformat())


def _seconds_between(start: Any, start_name: str, end: Any, end_name: str) -> float | None:
    """Return the time between two fields of the service's messages, which are of one clock; ``None``: one isn't set."""
    if start is None or not start.HasField(start_name) or not end.HasField(end_name):
        return None
    nanoseconds = getattr(end, end_name).ToNanoseconds() - getattr(start, start_name).ToNanoseconds()
    return float(round(max(0, nanoseconds) / 1e9, 3))
