"""Roles, quota, repeated Execute, cancel, lists, downloads, and the end of data and jobs."""

from __future__ import annotations

import base64
import itertools
import time
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from yandex.cloud.datasphere.v2 import project_service_pb2
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.operation import operation_service_pb2

from datasphere_emulator import Script
from stub_client import Client, metadata_of, raises_status
from waits import wait_until

if TYPE_CHECKING:
    from datasphere_emulator import Emulator

Status = jobs_pb2.JobStatus


def member(emulator: Emulator, role: str | None) -> Client:
    account = emulator.iam.add_service_account("somebody")
    if role is not None:
        emulator.iam.set_role(account, emulator.project_id, role)
    return Client(emulator, emulator.iam.issue_token(account))


# Roles


def test_viewer_sees_and_changes_nothing(emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(log=["x"]), outputs=["o"], execute=True)
    job = emulator.wait_job(source)
    viewer = member(emulator, "viewer")
    assert viewer.call("Get", job_id=source).id == source
    assert viewer.logs(source)["stdout"] == b"x\n"
    assert len(viewer.call("List", project_id=emulator.project_id).jobs) == 1
    assert len(viewer.download(source, *job.output_files)) == 1
    assert viewer.operation(emulator.operation_of(source)).done
    for method in ("Execute", "Cancel", "Delete", "DeleteData", "SetDataTtl"):
        with raises_status("PERMISSION_DENIED", "developer"):
            viewer.call(method, job_id=source)
    with raises_status("PERMISSION_DENIED"):
        viewer.fork(source)
    with raises_status("PERMISSION_DENIED"):
        viewer.call("DeleteAllData", project_id=emulator.project_id)


def test_role_of_readers_is_a_setting(emulator: Emulator) -> None:
    emulator.settings.read_role = "developer"
    job_id = emulator.create_scripted_job(Script(), execute=True)
    viewer, developer = member(emulator, "viewer"), member(emulator, "developer")
    for method in ("Get", "ReadLogs"):
        with raises_status("PERMISSION_DENIED", "developer"):
            list(viewer.call(method, job_id=job_id)) if method == "ReadLogs" else viewer.call(method, job_id=job_id)
    with raises_status("PERMISSION_DENIED"):
        viewer.operation(emulator.operation_of(job_id))
    assert developer.call("Get", job_id=job_id).id == job_id


def test_strangers_see_nothing(emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(), execute=True)
    emulator.wait_job(source)
    stranger = member(emulator, None)
    for method in ("Get", "Execute", "Cancel"):
        with raises_status("PERMISSION_DENIED"):
            stranger.call(method, job_id=source)
    with raises_status("PERMISSION_DENIED"):
        stranger.logs(source)
    with raises_status("PERMISSION_DENIED"):
        stranger.operation(emulator.operation_of(source))
    with raises_status("PERMISSION_DENIED"):
        stranger.call("List", project_id=emulator.project_id)
    with raises_status("UNAUTHENTICATED"):
        Client(emulator, "t1.wrong").call("Get", job_id=source)


def test_projects(client: Client, emulator: Emulator) -> None:
    metadata = [("authorization", f"Bearer {client.token}")]
    project = client.projects.Get(
        project_service_pb2.GetProjectRequest(project_id=emulator.project_id), metadata=metadata
    )
    assert project.community_id == emulator.community_id
    other = emulator.add_project("other")
    request = project_service_pb2.ListProjectsRequest(community_id=emulator.community_id)
    assert [item.id for item in client.projects.List(request, metadata=metadata).projects] == [emulator.project_id]
    emulator.iam.set_role(emulator.service_account_id, other, "viewer")
    found = {item.id for item in client.projects.List(request, metadata=metadata).projects}
    assert found == {emulator.project_id, other}
    balance = client.projects.GetUnitBalance(
        project_service_pb2.GetUnitBalanceRequest(project_id=other), metadata=metadata
    )
    assert not balance.HasField("unit_balance")
    emulator.create_job("true", project_id=other)
    assert len(client.call("List", project_id=other).jobs) == 1
    assert list(client.call("List", project_id=emulator.project_id).jobs) == []


# Execute


def test_execute_on_a_running_job_answers_its_operation(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(never_ends=True))
    first = client.call("Execute", job_id=job_id)
    assert client.call("Execute", job_id=job_id).id == first.id
    assert emulator.executions(job_id) == 1


