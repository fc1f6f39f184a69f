"""Jobs that act a script: timers and prepared lines instead of a program. Thousands fit on one event loop."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, cast

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import logs
from datasphere_emulator.execution import Ending
from datasphere_emulator.records import JobStatus, set_time
from datasphere_emulator.script import LogLine, Progress, ScriptedOutput
from datasphere_emulator.settings import CODES

if TYPE_CHECKING:
    from datasphere_emulator.execution import Execution

#: Files larger than this are hashed in a thread.
_LARGE = 1 << 20


class ScriptedRun:
    """Acts the script in the execution's record."""

    def __init__(self, execution: Execution) -> None:
        assert execution.record.script is not None
        self._execution = execution
        self._record = execution.record
        self._script = execution.record.script

    def _events(self) -> list[tuple[float, LogLine | Progress | int | None]]:
        """All that happens in EXECUTING, in order; None is the burst, a number a raw status."""
        script = self._script
        events: list[tuple[float, LogLine | Progress | int | None]] = [(item.at, item) for item in script.log]
        events += [(item.at, item) for item in script.progress]
        events += list(script.statuses)
        if script.burst_bytes:
            events.append((script.burst_at, None))
        return sorted(events, key=lambda event: event[0])

    async def run(self) -> Ending:
        """Act it; times count from Execute, so that after a restart the script is where it would have been."""
        execution, script, record = self._execution, self._script, self._record
        begin = record.execute_time
        begin += script.preparing_seconds
        if await execution.sleep(begin - time.time()):
            return self._cancelled()
        if script.error is not None and script.error_in == "PREPARING":
            return await self._fail(begin)
        if not record.job.HasField("started_at"):
            execution.set_status(JobStatus.EXECUTING, at=begin)
        events = self._events()
        while record.script_position < len(events):
            at, event = events[record.script_position]
            if await execution.sleep(begin + at - time.time()):
                return await self._end_gracefully(begin)
            self._act(begin + at, event)
        over = None if script.never_ends else begin + script.least_executing_seconds
        if await execution.sleep(None if over is None else over - time.time()):
            return await self._end_gracefully(begin)
        assert over is not None
        if script.error is not None:
            return await self._fail(over)
        execution.set_status(JobStatus.UPLOADING_OUTPUT)
        ending = await self._ending()
        ending.time = over + script.uploading_seconds
        if await execution.sleep(ending.time - time.time()):
            return self._cancelled()
        return ending

    async def clean(self) -> None:
        """Nothing is left of an act."""

    def _act(self, at: float, event: LogLine | Progress | int | None) -> None:
        execution, record, script = self._execution, self._record, self._script
        with execution.jobs.store.transaction():
            if isinstance(event, LogLine):
                execution.log.write(at, event.stream, event.text)
            elif isinstance(event, Progress):
                message = jobs_pb2.JobProgress(progress=event.progress, message=event.message)
                set_time(message.create_time, at)
                record.progress = message
                execution.log.write(at, logs.PROGRESS, _progress_line(message))
            elif event is None:
                execution.log.append(logs.Piece(at, script.burst_stream, script.burst_bytes, burst=True))
            elif record.cancel is None:
                record.job.status = cast("JobStatus.ValueType", event)  # any number, on purpose
            record.script_position += 1
            execution.save()

    def _cancelled(self) -> Ending:
        return Ending(log_files=self._log_files())

    async def _end_gracefully(self, begin: float) -> Ending:
        """A cancel came while it executed; ends when the program would, or when the service kills it."""
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
            # A second cancel without grace may come meanwhile.
            await asyncio.sleep(0.05 if rest is None else min(rest, 0.05))
        return self._cancelled()

    async def _fail(self, at: float) -> Ending:
        """The operation ends with the script's error."""
        script, record = self._script, self._record
        assert script.error is not None
        code, message = script.error
        error = (CODES[code] if isinstance(code, str) else code, message)
        if script.error_ahead_seconds > 0:
            self._execution.jobs.operations.show_error(record.operation_id, *error)
            at += script.error_ahead_seconds
            if await self._execution.sleep(at - time.time()):
                return self._cancelled()
        final = cast("JobStatus.ValueType | None", script.final_status)
        return Ending(
            error=error, status=final, status_details=script.status_details, log_files=self._log_files(), time=at
        )

    async def _ending(self) -> Ending:
        script, parameters = self._script, self._record.job.job_parameters
        final = cast("JobStatus.ValueType | None", script.final_status)
        ending = Ending(script.return_code, status=final, status_details=script.status_details)
        for desc in parameters.output_files:
            names = {desc.path, desc.var}
            if names & set(script.missing_outputs):
                ending.file_errors.append(_upload_error(desc, "NOT_FOUND", f"File {desc.path} is not found."))
            elif names & set(script.failed_uploads):
                ending.file_errors.append(_upload_error(desc, "UPLOAD_FAILED", f"Upload of {desc.path} failed."))
            else:
                output = script.outputs.get(desc.path) or script.outputs.get(desc.var) or ScriptedOutput()
                ending.output_files.append(await self._store_output(desc, output))
        for dataset in parameters.output_datasets:
            ending.output_datasets.append(self._execution.jobs.new_dataset(dataset, self._record.job.project_id))
        ending.log_files = self._log_files()
        return ending

    async def _store_output(self, desc: jobs_pb2.FileDesc, output: ScriptedOutput) -> jobs_pb2.File:
        jobs, project_id = self._execution.jobs, self._record.job.project_id
        compression = jobs_pb2.FileCompressionType.NONE
        if output.directory is not None:
            compression = jobs_pb2.FileCompressionType.ZIP
            sha256, size = await asyncio.to_thread(jobs.store_scripted_directory, project_id, desc.path, output)
        elif output.text is not None:
            sha256, size = jobs.storage.put_bytes(project_id, output.text.encode("utf-8", "surrogateescape"))
        else:
            # The var, since a fork may have another path on each machine.
            seed = f"{output.seed}:{desc.var or desc.path}"
            register = jobs.storage.register_generated
            if output.size > _LARGE:
                sha256, size = await asyncio.to_thread(register, project_id, seed, output.size)
            else:
                sha256, size = register(project_id, seed, output.size)
        return jobs_pb2.File(desc=desc, sha256=sha256, size_bytes=size, compression_type=compression)

    def _log_files(self) -> list[jobs_pb2.File]:
        """What was printed, as files. A burst is left out: the files are small, whatever a script prints."""
        log = self._execution.log
        files = []
        for source in dict.fromkeys(piece.source for piece in log.pieces()):
            content = b"".join(
                log.content(piece) for piece in log.pieces() if piece.source == source and not piece.burst
            )
            sha256, size = self._execution.jobs.storage.put_bytes(self._record.job.project_id, content)
            name = f"{source}.txt" if source in (logs.STDOUT, logs.STDERR) else source
            desc, kind = jobs_pb2.FileDesc(path=name), jobs_pb2.FileCompressionType.NONE
            files.append(jobs_pb2.File(desc=desc, sha256=sha256, size_bytes=size, compression_type=kind))
        return files


def _upload_error(desc: jobs_pb2.FileDesc, kind: str, description: str) -> jobs_pb2.FileUploadError:
    number = jobs_pb2.FileUploadError.ErrorType.Value(kind)
    return jobs_pb2.FileUploadError(output_file_desc=desc, description=description, type=number)


def _progress_line(message: jobs_pb2.JobProgress) -> str:
    created = message.create_time.ToJsonString()
    values = {"progress": message.progress, "message": message.message, "create_time": created}
    return json.dumps(values) + "\n"
