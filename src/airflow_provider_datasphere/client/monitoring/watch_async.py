"""Watching a job from asyncio: the same decisions as in :mod:`.watch`, on shared channels, without a thread.

For Airflow's triggerer: a thousand waits share one connection and one token source.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import grpc

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
from airflow_provider_datasphere.client.time_limit import within

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable

    from airflow_provider_datasphere.client.connection.channels import AsyncChannels
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.model import JobHandle

log = logging.getLogger(__name__)

#: The shortest pause between two polls of one job, seconds: there may be a thousand of them.
MIN_POLL_INTERVAL = 1.0
#: The pause between two polls as a share of the job's age.
BACKOFF_RATIO = 0.2
#: The same while the log is read: the end of its stream hints at the job's.
BACKOFF_RATIO_WHILE_STREAMING = 0.5
#: Lines emitted between two turns of the event loop.
LINES_PER_TURN = 200


async def watch_async(
    channels: AsyncChannels,
    handle: JobHandle,
    *,
    poll_interval: float = DEFAULT_POLL_INTERVAL,
    start_deadline: float | None = None,
    link: str | None = None,
    emit: Emit | None = None,
    tail: LogTail | None = None,
    logger: LoggerLike = log,
) -> TerminalState:
    """Wait until the job is over; see :func:`.watch.watch`.

    :param tail: the log reading of an earlier wait, to continue; default: from the log's beginning.
    """
    if emit is None:
        state = _poll_state(handle, poll_interval, start_deadline, link, StatusLogger(logger), BACKOFF_RATIO)
        while state.ended is None:
            await asyncio.sleep(state.delay)
            await _poll_once(channels, state)
        return state.ended

    emit = log_first_error_only(emit, logger)
    reader = _LogReader(channels, tail or LogTail(handle.job_id), emit, logger)
    status_logger = StatusLogger(logger, reader.tail, emit)
    state = _poll_state(handle, poll_interval, start_deadline, link, status_logger, BACKOFF_RATIO_WHILE_STREAMING)
    task = asyncio.create_task(reader.run(), name=f"datasphere-log-{handle.job_id}")
    try:
        while state.ended is None:
            await _pause(state, reader)
            await _poll_once(channels, state)
        await reader.drain(task, state.ended)
        return state.ended
    finally:
        task.cancel()
        await asyncio.wait([task])


def _poll_state(
    handle: JobHandle,
    poll_interval: float,
    start_deadline: float | None,
    link: str | None,
    status_logger: StatusLogger,
    backoff_ratio: float,
) -> PollState:
    return PollState(
        handle,
        poll_interval=poll_interval,
        min_poll_interval=MIN_POLL_INTERVAL,
        backoff_ratio=backoff_ratio,
        start_deadline=start_deadline,
        link=link,
        status_logger=status_logger,
    )


async def _poll_once(channels: AsyncChannels, state: PollState) -> None:
    call = state.next_call()
    try:
        async with channels.polls:
            response = await channels.unary(call.service, call.method, call.request, timeout=call.timeout)
    except grpc.RpcError as error:
        state.failed(*error_status(error))
    else:
        state.received(response)


async def _pause(state: PollState, reader: _LogReader) -> None:
    """Sleep until the next poll is due; the end of the log stream makes it due early."""
    loop = asyncio.get_running_loop()
    due = loop.time() + state.delay
    while True:
        left = due - loop.time()
        if left <= 0 or not await _happens(reader.hint.wait(), left):
            return
        reader.hint.clear()
        if state.request_immediate_poll():
            return


async def _happens(awaitable: Awaitable[object], seconds: float) -> bool:
    """Whether ``awaitable`` is done within ``seconds``."""
    try:
        await within(awaitable, seconds)
    except asyncio.TimeoutError:
        return False
    return True


class _LogReader:
    """Reads a job's log in its own asyncio task; never raises."""

    def __init__(self, channels: AsyncChannels, tail: LogTail, emit: Emit, logger: LoggerLike) -> None:
        self.tail = tail
        #: Set when a stream ended cleanly.
        self.hint = asyncio.Event()
        self._channels = channels
        self._emit = emit
        self._logger = logger
        self._ended = asyncio.Event()

    async def drain(self, task: asyncio.Task[None], ended: TerminalState) -> None:
        """Read the ended job's log to its end."""
        self.tail.job_ended(ended.logged_bytes)
        self._ended.set()
        notice = DrainNotice(self.tail, self._logger)
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            notice.log_once()
            if self.tail.overdue:
                break
        if self.tail.incomplete_reason is not None or not task.done():
            self._logger.warning(INCOMPLETE, self.tail.incomplete_reason or "no response")

    async def run(self) -> None:
        """Read until the log is complete or given up."""
        while True:
            code, details = await self._read_stream()
            delay = self.tail.closed(code, details)
            if code is None:
                self.hint.set()
            if delay is None:
                for line in self.tail.decoder.flush():
                    self._emit(line)
                return
            if self._ended.is_set():
                await asyncio.sleep(delay)
            else:
                await _happens(self._ended.wait(), delay)

    async def _read_stream(self) -> tuple[str | None, str]:
        """Read one stream to its end; return its status code name (``None``: clean end) and details."""
        opened = self.tail.open()
        stream = self._channels.stream(opened.service, opened.method, opened.request, timeout=opened.timeout)
        try:
            async with aclosing(cast("AsyncGenerator[Any, None]", stream)) as responses:
                async for response in responses:
                    for count, line in enumerate(self.tail.received(response), start=1):
                        self._emit(line)
                        if count % LINES_PER_TURN == 0:
                            # A burst of one job must not keep the polls of the others waiting.
                            await asyncio.sleep(0)
        except Exception as error:  # the log may not fail the job
            return error_status(error)
        return None, ""
