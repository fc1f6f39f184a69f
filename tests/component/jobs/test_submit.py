"""Clone, upload, Execute: each once in its effect, whatever gets lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    Interrupted,
    JobInfrastructureError,
    JobRequestError,
)
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.submission import creation as creation_module
from airflow_provider_datasphere.client.submission import execute as execute_module
from airflow_provider_datasphere.client.submission import execution as execution_module
from airflow_provider_datasphere.client.submission.context import SubmissionCallbacks, SubmissionIdentity
from airflow_provider_datasphere.client.submission.fork import Fork
from airflow_provider_datasphere.client.submission.fork_request import ForkRequest
from airflow_provider_datasphere.client.submission.submit import submit
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator, Script

QUICK = Script(log=["hello"])


@pytest.fixture
def source(emulator: Emulator) -> str:
    return emulator.create_scripted_job(
        QUICK,
        files={"in.csv": "1,2"},
        inputs=[("in.csv", "DATA")],
        outputs=[("out.csv", "RESULT")],
        args={"RANGE": "1"},
    )


@pytest.fixture
def with_input(tmp_path: Path) -> dict[str, str]:
    """``vars`` with an input that has to be uploaded."""
    (tmp_path / "new.csv").write_text("3,4")
    return {"DATA": str(tmp_path / "new.csv")}


@pytest.fixture(params=[True, False], ids=["key honoured", "key ignored"])
def idempotency(request: pytest.FixtureRequest, emulator: Emulator) -> bool:
    emulator.settings.idempotency = request.param
    return bool(request.param)


def finder(emulator: Emulator, client: DataSphereClient, source: str) -> Callable[[], list[str]]:
    """Finds unexecuted jobs, as a task does (by their description there)."""

    def find() -> list[str]:
        return [
            job.id for page in client.list_job_pages(emulator.project_id) for job in page if job.parent_job_id == source
        ]

    return find


def submit_fork(
    client: DataSphereClient,
    request: ForkRequest,
    key: str = "key",
    *,
    earlier_tries: bool = False,
    find: Callable[[], list[str]] | None = None,
    source_data_ttl: str | None = None,
    **callbacks: Callable[..., None],
) -> JobHandle:
    return submit(
        client,
        Fork(client, request, source_data_ttl=source_data_ttl),
        SubmissionIdentity(key, earlier_tries=earlier_tries, find_unexecuted=find),
        SubmissionCallbacks(**callbacks),
    )


def one_job_runs(emulator: Emulator, source: str, handle: JobHandle) -> None:
    """The one fork that exists was executed once, and is the one of the handle."""
    assert [job.id for job in emulator.jobs(source)] == [handle.job_id]
    assert emulator.executions(handle.job_id) == 1
    emulator.wait_job(handle.job_id)


def test_a_fork_is_cloned_uploaded_and_executed(
    emulator: Emulator, client: DataSphereClient, source: str, with_input: dict[str, str]
) -> None:
    seen: list[tuple[str, str, int]] = []

    def note(event: str) -> Callable[..., None]:
        return lambda job_id, *_: seen.append((event, job_id, emulator.executions(job_id)))

    request = ForkRequest(source, vars=with_input, args={"RANGE": "5"})
    handle = submit_fork(client, request, created=note("created"), uploaded=note("uploaded"))
    one_job_runs(emulator, source, handle)
    assert seen == [("created", handle.job_id, 0), ("uploaded", handle.job_id, 0)]
    assert handle.operation_id == emulator.operation_of(handle.job_id)
    (argument,) = emulator.job(handle.job_id).job_parameters.arguments
    assert (argument.name, argument.value) == ("RANGE", "5")
    for call in emulator.journal.calls():
        assert call.method.startswith("storage.") or call.deadline is not None, call.method
    keys = {
        call.method: call.metadata["idempotency-key"]
        for call in emulator.journal.calls()
        if call.effect and "idempotency-key" in call.metadata
    }
    assert sorted(keys) == ["Clone", "Execute"]
    assert keys["Clone"] != keys["Execute"]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("inputs", [False, True], ids=["no inputs", "inputs"])
def test_a_clone_whose_answer_is_lost_makes_one_job(
    emulator: Emulator,
    client: DataSphereClient,
    source: str,
    with_input: dict[str, str],
    idempotency: bool,
    inputs: bool,
    times: int,
) -> None:
    emulator.faults.inject("Clone", lost_answer=True, times=times)
    created: list[str] = []
    handle = submit_fork(
        client,
        ForkRequest(source, vars=with_input if inputs else {}),
        find=finder(emulator, client, source),
        created=lambda job_id, _: created.append(job_id),
    )
    one_job_runs(emulator, source, handle)
    assert created == [handle.job_id]
    keys = {call.metadata["idempotency-key"] for call in emulator.journal.calls("Clone")}
    assert len(keys) == 1


def test_a_plain_client_runs_one_job_when_the_answer_to_clone_is_lost(
    emulator: Emulator, client: DataSphereClient, source: str, idempotency: bool
) -> None:
    emulator.faults.inject("Clone", lost_answer=True, times=1)
    job = client.fork_job(source)
    emulator.wait_job(job.id)
    assert sum(emulator.executions(fork.id) for fork in emulator.jobs(source)) == 1
    if idempotency:
        assert [fork.id for fork in emulator.jobs(source)] == [job.id]


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "refused"])
@pytest.mark.parametrize("finished", ["same_operation", "failed_precondition"])
def test_an_execute_without_an_answer_runs_the_job_once(
    emulator: Emulator, client: DataSphereClient, source: str, idempotency: bool, lost: bool, finished: str
) -> None:
    emulator.settings.execute_finished = finished
    emulator.faults.inject("Execute", code="UNAVAILABLE", lost_answer=lost, times=2)
    handle = submit_fork(client, ForkRequest(source))
    one_job_runs(emulator, source, handle)
    keys = {call.metadata["idempotency-key"] for call in emulator.journal.calls("Execute")}
    assert len(keys) == 1


def test_execute_unavailable_five_times_runs_the_job_in_the_end(
    emulator: Emulator, client: DataSphereClient, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module.UnclearAnswers, "next_pause", quick_pause)
    emulator.faults.inject("Execute", code="UNAVAILABLE", times=5)
    one_job_runs(emulator, source, submit_fork(client, ForkRequest(source)))


def quick_pause(unclear: Any) -> float:
    unclear._since = unclear._since or time.monotonic()
    unclear._count += 1
    return 0.01


def test_a_job_that_can_not_be_started_is_named(
    emulator: Emulator, client: DataSphereClient, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "UNCLEAR_ANSWER_SECONDS", 1.0)
    emulator.faults.inject("Execute", code="UNAVAILABLE")
    with pytest.raises(JobInfrastructureError, match="isn't running") as failure:
        submit_fork(client, ForkRequest(source))
    (job,) = emulator.jobs(source)
    assert job.id in str(failure.value)
    assert emulator.executions(job.id) == 0


def test_a_job_that_may_run_but_can_not_be_seen_is_told_of(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    emulator.faults.inject("Execute", lost_answer=True, times=1)
    emulator.faults.inject("Get", code="PERMISSION_DENIED", skip=1)
    with pytest.raises(DataSphereError, match="costing money") as failure:
        submit_fork(client, ForkRequest(source))
    (job,) = emulator.jobs(source)
    assert job.id in str(failure.value)
    assert not isinstance(failure.value, JobRequestError)
    assert emulator.journal.count("Delete") == 0


def test_an_answer_that_never_comes_is_asked_for_again(
    emulator: Emulator, client: DataSphereClient, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (creation_module, execute_module):
        monkeypatch.setattr(module, "WRITE_DEADLINE_SECONDS", 0.5)
    for method in ("Clone", "Execute"):
        emulator.faults.inject(method, hang=True, times=1)
    one_job_runs(emulator, source, submit_fork(client, ForkRequest(source), find=finder(emulator, client, source)))
    assert [call.code for call in emulator.journal.calls("Clone")] == ["DEADLINE_EXCEEDED", "OK"]


def test_a_quota_is_a_queue(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    emulator.settings.max_running_jobs = 1
    running = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    emulator.faults.inject("Clone", code="RESOURCE_EXHAUSTED", times=1)

    def make_room() -> None:
        while not emulator.journal.count("Execute", code="RESOURCE_EXHAUSTED"):
            time.sleep(0.02)
        emulator.cancel_job(running)

    room = threading.Thread(target=make_room)
    room.start()
    handle = submit_fork(client, ForkRequest(source))
    room.join()
    one_job_runs(emulator, source, handle)
    assert [call.code for call in emulator.journal.calls("Clone")] == ["RESOURCE_EXHAUSTED", "OK"]


def test_a_quota_ends_with_the_task(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    emulator.faults.inject("Execute", code="RESOURCE_EXHAUSTED")

    def interrupt_after_the_rejection() -> None:
        while not emulator.journal.count("Execute", code="RESOURCE_EXHAUSTED"):
            time.sleep(0.02)
        client.interrupt()

    killer = threading.Thread(target=interrupt_after_the_rejection)
    killer.start()
    with pytest.raises(Interrupted):
        submit_fork(client, ForkRequest(source))
    killer.join()


def test_a_refused_execute_leaves_no_job_behind(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    emulator.faults.inject("Execute", code="FAILED_PRECONDITION", message="g9.1 is not allowed")
    with pytest.raises(JobRequestError, match=r"g9\.1 is not allowed"):
        submit_fork(client, ForkRequest(source))
    assert emulator.jobs(source) == []


def test_a_clone_operation_is_waited_for(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    emulator.settings.clone_seconds = 0.3
    cloned: list[Any] = []

    def note(job_id: str, _: str) -> None:
        operation = emulator.operation(emulator.journal.calls("Clone")[0].operation_id)
        cloned.append((job_id, operation.done))

    handle = submit_fork(client, ForkRequest(source), created=note)
    assert cloned == [(handle.job_id, False)]
    one_job_runs(emulator, source, handle)


def fail_the_clone(emulator: Emulator, code: int) -> None:
    """End the Clone operation that is under way with an error."""
    operations = emulator.state.registry.operations
    operation_id = emulator.journal.calls("Clone")[0].operation_id
    emulator._run(lambda: operations.fail(operations.record(operation_id), code, "no disk"))


@pytest.mark.parametrize(("code", "expected"), [(9, JobRequestError), (13, JobInfrastructureError)])
def test_a_clone_operation_that_fails_is_told_and_leaves_no_job(
    emulator: Emulator, client: DataSphereClient, source: str, code: int, expected: type[Exception]
) -> None:
    emulator.settings.clone_seconds = 60.0

    with pytest.raises(expected, match="no disk"):
        submit_fork(client, ForkRequest(source), created=lambda *_: fail_the_clone(emulator, code))
    assert emulator.jobs(source) == []
    assert emulator.journal.count("Execute") == 0


@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 500}, {"cut_at": 0.5}], ids=["403", "500", "cut"])
def test_an_upload_that_stumbles_gets_there(
    emulator: Emulator,
    client: DataSphereClient,
    source: str,
    with_input: dict[str, str],
    idempotency: bool,
    fault: dict[str, Any],
) -> None:
    emulator.faults.inject("storage.put", times=1, **fault)
    handle = submit_fork(client, ForkRequest(source, vars=with_input))
    one_job_runs(emulator, source, handle)
    assert emulator.journal.count("storage.put") >= 2


def test_a_refused_link_does_not_end_the_uploads_with_new_links(
    emulator: Emulator, client: DataSphereClient, tmp_path: Path
) -> None:
    source = emulator.create_scripted_job(
        QUICK, files={"a": "-", "b": "-"}, inputs=[("a", "A"), ("b", "B")], outputs=[("out.csv", "RESULT")]
    )
    for name in ("A", "B"):
        (tmp_path / name).write_bytes(name.encode() * 2_000_000)
    emulator.faults.inject("storage.put", status=403, times=1)
    emulator.faults.inject("storage.put", bytes_per_second=4_000_000, times=1)
    given = {name: str(tmp_path / name) for name in ("A", "B")}
    handle = submit_fork(client, ForkRequest(source, vars=given))
    one_job_runs(emulator, source, handle)
    assert emulator.journal.count("Clone") == 2


def test_an_upload_that_fails_for_good_leaves_no_job(
    emulator: Emulator, client: DataSphereClient, source: str, with_input: dict[str, str]
) -> None:
    emulator.faults.inject("storage.put", status=400)
    uploaded: list[str] = []
    with pytest.raises(DataSphereError, match="DATA"):
        submit_fork(client, ForkRequest(source, vars=with_input), uploaded=uploaded.append)
    assert emulator.jobs(source) == []
    assert uploaded == []


def test_a_task_that_is_killed_while_it_uploads_starts_no_job(
    emulator: Emulator, client: DataSphereClient, source: str, tmp_path: Path
) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(20_000_000))
    emulator.faults.inject("storage.put", bytes_per_second=1_000_000)

    def interrupt_the_upload() -> None:
        while not emulator.journal.count("storage.put"):
            time.sleep(0.02)
        client.interrupt()

    killer = threading.Thread(target=interrupt_the_upload)
    killer.start()
    with pytest.raises(Interrupted):
        submit_fork(client, ForkRequest(source, vars={"DATA": str(tmp_path / "large.bin")}))
    killer.join()
    assert emulator.jobs(source) == []
    assert emulator.journal.count("Execute") == 0


def test_unclear_answers_to_clone_end_at_some_time(
    emulator: Emulator, client: DataSphereClient, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "UNCLEAR_ANSWER_SECONDS", 1.0)
    emulator.faults.inject("Clone", code="UNAVAILABLE", message="down")
    with pytest.raises(JobInfrastructureError, match="down"):
        submit_fork(client, ForkRequest(source))
    assert emulator.journal.count("Clone") >= 2


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"])
def test_a_refused_clone_is_not_repeated(emulator: Emulator, client: DataSphereClient, source: str, code: str) -> None:
    emulator.faults.inject("Clone", code=code)
    with pytest.raises(JobRequestError, match=code):
        submit_fork(client, ForkRequest(source))
    assert emulator.journal.count("Clone") == 1


def test_an_unknown_source_and_a_wrong_request_make_no_job(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    for request in (
        ForkRequest("bt1nowhere"),
        ForkRequest(source, args={"NOBODY": "1"}),
        ForkRequest(source, vars={"DATA": "/nowhere/in.csv"}),
    ):
        with pytest.raises(JobRequestError):
            submit_fork(client, request)
    assert emulator.journal.count("Clone") == 0


def test_times_to_live_are_set(emulator: Emulator, client: DataSphereClient, source: str) -> None:
    def days_left(job_id: str) -> int | None:
        job = emulator.job(job_id)
        if not job.HasField("data_expires_at"):
            return None
        left = job.data_expires_at.ToDatetime(tzinfo=timezone.utc) - datetime.now(timezone.utc)
        return round(left / timedelta(days=1))

    assert days_left(submit_fork(client, ForkRequest(source), "1").job_id) == 14
    month = timedelta(days=30)
    forked = submit_fork(client, ForkRequest(source, data_ttl=month), "2", source_data_ttl="infinity")
    assert days_left(forked.job_id) == 30
    assert days_left(source) is None
    for unset in ("default", "infinite"):
        emulator.settings.unset_data_ttl = unset
        request = ForkRequest(source, data_ttl="infinity")
        assert days_left(submit_fork(client, request, unset).job_id) is None


def test_an_honoured_key_that_leads_back_to_an_ended_job_is_changed(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    first = submit_fork(client, ForkRequest(source))
    emulator.wait_job(first.job_id)
    cloned: list[str] = []
    second = submit_fork(
        client, ForkRequest(source), earlier_tries=True, created=lambda job_id, _: cloned.append(job_id)
    )
    assert second.job_id != first.job_id
    assert cloned == [second.job_id]
    emulator.wait_job(second.job_id)
    assert emulator.job(second.job_id).status == jobs_pb2.SUCCESS


def test_an_honoured_key_that_leads_to_a_job_another_try_has_started_is_kept(
    emulator: Emulator, client: DataSphereClient
) -> None:
    source = emulator.create_scripted_job(Script(never_ends=True))
    first = submit_fork(client, ForkRequest(source))
    emulator.wait_job(first.job_id, "EXECUTING")
    assert submit_fork(client, ForkRequest(source), earlier_tries=True) == first
    assert [job.id for job in emulator.jobs(source)] == [first.job_id]
    assert emulator.executions(first.job_id) == 1


def test_a_new_job_that_can_not_be_seen_yet_is_not_cloned_again(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    emulator.settings.clone_seconds = 0.2
    emulator.faults.inject("Get", code="NOT_FOUND", skip=1, times=2)
    handle = submit_fork(client, ForkRequest(source), earlier_tries=True)
    assert [job.id for job in emulator.jobs(source)] == [handle.job_id]
    assert emulator.journal.count("Clone") == 1


def test_a_service_that_never_shows_the_new_job_is_not_flooded(
    emulator: Emulator, client: DataSphereClient, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "pause", lambda _: None)
    emulator.faults.inject("Get", code="NOT_FOUND", skip=1)
    submit_fork(client, ForkRequest(source), earlier_tries=True)
    assert emulator.journal.count("Clone") == creation_module.MAX_REPLAYS + 1


def test_a_role_that_is_missing_is_no_reason_to_clone_again(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    emulator.faults.inject("Get", code="PERMISSION_DENIED", skip=1)
    with pytest.raises(JobRequestError, match="Developer"):
        submit_fork(client, ForkRequest(source), earlier_tries=True)
    assert emulator.journal.count("Clone") == 1


def test_an_honoured_key_that_leads_back_to_a_clone_that_failed_is_changed(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    emulator.settings.clone_seconds = 60.0
    with pytest.raises(JobInfrastructureError, match="no disk"):
        submit_fork(client, ForkRequest(source), created=lambda *_: fail_the_clone(emulator, 13))
    emulator.settings.clone_seconds = 0.0
    handle = submit_fork(client, ForkRequest(source), earlier_tries=True)
    one_job_runs(emulator, source, handle)


def test_a_job_that_takes_the_last_room_itself_is_not_waited_for(emulator: Emulator, client: DataSphereClient) -> None:
    emulator.settings.max_running_jobs = 1
    emulator.settings.idempotency = False
    source = emulator.create_scripted_job(Script(never_ends=True))
    emulator.faults.inject("Execute", lost_answer=True, times=1)
    # It runs; the next answer is what a service says that looks at the quota first.
    emulator.faults.inject("Execute", code="RESOURCE_EXHAUSTED")
    handle = submit_fork(client, ForkRequest(source))
    assert handle.operation_id is None
    assert emulator.executions(handle.job_id) == 1


def test_parallel_forks_with_one_client_are_different_jobs(
    emulator: Emulator, client: DataSphereClient, source: str
) -> None:
    jobs: list[str] = []
    threads = [threading.Thread(target=lambda: jobs.append(client.fork_job(source).id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*jobs}) == 8
    assert {job.id for job in emulator.jobs(source)} == {*jobs}
