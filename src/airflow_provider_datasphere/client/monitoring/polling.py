"""Polling a job: which call comes next, when, and when to give up. Decides; does no I/O.

:class:`PollState` is driven by two thin shells, :mod:`.watch` (threads) and :mod:`.watch_async` (asyncio): they make
its next call and pass it the response or the error.
"""

from __future__ import annotations

import enum
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2
from yandex.cloud.operation import operation_service_pb2

from airflow_provider_datasphere.client.errors import (
    JobLostError,
    JobNotStartedError,
    JobRequestError,
    not_started_text,
)
from airflow_provider_datasphere.client.model import TERMINAL, JobHandle, JobRef, status_name
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.client.monitoring.outcome import execute_metadata, mismatched_owner
from airflow_provider_datasphere.client.monitoring.rpc_call import RpcCall
from airflow_provider_datasphere.client.monitoring.start_deadline import StartDeadline
from airflow_provider_datasphere.client.monitoring.status_logger import StatusLogger
from airflow_provider_datasphere.client.rpc import DENIED, READ_DEADLINE_SECONDS, TRANSIENT

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2
    from yandex.cloud.operation import operation_pb2

log = logging.getLogger(__name__)

#: How long access may be denied (role or token revoked) before the job counts as lost, seconds.
DENIED_GRACE_SECONDS = 60.0
#: How long a job may be not found before it counts as lost, seconds: a new one may not be visible everywhere yet.
NOT_FOUND_GRACE_SECONDS = 10.0
#: How long the job of an ended operation may show a status that isn't terminal, seconds.
STATUS_GRACE_SECONDS = 5.0

_PRINTED_FILES = frozenset({"stdout.txt", "stderr.txt"})


class PollTarget(enum.Enum):
    """What the next call reads."""

    OPERATION = "Operation.Get"
    JOB = "Job.Get"


@dataclass(frozen=True)
class TerminalState:
    """What the service says of an ended job. One of the two may be missing."""

    operation: operation_pb2.Operation | None
    job: jobs_pb2.Job | None

    @property
    def logged_bytes(self) -> int:
        """How many bytes the program wrote to stdout and stderr; 0 where the service doesn't say."""
        if self.job is None:
            return 0
        return sum(file.size_bytes for file in self.job.log_files if file.desc.path in _PRINTED_FILES)


