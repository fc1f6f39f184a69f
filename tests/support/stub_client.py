"""A plain client of the emulator: the generated stubs over a real channel, no SDK and no provider."""

from __future__ import annotations

import contextlib
import ssl
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from yandex.cloud.datasphere.v2 import project_service_pb2_grpc
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2, project_job_service_pb2_grpc
from yandex.cloud.operation import operation_pb2, operation_service_pb2, operation_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasphere_emulator import Emulator

#: No call takes longer, unless it hangs.
DEADLINE = 20.0


class Client:
    """Calls the emulator as one account."""

    def __init__(self, emulator: Emulator, token: str | None = None) -> None:
        self.emulator = emulator
        self.token = emulator.iam_token if token is None else token
        if emulator.root_certificates is None:
            self.channel = grpc.insecure_channel(emulator.endpoint)
        else:
            credentials = grpc.ssl_channel_credentials(emulator.root_certificates.read_bytes())
            self.channel = grpc.secure_channel(emulator.endpoint, credentials)
        self.jobs = project_job_service_pb2_grpc.ProjectJobServiceStub(self.channel)
        self.operations = operation_service_pb2_grpc.OperationServiceStub(self.channel)
        self.projects = project_service_pb2_grpc.ProjectServiceStub(self.channel)

    def call(self, method: str, key: str | None = None, timeout: float = DEADLINE, **fields: Any) -> Any:
        """Call a method of ProjectJobService. :param key: idempotency key."""
        kinds = {"Cancel": "CancelProjectJobRequest", "List": "ListProjectJobRequest"}
        kinds |= {"ReadLogs": "ReadProjectJobLogsRequest", "DownloadJobFiles": "DownloadProjectJobFilesRequest"}
        kinds |= {"DeleteData": "DeleteProjectJobDataRequest", "DeleteAllData": "DeleteAllProjectJobDataRequest"}
        kinds |= {"SetDataTtl": "SetProjectJobDataTtlRequest"}
        kind = getattr(project_job_service_pb2, kinds.get(method, f"{method}ProjectJobRequest"))
        metadata = [("authorization", f"Bearer {self.token}")]
        if key:
            metadata.append(("idempotency-key", key))
        return getattr(self.jobs, method)(kind(**fields), metadata=metadata, timeout=timeout)

    def operation(self, id: str) -> operation_pb2.Operation:
        return self.operations.Get(
            operation_service_pb2.GetOperationRequest(operation_id=id),
            metadata=[("authorization", f"Bearer {self.token}")],
            timeout=DEADLINE,
        )

    def done(self, operation: operation_pb2.Operation) -> operation_pb2.Operation:
        """Poll an operation to its end."""
        deadline = time.monotonic() + DEADLINE
        while not operation.done:
            assert time.monotonic() < deadline, operation
            operation = self.operation(operation.id)
            if not operation.done:
                time.sleep(0.02)
        return operation

    def clone(
        self, source: str, key: str | None = None, **fields: Any
    ) -> project_job_service_pb2.CloneProjectJobResponse:
        operation = self.done(self.call("Clone", key, source_job_id=source, **fields))
        return unpack(operation, project_job_service_pb2.CloneProjectJobResponse())

    def fork(self, source: str, **overrides: Any) -> str:
        """Clone without uploads; returns the job id."""
        parameters = jobs_pb2.JobParameters(**overrides)
        return self.clone(source, job_parameters_overrides=parameters).job_id

    def run(self, job_id: str) -> project_job_service_pb2.ExecuteProjectJobResponse:
        """Execute a job and wait for its result."""
        operation = self.done(self.call("Execute", job_id=job_id))
        assert not operation.HasField("error"), operation.error
        return unpack(operation, project_job_service_pb2.ExecuteProjectJobResponse())

    def failed(self, operation: operation_pb2.Operation) -> tuple[int, str]:
        """Wait for an operation's error."""
        operation = self.done(operation)
        assert operation.WhichOneof("result") == "error"
        return operation.error.code, operation.error.message

    def logs(self, job_id: str, offset: int = 0) -> dict[str, bytes]:
        """The whole log by source, read to the stream's end."""
        found: dict[str, bytes] = {}
        for answer in self.call("ReadLogs", job_id=job_id, offset=offset):
            for message in answer.logs:
                found[source_of(message)] = found.get(source_of(message), b"") + message.content
        return found

    def http(self, url: str, data: bytes | None = None, method: str = "GET") -> bytes:
        """Use a presigned URL."""
        tls = None
        if self.emulator.root_certificates is not None:
            tls = ssl.create_default_context(cafile=self.emulator.root_certificates)
        request = urllib.request.Request(url, data=data, method=method)
        with urllib.request.urlopen(request, context=tls, timeout=DEADLINE) as response:
            return response.read()

    def download(self, job_id: str, *files: jobs_pb2.File) -> list[bytes]:
        """Contents of a job's files, by DownloadJobFiles."""
        answer = self.call("DownloadJobFiles", job_id=job_id, files=files)
        return [self.http(file.url) for file in answer.download_files]


def source_of(message: project_job_service_pb2.LogMessage) -> str:
    if message.HasField("file_path"):
        return message.file_path
    return {1: "stdout", 2: "stderr"}[message.standard_stream]


def unpack(operation: operation_pb2.Operation, message: Any) -> Any:
    assert operation.response.Unpack(message), operation
    return message


def metadata_of(operation: operation_pb2.Operation) -> project_job_service_pb2.ExecuteProjectJobMetadata:
    message = project_job_service_pb2.ExecuteProjectJobMetadata()
    assert operation.metadata.Unpack(message), operation
    return message


@contextlib.contextmanager
def raises_status(code: str, text: str = "") -> Iterator[None]:
    """``with raises_status("NOT_FOUND", "text"):`` a call inside ends with this status."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    error: Any = caught.value
    assert error.code() is grpc.StatusCode[code], error
    assert text in error.details(), error.details()
