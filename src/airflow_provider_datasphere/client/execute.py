"""Running a cloned job, or taking it back: Execute and Delete, each once in its effect."""

from __future__ import annotations

import logging
import random
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    JobInfrastructureError,
    JobLostError,
    JobRequestError,
)
from airflow_provider_datasphere.client.fork import parse_ttl
from airflow_provider_datasphere.client.outcome import TERMINAL, JobHandle
from airflow_provider_datasphere.client.service import WRITE_DEADLINE, Interrupted, call_error, code_name, error_code
from airflow_provider_datasphere.client.waiting import TRANSIENT

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.fork import ForkRequest
    from airflow_provider_datasphere.client.reporting import Reporter
    from airflow_provider_datasphere.client.service import JobService

log = logging.getLogger(__name__)

#: How long a call that starts something is repeated after unclear answers before it is given up, seconds.
PATIENCE = 180.0


def start(
    client: JobService, request: ForkRequest, job_id: str, logger: Reporter = log, *, may_run: bool = False
) -> JobHandle:
    """Run the job that was cloned for ``request``; see :func:`execute`.

    :raises JobRequestError: the service won't run it; the job is deleted.
    """
    try:
        if parse_ttl("data_ttl", request.data_ttl) is None:
            # Whether a Clone without TTL means infinity or the default isn't documented; SetDataTtl is.
            client.set_data_ttl(job_id, None)
        return execute(client, job_id, logger, may_run=may_run)
    except JobRequestError:
        discard(client, job_id)
        raise


def execute(client: JobService, job_id: str, logger: Reporter = log, *, may_run: bool = False) -> JobHandle:
    """Run a cloned job (RPC ``Execute``); on a running job this returns the running operation.

    :param may_run: the job may be running or over already.
    :raises JobRequestError: the service refuses, and the job doesn't run.
    :raises JobInfrastructureError: no clear answer for :data:`PATIENCE` seconds, and the job doesn't run.
    :raises JobLostError: no clear answer, and the job can't be seen.
    """
    request = project_job_service_pb2.ExecuteProjectJobRequest(job_id=job_id)
    backoff = Backoff(client)
    while True:
        client.pause(0)
        try:
            operation = client.channels.unary(
                "jobs", "Execute", request, timeout=WRITE_DEADLINE, idempotency_key=idempotency_key("Execute", job_id)
            )
            return JobHandle(job_id, operation.id)
        except grpc.RpcError as error:
            code = code_name(error)
            if code == "RESOURCE_EXHAUSTED":
                if (may_run or backoff.began) and _status(client, job_id) != jobs_pb2.CREATING:
                    return JobHandle(job_id)  # what takes the room may be this very job
                logger.info("DataSphere has no room for job %s now (%s); trying again.", job_id, error.details())
                backoff.pause_without_limit()
                continue
            if code not in TRANSIENT and not backoff.began and not may_run:
                raise call_error(error, f"Starting job {job_id}") from error
            # The call may have had its effect, now or in an earlier try: what does the job say?
            status = _status(client, job_id)
            if status in TERMINAL:
                return JobHandle(job_id)
            if status != jobs_pb2.CREATING and (code not in TRANSIENT or backoff.exhausted):
                # It runs; only its operation stays unknown. The job itself can be watched.
                return JobHandle(job_id)
            if code not in TRANSIENT:
                raise call_error(error, f"Starting job {job_id}") from error
            if backoff.exhausted:
                raise JobInfrastructureError(
                    f"Job {job_id} was cloned but couldn't be started for {PATIENCE:.0f} seconds: {code}: "
                    f"{error.details()}. It isn't running."
                ) from error
            backoff.pause()


def idempotency_key(method: str, key: str) -> str:
    """The same header for each repetition of the same call, in the form that the API guide asks for: a UUID.

    :param key: whose call it is. A cloned job is executed once, so its id is Execute's key.
    """
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"airflow-provider-datasphere {method} {key}"))


def discard(client: JobService, job_id: str) -> None:
    """Remove a job that has never run; best effort, since an unexecuted job costs nothing."""
    with suppress(DataSphereError):
        client.delete(job_id)


def take_back(client: JobService, job_id: str) -> bool:
    """Delete a job that seems never to have been executed; the service knows.

    :return: whether it is gone; otherwise it runs.
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


def _status(client: JobService, job_id: str) -> int:
    try:
        return client.get(job_id).status
    except Interrupted:
        raise
    except DataSphereError as error:
        raise JobLostError(
            f"Job {job_id} was told to start, and whether it runs can't be seen: {error} It may be running and costing "
            "money."
        ) from error


class Backoff:
    """The pauses between repetitions of a call that starts something, and their end."""

    def __init__(self, client: JobService) -> None:
        self._client = client
        self._unclear = 0
        self._refused = 0
        self._unclear_since = 0.0

    @property
    def began(self) -> bool:
        """Whether an unclear answer has come."""
        return self._unclear > 0

    @property
    def exhausted(self) -> bool:
        return self.began and time.monotonic() - self._unclear_since >= PATIENCE

    def pause(self) -> None:
        if not self.began:
            self._unclear_since = time.monotonic()
        self._unclear += 1
        self._client.pause(min(15.0, 0.25 * 2 ** min(self._unclear, 6)) * random.uniform(0.75, 1.25))

    def pause_without_limit(self) -> None:
        """After a refusal without effect: a quota is a queue, and the task's own timeout is the limit."""
        self._refused += 1
        self._client.pause(min(30.0, 0.5 * 2 ** min(self._refused, 6)) * random.uniform(0.75, 1.25))
