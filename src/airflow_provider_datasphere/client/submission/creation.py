"""Creating a job, once in its effect: the RPC of a :class:`.job_request.JobRequest`, and the operation it answers with.

The call isn't blindly repeated: it carries a deterministic ``idempotency-key``, and after an answer that got lost the
client searches for its effect first. Whether the service honours the key is not documented; it is right either way.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.errors import DataSphereError, JobInfrastructureError, JobRequestError
from airflow_provider_datasphere.client.model import TERMINAL
from airflow_provider_datasphere.client.rpc import (
    LINK_DEADLINE_SECONDS,
    TRANSIENT,
    WRITE_DEADLINE_SECONDS,
    call_error,
    code_and_details,
    code_name,
    error_code,
    is_message_too_large,
    status_code_name,
)
from airflow_provider_datasphere.client.submission.capacity import (
    InstanceTypesRefusedError,
    InstanceTypesWait,
    RoomWait,
    instance_types_refused,
)
from airflow_provider_datasphere.client.submission.execute import delete_if_not_executed, delete_quietly
from airflow_provider_datasphere.client.submission.execution import UnclearAnswers, idempotency_key
from airflow_provider_datasphere.client.submission.start_clock import StartClock

if TYPE_CHECKING:
    from yandex.cloud.operation import operation_pb2

    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.context import SubmissionCallbacks, SubmissionIdentity
    from airflow_provider_datasphere.client.submission.job_request import JobRequest, PreparedJob

log = logging.getLogger(__name__)

#: How many jobs of earlier tries an honoured key may lead to, one after the other.
MAX_REPLAYS = 10
#: The same for operations that failed; this try's own may fail as well.
MAX_FAILED_REPLAYS = 3
#: How long the operation may take, and how often a slow one is reported, seconds. It usually takes less than one.
MAX_CREATION_SECONDS = 600.0
CREATION_REPORT_SECONDS = 60.0


class AlreadyRunningError(Exception):
    """A job of an earlier try that seemed never to have been executed is running."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


@dataclass(frozen=True)
class CreatedJob:
    """A job that exists and isn't executed yet.

    :param upload_files: where its inputs go.
    """

    job_id: str
    upload_files: Sequence[jobs_pb2.StorageFile]


