"""DataSphereJobTrigger in one event loop, against the emulator."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from airflow.sdk.serde import deserialize, serialize
from airflow.serialization.serialized_objects import BaseSerialization

from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor
from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger
from datasphere_emulator import Emulator, LogLine, Script
from unit.airflow_side import TaskInstance, connect, context_of

ENDLESS = Script(never_ends=True)

ARGUMENTS: dict[str, Any] = {
    "job_id": "bt1job",
    "operation_id": "bt1operation",
    "datasphere_conn_id": "elsewhere",
    "poll_interval": 2.5,
    "stream_logs": True,
    "log_offset": 4711,
    "deadline": 1795390000.25,
    "on_kill_action": "graceful",
    "link": "https://datasphere.yandex.cloud/communities/c/projects/p/job/bt1job",
}


@pytest.fixture
def emulator(datasphere_emulator_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator: Emulator = datasphere_emulator_factory(tls=False)
    connect(emulator, monkeypatch)
    return emulator


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the trigger logs, which the triggerer sends to the task's log."""
    told: list[str] = []

    class Log(logging.LoggerAdapter):  # type: ignore[type-arg]
        def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
            told.append(str(msg) % args if args else str(msg))

    monkeypatch.setattr(DataSphereJobTrigger, "log", property(lambda _: Log(logging.getLogger("trigger"), {})))
    return told


def trigger(emulator: Emulator, job_id: str, **arguments: Any) -> DataSphereJobTrigger:
    known = {"operation_id": emulator.operation_of(job_id), "poll_interval": 0.2}
    return DataSphereJobTrigger(**{"job_id": job_id, **known, **arguments})


async def event_of(trigger: DataSphereJobTrigger) -> dict[str, Any]:
    events = [event.payload async for event in trigger.run()]
    assert len(events) == 1
    json.dumps(events)
    payload: dict[str, Any] = events[0]
    return payload


# On its way to the triggerer ----------------------------------------------------------------------------------------


def rebuilt(path: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    module, _, name = path.rpartition(".")
    again: tuple[str, dict[str, Any]] = getattr(import_module(module), name)(**arguments).serialize()
    return again


def test_every_argument_survives_the_way_to_the_triggerer() -> None:
    path, arguments = DataSphereJobTrigger(**ARGUMENTS).serialize()
    assert arguments == ARGUMENTS
    ways: list[Callable[[Any], Any]] = [
        lambda value: json.loads(json.dumps(value)),
        lambda value: deserialize(serialize(value)),
        lambda value: BaseSerialization.deserialize(BaseSerialization.serialize(value)),
    ]
    for way in ways:
        assert rebuilt(path, way(arguments)) == (path, ARGUMENTS)


def test_defaults_survive_too_and_a_later_version_may_add_arguments() -> None:
    path, arguments = DataSphereJobTrigger("bt1job").serialize()
    assert rebuilt(path, deserialize(serialize(arguments))) == (path, arguments)
    # A triggerer that was updated first gets arguments of the version before; one of each may be missing.
    for name in set(arguments) - {"job_id"}:
        fewer = {key: value for key, value in arguments.items() if key != name}
        assert rebuilt(path, fewer) == (path, arguments)


def test_no_secret_goes_along(emulator: Emulator) -> None:
    waiting = DataSphereJobTrigger("bt1job", "bt1operation", link="https://x")
    shown = repr(waiting) + repr(waiting.serialize()) + str(waiting.__dict__)
    assert emulator.connection_extra()["iam_token"][:8] not in shown


@pytest.mark.parametrize("kind", ["operator", "sensor"])
def test_what_operator_and_sensor_hand_over_is_plain_json(emulator: Emulator, kind: str) -> None:
    from airflow_provider_datasphere.compat import TaskDeferred

    task: Any
    if kind == "operator":
        task = ForkJobOperator(
            task_id="fork", source_job_id=emulator.create_scripted_job(ENDLESS), deferrable=True, poll_interval=3
        )
    else:
        job_id = emulator.create_scripted_job(ENDLESS, execute=True)
        task = DataSphereJobSensor(task_id="wait", job_id=job_id, operation_id="None", deferrable=True, timeout=60)
    with pytest.raises(TaskDeferred) as caught:
        task.execute(context_of(task))
    path, arguments = caught.value.trigger.serialize()
    assert rebuilt(path, json.loads(json.dumps(arguments))) == (path, arguments)
    assert not caught.value.kwargs
    if kind == "sensor":
        assert arguments["operation_id"] is None
        assert (arguments["on_kill_action"], arguments["stream_logs"]) == ("keep", False)
        assert 50 < arguments["deadline"] - time.time() <= 60
        # Airflow's own end of the wait is the net below, and must not be first.
        assert caught.value.timeout is not None
        assert caught.value.timeout.total_seconds() > 120


# In the triggerer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [Script(executing_seconds=0.3), Script(return_code=4), Script(error=("INTERNAL", "no host"))]
)
async def test_it_fires_at_any_end(emulator: Emulator, script: Script) -> None:
    job_id = emulator.create_scripted_job(script, execute=True)
    waiting = trigger(emulator, job_id, link="https://job")
    assert await event_of(waiting) == {
        "status": "ended",
        "job_id": job_id,
        "operation_id": waiting.operation_id,
        "link": "https://job",
    }
    assert (emulator.journal.count("Cancel"), emulator.journal.count("ReadLogs")) == (0, 0)


async def test_the_event_tells_whose_try_it_is_of(emulator: Emulator) -> None:
    watching = trigger(emulator, emulator.create_scripted_job(Script(), execute=True))
    watching.task_instance = TaskInstance(try_number=3)
    assert (await event_of(watching))["try_number"] == 3


