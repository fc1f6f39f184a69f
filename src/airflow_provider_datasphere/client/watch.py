"""Watching a job from synchronous code: a loop that polls, and a thread that reads the log.

What to ask and when is decided in :mod:`.waiting` and :mod:`.logs`; here are only the calls.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2
from yandex.cloud.operation import operation_service_pb2

from airflow_provider_datasphere.client.logs import LogLine, LogTail
from airflow_provider_datasphere.client.outcome import JobHandle, execute_metadata, status_name
from airflow_provider_datasphere.client.service import Interrupted, code_name
from airflow_provider_datasphere.client.waiting import READ_DEADLINE, Ended, Look, Waiting

if TYPE_CHECKING:
    from yandex.cloud.operation import operation_pb2

    from airflow_provider_datasphere.client.reporting import Reporter
    from airflow_provider_datasphere.client.service import JobService

log = logging.getLogger(__name__)

Emit = Callable[[LogLine], None]
#: Deadline of one log stream, seconds; the reading goes on in a new one.
STREAM_DEADLINE = 3600.0
#: How long the end of a wait waits for its reader to let go of the stream, seconds.
STOP_SECONDS = 1.0
INCOMPLETE = "The log above may be incomplete: its end couldn't be read (%s). It can be downloaded from the job's page."


def watch(
    client: JobService,
    handle: JobHandle,
    *,
    poll_interval: float = 10.0,
    link: str | None = None,
    emit: Emit | None = None,
    logger: Reporter = log,
) -> Ended:
    """Wait until the job is over, with its log on the way.

    :param poll_interval: the longest pause between two polls, seconds. The end of the log stream is a hint, so that
        the job's end is noticed sooner.
    :param emit: gets each line of the job's log, all of them before this returns; ``None`` reads no log.
    :return: what the service says of the ended job; :func:`.outcome.judge` makes a result of it.
    :raises JobLostError: the job is out of sight.
    :raises Interrupted: :meth:`JobService.interrupt` was called.
    """
    waiting = Waiting(handle, poll_interval=poll_interval, link=link)
    narrator = Narrator(logger)
    reader = None
    if emit is not None:
        emit = never_raising(emit, logger)
        reader = _LogReader(client, handle.job_id, emit, logger)
        reader.start()
    try:
        while waiting.ended is None:
            _pause(client, waiting, reader)
            look(client, handle, waiting, narrator, reader.tail if reader else None, emit)
        if reader is not None:
            reader.drain(waiting.ended)
        return waiting.ended
    finally:
        if reader is not None:
            reader.stop()


def look(
    client: JobService,
    handle: JobHandle,
    waiting: Waiting,
    narrator: Narrator,
    tail: LogTail | None = None,
    emit: Emit | None = None,
) -> None:
    """One look at the job, told to ``waiting``.

    :raises JobLostError: the job is out of sight.
    """
    try:
        if waiting.look is Look.OPERATION:
            operation = client.channels.unary(
                "operations",
                "Get",
                operation_service_pb2.GetOperationRequest(operation_id=handle.operation_id or ""),
                timeout=READ_DEADLINE,
            )
            narrator.operation(operation, tail, emit)
            waiting.saw_operation(operation)
        else:
            job = client.channels.unary(
                "jobs", "Get", project_job_service_pb2.GetProjectJobRequest(job_id=handle.job_id), timeout=READ_DEADLINE
            )
            narrator.status(job.status)
            waiting.saw_job(job)
    except grpc.RpcError as error:
        narrator.trouble(waiting.look, code_name(error), error.details())
        waiting.failed(code_name(error), error.details() or "")


def never_raising(emit: Emit, logger: Reporter) -> Emit:
    """``emit`` that tells of its first error only: a line that can't be written must not end the reading."""
    told = False

    def safely(line: LogLine) -> None:
        nonlocal told
        try:
            emit(line)
        except Exception as error:
            if not told:
                told = True
                logger.warning("Lines of the job's log can't be written here: %s: %s", type(error).__name__, error)

    return safely


