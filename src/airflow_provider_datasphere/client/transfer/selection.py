"""Selection of a job's files to download."""

from __future__ import annotations

from datetime import datetime, timezone
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from airflow_provider_datasphere.client.errors import JobRequestError, ResultsError, ResultsGoneError
from airflow_provider_datasphere.client.model import TERMINAL, status_name
from airflow_provider_datasphere.client.uri import plain_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.logger import LoggerLike


class JobFile(NamedTuple):
    """A file of a job.

    :param kind: ``output``, ``log`` or ``diagnostic``.
    """

    kind: str
    file: jobs_pb2.File


def require_results(job: jobs_pb2.Job) -> None:
    """Raise unless the job has ended and its data still exist.

    :raises ResultsError: the job is still running.
    :raises ResultsGoneError: its data are cleared or expired.
    """
    if job.data_cleared:
        raise ResultsGoneError(
            f"The data of job {job.id} are cleared: its files are gone. Run the job again; data live as long as "
            "data_ttl says (14 days unless set)."
        )
    if job.HasField("data_expires_at"):
        expired = job.data_expires_at.ToDatetime(tzinfo=timezone.utc)
        if expired < datetime.now(timezone.utc):
            raise ResultsGoneError(
                f"The data of job {job.id} expired at {expired:%Y-%m-%d %H:%M} UTC: its files are gone. Run the job "
                "again, with a longer data_ttl."
            )
    if job.status not in TERMINAL:
        raise ResultsError(
            f"Job {job.id} hasn't ended yet ({status_name(job.status)}): it has no results to download. Wait for it, "
            "with wait_for_completion=True of the operator that runs it or with DataSphereJobSensor."
        )


def select_files(
    job: jobs_pb2.Job,
    patterns: Sequence[str] | None,
    *,
    with_logs: bool,
    with_diagnostics: bool,
    logger: LoggerLike,
) -> list[JobFile]:
    """Return the files of ``job`` to download.

    A failed or cancelled job's outputs are those it left. Declared outputs that the program didn't make are logged as
    warnings; a pattern that matches nothing else is an error.

    :param patterns: glob patterns over paths and vars of outputs; None for all.
    :raises ResultsError: the job is still running.
    :raises ResultsGoneError: cleared or expired data, or an output whose upload to the storage failed.
    :raises JobRequestError: a pattern that matches no output.
    """
    require_results(job)
    status = status_name(job.status)
    if status != "SUCCESS":
        reason = f" ({job.status_details})" if job.status_details else "; some of its outputs may not exist"
        logger.warning("Job %s ended with status %s%s.", job.id, status, reason)
    failed = [error for error in job.file_errors if error.HasField("output_file_desc")]
    for pattern in patterns or ():
        _require_match(job, pattern, failed)
    for error in failed:
        if _matches(error.output_file_desc, patterns):
            logger.warning("Job %s has no output %s: %s.", job.id, error.output_file_desc.path, _reason(error))
    selected = [JobFile("output", file) for file in job.output_files if _matches(file.desc, patterns)]
    if with_logs:
        selected += [JobFile("log", file) for file in job.log_files]
    if with_diagnostics:
        selected += [JobFile("diagnostic", file) for file in job.diagnostic_files]
    if not selected:
        logger.warning("Job %s has no files to download.", job.id)
    return selected


def _require_match(job: jobs_pb2.Job, pattern: str, failed: Sequence[jobs_pb2.FileUploadError]) -> None:
    """Raise unless the pattern matches an output that exists.

    :param failed: outputs that the service doesn't have.
    """
    if any(_matches(file.desc, [pattern]) for file in job.output_files):
        return
    for error in failed:
        if _matches(error.output_file_desc, [pattern]):
            raise ResultsGoneError(
                f"Job {job.id} declares the output {error.output_file_desc.path!r}, but has no such file: "
                f"{_reason(error)}."
            )
    existing = ", ".join(file.desc.path for file in job.output_files) or "none"
    raise JobRequestError(f"files={pattern!r} matches no output of job {job.id}. Its outputs: {existing}.")


def _matches(desc: jobs_pb2.FileDesc, patterns: Sequence[str] | None) -> bool:
    names = [name for name in (desc.path, plain_path(desc.path), desc.var) if name]
    return patterns is None or any(
        name == pattern or fnmatchcase(name, pattern) for pattern in patterns for name in names
    )


def _reason(error: jobs_pb2.FileUploadError) -> str:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    if error.description:
        return str(error.description)
    if error.type == jobs_pb2.FileUploadError.NOT_FOUND:
        return "the program didn't create it"
    return "uploading it to the storage failed"
