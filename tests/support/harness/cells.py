"""What a scenario is: one fate of a job, the ways of waiting for it, and what each must make of it.

A *scenario* is one fate of a job. It is played once per *column* (a way of waiting) and number of retries; that is a
*cell*. Each cell has a service account, a connection and a source job of its own, so that its calls can be counted and
its service can be spoiled without touching the others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasphere_emulator import Emulator, Script

#: Declared outputs of every source job, path and variable, and what its program writes there.
OUTPUTS = [("result.txt", "RESULT"), ("models/model.bin", "MODEL")]
CONTENT = {"RESULT": "forty-two\n", "MODEL": "weights\n"}
INSTANCE_TYPE = "c1.4"


@dataclass(frozen=True)
class Column:
    """A way of waiting.

    :param arguments: of the operator or the sensor.
    :param with_operation: whether a sensor is given the operation id.
    :param retries: numbers of retries it is played with.
    :param new: whether the operator makes a new job in place of a fork.
    """

    name: str
    sensor: bool
    arguments: Mapping[str, Any]
    with_operation: bool = True
    retries: Sequence[int] = (0, 1)
    new: bool = False


_ALL_COLUMNS = (
    Column("blocking", False, {"deferrable": False, "poll_interval": 0.5}),
    Column("deferrable", False, {"deferrable": True, "poll_interval": 0.5}),
    Column("new", False, {"deferrable": False, "poll_interval": 0.5}, new=True),
    Column("new_deferrable", False, {"deferrable": True, "poll_interval": 0.5}, new=True),
    Column("poke", True, {"mode": "poke", "poke_interval": 0.3, "deferrable": False}),
    Column("reschedule", True, {"mode": "reschedule", "poke_interval": 3, "deferrable": False}),
    Column("sensor_deferrable", True, {"deferrable": True, "poke_interval": 0.3}),
    Column("job_id_alone", True, {"mode": "poke", "poke_interval": 0.3, "deferrable": False}, False, retries=(0,)),
)
#: All, or those that SCENARIO_COLUMNS names, for a shorter loop.
COLUMNS = tuple(
    column
    for column in _ALL_COLUMNS
    if column.name in os.environ.get("SCENARIO_COLUMNS", ",".join(one.name for one in _ALL_COLUMNS)).split(",")
)


@dataclass(frozen=True)
class Stage:
    """Where an event happens: one cell's job, which runs."""

    emulator: Emulator
    subject: str
    job_id: str

    def spoil(self, method: str, **fault: Any) -> str:
        """Spoil the calls of this cell alone; returns the fault's id."""
        return self.emulator.faults.inject(method, subject=self.subject, **fault)


Event = Callable[[Stage], None]


@dataclass(frozen=True)
class Expected:
    """What a cell ends in.

    :param error: the exception's class, by its public name.
    :param result: the XCom ``result`` without job id and times; ``None``: there is none.
    :param tries: how many tries the task made.
    :param jobs: how many jobs were run.
    """

    state: str
    error: str | None = None
    result: Mapping[str, Any] | None = None
    tries: int = 1
    jobs: int = 1


def result(
    status: str = "SUCCESS",
    return_code: int | None = 0,
    *,
    made: Sequence[str] = ("RESULT", "MODEL"),
    missing: Sequence[str] = (),
    details: str = "",
    instance_type: str | None = INSTANCE_TYPE,
) -> dict[str, Any]:
    """The XCom ``result`` as it must be, without job id and times."""
    return {
        "status": status,
        "return_code": return_code,
        "status_details": details,
        "instance_type": instance_type,
        "output_files": [
            {
                "path": path,
                "var": var,
                "size_bytes": len(CONTENT[var]),
                "sha256": hashlib.sha256(CONTENT[var].encode()).hexdigest(),
            }
            for path, var in OUTPUTS
            if var in made
        ],
        "missing_outputs": list(missing),
        "output_datasets": [],
    }


SUCCESS = Expected("success", result=result())


@dataclass(frozen=True)
class Scenario:
    """One fate of a job.

    :param scripts: what the program does; each further try that forks takes the next one, the last one repeats.
    :param expected: in every column, without retries.
    :param after_retry: of the operator with ``retries=1``, where that differs: it forks anew.
    :param sensor_after_retry: of the sensor with ``retries=1``, where that differs: it looks again.
    :param without_operation: of the sensor that is given the job id alone, where that differs.
    :param arguments: of operator and sensor.
    :param settings: of the emulator; such a scenario has one of its own.
    :param faults: of the cell's calls, from the beginning.
    :param event: happens once to each job that runs, after the first look at it.
    :param at_once: the event happens before the first look.
    :param ended_first: the sensor's job is over before the sensor begins.
    :param source_cleared: the source job's data have been cleared.
    :param key: the connection has an authorized key, which gets new tokens, in place of a token.
    :param log: what must be in the task's log, in this order, where the job's log is shown.
    :param left_running: whether the job goes on after the task's end.
    :param columns: names of the columns it is played in.
    :param retries: numbers of retries it is played with.
    :param poke_interval: of a rescheduled sensor, seconds, where one per second would be too often.
    :param weight: scenarios that take long begin first.
    """

    name: str
    scripts: Sequence[Script]
    expected: Expected = SUCCESS
    after_retry: Expected | None = None
    sensor_after_retry: Expected | None = None
    without_operation: Expected | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    faults: Sequence[Mapping[str, Any]] = ()
    event: Event | None = None
    at_once: bool = False
    ended_first: bool = False
    source_cleared: bool = False
    key: bool = False
    log: Sequence[str] = ()
    left_running: bool = False
    columns: Sequence[str] = tuple(column.name for column in _ALL_COLUMNS)
    retries: Sequence[int] = (0, 1)
    poke_interval: float | None = None
    weight: int = 1

    def is_played(self, column: Column, retries: int) -> bool:
        """Whether the table has this cell."""
        return column.name in self.columns and retries in self.retries and retries in column.retries

    def expects(self, column: Column, retries: int) -> Expected:
        """What the cell ends in."""
        if not column.sensor:
            return self.after_retry if retries and self.after_retry is not None else self.expected
        if not column.with_operation and self.without_operation is not None:
            return self.without_operation
        return self.sensor_after_retry if retries and self.sensor_after_retry is not None else self.expected
