"""Exactly one job per key: tries that die anywhere, with a store and without, however the service behaves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client import api
from airflow_provider_datasphere.client.cancel_reason import TASK_ENDED, TIMED_OUT
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import DataSphereError, JobInfrastructureError, JobRequestError
from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy
from airflow_provider_datasphere.client.submission import job_search
from airflow_provider_datasphere.client.submission.fork_request import ForkRequest
from airflow_provider_datasphere.client.submission.job_key import Key
from airflow_provider_datasphere.client.submission.request_digest import request_digest
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator, Script
from generations import Crash, DictStore, Generation

QUICK = Script(executing_seconds=0.05)
ENDLESS = Script(never_ends=True)


@pytest.fixture(params=["newest", "oldest", "shuffled"])
def order(request: pytest.FixtureRequest, emulator: Emulator) -> None:
    emulator.settings.list_order = request.param


@pytest.fixture(params=[True, False], ids=["key-honoured", "key-ignored"])
def idempotency(request: pytest.FixtureRequest, emulator: Emulator) -> None:
    emulator.settings.idempotency = request.param


@pytest.fixture(params=["same_operation", "failed_precondition"])
def execute_finished(request: pytest.FixtureRequest, emulator: Emulator) -> None:
    emulator.settings.execute_finished = request.param


@pytest.fixture(params=[True, False], ids=["store", "list"])
def store(request: pytest.FixtureRequest) -> DictStore | None:
    return DictStore() if request.param else None


Begin = Callable[..., Generation]


@pytest.fixture
def begin(emulator: Emulator, client: DataSphereClient, store: DictStore | None, tmp_path: Path) -> Begin:
    """Begins a generation: the script of the job, and whether the fork uploads something."""

    def begin(script: Script | list[Script] = QUICK, *, inputs: bool = False) -> Generation:
        source = emulator.create_scripted_job(
            script, files={"in.csv": "1,2"}, inputs=[("in.csv", "DATA")], args={"RANGE": "1"}, desc="Nightly"
        )
        (tmp_path / "new.csv").write_text("3,4")
        values = {"DATA": str(tmp_path / "new.csv")} if inputs else {}
        return Generation(emulator, client, source, store, vars=values)

    return begin


every_service = pytest.mark.usefixtures("idempotency", "execute_finished")
with_a_store = pytest.mark.parametrize("store", [True], indirect=True, ids=["store"])


@every_service
@pytest.mark.usefixtures("order")
def test_failed_programs_are_followed_by_new_jobs(begin: Begin) -> None:
    generation = begin([Script(return_code=1), Script(return_code=1), Script(return_code=0)])
    assert [generation.run() for _ in range(3)] == [1, 1, 0]
    assert len({job.id for job in generation.jobs}) == 3
    assert all(generation.emulator.executions(job.id) == 1 for job in generation.jobs)


@every_service
@pytest.mark.usefixtures("order")
def test_a_running_job_is_attached_to(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once()
    for _ in range(2):
        again = generation.try_once()
        assert again.reattached
        assert again.handle == first.handle
    generation.one_job_ran_once(first.handle.job_id)


@every_service
def test_a_success_is_adopted(begin: Begin, emulator: Emulator) -> None:
    generation = begin()
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    executes = emulator.journal.count("Execute")
    again = generation.try_once()
    assert again.reattached
    assert again.handle.job_id == first.job_id
    assert emulator.journal.count("Execute") == executes, "an ended job is not executed again"
    generation.one_job_ran_once()


def test_a_success_of_other_retries_is_not_adopted(begin: Begin, emulator: Emulator) -> None:
    generation = begin()
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    generation.key = Key(generation.key.parts, generation.key.label, retries=5, since=generation.key.since)
    assert generation.try_once().handle.job_id != first.job_id


@every_service
@with_a_store
def test_a_service_that_calls_a_failed_program_a_success_is_seen_through(begin: Begin, emulator: Emulator) -> None:
    """Without a store nobody knows the operation of an ended job, and so its return code."""
    emulator.settings.status_after_nonzero_exit = "SUCCESS"
    generation = begin([Script(return_code=1), Script(return_code=1), Script(return_code=0)])
    assert [generation.run() for _ in range(3)] == [1, 1, 0]
    assert len(generation.jobs) == 3


@every_service
@pytest.mark.parametrize("inputs", [False, True], ids=["no-inputs", "inputs"])
@pytest.mark.parametrize("step", ["before Clone", "created", "uploaded", "before Execute", "Execute answered"])
def test_a_try_may_die_anywhere(
    begin: Begin, emulator: Emulator, client: DataSphereClient, monkeypatch: pytest.MonkeyPatch, step: str, inputs: bool
) -> None:
    generation = begin(ENDLESS, inputs=inputs)
    crash: dict[str, Any] = {}
    with monkeypatch.context() as patch:

        def die(*_: Any, **__: Any) -> None:
            raise Crash

        real = client.channels.unary

        def unary(service: Any, method: str, *arguments: Any, **options: Any) -> Any:
            if step == f"before {method}":
                raise Crash
            answer = real(service, method, *arguments, **options)
            if step == f"{method} answered":
                raise Crash
            return answer

        if step in ("created", "uploaded"):
            crash = {step: die}
        else:
            patch.setattr(client.channels, "unary", unary)
        with pytest.raises(Crash):
            generation.try_once(**crash)
    handle = generation.try_once().handle
    assert handle.operation_id == emulator.operation_of(handle.job_id)
    generation.one_job_ran_once(handle.job_id)


@every_service
@with_a_store
@pytest.mark.parametrize("inputs", [False, True], ids=["no-inputs", "inputs"])
@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_a_store_may_die_with_any_write(begin: Begin, store: DictStore, write: int, inputs: bool) -> None:
    generation = begin(ENDLESS, inputs=inputs)
    store.dies_at = write
    with pytest.raises(Crash):
        generation.try_once()
    handle = generation.try_once().handle
    generation.one_job_ran_once(handle.job_id)


@every_service
@pytest.mark.parametrize("inputs", [False, True], ids=["no-inputs", "inputs"])
def test_a_clone_whose_answer_the_try_does_not_live_to_see(begin: Begin, emulator: Emulator, inputs: bool) -> None:
    generation = begin(ENDLESS, inputs=inputs)
    emulator.faults.inject("Clone", lost_answer=True, code="PERMISSION_DENIED", times=1)
    with pytest.raises(JobRequestError):
        generation.try_once()
    handle = generation.try_once().handle
    generation.one_job_ran_once(handle.job_id)


def test_an_honoured_key_repeats_its_header_and_a_new_fork_has_another(begin: Begin, emulator: Emulator) -> None:
    generation = begin([Script(return_code=1), ENDLESS])
    emulator.faults.inject("Clone", code="UNAVAILABLE", times=1)
    generation.run()
    generation.try_once()
    keys = [call.metadata["idempotency-key"] for call in emulator.journal.calls("Clone")]
    assert keys[0] == keys[1] != keys[2]


def cancelled(generation: Generation, reason: str = "") -> str:
    """The job of a first try, which was cancelled while no try watched it."""
    job_id = generation.try_once().handle.job_id
    generation.client.cancel(job_id, reason=reason)
    generation.emulator.wait_job(job_id, "CANCELLED")
    return job_id


@every_service
@pytest.mark.parametrize("noted", [True, False], ids=["written-down", "by-its-reason"])
def test_a_job_that_the_task_cancelled_itself_is_followed_by_a_new_one(
    begin: Begin, emulator: Emulator, noted: bool
) -> None:
    generation = begin(ENDLESS)
    first = cancelled(generation, "" if noted else TIMED_OUT)
    if noted and generation.store is not None:
        generation.store.entry = {**(generation.store.entry or {}), "cancelled": first}
    second = generation.try_once()
    assert not second.reattached
    assert second.handle.job_id != first
    assert emulator.executions(second.handle.job_id) == 1


@every_service
@with_a_store
@pytest.mark.parametrize("seconds", [0.0, 0.5], ids=["CANCELLED", "CANCELLING"])
def test_a_job_that_a_person_cancelled_is_not_run_again(begin: Begin, emulator: Emulator, seconds: float) -> None:
    """As when the task had watched it: fork.md."""
    emulator.settings.cancelling_seconds = seconds
    generation = begin(ENDLESS)
    first = generation.try_once().handle.job_id
    generation.client.cancel(first, reason="I need the money")
    emulator.wait_job(first, "CANCELLING" if seconds else "CANCELLED")
    again = generation.try_once()
    assert again.reattached
    assert again.handle.job_id == first
    generation.one_job_ran_once()


@pytest.mark.parametrize("store", [False], indirect=True, ids=["list"])
def test_without_a_store_nobody_knows_who_cancelled_a_job(begin: Begin) -> None:
    generation = begin(ENDLESS)
    first = cancelled(generation)
    assert generation.try_once().handle.job_id != first


@every_service
@with_a_store
def test_a_return_code_that_skips_is_not_run_again(begin: Begin) -> None:
    generation = begin(Script(return_code=7))
    generation.policy = OutcomePolicy(skip_on_exit_code={7})
    assert generation.run() == 7
    assert generation.try_once().reattached
    generation.one_job_ran_once()
    generation.policy = OutcomePolicy(skip_on_exit_code={8})
    assert not generation.try_once().reattached


@every_service
def test_a_job_being_cancelled_is_waited_for(begin: Begin, emulator: Emulator) -> None:
    emulator.settings.cancelling_seconds = 0.5
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    generation.client.cancel(first.job_id, reason=TASK_ENDED)
    emulator.wait_job(first.job_id, "CANCELLING")
    second = generation.try_once().handle
    assert second.job_id != first.job_id
    assert emulator.job(first.job_id).status == jobs_pb2.CANCELLED
    clones = emulator.journal.calls("Clone")
    finished = emulator.job(first.job_id).finished_at.ToDatetime(tzinfo=timezone.utc).timestamp()
    assert clones[-1].time >= finished


def test_a_job_cancelled_before_it_ran_is_followed_by_a_new_one(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)

    def die(*_: str) -> None:
        raise Crash

    with pytest.raises(Crash):
        generation.try_once(created=die)
    (first,) = generation.jobs
    generation.client.cancel(first.id, reason=TASK_ENDED)
    handle = generation.try_once().handle
    assert handle.job_id != first.id
    assert emulator.executions(handle.job_id) == 1


def test_a_deleted_job_is_followed_by_a_new_one(begin: Begin, emulator: Emulator) -> None:
    generation = begin()
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    emulator.delete_job(first.job_id)
    handle = generation.try_once().handle
    generation.one_job_ran_once(handle.job_id)


@every_service
def test_several_that_never_ran_leave_one(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)
    desc = generation.tag_description("Nightly")
    for _ in range(3):
        fork(emulator, generation.source, desc)
    if generation.store is not None:
        generation.store.entry = {"token": generation.key.token, "job_id": None}
    generation.tries = 1
    handle = generation.try_once().handle
    generation.one_job_ran_once(handle.job_id)


def fork(emulator: Emulator, source: str, desc: str) -> str:
    """A clone that nobody executes."""
    from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

    request = service_pb2.CloneProjectJobRequest(source_job_id=source, desc=desc)
    record = emulator._run(lambda: emulator.state.job_service.clone("anybody", request, None))
    return str(record.job_id)


@pytest.mark.usefixtures("order")
def test_other_jobs_are_left_alone(begin: Begin, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages of jobs: other keys, other sources, older generations of runs, people's own forks."""
    monkeypatch.setattr(api, "FIRST_PAGE_SIZE", 3)
    generation = begin(ENDLESS)
    other_source = emulator.create_scripted_job(QUICK)
    foreign = Key(("dag", "run", "task", -1, 3), "dag.task run", retries=2)
    for _ in range(5):
        fork(emulator, generation.source, foreign.tag_description("Nightly", "0a1b2c3d"))
        fork(emulator, other_source, "a person's own")
        fork(emulator, generation.source, "a person's own")
    before = {job.id for job in emulator.jobs()}
    first = generation.try_once().handle
    before.add(fork(emulator, first.job_id, emulator.job(first.job_id).desc))  # a person's, with what it inherited
    if generation.store is not None:
        generation.store.entry = {"token": generation.key.token, "job_id": None}
    again = generation.try_once().handle
    assert again == first
    assert {job.id for job in emulator.jobs()} - before == {first.job_id}


