"""A fixed piece of the chaos schedule; ``make chaos`` runs as much of it as you like."""

from __future__ import annotations

import pytest

from chaos.plan import POINTS, Run, schedule
from chaos.storm import storm
from harness import NEWEST

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

#: Moments of every kind: before, in and after each call, and each thing that can die.
_POINTS = {
    "blocking": (
        "creation sent",
        "Execute sent",
        "running",
        "finished",
        "supervisor told to end",
        "cleared by a person",
        "Ctrl-C",
    ),
    "deferred": (
        "creation's answer lost",
        "during upload",
        "deferred, triggerer killed",
        "triggerer stopped and continued",
        "marked failed by a person",
    ),
    "new": ("creation sent", "during upload", "Execute's answer lost"),
    "new deferred": ("creation's answer lost", "creation answered", "deferred, triggerer killed"),
}


def test_every_point_comes_up_in_every_mode_it_exists_in() -> None:
    once = sum(len(modes) for modes in POINTS.values())
    hits = [(run.mode, run.point) for run in schedule(3 * once, seed=5)]
    assert len(set(hits)) == once
    assert all(hits.count(hit) == 3 for hit in hits)
    assert hits == [(run.mode, run.point) for run in schedule(3 * once, seed=5)]


def test_one_job_per_generation_whatever_dies() -> None:
    runs = [
        Run(number, mode, point, seed=number)  # type: ignore[arg-type]
        for number, (mode, point) in enumerate((mode, point) for mode, points in _POINTS.items() for point in points)
    ]
    lines: list[str] = []
    verdicts = storm(runs, version=NEWEST, at_once=5, say=lines.append)
    assert len(verdicts) == len(runs)
    assert not [run for run, verdict in verdicts if verdict.faults], "\n".join(lines)
