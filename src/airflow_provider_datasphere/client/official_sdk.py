"""The official ``datasphere`` SDK on this package's channels and tokens, without the SDK's side effects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc

from airflow_provider_datasphere.client.connection.settings import job_url
from airflow_provider_datasphere.client.errors import JobLostError, JobRequestError
from airflow_provider_datasphere.client.monitoring.polling import DENIED_GRACE_SECONDS
from airflow_provider_datasphere.client.rpc import DENIED, READ_DEADLINE_SECONDS, TRANSIENT

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.channels import Channels
    from airflow_provider_datasphere.client.connection.grpc_channel import Service

INSTALL_LINE = "pip install --no-deps 'datasphere>=0.10' 'envzy>=0.3' && pip install pypi-simple tabulate pyyaml pytz"

#: Pause between two polls of an operation, seconds.
POLL_SECONDS = 2.0
#: Deadline of a call for which the SDK sets none, seconds.
CALL_SECONDS = 60.0


def make_sdk(channels: Channels) -> Any:
    """Make a ``datasphere.SDK`` that uses ``channels``.

    ``SDK()`` itself configures logging for the whole process (which closes every handler, also the one that writes a
    task's log), creates a folder of log files, and shares its token between all connections.

    :raises JobRequestError: the package isn't installed, or is too old.
    """
    try:
        from datasphere.client import Client, OperationError
        from datasphere.sdk import SDK
    except ImportError as error:
        raise JobRequestError(
            f"get_sdk() needs the package datasphere 0.10 or newer ({error}). Its pinned requirements conflict with "
            f"Airflow's, so install it without them: {INSTALL_LINE} (docs/sdk.md). get_conn() needs no such package "
            "and has the same methods."
        ) from None

    from yandex.cloud.datasphere.v2.jobs.project_job_service_pb2 import ExecuteProjectJobMetadata
    from yandex.cloud.operation.operation_service_pb2 import GetOperationRequest

    class ConnectionClient(Client):  # type: ignore[misc]
        """The SDK's client on this connection's channels; nothing else is changed."""

        def __init__(self) -> None:
            self.oauth_token = None
            self.yc_profile = None
            self.stub = _Stub(channels, "jobs")
            self.prj_stub = _Stub(channels, "projects")
            self.op_stub = _Stub(channels, "operations")
            self._progress: bytes | None = None

        @property
        def md(self) -> list[tuple[str, str]]:
            """No metadata: the channels add it."""
            return []

        def _get_job_link(self, job: Any) -> str:
            try:
                community_id = self.get_project(job.project_id).community_id
            except grpc.RpcError:
                community_id = None
            return job_url(channels.settings.ui_endpoint, community_id, job.project_id, job.id)

        def _write_progress_to_file(self, op: Any) -> None:
            # The SDK writes it after each poll; its progress file is the process's log here, so write changes only.
            metadata = ExecuteProjectJobMetadata()
            if op.metadata.Unpack(metadata) and metadata.progress.SerializeToString() != self._progress:
                self._progress = metadata.progress.SerializeToString()
                super()._write_progress_to_file(op)

        def _poll_operation(self, op: Any, call_which_created_op: Any, *_: Any) -> Any:
            denied_since: float | None = None
            while True:
                self._write_progress_to_file(op)
                if op.done:
                    if op.HasField("error"):
                        raise OperationError(op, call_which_created_op)
                    return op
                time.sleep(POLL_SECONDS)
                try:
                    request = GetOperationRequest(operation_id=op.id)
                    op = channels.unary("operations", "Get", request, timeout=READ_DEADLINE_SECONDS)
                    denied_since = None
                except grpc.RpcError as error:
                    code = error.code().name
                    denied_since = (denied_since or time.monotonic()) if code in DENIED else None
                    denied_seconds = 0.0 if denied_since is None else time.monotonic() - denied_since
                    if denied_seconds > DENIED_GRACE_SECONDS or code not in TRANSIENT | DENIED:
                        raise JobLostError(
                            f"Lost access to operation {op.id} ({code}: {error.details() or 'no details'}). Its job "
                            "may still be running and costing money: find it among the project's jobs and cancel it "
                            "there. Check that the connection's account is a Developer of the project."
                        ) from error

    sdk = SDK.__new__(SDK)
    sdk.logs_file_path = None
    sdk.client = ConnectionClient()
    return sdk


class _Stub:
    """Replaces the SDK's generated stubs: each call gets this connection's token and a deadline."""

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

    def with_call(self, request: Any, metadata: Any = (), timeout: float | None = None) -> tuple[Any, _SucceededCall]:
        """Return the response and its call, which the SDK only keeps."""
        return self(request, metadata, timeout), _SucceededCall()


class _SucceededCall:
    """A call that has succeeded."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    def details(self) -> str:
        return ""


__all__ = ["INSTALL_LINE", "make_sdk"]