@pytest.mark.parametrize("rule", ["same_operation", "failed_precondition"])
def test_execute_on_an_ended_job(client: Client, emulator: Emulator, rule: str) -> None:
    emulator.settings.execute_finished = rule
    job_id = emulator.create_scripted_job(Script())
    first = client.done(client.call("Execute", job_id=job_id))
    if rule == "same_operation":
        assert client.call("Execute", job_id=job_id) == first
    else:
        with raises_status("FAILED_PRECONDITION", "SUCCESS"):
            client.call("Execute", job_id=job_id)
    assert emulator.executions(job_id) == 1


def test_quota_of_running_jobs(client: Client, emulator: Emulator) -> None:
    emulator.settings.max_running_jobs = 2
    source = emulator.create_scripted_job(Script(never_ends=True))
    running = [client.fork(source) for _ in range(2)]
    for job_id in running:
        client.call("Execute", job_id=job_id)
    third = client.fork(source)
    with raises_status("RESOURCE_EXHAUSTED", "2 of 2"):
        client.call("Execute", job_id=third)
    assert emulator.job(third).status == Status.CREATING
    emulator.cancel_job(running[0])
    emulator.wait_job(running[0], "CANCELLED")
    client.call("Execute", job_id=third)
    assert emulator.executions(third) == 1


def test_statuses_in_their_order(client: Client, emulator: Emulator) -> None:
    script = Script(preparing_seconds=0.15, executing_seconds=0.15, uploading_seconds=0.15)
    job_id = emulator.create_scripted_job(script)
    assert emulator.job(job_id).status == Status.CREATING
    operation = client.call("Execute", job_id=job_id)
    seen = [metadata_of(operation).metadata.status]
    while not operation.done:
        time.sleep(0.02)
        operation = client.operation(operation.id)
        seen.append(metadata_of(operation).metadata.status)
    expected = [Status.PREPARING, Status.EXECUTING, Status.UPLOADING_OUTPUT, Status.SUCCESS]
    assert list(dict.fromkeys(seen)) == expected


@pytest.mark.parametrize(("rule", "status"), [("ERROR", Status.ERROR), ("SUCCESS", Status.SUCCESS)])
def test_return_code_is_a_result_not_an_error(client: Client, emulator: Emulator, rule: str, status: int) -> None:
    emulator.settings.status_after_nonzero_exit = rule
    job_id = emulator.create_job("exit 3")
    assert client.run(job_id).result.return_code == 3
    assert emulator.job(job_id).status == status
    assert "3" in emulator.job(job_id).status_details


# Cancel


def test_cancel(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(never_ends=True))
    emulator.settings.cancelling_seconds = 0.3
    operation = client.call("Execute", job_id=job_id)
    client.call("Cancel", job_id=job_id, reason="too expensive")
    assert client.call("Get", job_id=job_id).status == Status.CANCELLING
    assert not client.operation(operation.id).done
    assert client.failed(operation) == (1, "Job was cancelled. Reason: too expensive")
    job = emulator.job(job_id)
    assert (job.status, job.HasField("finished_at")) == (Status.CANCELLED, True)


def test_code_of_a_cancelled_operation_is_a_setting(client: Client, emulator: Emulator) -> None:
    emulator.settings.cancelled_operation_code = "ABORTED"
    job_id = emulator.create_scripted_job(Script(preparing_seconds=60))
    operation = client.call("Execute", job_id=job_id)
    emulator.cancel_job(job_id)
    assert client.failed(operation)[0] == 10


def test_cancel_of_an_ended_job(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(), execute=True)
    emulator.wait_job(job_id)
    with raises_status("FAILED_PRECONDITION", "SUCCESS"):
        client.call("Cancel", job_id=job_id)
    emulator.settings.cancel_finished = "ok"
    client.call("Cancel", job_id=job_id)
    assert emulator.job(job_id).status == Status.SUCCESS


def test_cancel_before_execute(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script())
    client.call("Cancel", job_id=job_id)
    assert emulator.job(job_id).status == Status.CANCELLED
    with raises_status("FAILED_PRECONDITION", "CANCELLED"):
        client.call("Execute", job_id=job_id)
    assert client.logs(job_id) == {}


