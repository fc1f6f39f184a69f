"""Synchronous RPCs of DataSphere Jobs, with deadlines, retries and clear errors."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import grpc
import tenacity
from google.protobuf.duration_pb2 import Duration
from yandex.cloud.datasphere.v2 import project_pb2, project_service_pb2
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2
from yandex.cloud.operation import operation_pb2, operation_service_pb2

from airflow_provider_datasphere.client.connection.channels import Channels
from airflow_provider_datasphere.client.connection.endpoints import known_endpoints
from airflow_provider_datasphere.client.connection.errors import CredentialError
from airflow_provider_datasphere.client.connection.outage import (
    CHECK_NETWORK,
    Outage,
    duration_text,
    tls_hint,
    unreachable,
)
from airflow_provider_datasphere.client.connection.reloading_channels import ReloadingChannels
from airflow_provider_datasphere.client.connection.settings import job_url
from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    Interrupted,
    JobInfrastructureError,
    JobRequestError,
)
from airflow_provider_datasphere.client.rpc import (
    LINK_DEADLINE_SECONDS,
    READ_DEADLINE_SECONDS,
    TRANSIENT,
    WRITE_DEADLINE_SECONDS,
    call_error,
    code_and_details,
    code_name,
    error_code,
    is_message_too_large,
)

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.grpc_channel import Service
    from airflow_provider_datasphere.client.connection.settings import Settings
    from airflow_provider_datasphere.client.http.client import HttpClient

log = logging.getLogger(__name__)

#: Jobs per page of List: at first, at most (the API's limit), and bytes that a page should have. gRPC's default limit
#: of a response is 4 MB, and a gateway may enforce it: a page that turns out to be larger is requested again in halves.
FIRST_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
PAGE_BYTES = 2_000_000
#: DownloadJobFiles takes whole File messages; a job may have hundreds.
FILES_PER_CALL = 100


class JobApi:
    """The RPCs on one connection. Thread-safe; connects lazily.

    :param settings: endpoints and credential.
    :param refresh_settings: returns the connection's current settings, called when the service refuses a call; see
        :class:`.reloading_channels.ReloadingChannels`. Default: the settings never change.
    :param connection: the connection's id, for messages.
    :param retry_timeout: seconds for which a read is retried after transient errors such as UNAVAILABLE. Waiting for a
        job has no such limit.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        retry_timeout: float = 300.0,
        refresh_settings: Callable[[], Settings | None] | None = None,
        connection: str = "",
    ) -> None:
        self.channels = ReloadingChannels(settings, refresh_settings) if refresh_settings else Channels(settings)
        self._retry_timeout = retry_timeout
        self._connection = connection
        self._stop = threading.Event()
        self._wakes: list[weakref.WeakMethod[Callable[[], object]]] = []
        self._community_ids: dict[str, str | None] = {}

    @property
    def settings(self) -> Settings:
        """The settings in use: reloaded ones if the connection has changed."""
        return self.channels.settings

    @cached_property
    def http(self) -> HttpClient:
        from airflow_provider_datasphere.client.http.client import HttpClient

        return HttpClient(self.settings.root_certificates)

    def interrupt(self) -> None:
        """Make every wait of this client end with :class:`Interrupted`. Idempotent.

        Don't call it in a signal handler: the main thread may hold the lock of the event that this sets.
        """
        self._stop.set()
        for reference in self._wakes:
            if (wake := reference()) is not None:
                wake()

    def add_interrupt_callback(self, wake: Callable[[], object]) -> None:
        """Make :meth:`interrupt` call ``wake`` too.

        :param wake: a bound method; only a weak reference is kept.
        """
        self._wakes = [known for known in self._wakes if known() is not None]
        self._wakes.append(weakref.WeakMethod(wake))

    @property
    def interrupted(self) -> bool:
        return self._stop.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep, unless the client is interrupted.

        :param seconds: how long.
        :raises Interrupted: :meth:`interrupt` was called.
        """
        if self._stop.wait(seconds):
            raise Interrupted("The wait was interrupted.")

    def close(self) -> None:
        """Close all connections, also those to the storage; the client can be used again."""
        self.channels.close()
        http = vars(self).get("http")  # made when it is first used
        if http is not None:
            http.close()

    # Reads: retried after transient errors ----------------------------------------------------------------------

    def get(self, job_id: str) -> jobs_pb2.Job:
        """Return the job (RPC ``ProjectJobService.Get``).

        :raises JobRequestError: unknown job, or no role in its project.
        """
        request = project_job_service_pb2.GetProjectJobRequest(job_id=job_id)
        job: jobs_pb2.Job = self._read(f"Reading job {job_id}", "jobs", "Get", request)
        return job

    def get_project(self, project_id: str) -> project_pb2.Project:
        """Return the project (RPC ``ProjectService.Get``)."""
        request = project_service_pb2.GetProjectRequest(project_id=project_id)
        project: project_pb2.Project = self._read(f"Reading project {project_id}", "projects", "Get", request)
        return project

    def list_job_pages(self, project_id: str, *, filter: str = "") -> Iterator[Sequence[jobs_pb2.Job]]:
        """Iterate over the pages of the project's jobs (RPC ``ProjectJobService.List``).

        The service's order isn't documented. A page has about :data:`PAGE_BYTES`.

        :param filter: filter expression of List, such as ``status IN (EXECUTING, SUCCESS)``; default: all jobs.
        :raises JobRequestError: no role in the project, or the filter is refused.
        """
        page_token, page_size, resizes = "", FIRST_PAGE_SIZE, True
        while True:
            request = project_job_service_pb2.ListProjectJobRequest(
                project_id=project_id, page_size=page_size, page_token=page_token, filter=filter
            )
            try:
                what = f"Listing the jobs of project {project_id}"
                page = self._read(what, "jobs", "List", request, timeout=3 * READ_DEADLINE_SECONDS)
            except JobRequestError as error:
                code = error_code(error)
                if code == "RESOURCE_EXHAUSTED" and page_size > 1:  # jobs that are larger than those before
                    page_size //= 2
                elif code == "INVALID_ARGUMENT" and page_size != FIRST_PAGE_SIZE:
                    page_size, resizes = FIRST_PAGE_SIZE, False  # a service that accepts no other size
                else:
                    raise
                continue
            yield page.jobs
            page_token = page.next_page_token
            if not page_token:
                return
            if page.jobs and resizes:
                # Each Job has its whole configuration: a page fits a thousand small ones or one large one.
                page_size = max(1, min(MAX_PAGE_SIZE, PAGE_BYTES // max(1, page.ByteSize() // len(page.jobs))))

    def download_urls(self, job_id: str, files: Sequence[jobs_pb2.File]) -> list[jobs_pb2.StorageFile]:
        """Return presigned URLs of a job's files (RPC ``DownloadJobFiles``); use them soon, they expire."""
        stored: list[jobs_pb2.StorageFile] = []
        for start in range(0, len(files), FILES_PER_CALL):
            request = project_job_service_pb2.DownloadProjectJobFilesRequest(
                job_id=job_id, files=files[start : start + FILES_PER_CALL]
            )
            what = f"Requesting the download URLs of job {job_id}"
            stored.extend(self._read(what, "jobs", "DownloadJobFiles", request).download_files)
        return stored

    def get_operation(self, operation_id: str) -> operation_pb2.Operation:
        """Return the operation (RPC ``OperationService.Get``)."""
        request = operation_service_pb2.GetOperationRequest(operation_id=operation_id)
        operation: operation_pb2.Operation = self._read(
            f"Reading operation {operation_id}", "operations", "Get", request
        )
        return operation

    def job_link(self, job_id: str, project_id: str | None = None) -> str:
        """Return the URL of the job's page. Never fails: without the community id it is the list of projects.

        :param project_id: the job's project; default: it is read from the job. Its community is read once.
        """
        try:
            if not project_id:
                get_job = project_job_service_pb2.GetProjectJobRequest(job_id=job_id)
                project_id = self.channels.unary("jobs", "Get", get_job, timeout=LINK_DEADLINE_SECONDS).project_id
            if project_id not in self._community_ids:
                get_project = project_service_pb2.GetProjectRequest(project_id=project_id)
                project = self.channels.unary("projects", "Get", get_project, timeout=LINK_DEADLINE_SECONDS)
                self._community_ids[project_id] = project.community_id or None
        except grpc.RpcError as error:
            log.debug("No community id for the job's link: %s", error)
            return job_url(self.settings.ui_endpoint, None, project_id or "", job_id)
        return job_url(self.settings.ui_endpoint, self._community_ids[project_id], project_id, job_id)

    def _read(
        self, what: str, service: Service, method: str, request: Any, *, timeout: float = READ_DEADLINE_SECONDS
    ) -> Any:
        """Make a call, and retry it after transient errors.

        :param what: as of :func:`call_error`.
        """
        hint = ""

        def describe(error: grpc.RpcError) -> str:
            nonlocal hint
            if isinstance(error, CredentialError):
                return str(error)
            # Kept: for a host with two addresses gRPC reports the error of either.
            hint = hint or tls_hint(error, self.settings)
            known = known_endpoints(self.settings)
            where = known.of(service) if known else self.settings.discovery_endpoint or ""
            if unanswered := unreachable(error, where, self._connection):
                return unanswered + hint
            return f"{what}: DataSphere at {where} answers {code_and_details(error)}"

        outage = Outage(describe, self._retry_timeout, log)

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, grpc.RpcError):
                outage.failed(error)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda e: isinstance(e, grpc.RpcError) and code_name(e) in TRANSIENT and not is_message_too_large(e)
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=10),
            stop=tenacity.stop_after_delay(self._retry_timeout),
            sleep=self.pause,
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            answer = retrying(self.channels.unary, service, method, request, timeout=timeout)
        except CredentialError:
            raise  # no token for the call: the message is complete
        except grpc.RpcError as error:
            if code_name(error) not in TRANSIENT or describe(error).startswith(what):
                raise call_error(error, what) from error
            gave_up = f" Gave up after {duration_text(self._retry_timeout)}." if self._retry_timeout else ""
            raise JobInfrastructureError(
                f"{what} failed: {describe(error)}.{gave_up} {CHECK_NETWORK} ({code_and_details(error)})"
            ) from error
        outage.over()
        return answer

    # Writes: never retried here ------------------------------------------------------------------------------

    def cancel(
        self, job_id: str, *, graceful: bool = False, reason: str = "", timeout: float = WRITE_DEADLINE_SECONDS
    ) -> None:
        """Cancel a job (RPC ``Cancel``): its status becomes CANCELLING, later CANCELLED.

        :param graceful: send the job's own signal first, and kill it after its own timeout; default False, as for jobs
            without shutdown parameters.
        :param reason: text for the service.
        :param timeout: deadline, seconds.
        """
        request = project_job_service_pb2.CancelProjectJobRequest(job_id=job_id, graceful=graceful, reason=reason)
        with _translate_errors(f"Cancelling job {job_id}"):
            self.channels.unary("jobs", "Cancel", request, timeout=timeout)

    def delete(self, job_id: str) -> None:
        """Delete a job (RPC ``Delete``)."""
        with _translate_errors(f"Deleting job {job_id}"):
            self.channels.unary(
                "jobs",
                "Delete",
                project_job_service_pb2.DeleteProjectJobRequest(job_id=job_id),
                timeout=WRITE_DEADLINE_SECONDS,
            )

    def set_data_ttl(self, job_id: str, ttl: timedelta | None) -> None:
        """Keep a job's data for ``ttl`` from now; None: without limit (RPC ``SetDataTtl``)."""
        request = project_job_service_pb2.SetProjectJobDataTtlRequest(job_id=job_id, ttl=duration(ttl))
        self._read(f"Setting the data TTL of job {job_id}", "jobs", "SetDataTtl", request)


def duration(ttl: timedelta | None) -> Duration | None:
    """Convert a timedelta to protobuf; None stays unset, which means infinity."""
    if ttl is None:
        return None
    message = Duration()
    message.FromTimedelta(ttl)
    return message


@contextmanager
def _translate_errors(what: str) -> Iterator[None]:
    try:
        yield
    except DataSphereError:
        raise  # no token for the call: the message is complete
    except grpc.RpcError as error:
        raise call_error(error, what) from error
