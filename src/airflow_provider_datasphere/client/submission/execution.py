"""Starting a created job: what each response of Execute means, and what to do next. Decides; does no I/O.

:class:`ExecuteState` is driven by two thin shells, :mod:`.execute` (threads) and :mod:`.start_queue` (asyncio).
"""

from __future__ import annotations

import enum
import logging
import random
import time
import uuid
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    JobCancelledError,
    JobInfrastructureError,
    JobLostError,
)
from airflow_provider_datasphere.client.model import TERMINAL, JobHandle
from airflow_provider_datasphere.client.rpc import (
    TRANSIENT,
    call_error,
    code_and_details,
    code_name,
    error_code,
    is_message_too_large,
)
from airflow_provider_datasphere.client.submission.capacity import InstanceTypesWait, instance_types_refused

if TYPE_CHECKING:
    import grpc
    from yandex.cloud.operation import operation_pb2

    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.start_clock import StartClock

log = logging.getLogger(__name__)

#: How long a call that starts something is repeated after unclear answers before it is given up, seconds.
UNCLEAR_ANSWER_SECONDS = 180.0


class JobEndedUnstartedError(DataSphereError):
    """The service refused to run a job, and has ended it since: it will never run."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"Job {job_id} was rejected and ended without having run.")
        self.job_id = job_id


class Rejection(enum.Enum):
    """Why the service doesn't start the job now, though it may later."""

    ROOM = "the project's quota of running jobs is used up"
    INSTANCE_TYPES = "its instance types are refused"


class ExecuteState:
    """The state of starting one job.

    The shell calls Execute with :meth:`next_request`, and passes the response to :meth:`accepted` or the error to
    :meth:`failed`; where that asks for the job, it is read and passed to :meth:`job_read`. It then pauses for
    :attr:`delay` and calls Execute again, until there is a :attr:`handle`.

    :param clock: its ``start_timeout``.
    :param may_be_running: the job may be running or over already.
    :param patient: repeat the call after unclear answers without a limit, as a wait in the triggerer does.
    """

    def __init__(
        self,
        job_id: str,
        clock: StartClock,
        logger: LoggerLike = log,
        *,
        may_be_running: bool = False,
        patient: bool = False,
    ) -> None:
        self.idempotency_key = idempotency_key("Execute", job_id)
        #: The job, once it is running or over.
        self.handle: JobHandle | None = None
        #: Why the last call was rejected; ``None``: it wasn't, or its result is unclear.
        self.rejection: Rejection | None = None
        #: The service's answer to the last rejected call.
        self.reason = ""
        #: Seconds to pause before the next call, where the rejection was not for lack of room.
        self.delay = 0.0
        self._job_id = job_id
        self._log = logger
        self._may_be_running = may_be_running
        self._had_no_room = False
        self._clock = clock
        self._label = f"Starting job {job_id}"
        self._unclear = UnclearAnswers(patient=patient)
        self._instance_types = InstanceTypesWait(clock, logger)
        self._error: grpc.RpcError | None = None

    def next_request(self) -> project_job_service_pb2.ExecuteProjectJobRequest:
        """Return the request of Execute; the job's time to start begins with the first one."""
        self._clock.begin()
        self.rejection = None
        return project_job_service_pb2.ExecuteProjectJobRequest(job_id=self._job_id)

    def accepted(self, operation: operation_pb2.Operation) -> None:
        """Take the response of Execute."""
        # Of a job that was started before, the operation tells when.
        at = operation.created_at.ToNanoseconds() / 1e9 if self._may_be_running and operation.created_at.seconds else 0
        self.handle = JobHandle(
            self._job_id,
            operation.id,
            first_execute_at=self._clock.first_execute_at,
            accepted_at=at or self._clock.now(),
        )

    def failed(self, error: grpc.RpcError) -> bool:
        """Take the error of Execute.

        :return: whether the job must be read, and passed to :meth:`job_read`.
        :raises JobRequestError: the service refuses, and the job doesn't run.
        :raises JobInfrastructureError: the instance types are refused for too long.
        """
        self._error = error
        code = code_name(error)
        if instance_types_refused(code, error.details()):
            self.rejection, self.reason = Rejection.INSTANCE_TYPES, code_and_details(error)
            self.delay = self._instance_types.next_pause(error.details() or code, self._label)
            return False
        if code not in TRANSIENT and not self._may_have_effect and not self._had_no_room:
            raise call_error(error, self._label) from error
        return True

    def job_read(self, job: jobs_pb2.Job) -> None:
        """Take the job as it is after a failed call.

        :raises JobEndedUnstartedError: rejected for lack of room, and over.
        :raises JobNotStartedError: ``start_timeout`` has passed.
        :raises JobRequestError: the service refuses, and the job doesn't run.
        :raises JobInfrastructureError: no clear answer for :data:`UNCLEAR_ANSWER_SECONDS`, and the job doesn't run.
        """
        error = self._error
        assert error is not None
        code = code_name(error)
        if self._had_no_room and ended_unstarted(job):
            raise JobEndedUnstartedError(self._job_id) from error
        if code == "RESOURCE_EXHAUSTED" and not is_message_too_large(error):
            self._after_room_rejection(error, job)
        else:
            self._after_unclear_answer(error, code, job)

    def job_unreadable(self, error: DataSphereError) -> DataSphereError:
        """Return the error for a job that can't be read after a failed call."""
        if self._had_no_room and error_code(error) == "NOT_FOUND":
            return JobCancelledError(deleted_text(self._job_id))
        return JobLostError(
            f"Could not confirm that job {self._job_id} started: {error} It may be running and costing money."
        )

    @property
    def _may_have_effect(self) -> bool:
        """Whether this call, or an earlier one, may have started the job."""
        return self._may_be_running or self._unclear.any

    def _after_room_rejection(self, error: grpc.RpcError, job: jobs_pb2.Job) -> None:
        if ended_unstarted(job):
            raise JobEndedUnstartedError(self._job_id) from error
        if self._may_have_effect and job.status != jobs_pb2.CREATING:
            self.handle = self._running_without_operation()  # it may be this very job that uses up the quota
            return
        self.rejection, self.reason = Rejection.ROOM, code_and_details(error)
        self._had_no_room = True
        self._clock.check(f"Job {self._job_id}", self.reason)

    def _after_unclear_answer(self, error: grpc.RpcError, code: str, job: jobs_pb2.Job) -> None:
        """The call may have had its effect, now or in an earlier try: the job's status tells."""
        if job.status in TERMINAL:
            self.handle = self._running_without_operation()
            return
        if job.status != jobs_pb2.CREATING and (code not in TRANSIENT or self._unclear.exhausted):
            # It is running; only its operation stays unknown. The job itself can be polled.
            self.handle = self._running_without_operation()
            return
        if code not in TRANSIENT:
            raise call_error(error, self._label) from error
        if self._unclear.exhausted:
            raise JobInfrastructureError(
                f"Job {self._job_id} was created but couldn't be started for {UNCLEAR_ANSWER_SECONDS:.0f} seconds: "
                f"{code}: {error.details()}. It isn't running."
            ) from error
        if not self._unclear.any:
            self._log.warning("%s got no clear answer (%s); retrying.", self._label, code_and_details(error))
        self._clock.check(f"Job {self._job_id}", code_and_details(error))
        self.delay = self._unclear.next_pause()

    def _running_without_operation(self) -> JobHandle:
        return JobHandle(self._job_id, first_execute_at=self._clock.first_execute_at)


