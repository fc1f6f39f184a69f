"""ReadLogs: a job's log from an offset on, until everything is delivered."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from datasphere_emulator import logs
from datasphere_emulator.errors import invalid
from datasphere_emulator.records import set_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from datasphere_emulator.jobs import Jobs
    from datasphere_emulator.records import JobRecord

#: About as much as one answer holds, bytes; larger pieces are cut.
MAX_ANSWER = 64 * 1024
FROM_NOW = -1

_STREAMS = {logs.STDOUT: service_pb2.StandardStream.OUT, logs.STDERR: service_pb2.StandardStream.ERR}


async def read_logs(
    jobs: Jobs, record: JobRecord, offset: int
) -> AsyncIterator[service_pb2.ReadProjectJobLogsResponse]:
    """The answers of one ReadLogs.

    :param offset: 0 from the start, -1 from now, else an offset of an earlier answer; one behind the log's end means
        its end.
    """
    if offset < FROM_NOW:
        raise invalid(f"offset={offset}: must be -1, 0, or an offset of an earlier answer.")
    log = jobs.log(record.id)
    position = log.end if offset == FROM_NOW else offset
    lifetime = jobs.settings.log_stream_seconds
    end = None if lifetime is None else time.monotonic() + lifetime
    while end is None or time.monotonic() < end:
        changed = log.changed
        response, position, wait = _next_answer(jobs, log, position)
        if response is not None:
            yield response
        elif wait is not None:
            await asyncio.sleep(_least(wait, end) or 0.0)
        elif jobs.has_ended(record):
            return
        else:
            keepalive = jobs.settings.log_keepalive_seconds
            begin = time.monotonic()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), _least(keepalive, end))
            if keepalive is not None and not changed.is_set() and time.monotonic() - begin >= keepalive:
                yield service_pb2.ReadProjectJobLogsResponse(offset=position)


def _least(seconds: float | None, end: float | None) -> float | None:
    """The shorter of a wait and the rest of the stream's time; None for ever."""
    if end is None:
        return seconds
    rest = max(0.0, end - time.monotonic())
    return rest if seconds is None else min(seconds, rest)


def _next_answer(
    jobs: Jobs, log: logs.JobLog, position: int
) -> tuple[service_pb2.ReadProjectJobLogsResponse | None, int, float | None]:
    """The next answer and the offset behind it, or the seconds until there is one, None for not known."""
    limit = jobs.settings.log_chunk_bytes or MAX_ANSWER
    now = time.time()
    messages: list[service_pb2.LogMessage] = []
    size = 0
    wait = None
    while size < limit and (found := log.piece_at(position)) is not None:
        piece, inside, end = found
        delay = piece.time + jobs.settings.log_delay_seconds - now
        if jobs.settings.log_delay_seconds > 0 and delay > 0:
            wait = delay
            break
        stop = min(piece.size, inside + limit)
        if messages and (jobs.settings.log_chunk_bytes or size + stop - inside > limit):
            break
        if stop > inside:
            message = service_pb2.LogMessage(content=log.content(piece, inside, stop))
            if piece.source in _STREAMS:
                message.standard_stream = _STREAMS[piece.source]
            else:
                message.file_path = piece.source
            set_time(message.created_at, piece.time)
            messages.append(message)
        size += stop - inside
        position = end - (piece.size - stop)
    if not messages:
        return None, position, wait
    return service_pb2.ReadProjectJobLogsResponse(logs=messages, offset=position), position, None
