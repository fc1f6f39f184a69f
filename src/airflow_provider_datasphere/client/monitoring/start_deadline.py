"""Until when a job must compute: the part of ``start_timeout`` in which it is accepted and being set up."""

from __future__ import annotations

import time
from collections.abc import Callable

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

#: What a job shows before its program starts; 0 where the service doesn't say.
_NOT_COMPUTING = frozenset({jobs_pb2.JOB_STATUS_UNSPECIFIED, jobs_pb2.CREATING, jobs_pb2.PREPARING})


class StartDeadline:
    """The deadline of one wait; it is over for good once the job has been seen computing.

    :param at: the deadline, epoch seconds; ``None``: none.
    """

    __slots__ = ("_at", "_now")

    def __init__(self, at: float | None, now: Callable[[], float] = time.time) -> None:
        self._at = at
        self._now = now

    def saw(self, status: int) -> None:
        """Take a status that a poll found."""
        if status not in _NOT_COMPUTING:
            self._at = None

    @property
    def passed(self) -> bool:
        """Whether the job hasn't been seen computing, and the time is over."""
        return self._at is not None and self._now() >= self._at

    def limit(self, seconds: float) -> float:
        """Shorten the pause before a poll, so that one falls on the deadline."""
        return seconds if self._at is None else min(seconds, max(0.0, self._at - self._now()))