class PollState:
    """The state of one wait for a job.

    The operation is polled first: one call shows status, progress and result. Without an operation, or once the
    service has forgotten it, the job itself is polled. Transient errors are retried without a limit (the task's own
    timeout is the limit), denied access for :data:`DENIED_GRACE_SECONDS`, an unknown job for
    :data:`NOT_FOUND_GRACE_SECONDS`.

    :param poll_interval: the longest pause between two polls, seconds.
    :param min_poll_interval: the shortest pause between two polls, seconds.
    :param backoff_ratio: the pause as a share of the job's age: the end of short jobs is noticed early, long jobs cost
        few calls.
    :param start_deadline: until when the job must compute, epoch seconds; default: any time.
    :param link: the job's page, for messages.
    :param verify_operation_owner: check that the operation is one of this job's Execute; not needed where Execute
        itself has returned it.
    :param known_job: whether the job is known to exist, because it was just executed or seen before; otherwise an
        unknown id is a mistake and not a lost job.
    :param status_logger: logs changes; default: to this module's logger.
    """

    # There may be ten thousand in a process.
    __slots__ = (
        "_backoff_ratio",
        "_clock",
        "_delay",
        "_denied_since",
        "_failures",
        "_handle",
        "_hint_interval",
        "_known_job",
        "_last_hint_at",
        "_min_poll_interval",
        "_not_found_since",
        "_operation",
        "_operation_ended_at",
        "_operation_is_known",
        "_poll_interval",
        "_polls",
        "_ref",
        "_rng",
        "_start_deadline",
        "_started_at",
        "_status_logger",
        "_verify_operation_owner",
        "ended",
        "target",
    )

    def __init__(
        self,
        handle: JobHandle,
        *,
        poll_interval: float = DEFAULT_POLL_INTERVAL,
        min_poll_interval: float = 0.05,
        backoff_ratio: float = 0.1,
        start_deadline: float | None = None,
        link: str | None = None,
        verify_operation_owner: bool = False,
        known_job: bool = True,
        status_logger: StatusLogger | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.target = PollTarget.OPERATION if handle.operation_id else PollTarget.JOB
        self.ended: TerminalState | None = None
        self._handle = handle
        self._ref = JobRef(handle.job_id, link)
        self._verify_operation_owner = verify_operation_owner
        self._known_job = known_job
        self._status_logger = status_logger or StatusLogger(log)
        self._poll_interval = poll_interval
        self._start_deadline = StartDeadline(start_deadline)
        self._clock = clock
        self._rng = rng
        self._min_poll_interval = min(min_poll_interval, poll_interval)
        self._backoff_ratio = backoff_ratio
        self._started_at = clock()
        self._last_hint_at = self._started_at - 1.0
        self._hint_interval = 1.0
        self._delay = 0.0
        self._polls = 0
        self._failures = 0
        self._denied_since: float | None = None
        self._not_found_since: float | None = None
        self._operation: operation_pb2.Operation | None = None
        self._operation_ended_at: float | None = None
        self._operation_is_known = False

    @property
    def delay(self) -> float:
        """Seconds to pause before the next poll."""
        return self._delay

    @property
    def still_running(self) -> bool:
        """Whether the last poll found the job running."""
        return self.ended is None and self._failures == 0 and self._operation is None and self._polls > 0

    @property
    def failures(self) -> int:
        """How many polls have failed in a row."""
        return self._failures

    @property
    def in_grace_period(self) -> bool:
        """Whether access to the job is denied, or the job isn't found, but not for long enough to count as lost."""
        return self._denied_since is not None or self._not_found_since is not None

    def request_immediate_poll(self) -> bool:
        """Take a hint that the job may be over (its log ended): poll at once, then often for a moment.

        :return: whether the hint counts: less and less often, since a service may end streams as it likes.
        """
        now = self._clock()
        if now - self._last_hint_at < self._hint_interval:
            return False
        self._last_hint_at = now
        self._hint_interval *= 2
        self._started_at = now - self._min_poll_interval / self._backoff_ratio
        self._delay = 0.0
        return True

    def next_call(self) -> RpcCall:
        """Return the call to make now; its response goes to :meth:`received`, its error to :meth:`failed`."""
        if self.target is PollTarget.OPERATION:
            get_operation = operation_service_pb2.GetOperationRequest(operation_id=self._handle.operation_id or "")
            return RpcCall("operations", "Get", get_operation, READ_DEADLINE_SECONDS)
        get_job = project_job_service_pb2.GetProjectJobRequest(job_id=self._handle.job_id)
        return RpcCall("jobs", "Get", get_job, READ_DEADLINE_SECONDS)

    def received(self, response: Any) -> None:
        """Take the response of the call.

        :raises JobRequestError: the operation isn't one of this job's Execute.
        :raises JobNotStartedError: the job isn't computing, and its time for that has passed.
        """
        if self.target is PollTarget.OPERATION:
            self._status_logger.operation(response)
            self._received_operation(response)
        else:
            self._status_logger.job(response)
            self._received_job(response)

    def _received_operation(self, operation: operation_pb2.Operation) -> None:
        if self._verify_operation_owner and (owner := mismatched_owner(operation, self._ref.job_id)):
            raise JobRequestError(
                f"operation_id is {operation.id!r}, which is {owner}, not the Execute operation of job "
                f"{self._ref.job_id}: give the XCom operation_id of the task that started the job, or omit it."
            )
        self._succeeded(operation.created_at)
        self._operation_is_known = True
        if operation.done:
            # The response has the return code; status, files and instance type are the job's.
            self._operation = operation
            self._operation_ended_at = self._clock()
            self.target = PollTarget.JOB
            self._delay = 0.0
            return
        metadata = execute_metadata(operation)
        self._start_deadline.saw(metadata.metadata.status or metadata.job.status)
        if self._start_deadline.passed:
            # The job itself is asked before it is given up: an operation may show an old status, or none.
            self.target = PollTarget.JOB
        self._delay = self._start_deadline.limit(self._delay)

    def _received_job(self, job: jobs_pb2.Job) -> None:
        self._succeeded(job.created_at)
        if job.status in TERMINAL:
            self.ended = TerminalState(self._operation, job)
        elif self._operation_ended_at is not None:
            if self._clock() - self._operation_ended_at >= STATUS_GRACE_SECONDS:
                self.ended = TerminalState(self._operation, job)
            self._delay = min(self._delay, 0.5)
        else:
            self._received_unfinished_job(job)

    def _received_unfinished_job(self, job: jobs_pb2.Job) -> None:
        self._start_deadline.saw(job.status)
        if self._start_deadline.passed:
            raise JobNotStartedError(not_started_text(f"Job {self._ref}", f"status {status_name(job.status)}"))
        self._delay = self._start_deadline.limit(self._delay)
        if self._handle.operation_id and self._operation_is_known:
            self.target = PollTarget.OPERATION  # which has the progress too

    def failed(self, code: str, details: str = "") -> None:
        """Take the error of the call.

        :param code: the gRPC status code's name.
        :raises JobLostError: the job can't be monitored any more.
        :raises JobRequestError: there has never been such a job, as far as anybody knows.
        """
        target = self.target
        self._decide_after_failure(code, details)
        if self.ended is None:
            self._status_logger.failed(target.value, code, details)

    def _decide_after_failure(self, code: str, details: str) -> None:
        if code == "NOT_FOUND" and self.target is PollTarget.OPERATION:
            self._operation_is_known = False
            self.target = PollTarget.JOB
            self._delay = 0.0
            return
        if self._operation is not None and code not in TRANSIENT:
            # The operation says how the job ended; the job itself has only more details.
            self.ended = TerminalState(self._operation, None)
            return
        self._check_grace_periods(code, details)
        if code == "NOT_FOUND" and self._handle.operation_id and self._polls == 0:
            self.target = PollTarget.OPERATION  # which may become known first
        self._failures += 1
        ceiling = 5.0 if code in DENIED else max(5.0, self._poll_interval)
        self._delay = min(ceiling, 0.25 * 2 ** min(self._failures, 10)) * (0.75 + 0.5 * self._rng())
        for since, grace in (
            (self._denied_since, DENIED_GRACE_SECONDS),
            (self._not_found_since, NOT_FOUND_GRACE_SECONDS),
        ):
            if since is not None:
                self._delay = min(self._delay, max(0.05, since + grace - self._clock()))

    def _check_grace_periods(self, code: str, details: str) -> None:
        """Track since when access is denied or the job isn't found.

        :raises JobLostError: for longer than the grace period, or the error isn't transient.
        """
        now = self._clock()
        if code != "NOT_FOUND":
            self._not_found_since = None
        if code in TRANSIENT:
            self._denied_since = None
        elif code in DENIED:
            if self._denied_since is None:
                self._denied_since = now
            elif now - self._denied_since >= DENIED_GRACE_SECONDS:
                raise self._lost(f"access denied for {DENIED_GRACE_SECONDS:.0f} seconds", code, details)
        elif code == "NOT_FOUND":
            if self._not_found_since is None:
                self._not_found_since = now
            elif now - self._not_found_since >= NOT_FOUND_GRACE_SECONDS:
                raise self._lost("neither the job nor its operation was found", code, details)
        else:
            raise self._lost("the poll failed with an error that isn't transient", code, details)

    def _succeeded(self, created_at: Timestamp) -> None:
        if self._polls == 0 and created_at.seconds:
            # A resumed wait doesn't begin with fast polls again: a restarted triggerer has a thousand.
            self._started_at = min(self._started_at, self._clock() - (time.time() - created_at.seconds))
        self._polls += 1
        self._failures = 0
        self._denied_since = self._not_found_since = None
        backoff = (self._clock() - self._started_at) * self._backoff_ratio
        self._delay = min(self._poll_interval, max(self._min_poll_interval, backoff)) * (0.9 + 0.2 * self._rng())

    def _lost(self, what: str, code: str, details: str) -> JobLostError | JobRequestError:
        reason = f"{code}: {details.rstrip('.') or 'no details'}"
        if not self._known_job and self._polls == 0 and code in ("NOT_FOUND", "PERMISSION_DENIED"):
            return JobRequestError(
                f"There is no job {self._ref.job_id}, or the connection's account can't see it ({reason}). "
                "Check the id, and that the account is a Developer of its project."
            )
        return JobLostError(
            f"Lost access to job {self._ref}: {what} ({reason}). {self._ref.cancel_hint} "
            "Check that the connection's account is a Developer of the project."
        )