class UnclearAnswers:
    """The pauses after calls that start something and whose results are unclear, and their limit.

    :param patient: there is none; else :data:`UNCLEAR_ANSWER_SECONDS`.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._limit = None if patient else UNCLEAR_ANSWER_SECONDS
        self._count = 0
        self._since = 0.0

    @property
    def any(self) -> bool:
        """Whether the result of an earlier call is unknown."""
        return self._count > 0

    @property
    def exhausted(self) -> bool:
        """Whether the result has been unclear for as long as the limit."""
        return self.any and self._limit is not None and time.monotonic() - self._since >= self._limit

    def next_pause(self) -> float:
        """Take a call without a clear result; return how long to pause before the next, seconds."""
        if not self.any:
            self._since = time.monotonic()
        self._count += 1
        return min(15.0, 0.25 * 2.0 ** min(self._count, 6)) * random.uniform(0.75, 1.25)


def deleted_text(job_id: str) -> str:
    """Return the message about a job that is gone, and was never started."""
    return f"Job {job_id} was deleted while it waited for room. Clear the task to run a new job."


def ended_unstarted(job: jobs_pb2.Job) -> bool:
    """Return whether the job was ended by the service without having run, as users have seen after a rejection."""
    return bool(job.status == jobs_pb2.ERROR and not job.HasField("started_at"))


def idempotency_key(method: str, key: str) -> str:
    """Return the same header for each repetition of the same call: a UUID, as the API guide asks for.

    :param key: whose call it is. A job is executed once, so its id is Execute's key.
    """
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"airflow-provider-datasphere {method} {key}"))
