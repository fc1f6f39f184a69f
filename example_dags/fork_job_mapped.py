"""Run one job many times with different arguments, some at a time, and collect what came of it.

Dynamic task mapping: a list made while the DAG runs decides how many jobs are forked. Each is a task of its own, with
its own log, its own retries and its own button to the job's page. A job that ends with return code 99 ("nothing to do")
counts as skipped.

Set the Airflow Variable ``datasphere_source_job_id`` to the id of a job that has been run before, and the connection
``datasphere_default``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timezone

try:
    from airflow.sdk import DAG, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

log = logging.getLogger(__name__)


@task
def choose_arguments() -> list[dict[str, str]]:
    return [{"RANGE": str(number)} for number in (1, 2, 3)]


# Whatever the jobs came to: those that ended well are collected.
@task(trigger_rule="none_failed")
def collect(job_ids: Sequence[str]) -> None:
    log.info("Forked and finished: %s", ", ".join(job_ids))


with DAG(
    dag_id="fork_job_mapped",
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
):
    forks = ForkJobOperator.partial(
        task_id="fork_job",
        source_job_id="{{ var.value.datasphere_source_job_id }}",
        name="range {{ task.args['RANGE'] }}",
        skip_on_exit_code=99,
        # Jobs that run at once; DataSphere's own quota makes the others wait, not fail.
        max_active_tis_per_dagrun=2,
    ).expand(args=choose_arguments())
    collect(forks.output)
