"""One execution: how it can end, and the stage that whatever plays the job acts on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Protocol

from datasphere_emulator.records import JobStatus, set_time

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from datasphere_emulator.jobs import Jobs
    from datasphere_emulator.logs import JobLog
    from datasphere_emulator.records import JobRecord


@dataclasses.dataclass
class Ending:
    """How an execution ended.

    :param return_code: of the program.
    :param error: code and message of the operation, in place of a result.
    :param status: raw status number in place of the right one.
    :param time: when, seconds since the epoch; None for now.
    """

    return_code: int = 0
    error: tuple[int, str] | None = None
    output_files: list[jobs_pb2.File] = dataclasses.field(default_factory=list)
    file_errors: list[jobs_pb2.FileUploadError] = dataclasses.field(default_factory=list)
    output_datasets: list[jobs_pb2.OutputDataset] = dataclasses.field(default_factory=list)
    log_files: list[jobs_pb2.File] = dataclasses.field(default_factory=list)
    diagnostic_files: list[jobs_pb2.File] = dataclasses.field(default_factory=list)
    status: JobStatus.ValueType | None = None
    status_details: str = ""
    time: float | None = None


class Run(Protocol):
    """What plays a job: a process or a script."""

    async def run(self) -> Ending:
        """Play it to its end; goes on where an earlier emulator process left off."""

    async def clean(self) -> None:
        """Remove what is of no use once the job's end is written down."""


class Execution:
    """The stage a run plays on: the job's record, its log, and whether somebody wants it to end."""

    def __init__(self, jobs: Jobs, record: JobRecord) -> None:
        self.jobs = jobs
        self.record = record
        self._cancelled = asyncio.Event()
        if record.cancel is not None:
            self._cancelled.set()

    @property
    def log(self) -> JobLog:
        """The job's log."""
        return self.jobs.log(self.record.id)

    def set_status(self, status: JobStatus.ValueType, at: float | None = None) -> None:
        """Show a status, unless the job is being cancelled. :param at: seconds since the epoch, now if None."""
        job = self.record.job
        if status == JobStatus.EXECUTING and not job.HasField("started_at"):
            set_time(job.started_at, time.time() if at is None else at)
        if self.record.cancel is None:
            job.status = status
        self.save()

    def set_progress(self, progress: jobs_pb2.JobProgress) -> None:
        """Show a progress message."""
        self.record.progress = progress
        self.save()

    def save(self) -> None:
        """Write the record down."""
        self.jobs.save(self.record)

    def cancel(self) -> None:
        """Tell the run that the record's ``cancel`` is new or has changed."""
        self._cancelled.set()

    async def sleep(self, seconds: float | None) -> bool:
        """Wait so long, None for ever, or until the first cancel; returns whether there was one."""
        if seconds is not None and seconds <= 0:
            return self._cancelled.is_set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._cancelled.wait(), seconds)
        return self._cancelled.is_set()
