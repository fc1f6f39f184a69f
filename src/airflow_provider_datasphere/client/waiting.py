"""Waiting for a job: what to ask next, when, and when to give up. Decides; does no I/O.

:class:`Waiting` is driven by two thin shells, :mod:`.watch` (threads) and :mod:`.aio` (asyncio): they make the call
it asks for and tell it what came back.
"""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import JobLostError, JobRequestError
from airflow_provider_datasphere.client.outcome import TERMINAL, JobHandle, JobRef, other_owner

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2
    from yandex.cloud.operation import operation_pb2

#: Deadline of one read, seconds. An answer that never comes is asked for again.
READ_DEADLINE = 10.0
#: How long a refusal (role or token taken away) may last before the job counts as lost, seconds.
DENIED_WINDOW = 60.0
#: How long an ended operation's job may still show a status that isn't final, seconds.
SETTLE_WINDOW = 5.0

TRANSIENT = frozenset(
    {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED", "CANCELLED"}
)
DENIED = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED"})


class Look(enum.Enum):
    """What to ask next."""

    OPERATION = "Operation.Get"
    JOB = "Job.Get"


@dataclass(frozen=True)
class Ended:
    """The job is over: what could be read of it. One of the two may be missing."""

    operation: operation_pb2.Operation | None
    job: jobs_pb2.Job | None

    @property
    def logged_bytes(self) -> int:
        """How large the job's log files are together, as far as the service tells."""
        return sum(file.size_bytes for file in self.job.log_files) if self.job is not None else 0


class Waiting:
    """The state of one wait.

    The operation is asked first: one call tells status, progress and result. Without an operation, or once the
    service has forgotten it, the job itself is asked. Transient errors are waited out for ever (the task's own
    timeout is the limit); a refusal is tried again for :data:`DENIED_WINDOW`.

    :param poll_interval: the longest pause between two looks, seconds.
    :param quickest: the shortest pause between two looks, seconds.
    :param share: the pause as a share of the job's age: quick jobs are noticed quickly, long ones cost few calls.
    :param link: the job's page, for messages.
    :param own_operation: whether the operation is surely this job's; otherwise it is looked at for that.
    """

    def __init__(
        self,
        handle: JobHandle,
        *,
        poll_interval: float = 10.0,
        quickest: float = 0.05,
        share: float = 0.1,
        link: str | None = None,
        own_operation: bool = True,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.look = Look.OPERATION if handle.operation_id else Look.JOB
        self.ended: Ended | None = None
        self._ref = JobRef(handle.job_id, link)
        self._own_operation = own_operation
        self._poll_interval = poll_interval
        self._clock = clock
        self._rng = rng
        self._quickest = min(quickest, poll_interval)
        self._share = share
        self._begun = clock()
        self._hurried = self._begun - 1.0
        self._patience_for_hints = 1.0
        self._delay = 0.0
        self._looks = 0
        self._failures = 0
        self._denied_since: float | None = None
        self._operation: operation_pb2.Operation | None = None
        self._operation_ended_at: float | None = None

    @property
    def delay(self) -> float:
        """Seconds to pause before the next look."""
        return self._delay

    @property
    def still_running(self) -> bool:
        """Whether the last look found the job running."""
        return self.ended is None and self._failures == 0 and self._operation is None and self._looks > 0

    @property
    def failures(self) -> int:
        """How many looks have failed in a row."""
        return self._failures

    @property
    def refused(self) -> bool:
        """Whether the service refuses to show the job, and may do so for a while yet."""
        return self._denied_since is not None

    def hurry(self) -> bool:
        """A hint that the job may be over (its log ended): look at once, then often for a moment.

        :return: whether the hint is heeded: less and less often, since a service may end streams as it likes.
        """
        now = self._clock()
        if now - self._hurried < self._patience_for_hints:
            return False
        self._hurried = now
        self._patience_for_hints *= 2
        self._begun = now - self._quickest / self._share
        self._delay = 0.0
        return True

    def saw_operation(self, operation: operation_pb2.Operation) -> None:
        """The operation was read.

        :raises JobRequestError: it isn't this job's.
        """
        if not self._own_operation and (owner := other_owner(operation, self._ref.job_id)):
            raise JobRequestError(
                f"operation_id is {operation.id!r}, which is {owner} and not of the execution of job "
                f"{self._ref.job_id}: give the XCom operation_id of the task that forked the job, or leave it out."
            )
        self._succeeded(operation.created_at)
        if operation.done:
            # The response holds the return code; status, files and instance type are the job's.
            self._operation = operation
            self._operation_ended_at = self._clock()
            self.look = Look.JOB
            self._delay = 0.0

    def saw_job(self, job: jobs_pb2.Job) -> None:
        self._succeeded(job.created_at)
        if job.status in TERMINAL:
            self.ended = Ended(self._operation, job)
        elif self._operation_ended_at is not None:
            if self._clock() - self._operation_ended_at >= SETTLE_WINDOW:
                self.ended = Ended(self._operation, job)
            self._delay = min(self._delay, 0.5)

    def failed(self, code: str, details: str = "") -> None:
        """The look failed with a gRPC status code name.

        :raises JobLostError: there is nothing left to ask.
        """
        if code == "NOT_FOUND" and self.look is Look.OPERATION:
            self.look = Look.JOB
            self._delay = 0.0
            return
        if self._operation is not None and code not in TRANSIENT:
            # The operation says how the job ended; the job's own account is only the more detailed one.
            self.ended = Ended(self._operation, None)
            return
        if code in TRANSIENT:
            self._denied_since = None
        elif code in DENIED:
            now = self._clock()
            if self._denied_since is None:
                self._denied_since = now
            elif now - self._denied_since >= DENIED_WINDOW:
                raise self._lost(f"DataSphere has refused to show it for {DENIED_WINDOW:.0f} seconds", code, details)
        elif code == "NOT_FOUND":
            raise self._lost("DataSphere knows neither its operation nor the job any more", code, details)
        else:
            raise self._lost("DataSphere doesn't answer for it", code, details)
        self._failures += 1
        ceiling = 5.0 if code in DENIED else max(5.0, self._poll_interval)
        self._delay = min(ceiling, 0.25 * 2 ** min(self._failures, 10)) * (0.75 + 0.5 * self._rng())
        if self._denied_since is not None:
            window_end = self._denied_since + DENIED_WINDOW
            self._delay = min(self._delay, max(0.05, window_end - self._clock()))

    def _succeeded(self, created_at: Timestamp) -> None:
        if self._looks == 0 and created_at.seconds:
            # A wait that is taken up again doesn't begin in a hurry again: a restarted triggerer has a thousand.
            self._begun = min(self._begun, self._clock() - (time.time() - created_at.seconds))
        self._looks += 1
        self._failures = 0
        self._denied_since = None
        pause = min(self._poll_interval, max(self._quickest, (self._clock() - self._begun) * self._share))
        self._delay = pause * (0.9 + 0.2 * self._rng())

    def _lost(self, what: str, code: str, details: str) -> JobLostError:
        return JobLostError(
            f"Job {self._ref} is out of sight: {what} ({code}: {details or 'no details'}). It may still be running "
            "and costing money: look at its page, and cancel it there or with CancelJobOperator"
            f"(job_id={self._ref.job_id!r}). Check that the connection's account is a Developer of the project."
        )
