"""Exactly one job per key: find what an earlier try left, decide what to do about it, and do it.

A key belongs to one generation of a task. Its token stands in the description of every job created for it, so that the
job can be found on the service even where nothing was recorded (no state store, or a crash in between).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.model import TERMINAL, JobHandle
from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy
from airflow_provider_datasphere.client.submission.context import SubmissionCallbacks, SubmissionIdentity
from airflow_provider_datasphere.client.submission.decision import Action, Decision
from airflow_provider_datasphere.client.submission.earlier_jobs import EarlierJobs
from airflow_provider_datasphere.client.submission.execute import (
    StartQueuedError,
    delete_if_not_executed,
    delete_quietly,
    execute,
    start,
)
from airflow_provider_datasphere.client.submission.execution import JobEndedUnstartedError
from airflow_provider_datasphere.client.submission.job_key import request_of
from airflow_provider_datasphere.client.submission.job_record import JobRecord
from airflow_provider_datasphere.client.submission.job_search import find_jobs
from airflow_provider_datasphere.client.submission.request_digest import argument_digests, request_digest
from airflow_provider_datasphere.client.submission.start_clock import StartClock
from airflow_provider_datasphere.client.submission.submit import submit

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.job_key import Key, Store
    from airflow_provider_datasphere.client.submission.job_request import JobOrigin, JobRequest

log = logging.getLogger(__name__)

_NO_CALLBACKS = SubmissionCallbacks()
_DEFAULT_POLICY = OutcomePolicy()


@dataclass(frozen=True)
class SubmittedJob:
    """The one job of a key.

    :param reattached: whether an earlier try created it.
    :param queued: the service's answer to Execute, where the job is created but waits for room; ``None``: it runs, or
        is over.
    """

    handle: JobHandle
    reattached: bool
    queued: str | None = None


def get_or_create_job(
    client: JobApi,
    request: JobRequest,
    key: Key,
    *,
    store: Store | None = None,
    search_existing: bool = True,
    policy: OutcomePolicy = _DEFAULT_POLICY,
    callbacks: SubmissionCallbacks = _NO_CALLBACKS,
    poll_interval: float = 10.0,
    start_timeout: float | None = None,
    first_execute_at: float | None = None,
    wait_for_room: bool = True,
    logger: LoggerLike = log,
) -> SubmittedJob:
    """Return the one job of ``key``: the one that an earlier try left, or a new one.

    :param store: where the job is recorded.
    :param search_existing: whether there may be an earlier job, where the store doesn't tell.
    :param policy: what the task makes of an ended job: one that it would take for a success or a skip is adopted.
    :param poll_interval: longest pause between two polls of a job that is being cancelled, seconds.
    :param start_timeout: how long the job may take from its first Execute until it computes, seconds; here it limits
        the wait for room. Default: any time.
    :param first_execute_at: when this try began to wait for room, epoch seconds, if it did.
    :param wait_for_room: repeat Execute while it is rejected for lack of room or of instances; otherwise return the
        job as ``queued``.
    :raises JobRequestError: the request can't be carried out as written.
    :raises JobInfrastructureError: the search couldn't be finished, or the service took no job in time.
    """
    entry = store.get() if store is not None else None
    earlier = JobRecord.of(entry, key)
    decision = Decision(None, Action.CREATE, 0)
    # An entry of another generation shows that the store works, and that this one has sent nothing yet. Without any
    # entry the store may be new, or have forgotten.
    if earlier is not None or (search_existing and entry is None):
        known = earlier or JobRecord(key.token)
        decision = EarlierJobs(client, request, key, known, policy, poll_interval, logger).decide()
    elif search_existing:
        logger.info("No earlier try of this task has created a job.")
    clock = StartClock(start_timeout, first_execute_at)
    generation = _Generation(client, request, key, store, earlier, callbacks, clock, wait_for_room, logger)
    if decision.job is not None and decision.action in (Action.ATTACH, Action.ADOPT, Action.EXECUTE):
        try:
            return generation.reattach(decision, decision.job)
        except JobEndedUnstartedError as refused:
            logger.info("%s", refused)
            decision = Decision(None, Action.CREATE, decision.ordinal + 1)
    return generation.create(decision, earlier_tries=search_existing or earlier is not None)


def find_unfinished_jobs(client: JobApi, origin: JobOrigin, key: Key, store: Store | None) -> list[jobs_pb2.Job]:
    """Return the jobs of a key that aren't over, for a task that ends before it has reattached to one of them.

    :raises DataSphereError: the search couldn't be finished.
    """
    record = JobRecord.of(store.get() if store is not None else None, key)
    if record is not None and record.job_id:
        jobs = [client.get(record.job_id)]
    else:
        jobs = find_jobs(client, origin.project_id(), key, origin)
    return [job for job in jobs if job.status not in TERMINAL]


class _Generation:
    """Carries out what was decided, and records it.

    :param earlier: what an earlier try recorded.
    """

    def __init__(
        self,
        client: JobApi,
        request: JobRequest,
        key: Key,
        store: Store | None,
        earlier: JobRecord | None,
        callbacks: SubmissionCallbacks,
        clock: StartClock,
        wait_for_room: bool,
        logger: LoggerLike,
    ) -> None:
        self._client = client
        self._request = request
        self._key = key
        self._store = store
        self._earlier = earlier or JobRecord(key.token)
        self._callbacks = callbacks
        self._clock = clock
        self._wait_for_room = wait_for_room
        self._log = logger
        self._digest = request_digest(request)

    # An earlier job ----------------------------------------------------------------------------------------------

    def reattach(self, decision: Decision, job: jobs_pb2.Job) -> SubmittedJob:
        """Continue with the job of an earlier try.

        :raises JobEndedUnstartedError: it was rejected for lack of quota, and is over.
        """
        job_id, action = self._delete_other_unexecuted_jobs(decision, job.id)
        self._callbacks.require_newest_try()
        self._callbacks.created(job_id, job.project_id)
        recorded = self._earlier.job_id == job_id
        record = JobRecord(
            self._key.token,
            self._key.retries,
            request=request_of(job.desc),
            arguments=self._earlier.arguments if recorded else argument_digests(self._request),
            ordinal=decision.ordinal,
            job_id=job_id,
            uploaded=job_id,
            operation_id=self._earlier.operation_id if recorded else None,
            first_execute_at=self._earlier.first_execute_at if recorded else None,
            accepted_at=self._earlier.accepted_at if recorded else None,
        )
        if action is Action.EXECUTE:
            if self._clock.first_execute_at is None:
                # Where it wasn't recorded, the job's creation is the next best.
                self._clock.first_execute_at = record.first_execute_at or float(job.created_at.seconds) or None
            return self._started(record, lambda: self._start(job_id), reattached=True)
        handle = JobHandle(
            job_id,
            record.operation_id,
            first_execute_at=record.first_execute_at,
            accepted_at=record.accepted_at,
        )
        return self._started(
            record, lambda: self._attach(handle) if action is Action.ATTACH else handle, reattached=True
        )

    def _start(self, job_id: str) -> JobHandle:
        return start(
            self._client,
            job_id,
            self._request.data_ttl,
            self._clock,
            self._log,
            may_be_running=True,
            wait_for_room=self._wait_for_room,
        )

    def _attach(self, handle: JobHandle) -> JobHandle:
        """Return the handle with the operation, as far as it can be known."""
        if handle.operation_id is not None or self._client.get(handle.job_id).status in TERMINAL:
            return handle
        # On a running job Execute answers with the operation that runs; what it does on an ended one isn't known.
        running = execute(self._client, handle.job_id, StartClock(), self._log, may_be_running=True)
        return replace(running, first_execute_at=handle.first_execute_at)

    def _started(self, record: JobRecord, submit: Callable[[], JobHandle], *, reattached: bool) -> SubmittedJob:
        """Submit the job, and record what comes of it.

        :raises JobEndedUnstartedError: it was rejected for lack of room, and is over.
        """
        try:
            handle, queued = submit(), None
        except StartQueuedError as rejected:
            handle = JobHandle(rejected.job_id, first_execute_at=self._clock.first_execute_at)
            queued = rejected.reason
        record.job_id, record.operation_id = handle.job_id, handle.operation_id
        record.first_execute_at, record.accepted_at = handle.first_execute_at, handle.accepted_at
        record.save(self._store)
        return SubmittedJob(handle, reattached, queued)

    def _delete_other_unexecuted_jobs(self, decision: Decision, job_id: str) -> tuple[str, Action]:
        """Delete the key's other jobs that seem never to have been executed, before this one is.

        :return: the job to continue with, and how: one of those that is running all the same goes before one that
            would be started.
        """
        for other in decision.unexecuted:
            if other == job_id:
                continue
            if decision.action is not Action.EXECUTE:
                delete_quietly(self._client, other)
            elif not delete_if_not_executed(self._client, other):
                delete_quietly(self._client, job_id)
                return other, Action.ATTACH
        return job_id, decision.action

    # A new job ---------------------------------------------------------------------------------------------------

    def create(self, decision: Decision, *, earlier_tries: bool) -> SubmittedJob:
        """Submit a new job; the unexecuted ones of earlier tries are deleted, or their creation is repeated."""
        self._callbacks.require_newest_try()
        ordinal = decision.ordinal + (self._earlier.ordinal or 0)
        record = JobRecord(
            self._key.token,
            self._key.retries,
            request=self._digest,
            arguments=argument_digests(self._request),
            ordinal=ordinal,
        )
        # Before anything is created: a store without an entry proves that nothing was.
        record.save(self._store)

        def created(job_id: str, project_id: str) -> None:
            record.job_id = job_id
            try:
                record.save(self._store)
            finally:
                self._callbacks.created(job_id, project_id)

        def uploaded(job_id: str) -> None:
            record.uploaded = job_id
            record.save(self._store)
            self._callbacks.uploaded(job_id)

        identity = SubmissionIdentity(
            self._key.submission_key(ordinal),
            tag=lambda desc: self._key.tag_description(desc, self._digest),
            find_unexecuted=self._find_unexecuted,
            earlier_tries=earlier_tries,
            superseded=decision.unexecuted,
        )
        callbacks = replace(self._callbacks, created=created, uploaded=uploaded)
        return self._started(
            record,
            lambda: submit(
                self._client,
                self._request,
                identity,
                callbacks,
                self._log,
                clock=self._clock,
                wait_for_room=self._wait_for_room,
            ),
            reattached=False,
        )

    def _find_unexecuted(self) -> list[str]:
        """Return the key's jobs that were not executed: the effect of calls whose answers were lost."""
        jobs = find_jobs(self._client, self._request.origin.project_id(), self._key, self._request.origin)
        return [job.id for job in jobs if job.status == jobs_pb2.CREATING and request_of(job.desc) == self._digest]
