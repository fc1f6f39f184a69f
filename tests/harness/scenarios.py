"""The scenario table: what can become of a job, and what every way of waiting for it must make of that.

A *scenario* is one fate of a job. It is played once per *column* (a way of waiting) and number of retries; that is a
*cell*. Each cell has a service account, a connection and a source job of its own, so that its calls can be counted and
its service can be spoiled without touching the others.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasphere_emulator import Emulator, LogLine, Progress, Script

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
    """

    name: str
    sensor: bool
    arguments: Mapping[str, Any]
    with_operation: bool = True
    retries: Sequence[int] = (0, 1)


COLUMNS = (
    Column("blocking", False, {"deferrable": False, "poll_interval": 0.5}),
    Column("deferrable", False, {"deferrable": True, "poll_interval": 0.5}),
    Column("poke", True, {"mode": "poke", "poke_interval": 0.3, "deferrable": False}),
    Column("reschedule", True, {"mode": "reschedule", "poke_interval": 3, "deferrable": False}),
    Column("sensor_deferrable", True, {"deferrable": True, "poke_interval": 0.3}),
    Column("job_id_alone", True, {"mode": "poke", "poke_interval": 0.3, "deferrable": False}, False, retries=(0,)),
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
    faults: Sequence[Mapping[str, Any]] = ()
    event: Event | None = None
    at_once: bool = False
    ended_first: bool = False
    source_cleared: bool = False
    key: bool = False
    log: Sequence[str] = ()
    left_running: bool = False
    columns: Sequence[str] = tuple(column.name for column in COLUMNS)
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


#: Airflow fails a task that is resumed before the scheduler has noticed that the part before is over ("finished with
#: state success, but the task instance's state attribute is queued"), so no job and no pause is shorter, seconds.
_A_WHILE = 3.0


def script(**fields: Any) -> Script:
    """A program that runs for a while and makes its outputs, unless said otherwise."""
    return Script(**{"executing_seconds": _A_WHILE, "outputs": dict(CONTENT), **fields})


def _cancelled_by_a_person(stage: Stage) -> None:
    stage.emulator.cancel_job(stage.job_id, reason="no longer needed")


def _service_down(stage: Stage) -> None:
    fault = stage.spoil("*", code="UNAVAILABLE", message="maintenance")
    time.sleep(30)
    stage.emulator.faults.remove(fault)


def _token_revoked(stage: Stage) -> None:
    stage.emulator.iam.revoke(subject=stage.subject)


def _role_taken_away(stage: Stage) -> None:
    stage.emulator.iam.set_role(stage.subject, stage.emulator.project_id, None)


def _role_away_for_a_while(stage: Stage) -> None:
    _role_taken_away(stage)
    time.sleep(5)
    stage.emulator.iam.set_role(stage.subject, stage.emulator.project_id, "developer")


def _operation_forgotten(stage: Stage) -> None:
    stage.emulator.forget_operation(stage.emulator.operation_of(stage.job_id))


def _behind_a_curtain(stage: Stage, act: Callable[[], object]) -> None:
    """Let the job end, and ``act``, while nobody can look."""
    curtain = stage.spoil("*Get", code="UNAVAILABLE", message="busy")
    try:
        stage.emulator.wait_job(stage.job_id, None)
        act()
    finally:
        stage.emulator.faults.remove(curtain)


def _deleted(stage: Stage) -> None:
    _behind_a_curtain(stage, lambda: stage.emulator.delete_job(stage.job_id))


def _deleted_and_forgotten(stage: Stage) -> None:
    operation_id = stage.emulator.operation_of(stage.job_id)

    def act() -> None:
        stage.emulator.delete_job(stage.job_id)
        stage.emulator.forget_operation(operation_id)

    _behind_a_curtain(stage, act)


def _data_cleared(stage: Stage) -> None:
    _behind_a_curtain(stage, lambda: stage.emulator.clear_data(stage.job_id))


def _failed(error: str, shown: Mapping[str, Any] | None, tries: int = 1, jobs: int = 1) -> Expected:
    return Expected("failed", error, shown, tries, jobs)


def _ended_with(code: int, *, known: bool = True) -> dict[str, Any]:
    """The result of a program that failed; its code is known to the operation only."""
    return result("ERROR", code if known else None, details=f"Program returned code {code}.")


def _program_failed(name: str, code: int, **fields: Any) -> Scenario:
    """A program that fails: retried by the operator, final for a sensor; the job alone doesn't tell the code."""
    shown, unknown = _ended_with(code), _ended_with(code, known=False)
    return Scenario(
        name,
        [script(return_code=code)],
        expected=_failed("JobFailedError", shown),
        after_retry=_failed("JobFailedError", shown, tries=2, jobs=2),
        without_operation=_failed("JobFailedError", unknown),
        **fields,
    )


def _operation_error(name: str, code: str) -> Scenario:
    shown = result("ERROR", None, made=(), details="no free instances")
    return Scenario(
        name,
        [script(error=(code, "no free instances"))],
        expected=_failed("JobInfrastructureError", shown),
        after_retry=_failed("JobInfrastructureError", shown, tries=2, jobs=2),
        without_operation=_failed("JobFailedError", shown),
    )


_MISSING = result(made=("MODEL",), missing=("result.txt",))
_TWICE = replace(SUCCESS, tries=2, jobs=2)
_LOST = _failed("JobLostError", None)

SCENARIOS: Sequence[Scenario] = (
    Scenario(
        "success",
        [script(log=[LogLine(0.1, "first line\n"), LogLine(0.3, "to stderr\n", "stderr"), LogLine(0.5, "last line")])],
        log=["first line", "[stderr] to stderr", "last line"],
    ),
    _program_failed("return_code_1", 1),
    _program_failed("program_killed", 137),
    Scenario(
        "fails_then_succeeds",
        [script(return_code=1), script()],
        expected=_failed("JobFailedError", _ended_with(1)),
        after_retry=_TWICE,
        without_operation=_failed("JobFailedError", _ended_with(1, known=False)),
    ),
    Scenario(
        "cancelled_by_a_person",
        [script(never_ends=True)],
        expected=_failed(
            "JobCancelledError",
            result("CANCELLED", None, made=(), details="Job was cancelled. Reason: no longer needed"),
        ),
        event=_cancelled_by_a_person,
    ),
    _operation_error("operation_error_internal", "INTERNAL"),
    _operation_error("operation_error_resource_exhausted", "RESOURCE_EXHAUSTED"),
    Scenario(
        "operation_error_then_succeeds",
        [script(error=("INTERNAL", "no free instances")), script()],
        expected=_failed("JobInfrastructureError", result("ERROR", None, made=(), details="no free instances")),
        after_retry=_TWICE,
        without_operation=_failed("JobFailedError", result("ERROR", None, made=(), details="no free instances")),
    ),
    Scenario(
        "missing_outputs",
        [script(missing_outputs=["RESULT"])],
        expected=_failed("MissingOutputsError", _MISSING),
    ),
    Scenario(
        "missing_outputs_allowed",
        [script(missing_outputs=["RESULT"])],
        expected=Expected("success", result=_MISSING),
        arguments={"fail_on_missing_outputs": False},
    ),
    Scenario(
        "outputs_not_stored",
        [script(failed_uploads=["MODEL"])],
        expected=_failed("JobInfrastructureError", result(made=("RESULT",))),
        after_retry=_failed("JobInfrastructureError", result(made=("RESULT",)), tries=2, jobs=2),
    ),
    Scenario(
        "skip_on_exit_code",
        [script(return_code=99)],
        expected=Expected("skipped", result=_ended_with(99)),
        without_operation=_failed("JobFailedError", _ended_with(99, known=False)),
        arguments={"skip_on_exit_code": 99},
    ),
    _program_failed("another_exit_code", 3, arguments={"skip_on_exit_code": [99, 100]}),
    Scenario("ended_before_the_first_look", [script(executing_seconds=0.0)], ended_first=True),
    Scenario(
        "failed_before_the_first_look",
        [script(executing_seconds=0.0, return_code=1)],
        expected=_failed("JobFailedError", _ended_with(1)),
        after_retry=_failed("JobFailedError", _ended_with(1), tries=2, jobs=2),
        without_operation=_failed("JobFailedError", _ended_with(1, known=False)),
        ended_first=True,
    ),
    Scenario(
        "deleted_after_its_end",
        [script()],
        expected=Expected("success", result=result(instance_type=None)),
        without_operation=_LOST,
        event=_deleted,
        at_once=True,
        retries=(0,),
    ),
    Scenario(
        "deleted_and_operation_gone",
        [script()],
        expected=_LOST,
        after_retry=_failed("JobLostError", None, tries=2, jobs=2),
        sensor_after_retry=replace(_LOST, tries=2),
        event=_deleted_and_forgotten,
        at_once=True,
    ),
    Scenario("data_cleared", [script()], event=_data_cleared, at_once=True),
    Scenario(
        "source_data_cleared",
        [script()],
        expected=_failed("JobRequestError", None, jobs=0),
        source_cleared=True,
        columns=("blocking", "deferrable"),
    ),
    Scenario(
        "unknown_status_number",
        [script(statuses=[(0.2, 42), (0.8, 3), (1.0, 77)])],
    ),
    Scenario(
        "status_contradicts_return_code",
        [script(final_status=5)],
        expected=_failed("JobInfrastructureError", result("ERROR", 0)),
        after_retry=_failed("JobInfrastructureError", result("ERROR", 0), tries=2, jobs=2),
        without_operation=_failed("JobFailedError", result("ERROR", None)),
    ),
    Scenario("token_revoked", [script()], event=_token_revoked, key=True),
    Scenario(
        "service_down_for_30_seconds",
        [script()],
        event=_service_down,
        poke_interval=8,
        weight=90,
    ),
    Scenario(
        "role_taken_away",
        [script(never_ends=True)],
        expected=_LOST,
        # The second try may not even look at the source job; somebody has to act.
        after_retry=_failed("JobRequestError", None, tries=2),
        sensor_after_retry=replace(_LOST, tries=2),
        event=_role_taken_away,
        left_running=True,
        weight=100,
    ),
    Scenario("role_away_for_a_while", [script()], event=_role_away_for_a_while, weight=10),
    Scenario("operation_not_found", [script()], event=_operation_forgotten, at_once=True),
    Scenario(
        "operation_not_found_job_failed",
        [script(return_code=1)],
        expected=_failed("JobFailedError", _ended_with(1, known=False)),
        after_retry=_failed("JobFailedError", _ended_with(1, known=False), tries=2, jobs=2),
        event=_operation_forgotten,
        at_once=True,
    ),
    Scenario(
        "log_stream_denied",
        [script(log=["nobody may read this"])],
        faults=[{"method": "ReadLogs", "code": "PERMISSION_DENIED"}],
        log=["The log above may be incomplete", "PERMISSION_DENIED"],
    ),
    Scenario(
        "log_stream_breaks",
        [script(log=[LogLine(number / 10, f"line {number}\n") for number in range(10)])],
        faults=[{"method": "ReadLogs", "code": "UNAVAILABLE", "after_messages": 2, "times": 3}],
        log=[f"line {number}" for number in range(10)],
    ),
    Scenario(
        "log_burst_10_mb",
        [script(burst_bytes=10_000_000, burst_at=0.2)],
        log=["burst line 000000000000", "burst line 000000099999"],
        retries=(0,),
        weight=80,
    ),
    Scenario(
        "output_not_utf8",
        [script(log=[LogLine(0.1, b"caf\xe9 \xff\n"), LogLine(0.2, "готово\n")])],  # type: ignore[arg-type]
        log=[r"caf\xe9 \xff", "готово"],
    ),
    Scenario(
        "progress",
        [script(progress=[Progress(0.1, 10, "epoch 1"), Progress(0.6, 90, "epoch 2")])],
        # Once, whichever came first: the log's line, or the operation that tells it earlier.
        log=["90 % epoch 2"],
    ),
    Scenario(
        "no_answer_to_a_read",
        [script()],
        faults=[{"method": "Operation.Get", "hang": True, "times": 1}],
        weight=20,
    ),
    Scenario(
        "every_third_read_fails",
        [script()],
        faults=[{"method": "*Get", "code": "INTERNAL", "probability": 0.3}],
    ),
    Scenario(
        "answers_to_clone_and_execute_lost",
        [script()],
        faults=[{"method": method, "lost_answer": True, "times": 1} for method in ("Clone", "Execute")],
    ),
    Scenario(
        "no_room_for_another_job",
        [script()],
        faults=[{"method": "Execute", "code": "RESOURCE_EXHAUSTED", "message": "too many jobs", "times": 2}],
    ),
)
