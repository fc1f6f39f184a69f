"""One execution of a job: its result, and the context that process runs and scripted runs share."""

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
class RunResult:
    """Result of an execution.

    :param return_code: return code of the program.
    :param error: code and message of the operation's error; None for a result.
    :param status: raw status number that replaces the regular one.
    :param time: time of the end, seconds since the epoch; None for now.
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
    """Runs a job: as a process, or from a script."""

    async def run(self) -> RunResult:
        """Run the job to its end; resume a run of an earlier emulator process."""

    async def clean(self) -> None:
        """Remove temporary files once the job's end is saved."""


class RunContext:
    """What a run works on: the job's record, its log, and cancellation."""

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
        """Set the job's status unless it is being cancelled. :param at: seconds since the epoch; None for now."""
        job = self.record.job
        if status == JobStatus.EXECUTING and not job.HasField("started_at"):
            set_time(job.started_at, time.time() if at is None else at)
        if self.record.cancel is None:
            job.status = status
        self.save()

    def set_progress(self, progress: jobs_pb2.JobProgress) -> None:
        """Set the job's last progress message."""
        self.record.progress = progress
        self.save()

    def wants_outputs(self, return_code: int = 0) -> bool:
        """Return whether outputs are collected from a program that has ended or was cancelled while computing."""
        settings, cancel = self.jobs.settings, self.record.cancel
        if cancel is None:
            return return_code == 0 or settings.outputs_after_error == "collected"
        rule = settings.outputs_after_cancel
        return rule == "computing" or (rule == "graceful" and cancel.graceful)

    def save(self) -> None:
        """Save the record."""
        self.jobs.save(self.record)

    def cancel(self) -> None:
        """Wake the run: the record's ``cancel`` has changed."""
        self._cancelled.set()

    async def sleep(self, seconds: float | None) -> bool:
        """Wait until the first cancel, or this long; return whether the job was cancelled.

        :param seconds: None waits for a cancel without limit.
        """
        if seconds is not None and seconds <= 0:
            return self._cancelled.is_set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._cancelled.wait(), seconds)
        return self._cancelled.is_set()
