"""How long the check of a configuration takes, beside the official SDK's parser where it is installed.

    python benchmarks/config_check.py --lines 500

The peer reads the file and stops at its first fault; here all faults are found.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from airflow_provider_datasphere.config_command import check_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        path = write(Path(folder), options.lines)
        ours = best(lambda: check_file(path), options.rounds)
        faults = len(check_file(path))
        peer = peers(path, options.rounds)
    print(f"{options.lines} lines: {ours * 1000:.1f} ms, {faults} faults", end="")
    print("" if peer is None else f"; the SDK's parser {peer * 1000:.1f} ms")
    if options.json:
        options.json.write_text(json.dumps({"lines": options.lines, "seconds": ours, "peer_seconds": peer}))


def write(folder: Path, lines: int) -> Path:
    """Write a right configuration of so many lines, or a few more."""
    entries = min(100, lines // 5)
    for number in range(entries):
        (folder / f"in{number}.csv").write_text("1")
    rows = ["name: large", "cmd: python main.py " + " ".join(f"${{IN{n}}}" for n in range(entries)), "inputs:"]
    rows += [f"  - in{n}.csv: IN{n}" for n in range(entries)]
    rows += ["outputs:", *(f"  - out/{n}.csv: OUT{n}" for n in range(entries)), "args:"]
    rows += [f"  ARG{n}: {n}" for n in range(entries)]
    rows += ["env:", "  vars:", *(f"    - VAR{n}: {n}" for n in range(max(0, lines - len(rows) - 2)))]
    path = folder / "config.yaml"
    path.write_text("\n".join(rows) + "\n")
    return path


def best(call: Callable[[], object], rounds: int) -> float:
    """Return the seconds of the quickest call; the first one imports."""
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def peers(path: Path, rounds: int) -> float | None:
    try:
        from datasphere.config import parse_config
    except ImportError:
        return None
    return best(lambda: parse_config(path), rounds)


if __name__ == "__main__":
    main()
