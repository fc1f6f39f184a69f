"""ReadLogs: streams a job's log from an offset until everything is delivered."""

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

#: Approximate limit of one response, bytes; larger pieces are split.
MAX_RESPONSE = 64 * 1024
FROM_NOW = -1

_STREAMS = {logs.STDOUT: service_pb2.StandardStream.OUT, logs.STDERR: service_pb2.StandardStream.ERR}


async def read_logs(
    jobs: Jobs, record: JobRecord, offset: int
) -> AsyncIterator[service_pb2.ReadProjectJobLogsResponse]:
    """Yield the responses of one ReadLogs.

    :param offset: 0: from the start (or from now, see the setting ``read_logs_of_running_job``); -1: from now; else an
        offset of an earlier response. An offset beyond the log's end means its end.
    """
    if offset < FROM_NOW:
        raise invalid(f"offset={offset}: must be -1, 0, or an offset of an earlier response.")
    log = jobs.log(record.id)
    mode = jobs.settings.read_logs_of_running_job
    from_now = offset == FROM_NOW or (offset == 0 and mode == "live" and not jobs.has_ended(record))
    position = log.end if from_now else offset
    lifetime = jobs.settings.log_stream_seconds
    end = None if lifetime is None else time.monotonic() + lifetime
    while end is None or time.monotonic() < end:
        changed = log.changed
        response, wait = None, None
        if mode != "at_end" or jobs.has_ended(record):
            response, position, wait = _next_response(jobs, log, position)
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
    """Return the shorter of a wait and the rest of the stream's lifetime; None means no limit."""
    if end is None:
        return seconds
    rest = max(0.0, end - time.monotonic())
    return rest if seconds is None else min(seconds, rest)


def _next_response(
    jobs: Jobs, log: logs.JobLog, position: int
) -> tuple[service_pb2.ReadProjectJobLogsResponse | None, int, float | None]:
    """Return the next response and the offset after it; without one, the seconds to wait, None if unknown."""
    limit = jobs.settings.log_chunk_bytes or MAX_RESPONSE
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
