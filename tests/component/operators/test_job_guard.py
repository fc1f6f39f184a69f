"""Whatever ends a task after it has a job, somebody answers for that job: a later try, or it is cancelled and named."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_datasphere import task_end
from airflow_provider_datasphere.compat import AirflowTaskTimeout, TaskDeferred
from airflow_provider_datasphere.exceptions import (
    DataSphereError,
    JobCancelledError,
    JobInfrastructureError,
    JobRequestError,
)
from airflow_provider_datasphere.operators import job_guard
from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_side import RUN_START, connect, context_of
from datasphere_emulator import Emulator, Script

ENDLESS = Script(never_ends=True)
QUICK = Script(executing_seconds=0.1)


@pytest.fixture
def emulator(datasphere_emulator_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator: Emulator = datasphere_emulator_factory(tls=False)
    connect(emulator, monkeypatch)
    return emulator


def source(emulator: Emulator, script: Script | list[Script] = ENDLESS, **fields: Any) -> str:
    return emulator.create_scripted_job(script, args={"RANGE": "10"}, **fields)


def fork(source_job_id: str, **arguments: Any) -> ForkJobOperator:
    return ForkJobOperator(
        **{"task_id": "fork", "source_job_id": source_job_id, "poll_interval": 0.2, "deferrable": False, **arguments}
    )


def when_running(emulator: Emulator, parent: str, act: Callable[[], object]) -> threading.Thread:
    """Do something in another thread once a fork runs."""

    def run() -> None:
        while not any(job.status == 2 for job in emulator.jobs(parent)):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def cancels(emulator: Emulator) -> list[str | None]:
    return [call.job_id for call in emulator.journal.calls("Cancel")]


# A person at the keyboard --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "count"), [("cancel", 1), ("keep", 0)])
@pytest.mark.parametrize("retries", [0, 2])
def test_ctrl_c_ends_the_job_as_on_kill_action_says(emulator: Emulator, action: Any, count: int, retries: int) -> None:
    """`airflow tasks test` and dag.test(): nobody tries again after Ctrl-C."""
    parent = source(emulator)
    task = fork(parent, on_kill_action=action, retries=retries)
    when_running(emulator, parent, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        task.execute(context_of(task, max_tries=retries))
    assert len(cancels(emulator)) == count


# Airflow's own errors ------------------------------------------------------------------------------------------------


def failing_push(context: Any, key: str) -> None:
    push = context["ti"].xcom_push

    def xcom_push(key: str, value: Any, *, broken: str = key) -> None:
        if key == broken:
            raise OSError("the API server is away")
        push(key, value)

    context["ti"].xcom_push = xcom_push


def test_an_error_after_execute_leaves_the_job_to_the_next_try_and_names_it(emulator: Emulator) -> None:
    parent = source(emulator)
    task = fork(parent, retries=1)
    context = context_of(task, max_tries=1)
    failing_push(context, "operation_id")
    with pytest.raises(DataSphereError, match=r"server is away. Job bt1.* keeps running, and the next try att") as e:
        task.execute(context)
    (job,) = emulator.jobs(parent)
    assert job.id in str(e.value)
    assert cancels(emulator) == []


@pytest.mark.parametrize(("action", "count"), [("cancel", 1), ("keep", 0)])
def test_an_error_after_execute_in_the_last_try_ends_the_job_and_names_it(
    emulator: Emulator, action: Any, count: int
) -> None:
    parent = source(emulator)
    task = fork(parent, on_kill_action=action)
    context = context_of(task)
    failing_push(context, "operation_id")
    with pytest.raises(DataSphereError, match=r"API server is away. Job bt1"):
        task.execute(context)
    assert len(cancels(emulator)) == count


def test_an_error_before_execute_in_the_last_try_takes_the_clone_back(emulator: Emulator) -> None:
    parent = source(emulator)
    task = fork(parent)
    context = context_of(task)
    failing_push(context, "job_id")
    with pytest.raises(DataSphereError, match="API server is away"):
        task.execute(context)
    assert emulator.jobs(parent) == []
    assert emulator.journal.count("Execute") == 0


def test_a_result_that_can_not_be_pushed_is_of_a_job_that_is_over(emulator: Emulator) -> None:
    parent = source(emulator, QUICK)
    task = fork(parent)
    context = context_of(task)
    failing_push(context, "result")
    with pytest.raises(DataSphereError, match=r"API server is away. Job bt1.* is over"):
        task.execute(context)
    assert cancels(emulator) == []


def test_a_timeout_for_ever_can_be_deferred(emulator: Emulator) -> None:
    task = fork(source(emulator), deferrable=True, execution_timeout=timedelta.max)
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context_of(task))
    assert deferred.value.trigger.serialize()[1]["deadline"] is None


def test_a_timeout_that_passes_through_ends_the_job_once(emulator: Emulator) -> None:
    """Also where Airflow calls on_kill() of another operator: the @task that executes this one."""
    parent = source(emulator)
    task = fork(parent, retries=2)

    def time_is_up(*_: Any) -> None:
        raise AirflowTaskTimeout("Timeout")

    def alarm() -> None:
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        when_running(emulator, parent, alarm)
        with pytest.raises(AirflowTaskTimeout):
            task.execute(context_of(task, max_tries=2))
    finally:
        signal.signal(signal.SIGALRM, before)
    task.on_kill()
    (call,) = emulator.journal.calls("Cancel")
    assert call.request is not None
    assert call.request["reason"] == "Airflow: execution_timeout passed"


def test_a_timeout_before_airflow_2_has_resumed_the_task_ends_the_job(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doesn't even begin to resume a task whose time is up; only on_kill() is called, and the task is running."""
    monkeypatch.setattr(job_guard, "task_state", lambda _: "running")
    first = fork(source(emulator), wait_for_completion=False, retries=2)
    context = context_of(first, max_tries=2)
    job_id = first.execute(context)
    resumed = fork("bt1", retries=2)
    monkeypatch.setattr(job_guard, "current_context", lambda: {**context, "task": resumed})
    try:
        raise AirflowTaskTimeout("Timeout")
    except AirflowTaskTimeout:
        resumed.on_kill()
    assert cancels(emulator) == [job_id]


