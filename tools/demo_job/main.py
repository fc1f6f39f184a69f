"""The demo's job: fit a straight line to the temperatures of the last RANGE days, and write the model it found."""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path


def report_progress(percent: int, message: str) -> None:
    """Tell DataSphere how far the job is, where the environment says that somebody listens."""
    if path := os.environ.get("JOB_PROGRESS_FILENAME"):
        record = {"progress": percent, "message": message, "create_time": datetime.now(timezone.utc).isoformat()}
        Path(path).write_text(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--range", type=int, required=True, help="days, counted from the last one")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    with options.data.open(newline="") as file:
        rows = [(float(row["hour"]), float(row["celsius"])) for row in csv.DictReader(file)][-24 * options.range :]
    print(f"read {len(rows)} hours, the last {options.range} day(s) of {options.data.name}", flush=True)

    first = rows[0][0]
    span = rows[-1][0] - first
    points = [((hour - first) / span, celsius) for hour, celsius in rows]
    slope = offset = 0.0
    epochs = 5
    for epoch in range(1, epochs + 1):
        for _ in range(8):
            errors = [(x, slope * x + offset - celsius) for x, celsius in points]
            slope -= 0.2 * sum(error * x for x, error in errors) / len(points)
            offset -= 0.2 * sum(error for _, error in errors) / len(points)
        loss = sum((slope * x + offset - celsius) ** 2 for x, celsius in points) / len(points)
        print(f"epoch {epoch}/{epochs}: loss {loss:.4f}", flush=True)
        report_progress(100 * epoch // epochs, f"epoch {epoch} of {epochs}")
        time.sleep(0.3)

    model = {"days": options.range, "celsius_at_start": round(offset, 3), "celsius_per_hour": round(slope / span, 4)}
    options.out.write_text(json.dumps(model, indent=2) + "\n")
    print(f"model: {json.dumps(model)}", flush=True)


if __name__ == "__main__":
    main()
