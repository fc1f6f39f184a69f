"""Which files of a job can be downloaded, and what there is to say when some or all can't."""

from __future__ import annotations

from datetime import datetime, timezone
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_provider_datasphere.client.errors import JobRequestError, ResultsError
from airflow_provider_datasphere.client.outcome import TERMINAL, status_name
from airflow_provider_datasphere.client.uri import plain_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2


class ResultsGoneError(ResultsError):
    """The files don't exist any more or never did; no retry brings them back."""


class JobFile(NamedTuple):
    """A file of a job.

    :param kind: ``output``, ``log`` or ``diagnostic``.
    """

    kind: str
    file: jobs_pb2.File


def require_results(job: jobs_pb2.Job) -> None:
    """Refuse a job that has no files to give.

    :raises ResultsError: it still runs.
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


def downloadable(
    job: jobs_pb2.Job,
    patterns: Sequence[str] | None,
    *,
    with_logs: bool,
    with_diagnostics: bool,
    log: Any,
) -> list[JobFile]:
    """The files of ``job`` to download.

    A failed or cancelled job's outputs are those it left. Declared outputs that the program didn't make are told in
    the log; where a pattern asks for one of them by its name it is an error.

    :param patterns: glob patterns over paths and vars of outputs; None for all.
    :raises ResultsError: the job still runs.
    :raises ResultsGoneError: cleared or expired data, or an output whose upload to the storage failed.
    :raises JobRequestError: a pattern that fits no output.
    """
    require_results(job)
    if job.status_details and status_name(job.status) != "SUCCESS":
        log.warning("Job %s ended as %s (%s).", job.id, status_name(job.status), job.status_details)
    elif status_name(job.status) != "SUCCESS":
        log.warning("Job %s ended as %s; not all of its outputs may exist.", job.id, status_name(job.status))

    outputs = [file for file in job.output_files if _fits(file.desc, patterns)]
    errors = [error for error in job.file_errors if error.HasField("output_file_desc")]
    for pattern in patterns or ():
        if not any(_fits(file.desc, [pattern]) for file in job.output_files):
            gone = next((error for error in errors if _fits(error.output_file_desc, [pattern])), None)
            if gone is not None:
                raise ResultsGoneError(
                    f"Job {job.id} declares the output {gone.output_file_desc.path!r}, but has no such file: "
                    f"{gone.description or _error_type(gone)}."
                )
            existing = ", ".join(file.desc.path for file in job.output_files) or "none"
            raise JobRequestError(f"files={pattern!r} fits no output of job {job.id}. It has: {existing}.")
    for error in errors:
        if _fits(error.output_file_desc, patterns):
            log.warning(
                "Job %s has no output %s: %s.",
                job.id,
                error.output_file_desc.path,
                error.description or _error_type(error),
            )
    selected = [JobFile("output", file) for file in outputs]
    if with_logs:
        selected += [JobFile("log", file) for file in job.log_files]
    if with_diagnostics:
        selected += [JobFile("diagnostic", file) for file in job.diagnostic_files]
    if not selected:
        log.warning("Job %s has no files to download.", job.id)
    return selected


def _fits(desc: jobs_pb2.FileDesc, patterns: Sequence[str] | None) -> bool:
    names = [name for name in (desc.path, plain_path(desc.path), desc.var) if name]
    return patterns is None or any(
        name == pattern or fnmatchcase(name, pattern) for pattern in patterns for name in names
    )


def _error_type(error: jobs_pb2.FileUploadError) -> str:
    name: str = type(error).Type.Name(error.type)
    return {"NOT_FOUND": "the program didn't make it"}.get(name, f"storing it failed ({name})")
