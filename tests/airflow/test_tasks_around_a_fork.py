"""What only a real Airflow shows of a fork among other tasks: mapped, skipped, reduced, cancelled, and nested."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from datasphere_emulator import Emulator, Script
from harness.dagtest import run_dags
from harness.venvs import NEWEST, airflow_venv

if TYPE_CHECKING:
    from collections.abc import Iterator

DAGS = """
import datetime
import os

try:
    from airflow.sdk import DAG, get_current_context, task
except ImportError:
    from airflow import DAG
    from airflow.decorators import task
    from airflow.operators.python import get_current_context

from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator

options = {"schedule": None, "start_date": datetime.datetime(2024, 1, 1), "render_template_as_native_obj": True}
fork = {"task_id": "fork", "deferrable": True, "poll_interval": 0.5}

with DAG("mapped", **options) as mapped:

    @task
    def arguments():
        return [{"RANGE": "7"}, {"RANGE": "99"}]

    @task(trigger_rule="all_done")
    def reduce(job_ids):
        return list(job_ids)

    forks = ForkJobOperator.partial(**fork, source_job_id=os.environ["BY_RANGE"], skip_on_exit_code=99).expand(
        args=arguments()
    )
    reduced = reduce(forks.output)
    forks >> CancelJobOperator(task_id="cancel", job_id=forks.output, trigger_rule="all_done")

with DAG("native", **options) as native:
    ForkJobOperator(**fork, source_job_id=os.environ["BY_RANGE"], args={"RANGE": "007"}, name="{{ 20260101 }}")

with DAG("nested", **options) as nested:

    @task
    def outer():
        return ForkJobOperator(**fork, source_job_id=os.environ["PLAIN"]).execute(get_current_context())

    outer()

with DAG("mistake", **options) as mistake:
    ForkJobOperator(**fork, source_job_id=os.environ["BY_RANGE"], args={"RNGE": "1"})
"""


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


@pytest.mark.airflow
@pytest.mark.parametrize("version", [NEWEST, "2.11.2"])
def test_forks_among_other_tasks(emulator: Emulator, version: str) -> None:
    by_range = emulator.create_job("exit $((${RANGE} == 99 ? 99 : 0))", args={"RANGE": "0"})
    results = run_dags(
        DAGS,
        venv=airflow_venv(version),
        connections={"datasphere_default": {"conn_type": "datasphere", "extra": emulator.connection_extra()}},
        env={"BY_RANGE": by_range, "PLAIN": emulator.create_scripted_job(Script(executing_seconds=1))},
    )

    mapped = results["mapped"]
    states = [mapped.states["fork", index] for index in (0, 1)]
    assert states == ["success", "skipped"], mapped.log
    job_ids = [mapped.xcoms["fork", index]["job_id"] for index in (0, 1)]
    # A skipped task returned nothing, as any other; its id and result stay.
    assert mapped.xcoms["reduce", -1]["return_value"] == [job_ids[0]]
    assert "return_value" not in mapped.xcoms["fork", 1]
    assert mapped.xcoms["fork", 1]["result"]["return_code"] == 99
    assert mapped.states["cancel", -1] == "success"

    native = results["native"]
    assert native.state == "success", native.log
    (clone,) = [call for call in emulator.journal.calls("Clone") if call.request and call.request.get("name")][-1:]
    assert clone.request is not None
    assert clone.request["name"] == "20260101"
    assert clone.request["job_parameters_overrides"]["arguments"] == [{"name": "RANGE", "value": "007"}]

    nested = results["nested"]
    assert nested.state == "success", nested.log
    job_id = nested.xcoms["outer", -1]["return_value"]
    assert emulator.job(job_id).status
    assert "waiting on the worker instead" in nested.log

    # One error, not its two classes one after the other, and nothing of a link that can't be there.
    log = results["mistake"].log
    assert "exceptions.JobRequestError: args names 'RNGE'" in log
    assert "client.errors.JobRequestError" not in log
    assert "XCom not found" not in log
