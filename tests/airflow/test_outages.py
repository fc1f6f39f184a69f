"""What a cluster goes through: an API server that is away, and two deployments that share one project."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasphere_emulator import Emulator, Script
from harness import RealAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

PATIENCE = 300.0

DAG = """
from __future__ import annotations

from datetime import datetime, timedelta

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow.models.dag import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

with DAG("{dag_id}", schedule=None, start_date=datetime(2024, 1, 1)):
    for mode in ("blocking", "deferred"):
        ForkJobOperator(
            task_id=mode,
            source_job_id="{source}",
            name=mode,
            deferrable=mode == "deferred",
            poll_interval=1,
            retries={retries},
            retry_delay=timedelta(seconds={delay}),
            datasphere_conn_id="outages",
        )
"""


@pytest.fixture(scope="module")
def second() -> Iterator[RealAirflow]:
    """Another deployment, of Airflow 2.11."""
    with RealAirflow("2.11.2") as airflow:
        yield airflow


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def test_an_api_server_that_is_away_for_a_minute_costs_no_job(
    airflow3: RealAirflow, emulator: Emulator, tmp_path: Path
) -> None:
    """Its supervisor ends the running task after half a minute of silence; tries are left."""
    flag = tmp_path / "ends"
    source = emulator.create_job(f"until [ -e {flag} ]; do sleep 0.2; done; echo the last line")
    airflow3.add_connection("outages", conn_type="datasphere", extra=emulator.connection_extra())
    airflow3.add_dag("outage", DAG.format(dag_id="outage", source=source, retries=5, delay=20))
    run_id = airflow3.trigger("outage")
    airflow3.wait_task("outage", run_id, "deferred", "deferred", PATIENCE)
    airflow3.until(lambda: {job.status for job in emulator.jobs(source)} == {2}, PATIENCE, "running jobs")
    process = airflow3.task_process("outage", run_id, "blocking")
    airflow3.kill("api-server", signal.SIGKILL)
    time.sleep(60)
    assert not process.is_running(), "the outage is meant to end the task"
    airflow3.start("api-server")
    flag.touch()
    assert airflow3.wait_run("outage", run_id, PATIENCE) == "success"
    assert emulator.journal.calls("Cancel") == []
    assert [emulator.executions(job.id) for job in emulator.jobs(source)] == [1, 1]


@pytest.mark.parametrize("honoured", [True, False], ids=["key-honoured", "key-ignored"])
def test_two_deployments_on_one_project_leave_each_other_alone(
    airflow3: RealAirflow, second: RealAirflow, emulator: Emulator, honoured: bool
) -> None:
    """The same DAG, run id and tasks, one with a state store and one without; then the same run once more.

    Each task's first job fails, so that its retry looks at what is there while the other deployment's job runs.
    """
    emulator.settings.idempotency = honoured
    fails, succeeds = Script(executing_seconds=3.0, return_code=1), Script(executing_seconds=8.0)
    source = emulator.create_scripted_job([*[fails] * 4, *[succeeds] * 4] * 2)
    dag_id, deployments = f"shared_{honoured}".lower(), (airflow3, second)
    for airflow in deployments:
        airflow.add_connection("outages", conn_type="datasphere", extra=emulator.connection_extra())
        airflow.add_dag(dag_id, DAG.format(dag_id=dag_id, source=source, retries=2, delay=1))
    before: set[str] = set()
    for _ in range(2):
        for airflow in deployments:
            airflow.trigger(dag_id, run_id="the_run")
        assert [airflow.wait_run(dag_id, "the_run", PATIENCE) for airflow in deployments] == ["success"] * 2
        tasks = [(airflow, task) for airflow in deployments for task in ("blocking", "deferred")]
        results = {airflow.xcom(dag_id, "the_run", task, "result")["job_id"] for airflow, task in tasks}
        assert len(results) == len(tasks), "each task of each deployment has a job of its own"
        assert not before & results, "a run that was deleted and triggered again is another run"
        before |= results
        for airflow in deployments:
            airflow.api.call("DELETE", f"/dags/{dag_id}/dagRuns/the_run")
    assert emulator.journal.calls("Cancel") == []
    assert [emulator.executions(job.id) for job in emulator.jobs(source)] == [1] * 16
