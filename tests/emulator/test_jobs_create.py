"""Create, uploads, Execute: what a new job goes through, and what is refused."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from datasphere_emulator import Script
from stub_client import Client, metadata_of, raises_status, unpack

if TYPE_CHECKING:
    from datasphere_emulator import Emulator


def file(path: str, content: bytes, var: str = "", zipped: bool = False) -> jobs_pb2.File:
    kinds = jobs_pb2.FileCompressionType
    return jobs_pb2.File(
        desc=jobs_pb2.FileDesc(path=path, var=var),
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        compression_type=kinds.ZIP if zipped else kinds.NONE,
    )


def parameters(cmd: str = "true", **fields: Any) -> jobs_pb2.JobParameters:
    fields.setdefault("cloud_instance_types", [jobs_pb2.CloudInstanceType(name="c1.4")])
    return jobs_pb2.JobParameters(cmd=cmd, **fields)


def create(client: Client, job_parameters: jobs_pb2.JobParameters, key: str | None = None, **fields: Any) -> Any:
    fields.setdefault("project_id", client.emulator.project_id)
    return client.call("Create", key, job_parameters=job_parameters, **fields)


def created(client: Client, job_parameters: jobs_pb2.JobParameters, **fields: Any) -> Any:
    operation = client.done(create(client, job_parameters, **fields))
    return unpack(operation, project_job_service_pb2.CreateProjectJobResponse())


def test_new_job_from_create_to_success(client: Client, emulator: Emulator) -> None:
    inputs = [file("main.py", b"print(open('data.txt').read())"), file("data.txt", b"42")]
    response = created(client, parameters("python main.py", input_files=inputs), name="n", desc="d", config="cmd: x")
    job = client.call("Get", job_id=response.job_id)
    assert (job.name, job.desc, job.config, job.status) == ("n", "d", "cmd: x", jobs_pb2.JobStatus.CREATING)
    assert job.created_by_id == emulator.service_account_id
    assert {upload.file.desc.path for upload in response.upload_files} == {"main.py", "data.txt"}
    for upload in response.upload_files:
        content = {"main.py": b"print(open('data.txt').read())", "data.txt": b"42"}[upload.file.desc.path]
        client.http(upload.url, content, "PUT")
    result = client.run(response.job_id)
    assert result.result.return_code == 0
    job = client.call("Get", job_id=response.job_id)
    assert job.status == jobs_pb2.JobStatus.SUCCESS
    assert job.actual_cloud_instance_type.name == "c1.4"
    assert job.created_at.ToNanoseconds() <= job.started_at.ToNanoseconds() <= job.finished_at.ToNanoseconds()
    assert job.data_size_bytes >= 32
    assert client.logs(response.job_id)["stdout"] == b"42\n"
    assert emulator.executions(response.job_id) == 1


def test_execute_needs_the_uploads(client: Client) -> None:
    response = created(client, parameters(input_files=[file("a", b"1"), file("b", b"2")]))
    first, second = response.upload_files
    client.http(first.url, {"a": b"1", "b": b"2"}[first.file.desc.path], "PUT")
    with raises_status("FAILED_PRECONDITION", second.file.desc.path):
        client.call("Execute", job_id=response.job_id)


@pytest.mark.parametrize("stored", ["absent", "empty_url"])
def test_files_are_known_by_their_content(client: Client, emulator: Emulator, stored: str) -> None:
    emulator.settings.stored_uploads = stored
    emulator.create_job("true", files={"old": b"same"})
    response = created(client, parameters(input_files=[file("x", b"same"), file("y", b"new"), file("z", b"new")]))
    with_url = [upload for upload in response.upload_files if upload.url]
    assert [upload.file.desc.path for upload in with_url] in (["y"], ["z"])
    without = [upload.file.desc.path for upload in response.upload_files if not upload.url]
    assert without == ([] if stored == "absent" else ["x"])


def test_upload_order_is_a_setting(client: Client, emulator: Emulator) -> None:
    names = [str(number) for number in range(20)]

    def listed() -> list[str]:
        files = [file(name, name.encode()) for name in names]
        return [upload.file.desc.path for upload in created(client, parameters(input_files=files)).upload_files]

    assert sorted(listed()) == sorted(names)
    assert listed() != names
    emulator.settings.upload_order = "declared"
    assert listed() == names


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"cmd": " "}, "cmd"),
        ({"cmd": "echo ${X}"}, "'X'"),
        ({"cmd": "ls ${DS_PROJECT_HOME}"}, "attach_project_disk"),
        ({"input_files": [file("../a", b"")]}, "'../a'"),
        ({"input_files": [file("/a", b"")]}, "'/a'"),
        ({"output_files": [jobs_pb2.FileDesc(path="a"), jobs_pb2.FileDesc(path="a/b")]}, "overlap"),
        ({"input_files": [file("a", b"", "V")], "output_files": [jobs_pb2.FileDesc(path="b", var="V")]}, "'V'"),
        ({"arguments": [jobs_pb2.Argument(name="DS_PROJECT_HOME", value="x")]}, "reserved"),
        ({"input_files": [jobs_pb2.File(desc=jobs_pb2.FileDesc(path="a"), sha256="x")]}, "sha256"),
        ({"output_files": [jobs_pb2.FileDesc(path=str(number)) for number in range(101)]}, "100"),
        ({"cloud_instance_types": []}, "cloud_instance_types"),
        ({"extended_working_storage": jobs_pb2.ExtendedWorkingStorage(size_gb=99)}, "99"),
    ],
)
def test_wrong_parameters(client: Client, emulator: Emulator, fields: Any, text: str) -> None:
    with raises_status("INVALID_ARGUMENT", text):
        create(client, parameters(**fields))
    assert emulator.jobs() == []


def test_files_have_limits(client: Client) -> None:
    huge = jobs_pb2.File(desc=jobs_pb2.FileDesc(path="a"), sha256="0" * 64, size_bytes=(5 << 30) + 1)
    with raises_status("INVALID_ARGUMENT", "size_bytes"):
        create(client, parameters(input_files=[huge]))
    large = [
        jobs_pb2.File(desc=jobs_pb2.FileDesc(path=str(number)), sha256=f"{number}" * 64, size_bytes=5 << 30)
        for number in range(3)
    ]
    with raises_status("INVALID_ARGUMENT", "together"):
        create(client, parameters(input_files=large))


def test_limits_of_the_community(client: Client, emulator: Emulator) -> None:
    emulator.settings.update({"allowed_instance_types": ["c1.4"], "max_name_length": 5, "max_desc_length": 6})
    with raises_status("INVALID_ARGUMENT", "Instance types g2.8 are not available for your community"):
        create(client, parameters(cloud_instance_types=[jobs_pb2.CloudInstanceType(name="g2.8")]))
    with raises_status("INVALID_ARGUMENT", "name"):
        create(client, parameters(), name="123456")
    with raises_status("INVALID_ARGUMENT", "desc"):
        create(client, parameters(), desc="1234567")
    created(client, parameters(), name="12345", desc="123456")


def test_names_may_be_unique(client: Client, emulator: Emulator) -> None:
    created(client, parameters(), name="same")
    created(client, parameters(), name="same")
    emulator.settings.unique_names = True
    with raises_status("ALREADY_EXISTS", "same"):
        create(client, parameters(), name="same")
    created(client, parameters(), name="")
    created(client, parameters(), name="")


def test_unknown_project(client: Client) -> None:
    with raises_status("NOT_FOUND", "nowhere"):
        create(client, parameters(), project_id="nowhere")


@pytest.mark.parametrize("method", ["Get", "Execute", "Cancel", "Delete", "DeleteData", "SetDataTtl", "ReadLogs"])
def test_unknown_job(client: Client, method: str) -> None:
    with raises_status("NOT_FOUND", "bt1nothing"):
        list(client.call(method, job_id="bt1nothing")) if method == "ReadLogs" else client.call(
            method, job_id="bt1nothing"
        )


def test_deprecated_log_rpc_is_unimplemented(client: Client) -> None:
    with raises_status("UNIMPLEMENTED"):
        request = project_job_service_pb2.ReadProjectJobStdLogsRequest(job_id="x")
        list(client.jobs.ReadStdLogs(request, metadata=[("authorization", f"Bearer {client.token}")], timeout=20))


# Idempotency


def test_same_key_same_operation(client: Client, emulator: Emulator) -> None:
    first = create(client, parameters(), "k1")
    assert create(client, parameters(), "k1").id == first.id
    assert create(client, parameters(), "k2").id != first.id
    assert create(client, parameters()).id != create(client, parameters()).id
    assert len(emulator.jobs()) == 4
    source = emulator.create_scripted_job(Script(never_ends=True))
    clone = client.call("Clone", "k1", source_job_id=source)
    assert client.call("Clone", "k1", source_job_id=source).id == clone.id
    assert len(emulator.jobs(parent=source)) == 1
    execution = client.call("Execute", "e", job_id=source)
    assert client.call("Execute", "e", job_id=source).id == execution.id
    assert emulator.executions(source) == 1


def test_another_account_has_other_keys(client: Client, emulator: Emulator) -> None:
    other = emulator.iam.add_service_account("other")
    emulator.iam.set_role(other, emulator.project_id, "developer")
    mine = create(client, parameters(), "k")
    theirs = create(Client(emulator, emulator.iam.issue_token(other)), parameters(), "k")
    assert mine.id != theirs.id


def test_keys_may_be_ignored(client: Client, emulator: Emulator) -> None:
    emulator.settings.idempotency = False
    assert create(client, parameters(), "k").id != create(client, parameters(), "k").id
    assert len(emulator.jobs()) == 2


# Operations of a creation


def test_slow_creation(client: Client, emulator: Emulator) -> None:
    emulator.settings.clone_seconds = 0.5
    begin = time.monotonic()
    operation = create(client, parameters())
    assert not operation.done
    metadata = project_job_service_pb2.CreateProjectJobMetadata()
    assert operation.metadata.Unpack(metadata)
    assert client.call("Get", job_id=metadata.job_id).status == jobs_pb2.JobStatus.CREATING
    with raises_status("FAILED_PRECONDITION", "being created"):
        client.call("Execute", job_id=metadata.job_id)
    assert client.done(operation).HasField("response")
    assert time.monotonic() - begin >= 0.5
    client.run(metadata.job_id)


def test_creation_hands_out_its_urls_again(client: Client, emulator: Emulator) -> None:
    operation = create(client, parameters(input_files=[file("a", b"1")]))

    def urls() -> list[str]:
        response = unpack(client.operation(operation.id), project_job_service_pb2.CreateProjectJobResponse())
        return [upload.url for upload in response.upload_files]

    (url,) = urls()
    assert urls() == [url]
    emulator.settings.fresh_operation_urls = True
    time.sleep(0.01)
    (fresh,) = urls()
    assert fresh != url
    client.http(fresh, b"1", "PUT")
    assert urls() == []


def test_execution_metadata(client: Client, emulator: Emulator) -> None:
    script = Script(executing_seconds=30)
    source = emulator.create_scripted_job(script, name="name", desc="what")
    fork = client.fork(source)
    operation = client.call("Execute", job_id=fork)
    emulator.wait_job(fork, "EXECUTING")
    metadata = metadata_of(client.operation(operation.id))
    assert metadata.job.id == metadata.metadata.id == fork
    assert (metadata.metadata.name, metadata.metadata.description) == ("name", "what")
    assert metadata.metadata.status == jobs_pb2.JobStatus.EXECUTING
    assert metadata.metadata.project_id == emulator.project_id
    assert metadata.metadata.parent_job_id == source
    assert metadata.metadata.HasField("started_at")
    assert not metadata.HasField("progress")
