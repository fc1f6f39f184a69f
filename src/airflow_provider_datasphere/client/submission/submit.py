"""Submitting a job: create, upload, Execute, each exactly once in its effect."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.submission.capacity import RoomWait
from airflow_provider_datasphere.client.submission.context import SubmissionCallbacks
from airflow_provider_datasphere.client.submission.creation import (
    AlreadyRunningError,
    JobCreator,
    key_after,
)
from airflow_provider_datasphere.client.submission.execute import delete_quietly, execute, start
from airflow_provider_datasphere.client.submission.execution import JobEndedUnstartedError
from airflow_provider_datasphere.client.submission.start_clock import StartClock
from airflow_provider_datasphere.client.transfer.upload import UploadUrlExpired, upload_inputs

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.model import JobHandle
    from airflow_provider_datasphere.client.submission.context import SubmissionIdentity
    from airflow_provider_datasphere.client.submission.job_request import JobRequest, PreparedJob

log = logging.getLogger(__name__)

_NO_CALLBACKS = SubmissionCallbacks()
#: How often a job's upload URLs are asked for, while the storage refuses them as expired.
MAX_URL_REQUESTS = 3


def submit(
    client: JobApi,
    request: JobRequest,
    identity: SubmissionIdentity,
    callbacks: SubmissionCallbacks = _NO_CALLBACKS,
    logger: LoggerLike = log,
    *,
    clock: StartClock | None = None,
    wait_for_room: bool = True,
) -> JobHandle:
    """Create a job, upload its inputs and run it.

    :param clock: its ``start_timeout``; default: none.
    :param wait_for_room: repeat Execute while it is rejected for lack of room or of instances.
    :return: the running job.
    :raises JobRequestError: the request can't be carried out as written; nothing is left behind.
    :raises JobInfrastructureError: the service didn't take it in time; the message names the job where there is one.
    :raises StartQueuedError: Execute was rejected for lack of room or of instances, without ``wait_for_room``.
    """
    clock = StartClock() if clock is None else clock
    room = RoomWait(client, clock, logger)
    with tempfile.TemporaryDirectory(prefix="datasphere-inputs-") as scratch:
        prepared = request.prepare(Path(scratch), identity.tag)
        creator = JobCreator(client, request, prepared, identity, callbacks, clock.timeout, logger)
        key = creator.key
        while True:
            try:
                job_id = _create_with_inputs(client, creator, key, prepared, logger)
                callbacks.uploaded(job_id)
                _require_newest_try(client, callbacks, job_id)
                return start(
                    client,
                    job_id,
                    request.data_ttl,
                    clock,
                    logger,
                    may_be_running=identity.earlier_tries,
                    wait_for_room=wait_for_room,
                )
            except AlreadyRunningError as running:
                logger.info("Job %s of an earlier try is running already: attaching to it.", running.job_id)
                callbacks.created(running.job_id, prepared.project_id)
                return execute(client, running.job_id, clock, logger, may_be_running=True, wait_for_room=wait_for_room)
            except JobEndedUnstartedError as refused:
                # Waiting for room must not continue with a job that is over.
                key = key_after(key, refused.job_id)
                room.pause(f"Job {refused.job_id}", "DataSphere had no room for it and ended it; a new job follows")


def _create_with_inputs(
    client: JobApi, creator: JobCreator, key: str, prepared: PreparedJob, logger: LoggerLike
) -> str:
    """Create the job and upload its inputs; return its id.

    :raises DataSphereError: an upload failed; the job is deleted.
    """
    created = creator.create(key)
    if not prepared.inputs:
        return created.job_id
    try:
        for urls_left in reversed(range(MAX_URL_REQUESTS)):
            # Another one each time: where a URL was refused, the old one has ended the other uploads too.
            stop = Event()
            client.add_interrupt_callback(stop.set)
            client.pause(0)  # an interrupt before that line reached no callback
            try:
                upload_inputs(prepared.inputs, created.upload_files, client.http, logger, stop=stop)
                break
            except UploadUrlExpired:
                if not urls_left:
                    raise
                # Only the operation has the URLs, and the same key leads to it again.
                expired, created = created, creator.create(key)
                if created.job_id != expired.job_id:
                    delete_quietly(client, expired.job_id)
    except DataSphereError:
        delete_quietly(client, created.job_id)
        client.pause(0)
        raise
    return created.job_id


def _require_newest_try(client: JobApi, callbacks: SubmissionCallbacks, job_id: str) -> None:
    try:
        callbacks.require_newest_try()
    except DataSphereError:
        delete_quietly(client, job_id)
        raise
