"""Jobs that wait for room in the triggerer: one of them asks for all, and none is started twice."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
from airflow_provider_datasphere.client.connection.channels import AsyncChannels
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import DataSphereError, JobInfrastructureError, JobNotStartedError
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.submission import capacity, start_queue
from airflow_provider_datasphere.client.submission.execute import execute
from airflow_provider_datasphere.client.submission.execution import JobEndedUnstartedError
from airflow_provider_datasphere.client.submission.start_clock import StartClock
from airflow_provider_datasphere.client.submission.start_queue import QueuedJob
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator, Script
from waits import until

ENDLESS = Script(never_ends=True)
REASON = "RESOURCE_EXHAUSTED: no room"


async def always() -> bool:
    return True


class Triggerer:
    """An event loop's client, with the jobs that wait in it."""

    def __init__(self, emulator: Emulator, channels: AsyncChannels, settings: Settings) -> None:
        self.emulator = emulator
        self.client = AsyncDataSphereClient(channels, settings)
        self.began = time.time()
        self.waits: dict[str, asyncio.Task[JobHandle]] = {}

    def job(self, script: Script = ENDLESS) -> str:
        return self.emulator.create_scripted_job(script)

    def enter(
        self,
        job_id: str,
        *,
        age: float = 0.0,
        timeout: float | None = None,
        may_start: Callable[[], Any] = always,
        logger: Any = None,
    ) -> asyncio.Task[JobHandle]:
        """Let a job wait.

        :param age: how long ago it was first executed, seconds.
        """
        clock = StartClock(timeout, self.began - age)
        queued = QueuedJob(job_id, clock, may_start, logger or logging.getLogger("queue"))
        wait = asyncio.create_task(self.client.start(queued, self.emulator.project_id, REASON))
        self.waits[job_id] = wait
        return wait

    async def until(self, condition: Callable[[], object]) -> None:
        await until(condition)

    def started(self) -> list[str | None]:
        """The jobs in the order of their accepted Execute."""
        return [call.job_id for call in self.emulator.journal.calls("Execute", code="OK")]

    def rejected(self) -> list[str | None]:
        return [call.job_id for call in self.emulator.journal.calls("Execute") if call.code not in ("OK", None)]


