"""How a job ended: one pure function from what the service says to a result, and to an error where there is one.

Every mode of every operator and sensor ends here, so that the same job means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
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

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from yandex.cloud.operation import operation_pb2

TERMINAL = frozenset({jobs_pb2.SUCCESS, jobs_pb2.ERROR, jobs_pb2.CANCELLED})
_GRPC_CANCELLED = 1


def status_name(status: int) -> str:
    """``EXECUTING`` and so on; a number this version of the API doesn't know yet stays visible as a number."""
    try:
        return str(jobs_pb2.JobStatus.Name(status))
    except ValueError:
        return f"JOB_STATUS_{status}"


@dataclass(frozen=True)
class JobRef:
    """A job as messages name it."""

    job_id: str
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.job_id} ({self.link})" if self.link else self.job_id


@dataclass(frozen=True)
class JobHandle:
    """What is needed to watch a job.

    :param operation_id: the Execute operation; ``None`` when only the job is known. The return code exists nowhere
        else.
    """

    job_id: str
    operation_id: str | None = None


@dataclass(frozen=True)
class OutputFile:
    """One output file that the service stored."""

    path: str
    var: str | None
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class OutputDataset:
    """One dataset that the job made."""

    id: str
    name: str
    size_gb: int


@dataclass(frozen=True)
class JobResult:
    """A finished job, as plain values.

    :param return_code: of the program; ``None`` when the operation isn't known and the job isn't a success.
    :param started_at: ISO 8601, UTC; likewise ``finished_at``.
    :param missing_outputs: paths of declared outputs that the program didn't make.
    """

    job_id: str
    status: str
    return_code: int | None
    status_details: str
    started_at: str | None
    finished_at: str | None
    instance_type: str | None
    output_files: tuple[OutputFile, ...] = ()
    missing_outputs: tuple[str, ...] = ()
    output_datasets: tuple[OutputDataset, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for XCom."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class Policy:
    """What a task makes of an ended job.

    :param skip_on_exit_code: return codes that skip the task in place of failing it.
    """

    fail_on_missing_outputs: bool = True
    skip_on_exit_code: Collection[int] = frozenset()

    @classmethod
    def of(cls, *, fail_on_missing_outputs: bool, skip_on_exit_code: int | Iterable[int] | None) -> Policy:
        if skip_on_exit_code is None:
            codes: frozenset[int] = frozenset()
        elif isinstance(skip_on_exit_code, int):
            codes = frozenset({skip_on_exit_code})
        else:
            codes = frozenset(skip_on_exit_code)
        return cls(fail_on_missing_outputs, codes)


@dataclass(frozen=True)
class Outcome:
    """The result, and what the task should do: succeed (no error, no skip), skip, or raise ``error``."""

    result: JobResult
    error: DataSphereError | None = None
    skip: str | None = None
    warnings: tuple[str, ...] = field(default=())


def judge(
    job_id: str,
    operation: operation_pb2.Operation | None,
    job: jobs_pb2.Job | None,
    policy: Policy,
    *,
    link: str | None = None,
) -> Outcome:
    """What an ended job came to.

    :param operation: the Execute operation, done; ``None`` when it isn't known.
    :param job: the job, ended; ``None`` when only the operation could be read.
    :param link: the job's page, for messages.
    """
    response = _response(operation)
    result = _result(job_id, operation, response, job)
    ref = JobRef(job_id, link)
    upload_errors = _upload_errors(response, job)
    warnings = [
        f"Log file {error.log_file_name} of job {job_id} wasn't stored: {error.description}"
        for error in upload_errors
        if error.HasField("log_file_name")
    ]
    details = f" ({_phrase(result.status_details)})" if result.status_details else ""

    if result.status == "CANCELLED":
        return Outcome(
            result,
            JobCancelledError(f"Job {ref} was cancelled{details}. Clear the task to run a new job."),
            None,
            tuple(warnings),
        )
    if result.return_code:
        if result.return_code in policy.skip_on_exit_code:
            skip = f"Job {ref} ended with return code {result.return_code}, which this task takes as a skip."
            return Outcome(result, None, skip, tuple(warnings))
        error: DataSphereError = JobFailedError(
            f"The program of job {ref} ended with return code {result.return_code}{details}. Its output is in this "
            "log and on the job's page; outputs that it made can still be downloaded."
        )
        return Outcome(result, error, None, tuple(warnings))
    if operation is not None and operation.HasField("error"):
        return Outcome(
            result,
            JobInfrastructureError(
                f"DataSphere ended job {ref} with an error: {_code_name(operation.error.code)}: "
                f"{_phrase(operation.error.message or 'no message')}{details}. Often a lack of free instances: another "
                "try, or more cloud_instance_types, helps."
            ),
            None,
            tuple(warnings),
        )
    if result.status != "SUCCESS":
        if result.return_code is None:
            error = JobFailedError(
                f"Job {ref} ended with status {result.status}{details}. Its page and its log files tell why; its "
                "return code is known to its operation only, which isn't at hand (operation_id)."
            )
        else:
            error = JobInfrastructureError(
                f"The program of job {ref} ended with return code 0, but the job's status is {result.status}{details}."
            )
        return Outcome(result, error, None, tuple(warnings))

    not_stored = _not_stored(upload_errors)
    if not_stored:
        listed = "; ".join(
            f"{e.output_file_desc.path}: {_phrase(e.description or 'upload failed')}" for e in not_stored
        )
        error = JobInfrastructureError(
            f"DataSphere couldn't store outputs of job {ref}: {listed}. The others can be downloaded; another try runs "
            "the job again."
        )
        return Outcome(result, error, None, tuple(warnings))
    if result.missing_outputs:
        listed = ", ".join(result.missing_outputs)
        text = f"The program of job {ref} ended with return code 0 but didn't make {listed}"
        if policy.fail_on_missing_outputs:
            error = MissingOutputsError(
                f"{text}. Mend the program or the path, or set fail_on_missing_outputs=False if that is fine."
            )
            return Outcome(result, error, None, tuple(warnings))
        warnings.append(f"{text}.")
    return Outcome(result, None, None, tuple(warnings))


def _phrase(text: str) -> str:
    """The service's words as a part of a sentence."""
    return text.rstrip().rstrip(".")


def has_unstored_outputs(job: jobs_pb2.Job) -> bool:
    """Whether the service couldn't store an output of this ended job: its fault, which a new job may not meet."""
    return bool(_not_stored(job.file_errors))


def execute_metadata(
    operation: operation_pb2.Operation,
) -> project_job_service_pb2.ExecuteProjectJobMetadata:
    """The metadata of an Execute operation: status and progress of the job while it runs."""
    metadata = project_job_service_pb2.ExecuteProjectJobMetadata()
    operation.metadata.Unpack(metadata)
    return metadata


def other_owner(operation: operation_pb2.Operation, job_id: str) -> str | None:
    """Whose operation this is, in words, if it isn't an Execute operation of the job; ``None`` if nothing says so."""
    expected = project_job_service_pb2.ExecuteProjectJobMetadata.DESCRIPTOR
    package, _, name = operation.metadata.TypeName().rpartition(".")
    if package == expected.file.package and name != expected.name:
        return f"one of {name.removesuffix('Metadata')}"
    metadata = execute_metadata(operation)
    owner = metadata.metadata.id or metadata.job.id
    return f"the operation of job {owner}" if owner and owner != job_id else None


def return_code_of(operation: operation_pb2.Operation) -> int | None:
    """The program's return code, which only the Execute operation knows; ``None`` if it doesn't."""
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
) -> JobResult:
    status = _status(operation, response, job)
    # The same fields exist in the job and, nearly all, in the operation's metadata, for a job that is gone.
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
    )


def _status(
    operation: operation_pb2.Operation | None,
    response: project_job_service_pb2.ExecuteProjectJobResponse | None,
    job: jobs_pb2.Job | None,
) -> int:
    """The job's own terminal status; else the one that the ended operation implies."""
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


def _not_stored(errors: Iterable[jobs_pb2.FileUploadError]) -> list[jobs_pb2.FileUploadError]:
    missing = jobs_pb2.FileUploadError.NOT_FOUND
    return [error for error in errors if error.HasField("output_file_desc") and error.type != missing]


def _iso(described: Any, name: str) -> str | None:
    if not described.HasField(name):
        return None
    moment: Timestamp = getattr(described, name)
    return str(moment.ToDatetime(tzinfo=timezone.utc).isoformat())


def _code_name(code: int) -> str:
    from grpc import StatusCode

    return next((status.name for status in StatusCode if status.value[0] == code), str(code))
