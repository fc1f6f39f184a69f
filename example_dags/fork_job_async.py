"""Fork a job, do something else while it runs, look once a minute whether it is over, then handle its result.

The second example of the DataSphere documentation ("Working with jobs in Airflow"). The sensor holds no worker slot
between two looks. Whatever happens on the way, the teardown sees to it that no job is left running.

Set the Airflow Variable ``datasphere_source_job_id`` to the id of a job that has been run before, and the connection
``datasphere_default``.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import Any

try:
    from airflow.sdk import DAG, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task

from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

log = logging.getLogger(__name__)


@task
def do_something_else(job_id: str) -> None:
    log.info("Job %s is running, and this task has its worker to itself.", job_id)


@task
def handle_result(result: dict[str, Any]) -> None:
    log.info(
        "Job %s ended with return code %s at %s.", *(result[key] for key in ("job_id", "return_code", "finished_at"))
    )
    for file in result["output_files"]:
        log.info("It made %s, %d bytes.", file["path"], file["size_bytes"])


with DAG(
    dag_id="fork_job_async",
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
):
    fork = ForkJobOperator(
        task_id="fork_job",
        source_job_id="{{ var.value.datasphere_source_job_id }}",
        args={"RANGE": "1"},
        wait_for_completion=False,
    )
    wait = DataSphereJobSensor(
        task_id="wait_for_job",
        job_id=fork.output,
        # The operation alone knows the return code of a program that failed.
        operation_id=fork.output["operation_id"],
        poke_interval=60,
        timeout=timedelta(hours=1),
    )
    # Nothing to do when the job has ended; stops it when the sensor's time was up or the run was ended.
    cancel = CancelJobOperator(task_id="cancel_job", job_id=fork.output)

    do_something_else(fork.output)
    fork >> wait >> cancel.as_teardown(setups=fork)
    handle_result(wait.output)
