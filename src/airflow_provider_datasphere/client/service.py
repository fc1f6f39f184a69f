"""DataSphere Jobs for synchronous code: the RPCs with deadlines, retries, and errors that say what to do."""

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

from airflow_provider_datasphere.client.channels import Channels
from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    JobInfrastructureError,
    JobRequestError,
)
from airflow_provider_datasphere.client.settings import job_url
from airflow_provider_datasphere.client.waiting import READ_DEADLINE, TRANSIENT

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.http import Http
    from airflow_provider_datasphere.client.settings import Settings

log = logging.getLogger(__name__)

#: Deadline of calls that start something, seconds.
WRITE_DEADLINE = 60.0
#: Deadline of the calls for a link, seconds: it is nice to have, and nothing waits for it for long.
LINK_DEADLINE = 3.0
#: Small pages: each Job carries its whole configuration, and an answer may not grow past the receive limit.
PAGE_SIZE = 20
#: DownloadJobFiles takes whole File messages; a job may have hundreds.
FILES_PER_CALL = 100

_REFUSED = frozenset(
    {"NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED"}
)


class Interrupted(DataSphereError):
    """The client was told to stop (its task is being killed) in the middle of a wait."""


def code_name(error: grpc.RpcError) -> str:
    """The gRPC status code's name: ``UNAVAILABLE``."""
    return str(error.code().name)


def error_code(error: BaseException) -> str:
    """The gRPC status code's name behind one of this package's errors, "" for none."""
    code = getattr(error, "code", None) or getattr(error.__cause__, "code", None)
    return str(code().name) if callable(code) and code() is not None else ""


def call_error(error: grpc.RpcError, what: str) -> DataSphereError:
    """A refused or failed call, in the words of this package's exceptions.

    :param what: what was tried, beginning with a capital letter: "Cloning job bt1…".
    """
    code, details = code_name(error), (error.details() or "no details").rstrip(".")
    text = f"{what} failed: {code}: {details}."
    if code == "PERMISSION_DENIED":
        return JobRequestError(f"{text} Add the connection's account to the project's members as Developer.")
    if code == "NOT_FOUND":
        return JobRequestError(f"{text} Check the id, and that the connection's account can see its project.")
    if code == "UNAUTHENTICATED":
        return DataSphereError(f"{text} Check the credential of the connection: it may be expired or revoked.")
    return (JobRequestError if code in _REFUSED else JobInfrastructureError)(text)


