"""More deferred jobs than the project has room for: each runs once, and none of them holds a worker slot meanwhile."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest

from datasphere_emulator import Emulator, Script
from harness import RealAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1500)]

PATIENCE = 300.0

DAG = """
from __future__ import annotations

from datetime import datetime

try:
    from airflow.sdk import DAG, task
except ImportError:
    from airflow.decorators import task
    from airflow.models.dag import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

with DAG("queue_{count}", schedule=None, start_date=datetime(2024, 1, 1), max_active_tasks=300):
    ForkJobOperator.partial(
        task_id="fork",
        source_job_id="{source}",
        deferrable=True,
        poll_interval=1,
        stream_logs=False,
        start_timeout=3600,
        retries=2,  # a busy machine loses tries
        datasphere_conn_id="queue",
    ).expand(name=[f"job {{number}}" for number in range({count})])

with DAG("beside_{count}", schedule=None, start_date=datetime(2024, 1, 1)):

    @task
    def beat():
        pass

    beat()
"""


@pytest.mark.parametrize(
    ("count", "quota", "seconds"), [(10, 2, 2.0), pytest.param(200, 10, 8.0, marks=pytest.mark.long)]
)
def test_a_quota_is_a_queue_without_slots(any_airflow: RealAirflow, count: int, quota: int, seconds: float) -> None:
    airflow = any_airflow
    with Emulator() as emulator:
        emulator.settings.max_running_jobs = quota
        source = emulator.create_scripted_job(Script(executing_seconds=seconds))
        airflow.add_connection("queue", conn_type="datasphere", extra=emulator.connection_extra())
        dag_ids = [f"queue_{count}", f"beside_{count}"]
        airflow.add_dag(f"queue_{count}", DAG.format(source=source, count=count), dag_ids)
        run = airflow.trigger(f"queue_{count}")
        beats: list[str] = []
        kills = [count // 4, count // 2]
        most_running, next_beat = 0, time.monotonic() + 5
        give_up_at = time.monotonic() + PATIENCE + 4 * count
        while (accepted := emulator.journal.count("Execute", code="OK")) < count:
            assert time.monotonic() < give_up_at, f"{accepted} of {count} started"
            running = [
                job for job in emulator.jobs(source) if emulator.executions(job.id) and not job.HasField("finished_at")
            ]
            most_running = max(most_running, len(running))
            if kills and accepted >= kills[0]:
                kills.pop(0)
                airflow.kill("triggerer", signal.SIGKILL, whole=True)
                airflow.start("triggerer", wait=False)
            if time.monotonic() >= next_beat:
                next_beat += 10
                beats.append(airflow.trigger(f"beside_{count}"))
            time.sleep(0.3)
        ended = airflow.wait_run(f"queue_{count}", run, PATIENCE)
        failed = [key for key, state in airflow.task_states(f"queue_{count}", run).items() if state == "failed"]
        logs = [airflow.task_log(f"queue_{count}", run, task_id, map_index=index) for task_id, index in failed[:2]]
        assert ended == "success", "\n".join(logs)
        # The plain task found a slot each time, though more jobs waited than there are slots.
        for beat in beats:
            assert airflow.wait_run(f"beside_{count}", beat, PATIENCE) == "success"
        assert most_running <= quota
        jobs = emulator.jobs(source)
        assert Counter(emulator.executions(job.id) for job in jobs) == {1: count}
        assert emulator.journal.count("Cancel") == 0
        assert emulator.journal.count("Execute") <= 3 * count + 20  # and a few when a triggerer begins anew
        results = [airflow.xcom(f"queue_{count}", run, "fork", "result", map_index=index) for index in range(10)]
        assert all(result["run_seconds"] >= seconds * 0.9 for result in results)
        # A triggerer that dies takes with it when it started the jobs that just then began.
        queued = [result["queued_seconds"] for result in results if result["queued_seconds"] is not None]
        assert len(queued) >= 10 - 2 * quota or count > 10
        assert all(waited >= 0 for waited in queued)
        print(f"{emulator.journal.count('Execute')} Executes for {count} jobs, {len(beats)} beats")
