"""Calls over real sockets: what each carries, how many connections there are, TLS, proxies, forks, loops."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from yandex.cloud.datasphere.v2.jobs.project_job_service_pb2 import ListProjectJobRequest, ReadProjectJobLogsRequest
from yandex.cloud.datasphere.v2.project_service_pb2 import GetProjectRequest
from yandex.cloud.operation.operation_service_pb2 import GetOperationRequest

from airflow_provider_datasphere import __version__
from airflow_provider_datasphere.client.connection import channels as channels_module
from airflow_provider_datasphere.client.connection.channels import AsyncChannels, Channels
from airflow_provider_datasphere.client.connection.errors import CredentialRefusedError, CredentialUnavailableError
from datasphere_emulator import Emulator, LogLine, Script
from datasphere_emulator import Settings as EmulatorSettings
from emulated import get_project, settings_of, with_key


@pytest.fixture
def channels(datasphere_emulator: Emulator) -> Iterator[Channels]:
    channels = Channels(with_key(datasphere_emulator))
    yield channels
    channels.close()


# What a call carries -----------------------------------------------------------------------------------------------


def test_each_call_has_token_version_deadline_and_key(datasphere_emulator: Emulator, channels: Channels) -> None:
    assert get_project(datasphere_emulator, channels, idempotency_key="key-1").id == datasphere_emulator.project_id
    (call,) = datasphere_emulator.journal.calls("Project.Get")
    assert call.subject == datasphere_emulator.service_account_id
    assert call.metadata["x-client-version"] == f"airflow-provider-datasphere={__version__}"
    assert call.metadata["user-agent"].startswith(f"airflow-provider-datasphere/{__version__} ")
    assert call.metadata["idempotency-key"] == "key-1"
    assert call.deadline == pytest.approx(10, abs=1)


async def test_coroutines_carry_the_same(datasphere_emulator: Emulator) -> None:
    channels = AsyncChannels.shared(with_key(datasphere_emulator))
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    await channels.unary("projects", "Get", request, timeout=10, idempotency_key="key-1")
    (call,) = datasphere_emulator.journal.calls("Project.Get")
    assert call.subject == datasphere_emulator.service_account_id
    assert call.metadata["x-client-version"] == f"airflow-provider-datasphere={__version__}"
    assert call.metadata["idempotency-key"] == "key-1"
    assert call.deadline == pytest.approx(10, abs=1)
    await channels.close()


def test_an_answer_that_never_comes_ends_at_the_deadline(datasphere_emulator: Emulator, channels: Channels) -> None:
    datasphere_emulator.faults.inject("Project.Get", hang=True)
    with pytest.raises(grpc.RpcError) as raised:
        get_project(datasphere_emulator, channels, timeout=0.3)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_nothing_is_repeated_behind_the_callers_back(datasphere_emulator: Emulator, channels: Channels) -> None:
    datasphere_emulator.faults.inject("Project.Get", code="UNAVAILABLE", message="no")
    with pytest.raises(grpc.RpcError) as raised:
        get_project(datasphere_emulator, channels)
    assert raised.value.details() == "no"
    assert len(datasphere_emulator.journal.calls("Project.Get")) == 1


async def test_a_refused_token_is_replaced_once(datasphere_emulator: Emulator, channels: Channels) -> None:
    datasphere_emulator.faults.inject("Project.Get", code="UNAUTHENTICATED")
    with pytest.raises(grpc.RpcError) as raised:
        get_project(datasphere_emulator, channels)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    first, second = datasphere_emulator.journal.calls("Project.Get")
    assert first.token != second.token
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    with pytest.raises(grpc.RpcError) as raised:
        await AsyncChannels.shared(channels.settings).unary("projects", "Get", request, timeout=10)
    third, fourth = datasphere_emulator.journal.calls("Project.Get")[2:]
    assert third.token != fourth.token


async def test_a_static_token_that_is_refused(datasphere_emulator: Emulator) -> None:
    settings = settings_of(datasphere_emulator)
    datasphere_emulator.iam.revoke()
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    with pytest.raises(CredentialRefusedError, match=r"expired .* revoked"):
        Channels(settings).unary("projects", "Get", request, timeout=10)
    with pytest.raises(CredentialRefusedError, match=r"expired .* revoked"):
        await AsyncChannels.shared(settings).unary("projects", "Get", request, timeout=10)


# Connections -------------------------------------------------------------------------------------------------------


def peers(emulator: Emulator, *methods: str) -> set[str]:
    return {call.peer for method in methods for call in emulator.journal.calls(method)}


def scripted(emulator: Emulator) -> str:
    script = Script(never_ends=True, log=[LogLine(0.0, "first\n")])
    return emulator.create_scripted_job(script, execute=True)


def test_one_connection_serves_all_unary_calls(datasphere_emulator: Emulator, channels: Channels) -> None:
    project_id = datasphere_emulator.project_id
    operation_id = datasphere_emulator.operation_of(scripted(datasphere_emulator))
    for _ in range(3):
        get_project(datasphere_emulator, channels)
        channels.unary("jobs", "List", ListProjectJobRequest(project_id=project_id), timeout=10)
        channels.unary("operations", "Get", GetOperationRequest(operation_id=operation_id), timeout=10)
    assert len(peers(datasphere_emulator, "Project.Get", "List", "Operation.Get")) == 1


def test_streams_have_their_own_connections(
    datasphere_emulator: Emulator, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels_module, "STREAMS_PER_CONNECTION", 3)
    request = ReadProjectJobLogsRequest(job_id=scripted(datasphere_emulator))
    streams = [channels.stream("jobs", "ReadLogs", request) for _ in range(7)]
    assert [next(stream).logs[0].content for stream in streams] == [b"first\n"] * 7
    get_project(datasphere_emulator, channels)
    lines = [call.peer for call in datasphere_emulator.journal.calls("ReadLogs")]
    assert sorted(lines.count(peer) for peer in set(lines)) == [1, 3, 3]
    assert not peers(datasphere_emulator, "Project.Get") & set(lines)
    for stream in streams:
        stream.cancel()
        with pytest.raises(grpc.RpcError):
            next(stream)
    # Ended streams make room: no further connection.
    again = channels.stream("jobs", "ReadLogs", request)
    next(again)
    assert datasphere_emulator.journal.calls("ReadLogs")[-1].peer in lines
    again.cancel()


async def test_streams_of_coroutines(datasphere_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_module, "STREAMS_PER_CONNECTION", 3)
    channels = AsyncChannels.shared(with_key(datasphere_emulator))
    request = ReadProjectJobLogsRequest(job_id=scripted(datasphere_emulator))
    streams = [channels.stream("jobs", "ReadLogs", request) for _ in range(7)]
    answers = await asyncio.gather(*(anext(stream) for stream in streams))
    assert [answer.logs[0].content for answer in answers] == [b"first\n"] * 7
    await channels.unary("projects", "Get", GetProjectRequest(project_id=datasphere_emulator.project_id), timeout=10)
    lines = [call.peer for call in datasphere_emulator.journal.calls("ReadLogs")]
    assert sorted(lines.count(peer) for peer in set(lines)) == [1, 3, 3]
    assert not peers(datasphere_emulator, "Project.Get") & set(lines)
    for stream in streams:
        await stream.aclose()
    deadline = time.monotonic() + 10
    while any(not call.code for call in datasphere_emulator.journal.calls("ReadLogs")):
        assert time.monotonic() < deadline, "closing the iterator must cancel the call"
        await asyncio.sleep(0.01)
    again = channels.stream("jobs", "ReadLogs", request)
    await anext(again)
    assert datasphere_emulator.journal.calls("ReadLogs")[-1].peer in lines
    await again.aclose()
    await channels.close()


@pytest.mark.parametrize("cap", [4])
def test_a_gateway_with_few_streams_starves_no_poll(
    datasphere_emulator_factory: Callable[..., Emulator], cap: int
) -> None:
    emulator = datasphere_emulator_factory(EmulatorSettings(max_concurrent_streams=cap))
    channels = Channels(with_key(emulator))
    request = ReadProjectJobLogsRequest(job_id=scripted(emulator))
    streams = [channels.stream("jobs", "ReadLogs", request) for _ in range(3 * cap)]
    for _ in range(5):
        get_project(emulator, channels, timeout=5)
    for stream in streams:
        stream.cancel()
    channels.close()


async def test_a_stream_that_is_refused_drops_its_token(datasphere_emulator: Emulator, channels: Channels) -> None:
    request = ReadProjectJobLogsRequest(job_id=scripted(datasphere_emulator))
    aio = AsyncChannels.shared(channels.settings)
    datasphere_emulator.faults.inject("ReadLogs", code="UNAUTHENTICATED", times=2)
    with pytest.raises(grpc.RpcError):
        await asyncio.to_thread(next, channels.stream("jobs", "ReadLogs", request))
    with pytest.raises(grpc.RpcError):
        await anext(aio.stream("jobs", "ReadLogs", request))
    third = aio.stream("jobs", "ReadLogs", request)
    await anext(third)
    assert len({call.token for call in datasphere_emulator.journal.calls("ReadLogs")}) == 3
    await third.aclose()
    await aio.close()


def test_closed_channels_open_again(datasphere_emulator: Emulator, channels: Channels) -> None:
    get_project(datasphere_emulator, channels)
    channels.close()
    get_project(datasphere_emulator, channels)
    assert len(peers(datasphere_emulator, "Project.Get")) == 2


async def test_coroutines_of_a_loop_share_one_connection(datasphere_emulator: Emulator) -> None:
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)

    async def poll() -> None:
        channels = AsyncChannels.shared(with_key(datasphere_emulator))
        for _ in range(3):
            await channels.unary("projects", "Get", request, timeout=30)

    await asyncio.gather(*(poll() for _ in range(50)))
    assert len(peers(datasphere_emulator, "Project.Get")) == 1
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) == 1
    await AsyncChannels.shared(with_key(datasphere_emulator)).close()


def test_each_loop_has_its_own_and_they_die_with_it(datasphere_emulator: Emulator) -> None:
    settings = with_key(datasphere_emulator)
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)

    async def once() -> int:
        channels = AsyncChannels.shared(settings)
        assert channels is AsyncChannels.shared(with_key(datasphere_emulator))
        await channels.unary("projects", "Get", request, timeout=10)
        return id(channels)

    for _ in range(3):
        asyncio.run(once())
    gc.collect()
    assert sum(not loop.is_closed() for loop, _ in channels_module._loops.values()) == 0
    asyncio.run(once())
    assert len(channels_module._loops) == 1
    assert len(datasphere_emulator.journal.calls("IamToken.Create")) == 1


async def test_unused_connections_do_not_pile_up(datasphere_emulator: Emulator) -> None:
    # As with an IAM token in the connection that somebody renews every hour.
    held = AsyncChannels.shared(settings_of(datasphere_emulator))
    for number in range(40):
        AsyncChannels.shared(settings_of(datasphere_emulator, iam_token=f"t1.{number}"))
    _, kept = channels_module._loops[os.getpid(), id(asyncio.get_running_loop())]
    assert len(kept) <= 16
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    await held.unary("projects", "Get", request, timeout=10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_connects_anew(datasphere_emulator: Emulator, channels: Channels) -> None:
    request = ReadProjectJobLogsRequest(job_id=scripted(datasphere_emulator))
    parents = channels._pool
    child = os.fork()
    if child == 0:
        # gRPC itself can't be used here once the parent has used it; that its channels are left alone can be seen.
        channels._check_process()
        os._exit(0 if channels._pool is not parents and not channels._pool._unary else 1)
    assert os.waitpid(child, 0)[1] == 0
    stream = channels.stream("jobs", "ReadLogs", request)
    next(stream)
    stream.cancel()


def test_credential_errors_are_failed_calls(datasphere_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_datasphere.client.connection.iam.FETCH_RETRY_SECONDS", 0.2)
    monkeypatch.setenv("YC_METADATA_ADDR", datasphere_emulator.metadata_address)
    datasphere_emulator.faults.inject("metadata.token", status=503)
    with pytest.raises(grpc.RpcError) as raised:
        get_project(datasphere_emulator, Channels(settings_of(datasphere_emulator, iam_token=None)))
    assert isinstance(raised.value, CredentialUnavailableError)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
