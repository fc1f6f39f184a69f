"""What only a real Airflow can show: time limits across reschedules, teardowns, mapping, connections, the examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from datasphere_emulator import Emulator, Script
from harness import RealAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "example_dags"
EXAMPLE_DAGS = ("fork_job_async", "fork_job_deferrable", "fork_job_mapped")
DAGS = ("time_limits", "teardowns", "mapped", "wrong")

SOURCE = '''
"""Tasks of the provider, as a DAG's author writes them."""
from datetime import datetime, timedelta

try:
    from airflow.sdk import DAG, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task

from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

ENDLESS, QUICK, SLOW, FAILING = "@ENDLESS@", "@QUICK@", "@SLOW@", "@FAILING@"
DEFAULTS = {
    "datasphere_conn_id": "ds_tasks", "poll_interval": 0.5, "poke_interval": 1, "retry_delay": timedelta(seconds=0.1)
}


def dag(dag_id):
    return DAG(dag_id, schedule=None, start_date=datetime(2024, 1, 1), default_args=DEFAULTS)


with dag("time_limits"):
    for name, arguments in {
        "poke": {"mode": "poke"}, "reschedule": {"mode": "reschedule"}, "deferrable": {"deferrable": True}
    }.items():
        for soft_fail in (False, True):
            DataSphereJobSensor(
                task_id=f"{name}_{soft_fail}", job_id=ENDLESS, timeout=4, soft_fail=soft_fail, retries=1, **arguments
            )

with dag("teardowns"):
    started = ForkJobOperator(task_id="started", source_job_id=ENDLESS, wait_for_completion=False)
    gives_up = DataSphereJobSensor(task_id="gives_up", job_id=started.output, timeout=0, mode="poke")
    stop = CancelJobOperator(task_id="stop", job_id=started.output)
    started >> gives_up >> stop.as_teardown(setups=started)

    failed = ForkJobOperator(task_id="failed", source_job_id=FAILING)
    failed >> CancelJobOperator(task_id="after_failed", job_id=failed.output).as_teardown()
    failed_setup = ForkJobOperator(task_id="failed_setup", source_job_id=FAILING)
    skipped = CancelJobOperator(task_id="after_failed_setup", job_id=failed_setup.output)
    failed_setup >> skipped.as_teardown(setups=failed_setup)
    never = ForkJobOperator(task_id="never", source_job_id=QUICK, args={"NO_SUCH": "1"})
    never >> CancelJobOperator(task_id="after_never", job_id=never.output).as_teardown()

with dag("mapped"):

    @task
    def ranges():
        return [{"RANGE": "1"}, {"RANGE": "2"}, {"RANGE": "3"}]

    forks = ForkJobOperator.partial(
        task_id="forks", source_job_id=SLOW, deferrable=True, desc="range {{ task.args['RANGE'] }}"
    ).expand(args=ranges())
    DataSphereJobSensor.partial(task_id="sensors", deferrable=True).expand(job_id=forks.output)

with dag("wrong"):
    ForkJobOperator(task_id="no_connection", source_job_id=QUICK, datasphere_conn_id="no_such_connection")
    DataSphereJobSensor(task_id="no_job", job_id="{{ ti.xcom_pull(task_ids='no_connection') }}", retries=1)
