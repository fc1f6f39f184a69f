"""The gRPC services, thin: they take requests apart and put answers together."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import Int64Value
from yandex.cloud.datasphere.v2 import project_pb2, project_service_pb2, project_service_pb2_grpc
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2_grpc
from yandex.cloud.endpoint import api_endpoint_pb2, api_endpoint_service_pb2, api_endpoint_service_pb2_grpc
from yandex.cloud.operation import operation_service_pb2_grpc

from datasphere_emulator.errors import Refused, invalid, not_found, precondition
from datasphere_emulator.iam import IamTokenServicer, current_subject
from datasphere_emulator.listing import page
from datasphere_emulator.log_stream import read_logs
from datasphere_emulator.records import Project, set_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from datasphere_emulator.core import Core
    from datasphere_emulator.records import OperationRecord

#: Ids under which the endpoint list names this server.
ENDPOINT_IDS = ("datasphere", "iam", "operation", "resource-manager", "endpoint")


def _unary(method: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """Let a plain method answer a unary call; Refused becomes the call's status."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: Any) -> Any:
        try:
            return method(self, request, context)
        except Refused as refused:
            await _abort(context, refused)

    return answer


async def _abort(context: Any, refused: Refused) -> NoReturn:
    await context.abort(grpc.StatusCode[refused.code], refused.message)
    raise AssertionError("abort does not return")


def _key(context: Any) -> str | None:
    """The call's idempotency key."""
    for name, value in context.invocation_metadata() or ():
        if name == "idempotency-key":
            return str(value)
    return None


class JobServicer(project_job_service_pb2_grpc.ProjectJobServiceServicer):
    """``yandex.cloud.datasphere.v2.jobs.ProjectJobService``."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._service = core.service

    def _answer(self, operation: OperationRecord) -> Any:
        return self._core.registry.operations.answer(operation)

    @_unary
    def Create(self, request: Any, context: Any) -> Any:
        """A new job and the URLs for its files."""
        return self._answer(self._service.create(current_subject.get(), request, _key(context)))

    @_unary
    def Clone(self, request: Any, context: Any) -> Any:
        """A new job after another one, with overrides."""
        return self._answer(self._service.clone(current_subject.get(), request, _key(context)))

    @_unary
    def Execute(self, request: Any, context: Any) -> Any:
        """Start a job; on a running one, its operation."""
        return self._answer(self._service.execute(current_subject.get(), request.job_id, _key(context)))

    @_unary
    def Cancel(self, request: Any, context: Any) -> Any:
        """Ask a job to end."""
        self._service.cancel(current_subject.get(), request.job_id, request.reason, request.graceful)
        return Empty()

    async def ReadStdLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Deprecated by the service itself, and unused by its SDK."""
        await _abort(context, Refused("UNIMPLEMENTED", "ReadStdLogs is deprecated: use ReadLogs."))
        yield

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The log, as long as the job runs and until all is delivered."""
        try:
            record = self._service.find(current_subject.get(), request.job_id, self._core.settings.read_role)
            if record.job.data_cleared:
                raise precondition(f"Data of job {record.id} are cleared.")
            async for response in read_logs(self._core.registry, record, request.offset):
                yield response
        except Refused as refused:
            await _abort(context, refused)

    @_unary
    def DownloadJobFiles(self, request: Any, context: Any) -> Any:
        """URLs of a job's files."""
        files = self._service.download_files(current_subject.get(), request.job_id, list(request.files))
        return service_pb2.DownloadProjectJobFilesResponse(download_files=files)

    @_unary
    def List(self, request: Any, context: Any) -> Any:
        """Jobs of a project."""
        return self._service.list_jobs(current_subject.get(), request)

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """A job."""
        return self._service.find(current_subject.get(), request.job_id, self._core.settings.read_role).job

    @_unary
    def Delete(self, request: Any, context: Any) -> Any:
        """Delete a job."""
        return self._answer(self._service.delete(current_subject.get(), request.job_id))

    @_unary
    def DeleteData(self, request: Any, context: Any) -> Any:
        """Clear a job's data."""
        return self._answer(self._service.delete_data(current_subject.get(), request.job_id))

    @_unary
    def DeleteAllData(self, request: Any, context: Any) -> Any:
        """Clear the data of all jobs of a project."""
        return self._answer(self._service.delete_all_data(current_subject.get(), request.project_id))

    @_unary
    def SetDataTtl(self, request: Any, context: Any) -> Any:
        """Say when a job's data expire."""
        ttl = request.ttl if request.HasField("ttl") else None
        self._service.set_data_ttl(current_subject.get(), request.job_id, ttl)
        return service_pb2.SetProjectJobDataTtlResponse()


