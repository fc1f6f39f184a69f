"""Rejections for lack of room or capacity: how they are recognized, how long to pause, and what the log says."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import DataSphereError, JobInfrastructureError

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.start_clock import StartClock

log = logging.getLogger(__name__)

#: How long a call is retried whose instance types are rejected, seconds, unless there is a ``start_timeout``: users
#: have seen the same call succeed minutes later.
INSTANCE_TYPES_SECONDS = 300.0
#: Longest pauses between two attempts, seconds.
MAX_ROOM_PAUSE_SECONDS = 30.0
MAX_INSTANCE_TYPES_PAUSE_SECONDS = 20.0
#: How often the log says why a job waits, seconds.
NOTICE_INTERVAL_SECONDS = 60.0

_INSTANCE_TYPES = re.compile(r"instance[ _-]?types?", re.IGNORECASE)


class InstanceTypesRefusedError(DataSphereError):
    """The service rejects the instance types of a job: now, or for good; it doesn't say which."""


def instance_types_refused(code: str, details: str | None) -> bool:
    """Return whether a call was rejected because of the instance types it names, which may be transient.

    :param code: gRPC status code name.
    """
    return code == "INVALID_ARGUMENT" and bool(_INSTANCE_TYPES.search(details or ""))


class RoomNotice:
    """Logs why a job waits: at once, and then at most once in :data:`NOTICE_INTERVAL_SECONDS`."""

    def __init__(self, logger: LoggerLike, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = logger
        self._clock = clock
        self._due_at = float("-inf")

    @property
    def due_in(self) -> float:
        """Seconds until the next line may be logged."""
        return max(0.0, self._due_at - self._clock())

    def log(self, what: str, reason: str, place: str = "") -> None:
        """Log a line, if one is due.

        :param what: what waits, to begin a sentence with: "Job bt1…".
        :param reason: the service's answer.
        :param place: the place in a queue: "3rd of 17 that this triggerer starts".
        """
        if self.due_in > 0:
            return
        self._due_at = self._clock() + NOTICE_INTERVAL_SECONDS
        where = f" ({place})" if place else ""
        self._log.info("%s waits for room in its project%s: %s.", what, where, reason.rstrip("."))


class InstanceTypesWait:
    """The pauses of one submission while the service rejects its instance types, and their limit.

    :param clock: with a ``start_timeout`` that is the limit, else :data:`INSTANCE_TYPES_SECONDS`.
    """

    def __init__(self, clock: StartClock, logger: LoggerLike = log) -> None:
        self._limit = INSTANCE_TYPES_SECONDS if clock.timeout is None else clock.timeout
        self._log = logger
        self._rejections = 0
        self._first_rejection = 0.0

    def next_pause(self, details: str, what: str) -> float:
        """Take a rejection; return how long to pause before the call is repeated, seconds.

        :param details: the service's message.
        :param what: what was rejected, beginning with a capital letter: "Cloning job bt1…".
        :raises JobInfrastructureError: it has been rejected for as long as the limit.
        """
        now = time.monotonic()
        if not self._rejections:
            self._first_rejection = now
            self._log.warning(
                "%s was rejected: %s. Retrying for up to %.0f seconds, since this may be a transient lack of capacity.",
                what,
                details.rstrip("."),
                self._limit,
            )
        elif now - self._first_rejection >= self._limit:
            raise JobInfrastructureError(
                f"{what} was rejected for {self._limit:.0f} seconds: {details.rstrip('.')}. "
                "Either there is no capacity of these instance types now (retry later, or give more "
                "cloud_instance_types), or the community doesn't allow them (ask its administrator)."
            )
        self._rejections += 1
        pause = min(MAX_INSTANCE_TYPES_PAUSE_SECONDS, 2.0**self._rejections) * random.uniform(0.75, 1.25)
        return min(pause, max(0.05, self._first_rejection + self._limit - now))


class RoomWait:
    """The pauses of one submission while the service has no room for its job, and their limit: ``start_timeout``."""

    def __init__(self, client: JobApi, clock: StartClock, logger: LoggerLike = log) -> None:
        self._client = client
        self._clock = clock
        self._notice = RoomNotice(logger)
        self._rejections = 0

    def pause(self, what: str, reason: str) -> None:
        """Pause after a rejection without effect: a quota is a queue.

        :param what: what was rejected, beginning with a capital letter: "Cloning job bt1…".
        :param reason: the service's answer.
        :raises JobNotStartedError: ``start_timeout`` has passed.
        """
        self._clock.begin()
        self._clock.check(what, reason)
        self._notice.log(what, reason)
        self._rejections += 1
        self._client.pause(self._clock.limit(room_pause(self._rejections)))


def room_pause(rejections: int) -> float:
    """Return the pause after so many rejections in a row, seconds."""
    return min(MAX_ROOM_PAUSE_SECONDS, 0.5 * 2.0 ** min(rejections, 10)) * random.uniform(0.75, 1.25)
