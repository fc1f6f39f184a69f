"""Train a model with a job that is made anew each day from ``train/config.yaml``, which is part of the DAGs.

No source job is needed. Copy the folder ``train`` beside this file, set the connection ``datasphere_default`` with its
project ID, and check the configuration before it costs money: ``datasphere-config check train/config.yaml``.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

try:
    from airflow.sdk import DAG, Param
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.models.param import Param

from airflow_provider_datasphere.operators.jobs import ExecuteJobOperator

with DAG(
    dag_id="train_from_config",
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
    params={"rows": Param("168", type="string", description="How many hours the model is fitted to")},
):
    ExecuteJobOperator(
        task_id="train",
        config="train/config.yaml",
        args={"ROWS": "{{ params.rows }}"},
        name="forecast {{ run_id }}",
        retries=2,
        retry_delay=timedelta(minutes=1),
        execution_timeout=timedelta(hours=2),
    )
