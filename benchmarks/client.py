"""Forking, waiting and logs compared: this provider's client and the official SDK, against the same emulator.

Each side is a process of its own with an emulator of its own; both are measured at the same time. Prints a table.

::

    python benchmarks/client.py [--forks 5] [--jobs 8]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timezone
from typing import Any

from measuring import Machine, save

from datasphere_emulator import Emulator, Script, Settings
from datasphere_emulator.script import LogLine

LINES = 4000
CLONE_SECONDS = 0.3

#: Both read the ids of source jobs, fork them at once and wait; both write for each: seconds to fork, the time of
#: day when wait() returned, and how many of the program's lines had been shown by then.
RUN = """
def run(fork, count):
    import json, sys, threading, time
    results = {}
    def one(number, source):
        begin = time.perf_counter()
        job = fork(source)
        forked = time.perf_counter() - begin
        job.wait()
        results[number] = {"id": job.id, "fork": forked, "ended": time.time(), "lines": count()}
    sources = json.load(sys.stdin)
    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(sources)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    json.dump([results.get(number) for number in range(len(sources))], answer)
"""

OURS = """
import json, logging, os, sys
answer = sys.stdout
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from airflow_provider_datasphere.client.connection.settings import Settings
lines = []
class Count(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
log = logging.getLogger("airflow_provider_datasphere")
log.addHandler(Count())
log.setLevel(logging.INFO)
client = DataSphereClient(Settings.from_extra(json.loads(os.environ["EXTRA"])))
run(client.fork_job, lambda: len({line for line in lines if line.startswith("строка ")}))
"""

SDK = """
import logging, os, sys
answer, sys.stdout = sys.stdout, sys.stderr
import datasphere.auth, datasphere.channel
for name in ("project_endpoint", "job_endpoint", "op_endpoint"):
    setattr(datasphere.channel, name, os.environ["ENDPOINT"])
from datasphere.logs import logger_program_stdout
from datasphere.sdk import SDK
sdk = SDK()
lines = []
class Count(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logger_program_stdout.addHandler(Count())
run(sdk.fork_job, lambda: len({line for line in lines if line.startswith("строка ")}))
"""

Prepare = Callable[[Emulator], Sequence[Script]]


def measure(program: str, prepare: Prepare) -> list[dict[str, Any]]:
    """Run one side; adds to each result how late the end was noticed, seconds."""
    with Emulator(Settings(clone_seconds=CLONE_SECONDS)) as emulator, tempfile.TemporaryDirectory() as folder:
        sources = [emulator.create_scripted_job(script) for script in prepare(emulator)]
        authority = str(emulator.root_certificates)
        environment = {
            **os.environ,
            "EXTRA": json.dumps(emulator.connection_extra()),
            "ENDPOINT": emulator.endpoint,
            "YC_IAM_TOKEN": emulator.iam_token,
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": authority,
            "REQUESTS_CA_BUNDLE": authority,
            "NO_PROXY": "*",
            "TMPDIR": folder,
        }
        done = subprocess.run(
            [sys.executable, "-c", RUN + program],
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        results: list[dict[str, Any]] = [result for result in json.loads(done.stdout) if result is not None]
        for result in results:
            finished = emulator.job(result["id"]).finished_at.ToDatetime(tzinfo=timezone.utc)
            result["late"] = result["ended"] - finished.timestamp()
        return results


#: What was printed: what it is, ours, the SDK's.
LINES_PRINTED: list[tuple[str, str, str]] = []


def compare(what: str, prepare: Prepare, figure: Callable[[list[dict[str, Any]]], str]) -> None:
    """Measure both sides at once and print a line of the table."""
    sides = [OURS, SDK] if _sdk_is_there() else [OURS]
    with ThreadPoolExecutor(len(sides)) as pool:
        figures = [figure(results) for results in pool.map(lambda side: measure(side, prepare), sides)]
    figures += ["not installed"] * (2 - len(figures))
    LINES_PRINTED.append((what, figures[0], figures[1]))
    print(f"{what:<58} {figures[0]:>14} {figures[1]:>14}", flush=True)


def _sdk_is_there() -> bool:
    return subprocess.run([sys.executable, "-c", "import datasphere.sdk"], capture_output=True).returncode == 0


def final_lines(**behaviour: Any) -> Prepare:
    """A job that prints everything just before its end, from a service that behaves like this."""
    fault = behaviour.pop("fault", None)
    text = "".join(f"строка {number}\n" for number in range(LINES))
    pieces = [LogLine(4.0, text[start : start + 1013]) for start in range(0, len(text), 1013)]

    def prepare(emulator: Emulator) -> Sequence[Script]:
        emulator.settings.update(behaviour)
        if fault is not None:
            emulator.faults.inject("ReadLogs", **fault)
        return [Script(log=pieces)]

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forks", type=int, default=5, help="forks measured, one after the other")
    parser.add_argument("--jobs", type=int, default=8, help="jobs whose end is to be noticed")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; -: to the output")
    options = parser.parse_args()
    machine = Machine()
    chance = random.Random(7)
    durations = [chance.uniform(1.0, 11.0) for _ in range(options.jobs)]

    print(f"{'':<58} {'ours':>14} {'datasphere SDK':>14}")
    for number in range(options.forks):
        compare(
            f"fork, Clone takes {CLONE_SECONDS} s, #{number + 1}",
            lambda emulator: [Script(executing_seconds=0.1)],
            lambda results: f"{results[0]['fork']:.2f} s",
        )
    for what, script in (
        ("end of a job that prints", lambda seconds: Script(log=["hello", LogLine(seconds, "bye\n")])),
        ("end of a silent job", lambda seconds: Script(executing_seconds=seconds)),
    ):
        compare(
            f"{what} noticed, median of {options.jobs} (most)",
            lambda emulator, script=script: [script(seconds) for seconds in durations],  # type: ignore[misc]
            lambda results: "{:.2f} ({:.2f}) s".format(
                statistics.median(result["late"] for result in results), max(result["late"] for result in results)
            ),
        )
    for what, behaviour in {
        "in time": {},
        "1 s late": {"log_delay_seconds": 1.0},
        "2 s late": {"log_delay_seconds": 2.0},
        "3 s late": {"log_delay_seconds": 3.0},
        "the stream breaks once near the end": {"fault": {"after_messages": 1, "code": "UNAVAILABLE", "times": 1}},
        "clean but early ends": {"log_chunk_bytes": 2000, "fault": {"after_messages": 5, "times": 6}},
        "clean early ends with nothing, 2 s late": {
            "log_delay_seconds": 2.0,
            "fault": {"after_messages": 0, "times": 3},
        },
        "characters split": {"log_chunk_bytes": 1013},
    }.items():
        compare(
            f"final log lines of {LINES}, {what}",
            final_lines(**behaviour),  # type: ignore[arg-type]
            lambda results: str(results[0]["lines"]),
        )
    print(machine.verdict())
    figures = [{"what": what, "ours": ours, "sdk": sdk} for what, ours, sdk in LINES_PRINTED]
    save(options.json, {"benchmark": "client", "others": machine.others(), "figures": figures})


if __name__ == "__main__":
    main()
