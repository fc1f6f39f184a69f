"""DataSphereJobTrigger in one event loop, against the emulator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from airflow.sdk.serde import deserialize, serialize
from airflow.serialization.serialized_objects import BaseSerialization

from airflow_provider_datasphere.client.monitoring import polling as polling_module
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor
from airflow_provider_datasphere.triggers import jobs as triggers
from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger
from airflow_side import TaskInstance, connect, context_of
from datasphere_emulator import Emulator, LogLine, Script
from datasphere_emulator.faults import Fault
from waits import until
from watching import has_poll_in_flight

ENDLESS = Script(never_ends=True)

ARGUMENTS: dict[str, Any] = {
    "job_id": "bt1job",
    "operation_id": "bt1operation",
    "datasphere_conn_id": "elsewhere",
    "poll_interval": 2.5,
    "stream_logs": True,
    "deadline": 1795390000.25,
    "on_kill_action": "graceful",
    "link": "https://datasphere.yandex.cloud/communities/c/projects/p/job/bt1job",
    "queued": "RESOURCE_EXHAUSTED: no room",
    "project_id": "bt1project",
    "first_execute_at": 1795380000.5,
    "accepted_at": 1795380001.75,
    "start_deadline": 1795383600.5,
    "wait_for_completion": False,
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


def test_arguments_of_another_version_are_understood() -> None:
    path, arguments = DataSphereJobTrigger("bt1job").serialize()
    assert rebuilt(path, deserialize(serialize(arguments))) == (path, arguments)
    # A triggerer that was updated first gets arguments of the version before; one of each may be missing.
    for name in set(arguments) - {"job_id"}:
        fewer = {key: value for key, value in arguments.items() if key != name}
        assert rebuilt(path, fewer) == (path, arguments)
    assert rebuilt(path, {**arguments, "log_offset": 0}) == (path, arguments)


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
        "first_execute_at": None,
        "accepted_at": None,
        "queued": False,
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
    assert lines[0] == f"Streaming the log of job {job_id} from its beginning; a restarted triggerer starts over here."
    assert [line for line in lines if line.startswith("line ")] == printed
    assert "Job status: SUCCESS" in lines


async def test_a_deadline_cancels_the_job_before_it_fires(emulator: Emulator, lines: list[str]) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    event = await event_of(trigger(emulator, job_id, deadline=time.time() + 0.5, on_kill_action="cancel"))
    assert (event["status"], event["cancelled"]) == ("timeout", True)
    (call,) = emulator.journal.calls("Cancel")
    assert call.job_id == job_id
    assert "execution_timeout passed" in (call.request or {})["reason"]
    assert f"Deadline exceeded; job {job_id} is still running." in lines


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


async def test_a_job_that_ended_in_time_and_can_not_be_watched_is_no_error_of_the_trigger(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(), execute=True)
    emulator.wait_job(job_id)
    emulator.faults.inject("Operation.Get", code="FAILED_PRECONDITION")
    assert (await event_of(trigger(emulator, job_id, deadline=time.time() - 60)))["status"] == "ended"


async def test_keep_means_keep(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    waiting = trigger(emulator, job_id, deadline=time.time() + 0.3, on_kill_action="keep")
    event = await event_of(waiting)
    assert (event["status"], event["cancelled"]) == ("timeout", False)
    await waiting.on_kill()
    assert emulator.journal.count("Cancel") == 0


USER_ACTION = "__airflow_user_action__"


async def ended_by_airflow(waiting: DataSphereJobTrigger, running: asyncio.Task[Any]) -> None:
    """What Airflow 3.3 does to a trigger that it doesn't want here any more."""
    running.cancel(USER_ACTION)
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await running
    if cancelled.value.args == (USER_ACTION,):
        await waiting.on_kill()
    await waiting.cleanup()


def airflow_says(monkeypatch: pytest.MonkeyPatch, state: str | None, job_id: str | None) -> None:
    async def atask_state(_: Any) -> str | None:
        return state

    async def atask_xcom(_: Any, key: str) -> str | None:
        assert key == "job_id"
        return job_id

    monkeypatch.setattr(triggers, "atask_state", atask_state)
    monkeypatch.setattr(triggers, "atask_xcom", atask_xcom)


