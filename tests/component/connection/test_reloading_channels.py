"""A connection that somebody changes while a wait uses it: token, account, and what can't be read again."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from yandex.cloud.datasphere.v2.project_service_pb2 import GetProjectRequest

from airflow_provider_datasphere.client.connection.reloading_channels import ReloadingChannels
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.monitoring import polling as polling_module
from airflow_provider_datasphere.client.monitoring.logs import LogLine
from airflow_provider_datasphere.client.monitoring.polling import TerminalState
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.exceptions import errors
from airflow_provider_datasphere.hooks import datasphere as hook_module
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from datasphere_emulator import Emulator, Script
from datasphere_emulator.script import LogLine as Printed

Change = Callable[[], None]
SCRIPT = Script(log=[Printed(0.2, "first\n"), Printed(5.5, "last\n")], executing_seconds=6.0)


@pytest.fixture
def emulator(datasphere_emulator_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    monkeypatch.setattr(hook_module, "REREAD_SECONDS", 0.2)
    emulator: Emulator = datasphere_emulator_factory(tls=False)
    return emulator


@pytest.fixture
def connect(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write the connection; keywords change the extra."""

    def connect(**extra: Any) -> None:
        value = {"conn_type": "datasphere", "extra": emulator.connection_extra(**extra)}
        monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", json.dumps(value))

    return connect


@pytest.fixture(params=["token", "account"])
def change(request: pytest.FixtureRequest, emulator: Emulator, connect: Callable[..., None]) -> Change:
    """What the connection says is of no use any more (UNAUTHENTICATED, PERMISSION_DENIED), and somebody mends it."""
    first = emulator.iam.add_service_account("first")
    emulator.iam.set_role(first, emulator.project_id, "developer")
    connect(iam_token=emulator.iam.issue_token(first))

    def change() -> None:
        if request.param == "token":
            emulator.iam.revoke(subject=first)
            connect(iam_token=emulator.iam.issue_token(first))
        else:
            emulator.iam.set_role(first, emulator.project_id, None)
            connect()

    return change


def run(emulator: Emulator, way: str, change: Change) -> tuple[TerminalState, list[str]]:
    """Wait for a job, with a change in the middle; returns its end and its log."""
    job_id = emulator.create_scripted_job(SCRIPT, execute=True)
    handle = JobHandle(job_id, emulator.operation_of(job_id))
    lines: list[str] = []

    def emit(line: LogLine) -> None:
        lines.append(line.text)
        if line.text == "first":
            change()

    if way == "threads":
        client = DataSphereHook().get_conn()
        ended = watch(client, handle, poll_interval=0.2, emit=emit)
        client.close()
        return ended, lines

    async def wait() -> TerminalState:
        client = await DataSphereHook().aget_client()
        return await client.watch(handle, poll_interval=0.2, emit=emit)

    return asyncio.run(wait()), lines


@pytest.mark.parametrize("way", ["threads", "asyncio"])
def test_a_running_wait_goes_on_with_the_changed_connection(
    emulator: Emulator, change: Change, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        ended, lines = run(emulator, way, change)
    assert ended.job is not None
    assert lines == ["first", "last"]
    reads = [call for call in emulator.journal.calls() if call.method in ("Operation.Get", "Get")]
    refused = [call for call in reads if call.code in ("UNAUTHENTICATED", "PERMISSION_DENIED")]
    # The refused call itself is repeated: not one poll is lost.
    assert 1 <= len(refused) <= 2
    assert reads[-1].code == "OK"
    assert len({call.token for call in reads}) == 2
    assert "The connection has changed; continuing as the account of the connection's IAM token." in caplog.text


@pytest.mark.parametrize("way", ["threads", "asyncio"])
def test_what_is_not_mended_in_time_is_lost_as_before(
    emulator: Emulator, connect: Callable[..., None], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(polling_module, "DENIED_GRACE_SECONDS", 1.0)
    connect()
    with pytest.raises(errors.JobLostError, match="access denied for"):
        run(emulator, way, lambda: emulator.iam.revoke() and None)


@pytest.mark.parametrize("way", ["threads", "asyncio"])
def test_a_connection_that_can_not_be_read_again_is_said_and_tried_again(
    emulator: Emulator,
    connect: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    connect()
    token = emulator.iam.issue_token(emulator.service_account_id)
    read = DataSphereHook.get_connection
    failures = iter([RuntimeError("t1.canary"), None])

    def fail_once(conn_id: str) -> Any:
        if (error := next(failures, None)) is not None:
            raise error
        return read(conn_id)

    def change() -> None:
        monkeypatch.setattr(DataSphereHook, "get_connection", staticmethod(fail_once))
        monkeypatch.setattr(DataSphereHook, "aget_connection", staticmethod(afail_once), raising=False)
        emulator.iam.revoke(token=emulator.iam_token)
        connect(iam_token=token)

    async def afail_once(conn_id: str) -> Any:
        return fail_once(conn_id)

    ended, lines = run(emulator, way, change)
    assert ended.job is not None
    assert lines == ["first", "last"]
    said = caplog.text + "".join(capsys.readouterr())
    assert "reloading connection datasphere_default failed: RuntimeError" in said
    assert "canary" not in said


async def test_many_waits_share_one_reading(
    emulator: Emulator, connect: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook_module, "REREAD_SECONDS", 60.0)
    connect()
    clients = [await DataSphereHook().aget_client() for _ in range(40)]
    job_id = emulator.create_scripted_job(SCRIPT)
    emulator.iam.revoke()
    connect(iam_token=emulator.iam.issue_token(emulator.service_account_id))
    late = await DataSphereHook().aget_client()  # knows the new token from the start
    readings = 0
    read = DataSphereHook._aget_connection

    async def counting(hook: DataSphereHook) -> Any:
        nonlocal readings
        readings += 1
        return await read(hook)

    monkeypatch.setattr(DataSphereHook, "_aget_connection", counting)
    jobs = await asyncio.gather(*(client.get(job_id) for client in [late, *clients]))
    assert {job.id for job in jobs} == {job_id}
    assert readings == 1
    assert len({call.peer for call in emulator.journal.calls("Get")}) <= 2


def test_a_call_that_starts_something_is_repeated_with_its_key(emulator: Emulator) -> None:
    changed = Settings.from_extra(emulator.connection_extra())
    channels = ReloadingChannels(Settings.from_extra(emulator.connection_extra(iam_token="t1.wrong")), lambda: changed)
    request = GetProjectRequest(project_id=emulator.project_id)
    assert channels.unary("projects", "Get", request, timeout=5, idempotency_key="k").id == emulator.project_id
    calls = emulator.journal.calls("Project.Get")
    assert [call.code for call in calls] == ["UNAUTHENTICATED", "OK"]
    assert {call.metadata["idempotency-key"] for call in calls} == {"k"}
    channels.close()


def test_any_other_error_reads_nothing_again(emulator: Emulator) -> None:
    def refresh() -> Settings | None:
        raise AssertionError("read")

    channels = ReloadingChannels(Settings.from_extra(emulator.connection_extra()), refresh)
    for code in ("UNAVAILABLE", "NOT_FOUND", "INVALID_ARGUMENT"):
        emulator.faults.inject("Project.Get", code=code, times=1)
        with pytest.raises(grpc.RpcError) as raised:
            channels.unary("projects", "Get", GetProjectRequest(project_id=emulator.project_id), timeout=5)
        assert raised.value.code().name == code
    channels.close()
