"""A time limit for awaitables that never swallows a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_Result = TypeVar("_Result")


async def within(awaitable: Awaitable[_Result], seconds: float | None) -> _Result:
    """Wait as ``asyncio.wait_for``, without its bug of swallowing a cancellation that coincides with the result.

    :param seconds: ``None`` for no limit.
    :raises asyncio.TimeoutError: the limit has passed; the awaitable is cancelled.
    """
    task = asyncio.ensure_future(awaitable)
    task.add_done_callback(_retrieve_exception)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
        if done:
            return task.result()
        task.cancel()
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        raise
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


def _retrieve_exception(task: asyncio.Future[_Result]) -> None:
    # Nobody awaits a task that timed out: asyncio must not warn that its exception was never retrieved.
    if not task.cancelled():
        task.exception()
