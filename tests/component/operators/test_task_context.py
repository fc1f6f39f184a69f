"""Operators whose execute() is called by something else than Airflow: no task at all, or another task's code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_datasphere.compat import AirflowException, TaskDeferred
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor
from airflow_side import connect, context_of
from datasphere_emulator import Emulator, Script

QUICK = Script(executing_seconds=0.2)
WARNING = "is executed inside the task 'outer', which Airflow would resume in its place"


@pytest.fixture
def emulator(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    connect(emulator, monkeypatch)
    return emulator


def inside(task: Any, **outer: Any) -> Any:
    """The context of another task that executes ``task``."""
    context = context_of(task)
    context["task"] = SimpleNamespace(**{"task_id": "outer", "retries": 0, **outer})
    return context


def fork(emulator: Emulator, **options: Any) -> ForkJobOperator:
    source = emulator.create_scripted_job(QUICK)
    return ForkJobOperator(task_id="fork", source_job_id=source, deferrable=True, poll_interval=0.2, **options)


@pytest.mark.parametrize("outer_id", ["outer", "fork"])
def test_a_fork_inside_another_task_waits_on_the_worker(
    emulator: Emulator, capsys: pytest.CaptureFixture[str], outer_id: str
) -> None:
    task = fork(emulator)
    context = inside(task, task_id=outer_id)
    job_id = task.execute(context)
    assert context["ti"].xcoms["result"]["status"] == "SUCCESS"
    assert context["ti"].xcoms["job_id"] == job_id
    assert emulator.journal.count("Execute") == 1
    assert WARNING.replace("outer", outer_id) in capsys.readouterr().out


@pytest.mark.parametrize("outer", [{"execute_complete": print}, {"operator_class": ForkJobOperator}])
def test_a_task_that_can_be_resumed_is_deferred(emulator: Emulator, outer: dict[str, Any]) -> None:
    task = fork(emulator)
    with pytest.raises(TaskDeferred):
        task.execute(inside(task, **outer))


@pytest.mark.parametrize("options", [{"deferrable": True}, {"mode": "reschedule"}])
def test_a_sensor_inside_another_task_pokes(
    emulator: Emulator, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    job_id = emulator.create_scripted_job(QUICK, execute=True)
    task = DataSphereJobSensor(
        **{"task_id": "wait", "job_id": job_id, "poke_interval": 0.1, "deferrable": False, **options}
    )
    assert task.execute(inside(task))["status"] == "SUCCESS"
    assert WARNING in capsys.readouterr().out


def test_a_sensor_of_its_own_task_is_rescheduled(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    task = DataSphereJobSensor(task_id="wait", job_id=job_id, deferrable=False)
    with pytest.raises(AirflowException) as caught:
        task.execute(context_of(task))
    assert type(caught.value).__name__ == "AirflowRescheduleException"


def test_outside_a_task_it_is_said_what_to_do_instead(emulator: Emulator) -> None:
    tasks: list[Any] = [fork(emulator), DataSphereJobSensor(task_id="wait", job_id="bt1job", mode="poke")]
    for task in tasks:
        expected = rf"^{type(task).__name__} must run in a task\. .*dag\.test\(\).*fork_job"
        with pytest.raises(JobRequestError, match=expected):
            task.execute({})
    nothing: Any = {}
    with pytest.raises(JobRequestError, match="DataSphereJobSensor must run in a task"):
        tasks[1].poke(nothing)
    assert emulator.journal.calls() == []