# A retry that ends before it has gone on with its predecessor's job ------------------------------------------------


def test_a_final_error_of_a_retry_ends_the_job_of_an_earlier_try_and_names_it(emulator: Emulator) -> None:
    parent = source(emulator)
    first = fork(parent, wait_for_completion=False, retries=2)
    job_id = first.execute(context_of(first, max_tries=2))
    again = fork(parent, retries=2)
    again.args = {"RNGE": "1"}
    again.docker = 5  # type: ignore[assignment]
    with pytest.raises(JobRequestError, match=f"Job {job_id} was cancelled, since no later try"):
        again.execute(context_of(again, max_tries=2, try_number=2))
    assert cancels(emulator) == [job_id]


def test_a_search_that_fails_in_the_last_try_says_that_a_job_may_run(emulator: Emulator) -> None:
    parent = source(emulator)
    first = fork(parent, wait_for_completion=False, retries=1)
    first.execute(context_of(first, max_tries=1))
    emulator.faults.inject("List", code="PERMISSION_DENIED")
    again = fork(parent, retries=1)
    with pytest.raises(JobInfrastructureError, match="An earlier try may have left a job running and costing money"):
        again.execute(context_of(again, max_tries=1, try_number=2))


# A kill, and what Airflow says of it ---------------------------------------------------------------------------------


def killed(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    says: Callable[[Any], Any],
    *,
    retries: int,
    try_number: int = 1,
) -> BaseException:
    """A blocking task that gets on_kill() while its job runs, as Airflow 3's signal handler calls it."""
    monkeypatch.setattr(job_guard, "task_state", says)
    parent = source(emulator)
    task = fork(parent, retries=retries)
    when_running(emulator, parent, task.on_kill)
    with pytest.raises(DataSphereError) as ended:
        task.execute(context_of(task, max_tries=retries, try_number=try_number))
    return ended.value


def silence(_: Any) -> str:
    raise OSError("the API server is away")


