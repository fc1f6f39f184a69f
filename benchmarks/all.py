"""All benchmarks, one after the other: ``make bench``. Meant for ten minutes on two quiet processors.

Each one prints its table; the figures of all go to one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from measuring import Machine

FOLDER = Path(__file__).parent
PEERS = ("channel per trigger", "channel per poll", "thread per call")
TEN_THOUSAND = ("--jobs", "10000", "--no-ends", "--window")

RUNS: dict[str, list[str]] = {
    "Many deferred jobs: how the cost grows": [
        *("triggerer.py", "--policy", "shared", "--jobs", "1000", "--jobs", "3000", *TEN_THOUSAND, "30"),
    ],
    "The same by one list for all": ["triggerer.py", "--policy", "list per project", *TEN_THOUSAND, "30"],
    "Airflow alone": ["triggerer.py", "--policy", "nothing", *TEN_THOUSAND, "10"],
    "With the jobs' logs": [
        *("triggerer.py", "--policy", "shared", "--jobs", "2000", "--lines", "10", "--window", "30", "--no-ends"),
    ],
    "Other ways to poll": [
        *("triggerer.py", "--jobs", "1000", "--poll-interval", "5", "--window", "6", "--no-ends"),
        *(word for policy in ("shared", *PEERS) for word in ("--policy", policy)),
    ],
    "A retry's search": ["search.py", "--page-delay", "0.02"],
    "Downloads": ["transfer.py", "--rounds", "3", "--large", "200"],
    "Checking a configuration": ["config_check.py", "--lines", "500"],
    "Forks, ends and logs": ["client.py", "--forks", "1", "--jobs", "4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", default="build/benchmarks.json", help="default: %(default)s")
    options = parser.parse_args()
    target, found, machine, begun = Path(options.json), {}, Machine(), time.monotonic()
    for title, (script, *arguments) in RUNS.items():
        print(f"\n## {title}\n\nbenchmarks/{script} {' '.join(arguments)}\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            file = Path(folder, "figures.json")
            subprocess.run([sys.executable, FOLDER / script, *arguments, "--json", file], check=True)
            found[title] = {"command": [script, *arguments], **json.loads(file.read_text())}
    print(f"\n{time.monotonic() - begun:.0f} seconds in all. {machine.verdict()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = {"processors": os.cpu_count(), "others": machine.others(), "at": datetime.now(timezone.utc).isoformat()}
    target.write_text(json.dumps({**facts, "benchmarks": found}, indent=1) + "\n")
    print(f"The figures are in {target}.")


if __name__ == "__main__":
    main()
