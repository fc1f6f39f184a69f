"""Triggers that wait as other providers do, for comparison, and one that does nothing: what Airflow itself costs."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from airflow.triggers.base import BaseTrigger, TriggerEvent
from triggerer_runner import LINES
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2, project_job_service_pb2_grpc
from yandex.cloud.operation import operation_service_pb2, operation_service_pb2_grpc

#: The connection's extra, as JSON: only our trigger reads an Airflow connection.
EXTRA = "TRIGGERER_BENCHMARK_EXTRA"
DEADLINE_SECONDS = 60.0

Get = Callable[[Any], Awaitable[Any]]

_channels: list[grpc.Channel] = []
_channels_aio: list[grpc.aio.Channel] = []


class _Trigger(BaseTrigger):
    def __init__(self, job_id: str, operation_id: str, poll_interval: float, stream_logs: bool = False) -> None:
        super().__init__()
        self.job_id, self.operation_id = job_id, operation_id
        self.poll_interval, self.stream_logs = poll_interval, stream_logs

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("job_id", "operation_id", "poll_interval", "stream_logs")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        await self.wait()
        yield TriggerEvent({"status": "ended", "job_id": self.job_id})

    async def wait(self) -> None:
        raise NotImplementedError

    async def poll(self, get: Get) -> None:
        """A poll, a pause, until the operation is done."""
        request = operation_service_pb2.GetOperationRequest(operation_id=self.operation_id)
        while not (await _patiently(get, request)).done:
            await asyncio.sleep(self.poll_interval)


class Nothing(_Trigger):
    """Waits for nothing."""

    async def wait(self) -> None:
        await asyncio.Event().wait()


#: What runs, by the newest list of the project, and when that was read.
_polls = asyncio.Semaphore(80)
_running: set[str] = set()
_listed_at = [0.0]
_lists: list[asyncio.Task[None]] = []


class ListPerProject(_Trigger):
    """One list of the project's running jobs for all waits. A job that isn't on it is polled, for its outcome."""

    async def wait(self) -> None:
        if not _lists:
            _channels_aio.append(_open_channel())
            _lists.append(asyncio.create_task(_list_running(_channels_aio[0], self.poll_interval)))

        async def get(request: Any) -> Any:
            return await stub.Get(request, metadata=_metadata(), timeout=DEADLINE_SECONDS)

        begun = 0.0
        stub = operation_service_pb2_grpc.OperationServiceStub(_channels_aio[0])
        request = operation_service_pb2.GetOperationRequest(operation_id=self.operation_id)
        while True:
            if begun == 0.0 or (_listed_at[0] > begun and self.job_id not in _running):
                begun = time.monotonic()
                async with _polls:
                    operation = await _patiently(get, request)
                if operation.done:
                    return
            await asyncio.sleep(self.poll_interval)


async def _list_running(channel: grpc.aio.Channel, interval: float) -> None:
    stub = project_job_service_pb2_grpc.ProjectJobServiceStub(channel)
    while True:
        begun, token, running = time.monotonic(), "", set()
        while token or not running:
            request = project_job_service_pb2.ListProjectJobRequest(
                project_id=_extra()["project_id"],
                page_size=1000,
                page_token=token,
                filter="status IN (CREATING, PREPARING, EXECUTING, UPLOADING_OUTPUT, CANCELLING)",
            )
            page = await stub.List(request, metadata=_metadata(), timeout=DEADLINE_SECONDS)
            running.update(job.id for job in page.jobs)
            token = page.next_page_token
            if not token:
                break
        _running.clear()
        _running.update(running)
        _listed_at[0] = begun
        await asyncio.sleep(interval)


class ChannelPerTrigger(_Trigger):
    """Opens a channel, polls and reads the log on it, and closes it at the end."""

    async def wait(self) -> None:
        async with _open_channel() as channel:
            stub = operation_service_pb2_grpc.OperationServiceStub(channel)
            reader = asyncio.create_task(self.read_log(channel)) if self.stream_logs else None
            await self.poll(lambda request: stub.Get(request, metadata=_metadata(), timeout=DEADLINE_SECONDS))
            if reader is not None:
                await reader

    async def read_log(self, channel: grpc.aio.Channel) -> None:
        request = project_job_service_pb2.ReadProjectJobLogsRequest(job_id=self.job_id)
        stub = project_job_service_pb2_grpc.ProjectJobServiceStub(channel)
        async for response in stub.ReadLogs(request, metadata=_metadata()):
            LINES[0] += sum(message.content.count(b"\n") for message in response.logs)


class ChannelPerPoll(_Trigger):
    """Each poll opens a channel and closes it."""

    async def wait(self) -> None:
        async def get(request: Any) -> Any:
            async with _open_channel() as channel:
                stub = operation_service_pb2_grpc.OperationServiceStub(channel)
                return await stub.Get(request, metadata=_metadata(), timeout=DEADLINE_SECONDS)

        await self.poll(get)


class ThreadPerCall(_Trigger):
    """Polls with the synchronous stub on one channel, in the event loop's thread pool."""

    async def wait(self) -> None:
        if not _channels:
            _channels.append(grpc.secure_channel(_extra()["endpoint"], _credentials()))
        stub = operation_service_pb2_grpc.OperationServiceStub(_channels[0])

        async def get(request: Any) -> Any:
            return await asyncio.to_thread(stub.Get, request, metadata=_metadata(), timeout=DEADLINE_SECONDS)

        await self.poll(get)


async def _patiently(get: Get, request: Any) -> Any:
    while True:
        try:
            return await get(request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
        await asyncio.sleep(1)


def _extra() -> dict[str, Any]:
    extra: dict[str, Any] = json.loads(os.environ[EXTRA])
    return extra


def _metadata() -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {_extra()['iam_token']}"),)


def _credentials() -> grpc.ChannelCredentials:
    with open(_extra()["root_certificates"], "rb") as file:
        return grpc.ssl_channel_credentials(file.read())


def _open_channel() -> grpc.aio.Channel:
    # Without it gRPC would quietly share one connection between all channels that look alike.
    options = (("grpc.use_local_subchannel_pool", 1),)
    return grpc.aio.secure_channel(_extra()["endpoint"], _credentials(), options=options)
