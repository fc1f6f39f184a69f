"""Many deferred jobs in one process: few connections, no thread each, and nothing cancelled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "triggerer.py"
JOBS = 100


def test_a_hundred_waits_share_three_connections() -> None:
    command = [sys.executable, str(BENCHMARK), "--json", "-", "--policy", "shared", "--jobs", str(JOBS)]
    options = ["--lines", "10", "--window", "4", "--poll-interval", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["done"] == JOBS
    assert figures["log_lines"] == 10 * JOBS
    assert figures["connections"] == 1 + JOBS / 50
    assert figures["threads"] < JOBS / 2
    assert figures["connection_reads"] < 5
    assert figures["failed"] == figures["cancels"] == 0
