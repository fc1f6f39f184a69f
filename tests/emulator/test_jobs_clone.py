"""Clone: what overrides change, what they can't, and what a fork inherits."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Script
from stub_client import raises_status

if TYPE_CHECKING:
    from datasphere_emulator import Emulator
    from stub_client import Client

Arguments = jobs_pb2.Argument


def make_source(emulator: Emulator, **fields: Any) -> str:
    return emulator.create_job(
        "echo ${A} ${B} > ${OUT}; cat ${IN} >> ${OUT}; echo $E1$E2 >> ${OUT}",
        files={"in.txt": "old\n"},
        inputs=[("in.txt", "IN")],
        outputs=[("out.txt", "OUT")],
        args={"A": "1", "B": "2"},
        env_vars={"E1": "x", "E2": "y"},
        name="source",
        desc="about",
        **fields,
    )


def output_of(client: Client, job_id: str) -> str:
    result = client.run(job_id)
    return client.http(result.output_files[0].url).decode()


def test_plain_fork_is_the_source_again(client: Client, emulator: Emulator) -> None:
    source = make_source(emulator)
    response = client.clone(source)
    assert list(response.upload_files) == []
    job = client.call("Get", job_id=response.job_id)
    assert (job.parent_job_id, job.name, job.desc) == (source, "source", "about")
    assert job.status == jobs_pb2.JobStatus.CREATING
    assert output_of(client, job.id) == "1 2\nold\nxy\n"
    assert emulator.executions(source) == 0


def test_overridden_values_reach_the_program(client: Client, emulator: Emulator) -> None:
    source = make_source(emulator)
    content = b"new\n"
    override = jobs_pb2.JobParameters(
        arguments=[Arguments(name="B", value="20")],
        input_files=[
            jobs_pb2.File(
                desc=jobs_pb2.FileDesc(path="/home/me/other.txt", var="IN"),
                sha256=hashlib.sha256(content).hexdigest(),
                size_bytes=len(content),
            )
        ],
        output_files=[jobs_pb2.FileDesc(path="renamed.txt", var="OUT")],
        cloud_instance_types=[jobs_pb2.CloudInstanceType(name="g1.1"), jobs_pb2.CloudInstanceType(name="c1.4")],
        extended_working_storage=jobs_pb2.ExtendedWorkingStorage(size_gb=200),
        env=jobs_pb2.Environment(vars={"E1": "z"}, docker_image_resource_id="image"),
    )
    response = client.clone(source, job_parameters_overrides=override, name="fork", desc="mine")
    (upload,) = response.upload_files
    client.http(upload.url, content, "PUT")
    assert output_of(client, response.job_id) == "1 20\nnew\nz\n"
    job = client.call("Get", job_id=response.job_id)
    assert (job.name, job.desc) == ("fork", "mine")
    assert [file.desc.path for file in job.output_files] == ["renamed.txt"]
    assert job.actual_cloud_instance_type.name == "g1.1"
    assert job.job_parameters.extended_working_storage.size_gb == 200
    assert job.job_parameters.env.docker_image_resource_id == "image"
    # The source stays as it was, and a fork can be forked.
    assert client.call("Get", job_id=source).job_parameters.arguments[1].value == "2"
    grandchild = client.fork(response.job_id)
    assert output_of(client, grandchild) == "1 20\nnew\nz\n"
    assert emulator.job(grandchild).parent_job_id == response.job_id


@pytest.mark.parametrize(("rule", "printed"), [("replace", "z"), ("merge", "zy")])
def test_environment_is_replaced_or_merged(client: Client, emulator: Emulator, rule: str, printed: str) -> None:
    emulator.settings.clone_env_vars = rule
    fork = client.fork(make_source(emulator), env=jobs_pb2.Environment(vars={"E1": "z"}))
    assert output_of(client, fork).splitlines()[-1] == printed


def test_output_may_be_a_path_of_the_clients_machine(client: Client, emulator: Emulator) -> None:
    source = make_source(emulator)
    fork = client.fork(source, output_files=[jobs_pb2.FileDesc(path="/home/me/result", var="OUT")])
    assert output_of(client, fork).startswith("1 2\n")
    assert [file.desc.path for file in emulator.job(fork).output_files] == ["/home/me/result"]


def test_empty_name_may_stay_empty(client: Client, emulator: Emulator) -> None:
    emulator.settings.update({"clone_empty_name": "empty", "clone_empty_desc": "empty"})
    job = emulator.job(client.fork(make_source(emulator)))
    assert (job.name, job.desc) == ("", "")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            {"arguments": [Arguments(name="C", value="1")]},
            "Argument 'C' is not present in the source job. It has: A, B",
        ),
        ({"input_files": [jobs_pb2.File(desc=jobs_pb2.FileDesc(path="x", var="OUT"))]}, "Input variable 'OUT'"),
        ({"input_files": [jobs_pb2.File(desc=jobs_pb2.FileDesc(path="in.txt"))]}, "Input variable ''"),
        ({"output_files": [jobs_pb2.FileDesc(path="x", var="IN")]}, "Output variable 'IN'"),
        ({"cmd": "rm"}, "cmd"),
        ({"s3_mount_ids": ["x"]}, "s3_mount_ids"),
        ({"graceful_shutdown_parameters": jobs_pb2.GracefulShutdownParameters(signal=2)}, "graceful_shutdown"),
        ({"env": jobs_pb2.Environment(python_env=jobs_pb2.PythonEnv(python_version="3.10"))}, "python_env"),
        ({"extended_working_storage": jobs_pb2.ExtendedWorkingStorage(size_gb=1)}, "size_gb"),
    ],
)
def test_wrong_overrides(client: Client, emulator: Emulator, overrides: Any, text: str) -> None:
    source = make_source(emulator)
    with raises_status("INVALID_ARGUMENT", text):
        client.fork(source, **overrides)
    assert emulator.jobs(parent=source) == []


def test_unknown_source(client: Client) -> None:
    with raises_status("NOT_FOUND", "bt1nothing"):
        client.fork("bt1nothing")
    with raises_status("INVALID_ARGUMENT", "source_job_id"):
        client.fork("")


def test_cleared_source(client: Client, emulator: Emulator) -> None:
    source = make_source(emulator)
    emulator.clear_data(source)
    with raises_status("FAILED_PRECONDITION", "cleared"):
        client.fork(source)


def test_running_source(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(preparing_seconds=60), execute=True)
    fork = client.fork(source)
    assert emulator.job(fork).parent_job_id == source
    emulator.settings.clone_requires_started_source = True
    with raises_status("FAILED_PRECONDITION", "PREPARING"):
        client.fork(source)


def test_data_ttl_is_never_inherited(client: Client, emulator: Emulator) -> None:
    source = make_source(emulator, data_ttl=None)
    assert not emulator.job(source).HasField("data_expires_at")

    def lifetime(**fields: Any) -> float | None:
        job = emulator.job(client.clone(source, **fields).job_id)
        if not job.HasField("data_expires_at"):
            return None
        return job.data_expires_at.ToSeconds() - job.created_at.ToSeconds()

    assert lifetime() == pytest.approx(14 * 86400, abs=1)
    assert lifetime(data_ttl=Duration(seconds=86400)) == pytest.approx(86400, abs=1)
    emulator.settings.unset_data_ttl = "infinite"
    assert lifetime() is None
    with raises_status("INVALID_ARGUMENT", "data_ttl"):
        lifetime(data_ttl=Duration(seconds=0))


def test_slow_clone_has_the_job_id_at_once(client: Client, emulator: Emulator) -> None:
    emulator.settings.clone_seconds = 0.3
    source = make_source(emulator)
    operation = client.call("Clone", source_job_id=source)
    (child,) = emulator.jobs(parent=source)
    assert not operation.done
    assert child.id.encode() in operation.metadata.value
    assert client.done(operation).HasField("response")


def test_a_new_job_may_stay_out_of_sight_until_its_clone_is_done(client: Client, emulator: Emulator) -> None:
    emulator.settings.update({"clone_seconds": 0.6, "new_jobs_visible": "when_done"})
    source = make_source(emulator)
    operation = client.call("Clone", source_job_id=source)
    (child,) = emulator.jobs(parent=source)
    for method in ("Get", "Execute", "Cancel", "Delete", "SetDataTtl"):
        with raises_status("NOT_FOUND", child.id):
            client.call(method, job_id=child.id)
    with raises_status("NOT_FOUND", child.id):
        client.call("Clone", source_job_id=child.id)
    with raises_status("NOT_FOUND", child.id):
        list(client.call("ReadLogs", job_id=child.id))
    listed = client.call("List", project_id=emulator.project_id).jobs
    assert [job.id for job in listed] == [source]

    assert client.done(operation).HasField("response")
    assert client.call("Get", job_id=child.id).id == child.id
    listed = client.call("List", project_id=emulator.project_id).jobs
    assert {job.id for job in listed} == {source, child.id}
    assert client.run(child.id).result.return_code == 0


def test_a_new_job_is_seen_at_once_otherwise(client: Client, emulator: Emulator) -> None:
    emulator.settings.clone_seconds = 60
    client.call("Clone", source_job_id=make_source(emulator))
    (child,) = emulator.jobs(parent=emulator.jobs()[0].id)
    assert client.call("Get", job_id=child.id).id == child.id


def test_each_execution_uses_the_next_script(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job([Script(return_code=1), Script(return_code=2), Script()])
    child = client.fork(source)
    grandchild = client.fork(child)
    codes = [client.run(job_id).result.return_code for job_id in (child, grandchild, client.fork(source))]
    assert codes == [1, 2, 0]
    assert client.run(client.fork(source)).result.return_code == 0
