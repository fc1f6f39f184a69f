"""The trigger's event, as operator and sensor read it."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_datasphere.compat import deferral_timed_out
from airflow_provider_datasphere.exceptions import DataSphereError
from airflow_provider_datasphere.triggers.event import JobEvent


def test_fields_of_another_version_are_ignored_or_have_a_default() -> None:
    event = {"status": "timeout", "job_id": "bt1", "cancelled": True, "try_number": 2, "new_field": 1}
    assert JobEvent.parse(event) == JobEvent("timeout", "bt1", cancelled=True)
    assert JobEvent.parse({"status": "ended", "job_id": "bt1", "operation_id": None}).message == ""


@pytest.mark.parametrize(
    "event", [None, {}, {"status": "ended"}, {"status": "ended", "job_id": ""}, {"job_id": "bt1"}, {"status": "x"}]
)
def test_an_event_of_another_trigger_is_refused(event: Any) -> None:
    with pytest.raises(DataSphereError, match="Unexpected trigger event"):
        JobEvent.parse(event)


@pytest.mark.parametrize(
    ("next_method", "error", "timed_out"),
    [
        ("__fail__", "Trigger timeout", True),
        ("__fail__", "Trigger/execution timeout", True),
        ("__fail__", "Trigger failure", False),
        ("__fail__", None, False),
        ("execute_complete", "Trigger timeout", False),
    ],
)
def test_airflows_own_timeout_of_a_deferral(next_method: str, error: str | None, timed_out: bool) -> None:
    assert deferral_timed_out(next_method, None if error is None else {"error": error}) is timed_out