class JobService:
    """The service on one connection. Thread-safe; connects lazily.

    :param settings: where the service is and how to authenticate.
    :param patience: how long a read goes on after transient errors (UNAVAILABLE and the like), seconds. Waiting for
        a job has no such limit.
    """

    def __init__(self, settings: Settings, *, patience: float = 300.0) -> None:
        self.settings = settings
        self.channels = Channels(settings)
        self._patience = patience
        self._stop = threading.Event()
        self._wakes: list[weakref.WeakMethod[Callable[[], object]]] = []
        self._community_ids: dict[str, str | None] = {}

    @cached_property
    def http(self) -> Http:
        from airflow_provider_datasphere.client.http import Http

        return Http(self.settings.root_certificates)

    def interrupt(self) -> None:
        """Have every wait of this client end with :class:`Interrupted`. Idempotent.

        Not to be called in a signal handler itself: the main thread may hold the lock of the event that this sets.
        """
        self._stop.set()
        for reference in self._wakes:
            if (wake := reference()) is not None:
                wake()

    def on_interrupt(self, wake: Callable[[], object]) -> None:
        """Have :meth:`interrupt` call ``wake`` too.

        :param wake: a bound method; it is forgotten with its object.
        """
        self._wakes = [known for known in self._wakes if known() is not None]
        self._wakes.append(weakref.WeakMethod(wake))

    @property
    def interrupted(self) -> bool:
        return self._stop.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep, unless the client is told to stop.

        :raises Interrupted:
        """
        if self._stop.wait(seconds):
            raise Interrupted("The wait was interrupted.")

    def close(self) -> None:
        self.channels.close()

    # Reads: repeated on transient errors -----------------------------------------------------------------------

    def get(self, job_id: str) -> jobs_pb2.Job:
        """The job (RPC ``ProjectJobService.Get``).

        :raises JobRequestError: unknown job, or no role in its project.
        """
        with _named(f"Reading job {job_id}"):
            job: jobs_pb2.Job = self._read("jobs", "Get", project_job_service_pb2.GetProjectJobRequest(job_id=job_id))
            return job

    def get_project(self, project_id: str) -> project_pb2.Project:
        """The project (RPC ``ProjectService.Get``)."""
        with _named(f"Reading project {project_id}"):
            project: project_pb2.Project = self._read(
                "projects", "Get", project_service_pb2.GetProjectRequest(project_id=project_id)
            )
            return project

    def list_jobs(self, project_id: str, *, page_size: int = PAGE_SIZE) -> Iterator[jobs_pb2.Job]:
        """The project's jobs, page by page as they are asked for (RPC ``ProjectJobService.List``).

        The order is the service's own; it isn't documented.
        """
        page_token = ""
        while True:
            with _named(f"Listing the jobs of project {project_id}"):
                page = self._read(
                    "jobs",
                    "List",
                    project_job_service_pb2.ListProjectJobRequest(
                        project_id=project_id, page_size=page_size, page_token=page_token
                    ),
                    timeout=3 * READ_DEADLINE,
                )
            yield from page.jobs
            page_token = page.next_page_token
            if not page_token:
                return

    def download_urls(self, job_id: str, files: Sequence[jobs_pb2.File]) -> list[jobs_pb2.StorageFile]:
        """Presigned URLs of a job's files (RPC ``DownloadJobFiles``); use them soon, they expire."""
        stored: list[jobs_pb2.StorageFile] = []
        for start in range(0, len(files), FILES_PER_CALL):
            request = project_job_service_pb2.DownloadProjectJobFilesRequest(
                job_id=job_id, files=files[start : start + FILES_PER_CALL]
            )
            with _named(f"Asking for the download links of job {job_id}"):
                stored.extend(self._read("jobs", "DownloadJobFiles", request).download_files)
        return stored

    def get_operation(self, operation_id: str) -> operation_pb2.Operation:
        """The operation (RPC ``OperationService.Get``)."""
        with _named(f"Reading operation {operation_id}"):
            operation: operation_pb2.Operation = self._read(
                "operations", "Get", operation_service_pb2.GetOperationRequest(operation_id=operation_id)
            )
            return operation

    def job_link(self, job_id: str, project_id: str | None = None) -> str:
        """The job's page. Never fails: without the community id it is the list of projects.

        :param project_id: the job's project, where it is known; the community of a project is asked for once.
        """
        try:
            if project_id is None:
                get_job = project_job_service_pb2.GetProjectJobRequest(job_id=job_id)
                project_id = self.channels.unary("jobs", "Get", get_job, timeout=LINK_DEADLINE).project_id
            if project_id not in self._community_ids:
                get_project = project_service_pb2.GetProjectRequest(project_id=project_id)
                project = self.channels.unary("projects", "Get", get_project, timeout=LINK_DEADLINE)
                self._community_ids[project_id] = project.community_id or None
        except grpc.RpcError as error:
            log.debug("No community id for the job's link: %s", error)
            return job_url(self.settings.ui_endpoint, None, project_id or "", job_id)
        return job_url(self.settings.ui_endpoint, self._community_ids[project_id], project_id, job_id)

    def _read(self, service: Any, method: str, request: Any, *, timeout: float = READ_DEADLINE) -> Any:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, grpc.RpcError) and code_name(e) in TRANSIENT),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=10),
            stop=tenacity.stop_after_delay(self._patience),
            sleep=self.pause,
            reraise=True,
        )
        return retrying(self.channels.unary, service, method, request, timeout=timeout)

    # Writes: each call is made once ----------------------------------------------------------------------------

    def cancel(self, job_id: str, *, graceful: bool = False, reason: str = "", timeout: float = WRITE_DEADLINE) -> None:
        """Ask the service to cancel a job (RPC ``Cancel``); it goes on to CANCELLING, then CANCELLED.

        :param graceful: send the job's own signal first, and kill after its own timeout; without shutdown parameters
            in the job use ``False``.
        """
        request = project_job_service_pb2.CancelProjectJobRequest(job_id=job_id, graceful=graceful, reason=reason)
        with _named(f"Cancelling job {job_id}"):
            self.channels.unary("jobs", "Cancel", request, timeout=timeout)

    def delete(self, job_id: str) -> None:
        """Delete a job (RPC ``Delete``)."""
        with _named(f"Deleting job {job_id}"):
            self.channels.unary(
                "jobs", "Delete", project_job_service_pb2.DeleteProjectJobRequest(job_id=job_id), timeout=WRITE_DEADLINE
            )

    def set_data_ttl(self, job_id: str, ttl: timedelta | None) -> None:
        """Have the service keep a job's data for ``ttl`` from now; ``None``: for ever (RPC ``SetDataTtl``)."""
        request = project_job_service_pb2.SetProjectJobDataTtlRequest(job_id=job_id, ttl=duration(ttl))
        with _named(f"Setting the data TTL of job {job_id}"):
            self._read("jobs", "SetDataTtl", request)


def duration(ttl: timedelta | None) -> Duration | None:
    """A timedelta as protobuf has it; ``None`` stays unset, which means infinity."""
    if ttl is None:
        return None
    message = Duration()
    message.FromTimedelta(ttl)
    return message


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except DataSphereError:
        raise  # no token for the call: that says all
    except grpc.RpcError as error:
        raise call_error(error, what) from error
