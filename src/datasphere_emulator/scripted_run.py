"""Scripted jobs: timers and prepared log lines instead of a program. One event loop runs thousands."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, cast

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import logs
from datasphere_emulator.outputs import PROCESSING_ERROR, is_pattern, missing_output, upload_error
from datasphere_emulator.records import JobStatus, set_time
from datasphere_emulator.run_context import RunResult
from datasphere_emulator.script import LogLine, Progress, ScriptedOutput
from datasphere_emulator.settings import CODES

if TYPE_CHECKING:
    from datasphere_emulator.run_context import RunContext

#: Files larger than this are hashed in a thread.
_LARGE = 1 << 20


class ScriptedRun:
    """Runs the script of a job's record."""

    def __init__(self, context: RunContext) -> None:
        assert context.record.script is not None
        self._context = context
        self._record = context.record
        self._script = context.record.script

    def _events(self) -> list[tuple[float, LogLine | Progress | int | None]]:
        """Return all events in EXECUTING, in order; None is the burst, a number a raw status."""
        script = self._script
        events: list[tuple[float, LogLine | Progress | int | None]] = [(item.at, item) for item in script.log]
        events += [(item.at, item) for item in script.progress]
        events += list(script.statuses)
        if script.burst_bytes:
            events.append((script.burst_at, None))
        return sorted(events, key=lambda event: event[0])

    async def run(self) -> RunResult:
        """Run the script. Times count from Execute, so that a restart doesn't delay it."""
        context, script, record = self._context, self._script, self._record
        begin = record.execute_time
        begin += script.preparing_seconds
        if await context.sleep(begin - time.time()):
            return self._cancelled()
        if script.error is not None and script.error_in == "PREPARING":
            return await self._fail(begin)
        if not record.job.HasField("started_at"):
            context.set_status(JobStatus.EXECUTING, at=begin)
        events = self._events()
        while record.script_position < len(events):
            at, event = events[record.script_position]
            if await context.sleep(begin + at - time.time()):
                return await self._end_gracefully()
            self._apply(begin + at, event)
        over = None if script.never_ends else begin + script.least_executing_seconds
        if await context.sleep(None if over is None else over - time.time()):
            return await self._end_gracefully()
        assert over is not None
        if script.error is not None:
            return await self._fail(over)
        context.set_status(JobStatus.UPLOADING_OUTPUT)
        result = await self._result() if context.wants_outputs(script.return_code) else self._without_outputs()
        result.time = over + script.uploading_seconds
        if await context.sleep(result.time - time.time()):
            return await self._cancelled_while_computing()
        return result

    async def clean(self) -> None:
        """Do nothing: a script leaves no temporary files."""

    def _apply(self, at: float, event: LogLine | Progress | int | None) -> None:
        context, record, script = self._context, self._record, self._script
        with context.jobs.database.transaction():
            if isinstance(event, LogLine):
                context.log.write(at, event.stream, event.text)
            elif isinstance(event, Progress):
                message = jobs_pb2.JobProgress(progress=event.progress, message=event.message)
                set_time(message.create_time, at)
                record.progress = message
                context.log.write(at, logs.PROGRESS, _progress_line(message))
            elif event is None:
                context.log.append(logs.Piece(at, script.burst_stream, script.burst_bytes, burst=True))
            elif record.cancel is None:
                record.job.status = cast("JobStatus.ValueType", event)  # may be any number
            record.script_position += 1
            context.save()

    def _cancelled(self) -> RunResult:
        return RunResult(log_files=self._log_files())

    async def _cancelled_while_computing(self) -> RunResult:
        """Return the result of a cancel in EXECUTING or later: only outputs that the script names exist."""
        if not self._context.wants_outputs():
            return self._cancelled()
        files, errors = await self._outputs(complete=False)
        return RunResult(output_files=files, file_errors=errors, log_files=self._log_files())

    async def _end_gracefully(self) -> RunResult:
        """End after a cancel in EXECUTING: when the program would end, or when the service kills it."""
        record, script = self._record, self._script
        parameters = record.job.job_parameters
        while record.cancel is not None and record.cancel.graceful:
            if not parameters.HasField("graceful_shutdown_parameters"):
                break
            limits = []
            if script.graceful_seconds is not None:
                limits.append(script.graceful_seconds)
            shutdown = parameters.graceful_shutdown_parameters
            if shutdown.HasField("timeout"):
                limits.append(shutdown.timeout.ToNanoseconds() / 1e9)
            rest = record.cancel.requested_at + min(limits) - time.time() if limits else None
            if rest is not None and rest <= 0:
                break
            # Meanwhile a second cancel may end the graceful shutdown.
            await asyncio.sleep(0.05 if rest is None else min(rest, 0.05))
        return await self._cancelled_while_computing()

    async def _fail(self, at: float) -> RunResult:
        """End the operation with the script's error."""
        script, record = self._script, self._record
        assert script.error is not None
        code, message = script.error
        error = (CODES[code] if isinstance(code, str) else code, message)
        if script.error_ahead_seconds > 0:
            self._context.jobs.operations.show_error(record.operation_id, *error)
            at += script.error_ahead_seconds
            if await self._context.sleep(at - time.time()):
                return self._cancelled()
        final = cast("JobStatus.ValueType | None", script.final_status)
        return RunResult(
            error=error, status=final, status_details=script.status_details, log_files=self._log_files(), time=at
        )

    def _without_outputs(self) -> RunResult:
        script = self._script
        final = cast("JobStatus.ValueType | None", script.final_status)
        return RunResult(
            script.return_code, status=final, status_details=script.status_details, log_files=self._log_files()
        )

    async def _result(self) -> RunResult:
        result = self._without_outputs()
        result.output_files, result.file_errors = await self._outputs(complete=True)
        for dataset in self._record.job.job_parameters.output_datasets:
            result.output_datasets.append(self._context.jobs.new_dataset(dataset, self._record.job.project_id))
        return result

    async def _outputs(self, *, complete: bool) -> tuple[list[jobs_pb2.File], list[jobs_pb2.FileUploadError]]:
        """Store the outputs. :param complete: also outputs that the script doesn't name."""
        script = self._script
        files, errors = [], []
        for desc in self._record.job.job_parameters.output_files:
            names = {desc.path, desc.var}
            output = script.outputs.get(desc.path) or script.outputs.get(desc.var)
            if output is None and complete and not is_pattern(desc.path):
                output = ScriptedOutput()
            if names & set(script.failed_uploads):
                errors.append(upload_error(desc, "UPLOAD_FAILED", PROCESSING_ERROR))
            elif output is None or names & set(script.missing_outputs):
                errors.append(missing_output(desc))
            else:
                files.append(await self._store_output(desc, output))
        return files, errors

    async def _store_output(self, desc: jobs_pb2.FileDesc, output: ScriptedOutput) -> jobs_pb2.File:
        jobs, project_id = self._context.jobs, self._record.job.project_id
        compression = jobs_pb2.FileCompressionType.NONE
        if output.directory is not None:
            compression = jobs_pb2.FileCompressionType.ZIP
            sha256, size = await asyncio.to_thread(jobs.store_scripted_directory, project_id, desc.path, output)
        elif output.text is not None:
            sha256, size = jobs.storage.put_bytes(project_id, output.text.encode("utf-8", "surrogateescape"))
        else:
            # The var: the path may differ between the machines of forks.
            seed = f"{output.seed}:{desc.var or desc.path}"
            register = jobs.storage.register_generated
            if output.size > _LARGE:
                sha256, size = await asyncio.to_thread(register, project_id, seed, output.size)
            else:
                sha256, size = register(project_id, seed, output.size)
        return jobs_pb2.File(desc=desc, sha256=sha256, size_bytes=size, compression_type=compression)

    def _log_files(self) -> list[jobs_pb2.File]:
        """Store the log as files, without bursts, so that they stay small."""
        log = self._context.log
        files = []
        for source in dict.fromkeys(piece.source for piece in log.pieces()):
            content = b"".join(
                log.content(piece) for piece in log.pieces() if piece.source == source and not piece.burst
            )
            sha256, size = self._context.jobs.storage.put_bytes(self._record.job.project_id, content)
            name = f"{source}.txt" if source in (logs.STDOUT, logs.STDERR) else source
            desc, kind = jobs_pb2.FileDesc(path=name), jobs_pb2.FileCompressionType.NONE
            files.append(jobs_pb2.File(desc=desc, sha256=sha256, size_bytes=size, compression_type=kind))
        return files


def _progress_line(message: jobs_pb2.JobProgress) -> str:
    created = message.create_time.ToJsonString()
    values = {"progress": message.progress, "message": message.message, "create_time": created}
    return json.dumps(values) + "\n"
