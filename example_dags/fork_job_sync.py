"""Run a DataSphere job again every day, with other arguments: one task that forks it, shows its log and waits.

Set the Airflow Variable ``datasphere_source_job_id`` to the id of a job that has been run before (DataSphere's page of
the project, tab "DataSphere Jobs"), and the connection ``datasphere_default``.
"""

from __future__ import annotations

from datetime import datetime, timezone

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

with DAG(
    dag_id="fork_job_sync",
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
):
    ForkJobOperator(
        task_id="fork_job",
        source_job_id="{{ var.value.datasphere_source_job_id }}",
        args={"RANGE": "1"},
    )