class JobCreator:
    """Creates the job of one submission.

    :param start_timeout: how long the call may be rejected for lack of room or of instances, seconds; ``None``: as long
        as the task runs, and :data:`.capacity.INSTANCE_TYPES_SECONDS`.
    """

    def __init__(
        self,
        client: JobApi,
        request: JobRequest,
        prepared: PreparedJob,
        identity: SubmissionIdentity,
        callbacks: SubmissionCallbacks,
        start_timeout: float | None = None,
        logger: LoggerLike = log,
    ) -> None:
        self._client = client
        self._rpc, self._label = request.creation, request.label
        self._prepared = prepared
        self._identity = identity
        self._callbacks = callbacks
        self._log = logger
        # Its own: the job's time begins with its Execute.
        clock = StartClock(start_timeout)
        self._room, self._instance_types = RoomWait(client, clock, logger), InstanceTypesWait(clock, logger)

    @property
    def key(self) -> str:
        """The key of the first call: with other bytes of an input, an honoured one must not lead to the old ones."""
        message = self._prepared.message.SerializeToString(deterministic=True)
        return f"{self._identity.key}-{hashlib.sha256(message).hexdigest()[:20]}"

    def create(self, key: str) -> CreatedJob:
        """Create the job, repeating the call while its answer is unclear or the service has no capacity.

        :param key: :attr:`key`, or :func:`key_after` a job that can't be used.
        :raises JobRequestError: the service refuses the request.
        :raises JobInfrastructureError: no clear answer in time, no capacity in time, or the operation failed.
        :raises AlreadyRunningError: a job of an earlier try is running; no other is left behind.
        """
        unclear = UnclearAnswers()
        replays = 0
        while True:
            self._client.pause(0)
            if unclear.any and (lost := self._job_of_lost_answer()):
                return lost
            try:
                operation = self._call(key)
                job_id = self._job_id_of(operation)
                done_at_once = operation.done
                if not self._identity.earlier_tries:
                    self._report_created(job_id)
                operation = self._wait_for_operation(operation, job_id)
                limit = MAX_FAILED_REPLAYS if operation.HasField("error") else MAX_REPLAYS
                if self._is_stale(job_id, operation, done_at_once) and replays < limit:
                    replays += 1
                    key = key_after(key, job_id)
                    self._client.pause(min(2.0, 0.05 * 2**replays))
                    continue
                created = CreatedJob(job_id, self._upload_files(job_id, operation))
                if self._identity.earlier_tries:
                    self._delete_superseded_jobs(job_id)
                    self._report_created(job_id)
            except grpc.RpcError as error:
                self._pause_or_raise(error, unclear)
            except InstanceTypesRefusedError as refused:
                # The failed operation is what this key leads to.
                key = key_after(key, job_id)
                self._client.pause(self._instance_types.next_pause(str(refused), self._label))
            else:
                if unclear.any:
                    # Where the key isn't honoured, each unanswered call has created a job of its own.
                    with suppress(DataSphereError):
                        self._delete_all_but(job_id, self._find_unexecuted())
                return created

    def _call(self, key: str) -> operation_pb2.Operation:
        method = self._rpc.method
        operation: operation_pb2.Operation = self._client.channels.unary(
            "jobs",
            method,
            self._prepared.message,
            timeout=WRITE_DEADLINE_SECONDS,
            idempotency_key=idempotency_key(method, key),
        )
        return operation

    def _pause_or_raise(self, error: grpc.RpcError, unclear: UnclearAnswers) -> None:
        """Pause before the call is repeated.

        :raises DataSphereError: it is not, since that would change nothing, or has been for long enough.
        """
        code = code_name(error)
        if instance_types_refused(code, error.details()):
            self._client.pause(self._instance_types.next_pause(error.details() or code, self._label))
        elif is_message_too_large(error):
            raise call_error(error, self._label) from error
        elif code == "RESOURCE_EXHAUSTED":
            self._room.pause("The new job", code_and_details(error))
        elif code not in TRANSIENT or unclear.exhausted:
            raise call_error(error, self._label) from error
        else:
            if not unclear.any:
                self._log.warning("%s got no clear answer (%s: %s); retrying.", self._label, code, error.details())
            self._client.pause(unclear.next_pause())

    # Jobs of lost answers and of earlier tries -------------------------------------------------------------------

    def _job_of_lost_answer(self) -> CreatedJob | None:
        """Return the effect of a call whose answer got lost. With inputs it can't be used without its upload URLs."""
        if self._prepared.inputs or not (found := self._find_unexecuted()):
            return None
        self._report_created(found[0])
        self._delete_all_but(found[0], found)
        return CreatedJob(found[0], ())

    def _is_stale(self, job_id: str, operation: operation_pb2.Operation, done_at_once: bool) -> bool:
        """Return whether an honoured key led to a job that an earlier try, or an earlier ``dags test``, has left."""
        if self._identity.earlier_tries:
            return not self._is_resumable(job_id, operation)
        return done_at_once and not operation.HasField("error") and self._has_ended(job_id)

    def _is_resumable(self, job_id: str, operation: operation_pb2.Operation) -> bool:
        """Return whether the job can still be executed, or is running."""
        if operation.HasField("error"):
            return False
        for pause in (0.1, 0.4, 1.6, None):
            try:
                return self._client.get(job_id).status not in (*TERMINAL, jobs_pb2.CANCELLING)
            except JobRequestError as error:
                if error_code(error) != "NOT_FOUND":
                    raise
                if pause is not None:  # a new job may take a moment to be seen
                    self._client.pause(pause)
        return False

    def _has_ended(self, job_id: str) -> bool:
        """Return whether the service says that the new job is over. It usually isn't, so this must be cheap."""
        request = project_job_service_pb2.GetProjectJobRequest(job_id=job_id)
        try:
            status = self._client.channels.unary("jobs", "Get", request, timeout=LINK_DEADLINE_SECONDS).status
        except grpc.RpcError:
            return False
        return status in (*TERMINAL, jobs_pb2.CANCELLING)

    def _delete_superseded_jobs(self, job_id: str) -> None:
        """Delete what earlier tries left unexecuted, before this job runs: one of them may be running all the same.

        :raises AlreadyRunningError: one is; this job is deleted.
        """
        for earlier in {*self._identity.superseded} - {job_id}:
            if not delete_if_not_executed(self._client, earlier):
                delete_quietly(self._client, job_id)
                raise AlreadyRunningError(earlier)

    def _find_unexecuted(self) -> Sequence[str]:
        find = self._identity.find_unexecuted
        return find() if find is not None else ()

    def _delete_all_but(self, job_id: str, job_ids: Sequence[str]) -> None:
        for unused in {*job_ids} - {job_id}:
            delete_quietly(self._client, unused)

    def _report_created(self, job_id: str) -> None:
        try:
            self._callbacks.require_newest_try()
        except DataSphereError:
            delete_quietly(self._client, job_id)
            raise
        self._callbacks.created(job_id, self._prepared.project_id)

    # The operation -----------------------------------------------------------------------------------------------

    def _job_id_of(self, operation: operation_pb2.Operation) -> str:
        """Return the new job's id, which is known before the operation is done."""
        metadata = self._rpc.metadata()
        operation.metadata.Unpack(metadata)
        return str(metadata.job_id)

    def _wait_for_operation(self, operation: operation_pb2.Operation, job_id: str) -> operation_pb2.Operation:
        """Wait until the operation is done: fast at first, since it takes fractions of a second.

        :raises JobInfrastructureError: it isn't done after :data:`MAX_CREATION_SECONDS`; the job is deleted.
        """
        delay, began = 0.03, time.monotonic()
        report_at = began + CREATION_REPORT_SECONDS
        while not operation.done:
            now = time.monotonic()
            if now - began > MAX_CREATION_SECONDS:
                delete_quietly(self._client, job_id)
                raise JobInfrastructureError(
                    f"{self._label} isn't done after {MAX_CREATION_SECONDS:.0f} seconds (operation {operation.id}, "
                    f"new job {job_id}). The new job is not running; the next try creates another."
                )
            if now > report_at:
                report_at = now + CREATION_REPORT_SECONDS
                self._log.warning(
                    "%s isn't done after %.0f seconds (operation %s); waiting up to %.0f seconds.",
                    self._label,
                    now - began,
                    operation.id,
                    MAX_CREATION_SECONDS,
                )
            self._client.pause(delay * random.uniform(0.8, 1.2))
            delay = min(1.0, delay * 1.3)
            operation = self._client.get_operation(operation.id)
        return operation

    def _upload_files(self, job_id: str, operation: operation_pb2.Operation) -> Sequence[jobs_pb2.StorageFile]:
        """Return where the inputs of the new job go.

        :raises InstanceTypesRefusedError: the operation failed because of them.
        :raises DataSphereError: the operation failed; the job is deleted.
        """
        if operation.HasField("error"):
            delete_quietly(self._client, job_id)
            code = status_code_name(operation.error.code)
            if instance_types_refused(code, operation.error.message):
                raise InstanceTypesRefusedError(operation.error.message)
            text = f"{self._label} failed: {code}: {operation.error.message}."
            raise (JobInfrastructureError if code in TRANSIENT else JobRequestError)(text)
        response: Any = self._rpc.response()
        operation.response.Unpack(response)
        return list(response.upload_files)


def key_after(key: str, job_id: str) -> str:
    """Return the key of the next job, where the one that ``key`` leads to can't be used."""
    return f"{key}-after-{job_id}"
