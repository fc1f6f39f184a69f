"""Watching a job from asyncio: the same decisions as :mod:`.watch`, on shared channels, without a thread.

For Airflow's triggerer: a thousand waits share one connection and one token source.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2
from yandex.cloud.operation import operation_service_pb2

from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.logs import LogTail
from airflow_provider_datasphere.client.service import WRITE_DEADLINE, call_error, code_name
from airflow_provider_datasphere.client.waiting import READ_DEADLINE, Ended, Look, Waiting
from airflow_provider_datasphere.client.watch import INCOMPLETE, STREAM_DEADLINE, Emit, Narrator, never_raising

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.channels import AsyncChannels
    from airflow_provider_datasphere.client.outcome import JobHandle
    from airflow_provider_datasphere.client.reporting import Reporter
    from airflow_provider_datasphere.client.settings import Settings

log = logging.getLogger(__name__)

#: The shortest pause between two polls of one job, seconds: there may be a thousand of them.
QUICKEST_POLL = 1.0
#: The pause between two polls as a share of the job's age.
POLL_SHARE = 0.2
#: The same while the log is read, whose end tells of the job's.
LISTENING_SHARE = 0.5
#: Deadline of a Cancel, seconds: a trigger that is killed has half a minute for all it does.
CANCEL_DEADLINE = 10.0
#: Lines handed on between two turns of the event loop.
LINES_PER_TURN = 200


class AsyncDataSphereClient:
    """The reads that a wait needs, and what ends a job.

    :param channels: shared by all clients of this event loop and connection.
    """

    def __init__(self, channels: AsyncChannels, settings: Settings) -> None:
        self.settings = settings
        self._channels = channels

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """The job (RPC ``ProjectJobService.Get``)."""
        request = project_job_service_pb2.GetProjectJobRequest(job_id=job_id)
        job: jobs_pb2.Job = await self._call("Get", request, READ_DEADLINE, f"Reading job {job_id}")
        return job

    async def cancel(self, job_id: str, *, graceful: bool = False, reason: str = "") -> None:
        """Ask the service to cancel a job (RPC ``Cancel``)."""
        request = project_job_service_pb2.CancelProjectJobRequest(job_id=job_id, graceful=graceful, reason=reason)
        await self._call("Cancel", request, CANCEL_DEADLINE, f"Cancelling job {job_id}")

    async def delete(self, job_id: str) -> None:
        """Delete a job (RPC ``Delete``)."""
        request = project_job_service_pb2.DeleteProjectJobRequest(job_id=job_id)
        await self._call("Delete", request, WRITE_DEADLINE, f"Deleting job {job_id}")

    async def _call(self, method: str, request: Any, timeout: float, what: str) -> Any:
        try:
            return await self._channels.unary("jobs", method, request, timeout=timeout)
        except DataSphereError:
            raise  # no token for the call: that says all
        except grpc.RpcError as error:
            raise call_error(error, what) from error

    async def watch(
        self,
        handle: JobHandle,
        *,
        poll_interval: float = 10.0,
        link: str | None = None,
        emit: Emit | None = None,
        tail: LogTail | None = None,
        logger: Reporter = log,
    ) -> Ended:
        """Wait until the job is over; see :func:`.watch.watch`.

        :param tail: where the reading of the log begins.
        """
        waiting = Waiting(
            handle,
            poll_interval=poll_interval,
            quickest=QUICKEST_POLL,
            share=POLL_SHARE if emit is None else LISTENING_SHARE,
            link=link,
        )
        narrator = Narrator(logger)
        if emit is None:
            while waiting.ended is None:
                await asyncio.sleep(waiting.delay)
                await self._look(handle, waiting, narrator, None, None)
            return waiting.ended

        emit = never_raising(emit, logger)
        reader = _LogReader(self._channels, handle.job_id, emit, logger, tail or LogTail())
        task = asyncio.create_task(reader.run(), name=f"datasphere-log-{handle.job_id}")
        try:
            while waiting.ended is None:
                await _pause(waiting, reader)
                await self._look(handle, waiting, narrator, reader.tail, emit)
            await reader.drain(task, waiting.ended)
            return waiting.ended
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _look(
        self, handle: JobHandle, waiting: Waiting, narrator: Narrator, tail: LogTail | None, emit: Emit | None
    ) -> None:
        try:
            if waiting.look is Look.OPERATION:
                operation = await self._channels.unary(
                    "operations",
                    "Get",
                    operation_service_pb2.GetOperationRequest(operation_id=handle.operation_id or ""),
                    timeout=READ_DEADLINE,
                )
                narrator.operation(operation, tail, emit)
                waiting.saw_operation(operation)
            else:
                job = await self._channels.unary(
                    "jobs",
                    "Get",
                    project_job_service_pb2.GetProjectJobRequest(job_id=handle.job_id),
                    timeout=READ_DEADLINE,
                )
                narrator.status(job.status)
                waiting.saw_job(job)
        except grpc.RpcError as error:
            narrator.trouble(waiting.look, code_name(error), error.details())
            waiting.failed(code_name(error), error.details() or "")


async def _pause(waiting: Waiting, reader: _LogReader) -> None:
    """Sleep until the next look is due, or the end of the log stream hints that it is."""
    loop = asyncio.get_running_loop()
    due = loop.time() + waiting.delay
    while True:
        left = due - loop.time()
        if left <= 0 or not await _within(reader.hint.wait(), left):
            return
        reader.hint.clear()
        if waiting.hurry():
            return


async def _within(awaitable: Awaitable[object], seconds: float) -> bool:
    try:
        await asyncio.wait_for(awaitable, seconds)
    except asyncio.TimeoutError:
        return False
    return True


class _LogReader:
    """Reads a job's log in a task of its own; never lets an error out."""

    def __init__(self, channels: AsyncChannels, job_id: str, emit: Emit, logger: Reporter, tail: LogTail) -> None:
        self.tail = tail
        #: Set when a stream ended cleanly.
        self.hint = asyncio.Event()
        self._channels = channels
        self._job_id = job_id
        self._emit = emit
        self._logger = logger
        self._ended = asyncio.Event()

    async def drain(self, task: asyncio.Task[None], ended: Ended) -> None:
        """The job is over: read to the end of its log."""
        self.tail.job_ended(ended.logged_bytes)
        self._ended.set()
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            if self.tail.overdue:
                break
        if self.tail.trouble is not None or not task.done():
            self._logger.warning(INCOMPLETE, self.tail.trouble or "no answer")

    async def run(self) -> None:
        while True:
            code, details = await self._read_stream()
            delay = self.tail.closed(code, details)
            if code is None:
                self.hint.set()
            if delay is None:
                for line in self.tail.decoder.flush():
                    self._emit(line)
                return
            if self._ended.is_set():
                await asyncio.sleep(delay)
            else:
                await _within(self._ended.wait(), delay)

    async def _read_stream(self) -> tuple[str | None, str]:
        """One stream, to its end: its status code name, ``None`` for a clean end."""
        self.tail.opened()
        request = project_job_service_pb2.ReadProjectJobLogsRequest(job_id=self._job_id, offset=self.tail.offset)
        stream = self._channels.stream("jobs", "ReadLogs", request, timeout=STREAM_DEADLINE)
        try:
            async with aclosing(cast("AsyncGenerator[Any, None]", stream)) as responses:
                async for response in responses:
                    for count, line in enumerate(self.tail.received(response), start=1):
                        self._emit(line)
                        if count % LINES_PER_TURN == 0:
                            # A burst of one job must not keep the polls of the others waiting.
                            await asyncio.sleep(0)
        except grpc.RpcError as error:
            return code_name(error), error.details() or ""
        except Exception as error:  # whatever it is: nothing about logs may fail a job
            return "INTERNAL", f"{type(error).__name__}: {error}"
        return None, ""
