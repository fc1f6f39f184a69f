"""``python -m chaos --runs 200 --seed 1``: one line per run, and a summary."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from chaos.plan import schedule
from chaos.storm import storm
from harness import NEWEST


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--version", default=NEWEST, help="Airflow's")
    parser.add_argument("--at-once", type=int, default=5)
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the emulator")
    options = parser.parse_args()
    words = {"true": True, "false": False}
    settings = {name: words.get(value, value) for name, _, value in (text.partition("=") for text in options.setting)}
    begun = time.monotonic()
    verdicts = storm(
        list(schedule(options.runs, options.seed)),
        version=options.version,
        at_once=options.at_once,
        say=lambda line: print(line, flush=True),
        settings=settings,
    )
    faulty = [run for run, verdict in verdicts if verdict.faults]
    print(f"\n{len(verdicts)} runs on Airflow {options.version}, seed {options.seed}, {time.monotonic() - begun:.0f} s")
    print(f"executed jobs: {sum(verdict.executed for _, verdict in verdicts)}")
    notes = Counter(note.partition(":")[0] for _, verdict in verdicts for note in verdict.notes)
    for note, count in notes.most_common():
        print(f"note: {note}: {count}")
    hits = Counter((run.mode, run.point) for run, _ in verdicts)
    print(f"points: {len(hits)}, each {min(hits.values())} to {max(hits.values())} times")
    print(f"{len(verdicts) - len(faulty)} passed, {len(faulty)} failed")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
