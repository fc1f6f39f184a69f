"""Waiting for events in place of seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for an event, in place of a time in which a slow machine may not have come so far."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it doesn't happen"
        time.sleep(0.02)


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """:func:`wait_until`, on an event loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it doesn't happen"
        await asyncio.sleep(0.02)
