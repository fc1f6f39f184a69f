"""Who is ending a task, and how its job is ended: the decisions, and the calls over a real socket."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere import killing
from airflow_provider_datasphere.client.aio import AsyncDataSphereClient
from airflow_provider_datasphere.client.channels import AsyncChannels
from airflow_provider_datasphere.client.settings import Settings
from datasphere_emulator import Emulator, Script

LOG = logging.getLogger("test_killing")

FOR_EVER = Script(never_ends=True)


def settings_of(emulator: Emulator, **extra: Any) -> Settings:
    return Settings.from_extra(emulator.connection_extra(**extra))


def ending(job_id: str, action: killing.OnKillAction = "cancel", **fields: Any) -> killing.Ending:
    return killing.Ending(job_id, action, "a test", LOG, **fields)


def running_job(emulator: Emulator, script: Script = FOR_EVER, **fields: Any) -> str:
    job_id = emulator.create_scripted_job(script, execute=True, **fields)
    emulator.wait_job(job_id, "EXECUTING")
    return job_id


def made(emulator: Emulator) -> list[tuple[str, str]]:
    """The calls that reached the service, in their order, once they are over."""
    while not all(call.finished for call in emulator.journal.calls()):
        time.sleep(0.01)
    return [(call.method, call.code) for call in emulator.journal.calls()]


# Whose kill is it? -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "up_for_retry", "deferred", "scheduled", "queued"])
def test_a_task_that_airflow_counts_on_leaves_its_job_to_the_next_try(state: str) -> None:
    assert killing.goes_on(True, state, picked_up=True)
    assert not killing.goes_on(True, state, picked_up=False)


@pytest.mark.parametrize("state", ["failed", "success", "skipped", "removed", "restarting", None])
def test_a_person_ends_the_job_too(state: str | None) -> None:
    assert not killing.goes_on(True, state, picked_up=True)


def test_no_answer_counts_as_a_person() -> None:
    assert not killing.goes_on(False, None, picked_up=True)


def test_airflow_that_does_not_answer_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killing, "ASK_SECONDS", 0.1)
    never = threading.Event()
    assert killing.ask_state(lambda: str(never.wait(60)), LOG) == (False, None)
    never.set()


def test_an_error_is_no_answer() -> None:
    def ask() -> str:
        raise RuntimeError("the supervisor is gone")

    assert killing.ask_state(ask, LOG) == (False, None)


def test_no_state_is_an_answer() -> None:
    assert killing.ask_state(lambda: None, LOG) == (True, None)


# The calls ---------------------------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled_by_one_call(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    assert killing.cancel_job(settings_of(datasphere_emulator), ending(job_id))
    datasphere_emulator.wait_job(job_id, "CANCELLED")
    assert made(datasphere_emulator) == [("Cancel", "OK")]


async def test_a_trigger_cancels_on_its_own_channels(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    settings = settings_of(datasphere_emulator)
    client = AsyncDataSphereClient(AsyncChannels.shared(settings), settings)
    assert await killing.acancel_job(client, ending(job_id))
    assert made(datasphere_emulator) == [("Cancel", "OK")]


def test_keep_makes_no_call(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    assert not killing.cancel_job(settings_of(datasphere_emulator), ending(job_id, "keep"))
    assert made(datasphere_emulator) == []


@pytest.mark.parametrize(("shutdown", "graceful"), [(("SIGTERM", 30), True), (("SIGTERM", None), False), (None, False)])
def test_grace_only_for_a_job_that_the_service_then_ends(
    datasphere_emulator: Emulator, shutdown: Any, graceful: bool
) -> None:
    job_id = running_job(datasphere_emulator, graceful_shutdown=shutdown)
    assert killing.cancel_job(settings_of(datasphere_emulator), ending(job_id, "graceful"))
    (call,) = datasphere_emulator.journal.calls("Cancel")
    assert (call.request or {}).get("graceful", False) is graceful


def test_an_ended_job_needs_no_cancel(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(Script(), execute=True)
    datasphere_emulator.wait_job(job_id, "SUCCESS")
    settings = settings_of(datasphere_emulator)
    assert killing.cancel_job(settings, ending(job_id, surely_running=False))
    assert made(datasphere_emulator) == [("Get", "OK")]
    # Where it seemed to run, the refusal is looked into.
    assert killing.cancel_job(settings, ending(job_id))
    assert made(datasphere_emulator)[1:] == [("Cancel", "FAILED_PRECONDITION"), ("Get", "OK")]


def test_a_job_that_is_being_cancelled_is_not_cancelled_again(datasphere_emulator: Emulator) -> None:
    datasphere_emulator.settings.cancelling_seconds = 30
    job_id = running_job(datasphere_emulator)
    datasphere_emulator.cancel_job(job_id)
    assert killing.cancel_job(settings_of(datasphere_emulator), ending(job_id, surely_running=False))
    assert made(datasphere_emulator) == [("Get", "OK")]


def test_an_unknown_job_needs_no_cancel(datasphere_emulator: Emulator) -> None:
    assert killing.cancel_job(settings_of(datasphere_emulator), ending("bt1gone"))


def test_a_job_that_was_never_started_is_deleted(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(FOR_EVER)
    assert killing.cancel_job(settings_of(datasphere_emulator), ending(job_id, started=False))
    assert made(datasphere_emulator) == [("Get", "OK"), ("Delete", "OK")]
    assert datasphere_emulator.jobs() == []


def test_a_job_that_starts_just_then_is_cancelled(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(FOR_EVER)
    # The answer to the first look comes late, when Execute has had its effect.
    datasphere_emulator.faults.inject("Delete", code="FAILED_PRECONDITION", times=1)
    assert killing.cancel_job(settings_of(datasphere_emulator), ending(job_id, started=False))
    assert made(datasphere_emulator) == [
        ("Get", "OK"),
        ("Delete", "FAILED_PRECONDITION"),
        ("Get", "OK"),
        ("Cancel", "OK"),
    ]


def test_a_service_that_cancels_no_unstarted_job(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(FOR_EVER)
    datasphere_emulator.faults.inject("Cancel", code="FAILED_PRECONDITION", times=1)
    assert killing.cancel_job(settings_of(datasphere_emulator), ending(job_id))
    assert made(datasphere_emulator) == [("Cancel", "FAILED_PRECONDITION"), ("Get", "OK"), ("Delete", "OK")]


def test_a_cancel_that_did_not_arrive_is_sent_again(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    datasphere_emulator.faults.inject("Cancel", code="UNAVAILABLE", times=2)
    assert killing.cancel_job(settings_of(datasphere_emulator), ending(job_id))
    datasphere_emulator.wait_job(job_id, "CANCELLED")
    assert [code for _, code in made(datasphere_emulator)] == ["UNAVAILABLE", "UNAVAILABLE", "OK"]


def test_a_service_that_is_down_is_given_up_in_time(
    datasphere_emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = running_job(datasphere_emulator)
    settings = settings_of(datasphere_emulator)
    datasphere_emulator.faults.inject("Cancel", code="UNAVAILABLE")
    begun = time.monotonic()
    assert not killing.cancel_job(settings, ending(job_id))
    # Airflow kills the task for good five seconds after the signal.
    assert time.monotonic() - begun < killing.CANCEL_SECONDS + 1
    assert "may go on costing money" in caplog.text


def test_a_refusal_is_told_at_once(datasphere_emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    job_id = running_job(datasphere_emulator)
    datasphere_emulator.faults.inject("Cancel", code="PERMISSION_DENIED")
    assert not killing.cancel_job(settings_of(datasphere_emulator), ending(job_id))
    assert made(datasphere_emulator) == [("Cancel", "PERMISSION_DENIED")]
    assert "Developer" in caplog.text
    assert datasphere_emulator.job(job_id).status == jobs_pb2.EXECUTING
