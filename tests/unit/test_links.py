"""The job link: read from the XCom of that very task instance, and never a task's trouble."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_datasphere.links import jobs
from airflow_provider_datasphere.links.jobs import DataSphereJobLink

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
