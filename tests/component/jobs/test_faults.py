"""Waits that outlive what passes, and end, with words, where there is nothing left to wait for."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import DataSphereError, JobLostError
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.monitoring import logs as logs_module
from airflow_provider_datasphere.client.monitoring import polling as polling_module
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator, Script
from waits import wait_until
from watching import Watcher

#: DENIED_GRACE_SECONDS and NOT_FOUND_GRACE_SECONDS in these tests, seconds.
WINDOW = 1.5


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DENIED_GRACE_SECONDS", "NOT_FOUND_GRACE_SECONDS"):
        monkeypatch.setattr(polling_module, name, WINDOW)
    monkeypatch.setattr(logs_module, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(polling_module, "READ_DEADLINE_SECONDS", 1.0)


@pytest.fixture(params=[True, False], ids=["with log", "without log"])
def logs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def running(emulator: Emulator, **script: Any) -> JobHandle:
    job_id = emulator.create_scripted_job(Script(**{"log": ["hello"], **script}), execute=True)
    return JobHandle(job_id, emulator.operation_of(job_id))


def later(seconds: float, function: Any, *arguments: Any, **options: Any) -> None:
    threading.Timer(seconds, function, arguments, options).start()


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED"])
@pytest.mark.parametrize("look", ["operation", "job alone"])
def test_a_job_that_is_refused_for_ever_is_lost(
    emulator: Emulator, watcher: Watcher, logs: bool, code: str, look: str
) -> None:
    handle = running(emulator, never_ends=True)
    if look == "job alone":
        handle = JobHandle(handle.job_id)
    for method in ("Operation.Get", "Get"):
        emulator.faults.inject(method, code=code, message="not any more")
    with pytest.raises(JobLostError) as lost:
        watcher.wait(handle, logs=logs)
    assert WINDOW <= watcher.seconds < WINDOW + 8.0
    reason = "not any more" if code == "PERMISSION_DENIED" else "IAM token"
    for part in (handle.job_id, code, reason, "costing money", "cancel"):
        assert part in str(lost.value)
    assert emulator.job(handle.job_id).status == 2, "the job goes on"
    assert emulator.journal.count("Cancel") == 0


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "INTERNAL", "NOT_FOUND"])
def test_a_passing_trouble_is_outlived(emulator: Emulator, watcher: Watcher, code: str) -> None:
    handle = running(emulator, executing_seconds=0.8)
    fault = emulator.faults.inject("*Get", code=code)
    later(0.6, emulator.faults.remove, fault)
    assert watcher.wait(handle).status == "SUCCESS"


def test_an_outage_longer_than_any_window_is_outlived(emulator: Emulator, watcher: Watcher, logs: bool) -> None:
    handle = running(emulator, executing_seconds=0.5)
    fault = emulator.faults.inject("*", code="UNAVAILABLE")
    later(2 * WINDOW, emulator.faults.remove, fault)
    assert watcher.wait(handle, logs=logs).status == "SUCCESS"
    assert watcher.seconds > 2 * WINDOW
    assert watcher.texts == (["hello"] if logs else [])


def test_a_restart_of_the_service_is_outlived(emulator: Emulator, watcher: Watcher, logs: bool) -> None:
    handle = running(emulator, executing_seconds=2.0)

    def restart() -> None:
        emulator.kill()
        emulator.start()

    later(0.5, restart)
    assert watcher.wait(handle, logs=logs).status == "SUCCESS"
    assert watcher.texts == (["hello"] if logs else [])


def test_an_answer_that_never_comes_is_asked_for_again(emulator: Emulator, watcher: Watcher) -> None:
    handle = running(emulator, executing_seconds=0.5)
    emulator.faults.inject("Operation.Get", hang=True, times=2)
    emulator.faults.inject("Get", hang=True, times=1)
    assert watcher.wait(handle).status == "SUCCESS"
    assert emulator.journal.count("Operation.Get", code="DEADLINE_EXCEEDED") == 2


def test_a_forgotten_operation_is_not_a_lost_job(emulator: Emulator, watcher: Watcher) -> None:
    handle = running(emulator, executing_seconds=0.8)
    later(0.3, emulator.forget_operation, handle.operation_id)
    result = watcher.wait(handle)
    assert (result.status, result.return_code) == ("SUCCESS", 0)


def test_a_deleted_job_whose_operation_is_gone_is_lost(emulator: Emulator, watcher: Watcher) -> None:
    handle = running(emulator)
    emulator.wait_job(handle.job_id)
    emulator.delete_job(handle.job_id)
    emulator.forget_operation(handle.operation_id or "")
    with pytest.raises(JobLostError, match=handle.job_id):
        watcher.wait(handle)
    assert emulator.journal.count("Get", code="NOT_FOUND") > 1, "the first answer that doesn't know it isn't believed"


def test_a_job_that_is_not_known_just_after_execute_is_waited_for(emulator: Emulator, watcher: Watcher) -> None:
    handle = running(emulator)
    emulator.faults.inject("Operation.Get", code="NOT_FOUND", times=1)
    emulator.faults.inject("Get", code="NOT_FOUND", times=1)
    assert watcher.wait(handle).status == "SUCCESS"


def test_a_job_deleted_after_its_end_is_told_by_its_operation(emulator: Emulator, watcher: Watcher) -> None:
    handle = running(emulator, return_code=4)
    emulator.wait_job(handle.job_id, None)
    emulator.delete_job(handle.job_id)
    result = watcher.wait(handle)
    assert (result.status, result.return_code) == ("ERROR", 4)


@pytest.mark.parametrize("code", ["CANCELLED", "ABORTED", "INTERNAL"])
def test_a_cancelled_job_is_told_whatever_its_operation_says(emulator: Emulator, watcher: Watcher, code: str) -> None:
    emulator.settings.cancelled_operation_code = code
    emulator.settings.cancelling_seconds = 0.3
    handle = running(emulator, never_ends=True)
    later(0.3, emulator.cancel_job, handle.job_id)
    assert watcher.wait(handle).status == "CANCELLED"


def test_a_revoked_token_is_replaced(emulator: Emulator, watcher: Watcher) -> None:
    key = emulator.service_account_key()
    settings = Settings.from_extra(emulator.connection_extra(iam_token=None, service_account_json=key))
    handle = running(emulator, executing_seconds=3.0)

    def revoke() -> None:
        wait_until(lambda: emulator.journal.count("Operation.Get", code="OK"))
        emulator.iam.revoke()

    later(0.0, revoke)
    assert watcher.wait(handle, settings=settings).status == "SUCCESS"
    assert len({call.token for call in emulator.journal.calls("Operation.Get", code="OK")}) == 2


def test_a_revoked_token_that_nothing_replaces_ends_the_wait(emulator: Emulator, watcher: Watcher) -> None:
    handle = running(emulator, never_ends=True)
    settings = watcher.settings
    later(0.3, emulator.iam.revoke)
    with pytest.raises(JobLostError, match="UNAUTHENTICATED"):
        watcher.wait(handle, settings=settings)
    assert watcher.seconds < WINDOW + 8.0


def test_a_role_taken_away_ends_the_wait_and_the_log(emulator: Emulator, watcher: Watcher) -> None:
    handle = running(emulator, never_ends=True)
    account = emulator.service_account_id
    later(0.3, emulator.iam.set_role, account, emulator.project_id, None)
    with pytest.raises(JobLostError, match="PERMISSION_DENIED"):
        watcher.wait(handle)


def test_an_error_of_the_clients_own_calls_is_plain(emulator: Emulator, client: DataSphereClient) -> None:
    with pytest.raises(DataSphereError, match="bt1nowhere"):
        client.get_job("bt1nowhere")
    emulator.iam.revoke()
    with pytest.raises(DataSphereError, match="refuses the IAM token"):
        client.get_job("bt1nowhere")
