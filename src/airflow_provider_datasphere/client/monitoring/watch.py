"""Watching a job from synchronous code: a loop that polls, and a thread that reads the log.

What to call and when is decided in :mod:`.polling` and :mod:`.logs`; here are only the calls.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc

from airflow_provider_datasphere.client.errors import Interrupted
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.client.monitoring.logs import LogTail
from airflow_provider_datasphere.client.monitoring.polling import PollState, TerminalState
from airflow_provider_datasphere.client.monitoring.status_logger import (
    INCOMPLETE,
    DrainNotice,
    Emit,
    StatusLogger,
    log_first_error_only,
)
from airflow_provider_datasphere.client.rpc import error_status

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.model import JobHandle

log = logging.getLogger(__name__)

#: How long the end of a wait waits for the thread that reads the log, seconds.
READER_JOIN_TIMEOUT = 1.0
NO_THREAD = "this process can't start another thread"


def watch(
    client: JobApi,
    handle: JobHandle,
    *,
    poll_interval: float = DEFAULT_POLL_INTERVAL,
    start_deadline: float | None = None,
    link: str | None = None,
    emit: Emit | None = None,
    logger: LoggerLike = log,
) -> TerminalState:
    """Wait until the job is over, and read its log meanwhile.

    :param poll_interval: the longest pause between two polls, seconds. The end of the log stream is a hint, so that
        the job's end is noticed sooner.
    :param start_deadline: until when the job must compute, epoch seconds; default: any time.
    :param emit: gets each line of the job's log, all of them before this returns; ``None`` reads no log.
    :return: what the service says of the ended job; :func:`.outcome.evaluate_outcome` makes a result of it.
    :raises JobLostError: the job can't be monitored any more.
    :raises JobNotStartedError: it wasn't computing at ``start_deadline``; it isn't cancelled here.
    :raises Interrupted: :meth:`JobApi.interrupt` was called.
    """
    reader = None
    if emit is not None:
        emit = log_first_error_only(emit, logger)
        reader = _LogReader(client, handle.job_id, emit, logger)
    status_logger = StatusLogger(logger, reader.tail if reader else None, emit)
    state = PollState(
        handle, poll_interval=poll_interval, start_deadline=start_deadline, link=link, status_logger=status_logger
    )
    if reader is not None:
        reader.start()
    try:
        while state.ended is None:
            _pause(client, state, reader)
            poll_once(client, state)
        if reader is not None:
            reader.drain(state.ended)
        return state.ended
    finally:
        if reader is not None:
            reader.stop()


def poll_once(client: JobApi, state: PollState) -> None:
    """Make the next call of a wait.

    :raises JobLostError: the job can't be monitored any more.
    :raises JobRequestError: there is no such job, or the operation isn't one of its Execute.
    """
    call = state.next_call()
    try:
        response = client.channels.unary(call.service, call.method, call.request, timeout=call.timeout)
    except grpc.RpcError as error:
        state.failed(*error_status(error))
    else:
        state.received(response)


def poll_until_known(
    client: JobApi, state: PollState, *, attempts: int, wait_out_grace_period: bool = False
) -> TerminalState | None:
    """Poll until it is known that the job runs or how it ended, or until too many polls have failed.

    :param attempts: how many polls in a row may fail.
    :param wait_out_grace_period: retry beyond that while access is denied or the job isn't found, until it counts as
        lost.
    :return: what the service says of the ended job; ``None``: it runs, or nobody knows.
    :raises JobLostError: the job can't be monitored any more.
    :raises JobRequestError: there is no such job, or the operation isn't one of its Execute.
    :raises Interrupted: :meth:`JobApi.interrupt` was called.
    """
    while state.ended is None:
        poll_once(client, state)
        gave_up = state.failures >= attempts and not (wait_out_grace_period and state.in_grace_period)
        if state.still_running or gave_up:
            return None
        client.pause(state.delay if state.ended is None else 0)
    return state.ended


def _pause(client: JobApi, state: PollState, reader: _LogReader | None) -> None:
    """Sleep until the next poll is due; the end of the log stream makes it due early.

    :raises Interrupted: :meth:`JobApi.interrupt` was called.
    """
    if reader is None:
        client.pause(state.delay)
        return
    due = time.monotonic() + state.delay
    while True:
        client.pause(0)
        hinted = reader.hint.wait(max(0.0, due - time.monotonic()))
        reader.hint.clear()
        if not hinted or state.request_immediate_poll():
            client.pause(0)
            return


class _LogReader:
    """Reads a job's log in its own thread; never raises."""

    def __init__(self, client: JobApi, job_id: str, emit: Emit, logger: LoggerLike) -> None:
        self.tail = LogTail(job_id)
        #: Set when a stream ended cleanly, and when the client is interrupted.
        self.hint = threading.Event()
        self._client = client
        self._emit = emit
        self._logger = logger
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name=f"datasphere-log-{job_id}", daemon=True)

    def start(self) -> None:
        """Start reading."""
        self._client.add_interrupt_callback(self.hint.set)
        if not self._start_thread():
            self._logger.warning("The job's log can't be shown while it runs: %s.", NO_THREAD)

    def _start_thread(self) -> bool:
        try:
            self._thread.start()
        except RuntimeError:
            # Too many threads at the moment. The log may not fail the job; drain() tries again.
            return False
        return True

    def drain(self, ended: TerminalState) -> None:
        """Read the ended job's log to its end; return when every line is emitted."""
        self.tail.job_ended(ended.logged_bytes)
        self._ended.set()
        if self._thread.ident is None and not self._start_thread():
            self._logger.warning(INCOMPLETE, NO_THREAD)
            return
        notice = DrainNotice(self.tail, self._logger)
        while self._thread.is_alive():
            self._thread.join(0.2)
            notice.log_once()
            if self.tail.overdue:
                self._cancel_call()
            if self._client.interrupted:
                raise Interrupted("The wait for the end of the job's log was interrupted.")
        if self.tail.incomplete_reason is not None:
            self._logger.warning(INCOMPLETE, self.tail.incomplete_reason)

    def stop(self) -> None:
        """Stop reading; no line is emitted after this."""
        self._stop.set()
        self._ended.set()
        self._cancel_call()
        if self._thread.ident is not None:
            self._thread.join(READER_JOIN_TIMEOUT)

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
            # The job's end cuts the pause short; after it only stop() does.
            if self._ended.is_set():
                self._stop.wait(delay)
            else:
                self._ended.wait(delay)

    def _read_stream(self) -> tuple[str | None, str]:
        """Read one stream to its end; return its status code name (``None``: clean end) and details."""
        opened = self.tail.open()
        try:
            call = self._call = self._client.channels.stream(
                opened.service, opened.method, opened.request, timeout=opened.timeout
            )
            if self._stop.is_set():
                call.cancel()
            for response in call:
                for line in self.tail.received(response):
                    self._emit(line)
                if self._stop.is_set():
                    call.cancel()
        except Exception as error:  # the log may not fail the job
            return error_status(error)
        finally:
            self._call = None
        return None, ""