async def test_without_an_operation_the_job_itself_is_asked(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(executing_seconds=0.3), execute=True)
    event = await event_of(trigger(emulator, job_id, operation_id=None))
    assert (event["status"], event["operation_id"]) == ("ended", None)
    assert emulator.journal.count("Operation.Get") == 0


async def test_the_log_is_complete_and_in_order_before_it_fires(emulator: Emulator, lines: list[str]) -> None:
    printed = [f"line {number}" for number in range(50)]
    script = Script(executing_seconds=0.5, log=[LogLine(i / 100, f"{text}\n") for i, text in enumerate(printed)])
    emulator.settings.log_delay_seconds = 0.3
    job_id = emulator.create_scripted_job(script, execute=True)
    await event_of(trigger(emulator, job_id, stream_logs=True))
    assert lines[0] == f"The log of job {job_id} follows from its beginning. A restarted triggerer begins here again."
    assert [line for line in lines if line.startswith("line ")] == printed
    assert "Job status: SUCCESS" in lines


async def test_a_deadline_cancels_the_job_before_it_fires(emulator: Emulator, lines: list[str]) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    event = await event_of(trigger(emulator, job_id, deadline=time.time() + 0.5, on_kill_action="cancel"))
    assert (event["status"], event["cancelled"]) == ("timeout", True)
    (call,) = emulator.journal.calls("Cancel")
    assert call.job_id == job_id
    assert "execution_timeout passed" in (call.request or {})["reason"]
    assert f"The task's time is over; job {job_id} is still running." in lines


async def test_a_deadline_that_is_over_already(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    event = await event_of(trigger(emulator, job_id, deadline=time.time() - 60, on_kill_action="cancel"))
    assert (event["status"], event["cancelled"]) == ("timeout", True)


async def test_a_job_that_ended_in_time_is_no_timeout_whenever_it_is_seen(emulator: Emulator, lines: list[str]) -> None:
    """No triggerer ran meanwhile."""
    job_id = emulator.create_scripted_job(Script(log=["its last word\n"]), execute=True)
    emulator.wait_job(job_id)
    waiting = trigger(emulator, job_id, deadline=time.time() - 60, on_kill_action="cancel", stream_logs=True)
    assert (await event_of(waiting))["status"] == "ended"
    assert emulator.journal.count("Cancel") == 0
    assert lines.count("its last word") == 1
    assert not [line for line in lines if "still running" in line]


async def test_keep_means_keep(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    waiting = trigger(emulator, job_id, deadline=time.time() + 0.3, on_kill_action="keep")
    event = await event_of(waiting)
    assert (event["status"], event["cancelled"]) == ("timeout", False)
    await waiting.on_kill()
    assert emulator.journal.count("Cancel") == 0


async def test_a_person_who_ends_the_task_ends_the_job(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    running = asyncio.create_task(event_of(waiting))
    await asyncio.sleep(0.5)
    running.cancel("__airflow_user_action__")
    with pytest.raises(asyncio.CancelledError):
        await running
    assert emulator.journal.count("Cancel") == 0
    await waiting.on_kill()
    await waiting.cleanup()
    assert emulator.journal.count("Cancel") == 1


async def test_a_stopping_triggerer_cancels_nothing(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    running = asyncio.create_task(event_of(waiting))
    await asyncio.sleep(0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await waiting.cleanup()
    assert emulator.journal.count("Cancel") == 0


async def test_once_it_has_fired_nothing_is_cancelled(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(), execute=True)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    await event_of(waiting)
    await waiting.on_kill()
    assert emulator.journal.count("Cancel") == 0


async def test_a_job_that_nobody_knows_any_more_is_lost(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(), execute=True)
    emulator.wait_job(job_id)
    operation_id = emulator.operation_of(job_id)
    emulator.delete_job(job_id)
    emulator.forget_operation(operation_id)
    event = await event_of(DataSphereJobTrigger(job_id, operation_id, link="https://job"))
    assert event["status"] == "lost"
    assert job_id in event["message"]
    assert "https://job" in event["message"]


async def test_an_unknown_connection_says_so(emulator: Emulator) -> None:
    with pytest.raises(Exception, match="no_such_connection"):
        await event_of(DataSphereJobTrigger("bt1job", datasphere_conn_id="no_such_connection"))


async def test_many_triggers_share_one_connection(emulator: Emulator) -> None:
    jobs = [emulator.create_scripted_job(Script(executing_seconds=1.0), execute=True) for _ in range(40)]
    events = await asyncio.gather(*(event_of(trigger(emulator, job_id)) for job_id in jobs))
    assert {event["status"] for event in events} == {"ended"}
    polls = emulator.journal.calls("Operation.Get")
    assert {call.operation_id for call in polls} == {emulator.operation_of(job_id) for job_id in jobs}
    assert len({call.peer for call in polls}) == 1


async def test_one_begins_at_once_and_many_one_after_the_other(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    triggers = import_module("airflow_provider_datasphere.triggers.jobs")
    monkeypatch.setattr(triggers, "PACE_SECONDS", 3600.0)
    monkeypatch.setattr(triggers, "_next_begins", 0.0)
    first, second = (emulator.create_scripted_job(Script(), execute=True) for _ in range(2))
    waits = [asyncio.create_task(event_of(trigger(emulator, job_id, stream_logs=True))) for job_id in (first, second)]
    assert (await waits[0])["status"] == "ended"
    assert not waits[1].done()
    polled = {call.operation_id for call in emulator.journal.calls("Operation.Get")}
    assert polled == {emulator.operation_of(first)}
    assert emulator.journal.calls("ReadLogs", job_id=second) == []
    waits[1].cancel()
