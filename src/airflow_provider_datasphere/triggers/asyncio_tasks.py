"""Asyncio tasks in the triggerer: ending them for sure, finishing what a kill must not interrupt, starting many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

#: How long a killed trigger may take in all, seconds. Airflow 3.3 gives it 30.
KILL_TIMEOUT = 28.0
#: The shortest pause between the starts of two triggers in a process, seconds: a triggerer that starts has a thousand,
#: and each begins by reading a connection, opening a log and polling.
START_STAGGER_SECONDS = 0.003


async def run_to_completion(work: Coroutine[Any, Any, object]) -> None:
    """Await ``work`` although Airflow cancels the trigger again, about every second, until it has ended."""
    task = asyncio.ensure_future(work)
    give_up_at = time.monotonic() + KILL_TIMEOUT
    while not task.done():
        try:
            await asyncio.wait([task], timeout=max(0.0, give_up_at - time.monotonic()))
        except asyncio.CancelledError:
            if time.monotonic() >= give_up_at:
                raise
        else:
            break
    if task.done():
        task.result()


def end_of(task: asyncio.Future[Any]) -> asyncio.Future[None]:
    """Return what is done when ``task`` is, and may be cancelled without it.

    As ``asyncio.wait([task])``, which keeps a dozen objects for each of ten thousand triggers.
    """
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task.add_done_callback(partial(_note_end, ended))
    return ended


def _note_end(ended: asyncio.Future[None], _task: asyncio.Future[Any]) -> None:
    if not ended.done():
        ended.set_result(None)


async def cancel_and_wait(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end; cancel it again, a few times, if it swallows the cancellation."""
    for _ in range(5):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=0.5)
        if task.done():
            if not task.cancelled():
                task.exception()  # retrieved, so that asyncio doesn't warn
            return


_next_start = 0.0


async def stagger_start() -> None:
    """Wait until the triggers before this one have started; a single one starts at once."""
    global _next_start
    now = time.monotonic()
    start = max(now, _next_start)
    _next_start = start + START_STAGGER_SECONDS
    await asyncio.sleep(start - now)