'''


@dataclass
class Done:
    """All DAGs of this module, run once on one Airflow."""

    airflow: RealAirflow
    emulator: Emulator
    source: str
    runs: dict[str, str] = field(default_factory=dict)

    def states(self, dag_id: str) -> dict[str, str | None]:
        found = self.airflow.task_states(dag_id, self.runs[dag_id])
        return {f"{name}[{index}]" if index >= 0 else name: state for (name, index), state in found.items()}

    def log(self, dag_id: str, task_id: str, **where: Any) -> str:
        return self.airflow.task_log(dag_id, self.runs[dag_id], task_id, **where)

    def xcom(self, dag_id: str, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        return self.airflow.xcom(dag_id, self.runs[dag_id], task_id, key, map_index)


@pytest.fixture(scope="module")
def done(any_airflow: RealAirflow) -> Iterator[Done]:
    with Emulator() as emulator:
        quick = Script(executing_seconds=0.2, log=["hello from the job"])
        sources = {
            "ENDLESS": emulator.create_scripted_job(Script(never_ends=True), execute=True),
            "QUICK": emulator.create_scripted_job(quick, args={"RANGE": "10"}, outputs=["result.txt"]),
            # Long enough to be deferred.
            "SLOW": emulator.create_scripted_job(
                Script(executing_seconds=4.0, log=["hello from the job"]),
                args={"RANGE": "10"},
                outputs=["result.txt"],
            ),
            "FAILING": emulator.create_scripted_job(Script(return_code=7)),
        }
        text = SOURCE
        for name, job_id in sources.items():
            text = text.replace(f"@{name}@", job_id)
        # In Airflow's database, where the triggerer too has to ask for them.
        for conn_id in ("ds_tasks", "datasphere_default"):
            any_airflow.add_connection(conn_id, conn_type="datasphere", extra=emulator.connection_extra())
        any_airflow.set_variable("datasphere_source_job_id", sources["QUICK"])
        any_airflow.add_dag("tasks", text, DAGS)
        for name in EXAMPLE_DAGS:
            any_airflow.add_dag(name, (EXAMPLES / f"{name}.py").read_text())
        result = Done(any_airflow, emulator, sources["QUICK"])
        # One after another: how many tasks a machine can start at once is not the subject.
        for dag_id in (*DAGS, *EXAMPLE_DAGS):
            result.runs[dag_id] = any_airflow.run(dag_id, timeout=300)
        yield result


def test_a_sensors_time_limit_holds_in_every_mode_and_ends_no_job(done: Done) -> None:
    states = done.states("time_limits")
    modes = ("poke", "reschedule", "deferrable")
    assert states == {f"{mode}_{soft}": "skipped" if soft else "failed" for mode in modes for soft in (False, True)}
    for mode in modes:
        instance = done.airflow.task_instance("time_limits", done.runs["time_limits"], f"{mode}_False")
        assert instance["try_number"] == 1
        assert "AirflowSensorTimeout" in done.log("time_limits", f"{mode}_False")
    assert not [call for call in done.emulator.journal.calls("Cancel") if call.job_id == _endless(done)]


def _endless(done: Done) -> str:
    return done.emulator.jobs()[0].id


def test_a_teardown_ends_the_job_that_a_run_leaves_behind(done: Done) -> None:
    states = done.states("teardowns")
    assert (states["started"], states["gives_up"], states["stop"]) == ("success", "failed", "success")
    job_id = done.xcom("teardowns", "started")
    assert done.emulator.wait_job(job_id, "CANCELLED").id == job_id
    assert done.emulator.journal.count("Cancel", job_id=job_id) == 1


def test_a_teardown_of_a_failed_fork(done: Done) -> None:
    states = done.states("teardowns")
    assert (states["failed"], states["after_failed"]) == ("failed", "success")
    job_id = done.xcom("teardowns", "failed")
    assert f"Job {job_id} is ERROR already; nothing to cancel." in done.log("teardowns", "after_failed")
    # A fork that never got a job.
    assert (states["never"], states["after_never"]) == ("failed", "success")
    assert "No job to cancel." in done.log("teardowns", "after_never")
    # Airflow's own rule, which docs/fork.md warns of.
    assert (states["failed_setup"], states["after_failed_setup"]) in {
        ("failed", "skipped"),
        ("failed", "upstream_failed"),
    }


def test_mapping_over_arguments_and_over_jobs(done: Done) -> None:
    assert set(done.states("mapped").values()) == {"success"}
    jobs = [done.xcom("mapped", "forks", map_index=index) for index in range(3)]
    assert len(set(jobs)) == 3
    for index, job_id in enumerate(jobs):
        job = done.emulator.job(job_id)
        assert [argument.value for argument in job.job_parameters.arguments] == [str(index + 1)]
        assert job.desc.startswith(f"range {index + 1} [")
        assert done.xcom("mapped", "forks", "result", index)["job_id"] == job_id
        assert done.xcom("mapped", "sensors", "result", index)["job_id"] == job_id
        assert job_id in done.airflow.links("mapped", done.runs["mapped"], "forks", index)["DataSphere job"]  # type: ignore[operator]


def test_a_deferred_tasks_log_is_whole_and_in_order(done: Done) -> None:
    log = done.log("mapped", "forks", map_index=0)
    parts = [
        f"Job {done.xcom('mapped', 'forks', map_index=0)}: ",
        "in the triggerer.",
        "from its beginning",
        "hello from the job",
        "succeeded. Output files: 1.",
    ]
    positions = [log.find(part) for part in parts]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert log.count("hello from the job") == 1


def test_what_is_wrong_is_said(done: Done) -> None:
    assert set(done.states("wrong").values()) == {"failed"}
    assert "no_such_connection" in done.log("wrong", "no_connection")
    assert "job_id is 'None': give the id of a DataSphere job" in done.log("wrong", "no_job")
    assert done.airflow.task_instance("wrong", done.runs["wrong"], "no_job")["try_number"] == 1


@pytest.mark.parametrize("dag_id", EXAMPLE_DAGS)
def test_the_examples_run(done: Done, dag_id: str) -> None:
    assert set(done.states(dag_id).values()) == {"success"}


def test_the_asynchronous_example_handles_the_result(done: Done) -> None:
    job_id = done.xcom("fork_job_async", "fork_job")
    assert done.xcom("fork_job_async", "wait_for_job")["job_id"] == job_id
    assert f"Job {job_id} ended with return code 0" in done.log("fork_job_async", "handle_result")
    assert "It made result.txt" in done.log("fork_job_async", "handle_result")
    assert done.emulator.journal.count("Cancel", job_id=job_id) == 0


def test_the_mapped_example_forks_one_job_for_each_list_item(done: Done) -> None:
    jobs = [done.xcom("fork_job_mapped", "fork_job", map_index=index) for index in range(3)]
    names = [done.emulator.job(job_id).name for job_id in jobs]
    assert names == ["range 1", "range 2", "range 3"]
    assert all(job_id in done.log("fork_job_mapped", "collect") for job_id in jobs)
