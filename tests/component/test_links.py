"""The job link: read from the XCom of that very task instance, and never a task's trouble."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_datasphere.exceptions import JobLostError, JobRequestError
from airflow_provider_datasphere.links import jobs
from airflow_provider_datasphere.links.jobs import DataSphereJobLink
from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_side import connect, context_of
from datasphere_emulator import Emulator, Script

URL = "https://datasphere.yandex.cloud/communities/bt1c/projects/bt1p/job/bt1j"


def xcoms(monkeypatch: pytest.MonkeyPatch, values: dict[tuple[str, int, str], Any]) -> None:
    """Airflow's XCom table: the link's other side."""

    def get_value(*, ti_key: Any, key: str) -> Any:
        return values.get((ti_key.task_id, ti_key.map_index, key))

    monkeypatch.setattr(jobs, "XCom", SimpleNamespace(get_value=get_value))


def key(map_index: int = -1) -> Any:
    return SimpleNamespace(dag_id="d", task_id="fork", run_id="r", try_number=1, map_index=map_index)


def test_name_and_keys() -> None:
    link = DataSphereJobLink()
    assert link.name == "DataSphere job"
    assert link.link_key == "_link_DataSphereJobLink"
    # Where Airflow 3 looks by itself, and what operators push early.
    assert getattr(link, "xcom_key", link.link_key) == link.link_key


def test_each_mapped_task_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    xcoms(monkeypatch, {("fork", 0, "job_url"): URL + "0", ("fork", 1, "job_url"): URL + "1"})
    link = DataSphereJobLink()
    assert [link.get_link(SimpleNamespace(), ti_key=key(index)) for index in (0, 1, 2)] == [URL + "0", URL + "1", ""]


def test_an_xcom_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_value(**_: Any) -> Any:
        raise RuntimeError("the API server is away")

    monkeypatch.setattr(jobs, "XCom", SimpleNamespace(get_value=get_value))
    assert DataSphereJobLink().get_link(SimpleNamespace(), ti_key=key()) == ""


def test_airflow_serializes_it() -> None:
    link = DataSphereJobLink()
    assert link == DataSphereJobLink()
    assert type(link).__module__ == "airflow_provider_datasphere.links.jobs"


@pytest.fixture
def emulator(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    connect(emulator, monkeypatch)
    return emulator


@pytest.mark.parametrize("fails", [True, False])
def test_airflow_is_asked_only_where_there_is_a_job(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    asked: list[str] = []

    def get_value(*, ti_key: Any, key: str) -> str:
        asked.append(key)
        return URL

    monkeypatch.setattr(jobs, "XCom", SimpleNamespace(get_value=get_value))
    source = emulator.create_scripted_job(Script())
    arguments = {"RNGE": "1"} if fails else {}
    task = ForkJobOperator(task_id="fork", source_job_id=source, args=arguments, deferrable=False)
    with pytest.raises(JobRequestError, match="RNGE") if fails else nullcontext():
        task.execute(context_of(task))
    assert DataSphereJobLink().get_link(task, ti_key=key()) == ("" if fails else URL)
    assert asked == ([] if fails else ["job_url"])


def test_airflow_is_asked_for_a_task_that_this_process_did_not_execute(monkeypatch: pytest.MonkeyPatch) -> None:
    xcoms(monkeypatch, {("fork", -1, "job_url"): URL})
    task = ForkJobOperator(task_id="fork", source_job_id="bt1source")
    assert DataSphereJobLink().get_link(task, ti_key=key()) == URL
    # One that was resumed has a job, though this process hasn't made it.
    with pytest.raises(JobLostError):
        task.resume_execution("execute_complete", {"event": {"status": "lost", "job_id": "bt1"}}, context_of(task))
    assert DataSphereJobLink().get_link(task, ti_key=key()) == URL