class OperationServicer(operation_service_pb2_grpc.OperationServiceServicer):
    """``yandex.cloud.operation.OperationService``."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """An operation as it is now."""
        record = self._core.service.operation(
            current_subject.get(), request.operation_id, self._core.settings.read_role
        )
        return self._core.registry.operations.answer(record)

    @_unary
    def Cancel(self, request: Any, context: Any) -> Any:
        """Cancel the job of a running execution; other operations go on, as "best effort" allows."""
        subject = current_subject.get()
        record = self._core.service.operation(subject, request.operation_id, "developer")
        if record.kind == "execute" and record.ended_at is None:
            self._core.service.cancel(subject, record.job_id, "The operation was cancelled.")
        return self._core.registry.operations.answer(record)


class ProjectServicer(project_service_pb2_grpc.ProjectServiceServicer):
    """``yandex.cloud.datasphere.v2.ProjectService``, as far as a client of jobs needs it."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """A project."""
        self._core.service.allow(current_subject.get(), request.project_id, "viewer")
        return _project(self._core.projects[request.project_id])

    @_unary
    def List(self, request: Any, context: Any) -> Any:
        """The projects of a community that the caller is a member of."""
        if request.community_id != self._core.community_id:
            raise not_found(f"Community {request.community_id!r} is not found.")
        subject = current_subject.get()
        projects, token = page(
            (
                project
                for project in self._core.projects.values()
                if self._core.iam.allows(subject, project.id, "viewer")
                and request.project_name_pattern in project.name
                and request.owned_by_id in ("", project.created_by_id)
            ),
            lambda project: project.id,
            request.page_size,
            request.page_token,
        )
        return project_service_pb2.ListProjectsResponse(
            projects=[_project(project) for project in projects], next_page_token=token
        )

    @_unary
    def GetUnitBalance(self, request: Any, context: Any) -> Any:
        """The project's units: not limited unless set."""
        self._core.service.allow(current_subject.get(), request.project_id, "viewer")
        balance = self._core.projects[request.project_id].unit_balance
        return project_service_pb2.GetUnitBalanceResponse(
            unit_balance=None if balance is None else Int64Value(value=balance)
        )


def _project(project: Project) -> project_pb2.Project:
    message = project_pb2.Project(
        id=project.id,
        name=project.name,
        description=project.description,
        community_id=project.community_id,
        created_by_id=project.created_by_id,
    )
    set_time(message.created_at, project.created_at)
    return message


class EndpointServicer(api_endpoint_service_pb2_grpc.ApiEndpointServiceServicer):
    """``yandex.cloud.endpoint.ApiEndpointService``: every service is here."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def _endpoint(self, id: str) -> api_endpoint_pb2.ApiEndpoint:
        return api_endpoint_pb2.ApiEndpoint(id=id, address=self._core.endpoint)

    @_unary
    def List(self, request: Any, context: Any) -> Any:
        """Where the services are."""
        endpoints = [self._endpoint(id) for id in ENDPOINT_IDS]
        return api_endpoint_service_pb2.ListApiEndpointsResponse(endpoints=endpoints)

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """Where a service is."""
        if not request.api_endpoint_id:
            raise invalid("api_endpoint_id: is required.")
        if request.api_endpoint_id not in ENDPOINT_IDS:
            raise not_found(f"Endpoint {request.api_endpoint_id!r} is not found.")
        return self._endpoint(request.api_endpoint_id)


def add_services(core: Core, server: Any) -> None:
    """Serve everything on this server."""
    from yandex.cloud.iam.v1 import iam_token_service_pb2_grpc

    project_job_service_pb2_grpc.add_ProjectJobServiceServicer_to_server(JobServicer(core), server)
    operation_service_pb2_grpc.add_OperationServiceServicer_to_server(OperationServicer(core), server)
    project_service_pb2_grpc.add_ProjectServiceServicer_to_server(ProjectServicer(core), server)  # type: ignore[abstract]
    api_endpoint_service_pb2_grpc.add_ApiEndpointServiceServicer_to_server(EndpointServicer(core), server)
    iam_token_service_pb2_grpc.add_IamTokenServiceServicer_to_server(IamTokenServicer(core.iam), server)
