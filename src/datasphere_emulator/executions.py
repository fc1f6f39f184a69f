"""All executions: what happens between Execute and the end of its operation."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from datasphere_emulator.execution import Ending, Execution
from datasphere_emulator.process import ProcessRun, is_running, kill_program
from datasphere_emulator.records import JobStatus, set_time
from datasphere_emulator.scripted import ScriptedRun
from datasphere_emulator.settings import CODES

if TYPE_CHECKING:
    from datasphere_emulator.execution import Run
    from datasphere_emulator.jobs import Jobs
    from datasphere_emulator.records import JobRecord

logger = logging.getLogger(__name__)

#: Longest wait for programs to die at the end, seconds.
_KILL_SECONDS = 5.0


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

    def resume(self) -> None:
        """Go on with the executions that an earlier emulator left."""
        for record in self._jobs:
            if record.active:
                self.start(record)

    async def stop(self, *, kill: bool) -> None:
        """Let go of all executions; programs go on, and the next emulator on this state goes on with them.

        :param kill: kill their programs instead.
        """
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not kill:
            return
        folders = [self._jobs.folder(record.id) for record in self._jobs if record.active]
        deadline = time.monotonic() + _KILL_SECONDS
        while (running := [folder for folder in folders if is_running(folder)]) and time.monotonic() < deadline:
            for folder in running:
                kill_program(folder)
            await asyncio.sleep(0.02)

    async def _play(self, execution: Execution) -> None:
        record = execution.record
        run: Run = ScriptedRun(execution) if record.script is not None else ProcessRun(execution)
        try:
            await self._show_preparing(execution)
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

    async def _show_preparing(self, execution: Execution) -> None:
        record = execution.record
        if record.job.status == JobStatus.CREATING:
            await execution.sleep(record.execute_time + self._jobs.settings.creating_seconds - time.time())
            execution.set_status(JobStatus.PREPARING)

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
