"""What the benchmarks share: processor time, whether the machine was quiet, tables and JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

#: Other processes that used more than this share of the machine, or a hypervisor that withheld it, spoil clock times.
QUIET = 0.05


class Machine:
    """Watches how much of the processors others used while a benchmark ran.

    Linux counts the time of every process and the time that a hypervisor gave to other machines ("steal").
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._total, self._steal = _machine_seconds()
        self._own = _own_seconds()

    def others(self) -> float:
        """The share of all processors that wasn't ours and wasn't idle since the start, from 0 to 1."""
        total, steal = _machine_seconds()
        available = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        used = (total - self._total) - (_own_seconds() - self._own) + (steal - self._steal)
        return max(0.0, used / max(available, 0.001))

    def verdict(self) -> str:
        """One line for people."""
        others = self.others()
        if others <= QUIET:
            return f"The machine was quiet: others used {others:.0%} of its {os.cpu_count()} processors."
        return (
            f"NOT QUIET: others used {others:.0%} of the machine's {os.cpu_count()} processors meanwhile. Seconds "
            "by the clock and ratios of them mean little; processor seconds mean more."
        )


def _machine_seconds() -> tuple[float, float]:
    times = psutil.cpu_times()
    busy = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return busy, getattr(times, "steal", 0.0)


def _own_seconds() -> float:
    """Processor seconds of this process and all its descendants, ended ones included."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def processor_seconds(process: int) -> float:
    """Processor seconds that a running process has used."""
    used = psutil.Process(process).cpu_times()
    return float(used.user + used.system)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def save(name: str | None, result: dict[str, Any]) -> None:
    """Write a benchmark's figures as JSON, to a file or, for ``-``, as the last line of the output."""
    if name == "-":
        sys.stdout.write(json.dumps(result) + "\n")
    elif name:
        Path(name).write_text(json.dumps(result, indent=1) + "\n")
