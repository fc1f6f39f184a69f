"""ForkJobOperator and CancelJobOperator in one process, against the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_datasphere.compat import AirflowSkipException, AirflowTaskTimeout, ObjectStoragePath, TaskDeferred
from airflow_provider_datasphere.exceptions import (
    DataSphereError,
    JobCancelledError,
    JobFailedError,
    JobInfrastructureError,
    JobLostError,
    JobRequestError,
    MissingOutputsError,
)
from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger
from airflow_side import connect, context_of
from datasphere_emulator import Emulator, Script

OUTPUTS = [("result.txt", "RESULT")]
QUICK = Script(executing_seconds=0.1, log=["hello"], outputs={"RESULT": "42"})
ENDLESS = Script(never_ends=True)


@pytest.fixture
def emulator(datasphere_emulator_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator: Emulator = datasphere_emulator_factory(tls=False)
    connect(emulator, monkeypatch)
    return emulator


def source(emulator: Emulator, script: Script = QUICK, **fields: Any) -> str:
    return emulator.create_scripted_job(script, outputs=OUTPUTS, args={"RANGE": "10"}, **fields)


def fork(source_job_id: str, **arguments: Any) -> ForkJobOperator:
    return ForkJobOperator(
        **{"task_id": "fork", "source_job_id": source_job_id, "poll_interval": 0.2, "deferrable": False, **arguments}
    )


def calls(emulator: Emulator, method: str) -> int:
    return emulator.journal.count(method)


# Forking and waiting ------------------------------------------------------------------------------------------------


def test_a_kill_before_there_is_a_client_starts_no_job(emulator: Emulator) -> None:
    """Airflow 3 listens to signals before it calls the operator."""
    task = fork(source(emulator, ENDLESS))
    task.on_kill()
    with pytest.raises(DataSphereError, match="stopped in Airflow before a job was created"):
        task.execute(context_of(task))
    assert calls(emulator, "Execute") == 0
    assert len(emulator.jobs()) == 1


def test_path_objects_are_templates_too() -> None:
    task = fork("bt1", vars={"A": Path("/data/{{ ds }}"), "B": ObjectStoragePath("file:///data/{{ ds }}")})
    task.render_template_fields({"ds": "2026-11-22"})
    assert task.vars == {"A": "/data/2026-11-22", "B": "file:///data/2026-11-22"}


def test_without_do_xcom_push_there_is_no_return_value(emulator: Emulator) -> None:
    task = fork(source(emulator), do_xcom_push=False)
    context = context_of(task)
    job_id = task.execute(context)
    assert "return_value" not in context["ti"].xcoms
    assert context["ti"].xcoms["job_id"] == job_id


def test_path_objects_are_inputs_too(emulator: Emulator, tmp_path: Path) -> None:
    for name in ("local", "stored"):
        (tmp_path / name).write_text(f"content of {name}\n")
    source_job_id = emulator.create_job(
        "cat ${A} ${B}", files={"a": "-", "b": "-"}, inputs=[("a", "A"), ("b", "B")], execute=False
    )
    paths = {"A": tmp_path / "local", "B": ObjectStoragePath(f"file://{tmp_path}/stored")}
    task = fork(source_job_id, vars=paths)
    job_id = task.execute(context_of(task))
    printed = b"".join(content for source, _, content in emulator.log_text(job_id) if source == "stdout")
    assert printed == b"content of local\ncontent of stored\n"


def test_a_fork_returns_its_job_id_and_tells_the_rest_by_xcom(
    emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    task = fork(source(emulator), args={"RANGE": "1"})
    context = context_of(task)
    job_id = task.execute(context)

    xcoms = context["ti"].xcoms
    job = emulator.job(job_id)
    assert {argument.name: argument.value for argument in job.job_parameters.arguments} == {"RANGE": "1"}
    assert xcoms["job_id"] == xcoms["return_value"] == job_id
    assert xcoms["operation_id"] == emulator.operation_of(job_id)
    assert xcoms["job_url"] == xcoms["_link_DataSphereJobLink"]
    assert xcoms["job_url"].endswith(f"/projects/{emulator.project_id}/job/{job_id}")
    assert list(xcoms)[-1] == "result"
    assert (xcoms["result"]["status"], xcoms["result"]["return_code"]) == ("SUCCESS", 0)
    assert datetime.fromisoformat(xcoms["result"]["started_at"]).tzinfo is not None
    assert [file["var"] for file in xcoms["result"]["output_files"]] == ["RESULT"]
    assert " hello " in capsys.readouterr().out
    assert (calls(emulator, "Clone"), calls(emulator, "Execute"), calls(emulator, "Cancel")) == (1, 1, 0)


def test_without_streaming_no_log_is_read(emulator: Emulator, capsys: pytest.CaptureFixture[str]) -> None:
    task = fork(source(emulator), stream_logs=False)
    task.execute(context_of(task))
    assert calls(emulator, "ReadLogs") == 0
    assert " hello " not in capsys.readouterr().out


def test_not_waiting_ends_as_soon_as_the_job_runs(emulator: Emulator) -> None:
    task = fork(source(emulator, ENDLESS), wait_for_completion=False, deferrable=True)
    context = context_of(task)
    job_id = task.execute(context)
    assert context["ti"].xcoms["operation_id"] == emulator.operation_of(job_id)
    assert "result" not in context["ti"].xcoms
    assert emulator.executions(job_id) == 1
    assert (calls(emulator, "Cancel"), calls(emulator, "ReadLogs")) == (0, 0)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(return_code=3), JobFailedError),
        (Script(error=("INTERNAL", "no host")), JobInfrastructureError),
        (Script(missing_outputs=["RESULT"]), MissingOutputsError),
    ],
)
def test_a_failure_leaves_job_id_and_result_behind(
    emulator: Emulator, script: Script, error: type[DataSphereError]
) -> None:
    task = fork(source(emulator, script))
    context = context_of(task)
    with pytest.raises(error) as caught:
        task.execute(context)
    xcoms = context["ti"].xcoms
    assert xcoms["result"]["job_id"] == xcoms["return_value"]
    assert xcoms["return_value"] in str(caught.value)
    assert xcoms["job_url"] in str(caught.value)


def test_a_job_cancelled_by_somebody_is_told_apart(emulator: Emulator) -> None:
    task = fork(source(emulator, ENDLESS), wait_for_completion=False)
    job_id = task.execute(context_of(task))
    emulator.cancel_job(job_id, reason="too dear")
    emulator.wait_job(job_id, "CANCELLED")
    waiting = fork("bt1source")
    with pytest.raises(JobCancelledError, match="too dear"):
        waiting.execute_complete(context_of(waiting), {"status": "ended", "job_id": job_id, "operation_id": None})


@pytest.mark.parametrize("codes", [99, [98, 99], {99}, range(90, 100)])
def test_an_exit_code_that_skips(emulator: Emulator, codes: Any) -> None:
    task = fork(source(emulator, Script(return_code=99)), skip_on_exit_code=codes)
    context = context_of(task)
    with pytest.raises(AirflowSkipException, match="return code 99"):
        task.execute(context)
    assert context["ti"].xcoms["result"]["return_code"] == 99


def test_missing_outputs_may_be_allowed(emulator: Emulator, capsys: pytest.CaptureFixture[str]) -> None:
    task = fork(source(emulator, Script(missing_outputs=["RESULT"])), fail_on_missing_outputs=False)
    context = context_of(task)
    task.execute(context)
    assert context["ti"].xcoms["result"]["missing_outputs"] == ["result.txt"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "didn't create result.txt" in line]
    assert "[warning" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": {"RANGES": "1"}}, "args names 'RANGES'.*its arguments: RANGE"),
        ({"vars": {"RESULTS": "x"}}, "vars names 'RESULTS'.*RESULT"),
        ({"vars": {"RESULT": "s3://bucket/x"}}, "RESULT is an output of job"),
        ({"source_job_id": "bt1nosuchjob00000000"}, "bt1nosuchjob00000000"),
        ({"source_job_id": "None"}, "source_job_id is 'None'"),
        ({"args": {"RANGE": 1}}, "write '1'"),
    ],
)
def test_what_only_the_running_task_can_know_is_refused_before_anything_is_made(
    emulator: Emulator, arguments: dict[str, Any], message: str
) -> None:
    task = fork(source(emulator))
    # As templates and XComs do: after the DAG was parsed.
    for name, value in arguments.items():
        setattr(task, name, value)
    with pytest.raises(JobRequestError, match=message):
        task.execute(context_of(task))
    assert (calls(emulator, "Clone"), calls(emulator, "Execute")) == (0, 0)


def test_a_retry_attaches_or_forks_anew_as_asked(emulator: Emulator) -> None:
    job = source(emulator, ENDLESS)
    first = fork(job, wait_for_completion=False, retries=1)
    job_id = first.execute(context_of(first, max_tries=1))
    again = fork(job, wait_for_completion=False, retries=1)
    assert again.execute(context_of(again, max_tries=1, try_number=2)) == job_id
    anew = fork(job, wait_for_completion=False, retries=1, reattach=False)
    assert anew.execute(context_of(anew, max_tries=1, try_number=2)) != job_id
    assert calls(emulator, "Clone") == 2


# Deferring ----------------------------------------------------------------------------------------------------------


def deferred(task: ForkJobOperator, context: Any) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as caught:
        task.execute(context)
    return caught.value


def test_deferring_hands_all_that_the_trigger_needs(emulator: Emulator) -> None:
    task = fork(source(emulator, ENDLESS), deferrable=True, stream_logs=False, on_kill_action="graceful")
    context = context_of(task)
    request = deferred(task, context)
    xcoms = context["ti"].xcoms
    assert isinstance(request.trigger, DataSphereJobTrigger)
    path, arguments = request.trigger.serialize()
    assert path == "airflow_provider_datasphere.triggers.jobs.DataSphereJobTrigger"
    assert arguments == {
        "job_id": xcoms["job_id"],
        "operation_id": xcoms["operation_id"],
        "datasphere_conn_id": "datasphere_default",
        "poll_interval": 0.2,
        "stream_logs": False,
        "deadline": None,
        "on_kill_action": "graceful",
        "link": xcoms["job_url"],
        "queued": None,
        "project_id": emulator.project_id,
        "first_execute_at": arguments["first_execute_at"],
        "accepted_at": arguments["accepted_at"],
        "start_deadline": None,
        "wait_for_completion": True,
    }
    assert 0 < arguments["first_execute_at"] <= arguments["accepted_at"] <= time.time()
    assert (request.method_name, request.timeout) == ("execute_complete", None)


def test_the_execution_timeout_goes_along_as_a_moment(emulator: Emulator) -> None:
    task = fork(source(emulator, ENDLESS), deferrable=True, execution_timeout=timedelta(hours=1))
    context = context_of(task)
    context["ti"].start_date = datetime.now(timezone.utc) - timedelta(minutes=10)
    request = deferred(task, context)
    left = request.trigger.deadline - time.time()
    assert 2900 < left <= 3000
    # Airflow's own timeout is the net below, and must not be first.
    assert request.timeout is not None
    assert request.timeout.total_seconds() > left + 60


def test_a_job_that_is_over_already_is_not_deferred(emulator: Emulator) -> None:
    task = fork(source(emulator, Script()), deferrable=True)
    # The job ends within milliseconds; a slow first look is what the shortcut is for.
    emulator.faults.inject("Operation.Get", delay=0.5)
    context = context_of(task)
    assert task.execute(context) == context["ti"].xcoms["job_id"]
    assert context["ti"].xcoms["result"]["status"] == "SUCCESS"


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE"])
def test_trouble_at_the_first_look_is_left_to_the_triggerer(emulator: Emulator, code: str) -> None:
    task = fork(source(emulator, ENDLESS), deferrable=True)
    emulator.faults.inject("Operation.Get", code=code)
    request = deferred(task, context_of(task))
    assert emulator.job(request.trigger.job_id).status
    assert emulator.journal.count("Cancel") == 0


@pytest.mark.parametrize(
    "event", [None, {}, {"status": "ended"}, {"status": "running", "job_id": "bt1"}, {"job_id": "bt1"}]
)
def test_an_event_that_nobody_knows_is_refused(event: Any) -> None:
    task = fork("bt1source")
    with pytest.raises(DataSphereError, match="Unexpected trigger event"):
        task.execute_complete(context_of(task), event)


def test_the_event_of_a_lost_job(emulator: Emulator) -> None:
    task = fork("bt1source")
    with pytest.raises(JobLostError, match="may still be running"):
        task.execute_complete(
            context_of(task), {"status": "lost", "job_id": "bt1", "message": "it may still be running"}
        )


@pytest.mark.parametrize("cancelled", [True, False])
def test_the_event_of_a_timeout_leaves_no_job_running(emulator: Emulator, cancelled: bool) -> None:
    task = fork(source(emulator, ENDLESS), deferrable=True)
    request = deferred(task, context_of(task))
    job_id = request.trigger.job_id
    if cancelled:
        emulator.cancel_job(job_id)
    resumed = fork("bt1source", deferrable=True)
    with pytest.raises(AirflowTaskTimeout, match=job_id):
        resumed.execute_complete(
            context_of(resumed), {"status": "timeout", "job_id": job_id, "cancelled": cancelled, "message": ""}
        )
    emulator.wait_job(job_id, "CANCELLED")
    assert calls(emulator, "Cancel") == (0 if cancelled else 1)


def test_a_resumed_task_ends_as_a_blocking_one_does(emulator: Emulator) -> None:
    task = fork(source(emulator, Script(executing_seconds=0.3, return_code=5, log=["hello"])), deferrable=True)
    context = context_of(task)
    request = deferred(task, context)
    emulator.wait_job(request.trigger.job_id, "ERROR")
    event = {"status": "ended", "job_id": request.trigger.job_id, "operation_id": request.trigger.operation_id}
    reads = calls(emulator, "ReadLogs")
    resumed = fork(task.source_job_id, deferrable=True)
    with pytest.raises(JobFailedError, match="return code 5"):
        resumed.execute_complete(context, event)
    assert context["ti"].xcoms["result"]["return_code"] == 5
    # The log was the trigger's business.
    assert calls(emulator, "ReadLogs") == reads


# Arguments as Airflow brings them -----------------------------------------------------------------------------------


def test_a_try_that_is_resumed_from_the_deferral_of_an_earlier_one_begins_anew(emulator: Emulator) -> None:
    # So does Airflow 3.0 after a deferred try that failed.
    limit = timedelta(hours=1)
    task = fork(source(emulator, Script(executing_seconds=0.3)), deferrable=True, execution_timeout=limit)
    deferred(task, context_of(task, max_tries=1))
    first = emulator.jobs(task.source_job_id)[0].id
    emulator.cancel_job(first)
    event = {"status": "timeout", "job_id": first, "cancelled": True, "try_number": 1}
    retry = fork(task.source_job_id, deferrable=True, execution_timeout=limit)
    again = context_of(retry, try_number=2, max_tries=1)
    again["ti"].start_date -= timedelta(hours=2)  # that of the earlier try
    with pytest.raises(TaskDeferred) as caught:
        retry.resume_execution("execute_complete", {"event": event}, again)
    second = caught.value.trigger.job_id
    assert 3590 < caught.value.trigger.deadline - time.time() <= 3600
    assert [job.id for job in emulator.jobs(task.source_job_id)] == [first, second]
    emulator.wait_job(second)
    event = {"status": "ended", "job_id": second, "try_number": 2}
    resumed = fork(task.source_job_id, deferrable=True)
    assert resumed.resume_execution("execute_complete", {"event": event}, again) == second


def test_every_data_argument_is_templated() -> None:
    given: dict[str, Any] = {
        "source_job_id": "{{ x }}",
        "args": {"RANGE": "{{ x }}"},
        "vars": {"DATA": "/in/{{ x }}.csv"},
        "env_vars": {"DAY": "{{ x }}"},
        "name": "run {{ x }}",
        "desc": "for {{ x }}",
        "docker": {"image": "cr.yandex/{{ x }}", "password": {"secret-id": "{{ x }}"}},
        "working_storage": {"size": "{{ x }}GB"},
        "cloud_instance_types": ["{{ x }}"],
        "datasphere_conn_id": "{{ x }}",
        "data_ttl": "{{ x }}",
        "source_data_ttl": "{{ x }}",
    }
    task = fork(**given)
    assert set(given) == set(task.template_fields)
    task.render_template_fields({"x": "200"})
    assert task.vars == {"DATA": "/in/200.csv"}
    assert task.docker == {"image": "cr.yandex/200", "password": {"secret-id": "200"}}
    assert task.cloud_instance_types == ["200"]
    assert "{{" not in repr([getattr(task, name) for name in given])


def test_default_arguments_of_the_dag_reach_the_operators() -> None:
    defaults = {"datasphere_conn_id": "ds_prod", "on_kill_action": "keep", "poll_interval": 3.0, "graceful": True}
    with DAG("defaults", schedule=None, default_args=defaults):
        first = ForkJobOperator(task_id="first", source_job_id="bt1")
        second = ForkJobOperator(task_id="second", source_job_id="bt1", on_kill_action="graceful")
        cancel = CancelJobOperator(task_id="cancel", job_id=first.output)
    assert (first.datasphere_conn_id, first.on_kill_action, first.poll_interval) == ("ds_prod", "keep", 3.0)
    assert second.on_kill_action == "graceful"
    assert (cancel.datasphere_conn_id, cancel.graceful) == ("ds_prod", True)


def test_mapping_over_arguments() -> None:
    with DAG("mapped", schedule=None):
        mapped = ForkJobOperator.partial(task_id="fork", source_job_id="bt1", deferrable=True).expand(
            args=[{"RANGE": "1"}, {"RANGE": "2"}]
        )
    task = mapped.unmap({"args": {"RANGE": "2"}})
    assert (task.args, task.source_job_id, task.deferrable) == ({"RANGE": "2"}, "bt1", True)


def test_importing_costs_no_client_and_the_default_of_deferrable_is_the_configured_one() -> None:
    code = """
