"""Who is ending a task, and how its job is ended: the decisions, and the calls over a real socket."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere import task_end
from airflow_provider_datasphere.client import cancellation
from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
from airflow_provider_datasphere.client.connection.channels import AsyncChannels
from airflow_provider_datasphere.client.connection.settings import Settings
from datasphere_emulator import Emulator, Script

LOG = logging.getLogger("test_cancellation")

FOR_EVER = Script(never_ends=True)


def settings_of(emulator: Emulator, **extra: Any) -> Settings:
    return Settings.from_extra(emulator.connection_extra(**extra))


def ending(job_id: str, action: cancellation.OnKillAction = "cancel", **fields: Any) -> cancellation.JobCancellation:
    return cancellation.JobCancellation(job_id, action, "a test", LOG, **fields)


def running_job(emulator: Emulator, script: Script = FOR_EVER, **fields: Any) -> str:
    job_id = emulator.create_scripted_job(script, execute=True, **fields)
    emulator.wait_job(job_id, "EXECUTING")
    return job_id


def made(emulator: Emulator) -> list[tuple[str, str]]:
    """The calls that reached the service, in their order, once they are over."""
    while not all(call.finished for call in emulator.journal.calls()):
        time.sleep(0.01)
    return [(call.method, call.code) for call in emulator.journal.calls()]


# Who has ended it? ----------------------------------------------------------------------------------------------

Seen = task_end.TaskStatus
PERSON, TIMEOUT, MACHINE, NEWER_TRY = (
    task_end.EndedBy.PERSON,
    task_end.EndedBy.TIMEOUT,
    task_end.EndedBy.MACHINE,
    task_end.EndedBy.NEWER_TRY,
)


@pytest.mark.parametrize("state", ["running", "up_for_retry", "deferred", "scheduled", "queued"])
@pytest.mark.parametrize("job_id", [None, "mine"])
def test_a_task_that_airflow_counts_on_was_ended_by_a_machine(state: str, job_id: str | None) -> None:
    assert task_end.who_ended(Seen(True, state, job_id), "mine", deferred=False) is MACHINE


@pytest.mark.parametrize("state", ["failed", "success", "skipped", "removed", "restarting", None])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_person_ends_the_job_too(state: str | None, deferred: bool) -> None:
    assert task_end.who_ended(Seen(True, state, "mine"), "mine", deferred=deferred) is PERSON


@pytest.mark.parametrize("deferred", [False, True])
def test_silence_is_an_outage(deferred: bool) -> None:
    """A person's act reaches a task by an answer of Airflow's."""
    assert task_end.who_ended(Seen(False), "mine", deferred=deferred) is MACHINE


def test_a_timeout_is_known_by_itself() -> None:
    assert task_end.who_ended(Seen(True, "running"), "mine", deferred=False, timed_out=True) is TIMEOUT


def test_a_newer_try_with_a_job_of_its_own_leaves_this_one_to_nobody() -> None:
    assert task_end.who_ended(Seen(True, "running", "another"), "mine", deferred=False) is NEWER_TRY


@pytest.mark.parametrize(
    ("state", "job_id", "ended_by"),
    [
        ("deferred", "mine", MACHINE),  # handed to another triggerer
        ("deferred", None, MACHINE),
        ("deferred", "another", PERSON),  # cleared, and the next try has deferred already
        ("running", "mine", PERSON),  # cleared, and Airflow 2 hasn't cleared its XComs yet
        ("running", None, PERSON),  # cleared, and the next try has begun
        ("running", "another", PERSON),
        ("scheduled", "mine", PERSON),  # cleared; a resumed task's job is over, which a look tells
        ("queued", None, PERSON),
        ("up_for_retry", "mine", MACHINE),
    ],
)
def test_a_trigger_tells_a_take_over_from_a_clear(state: str, job_id: str | None, ended_by: task_end.EndedBy) -> None:
    assert task_end.who_ended(Seen(True, state, job_id), "mine", deferred=True) is ended_by


def test_a_job_is_left_only_to_somebody_who_goes_on_with_it() -> None:
    assert task_end.keeps_job_running(MACHINE, has_successor=True)
    assert not task_end.keeps_job_running(MACHINE, has_successor=False)
    assert not any(
        task_end.keeps_job_running(ended_by, has_successor=True) for ended_by in (PERSON, TIMEOUT, NEWER_TRY)
    )


def test_airflow_that_does_not_answer_keeps_nobody_waiting() -> None:
    never = threading.Event()

    def ask() -> task_end.TaskStatus:
        never.wait(60)
        return Seen(True)

    assert task_end.query_task(ask, 0.1, LOG) == Seen(False)
    never.set()


def test_an_error_is_no_answer() -> None:
    def ask() -> task_end.TaskStatus:
        raise RuntimeError("the supervisor is gone")

    assert task_end.query_task(ask, 5, LOG) == Seen(False)


def test_no_state_is_an_answer() -> None:
    assert task_end.query_task(lambda: Seen(True), 5, LOG) == Seen(True)


# The calls ---------------------------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled_by_one_call(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    assert cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id))
    datasphere_emulator.wait_job(job_id, "CANCELLED")
    assert made(datasphere_emulator) == [("Cancel", "OK")]


async def test_a_trigger_cancels_on_its_own_channels(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    settings = settings_of(datasphere_emulator)
    client = AsyncDataSphereClient(AsyncChannels.shared(settings), settings)
    assert await cancellation.cancel_job_async(client, ending(job_id))
    assert made(datasphere_emulator) == [("Cancel", "OK")]


def test_keep_makes_no_call(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    assert not cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id, "keep"))
    assert made(datasphere_emulator) == []


@pytest.mark.parametrize(("shutdown", "graceful"), [(("SIGTERM", 30), True), (("SIGTERM", None), False), (None, False)])
def test_grace_only_for_a_job_that_the_service_then_ends(
    datasphere_emulator: Emulator, shutdown: Any, graceful: bool
) -> None:
    job_id = running_job(datasphere_emulator, graceful_shutdown=shutdown)
    assert cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id, "graceful"))
    (call,) = datasphere_emulator.journal.calls("Cancel")
    assert (call.request or {}).get("graceful", False) is graceful


def test_an_ended_job_needs_no_cancel(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(Script(), execute=True)
    datasphere_emulator.wait_job(job_id, "SUCCESS")
    settings = settings_of(datasphere_emulator)
    assert cancellation.cancel_job_on_new_connection(settings, ending(job_id, known_running=False))
    assert made(datasphere_emulator) == [("Get", "OK")]
    # Where it seemed to run, the refusal is looked into.
    assert cancellation.cancel_job_on_new_connection(settings, ending(job_id))
    assert made(datasphere_emulator)[1:] == [("Cancel", "FAILED_PRECONDITION"), ("Get", "OK")]


def test_a_job_that_is_being_cancelled_is_not_cancelled_again(datasphere_emulator: Emulator) -> None:
    datasphere_emulator.settings.cancelling_seconds = 30
    job_id = running_job(datasphere_emulator)
    datasphere_emulator.cancel_job(job_id)
    assert cancellation.cancel_job_on_new_connection(
        settings_of(datasphere_emulator), ending(job_id, known_running=False)
    )
    assert made(datasphere_emulator) == [("Get", "OK")]


def test_an_unknown_job_needs_no_cancel(datasphere_emulator: Emulator) -> None:
    assert cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending("bt1gone"))


def test_a_job_that_was_never_started_is_deleted(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(FOR_EVER)
    assert cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id, started=False))
    assert made(datasphere_emulator) == [("Get", "OK"), ("Delete", "OK")]
    assert datasphere_emulator.jobs() == []


def test_a_job_that_starts_just_then_is_cancelled(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(FOR_EVER)
    # The answer to the first look comes late, when Execute has had its effect.
    datasphere_emulator.faults.inject("Delete", code="FAILED_PRECONDITION", times=1)
    assert cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id, started=False))
    assert made(datasphere_emulator) == [
        ("Get", "OK"),
        ("Delete", "FAILED_PRECONDITION"),
        ("Get", "OK"),
        ("Cancel", "OK"),
    ]


def test_a_service_that_cancels_no_unstarted_job(datasphere_emulator: Emulator) -> None:
    job_id = datasphere_emulator.create_scripted_job(FOR_EVER)
    datasphere_emulator.faults.inject("Cancel", code="FAILED_PRECONDITION", times=1)
    assert cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id))
    assert made(datasphere_emulator) == [("Cancel", "FAILED_PRECONDITION"), ("Get", "OK"), ("Delete", "OK")]


def test_a_cancel_that_did_not_arrive_is_sent_again(datasphere_emulator: Emulator) -> None:
    job_id = running_job(datasphere_emulator)
    datasphere_emulator.faults.inject("Cancel", code="UNAVAILABLE", times=2)
    assert cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id))
    datasphere_emulator.wait_job(job_id, "CANCELLED")
    assert [code for _, code in made(datasphere_emulator)] == ["UNAVAILABLE", "UNAVAILABLE", "OK"]


def test_a_service_that_is_down_is_given_up_in_time(
    datasphere_emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = running_job(datasphere_emulator)
    settings = settings_of(datasphere_emulator)
    datasphere_emulator.faults.inject("Cancel", code="UNAVAILABLE")
    begun = time.monotonic()
    assert not cancellation.cancel_job_on_new_connection(settings, ending(job_id))
    # Airflow kills the task for good five seconds after the signal.
    assert time.monotonic() - begun < cancellation.CANCEL_SECONDS + 1
    assert "may still be running and costing money" in caplog.text


def test_a_refusal_is_told_at_once(datasphere_emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    job_id = running_job(datasphere_emulator)
    datasphere_emulator.faults.inject("Cancel", code="PERMISSION_DENIED")
    assert not cancellation.cancel_job_on_new_connection(settings_of(datasphere_emulator), ending(job_id))
    assert made(datasphere_emulator) == [("Cancel", "PERMISSION_DENIED")]
    assert "Developer" in caplog.text
    assert datasphere_emulator.job(job_id).status == jobs_pb2.EXECUTING
