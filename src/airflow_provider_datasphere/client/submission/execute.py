"""Running a created job, or deleting it: Execute and Delete, each once in its effect."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import grpc

from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    Interrupted,
    JobNotStartedError,
    JobRequestError,
)
from airflow_provider_datasphere.client.rpc import TRANSIENT, WRITE_DEADLINE_SECONDS, error_code
from airflow_provider_datasphere.client.submission.capacity import RoomWait
from airflow_provider_datasphere.client.submission.execution import (
    ExecuteState,
    JobEndedUnstartedError,
    Rejection,
    ended_unstarted,
)

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.model import JobHandle
    from airflow_provider_datasphere.client.submission.start_clock import StartClock

log = logging.getLogger(__name__)


class StartQueuedError(DataSphereError):
    """The service doesn't start the job now, and whoever submits it wants to wait elsewhere.

    :param job_id: the created job, with all its inputs.
    :param reason: the service's answer.
    """

    def __init__(self, job_id: str, reason: str) -> None:
        super().__init__(f"Job {job_id} waits for room: {reason}")
        self.job_id = job_id
        self.reason = reason


def start(
    client: JobApi,
    job_id: str,
    data_ttl: timedelta | None,
    clock: StartClock,
    logger: LoggerLike = log,
    *,
    may_be_running: bool = False,
    wait_for_room: bool = True,
) -> JobHandle:
    """Run a created job; see :func:`execute`.

    :param data_ttl: how long the service keeps the job's data; ``None`` for infinity.
    :raises JobRequestError: the service won't run it; the job is deleted.
    :raises JobNotStartedError: ``start_timeout`` has passed; the job is deleted.
    """
    try:
        if data_ttl is None:
            # Whether a job that is created without a TTL keeps its data forever or for the default time isn't
            # documented; SetDataTtl is.
            client.set_data_ttl(job_id, None)
        return execute(client, job_id, clock, logger, may_be_running=may_be_running, wait_for_room=wait_for_room)
    except (JobRequestError, JobNotStartedError):
        delete_quietly(client, job_id)
        raise


def execute(
    client: JobApi,
    job_id: str,
    clock: StartClock,
    logger: LoggerLike = log,
    *,
    may_be_running: bool = False,
    wait_for_room: bool = True,
) -> JobHandle:
    """Run a created job (RPC ``Execute``); on a running job this returns the running operation.

    :param clock: its ``start_timeout``.
    :param may_be_running: the job may be running or over already.
    :param wait_for_room: repeat the call while it is rejected for lack of room or of instances.
    :raises JobRequestError: the service refuses, and the job doesn't run.
    :raises JobInfrastructureError: no clear answer for :data:`.execution.UNCLEAR_ANSWER_SECONDS`, or the instance types
        are rejected for :data:`.capacity.INSTANCE_TYPES_SECONDS`, and the job doesn't run.
    :raises JobNotStartedError: ``start_timeout`` has passed, and the job doesn't run.
    :raises JobEndedUnstartedError: rejected for lack of room, and over.
    :raises JobLostError: no clear answer, and the job can't be read.
    :raises JobCancelledError: somebody has deleted the job while it waited for room.
    :raises StartQueuedError: rejected for lack of room or of instances, without ``wait_for_room``.
    """
    state = ExecuteState(job_id, clock, logger, may_be_running=may_be_running)
    room = RoomWait(client, clock, logger)
    while state.handle is None:
        client.pause(0)
        try:
            operation = client.channels.unary(
                "jobs",
                "Execute",
                state.next_request(),
                timeout=WRITE_DEADLINE_SECONDS,
                idempotency_key=state.idempotency_key,
            )
        except grpc.RpcError as error:
            if state.failed(error):
                state.job_read(_read_job(client, job_id, state))
        else:
            state.accepted(operation)
        if state.rejection is not None and not wait_for_room:
            raise StartQueuedError(job_id, state.reason)
        if state.rejection is Rejection.ROOM:
            room.pause(f"Job {job_id}", state.reason)
            if ended_unstarted(_read_job(client, job_id, state)):
                raise JobEndedUnstartedError(job_id)
        elif state.handle is None:
            client.pause(state.delay)
    return state.handle


def _read_job(client: JobApi, job_id: str, state: ExecuteState) -> jobs_pb2.Job:
    try:
        return client.get(job_id)
    except Interrupted:
        raise
    except DataSphereError as error:
        raise state.job_unreadable(error) from error


def delete_quietly(client: JobApi, job_id: str) -> None:
    """Delete a job that has never run; best effort, since an unexecuted job costs nothing."""
    with suppress(DataSphereError):
        client.delete(job_id)


def delete_if_not_executed(client: JobApi, job_id: str) -> bool:
    """Delete a job that seems never to have been executed; the service knows.

    :return: whether it is gone; otherwise it is running.
    :raises DataSphereError: neither is certain.
    """
    for pause in (0.25, 0.5, 1.0, 2.0, 4.0, None):
        try:
            client.delete(job_id)
            return True
        except DataSphereError as error:
            code = error_code(error)
            if code == "FAILED_PRECONDITION":
                return False
            if code == "NOT_FOUND":
                return True
            if code not in TRANSIENT or pause is None:
                raise
            client.pause(pause)
    raise AssertionError("unreachable")
