"""What happens to which run: a seeded, random schedule in which each point comes up in each mode."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mode = Literal["blocking", "deferred", "new", "new deferred"]

_FORKS: tuple[Mode, ...] = ("blocking", "deferred")
_BLOCKING: tuple[Mode, ...] = ("blocking", "new")
_DEFERRED: tuple[Mode, ...] = ("deferred", "new deferred")
MODES = _BLOCKING + _DEFERRED
#: Modes in which the task makes a new job in place of a fork: its creation is Create, not Clone.
NEW = ("new", "new deferred")

#: Where a run is hit -> the modes in which that point exists.
POINTS: dict[str, tuple[Mode, ...]] = {
    "before creation": _FORKS,
    "creation sent": MODES,
    "creation answered": MODES,
    "creation's answer lost": MODES,
    "during upload": MODES,
    "Execute sent": MODES,
    "Execute's answer lost": MODES,
    "after Execute": MODES,
    "running": _BLOCKING,
    "log tail": _BLOCKING,
    "finished": _BLOCKING,
    "XCom pushed": MODES,
    "deferred, triggerer killed": _DEFERRED,
    "deferred, task resuming": _DEFERRED,
    "supervisor killed": _BLOCKING,
    "supervisor told to end": _BLOCKING,
    "triggerer stopped and continued": _DEFERRED,
    "API server away": MODES,
    "Ctrl-C": _BLOCKING,
    "scheduler killed": MODES,
    "service restarted": MODES,
    "answers cut": MODES,
    "token revoked": MODES,
    "cleared by a person": MODES,
    "marked failed by a person": MODES,
}
#: Those in which somebody, or the task itself, ends the job; in all others nobody may cancel anything.
ENDS_THE_JOB = frozenset({"cleared by a person", "marked failed by a person", "Ctrl-C"})


@dataclass(frozen=True)
class Run:
    """One run of the schedule."""

    number: int
    mode: Mode
    point: str
    seed: int

    def __str__(self) -> str:
        return f"{self.number:4d}  {self.mode:12}  {self.point:31}"


def schedule(count: int, seed: int) -> Iterator[Run]:
    """``count`` runs: all points of all modes in random order, again and again."""
    rng = random.Random(seed)
    number = 0
    while True:
        everything = [(mode, point) for point, modes in POINTS.items() for mode in modes]
        rng.shuffle(everything)
        for mode, point in everything:
            if number == count:
                return
            number += 1
            yield Run(number, mode, point, rng.randrange(1 << 30))
