"""The harness itself: what the other tests build on works on Airflow 2.11 and the newest 3.x."""

from __future__ import annotations

import pytest

from harness import NEWEST, RealAirflow, airflow_venv, run_dags

pytestmark = pytest.mark.airflow

SOURCE = """
import datetime
import time

from airflow.models import BaseOperator
from airflow.models.dag import DAG
from airflow.triggers.temporal import TimeDeltaTrigger


class Wait(BaseOperator):
    def __init__(self, seconds, **kwargs):
        super().__init__(**kwargs)
        self.seconds = seconds

    def execute(self, context):
        self.log.info("going to wait")
        self.defer(trigger=TimeDeltaTrigger(datetime.timedelta(seconds=self.seconds)), method_name="resume")

    def resume(self, context, event=None):
        self.log.info("waited")
        return {"answer": 42}


class Sleep(BaseOperator):
    def execute(self, context):
        time.sleep(600)


with DAG("short", schedule=None, start_date=datetime.datetime(2024, 1, 1)) as short:
    Wait(task_id="wait", seconds=2)
    Wait.partial(task_id="mapped").expand(seconds=[1, 1])

with DAG("long", schedule=None, start_date=datetime.datetime(2024, 1, 1)) as long:
    Wait(task_id="wait", seconds=8, retries=1)
    Sleep(task_id="sleep")
"""


@pytest.fixture(scope="module")
def airflow(any_airflow: RealAirflow) -> RealAirflow:
    any_airflow.add_dag("harness", SOURCE, ["short", "long"])
    return any_airflow


def test_a_run_succeeds_with_log_and_xcoms(airflow: RealAirflow) -> None:
    run_id = airflow.trigger("short")
    assert airflow.wait_run("short", run_id) == "success"
    states = {("wait", -1): "success", ("mapped", 0): "success", ("mapped", 1): "success"}
    assert airflow.task_states("short", run_id) == states
    log = airflow.task_log("short", run_id, "wait")
    assert log.index("going to wait") < log.index("yielding event") < log.index("waited")
    assert "waited" in airflow.task_log("short", run_id, "mapped", map_index=1)
    assert airflow.xcom("short", run_id, "mapped", map_index=1) == {"answer": 42}
    assert airflow.xcoms("short", run_id, "wait") == {"return_value": {"answer": 42}}
    assert airflow.xcom("short", run_id, "wait", "none such") is None


def test_a_deferred_task_survives_a_killed_triggerer_and_is_cleared(airflow: RealAirflow) -> None:
    run_id = airflow.trigger("long")
    airflow.wait_task("long", run_id, "wait", "deferred")
    airflow.kill("triggerer")
    airflow.start("triggerer")
    process = airflow.task_process("long", run_id, "sleep")
    supervisor = process.parent()
    assert supervisor is not None
    airflow.set_task_state("long", run_id, "sleep", "failed")
    process.wait(60)
    assert airflow.wait_task("long", run_id, "wait") == "success"

    airflow.clear("long", run_id, "wait")
    airflow.wait_task("long", run_id, "wait", "deferred", try_number=2)
    airflow.set_task_state("long", run_id, "wait", "failed")
    assert airflow.wait_run("long", run_id) == "failed"
    assert airflow.task_instance("long", run_id, "wait")["max_tries"] == 2


def test_a_killed_task_is_noticed(airflow: RealAirflow) -> None:
    run_id = airflow.trigger("long")
    airflow.task_process("long", run_id, "sleep").kill()
    assert airflow.wait_task("long", run_id, "sleep") == "failed"
    airflow.set_task_state("long", run_id, "wait", "success")


def test_connections_and_variables_reach_tasks(airflow: RealAirflow) -> None:
    airflow.add_connection("somewhere", conn_type="http", host="example.test", extra={"kind": "first"})
    airflow.add_connection("somewhere", conn_type="http", host="example.test", extra={"kind": "second"})
    airflow.set_variable("colour", "green")
    source = """
    import datetime

    from airflow.models import Variable
    from airflow.models.dag import DAG
    from airflow.providers.common.compat.sdk import BaseHook, BaseOperator


    class Tell(BaseOperator):
        def execute(self, context):
            return [BaseHook.get_connection("somewhere").extra_dejson["kind"], Variable.get("colour")]


    with DAG("tell", schedule=None, start_date=datetime.datetime(2024, 1, 1)):
        Tell(task_id="tell")
    """
    airflow.add_dag("tell", source)
    run_id = airflow.run("tell")
    assert airflow.xcom("tell", run_id, "tell") == ["second", "green"]


def test_a_broken_dag_file_says_why(airflow: RealAirflow) -> None:
    with pytest.raises(AssertionError, match="no_such_module"):
        airflow.add_dag("broken", "from airflow import DAG\nimport no_such_module")
    (airflow.home.dags / "broken.py").unlink()


def test_nothing_outlives_an_instance() -> None:
    with RealAirflow(components=["api-server"]) as airflow:
        assert airflow.components.processes()
        folder = airflow.home.path
    assert not airflow.components.processes()
    assert not folder.exists()


@pytest.mark.parametrize("version", [NEWEST, "2.11.2"])
def test_the_light_mode_runs_each_dag_of_a_file(version: str) -> None:
    results = run_dags(SOURCE.replace('Sleep(task_id="sleep")', ""), venv=airflow_venv(version))
    assert {dag_id: result.state for dag_id, result in results.items()} == {"short": "success", "long": "success"}
    assert results["short"].xcoms["mapped", 0]["return_value"] == {"answer": 42}
    assert results["short"].states["wait", -1] == "success"
