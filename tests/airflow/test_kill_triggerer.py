"""The triggerer dies or is restarted while it waits for jobs: nothing is cancelled, and nothing of the log is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from datasphere_emulator import Emulator
from harness import RealAirflow

pytestmark = [pytest.mark.airflow, pytest.mark.long, pytest.mark.timeout(600)]

PATIENCE = 240.0

DAG = """
from __future__ import annotations

from datetime import datetime

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow.models.dag import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

with DAG(
    "kill_triggerer",
    schedule=None,
    start_date=datetime(2024, 1, 1),
    default_args={{"datasphere_conn_id": "kill_triggerer", "deferrable": True}},
):
    ForkJobOperator(task_id="fork", source_job_id="{source}", poll_interval=1)
    DataSphereJobSensor(task_id="sensor", job_id="{sensed}", poke_interval=1)
"""


def test_a_triggerer_that_dies_twice_and_is_restarted(any_airflow: RealAirflow, tmp_path: Path) -> None:
    airflow = any_airflow
    flag = tmp_path / "ends"
    program = f"i=0; until [ -e {flag} ]; do i=$((i+1)); echo line $i; sleep 0.2; done; echo the last line"
    with Emulator() as emulator:
        source = emulator.create_job(program)
        sensed = emulator.create_job(program, execute=True)
        airflow.add_connection("kill_triggerer", conn_type="datasphere", extra=emulator.connection_extra())
        airflow.add_dag("kill_triggerer", DAG.format(source=source, sensed=sensed))
        run = airflow.trigger("kill_triggerer")

        def watched() -> None:
            """Until the triggerer reads the one job's log, from now on, and polls the other."""
            logs, polls = emulator.journal.count("ReadLogs"), emulator.journal.count("Get", job_id=sensed)
            airflow.until(
                lambda: (
                    emulator.journal.count("ReadLogs") > logs
                    and emulator.journal.count("Get", job_id=sensed) > polls + 1
                ),
                PATIENCE,
                "trigger at work",
            )

        watched()
        for signal_number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
            airflow.kill("triggerer", signal_number, whole=signal_number == signal.SIGKILL)
            airflow.start("triggerer", wait=False)
            watched()
        assert airflow.task_states("kill_triggerer", run) == {("fork", -1): "deferred", ("sensor", -1): "deferred"}
        (job,) = emulator.jobs(source)
        flag.touch()
        assert airflow.wait_run("kill_triggerer", run, PATIENCE) == "success"

        assert emulator.journal.calls("Cancel") == []
        assert emulator.executions(job.id) == 1
        printed = b"".join(text for source, _, text in emulator.log_text(job.id) if source == "stdout").decode()
        lines = [line.strip() for line in airflow.task_log("kill_triggerer", run, "fork").splitlines()]
        assert "the last line" in printed
        assert [line for line in printed.splitlines() if not any(shown.endswith(line) for shown in lines)] == []
        assert any("a restarted triggerer starts over here" in line for line in lines)
