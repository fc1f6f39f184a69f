"""Executions: what happens between Execute and the end of its operation, whatever plays the job."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Protocol

from datasphere_emulator.records import JobStatus, set_time
from datasphere_emulator.settings import CODES

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from datasphere_emulator.jobs import Jobs
    from datasphere_emulator.logs import JobLog
    from datasphere_emulator.records import JobRecord

logger = logging.getLogger(__name__)


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


class Executions:
    """All executions that go on. Used by the event loop's thread alone."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._running: dict[str, Execution] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, record: JobRecord) -> None:
        """Play a job whose record says that it executes; goes on with one that was interrupted."""
        execution = Execution(self._jobs, record)
        self._running[record.id] = execution
        self._tasks[record.id] = asyncio.get_running_loop().create_task(self._play(execution))

    def cancel(self, record: JobRecord) -> None:
        """Tell a running execution of its cancel."""
        self._running[record.id].cancel()

    async def stop(self) -> None:
        """Let go of all executions; programs go on, and the next emulator on this state goes on with them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self, execution: Execution) -> None:
        from datasphere_emulator.process import ProcessRun
        from datasphere_emulator.scripted import ScriptedRun

        record = execution.record
        run: Run = ScriptedRun(execution) if record.script is not None else ProcessRun(execution)
        try:
            ending = await run.run()
        except Exception as error:
            logger.exception("Job %s: the emulator failed to run it.", record.id)
            ending = Ending(error=(CODES["INTERNAL"], f"The emulator failed: {error!r}"))
        if record.cancel is not None:
            rest = record.cancel.requested_at + self._jobs.settings.cancelling_seconds - time.time()
            await asyncio.sleep(max(0.0, rest))
        self._finish(record, ending)
        await run.clean()
        del self._running[record.id], self._tasks[record.id]

    def _finish(self, record: JobRecord, ending: Ending) -> None:
        settings, job = self._jobs.settings, record.job
        details = ending.status_details
        error = ending.error
        if record.cancel is not None:
            status = JobStatus.CANCELLED
            reason = f" Reason: {record.cancel.reason}" if record.cancel.reason else ""
            details = details or f"Job was cancelled.{reason}"
            error = (CODES[settings.cancelled_operation_code], details)
        elif error is not None:
            status = JobStatus.ERROR
            details = details or error[1]
        elif ending.return_code != 0:
            status = JobStatus.Value(settings.status_after_nonzero_exit)
            details = details or f"Program returned code {ending.return_code}."
        else:
            status = JobStatus.SUCCESS
        job.status = status if ending.status is None else ending.status
        job.status_details = details
        for field in ("output_files", "file_errors", "output_datasets", "log_files", "diagnostic_files"):
            getattr(job, field).extend(getattr(ending, field))
        files = [*job.output_files, *job.log_files, *job.diagnostic_files]
        job.data_size_bytes += sum(file.size_bytes for file in files)
        set_time(job.finished_at, time.time() if ending.time is None else ending.time)
        self._jobs.ended(record, ending.return_code, error)
