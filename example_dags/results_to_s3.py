"""Run a DataSphere job and bring its results to S3, then read them there.

Set the Airflow Variables ``datasphere_source_job_id`` (a job that has been run before) and ``results_bucket``, and the
connections ``datasphere_default`` and ``aws_default``. Needs ``apache-airflow-providers-amazon`` and ``s3fs``; other
object stores work in the same way, with their own URIs.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

try:
    from airflow.sdk import DAG, ObjectStoragePath, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task
    from airflow.io.path import ObjectStoragePath

from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator

with DAG(
    dag_id="results_to_s3",
    schedule=None,
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
):
    fork = ForkJobOperator(
        task_id="fork_job",
        source_job_id="{{ var.value.datasphere_source_job_id }}",
    )
    download = DownloadJobResultsOperator(
        task_id="download_results",
        job_id=fork.output,
        destination="s3://aws_default@{{ var.value.results_bucket }}/{{ run_id }}",
    )

    @task
    def count_bytes(manifest: list[dict[str, Any]]) -> int:
        """Read each result where it is now; the manifest says where."""
        files = [ObjectStoragePath(entry["uri"]) for entry in manifest if not entry["uri"].endswith("/")]
        return sum(len(file.read_bytes()) for file in files)

    count_bytes(download.output)