@pytest.mark.parametrize(
    ("state", "xcom", "cancels"),
    [
        ("deferred", "mine", 0),  # handed to another triggerer
        ("deferred", None, 0),
        ("deferred", "another", 1),  # cleared, and the next try has deferred already
        ("running", "mine", 1),  # cleared, and Airflow 2 hasn't cleared its XComs yet
        ("running", None, 1),  # cleared
        ("scheduled", "mine", 1),
        ("failed", "mine", 1),
        ("success", "mine", 1),
        (None, None, 1),
    ],
)
async def test_only_a_person_who_ends_the_task_ends_the_job(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, state: str | None, xcom: str | None, cancels: int
) -> None:
    """Airflow 3.3 calls on_kill() for a person, and also when a trigger is handed to another triggerer."""
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    airflow_says(monkeypatch, state, job_id if xcom == "mine" else xcom)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    waiting.task_instance = TaskInstance()  # type: ignore[assignment]
    running = asyncio.create_task(event_of(waiting))
    await until(lambda: emulator.journal.count("Operation.Get"))
    await ended_by_airflow(waiting, running)
    assert emulator.journal.count("Cancel") == cancels


async def test_a_person_whom_airflow_names_late_ends_the_job_all_the_same(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """Somebody ends many tasks at once, and a busy Airflow answers one question after the other."""
    asked: list[Any] = []

    async def late(_: Any) -> str:
        asked.append(None)
        if len(asked) < 3:
            raise OSError("database is locked")
        await asyncio.sleep(0.5)
        return "failed"

    monkeypatch.setattr(triggers, "atask_state", late)
    monkeypatch.setattr(triggers, "STATE_QUERY_TIMEOUT", 0.2)
    monkeypatch.setattr(triggers, "STATE_QUERY_RETRY_PAUSE", 0.15)
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    waiting.task_instance = TaskInstance()  # type: ignore[assignment]
    running = asyncio.create_task(event_of(waiting))
    await until(lambda: emulator.journal.count("Operation.Get"))
    await ended_by_airflow(waiting, running)
    assert emulator.journal.count("Cancel") == 0
    assert any("queried again" in line for line in lines)
    await asyncio.gather(*triggers._pending_decisions)
    assert emulator.journal.count("Cancel") == 1


async def test_a_kill_that_airflow_repeats_is_done_once_and_to_its_end(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a trigger is gone, Airflow 3.3 cancels it again with each turn of its loop, on_kill() included."""
    airflow_says(monkeypatch, "failed", None)
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    emulator.faults.inject("Get", delay=0.5)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    waiting.task_instance = TaskInstance()  # type: ignore[assignment]
    running = asyncio.create_task(event_of(waiting))
    await until(lambda: emulator.journal.count("Operation.Get"))

    async def as_airflow_does() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await asyncio.wait_for(waiting.on_kill(), 30)

    ending = asyncio.create_task(as_airflow_does())
    for _ in range(8):
        running.cancel(USER_ACTION)
        await asyncio.sleep(0.1)
        ending.cancel(USER_ACTION)
    with contextlib.suppress(asyncio.CancelledError):
        await ending
    assert emulator.journal.count("Cancel") == 1


async def test_without_an_answer_of_airflows_the_job_goes_on_and_is_named(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    async def never(_: Any) -> str:
        await asyncio.Event().wait()
        return ""

    monkeypatch.setattr(triggers, "atask_state", never)
    monkeypatch.setattr(triggers, "STATE_QUERY_TIMEOUT", 0.1)
    monkeypatch.setattr(triggers, "STATE_QUERY_TIMEOUT_AFTER_KILL", 0.3)
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    waiting.task_instance = TaskInstance()  # type: ignore[assignment]
    running = asyncio.create_task(event_of(waiting))
    await until(lambda: emulator.journal.count("Operation.Get"))
    await ended_by_airflow(waiting, running)
    await asyncio.gather(*triggers._pending_decisions)
    assert emulator.journal.count("Cancel") == 0
    assert f"CancelJobOperator(job_id={job_id!r})" in " ".join(lines)


@pytest.mark.parametrize("state", ["scheduled", "queued", "running", "success", "failed"])
async def test_a_job_that_is_over_gets_no_cancel(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Another triggerer has seen its end, and the task has gone on, while this one stood still."""
    airflow_says(monkeypatch, state, None)
    job_id = emulator.create_scripted_job(Script(), execute=True)
    emulator.wait_job(job_id)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    waiting.task_instance = TaskInstance()  # type: ignore[assignment]
    await waiting.on_kill()
    assert emulator.journal.count("Cancel") == 0


@pytest.mark.parametrize("stream_logs", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.5])
async def test_a_kill_in_the_middle_of_a_slow_poll_is_not_lost(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, seconds: float, stream_logs: bool
) -> None:
    """gRPC puts a CancelledError of its own in the place of Airflow's, whose message has on_kill() called."""
    airflow_says(monkeypatch, "failed", None)
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    emulator.faults.inject("Operation.Get", delay=4.0)
    waiting = trigger(emulator, job_id, on_kill_action="cancel", stream_logs=stream_logs)
    waiting.task_instance = TaskInstance()  # type: ignore[assignment]
    running = asyncio.create_task(event_of(waiting))
    await until(lambda: has_poll_in_flight(emulator))
    await asyncio.sleep(seconds)
    await ended_by_airflow(waiting, running)
    assert emulator.journal.count("Cancel") == 1


async def test_a_stopping_triggerer_cancels_nothing(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(ENDLESS, execute=True)
    waiting = trigger(emulator, job_id, on_kill_action="cancel")
    running = asyncio.create_task(event_of(waiting))
    await until(lambda: emulator.journal.count("Operation.Get"))
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


async def test_a_job_that_nobody_knows_any_more_is_lost(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling_module, "NOT_FOUND_GRACE_SECONDS", 0.2)
    job_id = emulator.create_scripted_job(Script(), execute=True)
    emulator.wait_job(job_id)
    operation_id = emulator.operation_of(job_id)
    emulator.delete_job(job_id)
    emulator.forget_operation(operation_id)
    event = await event_of(DataSphereJobTrigger(job_id, operation_id, link="https://job"))
    assert event["status"] == "lost"
    assert job_id in event["message"]
    assert "https://job" in event["message"]


async def test_a_connection_that_can_not_be_read_is_told_of_with_the_job(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "CONNECT_TIMEOUT", 0.1)
    event = await event_of(DataSphereJobTrigger("bt1job", datasphere_conn_id="no_such_connection"))
    assert event["status"] == "lost"
    assert "no_such_connection" in event["message"]
    assert "CancelJobOperator(job_id='bt1job')" in event["message"]


async def test_a_connection_that_can_not_be_read_for_a_moment_is_asked_for_again(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    job_id = emulator.create_scripted_job(Script(), execute=True)
    value = os.environ.pop("AIRFLOW_CONN_DATASPHERE_DEFAULT")
    waiting = asyncio.create_task(event_of(trigger(emulator, job_id)))
    await until(lambda: any("Failed to read connection" in line for line in lines))
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", value)
    assert (await waiting)["status"] == "ended"


async def test_many_triggers_share_one_connection(emulator: Emulator) -> None:
    jobs = [emulator.create_scripted_job(Script(executing_seconds=1.0), execute=True) for _ in range(40)]
    events = await asyncio.gather(*(event_of(trigger(emulator, job_id)) for job_id in jobs))
    assert {event["status"] for event in events} == {"ended"}
    polls = emulator.journal.calls("Operation.Get")
    assert {call.operation_id for call in polls} == {emulator.operation_of(job_id) for job_id in jobs}
    assert len({call.peer for call in polls}) == 1


async def test_polls_take_turns(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway refuses streams beyond its limit: those of a triggerer that starts, or whose loop was held up."""
    monkeypatch.setattr("airflow_provider_datasphere.client.connection.channels.POLLS_AT_ONCE", 3)
    monkeypatch.setattr("airflow_provider_datasphere.triggers.asyncio_tasks.START_STAGGER_SECONDS", 0.0)
    jobs = [emulator.create_scripted_job(Script(), execute=True) for _ in range(10)]
    hanging = Fault("Operation.Get", hang=True)
    emulator.faults.add(hanging)
    waits = [asyncio.create_task(event_of(trigger(emulator, job_id))) for job_id in jobs]
    await until(lambda: hanging.matched == 3)
    client = await DataSphereHook().aget_client()
    assert (await client.get(jobs[0])).id == jobs[0]  # other calls don't wait for their turn
    assert hanging.matched == 3
    emulator.faults.remove(hanging.id)
    assert {(await wait)["status"] for wait in waits} == {"ended"}


async def test_one_begins_at_once_and_many_one_after_the_other(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    triggers = import_module("airflow_provider_datasphere.triggers.asyncio_tasks")
    monkeypatch.setattr(triggers, "START_STAGGER_SECONDS", 3600.0)
    monkeypatch.setattr(triggers, "_next_start", 0.0)
    first, second = (emulator.create_scripted_job(Script(), execute=True) for _ in range(2))
    waits = [asyncio.create_task(event_of(trigger(emulator, job_id, stream_logs=True))) for job_id in (first, second)]
    assert (await waits[0])["status"] == "ended"
    assert not waits[1].done()
    polled = {call.operation_id for call in emulator.journal.calls("Operation.Get")}
    assert polled == {emulator.operation_of(first)}
    assert emulator.journal.calls("ReadLogs", job_id=second) == []
    waits[1].cancel()