def test_operations_can_be_cancelled_too(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(never_ends=True))
    operation = client.call("Execute", job_id=job_id)
    request = operation_service_pb2.CancelOperationRequest(operation_id=operation.id)
    client.operations.Cancel(request, metadata=[("authorization", f"Bearer {client.token}")])
    assert client.failed(operation)[0] == 1


def test_scripted_job_may_take_its_time_to_shut_down(client: Client, emulator: Emulator) -> None:
    script = Script(never_ends=True, graceful_seconds=0.3)
    job_id = emulator.create_scripted_job(script, graceful_shutdown=("SIGTERM", 60), execute=True)
    begin = time.monotonic()
    client.call("Cancel", job_id=job_id, graceful=True)
    emulator.wait_job(job_id, "CANCELLED")
    assert time.monotonic() - begin >= 0.3


def test_second_cancel_ends_the_patience(client: Client, emulator: Emulator) -> None:
    script = Script(never_ends=True, graceful_seconds=None)
    job_id = emulator.create_scripted_job(script, graceful_shutdown=("SIGTERM", None), execute=True)
    client.call("Cancel", job_id=job_id, graceful=True)
    time.sleep(0.3)
    assert emulator.job(job_id).status == Status.CANCELLING
    client.call("Cancel", job_id=job_id)
    emulator.wait_job(job_id, "CANCELLED")


# Operations


def test_forgotten_operation(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(executing_seconds=0.3))
    operation = client.call("Execute", job_id=job_id)
    emulator.forget_operation(operation.id)
    with raises_status("NOT_FOUND", operation.id):
        client.operation(operation.id)
    emulator.wait_job(job_id, "SUCCESS")
    assert emulator.operation(operation.id).done


def test_retention_of_operations(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script())
    operation = client.done(client.call("Execute", job_id=job_id))
    emulator.settings.operation_retention_seconds = 3600.0
    client.operation(operation.id)
    emulator.settings.operation_retention_seconds = 0.0
    time.sleep(0.01)
    with raises_status("NOT_FOUND", operation.id):
        client.operation(operation.id)


# List


def pages(client: Client, **fields: Any) -> list[list[str]]:
    found, token = [], ""
    while True:
        answer = client.call("List", project_id=client.emulator.project_id, page_token=token, **fields)
        found.append([job.id for job in answer.jobs])
        token = answer.next_page_token
        if not token:
            return found


def listed(client: Client, **fields: Any) -> list[str]:
    return list(itertools.chain(*pages(client, **fields)))


def test_pages_and_orders(client: Client, emulator: Emulator) -> None:
    made = [emulator.create_job("true") for _ in range(5)]
    assert pages(client, page_size=2) == [made[4:2:-1], made[2:0:-1], made[:1]]
    assert pages(client, page_size=5) == [made[::-1]]
    assert pages(client) == [made[::-1]]
    emulator.settings.list_order = "oldest"
    assert pages(client, page_size=3) == [made[:3], made[3:]]
    emulator.settings.update({"list_order": "shuffled", "seed": 3})
    shuffled = listed(client, page_size=2)
    assert sorted(shuffled) == sorted(made)
    assert shuffled == listed(client, page_size=3)


def test_new_jobs_do_not_shift_pages(client: Client, emulator: Emulator) -> None:
    made = [emulator.create_job("true") for _ in range(4)]
    first = client.call("List", project_id=emulator.project_id, page_size=2)
    emulator.create_job("true")
    emulator.delete_job(made[3])
    second = client.call("List", project_id=emulator.project_id, page_size=2, page_token=first.next_page_token)
    assert [job.id for job in second.jobs] == made[1::-1]


