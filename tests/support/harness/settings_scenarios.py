"""Rows of the scenario table about what nobody knows of the service: the emulator's settings, turned the other way.

Each row has an emulator of its own. They are played in a part of the columns: what differs between the modes is how
they wait, and who asks; that the client itself is right every way is shown by ``component/jobs/test_both_ways.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasphere_emulator import LogLine
from harness.cells import INSTANCE_TYPE, Expected, Scenario, result
from harness.scenarios import TWICE, cancelled_by_a_person, ended_with, failed, script

_COLUMNS = ("blocking", "deferrable", "new", "new_deferrable", "sensor_deferrable", "job_id_alone")
_OPERATORS = ("blocking", "deferrable", "new", "new_deferrable")
#: Takes long enough that a reader who comes late has missed something.
_TALKATIVE = [LogLine(0.0, "first line\n"), LogLine(1.5, "in the middle\n"), LogLine(2.9, "last line\n")]
_LINES = ["first line", "in the middle", "last line"]


def _turned(name: str, settings: dict[str, Any], **fields: Any) -> Scenario:
    fields = {"scripts": [script()], "columns": _COLUMNS, "retries": (0,), **fields}
    return Scenario(name, settings=settings, **fields)


SETTINGS_SCENARIOS: Sequence[Scenario] = (
    _turned(
        "small_things_the_other_way",
        {
            "clone_env_vars": "merge",
            "clone_empty_name": "empty",
            "clone_empty_desc": "empty",
            "clone_requires_started_source": True,
            "stored_uploads": "empty_url",
            "upload_order": "declared",
            "unset_data_ttl": "infinite",
            "default_data_ttl_seconds": 3600.0,
            "unique_names": True,
            "max_name_length": 63,
            "max_desc_length": 200,
            "allowed_instance_types": [INSTANCE_TYPE],
            "read_role": "developer",
            "url_lifetime_seconds": 60.0,
            "fresh_operation_urls": True,
            "list_order": "oldest",
            "seed": 7,
            "preparing_seconds": 1.0,
            "uploading_seconds": 1.0,
        },
    ),
    _turned(
        "new_job_out_of_sight_until_it_is_cloned",
        {"new_jobs_visible": "when_done", "clone_seconds": 2.0, "creating_seconds": 1.0},
    ),
    _turned("no_room_and_the_job_stays", {"room_refusals": 2}),
    _turned("no_room_and_the_job_fails", {"room_refusals": 1, "refused_job": "error", "refused_job_seconds": 0.5}),
    _turned("no_room_by_another_code", {"room_refusals": 1, "quota_code": "UNAVAILABLE"}),
    _turned("room_for_few", {"max_running_jobs": 3, "max_concurrent_streams": 4}),
    _turned(
        "instance_types_refused_for_a_call", {"unavailable_instance_types": [INSTANCE_TYPE], "unavailable_calls": 1}
    ),
    _turned(
        "instance_types_refused_for_a_while",
        {
            "unavailable_instance_types": [INSTANCE_TYPE],
            "unavailable_seconds": 3.0,
            "instance_types_checked_by": ["Execute"],
        },
    ),
    _turned(
        "log_from_now_on",
        {"read_logs_of_running_job": "live"},
        scripts=[script(log=_TALKATIVE)],
        log=_LINES,
        columns=_OPERATORS,
    ),
    _turned(
        "log_at_the_end",
        {"read_logs_of_running_job": "at_end"},
        scripts=[script(log=_TALKATIVE)],
        log=_LINES,
        columns=_OPERATORS,
    ),
    _turned(
        "log_a_minute_late",
        {"log_delay_seconds": 60.0},
        scripts=[script(log=_TALKATIVE)],
        log=_LINES,
        columns=_OPERATORS,
        weight=90,
    ),
    _turned(
        "log_in_pieces",
        {"log_chunk_bytes": 5, "log_stream_seconds": 0.5, "log_keepalive_seconds": 0.2},
        scripts=[script(log=_TALKATIVE)],
        log=_LINES,
        columns=_OPERATORS,
    ),
    _turned("operation_forgotten_at_its_end", {"operation_retention_seconds": 0.0}),
    _turned(
        "failure_shown_as_success",
        {"status_after_nonzero_exit": "SUCCESS", "outputs_after_error": "never"},
        scripts=[script(return_code=1)],
        expected=failed("JobFailedError", ended_with(1, status="SUCCESS", made=())),
        # The job alone doesn't tell the return code.
        without_operation=Expected("success", result=ended_with(1, status="SUCCESS", return_code=0, made=())),
    ),
    _turned(
        "unstored_output_shown_as_success",
        {"status_after_failed_upload": "SUCCESS"},
        scripts=[script(failed_uploads=["MODEL"])],
        expected=failed("JobInfrastructureError", result(made=("RESULT",))),
    ),
    _turned(
        "cancelled_with_another_code",
        {
            "cancelled_operation_code": "ABORTED",
            "cancelling_seconds": 1.0,
            "outputs_after_cancel": "never",
            "cancel_finished": "ok",
        },
        scripts=[script(never_ends=True)],
        expected=failed(
            "JobCancelledError",
            result("CANCELLED", None, made=(), details="Job was cancelled. Reason: no longer needed"),
        ),
        event=cancelled_by_a_person,
    ),
    _turned(
        "keys_ignored_and_answers_lost",
        {"idempotency": False, "execute_finished": "failed_precondition", "list_order": "shuffled"},
        faults=[{"method": method, "lost_answer": True, "times": 1} for method in ("Clone", "Execute")],
    ),
    _turned(
        "a_retry_where_ended_jobs_refuse",
        {"execute_finished": "failed_precondition", "list_order": "oldest"},
        scripts=[script(return_code=1), script()],
        expected=failed("JobFailedError", ended_with(1)),
        after_retry=TWICE,
        columns=_OPERATORS,
        retries=(1,),
    ),
)
