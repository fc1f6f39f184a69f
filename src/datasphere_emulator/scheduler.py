"""Runs jobs, from Execute to the end of its operation."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from typing import TYPE_CHECKING

from datasphere_emulator.errors import internal_error
from datasphere_emulator.outputs import failed_uploads_details
from datasphere_emulator.process_run import ProcessRun, is_running, kill_program
from datasphere_emulator.records import JobStatus, set_time
from datasphere_emulator.run_context import RunContext, RunResult
from datasphere_emulator.scripted_run import ScriptedRun
from datasphere_emulator.settings import CODES

if TYPE_CHECKING:
    from datasphere_emulator.jobs import Jobs
    from datasphere_emulator.records import JobRecord
    from datasphere_emulator.run_context import Run

logger = logging.getLogger(__name__)

#: Longest wait for killed programs to end, seconds.
_KILL_TIMEOUT = 5.0
#: Time between attempts to save the end of a job on a full disk, seconds.
_SAVE_RETRY_SECONDS = 1.0


class Scheduler:
    """Runs all executed jobs, each in a task. Used only in the event loop's thread."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._contexts: dict[str, RunContext] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, record: JobRecord) -> None:
        """Run a job whose record is active; an interrupted run is resumed."""
        context = RunContext(self._jobs, record)
        self._contexts[record.id] = context
        self._tasks[record.id] = asyncio.get_running_loop().create_task(self._run_job(context))

    def cancel(self, record: JobRecord) -> None:
        """Tell a running job that its record's ``cancel`` has changed."""
        self._contexts[record.id].cancel()

    def resume(self) -> None:
        """Resume the jobs that an earlier emulator left running."""
        for record in self._jobs:
            if record.active:
                self.start(record)

    async def stop(self, *, kill: bool) -> None:
        """Stop all runs; their programs keep running, and the next emulator on this state reattaches to them.

        :param kill: kill the programs instead.
        """
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not kill:
            return
        folders = [self._jobs.folder(record.id) for record in self._jobs if record.active]
        deadline = time.monotonic() + _KILL_TIMEOUT
        while (running := [folder for folder in folders if is_running(folder)]) and time.monotonic() < deadline:
            for folder in running:
                kill_program(folder)
            await asyncio.sleep(0.02)

    async def _run_job(self, context: RunContext) -> None:
        record = context.record
        run: Run = ScriptedRun(context) if record.script is not None else ProcessRun(context)
        try:
            await self._show_preparing(context)
            result = await run.run()
        except (OSError, sqlite3.Error) as failure:
            status = internal_error(failure)
            logger.error("Job %s: %s", record.id, status.message)
            result = RunResult(error=(status.number, status.message))
        except Exception as failure:
            logger.exception("The emulator failed to run job %s.", record.id)
            result = RunResult(error=(CODES["INTERNAL"], f"The emulator failed: {failure!r}"))
        if record.cancel is not None:
            rest = record.cancel.requested_at + self._jobs.settings.cancelling_seconds - time.time()
            await asyncio.sleep(max(0.0, rest))
        error = self._show_end(record, result)
        while True:
            try:
                self._jobs.end(record, result.return_code, error)
                break
            except (OSError, sqlite3.Error) as failure:
                logger.error("Failed to save the end of job %s: %s; retrying.", record.id, failure)
                await asyncio.sleep(_SAVE_RETRY_SECONDS)
        await run.clean()
        del self._contexts[record.id], self._tasks[record.id]

    async def _show_preparing(self, context: RunContext) -> None:
        record = context.record
        if record.job.status == JobStatus.CREATING:
            await context.sleep(record.execute_time + self._jobs.settings.creating_seconds - time.time())
            context.set_status(JobStatus.PREPARING)

    def _show_end(self, record: JobRecord, result: RunResult) -> tuple[int, str] | None:
        """Set the final status of a job; return the error of its operation, None for a result."""
        settings, job = self._jobs.settings, record.job
        details = result.status_details
        error = result.error
        if record.cancel is not None:
            status = JobStatus.CANCELLED
            reason = f" Reason: {record.cancel.reason}" if record.cancel.reason else ""
            details = details or f"Job was cancelled.{reason}"
            error = (CODES[settings.cancelled_operation_code], details)
        elif error is not None:
            status = JobStatus.ERROR
            details = details or error[1]
        elif result.return_code != 0:
            status = JobStatus.Value(settings.status_after_nonzero_exit)
            details = details or f"Program returned code {result.return_code}."
        elif failed := failed_uploads_details(result.file_errors):
            status = JobStatus.Value(settings.status_after_failed_upload)
            details = details or (failed if status == JobStatus.ERROR else "")
        else:
            status = JobStatus.SUCCESS
        job.status = status if result.status is None else result.status
        job.status_details = details
        for field in ("output_files", "file_errors", "output_datasets", "log_files", "diagnostic_files"):
            getattr(job, field).extend(getattr(result, field))
        files = [*job.output_files, *job.log_files, *job.diagnostic_files]
        job.data_size_bytes += sum(file.size_bytes for file in files)
        set_time(job.finished_at, time.time() if result.time is None else result.time)
        return error
