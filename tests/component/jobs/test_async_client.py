"""Waiting on an event loop: many jobs, few connections, no threads, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
from airflow_provider_datasphere.client.connection.channels import AsyncChannels
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.monitoring import watch_async as watch_async_module
from airflow_provider_datasphere.client.monitoring.logs import LogTail
from datasphere_emulator import Emulator, Script
from datasphere_emulator.script import LogLine as Printed
from waits import until


@pytest.fixture
async def waiter(emulator: Emulator) -> AsyncIterator[AsyncDataSphereClient]:
    settings = Settings.from_extra(emulator.connection_extra())
    channels = AsyncChannels.shared(settings)
    yield AsyncDataSphereClient(channels, settings)
    await channels.close()


def running(emulator: Emulator, count: int, script: Script) -> list[JobHandle]:
    job_ids = [emulator.create_scripted_job(script, execute=True) for _ in range(count)]
    return [JobHandle(job_id, emulator.operation_of(job_id)) for job_id in job_ids]


async def test_a_hundred_waits_share_few_connections_and_no_thread(
    emulator: Emulator, waiter: AsyncDataSphereClient
) -> None:
    handles = running(emulator, 100, Script(executing_seconds=2.0, log=[Printed(1.0, "hello\n")]))
    lines: list[str] = []
    threads = threading.active_count()
    connections = {connection.raddr for connection in established(emulator)}
    waits = asyncio.gather(*(waiter.watch(handle, emit=lambda line: lines.append(line.text)) for handle in handles))
    await until(lambda: emulator.journal.count("ReadLogs") >= len(handles))
    assert threading.active_count() <= threads + 2  # gRPC's own, for the whole process
    assert len({connection.raddr for connection in established(emulator)} - connections) <= 1 + 3
    ended = await waits
    assert [end.job.id for end in ended if end.job] == [handle.job_id for handle in handles]
    assert lines == ["hello"] * 100


def established(emulator: Emulator) -> list[psutil._common.pconn]:
    """The emulator's ends of its gRPC connections: client and emulator are in one process."""
    port = int(emulator.endpoint.rpartition(":")[2])
    connections = psutil.Process().net_connections("tcp")
    return [c for c in connections if c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED]


@pytest.mark.parametrize("logs", [True, False])
async def test_a_cancelled_wait_ends_at_once_and_frees_its_stream(
    emulator: Emulator, waiter: AsyncDataSphereClient, logs: bool
) -> None:
    (handle,) = running(emulator, 1, Script(never_ends=True, log=["hello"]))
    task = asyncio.create_task(waiter.watch(handle, emit=(lambda line: None) if logs else None))
    await until(lambda: emulator.journal.count("Operation.Get") and emulator.journal.count("ReadLogs") == int(logs))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2.0)
    await until(lambda: all(call.finished for call in emulator.journal.calls("ReadLogs")))
    assert [call.code for call in emulator.journal.calls("ReadLogs")] == (["CANCELLED"] if logs else [])
    assert [t for t in asyncio.all_tasks() if t.get_name().startswith("datasphere-log")] == []


async def test_a_wait_with_a_deadline_of_its_own_can_be_cut(emulator: Emulator, waiter: AsyncDataSphereClient) -> None:
    (handle,) = running(emulator, 1, Script(never_ends=True))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(waiter.watch(handle, emit=lambda line: None), 0.5)


async def test_a_wait_continues_the_log_of_an_earlier_one(emulator: Emulator, waiter: AsyncDataSphereClient) -> None:
    (handle,) = running(emulator, 1, Script(log=["one", Printed(3.0, "two\n")]))
    tail, texts = LogTail(handle.job_id), []
    first = asyncio.create_task(waiter.watch(handle, emit=lambda line: texts.append(line.text), tail=tail))
    await until(lambda: texts)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await waiter.watch(handle, emit=lambda line: texts.append(line.text), tail=tail)
    assert texts == ["one", "two"]


async def test_a_burst_of_one_job_does_not_hold_the_others(
    emulator: Emulator, waiter: AsyncDataSphereClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_async_module, "MIN_POLL_INTERVAL", 0.05)
    (burst,) = running(emulator, 1, Script(burst_bytes=5_000_000))
    waiting = asyncio.create_task(waiter.watch(burst, emit=lambda line: None))
    loop, late = asyncio.get_running_loop(), [0.0]
    while not waiting.done():
        due = loop.time() + 0.01
        await asyncio.sleep(0.01)
        late.append(loop.time() - due)
    await waiting
    assert max(late) < 0.5


async def test_polls_of_one_job_are_a_second_apart(emulator: Emulator, waiter: AsyncDataSphereClient) -> None:
    (handle,) = running(emulator, 1, Script(executing_seconds=2.0))
    await waiter.watch(handle)
    assert emulator.journal.count("Operation.Get") <= 5


async def test_a_job_can_be_cancelled(emulator: Emulator, waiter: AsyncDataSphereClient) -> None:
    (handle,) = running(emulator, 1, Script(never_ends=True))
    await waiter.cancel(handle.job_id, reason="because")
    assert emulator.wait_job(handle.job_id, "CANCELLED")
    (call,) = emulator.journal.calls("Cancel")
    assert call.request == {"job_id": handle.job_id, "reason": "because"}
    with pytest.raises(JobRequestError):
        await waiter.cancel("bt1nowhere")


async def test_no_token_is_an_error_of_the_connection(emulator: Emulator, tmp_path: Path) -> None:
    settings = Settings.from_extra(emulator.connection_extra(iam_token="t1.wrong"))
    channels = AsyncChannels(settings)
    with pytest.raises(DataSphereError, match="IAM token"):
        await AsyncDataSphereClient(channels, settings).cancel("bt1nowhere")
    await channels.close()
