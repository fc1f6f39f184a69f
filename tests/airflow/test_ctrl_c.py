"""Ctrl-C in ``dag.test()``: the job of the task ends with it, in both modes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from datasphere_emulator import Emulator, Script
from harness.home import AirflowHome
from harness.venvs import NEWEST, airflow_venv

DAG = """
from datetime import datetime

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow.models.dag import DAG

from airflow_provider_datasphere.operators.jobs import ForkJobOperator

with DAG("ctrl_c", schedule=None, start_date=datetime(2024, 1, 1)) as dag:
    ForkJobOperator(
        task_id="fork", source_job_id="{source}", deferrable={deferrable}, poll_interval=0.5
    )

if __name__ == "__main__":
    dag.test()
"""
PATIENCE = 120.0


@pytest.mark.airflow
@pytest.mark.parametrize("deferrable", [False, True], ids=["blocking", "deferred"])
@pytest.mark.parametrize("version", [NEWEST, "2.11.2"])
def test_ctrl_c_ends_the_job(tmp_path: Path, version: str, deferrable: bool) -> None:
    with Emulator(tls=False) as emulator:
        connection = {"conn_type": "datasphere", "extra": emulator.connection_extra()}
        variables = {"AIRFLOW_CONN_DATASPHERE_DEFAULT": json.dumps(connection)}
        home = AirflowHome(airflow_venv(version), tmp_path, variables).prepare()
        source = emulator.create_scripted_job(Script(never_ends=True, log=["it runs"]))
        file = home.dags / "ctrl_c.py"
        file.write_text(DAG.format(source=source, deferrable=deferrable))
        process = subprocess.Popen(
            [str(home.venv.bin / "python"), str(file)],
            env=home.environment(),
            cwd=home.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            # The log is read by whoever waits for the job: the operator, or the trigger that runs inline.
            while not emulator.journal.calls("ReadLogs"):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        (job,) = emulator.jobs(source)
        assert [call.job_id for call in emulator.journal.calls("Cancel")] == [job.id], output
        assert f"Cancelled job {job.id}" in output
