"""What the service receives of templates, in native and in text rendering."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_side import connect, context_of
from datasphere_emulator import Emulator, Script

CONTEXT: Any = {"day": "20260101", "nothing": None, "both": {"N": "1", "M": "2"}}


def fork(*, native: bool, **fields: Any) -> ForkJobOperator:
    with DAG("text", schedule=None, render_template_as_native_obj=native):
        task = ForkJobOperator(task_id="fork", **fields)
    task.render_template_fields(dict(CONTEXT))
    return task


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ both }}", "render_template_as_native_obj=True"), ("{{ '' }}", r"args is '': give a mapping")],
)
def test_a_mapping_that_renders_to_text_is_an_error(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    connect(emulator, monkeypatch)
    task = fork(native=False, args=template, source_job_id=emulator.create_scripted_job(Script()))
    with pytest.raises(JobRequestError, match=message):
        task.execute(context_of(task))
    assert emulator.journal.calls("Clone") == []


def test_a_native_dag_forks_with_the_text_that_was_written(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(emulator, monkeypatch)
    source = emulator.create_scripted_job(Script(), args={"RANGE": "0", "DAY": "0"})
    task = fork(native=True, source_job_id=source, args={"RANGE": "007", "DAY": "{{ day }}"})
    task.execute(context_of(task))
    (clone,) = emulator.journal.calls("Clone")
    assert clone.request["job_parameters_overrides"]["arguments"] == [
        {"name": "RANGE", "value": "007"},
        {"name": "DAY", "value": "20260101"},
    ]
    nothing = fork(native=True, args={"DAY": "{{ nothing }}"}, source_job_id=source)
    with pytest.raises(JobRequestError, match=r"args\['DAY'\] is None: leave it out"):
        nothing.execute(context_of(nothing))
    assert emulator.journal.count("Clone") == 1
