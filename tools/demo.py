"""Fork a DataSphere job on a real Airflow, against the emulator: ``make demo``, and ``make demo-ui`` to look around.

Everything runs on this machine and is gone afterwards; nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasphere_emulator import Emulator
from harness import RealAirflow  # what starts Airflow for the tests; the Makefile puts it on the path

PROJECT = Path(__file__).resolve().parents[1]
DAG_FILE = PROJECT / "example_dags" / "fork_job_sync.py"
DAG_ID, TASK_ID = "fork_job_sync", "fork_job"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--ui", action="store_true", help="leave Airflow and the emulator running until Ctrl-C")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # so that Airflow's processes end with this one, however it ends
        signal.signal(number, signal.default_int_handler)
    try:
        return look_around() if options.ui else show()
    except KeyboardInterrupt:
        print("\nEnded.")
        return 0 if options.ui else 130
    except (OSError, RuntimeError, TimeoutError, AssertionError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1


def show() -> int:
    """One run of the example, its log and its result on the terminal."""
    with demo(tls=True) as (_, source_job_id, airflow):
        say(f"Triggering the DAG {DAG_ID} ({DAG_FILE.relative_to(PROJECT)})")
        run_id = airflow.run(DAG_ID)
        state = airflow.state(DAG_ID, run_id, TASK_ID)
        heading(f"Log of the task {TASK_ID}")
        print(without_folded_groups(airflow.task_log(DAG_ID, run_id, TASK_ID)))
        if state != "success":
            raise RuntimeError(f"the task ended as {state}; its log is above")
        job_id = airflow.xcom(DAG_ID, run_id, TASK_ID)
        heading("XCom result")
        print(json.dumps(airflow.xcom(DAG_ID, run_id, TASK_ID, "result"), indent=2, ensure_ascii=False))
        heading("What happened")
        print(f"The job {job_id} is a fork of {source_job_id}, with RANGE=1 instead of 10, and ended with {state}.")
    print("""
Where to look next
  make demo-ui                    the same in Airflow's pages, with the job's own page one click away
  example_dags/fork_job_sync.py   the DAG that ran
  README.md                       install it beside your Airflow, set up a connection, write your DAG""")
    return 0


def look_around() -> int:
    """Airflow and the emulator with everything set up, until Ctrl-C."""
    with demo(tls=False) as (emulator, source_job_id, airflow):
        airflow.trigger(DAG_ID)
        print(
            f"""
Airflow   http://127.0.0.1:{airflow.home.port}/dags/{DAG_ID}
          No login: whoever opens it on this machine is its administrator.
Emulator  {emulator.url}
          The pages of DataSphere's jobs; "DataSphere job" in the task's page leads there.

Set up    connection datasphere_default, Variable datasphere_source_job_id = {source_job_id}
DAGs      {airflow.home.dags} (new files are seen within seconds)

Ctrl-C ends everything.""",
            flush=True,
        )
        while True:
            airflow.components.check()
            threading.Event().wait(1)


@contextlib.contextmanager
def demo(*, tls: bool) -> Iterator[tuple[Emulator, str, RealAirflow]]:
    """The emulator with a source job that has run, and an Airflow that knows both."""
    say("Starting the emulator of DataSphere Jobs")
    with Emulator(tls=tls) as emulator:
        source_job_id = create_source_job(emulator)
        say(f"Running the source job {source_job_id}: python main.py data.csv --range 10")
        emulator.wait_job(source_job_id)
        # Only runs that the demo triggers; the DAG is scheduled daily.
        settings = {"AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False"}
        airflow = RealAirflow(env=settings)
        say(f"Starting Airflow {airflow.version} (scheduler, DAG processor, triggerer, API server on SQLite)")
        with airflow:
            airflow.add_connection("datasphere_default", conn_type="datasphere", extra=emulator.connection_extra())
            airflow.set_variable("datasphere_source_job_id", source_job_id)
            airflow.add_dag(DAG_ID, DAG_FILE.read_text())
            yield emulator, source_job_id, airflow


def create_source_job(emulator: Emulator) -> str:
    """A job as a person would run it with the ``datasphere`` CLI: a program, its data, an argument, an output."""
    temperatures = [f"{hour},{8 + 5 * math.sin(hour * math.pi / 12) + 0.02 * hour:.2f}" for hour in range(240)]
    return emulator.create_job(
        cmd="python main.py ${DATA} --range ${RANGE} --out ${MODEL}",
        files={
            "main.py": (PROJECT / "tools" / "demo_job" / "main.py").read_text(),
            "data.csv": "\n".join(["hour,celsius", *temperatures, ""]),
        },
        inputs=[("data.csv", "DATA")],
        outputs=[("model.json", "MODEL")],
        args={"RANGE": "10"},
        name="temperature-trend",
        execute=True,
    )


def without_folded_groups(log: str) -> str:
    """The log without what Airflow's page folds away: its own preparations."""
    lines: list[str] = []
    depth = 0
    for line in log.splitlines():
        if "::group::" in line:
            depth += 1
        elif "::endgroup::" in line:
            depth = max(0, depth - 1)
        elif not depth:
            lines.append(line)
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"· {text}", flush=True)


def heading(text: Any) -> None:
    print(f"\n── {text} " + "─" * max(4, 76 - len(text)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
