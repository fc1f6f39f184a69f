"""The client for asyncio: what a trigger needs, on channels that all triggers of an event loop share."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2

from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.client.monitoring.watch_async import watch_async
from airflow_provider_datasphere.client.rpc import READ_DEADLINE_SECONDS, WRITE_DEADLINE_SECONDS, call_error
from airflow_provider_datasphere.client.submission.start_queue import QueuedJob, StartQueue

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.connection.channels import AsyncChannels
    from airflow_provider_datasphere.client.connection.settings import Settings
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.model import JobHandle
    from airflow_provider_datasphere.client.monitoring.logs import LogTail
    from airflow_provider_datasphere.client.monitoring.polling import TerminalState
    from airflow_provider_datasphere.client.monitoring.status_logger import Emit

log = logging.getLogger(__name__)

#: Deadline of a Cancel, seconds: a killed trigger has 30 seconds in all.
CANCEL_DEADLINE = 10.0


class AsyncDataSphereClient:
    """An asyncio client of DataSphere Jobs: start, read, watch, cancel and delete a job.

    :param channels: shared by all clients of this event loop and connection.
    """

    def __init__(self, channels: AsyncChannels, settings: Settings) -> None:
        self.settings = settings
        self._channels = channels

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """Return the job (RPC ``ProjectJobService.Get``)."""
        request = project_job_service_pb2.GetProjectJobRequest(job_id=job_id)
        job: jobs_pb2.Job = await self._call("Get", request, READ_DEADLINE_SECONDS, f"Reading job {job_id}")
        return job

    async def cancel(self, job_id: str, *, graceful: bool = False, reason: str = "") -> None:
        """Ask the service to cancel a job (RPC ``Cancel``)."""
        request = project_job_service_pb2.CancelProjectJobRequest(job_id=job_id, graceful=graceful, reason=reason)
        await self._call("Cancel", request, CANCEL_DEADLINE, f"Cancelling job {job_id}")

    async def delete(self, job_id: str) -> None:
        """Delete a job (RPC ``Delete``)."""
        request = project_job_service_pb2.DeleteProjectJobRequest(job_id=job_id)
        await self._call("Delete", request, WRITE_DEADLINE_SECONDS, f"Deleting job {job_id}")

    async def _call(self, method: str, request: Any, timeout: float, what: str) -> Any:
        try:
            return await self._channels.unary("jobs", method, request, timeout=timeout)
        except DataSphereError:
            raise  # there is no token for the call; the error says so
        except grpc.RpcError as error:
            raise call_error(error, what) from error

    async def start(self, job: QueuedJob, project_id: str, reason: str) -> JobHandle:
        """Run a created job as soon as its project has room (RPC ``Execute``); see :meth:`.StartQueue.start`."""
        queue = StartQueue.shared(self.settings.fingerprint, project_id)
        return await queue.start(self._channels, job, reason)

    def watch(
        self,
        handle: JobHandle,
        *,
        poll_interval: float = DEFAULT_POLL_INTERVAL,
        start_deadline: float | None = None,
        link: str | None = None,
        emit: Emit | None = None,
        tail: LogTail | None = None,
        logger: LoggerLike = log,
    ) -> Coroutine[Any, Any, TerminalState]:
        """Wait until the job is over; see :func:`.monitoring.watch.watch`.

        :param tail: the log reading of an earlier wait, to continue; default: from the log's beginning.
        """
        return watch_async(
            self._channels,
            handle,
            poll_interval=poll_interval,
            start_deadline=start_deadline,
            link=link,
            emit=emit,
            tail=tail,
            logger=logger,
        )
