"""Fork DataSphere jobs on a real Airflow, against the emulator: ``make demo``, ``make demo-all``, ``make demo-ui``.

Everything runs on this machine and is gone afterwards; nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasphere_emulator import Emulator
from harness import RealAirflow  # what starts Airflow for the tests; the Makefile puts it on the path

PROJECT = Path(__file__).resolve().parents[1]
EXAMPLES = PROJECT / "example_dags"
#: The three patterns of the service's documentation, and new jobs: DAG, in the file of that name, and its tasks.
PATTERNS = {
    "fork_job_sync": ("fork_job",),
    "fork_job_async": ("fork_job", "do_something_else", "wait_for_job", "handle_result", "cancel_job"),
    "output_files_for_other_job": ("first_job", "second_job"),
    "train_from_config": ("train",),
    "train_function": ("train", "forecast"),
}
#: Folders beside the DAG files that they need.
FOLDERS = ("train",)
FIRST = "fork_job_sync"


@dataclass(frozen=True)
class Stage:
    """The emulator with source jobs that have run, and an Airflow that knows them."""

    emulator: Emulator
    source_job_id: str
    airflow: RealAirflow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="all three patterns of the documentation, and new jobs")
    what.add_argument("--ui", action="store_true", help="leave Airflow and the emulator running until Ctrl-C")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # so that Airflow's processes end with this one, however it ends
        signal.signal(number, signal.default_int_handler)
    try:
        return look_around() if options.ui else show(*(PATTERNS if options.all else (FIRST,)))
    except KeyboardInterrupt:
        print("\nEnded.")
        return 0 if options.ui else 130
    except (OSError, RuntimeError, TimeoutError, AssertionError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1


def show(*dag_ids: str) -> int:
    """One run of each of these examples, the logs of its tasks and its jobs' results on the terminal."""
    with demo(tls=True) as stage:
        for dag_id in dag_ids:
            show_run(stage, dag_id)
    print("""
Where to look next
  make demo-all                   all three patterns of the documentation: wait, let a sensor wait, chain two jobs;
                                  and new jobs, from a config.yaml and from a function
  make demo-ui                    the same in Airflow's pages, with the job's own page one click away
  example_dags/fork_job_sync.py   the DAG that ran
  README.md                       install it beside your Airflow, set up a connection, write your DAG""")
    return 0


def show_run(stage: Stage, dag_id: str) -> None:
    airflow = stage.airflow
    say(f"Triggering the DAG {dag_id} ({EXAMPLES.relative_to(PROJECT)}/{dag_id}.py)")
    run_id = airflow.trigger(dag_id)
    airflow.wait_run(dag_id, run_id, timeout=240)
    states = airflow.task_states(dag_id, run_id)
    for task_id in PATTERNS[dag_id]:
        heading(f"Log of the task {dag_id}.{task_id}")
        print(without_folded_groups(airflow.task_log(dag_id, run_id, task_id)))
        if states[task_id, -1] != "success":
            raise RuntimeError(f"the task {task_id} ended as {states[task_id, -1]}; its log is above")
    heading(f"What {dag_id} came to")
    for task_id in PATTERNS[dag_id]:
        if (result := airflow.xcom(dag_id, run_id, task_id, "result")) is not None:
            print(f"XCom result of {task_id}: {json.dumps(result, indent=2, ensure_ascii=False)}")
            parent = stage.emulator.job(result["job_id"]).parent_job_id
            origin = f"is a fork of {parent}" if parent else "was made from a configuration"
            print(f"The job {result['job_id']} {origin}, and ended with {result['status']}.")


def look_around() -> int:
    """Airflow and the emulator with everything set up, until Ctrl-C."""
    with demo(tls=False) as stage:
        airflow = stage.airflow
        airflow.trigger(FIRST)
        print(
            f"""
Airflow   http://127.0.0.1:{airflow.home.port}/dags/{FIRST}
          No login: whoever opens it on this machine is its administrator.
Emulator  {stage.emulator.url}
          The pages of DataSphere's jobs; "DataSphere job" in the task's page leads there.

Set up    connection datasphere_default, Variable datasphere_source_job_id = {stage.source_job_id}
DAGs      {airflow.home.dags} (new files are seen within seconds)

Ctrl-C ends everything.""",
            flush=True,
        )
        while True:
            airflow.components.check()
            threading.Event().wait(1)


@contextlib.contextmanager
def demo(*, tls: bool) -> Iterator[Stage]:
    say("Starting the emulator of DataSphere Jobs")
    with Emulator(tls=tls) as emulator:
        source_job_id = create_source_job(emulator, output="model.json")
        say(f"Running the source job {source_job_id}: python main.py data.csv --range 10")
        jobs = {
            "datasphere_source_job_id": source_job_id,
            "datasphere_first_job_id": create_source_job(emulator, output="result.txt"),
            "datasphere_second_job_id": create_second_job(emulator),
        }
        for job_id in jobs.values():
            emulator.wait_job(job_id)
        # Only runs that the demo triggers; some DAGs are scheduled daily.
        settings = {"AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False"}
        airflow = RealAirflow(env=settings)
        say(f"Starting Airflow {airflow.version} (scheduler, DAG processor, triggerer, API server on SQLite)")
        with airflow:
            airflow.add_connection("datasphere_default", conn_type="datasphere", extra=emulator.connection_extra())
            for name, job_id in jobs.items():
                airflow.set_variable(name, job_id)
            for folder in FOLDERS:
                shutil.copytree(EXAMPLES / folder, airflow.home.dags / folder)
            for dag_id in PATTERNS:
                airflow.add_dag(dag_id, (EXAMPLES / f"{dag_id}.py").read_text())
            yield Stage(emulator, source_job_id, airflow)


def create_source_job(emulator: Emulator, output: str) -> str:
    """A job as a person would run it with the ``datasphere`` CLI: a program, its data, an argument, an output."""
    temperatures = [f"{hour},{8 + 5 * math.sin(hour * math.pi / 12) + 0.02 * hour:.2f}" for hour in range(240)]
    return emulator.create_job(
        cmd="python main.py ${DATA} --range ${RANGE} --out ${MODEL}",
        files={"main.py": program("main.py"), "data.csv": "\n".join(["hour,celsius", *temperatures, ""])},
        inputs=[("data.csv", "DATA")],
        outputs=[(output, "MODEL")],
        args={"RANGE": "10"},
        name="temperature-trend",
        execute=True,
    )


def create_second_job(emulator: Emulator) -> str:
    """A job that reads what the first one made; its own source has read some other model."""
    model = {"days": 10, "celsius_at_start": 10.0, "celsius_per_hour": 0.02}
    return emulator.create_job(
        cmd="python forecast.py ${INPUT_DATA} --out forecast.txt",
        files={"forecast.py": program("forecast.py"), "model.json": json.dumps(model)},
        inputs=[("model.json", "INPUT_DATA")],
        outputs=["forecast.txt"],
        name="temperature-forecast",
        execute=True,
    )


def program(name: str) -> str:
    return (PROJECT / "tools" / "demo_job" / name).read_text()


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


def heading(text: str) -> None:
    print(f"\n── {text} " + "─" * max(4, 76 - len(text)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
