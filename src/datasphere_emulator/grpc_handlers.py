"""Handlers of the gRPC services: unpack requests, call the rules, build responses."""

from __future__ import annotations

import functools
import logging
import sqlite3
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import Int64Value
from yandex.cloud.datasphere.v2 import project_pb2, project_service_pb2, project_service_pb2_grpc
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2_grpc
from yandex.cloud.endpoint import api_endpoint_pb2, api_endpoint_service_pb2, api_endpoint_service_pb2_grpc
from yandex.cloud.iam.v1 import iam_token_service_pb2, iam_token_service_pb2_grpc
from yandex.cloud.operation import operation_service_pb2_grpc

from datasphere_emulator.errors import StatusError, internal_error, invalid, not_found, precondition
from datasphere_emulator.iam import Unauthenticated, current_subject
from datasphere_emulator.list_query import page
from datasphere_emulator.read_logs import read_logs
from datasphere_emulator.records import Project, set_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from datasphere_emulator.iam import Iam
    from datasphere_emulator.records import OperationRecord
    from datasphere_emulator.state import EmulatorState

logger = logging.getLogger(__name__)

#: Ids under which the endpoint list names this server.
ENDPOINT_IDS = ("datasphere", "iam", "operation", "resource-manager", "endpoint")


def _unary(method: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """Turn a plain method into a handler of unary calls; a StatusError becomes the call's status."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: Any) -> Any:
        try:
            return method(self, request, context)
        except StatusError as error:
            await _abort(context, error)
        except (OSError, sqlite3.Error) as error:
            logger.error("%s: %s", method.__qualname__, error)
            await _abort(context, internal_error(error))

    return answer


async def _abort(context: Any, error: StatusError) -> NoReturn:
    await context.abort(grpc.StatusCode[error.code], error.message)
    raise AssertionError("abort does not return")


def _key(context: Any) -> str | None:
    """Return the call's idempotency key, None if it has none."""
    for name, value in context.invocation_metadata() or ():
        if name == "idempotency-key":
            return str(value)
    return None


class JobHandlers(project_job_service_pb2_grpc.ProjectJobServiceServicer):
    """``yandex.cloud.datasphere.v2.jobs.ProjectJobService``."""

    def __init__(self, state: EmulatorState) -> None:
        self._state = state
        self._service = state.job_service

    def _answer(self, operation: OperationRecord) -> Any:
        return self._state.registry.operations.answer(operation)

    @_unary
    def Create(self, request: Any, context: Any) -> Any:
        """Create a job; the operation's response has the upload URLs of its files."""
        return self._answer(self._service.create(current_subject.get(), request, _key(context)))

    @_unary
    def Clone(self, request: Any, context: Any) -> Any:
        """Clone a job with overrides."""
        return self._answer(self._service.clone(current_subject.get(), request, _key(context)))

    @_unary
    def Execute(self, request: Any, context: Any) -> Any:
        """Start a job; for a running job return its operation."""
        return self._answer(self._service.execute(current_subject.get(), request.job_id, _key(context)))

    @_unary
    def Cancel(self, request: Any, context: Any) -> Any:
        """Cancel a job."""
        self._service.cancel(current_subject.get(), request.job_id, request.reason, request.graceful)
        return Empty()

    async def ReadStdLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Return UNIMPLEMENTED: the service deprecates it and its SDK doesn't use it."""
        await _abort(context, StatusError("UNIMPLEMENTED", "ReadStdLogs is deprecated: use ReadLogs."))
        yield

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Stream a job's log until the job has ended and everything is delivered."""
        try:
            record = self._service.find(current_subject.get(), request.job_id, self._state.settings.read_role)
            if record.job.data_cleared:
                raise precondition(f"Data of job {record.id} are cleared.")
            async for response in read_logs(self._state.registry, record, request.offset):
                yield response
        except StatusError as error:
            await _abort(context, error)

    @_unary
    def DownloadJobFiles(self, request: Any, context: Any) -> Any:
        """Return presigned URLs of a job's files."""
        files = self._service.download_files(current_subject.get(), request.job_id, list(request.files))
        return service_pb2.DownloadProjectJobFilesResponse(download_files=files)

    @_unary
    def List(self, request: Any, context: Any) -> Any:
        """List the jobs of a project."""
        return self._service.list_jobs(current_subject.get(), request)

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """Return a job."""
        return self._service.find(current_subject.get(), request.job_id, self._state.settings.read_role).job

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
        """Set when a job's data expire."""
        ttl = request.ttl if request.HasField("ttl") else None
        self._service.set_data_ttl(current_subject.get(), request.job_id, ttl)
        return service_pb2.SetProjectJobDataTtlResponse()


class OperationHandlers(operation_service_pb2_grpc.OperationServiceServicer):
    """``yandex.cloud.operation.OperationService``."""

    def __init__(self, state: EmulatorState) -> None:
        self._state = state

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """Return an operation."""
        record = self._state.job_service.operation(
            current_subject.get(), request.operation_id, self._state.settings.read_role
        )
        return self._state.registry.operations.answer(record)

    @_unary
    def Cancel(self, request: Any, context: Any) -> Any:
        """Cancel the job of a running execution; other operations can't be cancelled ("best effort")."""
        subject = current_subject.get()
        record = self._state.job_service.operation(subject, request.operation_id, "developer")
        if record.kind == "execute" and record.ended_at is None:
            self._state.job_service.cancel(subject, record.job_id, "The operation was cancelled.")
        return self._state.registry.operations.answer(record)


class ProjectHandlers(project_service_pb2_grpc.ProjectServiceServicer):
    """``yandex.cloud.datasphere.v2.ProjectService``: the methods that clients of jobs use."""

    def __init__(self, state: EmulatorState) -> None:
        self._state = state

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """Return a project."""
        self._state.job_service.allow(current_subject.get(), request.project_id, "viewer")
        return _project(self._state.projects[request.project_id])

    @_unary
    def List(self, request: Any, context: Any) -> Any:
        """List the projects of a community that the caller is a member of."""
        if request.community_id != self._state.community_id:
            raise not_found(f"Community {request.community_id!r} is not found.")
        subject = current_subject.get()
        projects, token = page(
            (
                project
                for project in self._state.projects.values()
                if self._state.iam.allows(subject, project.id, "viewer")
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
        """Return the unit balance of a project; unset means unlimited."""
        self._state.job_service.allow(current_subject.get(), request.project_id, "viewer")
        balance = self._state.projects[request.project_id].unit_balance
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


class EndpointHandlers(api_endpoint_service_pb2_grpc.ApiEndpointServiceServicer):
    """``yandex.cloud.endpoint.ApiEndpointService``: all services have this server's address."""

    def __init__(self, state: EmulatorState) -> None:
        self._state = state

    def _endpoint(self, id: str) -> api_endpoint_pb2.ApiEndpoint:
        return api_endpoint_pb2.ApiEndpoint(id=id, address=self._state.endpoint)

    @_unary
    def List(self, request: Any, context: Any) -> Any:
        """List the endpoints of all services."""
        endpoints = [self._endpoint(id) for id in ENDPOINT_IDS]
        return api_endpoint_service_pb2.ListApiEndpointsResponse(endpoints=endpoints)

    @_unary
    def Get(self, request: Any, context: Any) -> Any:
        """Return the endpoint of a service."""
        if not request.api_endpoint_id:
            raise invalid("api_endpoint_id: is required.")
        if request.api_endpoint_id not in ENDPOINT_IDS:
            raise not_found(f"Endpoint {request.api_endpoint_id!r} is not found.")
        return self._endpoint(request.api_endpoint_id)


class IamTokenHandlers(iam_token_service_pb2_grpc.IamTokenServiceServicer):
    """``yandex.cloud.iam.v1.IamTokenService`` on top of :class:`Iam`."""

    def __init__(self, iam: Iam) -> None:
        self._iam = iam

    def _answer(self, token: str) -> iam_token_service_pb2.CreateIamTokenResponse:
        response = iam_token_service_pb2.CreateIamTokenResponse(iam_token=token)
        response.expires_at.FromMilliseconds(int(self._iam.expires_at(token) * 1000))
        return response

    async def Create(
        self,
        request: iam_token_service_pb2.CreateIamTokenRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> iam_token_service_pb2.CreateIamTokenResponse:
        """Exchange a JWT or an OAuth token for an IAM token; UNAUTHENTICATED if it is invalid."""
        identity = request.WhichOneof("identity")
        try:
            if identity == "jwt":
                return self._answer(self._iam.exchange_jwt(request.jwt))
            if identity == "yandex_passport_oauth_token":
                return self._answer(self._iam.exchange_oauth(request.yandex_passport_oauth_token))
        except Unauthenticated as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "identity: one of its fields is required.")
        raise AssertionError("abort does not return")

    async def CreateForServiceAccount(
        self,
        request: iam_token_service_pb2.CreateIamTokenForServiceAccountRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> iam_token_service_pb2.CreateIamTokenResponse:
        """Issue an IAM token of another service account; NOT_FOUND, or PERMISSION_DENIED without impersonation."""
        caller = current_subject.get() or ""
        try:
            return self._answer(self._iam.impersonate(caller, request.service_account_id))
        except KeyError:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"Service account {request.service_account_id!r} is not found."
            )
        except PermissionError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        raise AssertionError("abort does not return")

    async def Revoke(
        self,
        request: iam_token_service_pb2.RevokeIamTokenRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> iam_token_service_pb2.RevokeIamTokenResponse:
        """Revoke an IAM token; INVALID_ARGUMENT if it is invalid."""
        try:
            subject = self._iam.subject_of(request.iam_token)
        except Unauthenticated as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"iam_token: {error}")
        self._iam.revoke(token=request.iam_token)
        return iam_token_service_pb2.RevokeIamTokenResponse(subject_id=subject)


def add_handlers(state: EmulatorState, server: Any) -> None:
    """Register all services on a gRPC server."""
    project_job_service_pb2_grpc.add_ProjectJobServiceServicer_to_server(JobHandlers(state), server)
    operation_service_pb2_grpc.add_OperationServiceServicer_to_server(OperationHandlers(state), server)
    project_service_pb2_grpc.add_ProjectServiceServicer_to_server(ProjectHandlers(state), server)  # type: ignore[abstract]
    api_endpoint_service_pb2_grpc.add_ApiEndpointServiceServicer_to_server(EndpointHandlers(state), server)
    iam_token_service_pb2_grpc.add_IamTokenServiceServicer_to_server(IamTokenHandlers(state.iam), server)