@pytest.fixture
async def triggerer(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Triggerer]:
    monkeypatch.setattr(start_queue, "MIN_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(start_queue, "MAX_ROOM_PAUSE_SECONDS", 0.2)
    settings = Settings.from_extra(emulator.connection_extra())
    channels = AsyncChannels.shared(settings)
    triggerer = Triggerer(emulator, channels, settings)
    yield triggerer
    for wait in triggerer.waits.values():
        wait.cancel()
    await asyncio.gather(*triggerer.waits.values(), return_exceptions=True)
    await channels.close()


async def test_the_oldest_starts_first_and_only_it_asks(triggerer: Triggerer) -> None:
    triggerer.emulator.settings.max_running_jobs = 0
    young, old, middle = (triggerer.job(Script()) for _ in range(3))
    for job_id, age in ((young, 1.0), (old, 30.0), (middle, 10.0)):
        triggerer.enter(job_id, age=age)
    # Whoever came first may have asked first; from then on only the oldest does.
    await triggerer.until(lambda: triggerer.rejected()[-3:] == [old] * 3)
    triggerer.emulator.settings.max_running_jobs = 1
    await asyncio.gather(*triggerer.waits.values())
    assert triggerer.started() == [old, middle, young]
    assert [triggerer.emulator.executions(job_id) for job_id in (old, middle, young)] == [1, 1, 1]


async def test_as_soon_as_one_starts_the_next_is_tried(triggerer: Triggerer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_queue, "MIN_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(start_queue, "MAX_ROOM_PAUSE_SECONDS", 3600.0)
    jobs = [triggerer.job() for _ in range(5)]
    for job_id in jobs:
        triggerer.enter(job_id)
    await asyncio.gather(*triggerer.waits.values())
    assert sorted(map(str, triggerer.started())) == sorted(jobs)
    assert triggerer.rejected() == []


async def test_ten_rooms_and_sixty_jobs(triggerer: Triggerer) -> None:
    triggerer.emulator.settings.max_running_jobs = 10
    jobs = [triggerer.job(Script(executing_seconds=0.3)) for _ in range(60)]
    triggerer.emulator.settings.max_running_jobs = 0
    for number, job_id in enumerate(jobs):
        triggerer.enter(job_id, age=100.0 - number)
    await triggerer.until(lambda: len(triggerer.emulator.journal.calls("Get")) >= len(jobs) and triggerer.rejected())
    before = len(triggerer.rejected())
    triggerer.emulator.settings.max_running_jobs = 10
    await asyncio.gather(*triggerer.waits.values())
    assert triggerer.started() == jobs
    assert len(triggerer.rejected()) - before <= len(jobs)


async def test_the_handle_tells_how_long_it_waited(triggerer: Triggerer) -> None:
    job_id = triggerer.job()
    handle = await triggerer.enter(job_id, age=50.0)
    assert (handle.job_id, handle.operation_id) == (job_id, triggerer.emulator.operation_of(job_id))
    assert handle.queued_seconds is not None
    assert 50.0 <= handle.queued_seconds < 110.0


async def test_a_job_that_a_dead_triggerer_has_started_is_not_started_again(triggerer: Triggerer) -> None:
    running = triggerer.emulator.create_scripted_job(ENDLESS, execute=True)
    triggerer.emulator.settings.max_running_jobs = 1
    other = triggerer.job()
    triggerer.enter(other, age=100.0)
    handle = await triggerer.enter(running)
    assert handle.operation_id == triggerer.emulator.operation_of(running)
    assert triggerer.emulator.executions(running) == 1
    assert not triggerer.waits[other].done()


@pytest.mark.parametrize("script", [Script(), Script(return_code=3)])
async def test_a_job_that_has_ended_meanwhile_is_not_executed_again(triggerer: Triggerer, script: Script) -> None:
    """No triggerer ran while it did."""
    ended = triggerer.emulator.create_scripted_job(script, execute=True)
    await triggerer.until(lambda: triggerer.emulator.job(ended).HasField("finished_at"))
    assert (await triggerer.enter(ended)).job_id == ended
    assert triggerer.emulator.journal.count("Execute") == 0


async def test_a_job_that_somebody_starts_while_it_waits_leaves_the_queue(triggerer: Triggerer) -> None:
    triggerer.emulator.settings.max_running_jobs = 0
    job_id = triggerer.job()
    wait = triggerer.enter(job_id)
    await triggerer.until(triggerer.rejected)
    triggerer.emulator.settings.max_running_jobs = 1
    client = DataSphereClient(triggerer.client.settings)
    triggerer.emulator.faults.inject("Execute", code="RESOURCE_EXHAUSTED", skip=1)
    await asyncio.to_thread(execute, client, job_id, StartClock())
    handle = await wait
    assert handle.job_id == job_id
    assert triggerer.emulator.executions(job_id) == 1


async def test_a_task_that_is_killed_leaves_its_place_to_the_next(triggerer: Triggerer) -> None:
    triggerer.emulator.settings.max_running_jobs = 0
    first, second = triggerer.job(), triggerer.job()
    triggerer.enter(first, age=10.0)
    triggerer.enter(second)
    await triggerer.until(triggerer.rejected)
    triggerer.waits[first].cancel()
    triggerer.emulator.settings.max_running_jobs = 1
    await triggerer.waits[second]
    assert triggerer.started() == [second]
    assert triggerer.emulator.job(first).status == jobs_pb2.CREATING


async def test_a_task_that_airflow_no_longer_waits_for_is_not_started(
    triggerer: Triggerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_queue, "NOT_WAITED_FOR_PAUSE_SECONDS", 0.1)
    asked: list[int] = []

    async def never() -> bool:
        asked.append(1)
        return False

    ended, waiting = triggerer.job(), triggerer.job()
    triggerer.enter(ended, age=10.0, may_start=never)
    triggerer.enter(waiting)
    await triggerer.waits[waiting]
    await triggerer.until(lambda: len(asked) > 2)
    assert triggerer.started() == [waiting]


async def test_the_time_to_start_ends_the_wait(triggerer: Triggerer) -> None:
    triggerer.emulator.settings.max_running_jobs = 0
    job_id = triggerer.job()
    with pytest.raises(JobNotStartedError, match=rf"Job {job_id} .*start_timeout.*RESOURCE_EXHAUSTED"):
        await triggerer.enter(job_id, timeout=0.7)
    assert triggerer.rejected()


async def test_the_time_to_start_ends_the_wait_of_one_that_is_not_the_first(triggerer: Triggerer) -> None:
    triggerer.emulator.settings.max_running_jobs = 0
    triggerer.enter(triggerer.job(), age=100.0)
    with pytest.raises(JobNotStartedError):
        await triggerer.enter(triggerer.job(), timeout=0.5)


async def test_a_job_that_runs_when_its_time_to_start_has_passed_goes_on(triggerer: Triggerer) -> None:
    """The triggerer stood still, and another one has started the job meanwhile."""
    running = triggerer.emulator.create_scripted_job(ENDLESS, execute=True)
    handle = await triggerer.enter(running, age=100.0, timeout=1.0)
    assert handle.operation_id == triggerer.emulator.operation_of(running)


async def test_a_job_that_the_service_has_ended_is_told_of(triggerer: Triggerer) -> None:
    triggerer.emulator.settings.refused_job = "error"
    triggerer.emulator.settings.refused_job_seconds = 0.1
    triggerer.emulator.settings.max_running_jobs = 0
    with pytest.raises(JobEndedUnstartedError):
        await triggerer.enter(triggerer.job())


async def test_a_refusal_for_good_ends_the_wait_of_that_job_alone(triggerer: Triggerer) -> None:
    triggerer.emulator.faults.inject("Execute", code="FAILED_PRECONDITION", message="g9.1 is gone", times=1)
    refused, other = triggerer.job(), triggerer.job()
    triggerer.enter(refused, age=10.0)
    triggerer.enter(other)
    with pytest.raises(DataSphereError, match=r"g9\.1 is gone"):
        await triggerer.waits[refused]
    await triggerer.waits[other]
    assert triggerer.started() == [other]


async def test_refused_instance_types_let_the_others_pass(
    triggerer: Triggerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "INSTANCE_TYPES_SECONDS", 3.0)
    text = "Instance types g2.2 are not available for your community"
    refused, other = triggerer.job(), triggerer.job()
    triggerer.emulator.faults.inject("Execute", job_id=refused, code="INVALID_ARGUMENT", message=text)
    triggerer.enter(refused, age=10.0)
    triggerer.enter(other)
    await triggerer.waits[other]
    assert not triggerer.waits[refused].done()
    with pytest.raises(JobInfrastructureError, match=r"g2\.2 are not available.*no capacity.*doesn't allow"):
        await triggerer.waits[refused]


async def test_an_outage_of_the_service_ends_no_wait(triggerer: Triggerer) -> None:
    job_id = triggerer.job()
    triggerer.emulator.faults.inject("Get", code="UNAVAILABLE", times=2)
    triggerer.emulator.faults.inject("Execute", code="UNAVAILABLE", times=2)
    await triggerer.enter(job_id)
    assert triggerer.emulator.executions(job_id) == 1


async def test_a_lost_answer_starts_the_job_once(triggerer: Triggerer) -> None:
    job_id = triggerer.job()
    triggerer.emulator.settings.idempotency = False
    triggerer.emulator.faults.inject("Execute", lost_answer=True, times=1)
    handle = await triggerer.enter(job_id)
    assert handle.job_id == job_id
    assert triggerer.emulator.executions(job_id) == 1


async def test_projects_do_not_wait_for_each_other(triggerer: Triggerer) -> None:
    """Another project's queue is another one, and so is another connection's."""
    mine = start_queue.StartQueue.shared("connection", "project")
    mine._users += 1
    assert start_queue.StartQueue.shared("connection", "project") is mine
    assert start_queue.StartQueue.shared("connection", "other") is not mine
    assert start_queue.StartQueue.shared("other", "project") is not mine


async def test_the_log_tells_place_and_reason_once_a_minute(
    triggerer: Triggerer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="queue")
    triggerer.emulator.settings.max_running_jobs = 0
    first, second = triggerer.job(), triggerer.job()
    triggerer.enter(first, age=10.0)
    await triggerer.until(triggerer.rejected)
    triggerer.enter(second)
    await triggerer.until(lambda: len(triggerer.rejected()) >= 6)
    lines = [record.getMessage() for record in caplog.records if record.name == "queue"]
    of_first = [line for line in lines if first in line]
    of_second = [line for line in lines if second in line]
    assert of_first == [f"Job {first} waits for room in its project (place 1 of 1 in this triggerer): {REASON}."]
    (line,) = of_second
    assert "place 2 of 2" in line
    assert "Job execution quota exhausted" in line
