"""Two DataSphere jobs in a row: ``result.txt`` of the first becomes the input ``INPUT_DATA`` of the second.

The two tasks may run on different workers: no disk is shared, and within a project not even a byte is transferred,
since the service has the file already. Set the Airflow Variables ``datasphere_first_job_id`` and
``datasphere_second_job_id`` to jobs that have been run before, and the connection ``datasphere_default``.
"""

from __future__ import annotations

from datetime import datetime, timezone

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

with DAG(
    dag_id="output_files_for_other_job",
    schedule=None,
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
):
    first = ForkJobOperator(
        task_id="first_job",
        source_job_id="{{ var.value.datasphere_first_job_id }}",
    )
    second = ForkJobOperator(
        task_id="second_job",
        source_job_id="{{ var.value.datasphere_second_job_id }}",
        # The first task returns its job's id. A path of the job's output, or its var, comes after it.
        vars={"INPUT_DATA": "datasphere://{{ ti.xcom_pull(task_ids='first_job') }}/result.txt"},
    )
    first >> second
