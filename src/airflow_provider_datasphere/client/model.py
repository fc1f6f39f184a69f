"""Values that describe a job: statuses, references, results. Pure: no I/O."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

TERMINAL = frozenset({jobs_pb2.SUCCESS, jobs_pb2.ERROR, jobs_pb2.CANCELLED})


def status_name(status: int) -> str:
    """``EXECUTING`` and so on; a number this version of the API doesn't know yet stays visible as a number."""
    try:
        return str(jobs_pb2.JobStatus.Name(status))
    except ValueError:
        return f"JOB_STATUS_{status}"


def is_archive(file: jobs_pb2.File) -> bool:
    """Return whether a file of a job is the zip file of a directory."""
    return bool(file.compression_type == jobs_pb2.ZIP)


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job as messages name it."""

    job_id: str
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.job_id} ({self.link})" if self.link else self.job_id

    @property
    def cancel_hint(self) -> str:
        """What to do about a job that can't be monitored any more, in a sentence."""
        return (
            "It may still be running and costing money: cancel it on its page or with "
            f"CancelJobOperator(job_id={self.job_id!r})."
        )


@dataclass(frozen=True, slots=True)
class JobHandle:
    """What is needed to watch a job.

    :param operation_id: the Execute operation; ``None`` when only the job is known. The return code exists nowhere
        else.
    :param first_execute_at: when Execute was first called, epoch seconds; ``None``: not known.
    :param accepted_at: when Execute was accepted, epoch seconds; ``None``: not known, or it wasn't yet.
    """

    job_id: str
    operation_id: str | None = None
    first_execute_at: float | None = field(default=None, compare=False)
    accepted_at: float | None = field(default=None, compare=False)

    @property
    def queued_seconds(self) -> float | None:
        """How long the job waited for room, from the first Execute to the accepted one; ``None``: not known."""
        if self.first_execute_at is None or self.accepted_at is None:
            return None
        return round(max(0.0, self.accepted_at - self.first_execute_at), 3)


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
    :param queued_seconds: from the first Execute to the accepted one; ``None``: not known. Likewise the other two.
    :param setup_seconds: from the accepted Execute until the program started.
    :param run_seconds: from the program's start to the job's end, its outputs stored.
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
    queued_seconds: float | None = None
    setup_seconds: float | None = None
    run_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for XCom."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
