"""Fork a job and wait for it without a worker: the triggerer watches it, and shows its log in the task's log.

For jobs of hours, and for many at once. It needs a triggerer (Managed Service for Apache Airflow: one or more
"triggerer" instances; there may be none). ``execution_timeout`` holds while the task is deferred too, and ends the job.

Set the Airflow Variable ``datasphere_source_job_id`` to the id of a job that has been run before, and the connection
``datasphere_default``.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

with DAG(
    dag_id="fork_job_deferrable",
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
):
    train = ForkJobOperator(
        task_id="train",
        source_job_id="{{ var.value.datasphere_source_job_id }}",
        args={"RANGE": "1"},
        deferrable=True,
        # A try that dies leaves the job alone, and the next one goes on with it.
        retries=2,
        execution_timeout=timedelta(hours=12),
    )

    # A sensor can be deferred as well. This one waits for the same job, which anybody may have started: with the SDK,
    # the command line, or another DAG.
    watch = DataSphereJobSensor(
        task_id="watch",
        job_id=train.output,
        operation_id=train.output["operation_id"],
        deferrable=True,
        timeout=timedelta(hours=12),
    )
    train >> watch
