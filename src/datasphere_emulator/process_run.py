"""Jobs that run a program: in its own process group, watched through files so that a restart loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import child_runner, logs
from datasphere_emulator.progress import ProgressFile
from datasphere_emulator.records import JobStatus
from datasphere_emulator.run_context import RunResult
from datasphere_emulator.settings import CODES
from datasphere_emulator.workspace import PROGRESS_FILE, Workspace

if TYPE_CHECKING:
    from datasphere_emulator.run_context import RunContext

#: Poll interval of a running program, seconds.
POLL_SECONDS = 0.03
#: Largest piece of output that becomes one log message, bytes.
MAX_PIECE = 64 * 1024
#: Shutdown signal of jobs whose parameters don't set one.
DEFAULT_SIGNAL = signal.SIGTERM


def is_running(folder: Path) -> bool:
    """Return whether the child runner of an execution is alive; it holds a lock until its end."""
    try:
        with (folder / "runner.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file of the child runner; None if it doesn't exist."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return values


def kill_program(folder: Path) -> None:
    """Kill the program of an execution if it is running."""
    started = read_json(folder / "started.json")
    if started is not None and is_running(folder):
        send_signal(started["group"], signal.SIGKILL)


def send_signal(group: int, number: int) -> None:
    """Send a signal to a process group; ignore one that has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class ProcessRun:
    """Runs a job's program."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        jobs, job = context.jobs, context.record.job
        parameters = jobs_pb2.JobParameters()
        parameters.CopyFrom(job.job_parameters)
        self._folder = jobs.folder(job.id)
        self._workspace = Workspace(
            folder=self._folder,
            project_folder=jobs.project_folder(job.project_id),
            project_id=job.project_id,
            parameters=parameters,
            storage=jobs.storage,
            settings=jobs.settings,
            owner=jobs.owner,
        )
        self._consumed = {name: context.log.consumed(name) for name in (logs.STDOUT, logs.STDERR)}
        reported = [context.log.content(piece) for piece in context.log.pieces() if piece.source == logs.PROGRESS]
        self._progress = ProgressFile(self._folder / PROGRESS_FILE, b"".join(reported))
        self._signalled_at: float | None = None
        self._killed = False

    async def run(self) -> RunResult:
        """Prepare and start the program, watch it and collect its outputs; a running program is only watched."""
        context = self._context
        if not ((self._folder / "exit.json").exists() or is_running(self._folder)):
            if (self._folder / "started.json").exists():
                return self._lost()
            await self._prepare()
            if context.record.cancel is not None:
                return RunResult()
            await asyncio.to_thread(self._launch)
            context.log.system(time.time(), "Program started.")
        uploading = context.record.job.status == JobStatus.UPLOADING_OUTPUT
        if not uploading:
            context.set_status(JobStatus.EXECUTING)
        outcome = await self._watch()
        if outcome is None:
            return self._lost()
        if not uploading:
            context.log.system(outcome["finished_at"], f"Program ended with return code {outcome['return_code']}.")
        return await self._upload(outcome)

    async def clean(self) -> None:
        """Remove the scratch files, unless the settings keep them."""
        if not self._context.jobs.settings.keep_scratch:
            await asyncio.to_thread(self._workspace.remove_scratch)

    async def _prepare(self) -> None:
        context, parameters = self._context, self._workspace.parameters
        begin = time.time()
        context.log.system(begin, "Preparing the environment.")
        environment = parameters.env
        if environment.WhichOneof("docker_image") is not None:
            context.log.system(begin, "The emulator runs programs without Docker; the job's image is ignored.")
        if environment.python_env.requirements:
            context.log.system(
                begin, "The emulator doesn't install requirements; the program uses the emulator's own packages."
            )
        await asyncio.to_thread(self._workspace.prepare, context.jobs.service_agent_token())
        await context.sleep(begin + context.jobs.settings.preparing_seconds - time.time())

    def _launch(self) -> None:
        # Locked before the runner starts, which inherits the lock: there is no moment without it.
        with (self._folder / "runner.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run(
                [sys.executable, "-I", "-S", child_runner.__file__, str(self._folder)],
                pass_fds=[lock.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )

    async def _watch(self) -> dict[str, Any] | None:
        """Watch the program until its end; return None if its runner was lost."""
        while True:
            alive = is_running(self._folder)
            outcome = read_json(self._folder / "exit.json")
            self._read_output()
            self._read_progress()
            if outcome is not None:
                return outcome
            if not alive:
                return None
            self._apply_cancel()
            await asyncio.sleep(POLL_SECONDS)

    def _read_output(self) -> None:
        now = time.time()
        for name, consumed in self._consumed.items():
            size = (self._folder / name).stat().st_size
            for start in range(consumed, size, MAX_PIECE):
                length = min(MAX_PIECE, size - start)
                self._context.log.append(logs.Piece(now, name, length, file=name, file_offset=start))
            self._consumed[name] = size

    def _read_progress(self) -> None:
        text, message = self._progress.read()
        if text:
            self._context.log.write(time.time(), logs.PROGRESS, text)
        if message is not None:
            self._context.set_progress(message)

    def _apply_cancel(self) -> None:
        cancel = self._context.record.cancel
        started = read_json(self._folder / "started.json")
        if cancel is None or started is None or self._killed:
            return
        parameters = self._workspace.parameters
        graceful = cancel.graceful and parameters.HasField("graceful_shutdown_parameters")
        shutdown = parameters.graceful_shutdown_parameters
        if graceful and self._signalled_at is None:
            self._signalled_at = cancel.requested_at
            # The marker makes the runner wait for the whole group, and records that the signal was sent.
            if not (self._folder / "graceful").exists():
                (self._folder / "graceful").touch()
                number = shutdown.signal or DEFAULT_SIGNAL
                self._context.log.system(time.time(), f"Sending {signal.Signals(number).name} to the program.")
                send_signal(started["group"], number)
        limit = shutdown.timeout.ToNanoseconds() / 1e9 if shutdown.HasField("timeout") else None
        if graceful and (limit is None or time.time() < cancel.requested_at + limit):
            return
        self._killed = True
        (self._folder / "graceful").unlink(missing_ok=True)
        self._context.log.system(time.time(), "Killing the program.")
        send_signal(started["group"], signal.SIGKILL)

    def _lost(self) -> RunResult:
        self._read_output()
        return RunResult(error=(CODES["INTERNAL"], "The runner of the program was lost (killed or crashed)."))

    async def _upload(self, outcome: dict[str, Any]) -> RunResult:
        context, settings = self._context, self._context.jobs.settings
        context.set_status(JobStatus.UPLOADING_OUTPUT)
        begin = time.time()
        wanted = context.wants_outputs(outcome["return_code"])
        if wanted:
            context.log.system(begin, "Uploading outputs.")
        result = await asyncio.to_thread(self._collect, outcome, wanted)
        await context.sleep(begin + settings.uploading_seconds - time.time())
        return result

    def _collect(self, outcome: dict[str, Any], wanted: bool) -> RunResult:
        workspace = self._workspace
        result = RunResult(return_code=outcome["return_code"])
        if wanted:
            result.output_files, result.file_errors = workspace.collect_outputs()
            result.output_datasets = workspace.collect_datasets()
        for name in (logs.STDOUT, logs.STDERR):
            result.log_files.append(workspace.store_file(f"{name}.txt", self._folder / name))
        log = self._context.log
        system = self._folder / "system.log"
        system.write_bytes(b"".join(log.content(piece) for piece in log.pieces() if piece.source == logs.SYSTEM))
        statistics = self._folder / "docker_stats.tsv"
        names = ("finished_at", "user_seconds", "system_seconds", "max_rss_kilobytes")
        row = "\t".join(str(outcome.get(name, "")) for name in names)
        statistics.write_text("\t".join(names) + "\n" + row + "\n")
        for path in (system, statistics):
            result.diagnostic_files.append(workspace.store_file(path.name, path))
        return result