class Narrator:
    """Says what changes: the job's status and progress, and trouble with the service, once each."""

    def __init__(self, logger: Reporter) -> None:
        self._logger = logger
        self._status: int | None = None
        self._trouble: str | None = None

    def operation(self, operation: operation_pb2.Operation, tail: LogTail | None, emit: Emit | None) -> None:
        metadata = execute_metadata(operation)
        self.status(metadata.metadata.status or metadata.job.status)
        if tail is not None and emit is not None and metadata.HasField("progress"):
            for line in tail.decoder.progress(metadata.progress.progress, metadata.progress.message):
                emit(line)

    def status(self, status: int) -> None:
        if self._trouble is not None:
            self._logger.info("DataSphere answers again.")
            self._trouble = None
        if status and status != self._status:
            self._status = status
            self._logger.info("Job status: %s", status_name(status))

    def trouble(self, look: Look, code: str, details: str | None) -> None:
        if code != self._trouble:
            self._trouble = code
            reason = (details or "no details").rstrip(".")
            self._logger.warning("%s failed: %s: %s; trying again.", look.value, code, reason)


def _pause(client: JobService, waiting: Waiting, reader: _LogReader | None) -> None:
    """Sleep until the next look is due, or the end of the log stream hints that it is.

    :raises Interrupted:
    """
    if reader is None:
        client.pause(waiting.delay)
        return
    due = time.monotonic() + waiting.delay
    while True:
        client.pause(0)
        hinted = reader.hint.wait(max(0.0, due - time.monotonic()))
        reader.hint.clear()
        if not hinted or waiting.hurry():
            client.pause(0)
            return


class _LogReader:
    """Reads a job's log in a thread of its own; never lets an error out."""

    def __init__(self, client: JobService, job_id: str, emit: Emit, logger: Reporter) -> None:
        self.tail = LogTail()
        #: Set when a stream ended cleanly, and when the client is interrupted.
        self.hint = threading.Event()
        self._client = client
        self._job_id = job_id
        self._emit = emit
        self._logger = logger
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name=f"datasphere-log-{job_id}", daemon=True)

    def start(self) -> None:
        self._client.on_interrupt(self.hint.set)
        self._thread.start()

    def drain(self, ended: Ended) -> None:
        """The job is over: read to the end of its log, and return when every line is out."""
        self.tail.job_ended(ended.logged_bytes)
        self._ended.set()
        while self._thread.is_alive():
            self._thread.join(0.2)
            if self.tail.overdue:
                self._cancel_call()
            if self._client.interrupted:
                raise Interrupted("The wait for the end of the job's log was interrupted.")
        if self.tail.trouble is not None:
            self._logger.warning(INCOMPLETE, self.tail.trouble)

    def stop(self) -> None:
        """End the reading wherever it is; no line comes after this."""
        self._stop.set()
        self._ended.set()
        self._cancel_call()
        self._thread.join(STOP_SECONDS)

    def _cancel_call(self) -> None:
        call = self._call
        if call is not None:
            call.cancel()

    def _run(self) -> None:
        while not self._stop.is_set():
            code, details = self._read_stream()
            if self._stop.is_set():
                return
            delay = self.tail.closed(code, details)
            if code is None:
                self.hint.set()
            if delay is None:
                for line in self.tail.decoder.flush():
                    self._emit(line)
                return
            # While the job runs the end of it ends the pause; afterwards the pause is the point.
            if self._ended.is_set():
                self._stop.wait(delay)
            else:
                self._ended.wait(delay)

    def _read_stream(self) -> tuple[str | None, str]:
        """One stream, to its end: its status code name, ``None`` for a clean end."""
        self.tail.opened()
        request = project_job_service_pb2.ReadProjectJobLogsRequest(job_id=self._job_id, offset=self.tail.offset)
        try:
            call = self._call = self._client.channels.stream("jobs", "ReadLogs", request, timeout=STREAM_DEADLINE)
            if self._stop.is_set():
                call.cancel()
            for response in call:
                for line in self.tail.received(response):
                    self._emit(line)
                if self._stop.is_set():
                    call.cancel()
        except grpc.RpcError as error:
            return code_name(error), error.details() or ""
        except Exception as error:  # whatever it is: nothing about logs may fail a job
            return "INTERNAL", f"{type(error).__name__}: {error}"
        finally:
            self._call = None
        return None, ""