def test_a_search_that_can_not_be_finished_is_not_an_empty_one(
    begin: Begin, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    if generation.store is not None:
        generation.store.entry = {"token": generation.key.token, "job_id": None}
    with monkeypatch.context() as patch:
        patch.setattr(job_search, "MAX_SEARCH_SECONDS", 0.0)
        with pytest.raises(JobInfrastructureError, match="no new one is created"):
            generation.try_once()
    fault = emulator.faults.inject("List", code="PERMISSION_DENIED")
    with pytest.raises(JobInfrastructureError, match="no new one is created"):
        generation.try_once()
    emulator.faults.remove(fault)
    assert generation.try_once().handle.job_id == first.job_id
    generation.one_job_ran_once()


def test_a_search_that_can_not_begin_is_not_an_empty_one(begin: Begin, emulator: Emulator) -> None:
    """Without project_id the source tells where to look; while it can't be read, the job may run on."""
    generation = begin(ENDLESS)
    generation.client = client_without_project(emulator)
    first = generation.try_once().handle
    if generation.store is not None:
        generation.store.entry = {"token": generation.key.token, "job_id": None}
    fault = emulator.faults.inject("Get", code="PERMISSION_DENIED")
    with pytest.raises(JobInfrastructureError, match="no new one is created"):
        generation.try_once()
    emulator.faults.remove(fault)
    assert generation.try_once().handle.job_id == first.job_id
    generation.one_job_ran_once()


def client_without_project(emulator: Emulator) -> DataSphereClient:
    return DataSphereClient(Settings.from_extra(emulator.connection_extra(project_id=None)))


@with_a_store
def test_a_store_that_has_forgotten_is_no_proof(begin: Begin, store: DictStore) -> None:
    """Its entry has expired, or Airflow was upgraded between two tries to a version that has a store."""
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    store.entry = None
    assert generation.try_once().handle.job_id == first.job_id
    generation.one_job_ran_once()


@every_service
def test_a_run_that_is_made_again_under_its_old_name_has_its_own_job(begin: Begin, emulator: Emulator) -> None:
    generation = begin()
    first = generation.try_once().handle
    emulator.wait_job(first.job_id)
    generation.key = replace(generation.key, parts=("dag", "run", "its new start", "task", -1, 2))
    generation.tries = 0
    if generation.store is not None:
        generation.store.entry = None
    assert generation.try_once().handle.job_id != first.job_id


@every_service
@pytest.mark.parametrize("inputs", [False, True], ids=["no-inputs", "inputs"])
def test_a_started_job_that_still_shows_creating_is_found_out(begin: Begin, emulator: Emulator, inputs: bool) -> None:
    """The worker dies right after Execute; the service is slow to show what it does."""
    emulator.settings.creating_seconds = 3.0
    generation = begin(ENDLESS, inputs=inputs)
    first = generation.try_once().handle
    assert generation.jobs[0].status == jobs_pb2.CREATING
    if generation.store is not None:
        generation.store.entry = {"token": generation.key.token, "job_id": None}
    again = generation.try_once().handle
    assert again.job_id == first.job_id
    generation.one_job_ran_once()


def test_a_search_survives_a_stumbling_service(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    if generation.store is not None:
        generation.store.entry = {"token": generation.key.token, "job_id": None}
    emulator.faults.inject("List", code="UNAVAILABLE", times=2)
    assert generation.try_once().handle.job_id == first.job_id


def test_the_source_may_be_gone_while_its_fork_lives(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    emulator.delete_job(generation.source)
    assert generation.try_once().handle.job_id == first.job_id


def test_a_job_of_other_arguments_is_taken_with_a_warning(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once(args={"RANGE": "1"}).handle
    with caplog.at_level(logging.INFO):
        assert generation.try_once(args={"RANGE": "2"}).handle.job_id == first.job_id
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "args['RANGE'] differ" in warning
    assert first.job_id in warning


def test_the_mark_is_in_the_description_with_that_of_the_source(begin: Begin, emulator: Emulator) -> None:
    generation = begin()
    handle = generation.try_once().handle
    assert emulator.job(handle.job_id).desc == generation.tag_description("Nightly")
    generation.tries = 0
    generation.store = None
    generation.key = Key(("another",), "x", retries=0)
    handle = generation.try_once(desc="My own").handle
    assert emulator.job(handle.job_id).desc == generation.key.tag_description(
        "My own", request_digest(ForkRequest(generation.source, desc="My own"))
    )


def test_another_generation_forks_its_own_job(begin: Begin) -> None:
    generation = begin(ENDLESS)
    first = generation.try_once().handle
    generation.key = Key(("dag", "run", "task", -1, 3), "dag.task run", retries=2, since=generation.key.since)
    assert generation.try_once().handle.job_id != first.job_id


def test_a_try_that_does_not_look_never_lists(begin: Begin, emulator: Emulator) -> None:
    begin(ENDLESS).try_once()
    assert emulator.journal.count("List") == 0


def test_a_resumed_job_gets_its_infinite_time_to_live(begin: Begin, emulator: Emulator) -> None:
    generation = begin(ENDLESS)

    def die(*_: str) -> None:
        raise Crash

    with pytest.raises(Crash):
        generation.try_once(created=die, data_ttl="infinity")
    handle = generation.try_once(data_ttl="infinity").handle
    assert not emulator.job(handle.job_id).HasField("data_expires_at")
    generation.one_job_ran_once()


def test_two_tries_at_once_end_in_one_running_job_or_say_so(begin: Begin, emulator: Emulator) -> None:
    """A worker that Airflow has given up lives on beside the next try."""
    generation = begin(ENDLESS)
    generation.tries = 1
    generation.store = None
    outcomes: list[Any] = []

    def attempt() -> None:
        try:
            outcomes.append(generation.try_once().handle.job_id)
        except DataSphereError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timedelta(seconds=60).total_seconds())
    assert len(outcomes) == 2
    assert sum(emulator.executions(job.id) for job in generation.jobs) == 1
