"""Jobs that really run: a program in its own process group, watched through files so that a restart loses nothing."""

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

from datasphere_emulator import logs, runner
from datasphere_emulator.execution import Ending
from datasphere_emulator.progress import ProgressFile
from datasphere_emulator.records import JobStatus
from datasphere_emulator.settings import CODES
from datasphere_emulator.workspace import PROGRESS_FILE, Workspace

if TYPE_CHECKING:
    from datasphere_emulator.execution import Execution

#: How often a running program is looked at, seconds.
POLL_SECONDS = 0.03
#: Largest piece of output that becomes one log message, bytes.
MAX_PIECE = 64 * 1024
#: Stands in for a shutdown signal that the parameters leave out.
DEFAULT_SIGNAL = signal.SIGTERM


def is_running(folder: Path) -> bool:
    """Whether the runner of an execution lives: it holds a lock from before its start to its end."""
    try:
        with (folder / "runner.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def read_json(path: Path) -> dict[str, Any] | None:
    """A file of the runner, None if it isn't there."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return values


def kill_program(folder: Path) -> None:
    """Kill the program of an execution, if it runs."""
    started = read_json(folder / "started.json")
    if started is not None and is_running(folder):
        send_signal(started["group"], signal.SIGKILL)


def send_signal(group: int, number: int) -> None:
    """Send a signal to a process group that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class ProcessRun:
    """Runs a job's program."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        jobs, job = execution.jobs, execution.record.job
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
        self._consumed = {name: execution.log.consumed(name) for name in (logs.STDOUT, logs.STDERR)}
        told = [execution.log.content(piece) for piece in execution.log.pieces() if piece.source == logs.PROGRESS]
        self._progress = ProgressFile(self._folder / PROGRESS_FILE, b"".join(told))
        self._signalled_at: float | None = None
        self._killed = False

    async def run(self) -> Ending:
        """Prepare, start, watch, collect. A program started by an earlier emulator is only watched."""
        execution = self._execution
        if not ((self._folder / "exit.json").exists() or is_running(self._folder)):
            if (self._folder / "started.json").exists():
                return self._lost()
            await self._prepare()
            if execution.record.cancel is not None:
                return Ending()
            await asyncio.to_thread(self._launch)
            execution.log.system(time.time(), "Program started.")
        uploading = execution.record.job.status == JobStatus.UPLOADING_OUTPUT
        if not uploading:
            execution.set_status(JobStatus.EXECUTING)
        outcome = await self._watch()
        if outcome is None:
            return self._lost()
        if not uploading:
            execution.log.system(outcome["finished_at"], f"Program ended with return code {outcome['return_code']}.")
        return await self._upload(outcome)

    async def clean(self) -> None:
        """Remove what is of no use any more."""
        if not self._execution.jobs.settings.keep_scratch:
            await asyncio.to_thread(self._workspace.remove_scratch)

    async def _prepare(self) -> None:
        execution, parameters = self._execution, self._workspace.parameters
        begin = time.time()
        execution.log.system(begin, "Preparing the environment.")
        environment = parameters.env
        if environment.WhichOneof("docker_image") is not None:
            execution.log.system(begin, "The emulator runs programs without the docker image that the job names.")
        if environment.python_env.requirements:
            execution.log.system(begin, "The emulator installs no requirements: programs see its own packages.")
        await asyncio.to_thread(self._workspace.prepare, execution.jobs.service_agent_token())
        await execution.sleep(begin + execution.jobs.settings.preparing_seconds - time.time())

    def _launch(self) -> None:
        # The lock is taken before the runner exists and passed on, so that there is no moment without it.
        with (self._folder / "runner.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run(
                [sys.executable, "-I", "-S", runner.__file__, str(self._folder)],
                pass_fds=[lock.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )

    async def _watch(self) -> dict[str, Any] | None:
        """Follow the program to its end; None if its runner is lost."""
        while True:
            alive = is_running(self._folder)
            outcome = read_json(self._folder / "exit.json")
            self._read_output()
            self._read_progress()
            if outcome is not None:
                return outcome
            if not alive:
                return None
            self._carry_out_cancel()
            await asyncio.sleep(POLL_SECONDS)

    def _read_output(self) -> None:
        now = time.time()
        for name, consumed in self._consumed.items():
            size = (self._folder / name).stat().st_size
            for start in range(consumed, size, MAX_PIECE):
                length = min(MAX_PIECE, size - start)
                self._execution.log.append(logs.Piece(now, name, length, file=name, file_offset=start))
            self._consumed[name] = size

    def _read_progress(self) -> None:
        text, message = self._progress.read()
        if text:
            self._execution.log.write(time.time(), logs.PROGRESS, text)
        if message is not None:
            self._execution.set_progress(message)

    def _carry_out_cancel(self) -> None:
        cancel = self._execution.record.cancel
        started = read_json(self._folder / "started.json")
        if cancel is None or started is None or self._killed:
            return
        parameters = self._workspace.parameters
        graceful = cancel.graceful and parameters.HasField("graceful_shutdown_parameters")
        shutdown = parameters.graceful_shutdown_parameters
        if graceful and self._signalled_at is None:
            self._signalled_at = cancel.requested_at
            # The marker makes the runner wait for the whole group, and tells a later emulator of the signal sent.
            if not (self._folder / "graceful").exists():
                (self._folder / "graceful").touch()
                number = shutdown.signal or DEFAULT_SIGNAL
                self._execution.log.system(time.time(), f"Sending {signal.Signals(number).name} to the program.")
                send_signal(started["group"], number)
        limit = shutdown.timeout.ToNanoseconds() / 1e9 if shutdown.HasField("timeout") else None
        if graceful and (limit is None or time.time() < cancel.requested_at + limit):
            return
        self._killed = True
        (self._folder / "graceful").unlink(missing_ok=True)
        self._execution.log.system(time.time(), "Killing the program.")
        send_signal(started["group"], signal.SIGKILL)

    def _lost(self) -> Ending:
        self._read_output()
        return Ending(error=(CODES["INTERNAL"], "The runner of the program was lost."))

    async def _upload(self, outcome: dict[str, Any]) -> Ending:
        execution, settings = self._execution, self._execution.jobs.settings
        execution.set_status(JobStatus.UPLOADING_OUTPUT)
        begin = time.time()
        cancel = execution.record.cancel
        wanted = True
        if cancel is not None:
            wanted = settings.outputs_after_cancel == "always" or (
                settings.outputs_after_cancel == "graceful" and cancel.graceful
            )
        if wanted:
            execution.log.system(begin, "Uploading outputs.")
        ending = await asyncio.to_thread(self._collect, outcome, wanted)
        await execution.sleep(begin + settings.uploading_seconds - time.time())
        return ending

    def _collect(self, outcome: dict[str, Any], wanted: bool) -> Ending:
        workspace = self._workspace
        ending = Ending(return_code=outcome["return_code"])
        if wanted:
            ending.output_files, ending.file_errors = workspace.collect_outputs()
            ending.output_datasets = workspace.collect_datasets()
        for name in (logs.STDOUT, logs.STDERR):
            ending.log_files.append(workspace.store_file(f"{name}.txt", self._folder / name))
        log = self._execution.log
        system = self._folder / "system.log"
        system.write_bytes(b"".join(log.content(piece) for piece in log.pieces() if piece.source == logs.SYSTEM))
        statistics = self._folder / "docker_stats.tsv"
        names = ("finished_at", "user_seconds", "system_seconds", "max_rss_kilobytes")
        row = "\t".join(str(outcome.get(name, "")) for name in names)
        statistics.write_text("\t".join(names) + "\n" + row + "\n")
        for path in (system, statistics):
            ending.diagnostic_files.append(workspace.store_file(path.name, path))
        return ending
