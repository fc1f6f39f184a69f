"""What this project rests on in Airflow itself: what a try is told after a retry, a crash, a clear and a deferral.

``generation.key_of`` takes ``max_tries`` for the number of a generation: a person's clear changes it, Airflow's own
retries don't. XComs can't carry a job's id to the next try; the task state store, where there is one, does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import NEWEST, SUPPORTED, RealAirflow

#: `make test-long` asks the others too.
USUAL = {"2.11.2", NEWEST}

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(600)]

SOURCE = '''
"""Tasks that write down what they see, leave something for later tries, and then do as they are called."""
import json
import time
from datetime import datetime, timedelta
from pathlib import Path

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow.models.dag import DAG

from airflow.triggers.temporal import TimeDeltaTrigger

from airflow_provider_datasphere.compat import BaseOperator

FOLDER = Path("@FOLDER@")


class Tell(BaseOperator):
    def execute(self, context):
        # Not by its number: a try that Airflow loses before it has begun has a number too.
        again = (FOLDER / self.task_id).exists()
        seen = self.look(context, "begin")
        ti, store = context["ti"], context.get("task_state_store")
        ti.xcom_push(key="mark", value=f"of try {ti.try_number}")
        if store is not None:
            store.set("mark", f"of try {ti.try_number}")
        self.tell(seen)  # now: what waits for this word kills the task at once
        if self.task_id in ("deferred", "deferred_failed"):
            self.defer(trigger=TimeDeltaTrigger(timedelta(seconds=2)), method_name="resume")
        if again or self.task_id == "green":
            return
        if self.task_id in ("retried", "failed"):
            raise RuntimeError("on purpose")
        time.sleep(600)  # until somebody kills or clears it

    def resume(self, context, event=None):
        self.tell(self.look(context, "resumed"))
        if self.task_id == "deferred_failed" and context["ti"].try_number == 1:
            raise RuntimeError("on purpose")

    def look(self, context, leg):
        ti, store = context["ti"], context.get("task_state_store")
        return {
            "leg": leg,
            "try_number": ti.try_number,
            "max_tries": ti.max_tries,
            "xcom": ti.xcom_pull(task_ids=self.task_id, key="mark"),
            "store": store.get("mark") if store is not None else "no store",
        }

    def tell(self, seen):
        with (FOLDER / self.task_id).open("a") as file:
            file.write(json.dumps(seen) + "\\n")


with DAG("facts", schedule=None, start_date=datetime(2024, 1, 1)):
    for task_id, retries in {
        "retried": 1,
        "killed": 1,
        "deferred": 1,
        "deferred_failed": 1,
        "failed": 0,
        "green": 0,
        "running": 0,
        "running_with_retry": 2,
    }.items():
        Tell(task_id=task_id, retries=retries, retry_delay=timedelta(seconds=0.1))
'''


# On a machine that stands still for a while a task's report that is late isn't lost.
PATIENT = {"AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "30"}


class Facts:
    """What the tasks have written down."""

    def __init__(self, airflow: RealAirflow, folder: Path) -> None:
        self.version = tuple(int(part) for part in airflow.version.split(".")[:2])
        #: What Airflow 3.0 never tries again, and the state in which it leaves it.
        self.stuck = (
            {"killed": "failed", "running": "restarting", "running_with_retry": "restarting"}
            if self.version == (3, 0)
            else {}
        )
        #: How each task stood at the end.
        self.states: dict[str, str | None] = {}
        self._folder = folder

    def both_of(self, task_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
        if task_id in self.stuck:
            pytest.skip(f"Airflow 3.0 leaves it {self.stuck[task_id]}")
        # A try that a slow machine loses before it has said a word is none that these facts are about.
        first, *_, second = self.of(task_id)
        return first, second

    def of(self, task_id: str) -> list[dict[str, Any]]:
        path = self._folder / task_id
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def has_store(self) -> bool:
        return self.version >= (3, 3)


@pytest.fixture(
    scope="module",
    params=[version if version in USUAL else pytest.param(version, marks=pytest.mark.long) for version in SUPPORTED],
)
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Facts]:
    folder = tmp_path_factory.mktemp("facts")
    with RealAirflow(request.param, env=PATIENT) as airflow:
        airflow.add_dag("facts", SOURCE.replace("@FOLDER@", str(folder)))
        seen = Facts(airflow, folder)
        run_id = airflow.trigger("facts")

        def told(task_id: str, times: int) -> None:
            airflow.until(lambda: len(seen.of(task_id)) >= times, 120, f"word {times} of {task_id}")

        told("killed", 1)
        airflow.task_process("facts", run_id, "killed").kill()
        for task_id in ("running", "running_with_retry"):
            told(task_id, 1)
            airflow.wait_task("facts", run_id, task_id, "running")
            airflow.clear("facts", run_id, task_id)
        for task_id, state in (("green", "success"), ("failed", "failed")):
            airflow.wait_task("facts", run_id, task_id, state, timeout=180)
            airflow.clear("facts", run_id, task_id)
        tasks = ("retried", "killed", "deferred", "failed", "green", "running", "running_with_retry")
        for task_id in tasks:
            if task_id not in seen.stuck:
                told(task_id, 2)
        airflow.wait_task("facts", run_id, "deferred_failed", "success", timeout=180, try_number=2)
        for task_id, state in seen.stuck.items():
            airflow.wait_task("facts", run_id, task_id, state)
        if not seen.stuck:
            airflow.wait_run("facts", run_id)
        seen.states = {task_id: airflow.state("facts", run_id, task_id) for task_id in tasks}
        yield seen


@pytest.mark.parametrize("task_id", ["retried", "killed"])
def test_a_retry_is_of_the_same_generation(facts: Facts, task_id: str) -> None:
    first, second = facts.both_of(task_id)
    assert first["try_number"] == 1 < second["try_number"]
    assert first["max_tries"] == second["max_tries"] == 1


@pytest.mark.parametrize("task_id", ["failed", "green"])
def test_a_clear_begins_a_new_generation(facts: Facts, task_id: str) -> None:
    first, second = facts.both_of(task_id)
    assert first["try_number"] == 1 < second["try_number"]
    assert (first["max_tries"], second["max_tries"]) == (0, 1)


def test_a_clear_of_a_running_task(facts: Facts) -> None:
    """The known gap: before 3.1 it begins no new generation by that number, and on 3.1+ it does so only where the
    killed process counts as ended well. So the kill has to end the job (docs/retries.md).
    """
    for task_id, retries in (("running", 0), ("running_with_retry", 2)):
        first, second = facts.both_of(task_id)
        assert (first["try_number"], second["try_number"]) == (1, 2)
        assert first["max_tries"] == retries
        assert second["max_tries"] in ({retries, retries + 1} if facts.version >= (3, 1) else {retries})


def test_only_the_store_reaches_the_next_try(facts: Facts) -> None:
    for task_id in {"retried", "killed", "failed", "green"} - {*facts.stuck}:
        first, second = facts.both_of(task_id)
        assert (first["xcom"], second["xcom"]) == (None, None)
        if facts.has_store:
            assert (first["store"], second["store"]) == (None, "of try 1")
        else:
            assert second["store"] == "no store"


def test_a_deferral_is_one_try(facts: Facts) -> None:
    first, second = facts.of("deferred")[-2:]
    assert (first["leg"], second["leg"]) == ("begin", "resumed")
    assert first["try_number"] == second["try_number"]
    assert first["max_tries"] == second["max_tries"] == 1
    assert second["xcom"] == f"of try {first['try_number']}"


def test_a_retry_after_a_failed_deferral(facts: Facts) -> None:
    """Airflow 3.0 resumes it from the old deferral, old event and all (see ``compat.resumed_by_this_try``)."""
    legs = [(seen["try_number"], seen["leg"]) for seen in facts.of("deferred_failed")]
    anew = [] if facts.version == (3, 0) else [(2, "begin")]
    assert legs == [(1, "begin"), (1, "resumed"), *anew, (2, "resumed")]


def test_what_is_never_tried_again(facts: Facts) -> None:
    """Airflow 3.0 fails a killed task whatever its ``retries``, and forgets a running one that was cleared."""
    assert {task_id: state for task_id, state in facts.states.items() if state != "success"} == facts.stuck
    assert [len(facts.of(task_id)) for task_id in facts.stuck] == [1] * len(facts.stuck)
