"""DataSphereJobSensor in one process, against the emulator."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.monitoring import polling as polling_module
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from airflow_provider_datasphere.compat import (
    AirflowException,
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    PokeReturnValue,
    TaskDeferred,
)
from airflow_provider_datasphere.exceptions import (
    DataSphereError,
    JobCancelledError,
    JobFailedError,
    JobInfrastructureError,
    JobLostError,
    JobRequestError,
    MissingOutputsError,
)
from airflow_provider_datasphere.operators.jobs import CancelJobOperator
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor
from airflow_side import connect, context_of
from datasphere_emulator import Emulator, Progress, Script

OUTPUTS = [("result.txt", "RESULT")]
ENDLESS = Script(never_ends=True)


@pytest.fixture
def emulator(datasphere_emulator_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator: Emulator = datasphere_emulator_factory(tls=False)
    connect(emulator, monkeypatch)
    return emulator


def running(emulator: Emulator, script: Script) -> str:
    return emulator.create_scripted_job(script, outputs=OUTPUTS, execute=True)


def over(emulator: Emulator, script: Script) -> str:
    job_id = running(emulator, script)
    emulator.wait_job(job_id, None)
    return job_id


def sensor(emulator: Emulator, job_id: str, **arguments: Any) -> DataSphereJobSensor:
    operation_id = emulator.operation_of(job_id)
    return DataSphereJobSensor(
        **{"task_id": "wait", "job_id": job_id, "operation_id": operation_id, "deferrable": False, **arguments}
    )


def resume(task: DataSphereJobSensor, context: Any, status: str = "ended") -> Any:
    event = {"status": status, "job_id": task.job_id, "message": "lost access"}
    return task.resume_execution("execute_complete", {"event": event}, context)


#: The three ways to the end of a job that is over: a poke, a first look, and what the trigger says.
WAYS: list[Any] = [
    pytest.param(lambda task, context: task.poke(context), id="poke"),
    pytest.param(lambda task, context: task.execute(context), id="deferrable"),
    pytest.param(resume, id="resumed"),
]


def calls(emulator: Emulator) -> Counter[str]:
    return Counter(call.method for call in emulator.journal.calls())


def test_a_poke_costs_one_call_and_the_last_one_two(emulator: Emulator) -> None:
    job_id = running(emulator, ENDLESS)
    emulator.wait_job(job_id, "EXECUTING")
    task = sensor(emulator, job_id)
    assert task.poke(context_of(task)) is False
    assert calls(emulator) == {"Operation.Get": 1}

    done = over(emulator, Script())
    task = sensor(emulator, done)
    context = context_of(task)
    emulator.journal.clear()
    answer = task.poke(context)
    assert isinstance(answer, PokeReturnValue)
    assert answer.is_done
    assert answer.xcom_value == context["ti"].xcoms["result"]
    # The link's community is asked for once in a process.
    assert calls(emulator) - Counter({"Project.Get": 1}) == {"Operation.Get": 1, "Get": 1}


def test_with_the_job_id_alone_a_poke_asks_for_the_job(emulator: Emulator) -> None:
    job_id = running(emulator, ENDLESS)
    task = sensor(emulator, job_id, operation_id=None)
    assert task.poke(context_of(task)) is False
    assert calls(emulator) == {"Get": 1}
    done = over(emulator, Script())
    task = sensor(emulator, done, operation_id=None)
    assert task.poke(context_of(task)).xcom_value["return_code"] == 0


def test_each_change_is_told_once_in_a_process(emulator: Emulator, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = running(emulator, Script(never_ends=True, progress=[Progress(0.0, 37, "epoch 3")]))
    emulator.wait_job(job_id, "EXECUTING")
    task = sensor(emulator, job_id)
    for _ in range(3):
        assert task.poke(context_of(task)) is False
    told = capsys.readouterr().out
    assert (told.count("Job status: EXECUTING"), told.count("37 % epoch 3")) == (1, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(return_code=1), JobFailedError),
        (Script(error=("INTERNAL", "no host")), JobInfrastructureError),
        (Script(missing_outputs=["RESULT"]), MissingOutputsError),
        (Script(failed_uploads=["RESULT"]), JobInfrastructureError),
    ],
)
def test_a_terminal_failure_is_final_and_leaves_its_result(
    emulator: Emulator, way: Any, script: Script, error: type[DataSphereError]
) -> None:
    task = sensor(emulator, over(emulator, script), deferrable=True)
    context = context_of(task)
    with pytest.raises(error) as caught:
        way(task, context)
    assert isinstance(caught.value, AirflowFailException)
    assert context["ti"].xcoms["result"]["job_id"] == task.job_id


@pytest.mark.parametrize("way", WAYS)
def test_a_cancelled_job_is_a_failure(emulator: Emulator, way: Any) -> None:
    job_id = running(emulator, ENDLESS)
    emulator.cancel_job(job_id)
    emulator.wait_job(job_id, "CANCELLED")
    task = sensor(emulator, job_id, deferrable=True)
    with pytest.raises(JobCancelledError):
        way(task, context_of(task))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arguments", [{"soft_fail": True}, {"never_fail": True}])
@pytest.mark.parametrize("script", [Script(return_code=1), Script(error=("INTERNAL", "no host"))])
def test_failing_softly_skips_in_every_mode(
    emulator: Emulator, way: Any, arguments: dict[str, Any], script: Script
) -> None:
    task = sensor(emulator, over(emulator, script), deferrable=True, **arguments)
    with pytest.raises(AirflowSkipException):
        way(task, context_of(task))


@pytest.mark.parametrize("way", WAYS)
def test_an_exit_code_that_skips(emulator: Emulator, way: Any) -> None:
    task = sensor(emulator, over(emulator, Script(return_code=99)), deferrable=True, skip_on_exit_code=[99])
    context = context_of(task)
    with pytest.raises(AirflowSkipException, match="return code 99"):
        way(task, context)
    assert context["ti"].xcoms["result"]["return_code"] == 99


@pytest.mark.parametrize("soft_fail", [False, True])
def test_a_lost_job_may_be_looked_for_again(
    emulator: Emulator, soft_fail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling_module, "NOT_FOUND_GRACE_SECONDS", 0.2)
    job_id = over(emulator, Script())
    task = sensor(emulator, job_id, deferrable=True, soft_fail=soft_fail)
    emulator.forget_operation(emulator.operation_of(job_id))
    emulator.delete_job(job_id)
    for way in (lambda: task.poke(context_of(task)), lambda: resume(task, context_of(task), "lost")):
        with pytest.raises(AirflowSkipException if soft_fail else JobLostError) as caught:
            way()
        assert not isinstance(caught.value, AirflowFailException)


@pytest.mark.parametrize("deferrable", [False, True])
def test_an_id_that_was_never_a_jobs_is_refused_for_good(emulator: Emulator, deferrable: bool) -> None:
    task = DataSphereJobSensor(task_id="wait", job_id="bt1mistyped", mode="poke", deferrable=deferrable)
    with pytest.raises(JobRequestError, match="There is no job bt1mistyped, or the connection's account can't see it"):
        task.execute(context_of(task))
    soft = DataSphereJobSensor(task_id="soft", job_id="bt1mistyped", mode="poke", deferrable=deferrable, soft_fail=True)
    with pytest.raises(AirflowSkipException):
        soft.execute(context_of(soft))


@pytest.mark.parametrize("seen", ["in this process", "by an earlier poke", "by an earlier try"])
def test_a_job_that_was_seen_before_it_went_is_lost(emulator: Emulator, seen: str) -> None:
    job_id = running(emulator, ENDLESS)
    task = sensor(emulator, job_id, operation_id=None)
    context = context_of(task)
    if seen == "in this process":
        assert task.poke(context) is False
    elif seen == "by an earlier poke":
        context["task_reschedule_count"] = 1
    else:
        context["ti"].try_number = 2
    emulator.cancel_job(job_id)
    emulator.wait_job(job_id, "CANCELLED")
    emulator.delete_job(job_id)
    with pytest.raises(JobLostError):
        task.poke(context)


def test_trouble_with_the_service_is_left_to_the_next_poke(emulator: Emulator) -> None:
    task = sensor(emulator, over(emulator, Script()))
    fault = emulator.faults.inject("*Get", code="UNAVAILABLE")
    assert task.poke(context_of(task)) is False
    assert calls(emulator)["Operation.Get"] == 3
    emulator.faults.remove(fault)
    assert task.poke(context_of(task)).xcom_value["status"] == "SUCCESS"


def test_a_passing_error_is_waited_out_within_the_poke(emulator: Emulator) -> None:
    task = sensor(emulator, over(emulator, Script()))
    emulator.faults.inject("Operation.Get", code="UNAVAILABLE", times=2)
    emulator.faults.inject("Get", code="RESOURCE_EXHAUSTED", times=1)
    assert task.poke(context_of(task)).xcom_value["status"] == "SUCCESS"


def test_a_job_that_is_not_known_yet_is_waited_for_within_the_poke(emulator: Emulator) -> None:
    job_id = over(emulator, Script())
    emulator.faults.inject("Get", code="NOT_FOUND", times=4)
    task = sensor(emulator, job_id, operation_id=None)
    assert task.poke(context_of(task)).xcom_value["status"] == "SUCCESS"


@pytest.mark.parametrize("job_id", ["", "None", None])
@pytest.mark.parametrize("deferrable", [False, True])
def test_no_job_id_is_an_error_that_says_so(emulator: Emulator, job_id: Any, deferrable: bool) -> None:
    message = r"job_id is .*: give the id of a DataSphere job, such as fork\.output"
    with pytest.raises(JobRequestError, match=message):
        DataSphereJobSensor(task_id="wait", job_id=job_id, deferrable=deferrable)
    task = DataSphereJobSensor(task_id="wait", job_id="{{ x }}", deferrable=deferrable)
    task.job_id = job_id  # as templates and XComs do
    with pytest.raises(JobRequestError, match=message):
        task.execute(context_of(task))
    assert emulator.journal.calls() == []


@pytest.mark.parametrize("operation_id", ["None", ""])
def test_a_template_without_an_operation_means_none(emulator: Emulator, operation_id: str) -> None:
    task = sensor(emulator, over(emulator, Script()), operation_id=operation_id)
    assert task.poke(context_of(task)).xcom_value["status"] == "SUCCESS"
    assert calls(emulator)["Operation.Get"] == 0


@pytest.mark.parametrize("other", ["of another job", "of the clone"])
def test_an_operation_that_is_not_the_jobs_tells_nothing_of_it(emulator: Emulator, other: str) -> None:
    job_id = running(emulator, ENDLESS)
    if other == "of another job":
        operation_id = emulator.operation_of(over(emulator, Script()))
    else:
        settings = Settings.from_extra(emulator.connection_extra())
        job_id = DataSphereClient(settings).fork_job(job_id).id
        operation_id = emulator.journal.calls("Clone")[-1].operation_id
    for options in ({}, {"deferrable": True}):
        task = sensor(emulator, job_id, operation_id=operation_id, **options)
        with pytest.raises(JobRequestError, match=f"operation_id is '{operation_id}', which is .*give the XCom"):
            task.execute(context_of(task))


@pytest.mark.parametrize("job_id", ["bt1x\n", " bt1x", '"bt1x"', "bt1x/", 7])
def test_what_can_be_no_jobs_id_is_refused(emulator: Emulator, job_id: Any) -> None:
    makers: list[Any] = [
        lambda job_id: DataSphereJobSensor(task_id="wait", job_id=job_id, mode="poke"),
        lambda job_id: CancelJobOperator(task_id="cancel", job_id=job_id),
        lambda job_id: DownloadJobResultsOperator(task_id="download", job_id=job_id, destination="to"),
    ]
    for make in makers:
        with pytest.raises(JobRequestError, match="job_id is "):
            make(job_id)
        task = make("{{ x }}")
        task.job_id = job_id  # as templates and XComs do
        with pytest.raises(JobRequestError, match="job_id is "):
            task.execute(context_of(task))
    assert emulator.journal.calls() == []


def test_an_unknown_connection_says_so(emulator: Emulator) -> None:
    task = sensor(emulator, over(emulator, Script()), datasphere_conn_id="no_such_connection")
    with pytest.raises(AirflowException, match="no_such_connection"):
        task.poke(context_of(task))


def test_a_deferred_wait_has_the_sensors_timeout_and_pace(emulator: Emulator) -> None:
    job_id = running(emulator, ENDLESS)
    task = sensor(emulator, job_id, deferrable=True, timeout=timedelta(hours=2), poke_interval=timedelta(minutes=5))
    with pytest.raises(TaskDeferred) as caught:
        task.execute(context_of(task))
    assert 7190 < caught.value.trigger.deadline - time.time() <= 7200
    assert caught.value.timeout > timedelta(hours=2, minutes=1)
    assert caught.value.trigger.poll_interval == 300.0
    assert caught.value.trigger.on_kill_action == "keep"


def test_a_try_that_is_resumed_from_the_deferral_of_an_earlier_one_looks_anew(emulator: Emulator) -> None:
    job_id = running(emulator, ENDLESS)
    task = sensor(emulator, job_id, deferrable=True)
    emulator.cancel_job(job_id)
    lost = {"event": {"status": "lost", "job_id": job_id, "message": "lost access", "try_number": 1}}
    with pytest.raises(JobCancelledError):
        task.resume_execution("execute_complete", lost, context_of(task, try_number=2, max_tries=1))


def timeout_event(task: DataSphereJobSensor) -> dict[str, Any]:
    return {"status": "timeout", "job_id": task.job_id}


ENDS = {
    "the trigger's word": lambda task, context: task.execute_complete(context, timeout_event(task)),
    # What Airflow 2.11 and 3 say themselves.
    "Airflow 2": lambda task, context: task.resume_execution(
        "__fail__", {"error": "Trigger/execution timeout"}, context
    ),
    "Airflow 3": lambda task, context: task.resume_execution("__fail__", {"error": "Trigger timeout"}, context),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, AirflowSensorTimeout),
        ({"soft_fail": True}, AirflowSkipException),
        ({"never_fail": True}, AirflowSkipException),
    ],
)
def test_a_deferred_wait_whose_time_is_over(emulator: Emulator, end: Any, options: Any, error: Any) -> None:
    task = sensor(emulator, running(emulator, ENDLESS), deferrable=True, timeout=4, **options)
    with pytest.raises(error, match=r"Timed out after 4 seconds waiting for job \w+; the job is still running\."):
        end(task, context_of(task))
    assert calls(emulator)["Cancel"] == 0


@pytest.mark.parametrize("timeout", [float("inf"), 1e15, timedelta.max])
def test_a_timeout_beyond_all_dates_is_none(emulator: Emulator, timeout: float | timedelta) -> None:
    task = sensor(emulator, running(emulator, ENDLESS), deferrable=True, timeout=timeout)
    with pytest.raises(TaskDeferred) as caught:
        task.execute(context_of(task))
    assert caught.value.timeout is None
    _, arguments = caught.value.trigger.serialize()
    assert arguments["deadline"] is None


def test_a_job_that_ended_with_the_time_is_no_timeout(emulator: Emulator) -> None:
    task = sensor(emulator, over(emulator, Script()), deferrable=True, timeout=4)
    assert task.execute_complete(context_of(task), timeout_event(task))["status"] == "SUCCESS"
    failed = sensor(emulator, over(emulator, Script(return_code=1)), deferrable=True, timeout=4)
    with pytest.raises(JobFailedError):
        failed.execute_complete(context_of(failed), timeout_event(failed))


@pytest.mark.parametrize("event", [None, {}, {"status": "surprise", "job_id": "bt1job"}])
def test_an_event_that_nobody_knows_is_refused(event: Any) -> None:
    task = DataSphereJobSensor(task_id="wait", job_id="bt1job")
    with pytest.raises(DataSphereError, match="Unexpected trigger event"):
        task.execute_complete(context_of(task), event)


def test_defaults_and_templates() -> None:
    task = DataSphereJobSensor(task_id="wait", job_id="{{ x }}", operation_id="{{ y }}", datasphere_conn_id="{{ z }}")
    assert (task.mode, task.reschedule, task.poke_interval) == ("reschedule", True, 60.0)
    assert (task.fail_on_missing_outputs, task.skip_on_exit_code, task.deferrable) == (True, None, False)
    task.render_template_fields({"x": "bt1", "y": "op", "z": "elsewhere"})
    assert (task.job_id, task.operation_id, task.datasphere_conn_id) == ("bt1", "op", "elsewhere")


def test_it_starts_and_cancels_nothing(emulator: Emulator) -> None:
    for script in (Script(), Script(return_code=1)):
        task = sensor(emulator, over(emulator, script), soft_fail=True)
        try:
            task.execute(context_of(task))
        except AirflowSkipException:
            task.on_kill()
    assert not set(calls(emulator)) - {"Operation.Get", "Get", "Project.Get"}


def test_a_timeout_for_ever_can_be_deferred(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    task = DataSphereJobSensor(task_id="wait", job_id=job_id, deferrable=True, timeout=1e12)
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context_of(task))
    assert (deferred.value.trigger.serialize()[1]["deadline"], deferred.value.timeout) == (None, None)
