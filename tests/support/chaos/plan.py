"""What happens to which run: a seeded, random schedule in which each point comes up in each mode."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mode = Literal["blocking", "deferred"]

#: Where a run is hit -> whether that point exists in (blocking, deferred) mode.
POINTS: dict[str, tuple[bool, bool]] = {
    "before Clone": (True, True),
    "Clone sent": (True, True),
    "Clone answered": (True, True),
    "Clone's answer lost": (True, True),
    "during upload": (True, True),
    "Execute sent": (True, True),
    "Execute's answer lost": (True, True),
    "after Execute": (True, True),
    "running": (True, False),
    "log tail": (True, False),
    "finished": (True, False),
    "XCom pushed": (True, True),
    "deferred, triggerer killed": (False, True),
    "deferred, task resuming": (False, True),
    "supervisor killed": (True, False),
    "supervisor told to end": (True, False),
    "triggerer stopped and continued": (False, True),
    "API server away": (True, True),
    "Ctrl-C": (True, False),
    "scheduler killed": (True, True),
    "service restarted": (True, True),
    "answers cut": (True, True),
    "token revoked": (True, True),
    "cleared by a person": (True, True),
    "marked failed by a person": (True, True),
}
#: Those in which somebody, or the task itself, ends the job; in all others nobody may cancel anything.
ENDS_THE_JOB = frozenset({"cleared by a person", "marked failed by a person", "Ctrl-C"})
MODES: tuple[Mode, Mode] = ("blocking", "deferred")


@dataclass(frozen=True)
class Run:
    """One run of the schedule."""

    number: int
    mode: Mode
    point: str
    seed: int

    def __str__(self) -> str:
        return f"{self.number:4d}  {self.mode:8}  {self.point:31}"


def schedule(count: int, seed: int) -> Iterator[Run]:
    """``count`` runs: all points of all modes in random order, again and again."""
    rng = random.Random(seed)
    number = 0
    while True:
        everything = [
            (mode, point)
            for point, exists in POINTS.items()
            for mode, there in zip(MODES, exists, strict=True)
            if there
        ]
        rng.shuffle(everything)
        for mode, point in everything:
            if number == count:
                return
            number += 1
            yield Run(number, mode, point, rng.randrange(1 << 30))
