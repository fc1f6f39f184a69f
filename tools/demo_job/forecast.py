"""The demo's second job: take the model that the first one found, and tell the temperatures of the day after."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    model = json.loads(options.model.read_text())
    print(f"read a model of {model['days']} day(s)", flush=True)
    begin = 24 * model["days"]
    lines = [
        f"hour {hour}: {model['celsius_at_start'] + model['celsius_per_hour'] * hour:.1f} °C"
        for hour in range(begin, begin + 24, 6)
    ]
    options.out.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
