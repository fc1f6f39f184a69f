"""When the job of a submission was first executed, and until when it has to compute (``start_timeout``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from airflow_provider_datasphere.client.errors import JobNotStartedError, not_started_text


@dataclass
class StartClock:
    """Times the start of one job, across the processes that wait for it.

    :param timeout: how long the job may take from its first Execute until it computes, seconds; ``None``: any time.
    :param first_execute_at: when Execute was first called, epoch seconds; ``None``: not yet.
    """

    timeout: float | None = None
    first_execute_at: float | None = None
    now: Callable[[], float] = field(default=time.time, repr=False)

    def begin(self) -> None:
        """Note that the job is being started, unless that was noted before."""
        if self.first_execute_at is None:
            self.first_execute_at = self.now()

    @property
    def deadline(self) -> float | None:
        """When the time has passed, epoch seconds; ``None``: never, or it hasn't begun."""
        if self.timeout is None or self.first_execute_at is None:
            return None
        return self.first_execute_at + self.timeout

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, not below 0; ``None``: there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - self.now())

    def limit(self, seconds: float) -> float:
        """Shorten a pause so that it ends at the deadline."""
        return seconds if self.remaining is None else min(seconds, self.remaining)

    def check(self, job: str, reason: str) -> None:
        """Raise if the time has passed.

        :param job: the job, to begin a sentence with: "Job bt1…".
        :param reason: why it doesn't compute yet.
        :raises JobNotStartedError: it has.
        """
        if self.remaining == 0:
            raise JobNotStartedError(not_started_text(job, reason))
