"""A task whose job waits for room or for its machine: in the triggerer, on the worker, and not for ever."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.submission import capacity, start_queue
from airflow_provider_datasphere.compat import AirflowFailException, TaskDeferred
from airflow_provider_datasphere.exceptions import (
    DataSphereError,
    JobCancelledError,
    JobInfrastructureError,
    JobRequestError,
)
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.triggers import jobs as triggers
from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger
from airflow_side import TaskInstance, connect, context_of
from datasphere_emulator import Emulator, Script
from waits import until, wait_until

QUICK = Script(executing_seconds=0.1, log=["hello"])
ENDLESS = Script(never_ends=True)
#: It never gets a machine.
SLOW_SETUP = Script(preparing_seconds=600)
START_TIMED_OUT = "Airflow: start_timeout passed"


@pytest.fixture
def emulator(datasphere_emulator_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator: Emulator = datasphere_emulator_factory(tls=False)
    connect(emulator, monkeypatch)
    monkeypatch.setattr(capacity, "MAX_ROOM_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(start_queue, "MIN_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(start_queue, "MAX_ROOM_PAUSE_SECONDS", 0.2)
    return emulator


def fork(emulator: Emulator, script: Script = QUICK, **arguments: Any) -> ForkJobOperator:
    source = emulator.create_scripted_job(script)
    return ForkJobOperator(
        **{"task_id": "fork", "source_job_id": source, "poll_interval": 0.2, "deferrable": False, **arguments}
    )


def forks(emulator: Emulator, task: ForkJobOperator) -> list[jobs_pb2.Job]:
    return emulator.jobs(task.source_job_id)


def deferred(task: ForkJobOperator, context: Any, *, resumed_by: dict[str, Any] | None = None) -> DataSphereJobTrigger:
    """Run the task up to its deferral; return the trigger as the triggerer builds it."""
    with pytest.raises(TaskDeferred) as caught:
        _ = task.execute(context) if resumed_by is None else task.execute_complete(context, resumed_by)
    _, arguments = caught.value.trigger.serialize()
    return DataSphereJobTrigger(**json.loads(json.dumps(arguments)))


def fired(trigger: DataSphereJobTrigger) -> dict[str, Any]:
    """Run the trigger to its event."""

    async def run() -> dict[str, Any]:
        events = [event.payload async for event in trigger.run()]
        payload: dict[str, Any] = json.loads(json.dumps(events[0]))
        return payload

    return asyncio.run(run())


def fired_when(trigger: DataSphereJobTrigger, emulator: Emulator, **settings: Any) -> dict[str, Any]:
    """Run the trigger; change the service once it has rejected another Execute."""

    async def run() -> dict[str, Any]:
        before = emulator.journal.count("Execute", code="RESOURCE_EXHAUSTED")
        events = asyncio.create_task(first_event(trigger))
        await until(lambda: emulator.journal.count("Execute", code="RESOURCE_EXHAUSTED") > before)
        for name, value in settings.items():
            setattr(emulator.settings, name, value)
        return await events

    return asyncio.run(run())


async def first_event(trigger: DataSphereJobTrigger) -> dict[str, Any]:
    events = [event.payload async for event in trigger.run()]
    payload: dict[str, Any] = json.loads(json.dumps(events[0]))
    return payload


# In the triggerer ----------------------------------------------------------------------------------------------------


def test_a_deferrable_task_waits_for_room_in_the_triggerer(
    emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=True)
    context = context_of(task)
    trigger = deferred(task, context)
    (job,) = forks(emulator, task)
    assert job.status == jobs_pb2.CREATING
    assert trigger.queued is not None
    assert "quota exhausted" in trigger.queued
    assert (
        f"Job {job.id} waits for room in its project, in the triggerer: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    )
    assert "operation_id" not in context["ti"].xcoms

    event = fired_when(trigger, emulator, max_running_jobs=1)
    assert (event["status"], event["operation_id"]) == ("ended", emulator.operation_of(job.id))
    assert task.execute_complete(context, event) == job.id
    xcoms = context["ti"].xcoms
    assert xcoms["operation_id"] == event["operation_id"]
    result = xcoms["result"]
    assert (result["status"], result["return_code"]) == ("SUCCESS", 0)
    assert result["queued_seconds"] == pytest.approx(event["accepted_at"] - event["first_execute_at"], abs=0.01)
    assert result["setup_seconds"] >= 0
    assert result["run_seconds"] >= 0.1
    assert emulator.executions(job.id) == 1


def test_the_blocking_mode_tells_the_same_times(emulator: Emulator) -> None:
    emulator.settings.room_refusals = 2
    task = fork(emulator, Script(preparing_seconds=0.3, executing_seconds=0.2))
    context = context_of(task)
    task.execute(context)
    result = context["ti"].xcoms["result"]
    assert result["queued_seconds"] > 0.2
    assert result["setup_seconds"] >= 0.3
    assert result["run_seconds"] >= 0.2


def test_a_task_that_does_not_wait_for_the_end_gives_its_slot_back_too(emulator: Emulator) -> None:
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, ENDLESS, deferrable=True, wait_for_completion=False)
    context = context_of(task)
    event = fired_when(deferred(task, context), emulator, max_running_jobs=1)
    (job,) = forks(emulator, task)
    assert event["status"] == "started"
    assert task.execute_complete(context, event) == job.id
    assert context["ti"].xcoms["operation_id"] == emulator.operation_of(job.id)
    assert "result" not in context["ti"].xcoms
    assert emulator.executions(job.id) == 1


def test_a_job_that_the_service_ends_while_it_waits_is_followed_by_another(emulator: Emulator) -> None:
    emulator.settings.refused_job = "error"
    emulator.settings.refused_job_seconds = 0.1
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=True)
    context = context_of(task)
    first = deferred(task, context)
    event = fired(first)
    assert (event["status"], event["error"]) == ("not_started", None)
    # There still is no room: the new job waits, and its task keeps the place of the first.
    second = deferred(task, context, resumed_by=event)
    assert second.job_id != first.job_id
    assert second.first_execute_at == first.first_execute_at
    assert context["ti"].xcoms["job_id"] == second.job_id
    event = fired(second)
    emulator.settings.max_running_jobs = 1
    final = deferred(task, context, resumed_by=event)
    assert task.execute_complete(context, fired(final)) == final.job_id
    assert [emulator.executions(job.id) for job in forks(emulator, task) if job.id != final.job_id] == [0, 0]
    assert emulator.executions(final.job_id) == 1


def test_what_the_service_refuses_for_good_fails_the_task_as_on_the_worker(emulator: Emulator) -> None:
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=True, retries=2)
    context = context_of(task, max_tries=2)
    trigger = deferred(task, context)
    emulator.faults.inject("Execute", code="FAILED_PRECONDITION", message="g9.1 was removed")
    event = fired(trigger)
    with pytest.raises(JobRequestError, match=r"g9\.1 was removed"):
        task.execute_complete(context, event)
    assert forks(emulator, task) == []


@pytest.mark.parametrize("deferrable", [False, True], ids=["blocking", "deferred"])
def test_a_waiting_job_that_somebody_deletes_is_not_replaced(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    monkeypatch.setattr(start_queue, "NOT_FOUND_GRACE_SECONDS", 0.5)
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=deferrable, retries=2)
    context = context_of(task, max_tries=2)

    def delete() -> None:
        wait_until(lambda: emulator.journal.count("Execute", code="RESOURCE_EXHAUSTED") > 1)
        (job,) = forks(emulator, task)
        DataSphereHook().get_conn().delete(job.id)

    with ThreadPoolExecutor(1) as person:
        done = person.submit(delete)
        with pytest.raises(JobCancelledError, match=r"was deleted while it waited for room\. Clear the task"):
            run_whole(task, context)
        done.result()
    assert forks(emulator, task) == []
    assert emulator.journal.count("Clone") == 1


def test_instance_types_that_stay_refused_end_the_try(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "INSTANCE_TYPES_SECONDS", 1.0)
    emulator.settings.unavailable_instance_types = ["g2.2"]
    emulator.settings.instance_types_checked_by = ["Execute"]
    task = fork(emulator, deferrable=True, cloud_instance_types=["g2.2"])
    context = context_of(task)
    trigger = deferred(task, context)
    assert "not available for your community" in str(trigger.queued)
    event = fired(trigger)
    with pytest.raises(JobInfrastructureError, match="no capacity") as failure:
        task.execute_complete(context, event)
    assert not isinstance(failure.value, AirflowFailException)
    assert emulator.journal.count("Execute", code="OK") == 0
    assert forks(emulator, task) == []  # it was the last try


@pytest.mark.parametrize("action", ["cancel", "graceful", "keep"])
async def test_a_person_who_ends_a_waiting_task_deletes_the_job(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, action: Any
) -> None:
    """There is nothing to keep: nobody would ever start it."""

    async def state(_: Any) -> str:
        return "failed"

    async def xcom(*_: Any) -> None:
        return None

    monkeypatch.setattr(triggers, "atask_state", state)
    monkeypatch.setattr(triggers, "atask_xcom", xcom)
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=True, on_kill_action=action)
    trigger = await asyncio.to_thread(deferred, task, context_of(task))
    running = asyncio.create_task(first_event(trigger))
    trigger.task_instance = TaskInstance()  # type: ignore[assignment]
    await until(lambda: emulator.journal.count("Get"))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await trigger.on_kill()
    assert forks(emulator, task) == []
    assert emulator.journal.count("Cancel") == 0


async def test_the_execution_timeout_deletes_a_waiting_job(emulator: Emulator) -> None:
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=True, execution_timeout=timedelta(seconds=2))
    trigger = await asyncio.to_thread(deferred, task, context_of(task))
    event = await first_event(trigger)
    assert (event["status"], event["cancelled"]) == ("timeout", True)
    assert forks(emulator, task) == []


def test_a_retry_of_a_waiting_task_goes_on_with_its_job(emulator: Emulator) -> None:
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=True, retries=1)
    trigger = deferred(task, context_of(task, max_tries=1))
    again = fork(emulator, deferrable=True, retries=1, source_job_id=task.source_job_id)
    second = deferred(again, context_of(again, max_tries=1, try_number=2))
    assert second.job_id == trigger.job_id
    # Where its first Execute isn't recorded, its creation is the next best.
    assert second.first_execute_at == pytest.approx(trigger.first_execute_at, abs=2.0)
    assert len(forks(emulator, task)) == 1


# start_timeout -------------------------------------------------------------------------------------------------------


def run_whole(task: ForkJobOperator, context: Any) -> None:
    """Run the task to its end, on the worker or with its triggerer."""
    if task.deferrable:
        task.execute_complete(context, fired(deferred(task, context)))
    else:
        task.execute(context)


def not_started(task: ForkJobOperator, context: Any) -> DataSphereError:
    """Run the task to its end; return its error."""
    with pytest.raises(JobInfrastructureError, match="start_timeout") as failure:
        run_whole(task, context)
    assert not isinstance(failure.value, AirflowFailException)
    return failure.value


@pytest.mark.parametrize("deferrable", [False, True], ids=["blocking", "deferred"])
@pytest.mark.parametrize("action", ["cancel", "keep"])
def test_a_job_that_gets_no_machine_in_time_is_cancelled(emulator: Emulator, deferrable: bool, action: Any) -> None:
    task = fork(emulator, SLOW_SETUP, deferrable=deferrable, start_timeout=1, on_kill_action=action, retries=1)
    error = not_started(task, context_of(task, max_tries=1))
    (job,) = forks(emulator, task)
    assert job.id in str(error)
    assert "The job was cancelled" in str(error)
    assert [call.job_id for call in emulator.journal.calls("Cancel")] == [job.id]
    wait_until(lambda: emulator.job(job.id).status == jobs_pb2.CANCELLED)
    assert START_TIMED_OUT in emulator.job(job.id).status_details
    # The next try runs a new job.
    emulator.settings.max_running_jobs = 5
    again = fork(emulator, deferrable=False, retries=1, source_job_id=task.source_job_id, wait_for_completion=False)
    assert again.execute(context_of(again, max_tries=1, try_number=2)) != job.id


@pytest.mark.parametrize("deferrable", [False, True], ids=["blocking", "deferred"])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_job_that_gets_no_room_in_time_is_deleted(emulator: Emulator, deferrable: bool, retries: int) -> None:
    emulator.settings.max_running_jobs = 0
    task = fork(emulator, deferrable=deferrable, start_timeout=timedelta(seconds=1), retries=retries)
    error = not_started(task, context_of(task, max_tries=retries))
    assert "RESOURCE_EXHAUSTED" in str(error)
    assert forks(emulator, task) == []
    assert emulator.journal.count("Cancel") == 0


@pytest.mark.parametrize("deferrable", [False, True], ids=["blocking", "deferred"])
def test_a_job_that_computes_in_time_may_take_as_long_as_it_needs(emulator: Emulator, deferrable: bool) -> None:
    task = fork(emulator, Script(executing_seconds=2.5), deferrable=deferrable, start_timeout=1.5)
    context = context_of(task)
    run_whole(task, context)
    assert context["ti"].xcoms["result"]["status"] == "SUCCESS"
    assert emulator.journal.count("Cancel") == 0


def test_a_job_that_can_not_be_cancelled_is_told_of(emulator: Emulator) -> None:
    emulator.faults.inject("Cancel", code="PERMISSION_DENIED")
    task = fork(emulator, SLOW_SETUP, start_timeout=0.5)
    error = not_started(task, context_of(task))
    assert "couldn't be cancelled; it may still be running and costing money" in str(error)


@pytest.mark.parametrize("value", [0, -1, True, "1h", timedelta(0), timedelta(seconds=-5), float("nan")])
def test_a_wrong_start_timeout_is_refused_at_parse_time(value: Any) -> None:
    with pytest.raises(JobRequestError, match=r"start_timeout is .*timedelta or a number of seconds, more than 0"):
        ForkJobOperator(task_id="fork", source_job_id="bt1", start_timeout=value)
    with pytest.raises(JobRequestError, match="start_timeout"):
        ForkJobOperator.partial(task_id="fork", start_timeout=value)
