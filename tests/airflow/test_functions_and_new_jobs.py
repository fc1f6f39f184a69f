"""Functions as jobs and new jobs on real Airflows: states, return values and XComs, blocking and deferred alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator
from harness import RealAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "example_dags"
PATIENCE = 240.0
MODES = ("blocking", "deferred")

DAGS = '''
import os
from datetime import datetime, timedelta

try:
    from airflow.sdk import DAG, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task

from airflow_provider_datasphere.operators.jobs import ExecuteJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

options = {"schedule": None, "start_date": datetime(2024, 1, 1)}
defaults = {"datasphere_conn_id": "functions", "poll_interval": 0.5, "retry_delay": timedelta(seconds=1)}

for mode in ("blocking", "deferred"):
    deferrable = mode == "deferred"
    with DAG(f"functions_{mode}", default_args=defaults, **options) as functions:

        @task
        def numbers():
            return [1, 2]

        @task.datasphere(deferrable=deferrable, multiple_outputs=True)
        def several(run_id, params=None):
            """The page shows this."""
            return {"a": run_id, "b": [1, {"c": None}], "c": dict(params)}

        @task.datasphere(deferrable=deferrable)
        def mapped(x, y=10):
            return x * y

        @task.datasphere(deferrable=deferrable)
        def reduced(values):
            return sum(values)

        @task.datasphere(deferrable=deferrable)
        def nothing():
            pass

        @task.datasphere(deferrable=deferrable)
        def raising():
            raise ValueError("the words of the error")

        @task.datasphere(deferrable=deferrable)
        def skipped():
            from airflow_provider_datasphere.job import skip

            skip("nothing to do")

        several()
        reduced(mapped.partial(y=100).expand(x=numbers()))
        nothing()
        raising()
        skipped()

    with DAG(f"killed_{mode}", default_args={**defaults, "retries": 2}, **options) as killed:

        @task.datasphere(deferrable=deferrable)
        def long(go):
            import os
            import time

            print("it runs", flush=True)
            while not os.path.exists(go):
                time.sleep(0.1)
            return "the one result"

        long("{{ dag_run.conf['go'] }}")

    with DAG(f"new_{mode}", default_args=defaults, **options) as new:
        made = ExecuteJobOperator.partial(
            task_id="made",
            config={"cmd": "echo ${N} > ${OUT}", "args": {"N": "{{ run_id }}"}, "outputs": [{"out.txt": "OUT"}]},
            name="made in {{ run_id }}",
            deferrable=deferrable,
        ).expand(args=[{"N": "1"}, {"N": "2"}])
        file = ExecuteJobOperator(
            task_id="file", config="train/config.yaml", args={"ROWS": "24"}, deferrable=deferrable
        )
        DataSphereJobSensor(task_id="sensor", job_id=file.output, deferrable=deferrable)
        wrong = ExecuteJobOperator(task_id="wrong", config="wrong.yaml")
    globals().update({dag.dag_id: dag for dag in (functions, killed, new)})
'''


@dataclass(frozen=True)
class Stage:
    airflow: RealAirflow
    emulator: Emulator


@pytest.fixture(scope="module")
def stage(any_airflow: RealAirflow) -> Iterator[Stage]:
    with Emulator() as emulator:
        any_airflow.add_connection("functions", conn_type="datasphere", extra=emulator.connection_extra())
        dags = any_airflow.home.dags
        shutil.copytree(EXAMPLES / "train", dags / "train", dirs_exist_ok=True)
        (dags / "wrong.yaml").write_text("cmd: echo ${X}\nouputs: []\n")
        names = [f"{name}_{mode}" for name in ("functions", "killed", "new") for mode in MODES]
        any_airflow.add_dag("functions_and_new_jobs", DAGS, names)
        yield Stage(any_airflow, emulator)


def test_functions_end_alike_in_both_modes(stage: Stage) -> None:
    airflow = stage.airflow
    runs = {mode: airflow.trigger(f"functions_{mode}") for mode in MODES}
    for mode, run in runs.items():
        dag_id = f"functions_{mode}"
        airflow.wait_run(dag_id, run, PATIENCE)
        states = airflow.task_states(dag_id, run)
        log = airflow.task_log(dag_id, run, "raising")
        expected = {
            ("numbers", -1): "success",
            ("several", -1): "success",
            ("mapped", 0): "success",
            ("mapped", 1): "success",
            ("reduced", -1): "success",
            ("nothing", -1): "success",
            ("raising", -1): "failed",
            ("skipped", -1): "skipped",
        }
        assert states == expected, log
        several = airflow.xcoms(dag_id, run, "several")
        assert several["b"] == [1, {"c": None}]
        assert several["a"] == several["return_value"]["a"] == run
        assert several["return_value"]["c"] == {}
        assert several["result"]["status"] == "SUCCESS"
        assert several["job_id"] == several["result"]["job_id"]
        assert several["operation_id"] == stage.emulator.operation_of(several["job_id"])
        assert [airflow.xcom(dag_id, run, "mapped", map_index=index) for index in range(2)] == [100, 200]
        assert airflow.xcom(dag_id, run, "reduced") == 300
        for task_id in ("nothing", "raising", "skipped"):
            assert airflow.xcom(dag_id, run, task_id) is None
        assert "raising raised ValueError: the words of the error" in log
        assert 'raise ValueError("the words of the error")' in log
        assert "RemoteError" in log


def test_a_function_whose_worker_dies_runs_once(stage: Stage, tmp_path: Path) -> None:
    airflow, emulator = stage.airflow, stage.emulator
    for mode in MODES:
        dag_id, go = f"killed_{mode}", tmp_path / mode
        before = {job.id for job in emulator.jobs()}
        run = airflow.trigger(dag_id, {"go": str(go)})

        def made(before: set[str] = before) -> list[jobs_pb2.Job]:
            return [job for job in emulator.jobs() if job.id not in before]

        airflow.until(lambda: any(job.status == jobs_pb2.EXECUTING for job in made()), PATIENCE, "a running job")
        if mode == "blocking":
            airflow.task_process(dag_id, run, "long").kill()
        else:
            airflow.wait_task(dag_id, run, "long", "deferred", timeout=PATIENCE)
            airflow.kill("triggerer")
            airflow.start("triggerer", wait=False)
        go.touch()
        assert airflow.wait_run(dag_id, run, PATIENCE) == "success", airflow.task_log(dag_id, run, "long", 2)
        assert airflow.xcom(dag_id, run, "long") == "the one result"
        (job,) = made()
        assert emulator.executions(job.id) == 1
    assert emulator.journal.calls("Cancel") == []


def test_new_jobs_end_alike_in_both_modes(stage: Stage) -> None:
    airflow, emulator = stage.airflow, stage.emulator
    runs = {mode: airflow.trigger(f"new_{mode}") for mode in MODES}
    for mode, run in runs.items():
        dag_id = f"new_{mode}"
        airflow.wait_run(dag_id, run, PATIENCE)
        states = airflow.task_states(dag_id, run)
        assert states == {
            ("made", 0): "success",
            ("made", 1): "success",
            ("file", -1): "success",
            ("sensor", -1): "success",
            ("wrong", -1): "failed",
        }, airflow.task_log(dag_id, run, "file")
        for index in range(2):
            job = emulator.job(airflow.xcom(dag_id, run, "made", map_index=index))
            assert [argument.value for argument in job.job_parameters.arguments] == [str(index + 1)]
            assert job.name == f"made in {run}"
        result = airflow.xcom(dag_id, run, "file", "result")
        assert [file["path"] for file in result["output_files"]] == ["model.json"]
        assert "Fitting a line to 24 hours" in airflow.task_log(dag_id, run, "file")
        rendered = airflow.rendered_fields(dag_id, run, "file")
        assert rendered["config"].startswith("# The job of train_from_config.py.")
        log = airflow.task_log(dag_id, run, "wrong")
        assert "wrong.yaml:1: cmd: ${X} is neither" in log
        assert "wrong.yaml:2: unknown key 'ouputs'; did you mean 'outputs'?" in log
        assert airflow.links(dag_id, run, "file")["DataSphere job"] == airflow.xcom(dag_id, run, "file", "job_url")


@pytest.mark.parametrize("name", ["train_from_config", "train_function"])
def test_the_examples_run(stage: Stage, name: str) -> None:
    airflow = stage.airflow
    airflow.add_connection("datasphere_default", conn_type="datasphere", extra=stage.emulator.connection_extra())
    airflow.add_dag(name, (EXAMPLES / f"{name}.py").read_text())
    run = airflow.trigger(name)
    assert airflow.wait_run(name, run, PATIENCE) == "success", airflow.task_log(name, run, "train")
    if name == "train_function":
        assert airflow.xcom(name, run, "forecast") > 5
