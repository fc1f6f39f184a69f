"""Finding the job of an earlier try among many, and what it costs."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from airflow_provider_datasphere.client.errors import JobInfrastructureError
from airflow_provider_datasphere.client.submission import creation, job_search
from airflow_provider_datasphere.client.submission.fork import SourceJob
from airflow_provider_datasphere.client.submission.job_key import Key
from airflow_provider_datasphere.client.submission.job_search import find_jobs
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator, Script
from generations import DictStore, Generation

ENDLESS, FAILS = Script(never_ends=True), Script(return_code=1)
#: Jobs of others in the project.
MANY = 3000


def key(since: datetime | None = None) -> Key:
    return Key(("dag", "run", "its start", "task", -1, 2), "dag.task run", retries=2, since=since)


def clones(emulator: Emulator, source: str, count: int, desc: str = "a person's") -> None:
    request = service_pb2.CloneProjectJobRequest(source_job_id=source, desc=desc)

    def make() -> None:
        for _ in range(count):
            emulator.state.job_service.clone("anybody", request, None)

    emulator._run(make)


@pytest.fixture
def source(emulator: Emulator) -> str:
    return emulator.create_scripted_job(ENDLESS)


def lists(emulator: Emulator) -> list[Any]:
    return [call.request or {} for call in emulator.journal.calls("List")]


@pytest.mark.parametrize("order", ["newest", "oldest", "shuffled"])
def test_three_thousand_jobs_are_read_in_a_few_pages(
    emulator: Emulator, client: DataSphereClient, source: str, order: str
) -> None:
    """Pages by weight: of fifty at first, then as many as fit a megabyte."""
    emulator.settings.list_order = order
    clones(emulator, source, MANY)
    assert find_jobs(client, emulator.project_id, key(), SourceJob(client, source)) == []
    pages = lists(emulator)
    assert pages[0]["page_size"] == "50"
    # The living ones, which all are here, and then all.
    assert len(pages) <= 2 * 10


def test_a_job_that_runs_is_found_with_one_call(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    clones(emulator, source, MANY // 10)
    for job in emulator.jobs(source):
        emulator.cancel_job(job.id)
    generation = Generation(emulator, client, source, store=None)
    first = generation.try_once().handle
    emulator.journal.clear()
    assert generation.try_once().handle == first
    (page,) = lists(emulator)
    assert page["filter"] == "status IN (CREATING, PREPARING, EXECUTING, UPLOADING_OUTPUT, CANCELLING)"


def test_a_list_that_begins_with_the_newest_is_read_to_the_runs_start(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    clones(emulator, source, MANY)
    for job in emulator.jobs(source):
        emulator.cancel_job(job.id)
    tomorrow = datetime.now(timezone.utc) + 2 * job_search.CLOCK_MARGIN
    emulator.journal.clear()
    assert find_jobs(client, emulator.project_id, key(since=tomorrow), SourceJob(client, source)) == []
    assert len(lists(emulator)) == 2
    emulator.settings.list_order = "oldest"
    assert find_jobs(client, emulator.project_id, key(since=tomorrow), SourceJob(client, source)) == []
    assert len(lists(emulator)) > 4


def test_a_page_that_is_too_large_is_read_in_halves(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    clones(emulator, source, 100)
    too_large = "trying to send message larger than max (5000000 vs. 4194304)"
    emulator.faults.inject("List", code="RESOURCE_EXHAUSTED", message=too_large, skip=1, times=3)
    pages = list(client.list_job_pages(emulator.project_id))
    assert sorted(job.id for page in pages for job in page) == sorted(job.id for job in emulator.jobs())
    sizes = [int(page["page_size"]) for page in lists(emulator)]
    rest = sizes[1:]
    assert rest[:4] == [rest[0], rest[0] // 2, rest[0] // 4, rest[0] // 8]
    assert len({page.get("page_token") for page in lists(emulator)[1:5]}) == 1


def test_a_service_without_the_filter_is_searched_as_a_whole(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    generation = Generation(emulator, client, source, store=None)
    first = generation.try_once().handle
    emulator.faults.inject("List", code="INVALID_ARGUMENT", times=1)
    assert generation.try_once().handle == first


def test_clocks_that_differ_lose_no_job(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    """By Airflow's clock the run starts a quarter of an hour after the service says that its job was made."""
    late = key(since=datetime.now(timezone.utc) + timedelta(minutes=15))
    generation = Generation(emulator, client, source, store=None, key=late)
    clones(emulator, source, MANY // 10)
    first = generation.try_once().handle
    emulator.wait_job(first.job_id, "EXECUTING")
    assert generation.try_once().handle == first


def test_a_retry_after_an_error_asks_the_store_and_not_the_project(
    emulator: Emulator, client: DataSphereClient
) -> None:
    source = emulator.create_scripted_job(FAILS)
    generation = Generation(emulator, client, source, DictStore())
    for _ in range(3):
        emulator.journal.clear()
        assert generation.run() == 1
        calls = [call.method for call in emulator.journal.calls()]
        assert calls.index("Clone") <= 3
        assert "List" not in calls


def test_a_list_that_lags_behind_is_no_hot_loop(
    emulator: Emulator, client: DataSphereClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows CANCELLING long after the job has ended."""
    emulator.settings.cancelling_seconds = 0.2
    source = emulator.create_scripted_job(ENDLESS)
    generation = Generation(emulator, client, source, store=None)
    first = generation.try_once().handle
    client.cancel(first.job_id, reason="Airflow: the task was ended")
    emulator.wait_job(first.job_id, "CANCELLING")
    stale = [client.get(first.job_id)]
    emulator.wait_job(first.job_id, "CANCELLED")
    searches: list[Any] = []

    def lagging(*arguments: Any) -> list[Any]:
        searches.append(arguments)
        return list(stale)

    monkeypatch.setattr("airflow_provider_datasphere.client.submission.earlier_jobs.find_jobs", lagging)
    assert generation.try_once().handle.job_id != first.job_id
    assert len(searches) == 1


def test_a_clone_that_is_never_done_is_said_and_has_a_limit(
    emulator: Emulator, client: DataSphereClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(creation, "CREATION_REPORT_SECONDS", 0.2)
    monkeypatch.setattr(creation, "MAX_CREATION_SECONDS", 0.6)
    source = emulator.create_scripted_job(ENDLESS)
    emulator.settings.clone_seconds = 3600.0
    with caplog.at_level(logging.WARNING), pytest.raises(JobInfrastructureError, match=r"isn't done after .* seconds"):
        Generation(emulator, client, source, store=None).try_once()
    assert "isn't done after" in caplog.text
    assert emulator.jobs(source) == []
    assert emulator.journal.count("Execute") == 0
