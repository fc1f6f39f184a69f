"""The scenario table: what can become of a job, and what every way of waiting for it must make of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasphere_emulator import LogLine, Progress, Script
from harness.cells import CONTENT, SUCCESS, Expected, Scenario, Stage, result

#: Airflow fails a task that is resumed before the scheduler has noticed that the part before is over ("finished with
#: state success, but the task instance's state attribute is queued"), so no job and no pause is shorter, seconds.
_A_WHILE = 3.0


def script(**fields: Any) -> Script:
    """A program that runs for a while and makes its outputs, unless said otherwise."""
    return Script(**{"executing_seconds": _A_WHILE, "outputs": dict(CONTENT), **fields})


def cancelled_by_a_person(stage: Stage) -> None:
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


def failed(error: str, shown: Mapping[str, Any] | None, tries: int = 1, jobs: int = 1) -> Expected:
    return Expected("failed", error, shown, tries, jobs)


def ended_with(code: int, *, known: bool = True, **fields: Any) -> dict[str, Any]:
    """The result of a program that failed; its code is known to the operation only."""
    return result(
        **{
            "status": "ERROR",
            "return_code": code if known else None,
            "details": f"Program returned code {code}.",
            **fields,
        }
    )


def _program_failed(name: str, code: int, **fields: Any) -> Scenario:
    """A program that fails: retried by the operator, final for a sensor; the job alone doesn't tell the code."""
    shown, unknown = ended_with(code), ended_with(code, known=False)
    return Scenario(
        name,
        [script(return_code=code)],
        expected=failed("JobFailedError", shown),
        after_retry=failed("JobFailedError", shown, tries=2, jobs=2),
        without_operation=failed("JobFailedError", unknown),
        **fields,
    )


def _operation_error(name: str, code: str) -> Scenario:
    shown = result("ERROR", None, made=(), details="no free instances")
    return Scenario(
        name,
        [script(error=(code, "no free instances"))],
        expected=failed("JobInfrastructureError", shown),
        after_retry=failed("JobInfrastructureError", shown, tries=2, jobs=2),
        without_operation=failed("JobFailedError", shown),
    )


def _unstored(code: int | None) -> dict[str, Any]:
    """The result of a program that ended well, and of which an output couldn't be stored."""
    details = "Some output files were not uploaded due to errors: models/model.bin (Error while processing file)"
    return result("ERROR", code, made=("RESULT",), details=details)


_NEVER_RAN = result("ERROR", None, made=(), details="no instance")
_MISSING = result(made=("MODEL",), missing=("result.txt",))
TWICE = replace(SUCCESS, tries=2, jobs=2)
_LOST = failed("JobLostError", None)

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
        expected=failed("JobFailedError", ended_with(1)),
        after_retry=TWICE,
        without_operation=failed("JobFailedError", ended_with(1, known=False)),
    ),
    Scenario(
        "cancelled_by_a_person",
        [script(never_ends=True)],
        expected=failed(
            "JobCancelledError",
            result("CANCELLED", None, details="Job was cancelled. Reason: no longer needed"),
        ),
        event=cancelled_by_a_person,
    ),
    Scenario(
        "no_instance_before_it_runs",
        [script(preparing_seconds=_A_WHILE, error=("RESOURCE_EXHAUSTED", "no instance"), error_in="PREPARING")],
        expected=failed("JobInfrastructureError", _NEVER_RAN),
        after_retry=failed("JobInfrastructureError", _NEVER_RAN, tries=2, jobs=2),
        log=["had no capacity"],
    ),
    _operation_error("operation_error_internal", "INTERNAL"),
    _operation_error("operation_error_resource_exhausted", "RESOURCE_EXHAUSTED"),
    Scenario(
        "operation_error_then_succeeds",
        [script(error=("INTERNAL", "no free instances")), script()],
        expected=failed("JobInfrastructureError", result("ERROR", None, made=(), details="no free instances")),
        after_retry=TWICE,
        without_operation=failed("JobFailedError", result("ERROR", None, made=(), details="no free instances")),
    ),
    Scenario(
        "missing_outputs",
        [script(missing_outputs=["RESULT"])],
        expected=failed("MissingOutputsError", _MISSING),
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
        expected=failed("JobInfrastructureError", _unstored(0)),
        after_retry=failed("JobInfrastructureError", _unstored(0), tries=2, jobs=2),
        without_operation=failed("JobInfrastructureError", _unstored(None)),
    ),
    Scenario(
        "skip_on_exit_code",
        [script(return_code=99)],
        expected=Expected("skipped", result=ended_with(99)),
        without_operation=failed("JobFailedError", ended_with(99, known=False)),
        arguments={"skip_on_exit_code": 99},
    ),
    _program_failed("another_exit_code", 3, arguments={"skip_on_exit_code": [99, 100]}),
    Scenario("ended_before_the_first_look", [script(executing_seconds=0.0)], ended_first=True),
    Scenario(
        "failed_before_the_first_look",
        [script(executing_seconds=0.0, return_code=1)],
        expected=failed("JobFailedError", ended_with(1)),
        after_retry=failed("JobFailedError", ended_with(1), tries=2, jobs=2),
        without_operation=failed("JobFailedError", ended_with(1, known=False)),
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
        after_retry=failed("JobLostError", None, tries=2, jobs=2),
        sensor_after_retry=replace(_LOST, tries=2),
        event=_deleted_and_forgotten,
        at_once=True,
    ),
    Scenario("data_cleared", [script()], event=_data_cleared, at_once=True),
    Scenario(
        "source_data_cleared",
        [script()],
        expected=failed("JobRequestError", None, jobs=0),
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
        expected=failed("JobInfrastructureError", result("ERROR", 0)),
        after_retry=failed("JobInfrastructureError", result("ERROR", 0), tries=2, jobs=2),
        without_operation=failed("JobFailedError", result("ERROR", None)),
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
        after_retry=failed("JobRequestError", None, tries=2),
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
        expected=failed("JobFailedError", ended_with(1, known=False)),
        after_retry=failed("JobFailedError", ended_with(1, known=False), tries=2, jobs=2),
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