def test_filter(client: Client, emulator: Emulator) -> None:
    created = emulator.create_job("true")
    running = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    emulator.wait_job(running, "EXECUTING")
    ended = emulator.create_scripted_job(Script(), execute=True)
    emulator.wait_job(ended)

    def found(text: str) -> set[str]:
        return set(listed(client, filter=text))

    assert found("status IN (EXECUTING, UPLOADING_OUTPUT)") == {running}
    assert found("status in (SUCCESS,CREATING)") == {ended, created}
    assert found('status IN ("SUCCESS")') == {ended}
    assert found("") == {created, running, ended}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"filter": "name IN (x)"}, "name"),
        ({"filter": "status = SUCCESS"}, "IN"),
        ({"filter": "status IN SUCCESS"}, "parentheses"),
        ({"filter": "status IN (DONE)"}, "'DONE'"),
        ({"filter": "status IN (" + "SUCCESS," * 200 + "ERROR)"}, "1000"),
        ({"filter": "status IN (SUCCESS) AND name IN (x)"}, "filter"),
        ({"page_size": 1001}, "page_size"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"page_token": base64.urlsafe_b64encode(b"before:1").decode()}, "page_token"),
    ],
)
def test_wrong_lists(client: Client, fields: Any, text: str) -> None:
    with raises_status("INVALID_ARGUMENT", text):
        client.call("List", project_id=client.emulator.project_id, **fields)


# Files


def test_download(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(outputs={"o": "text"}, log=["x"]), outputs=["o"], execute=True)
    job = emulator.wait_job(job_id)
    assert client.download(job_id, *job.output_files, *job.log_files) == [b"text", b"x\n"]
    with raises_status("INVALID_ARGUMENT", "files"):
        client.download(job_id)
    with raises_status("NOT_FOUND", "'p'"):
        client.download(job_id, jobs_pb2.File(desc=jobs_pb2.FileDesc(path="p"), sha256=job.output_files[0].sha256))


# Life of data


def test_data_expire(client: Client, emulator: Emulator) -> None:
    script = Script(log=["x"])
    job_id = emulator.create_scripted_job(script, outputs=["o"], files={"in": "1"}, execute=True)
    job = emulator.wait_job(job_id)
    client.call("SetDataTtl", job_id=job_id, ttl=Duration(nanos=200_000_000))
    wait_until(lambda: client.call("Get", job_id=job_id).data_cleared)
    expired = client.call("Get", job_id=job_id)
    assert (expired.status, expired.data_size_bytes) == (Status.SUCCESS, 0)
    with raises_status("FAILED_PRECONDITION", "cleared"):
        client.download(job_id, *job.output_files)
    with raises_status("FAILED_PRECONDITION", "cleared"):
        client.logs(job_id)
    with raises_status("FAILED_PRECONDITION", "cleared"):
        client.fork(job_id)
    with raises_status("FAILED_PRECONDITION", "cleared"):
        client.call("SetDataTtl", job_id=job_id)


def test_ttl_without_end(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("true", data_ttl=86400)
    client.call("SetDataTtl", job_id=job_id, ttl=Duration(seconds=3600))
    expires = emulator.job(job_id).data_expires_at.ToSeconds()
    assert expires == pytest.approx(time.time() + 3600, abs=5)
    client.call("SetDataTtl", job_id=job_id)
    assert not client.call("Get", job_id=job_id).HasField("data_expires_at")


def test_cleared_files_stay_for_other_jobs(client: Client, emulator: Emulator) -> None:
    source = emulator.create_job("cat in", files={"in": "1"})
    fork = client.fork(source)
    assert client.done(client.call("DeleteData", job_id=source)).HasField("response")
    assert client.call("Get", job_id=source).data_cleared
    client.run(fork)
    assert client.logs(fork)["stdout"] == b"1"
    client.done(client.call("DeleteData", job_id=fork))
    job = client.call("Get", job_id=fork)
    with raises_status("FAILED_PRECONDITION"):
        client.download(fork, *job.log_files)


def test_data_of_all_jobs(client: Client, emulator: Emulator) -> None:
    idle = [emulator.create_job("true", files={"f": str(number)}) for number in range(3)]
    running = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    client.done(client.call("DeleteAllData", project_id=emulator.project_id))
    assert [emulator.job(job_id).data_cleared for job_id in (*idle, running)] == [True, True, True, False]


def test_delete(client: Client, emulator: Emulator) -> None:
    running = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    for method in ("Delete", "DeleteData"):
        with raises_status("FAILED_PRECONDITION", "cancel it first"):
            client.call(method, job_id=running)
    fork = client.fork(running)
    operation = client.done(client.call("Delete", job_id=fork))
    assert operation.HasField("response")
    with raises_status("NOT_FOUND", fork):
        client.call("Get", job_id=fork)
    assert emulator.jobs(parent=running) == []