def test_silence_with_a_try_left_leaves_the_job(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    error = killed(emulator, monkeypatch, silence, retries=2)
    assert cancels(emulator) == []
    assert "keeps running, and the next try attaches to it" in str(error)


def test_an_answer_that_does_not_come_is_silence(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_end, "QUERY_SECONDS_BEFORE_KEEPING", 0.2)
    never = threading.Event()
    killed(emulator, monkeypatch, lambda _: never.wait(60), retries=2)
    never.set()
    assert cancels(emulator) == []


def test_silence_in_the_last_try_ends_the_job(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    error = killed(emulator, monkeypatch, silence, retries=2, try_number=3)
    assert len(cancels(emulator)) == 1
    assert "stopped in Airflow" in str(error)


@pytest.mark.parametrize("state", ["failed", "success", None])
def test_a_person_with_a_try_left_ends_the_job(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    killed(emulator, monkeypatch, lambda _: state, retries=2)
    assert len(cancels(emulator)) == 1


def test_a_cancel_of_another_process_of_the_task_is_not_a_persons(emulator: Emulator) -> None:
    """A worker that was cut off ends the job that the next try watches."""
    parent = source(emulator)
    task = fork(parent, retries=2)

    def cancel() -> None:
        (job,) = emulator.jobs(parent)
        emulator.cancel_job(job.id, reason="Airflow: the task was ended")

    when_running(emulator, parent, cancel)
    with pytest.raises(JobInfrastructureError, match="another process of this task"):
        task.execute(context_of(task, max_tries=2))


def test_a_persons_cancel_is_final(emulator: Emulator) -> None:
    parent = source(emulator)
    task = fork(parent, retries=2)
    when_running(emulator, parent, lambda: emulator.cancel_job(emulator.jobs(parent)[0].id, reason="too expensive"))
    with pytest.raises(JobCancelledError):
        task.execute(context_of(task, max_tries=2))


# A worker that was cut off -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [0, 1, 2])
def test_a_try_that_was_overtaken_starts_nothing(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, questions: int
) -> None:
    """It is cut off before any of the moments at which it asks: before Clone, before it writes, before Execute."""
    asked: list[Any] = []

    def is_overtaken(_: Any) -> bool:
        asked.append(None)
        return len(asked) > questions

    monkeypatch.setattr(job_guard, "is_overtaken", is_overtaken)
    parent = source(emulator)
    task = fork(parent, retries=2)
    with pytest.raises(DataSphereError, match="A newer try of this task has begun"):
        task.execute(context_of(task, max_tries=2))
    assert emulator.journal.count("Execute") == 0
    assert emulator.jobs(parent) == []
    assert cancels(emulator) == []


def test_without_an_answer_nothing_is_started(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_overtaken(_: Any) -> bool:
        raise OSError("the API server is away")

    monkeypatch.setattr(job_guard, "is_overtaken", is_overtaken)
    parent = source(emulator)
    task = fork(parent)
    with pytest.raises(DataSphereError, match=r"newest try.*API server is away"):
        task.execute(context_of(task))
    assert emulator.journal.count("Execute") == 0


# Whose job it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("honoured", [True, False], ids=["key-honoured", "key-ignored"])
@pytest.mark.parametrize("stores", [True, False], ids=["store", "list"])
@pytest.mark.parametrize("end", ["running", "success"])
def test_two_deployments_share_nothing(emulator: Emulator, honoured: bool, stores: bool, end: str) -> None:
    """The same DAG, run id and task on one project: only the runs' starts tell them apart."""
    emulator.settings.idempotency = honoured
    parent = source(emulator, ENDLESS if end == "running" else QUICK)
    jobs: list[str] = []
    for seconds in (0, 3):
        store: dict[str, Any] = {}
        accessor = SimpleNamespace(get=store.get, set=store.__setitem__)
        for try_number in (1, 2):
            task = fork(parent, wait_for_completion=False, retries=2)
            context = context_of(task, max_tries=2, try_number=try_number)
            context["dag_run"] = SimpleNamespace(start_date=RUN_START + timedelta(seconds=seconds))
            if stores:
                context["task_state_store"] = accessor
            jobs.append(task.execute(context))
        if end == "success":
            emulator.wait_job(jobs[-1])
    assert jobs[0] == jobs[1] != jobs[2] == jobs[3]
    assert [emulator.executions(job.id) for job in emulator.jobs(parent)] == [1, 1]


def test_two_operators_in_one_task_have_a_job_each(emulator: Emulator) -> None:
    parent = source(emulator)
    outer = fork(parent)
    for try_number in (1, 2):
        context = context_of(outer, max_tries=2, try_number=try_number)
        named = [fork(parent, task_id=name, wait_for_completion=False).execute(context) for name in ("a", "b")]
        looped = [fork(parent, task_id="c", wait_for_completion=False).execute(context) for _ in range(3)]
        jobs = [*named, *looped]
        assert len(set(jobs)) == 5
        if try_number == 1:
            first = jobs
    assert jobs == first


@pytest.mark.parametrize("arguments", [{"args": {"RANGE": "2"}}, {}], ids=["other arguments", "the same"])
def test_a_test_of_the_same_date_runs_again(emulator: Emulator, arguments: Any) -> None:
    """`airflow dags test` of a date again is a first try of the same run, and keys are honoured."""
    parent = source(emulator, QUICK)
    first = fork(parent)
    job_id = first.execute(context_of(first))
    again = fork(parent, **arguments)
    other = again.execute(context_of(again))
    assert other != job_id
    assert [emulator.executions(job.id) for job in emulator.jobs(parent)] == [1, 1]


def test_a_retry_with_another_source_goes_on_with_the_living_job(
    emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, other = source(emulator), source(emulator)
    first = fork(parent, wait_for_completion=False, retries=1)
    job_id = first.execute(context_of(first, max_tries=1))
    again = fork(other, wait_for_completion=False, retries=1)
    assert again.execute(context_of(again, max_tries=1, try_number=2)) == job_id
    assert "created with other arguments than the task has now: source_job_id" in capsys.readouterr().out
    assert emulator.jobs(other) == []


def test_a_retry_with_other_arguments_does_not_take_an_old_result(emulator: Emulator) -> None:
    parent = source(emulator, QUICK)
    first = fork(parent, retries=1)
    job_id = first.execute(context_of(first, max_tries=1))
    again = fork(parent, retries=1, args={"RANGE": "2"})
    assert again.execute(context_of(again, max_tries=1, try_number=2)) != job_id


def test_a_retry_with_other_bytes_does_not_take_an_old_result(emulator: Emulator, tmp_path: Any) -> None:
    parent = source(emulator, QUICK, files={"in.csv": "0"}, inputs=[("in.csv", "DATA")])
    (tmp_path / "new.csv").write_text("1")
    jobs = []
    for try_number, content in ((1, "1"), (2, "1"), (3, "2")):
        (tmp_path / "new.csv").write_text(content)
        task = fork(parent, retries=2, vars={"DATA": str(tmp_path / "new.csv")})
        jobs.append(task.execute(context_of(task, max_tries=2, try_number=try_number)))
    assert jobs[0] == jobs[1] != jobs[2]


# A service that shows a new job late -------------------------------------------------------------------------------


def test_the_link_is_right_before_the_new_job_can_be_seen(emulator: Emulator) -> None:
    emulator.settings.update({"clone_seconds": 0.5, "new_jobs_visible": "when_done"})
    parent = source(emulator)
    task = fork(parent, wait_for_completion=False)
    context = context_of(task)
    job_id = task.execute(context)
    project = emulator.job(job_id).project_id
    assert context["ti"].xcoms["job_url"].endswith(f"/projects/{project}/job/{job_id}")
    assert "/communities/" in context["ti"].xcoms["job_url"]


def test_a_kill_before_the_new_job_can_be_seen_leaves_no_clone(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_guard, "task_state", lambda _: "failed")
    emulator.settings.update({"clone_seconds": 1.0, "new_jobs_visible": "when_done"})
    parent = source(emulator)
    task = fork(parent)
    context = context_of(task)

    def kill() -> None:
        while "job_id" not in context["ti"].xcoms:
            time.sleep(0.01)
        task.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DataSphereError, match="stopped in Airflow"):
        task.execute(context)
    thread.join()
    assert emulator.jobs(parent) == []
    assert emulator.journal.count("Execute") == 0