import sys
from airflow_provider_datasphere.operators.jobs import ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor
import airflow_provider_datasphere.triggers.jobs
heavy = {"grpc", "yandex", "yandexcloud", "datasphere", "requests", "google.protobuf"} & set(sys.modules)
print(sorted(heavy), ForkJobOperator(task_id="a", source_job_id="b").deferrable,
      DataSphereJobSensor(task_id="a", job_id="b").deferrable)
"""
    plain = "import sys, airflow.sdk, airflow.triggers.base, airflow.sdk.bases.sensor as s; s.BaseSensorOperator"
    listing = f"{plain}; print(*(name for name in ('grpc', 'requests', 'google.protobuf') if name in sys.modules))"
    env = {**os.environ, "AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE": "True"}
    ours, airflows = (
        subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=True).stdout
        for text in (code, listing)
    )
    assert ours.strip() == f"{sorted(airflows.split())} True True"


# Cancelling ---------------------------------------------------------------------------------------------------------


def cancel(job_id: Any, **arguments: Any) -> CancelJobOperator:
    task = CancelJobOperator(task_id="cancel", job_id="{{ job_id }}", **arguments)
    task.job_id = job_id  # as templates and XComs do
    task.execute(context_of(task))
    return task


def running(emulator: Emulator, script: Script = ENDLESS, **fields: Any) -> str:
    job_id = emulator.create_scripted_job(script, execute=True, **fields)
    emulator.wait_job(job_id, "EXECUTING")
    return job_id


def test_cancelling_a_running_job(emulator: Emulator) -> None:
    job_id = running(emulator)
    cancel(job_id)
    emulator.wait_job(job_id, "CANCELLED")
    (call,) = emulator.journal.calls("Cancel")
    assert call.request == {"job_id": job_id, "reason": "Airflow: CancelJobOperator"}


def test_a_graceful_cancel_needs_a_job_that_shuts_down_by_itself(
    emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    cancel(running(emulator, graceful_shutdown=("SIGTERM", 5.0)), graceful=True)
    cancel(running(emulator), graceful=True)
    cancel(running(emulator, graceful_shutdown=("SIGTERM", None)), graceful=True)
    assert [call.request.get("graceful", False) for call in emulator.journal.calls("Cancel") if call.request] == [
        True,
        False,
        False,
    ]
    assert capsys.readouterr().out.count("no graceful-shutdown section with a timeout") == 2


@pytest.mark.parametrize("make", [list, tuple, iter])
def test_the_jobs_of_a_mapped_fork_are_all_cancelled(emulator: Emulator, make: Any) -> None:
    jobs = [running(emulator) for _ in range(3)]
    # Some of the forks were skipped, or never got that far, and one job is named twice.
    cancel(make([None, *jobs, "", "None", jobs[0]]))
    for job_id in jobs:
        emulator.wait_job(job_id, "CANCELLED")
    assert [call.request["job_id"] for call in emulator.journal.calls("Cancel") if call.request] == jobs


def test_of_several_jobs_those_that_can_be_are_cancelled(emulator: Emulator) -> None:
    jobs = [running(emulator) for _ in range(3)]
    emulator.faults.inject("Cancel", code="PERMISSION_DENIED", times=1)
    with pytest.raises(JobRequestError, match=rf"^2 of 4 jobs couldn't be cancelled .*{jobs[0]}: .*; a b: job_id is"):
        cancel([jobs[0], "a b", *jobs[1:]])
    for job_id in jobs[1:]:
        emulator.wait_job(job_id, "CANCELLED")


@pytest.mark.parametrize("job_id", ["", None, "None", [], [None, ""]])
def test_a_fork_that_never_was_needs_no_cancel(emulator: Emulator, job_id: Any) -> None:
    cancel(job_id)
    assert emulator.journal.calls() == []


@pytest.mark.parametrize("script", [Script(), Script(return_code=1), Script(error=("INTERNAL", "x"))])
def test_a_job_that_is_over_needs_no_cancel(emulator: Emulator, script: Script) -> None:
    job_id = emulator.create_scripted_job(script, execute=True)
    emulator.wait_job(job_id, None)
    cancel(job_id)
    assert calls(emulator, "Cancel") == 0


def test_an_unknown_job_needs_no_cancel(emulator: Emulator) -> None:
    cancel("bt1nosuchjob00000000")
    assert calls(emulator, "Cancel") == 0


def test_a_job_that_ends_between_look_and_call_is_a_success(emulator: Emulator) -> None:
    job_id = running(emulator)
    fault = emulator.faults.inject("Cancel", hang=True)
    with ThreadPoolExecutor() as pool:
        cancelling = pool.submit(cancel, job_id)
        deadline = time.monotonic() + 30
        while not calls(emulator, "Cancel"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        emulator.cancel_job(job_id)
        emulator.wait_job(job_id, "CANCELLED")
        emulator.faults.remove(fault)
        cancelling.result()
    (call,) = emulator.journal.calls("Cancel")
    assert call.code == "FAILED_PRECONDITION"


def test_a_cancel_that_does_not_arrive_is_sent_again(emulator: Emulator) -> None:
    job_id = running(emulator)
    emulator.faults.inject("Cancel", code="UNAVAILABLE", times=2)
    cancel(job_id)
    emulator.wait_job(job_id, "CANCELLED")


def test_a_job_that_is_being_cancelled_needs_no_cancel(emulator: Emulator) -> None:
    emulator.settings.cancelling_seconds = 30
    job_id = running(emulator)
    emulator.cancel_job(job_id)
    cancel(job_id)
    assert calls(emulator, "Cancel") == 0


def test_a_job_that_never_ran_is_taken_back_where_it_can_not_be_cancelled(emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(ENDLESS)
    emulator.faults.inject("Cancel", code="FAILED_PRECONDITION", times=1)
    cancel(job_id)
    assert emulator.jobs() == []


def test_a_refused_credential_is_an_error_that_says_so(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = running(emulator)
    extra = emulator.connection_extra(iam_token="t1.refused")
    connection = json.dumps({"conn_type": "datasphere", "extra": extra})
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", connection)
    with pytest.raises(JobRequestError, match="refuses the IAM token"):
        cancel(job_id)


def test_without_a_role_the_cancel_fails(emulator: Emulator) -> None:
    job_id = running(emulator)
    emulator.iam.set_role(emulator.service_account_id, emulator.project_id, None)
    with pytest.raises(JobRequestError, match="Developer"):
        cancel(job_id)
