"""Two triggerers: triggers that move from one to the other cancel nothing, and a person's act is never lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datasphere_emulator import Emulator, Script
from harness import RealAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

PATIENCE = 240.0
TRIGGERERS = ("triggerer", "triggerer@2")

DAG = """
from __future__ import annotations

from datetime import datetime

from airflow.sdk import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

with DAG("{dag_id}", schedule=None, start_date=datetime(2024, 1, 1)):
    ForkJobOperator.partial(
        task_id="fork",
        source_job_id="{source}",
        deferrable=True,
        poll_interval=1,
        stream_logs={logs},
        retries=2,
        datasphere_conn_id="two_triggerers",
    ).expand(name=[f"job {{number}}" for number in range({count})])
"""


@pytest.fixture(scope="module")
def airflow() -> Iterator[RealAirflow]:
    # On a busy machine a fresh triggerer stands still for longer than the harness' five seconds.
    with RealAirflow(env={"AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "12"}) as airflow:
        airflow.components.start("triggerer@2")
        airflow.until(lambda: len(triggerer_ids(airflow)) == len(TRIGGERERS), PATIENCE, "second triggerer")
        yield airflow


@pytest.fixture
def emulator(airflow: RealAirflow) -> Iterator[Emulator]:
    with Emulator() as emulator:
        airflow.add_connection("two_triggerers", conn_type="datasphere", extra=emulator.connection_extra())
        yield emulator


def owners(airflow: RealAirflow) -> Counter[int | None]:
    """How many triggers each triggerer has, by the id of its job."""
    return Counter(row[0] for row in airflow.home.query("select triggerer_id from trigger"))


def triggerer_ids(airflow: RealAirflow) -> list[int]:
    """The ids that Airflow's database has for the triggerers, in the order in which they were started."""
    rows = airflow.home.query("select id from job where job_type = 'TriggererJob' order by id")
    return [int(row[0]) for row in rows]


def until(airflow: RealAirflow, condition: Callable[[], object], what: str) -> None:
    airflow.until(condition, PATIENCE, what, interval=0.5)


@pytest.mark.parametrize("rounds", [2, pytest.param(5, marks=pytest.mark.long)])
def test_triggers_that_are_handed_over_cancel_nothing(
    airflow: RealAirflow, emulator: Emulator, tmp_path: Path, rounds: int
) -> None:
    """A triggerer that stood still comes back, and Airflow calls on_kill() on all that it had."""
    flag, count, dag_id = tmp_path / "ends", 5, f"hand_over_{rounds}"
    source = emulator.create_job(f"echo the first line; until [ -e {flag} ]; do sleep 0.2; done; echo the last line")
    airflow.add_dag(dag_id, DAG.format(dag_id=dag_id, source=source, logs=True, count=count))
    run_id = airflow.trigger(dag_id)
    ids = dict(zip(TRIGGERERS, triggerer_ids(airflow), strict=True))

    def watched_once() -> bool:
        """Whether each job's log is read by one triggerer, and no other does any more."""
        reading = Counter(call.job_id for call in emulator.journal.calls("ReadLogs") if not call.finished)
        return reading == Counter({job.id: 1 for job in emulator.jobs(source)}) and len(reading) == count

    def all_owned_by(job_id: int) -> bool:
        return owners(airflow) == {job_id: count}

    until(airflow, lambda: sum(owners(airflow).values()) == count and watched_once(), "deferred tasks")
    for _ in range(rounds):
        # Each in turn, so that at the end of a round the other one has them all.
        for name, other in (TRIGGERERS, TRIGGERERS[::-1]):
            airflow.components.freeze(name)
            until(airflow, lambda other=other: all_owned_by(ids[other]), "take-over")
            airflow.components.thaw(name)
            until(airflow, watched_once, "end of the old triggers")
    assert emulator.journal.calls("Cancel") == []
    flag.touch()
    assert airflow.wait_run(dag_id, run_id, PATIENCE) == "success"
    assert emulator.journal.calls("Cancel") == []
    assert [emulator.executions(job.id) for job in emulator.jobs(source)] == [1] * count
    for index in range(count):
        log = airflow.task_log(dag_id, run_id, "fork", map_index=index)
        assert "the first line" in log
        assert "the last line" in log


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.long)])
def test_each_act_of_a_person_is_one_cancel_however_slow_the_service_is(
    airflow: RealAirflow, emulator: Emulator, times: int
) -> None:
    """Each poll takes four seconds, so that nearly every act comes in the middle of one."""
    dag_id, count = f"persons_acts_{times}", 3 * times
    source = emulator.create_scripted_job(Script(never_ends=True))
    airflow.add_dag(dag_id, DAG.format(dag_id=dag_id, source=source, logs=False, count=count))
    emulator.faults.inject("Operation.Get", delay=4.0)
    run_id = airflow.trigger(dag_id)
    until(airflow, lambda: set(airflow.task_states(dag_id, run_id).values()) == {"deferred"}, "deferred tasks")
    jobs = {int(job.name.split()[1]): job.id for job in emulator.jobs(source)}
    assert len(jobs) == count

    # The worker polls once before it defers, and a triggerer must have taken the trigger before somebody acts.
    emulator.journal.clear()

    def polled(job: str) -> bool:
        return bool(emulator.journal.calls("Operation.Get", operation_id=emulator.operation_of(job)))

    until(airflow, lambda: all(map(polled, jobs.values())), "polls of the triggerers")
    for index in range(count):
        act = index % 3
        if act == 0:
            airflow.set_task_state(dag_id, run_id, "fork", "failed", index)
        elif act == 1:
            airflow.set_task_state(dag_id, run_id, "fork", "success", index)
        else:
            airflow.clear(dag_id, run_id, "fork", map_index=index)
        time.sleep(0.2)
    try:
        until(airflow, lambda: {emulator.job(job).status for job in jobs.values()} == {6}, "cancelled jobs")
    except TimeoutError as error:
        states = airflow.task_states(dag_id, run_id)
        missed = [
            (index, states["fork", index], airflow.task_log(dag_id, run_id, "fork", map_index=index)[-1500:])
            for index, job in jobs.items()
            if emulator.job(job).status != 6
        ]
        raise AssertionError(f"{error}: {missed}") from None
    # Each clear has made a job of its own, which nobody touches.
    until(airflow, lambda: len(emulator.jobs(source)) == count + times, "new jobs")
    until(airflow, lambda: Counter(airflow.task_states(dag_id, run_id).values())["deferred"] == times, "new waits")
    cancels = emulator.journal.calls("Cancel")
    assert Counter(call.job_id for call in cancels) == Counter(jobs.values())
    assert {call.code for call in cancels} == {"OK"}
    for job in emulator.jobs(source)[count:]:
        emulator.cancel_job(job.id)
    assert airflow.wait_run(dag_id, run_id, PATIENCE) == "failed"
