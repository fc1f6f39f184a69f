"""The official ``datasphere`` SDK on this package's channels and tokens, without the SDK's side effects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc

from airflow_provider_datasphere.client.errors import JobLostError, JobRequestError
from airflow_provider_datasphere.client.settings import job_url
from airflow_provider_datasphere.client.waiting import DENIED, DENIED_WINDOW, READ_DEADLINE, TRANSIENT

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.channels import Channels
    from airflow_provider_datasphere.client.transport import Service

INSTALL_LINE = "pip install --no-deps 'datasphere>=0.10' 'envzy>=0.3' && pip install pypi-simple tabulate pyyaml pytz"

#: Pause between two looks at an operation, seconds.
POLL_SECONDS = 2.0
#: Deadline of a call for which the SDK sets none, seconds.
CALL_SECONDS = 60.0


def make_sdk(channels: Channels) -> Any:
    """A ``datasphere.SDK``.

    ``SDK()`` itself would set up logging for the whole process (which closes every handler there is, also the one that
    writes a task's log) and make a folder of log files; and its token would be shared by all connections.

    :raises JobRequestError: the package isn't installed, or is too old.
    """
    try:
        from datasphere.client import Client, OperationError
        from datasphere.sdk import SDK
    except ImportError as error:
        raise JobRequestError(
            f"get_sdk() needs the package datasphere 0.10 or newer ({error}). It works beside this Airflow, though "
            f"what it asks for can't be met: {INSTALL_LINE} (docs/sdk.md). get_conn() needs no such package and has "
            "the same methods."
        ) from None

    from yandex.cloud.datasphere.v2.jobs.project_job_service_pb2 import ExecuteProjectJobMetadata
    from yandex.cloud.operation.operation_service_pb2 import GetOperationRequest

    class ConnectionClient(Client):  # type: ignore[misc]
        """The SDK's client; what it does beyond the connection is unchanged."""

        def __init__(self) -> None:
            self.oauth_token = None
            self.yc_profile = None
            self.stub = _Stub(channels, "jobs")
            self.prj_stub = _Stub(channels, "projects")
            self.op_stub = _Stub(channels, "operations")
            self._progress: bytes | None = None

        @property
        def md(self) -> list[tuple[str, str]]:
            """Nothing: the channels add what a call carries."""
            return []

        def _get_job_link(self, job: Any) -> str:
            try:
                community_id = self.get_project(job.project_id).community_id
            except grpc.RpcError:
                community_id = None
            return job_url(channels.settings.ui_endpoint, community_id, job.project_id, job.id)

        def _write_progress_to_file(self, op: Any) -> None:
            # The SDK repeats it with every poll: its file of progress is this process's log here.
            metadata = ExecuteProjectJobMetadata()
            if op.metadata.Unpack(metadata) and metadata.progress.SerializeToString() != self._progress:
                self._progress = metadata.progress.SerializeToString()
                super()._write_progress_to_file(op)

        def _poll_operation(self, op: Any, call_which_created_op: Any, *_: Any) -> Any:
            refused_since: float | None = None
            while True:
                self._write_progress_to_file(op)
                if op.done:
                    if op.HasField("error"):
                        raise OperationError(op, call_which_created_op)
                    return op
                time.sleep(POLL_SECONDS)
                try:
                    request = GetOperationRequest(operation_id=op.id)
                    op = channels.unary("operations", "Get", request, timeout=READ_DEADLINE)
                    refused_since = None
                except grpc.RpcError as error:
                    code = error.code().name
                    refused_since = (refused_since or time.monotonic()) if code in DENIED else None
                    window_over = refused_since is not None and time.monotonic() - refused_since > DENIED_WINDOW
                    if window_over or code not in TRANSIENT | DENIED:
                        raise JobLostError(
                            f"Operation {op.id} is out of sight ({code}: {error.details() or 'no details'}). Its job "
                            "may go on running and costing money: look at the project's jobs, and cancel it there. "
                            "Check that the connection's account is a Developer of the project."
                        ) from error

    sdk = SDK.__new__(SDK)
    sdk.logs_file_path = None
    sdk.client = ConnectionClient()
    return sdk


class _Stub:
    """What the SDK takes for a generated stub: each call gets this connection's token and a deadline."""

    def __init__(self, channels: Channels, service: Service) -> None:
        self._channels = channels
        self._service = service

    def __getattr__(self, method: str) -> _Method:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self._channels, self._service, method)


class _Method:
    def __init__(self, channels: Channels, service: Service, method: str) -> None:
        self._channels = channels
        self._service = service
        self._method = method

    def __call__(self, request: Any, metadata: Any = (), timeout: float | None = None) -> Any:
        if self._method.startswith("Read"):
            return self._channels.stream(self._service, self._method, request, timeout=timeout)
        return self._channels.unary(self._service, self._method, request, timeout=timeout or CALL_SECONDS)

    def with_call(self, request: Any, metadata: Any = (), timeout: float | None = None) -> tuple[Any, _Answered]:
        """The response and its call, of which the SDK only keeps hold."""
        return self(request, metadata, timeout), _Answered()


class _Answered:
    """A call that was answered."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    def details(self) -> str:
        return ""


__all__ = ["INSTALL_LINE", "make_sdk"]
