"""Rules of ProjectJobService: who may call what, and how calls change jobs and operations."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from datasphere_emulator import parameters
from datasphere_emulator.admission import Admission
from datasphere_emulator.errors import StatusError, invalid, not_found, precondition
from datasphere_emulator.iam import new_id
from datasphere_emulator.list_query import order_key, page, parse_filter
from datasphere_emulator.records import Cancel, JobStatus, set_time

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message

    from datasphere_emulator.iam import Iam
    from datasphere_emulator.jobs import Jobs
    from datasphere_emulator.records import JobRecord, OperationRecord, Project
    from datasphere_emulator.scheduler import Scheduler
    from datasphere_emulator.settings import Settings

#: Subject of the service itself and of people in the web UI; needs no role.
ANYBODY = "anybody"


class JobService:
    """Implements the RPCs. The first argument of a method is the caller's account; all raise StatusError.

    :param projects: by id.
    """

    def __init__(
        self, jobs: Jobs, scheduler: Scheduler, iam: Iam, settings: Settings, projects: dict[str, Project]
    ) -> None:
        self._jobs = jobs
        self._scheduler = scheduler
        self._iam = iam
        self._settings = settings
        self._projects = projects
        self._admission = Admission(settings)

    # Access

    def allow(self, subject: str | None, project_id: str, role: str) -> None:
        """Check that the caller has a role in a project: NOT_FOUND or PERMISSION_DENIED."""
        if project_id not in self._projects:
            raise not_found(f"Project {project_id!r} is not found.")
        if subject != ANYBODY and not self._iam.allows(subject, project_id, role):
            raise StatusError("PERMISSION_DENIED", f"{subject} needs the role {role} in project {project_id}.")

    def find(self, subject: str | None, job_id: str, role: str) -> JobRecord:
        """Return a job for which the caller has this role: NOT_FOUND or PERMISSION_DENIED."""
        if not job_id:
            raise invalid("job_id: is required.")
        record = self._jobs.find(job_id)
        if subject != ANYBODY and not self._is_visible(record):
            raise not_found(f"Job {job_id!r} is not found.")
        self.allow(subject, record.job.project_id, role)
        return record

    def _is_visible(self, record: JobRecord) -> bool:
        if self._settings.new_jobs_visible == "at_once":
            return True
        operations = self._jobs.operations
        return operations.is_ready(operations.record(record.creation_id))

    def operation(self, subject: str | None, operation_id: str, role: str) -> OperationRecord:
        """Return an operation for which the caller has this role: NOT_FOUND or PERMISSION_DENIED."""
        record = self._jobs.operations.get(operation_id)
        self.allow(subject, record.project_id, role)
        return record

    # New jobs

    def create(
        self,
        subject: str | None,
        request: service_pb2.CreateProjectJobRequest,
        key: str | None,
        series_id: str = "",
        *,
        prepared: bool = False,
    ) -> OperationRecord:
        """Create a job.

        :param key: idempotency key.
        :param series_id: id of the scripts of the job and its forks, "" for a real program.
        :param prepared: skip the settings about slow creation and instance types.
        """
        self.allow(subject, request.project_id, "developer")
        if (known := self._jobs.operations.known("Create", subject, key)) is not None:
            return known
        parameters.check(request.job_parameters)
        if not prepared:
            self._admission.check_instance_types("Create", subject, request.job_parameters)
        job = jobs_pb2.Job(
            name=request.name,
            desc=request.desc,
            config=request.config,
            project_id=request.project_id,
            job_parameters=request.job_parameters,
        )
        ttl = request.data_ttl if request.HasField("data_ttl") else None
        seconds = 0.0 if prepared else self._settings.clone_seconds
        series_id = series_id or self._jobs.series_of_name(request.name)
        return self._add(job, ttl, subject, "Create", key, series_id, seconds)

    def clone(
        self, subject: str | None, request: service_pb2.CloneProjectJobRequest, key: str | None
    ) -> OperationRecord:
        """Clone a job. :param key: idempotency key."""
        if not request.source_job_id:
            raise invalid("source_job_id: is required.")
        source = self.find(subject, request.source_job_id, "developer")
        if (known := self._jobs.operations.known("Clone", subject, key)) is not None:
            return known
        if source.job.data_cleared:
            raise precondition(f"Data of job {source.id} are cleared: it can't be cloned.")
        if self._settings.clone_requires_started_source and source.job.status in (
            JobStatus.CREATING,
            JobStatus.PREPARING,
        ):
            raise precondition(f"Job {source.id} is {JobStatus.Name(source.job.status)}: it can't be cloned yet.")
        if missing := self._jobs.missing_uploads(source.job):
            paths = ", ".join(file.desc.path for file in missing)
            raise precondition(f"Files of job {source.id} are not uploaded: {paths}. It can't be cloned.")
        changed = parameters.override(source.job.job_parameters, request.job_parameters_overrides, self._settings)
        parameters.check(changed)
        self._admission.check_instance_types("Clone", subject, changed)
        job = jobs_pb2.Job(
            name=request.name or (source.job.name if self._settings.clone_empty_name == "source" else ""),
            desc=request.desc or (source.job.desc if self._settings.clone_empty_desc == "source" else ""),
            config=source.job.config,
            project_id=source.job.project_id,
            job_parameters=changed,
            parent_job_id=source.id,
        )
        ttl = request.data_ttl if request.HasField("data_ttl") else None
        return self._add(job, ttl, subject, "Clone", key, source.series_id, self._settings.clone_seconds)

    def _add(
        self,
        job: jobs_pb2.Job,
        ttl: Duration | None,
        subject: str | None,
        method: str,
        key: str | None,
        series_id: str,
        seconds: float,
    ) -> OperationRecord:
        self._check_texts(job)
        now = time.time()
        job.id = new_id("bt1")
        job.status = JobStatus.CREATING
        job.created_by_id = subject or ""
        set_time(job.created_at, now)
        job.data_size_bytes = sum(file.size_bytes for file in parameters.uploaded_files(job.job_parameters))
        if ttl is not None:
            set_time(job.data_expires_at, now + _seconds(ttl, "data_ttl"))
        elif self._settings.unset_data_ttl == "default":
            set_time(job.data_expires_at, now + self._settings.default_data_ttl_seconds)
        metadata_kind = service_pb2.CreateProjectJobMetadata
        if method == "Clone":
            metadata_kind = service_pb2.CloneProjectJobMetadata
        with self._jobs.database.transaction():
            operation = self._jobs.operations.create(
                method.lower(),
                f"{method} job",
                metadata_kind(project_id=job.project_id, job_id=job.id),
                project_id=job.project_id,
                subject=subject,
                job_id=job.id,
                ready_after=seconds,
            )
            self._jobs.add(job, operation, series_id)
            self._jobs.operations.remember(method, subject, key, operation)
        return operation

    def _check_texts(self, job: jobs_pb2.Job) -> None:
        for field, limit in (("name", self._settings.max_name_length), ("desc", self._settings.max_desc_length)):
            length = len(getattr(job, field))
            if limit is not None and length > limit:
                raise invalid(f"{field}: has {length} characters, more than {limit}.")
        taken = self._settings.unique_names and any(
            record.job.project_id == job.project_id and record.job.name == job.name for record in self._jobs
        )
        if job.name and taken:
            raise StatusError("ALREADY_EXISTS", f"name={job.name!r}: another job of the project has it.")

    # Execute and cancel

    def execute(self, subject: str | None, job_id: str, key: str | None) -> OperationRecord:
        """Execute a job. :param key: idempotency key."""
        record = self.find(subject, job_id, "developer")
        operations = self._jobs.operations
        if (known := operations.known("Execute", subject, key)) is not None:
            return known
        if record.active:
            return operations.record(record.operation_id)
        if record.refused_at is not None and self._settings.refused_job == "error":
            raise self._admission.quota_error()
        if self._jobs.has_ended(record):
            if record.operation_id and self._settings.execute_finished == "same_operation":
                return operations.record(record.operation_id)
            raise precondition(f"Job {job_id} has ended ({_status_name(record)}).")
        if record.job.data_cleared:
            raise precondition(f"Data of job {job_id} are cleared.")
        if not operations.is_ready(operations.record(record.creation_id)):
            raise precondition(f"Job {job_id} is still being created.")
        if missing := self._jobs.missing_uploads(record.job):
            raise precondition(f"Files of job {job_id} are not uploaded: {', '.join(f.desc.path for f in missing)}.")
        self._admission.check_instance_types("Execute", subject, record.job.job_parameters)
        refusal = self._admission.check_quota(subject, self._jobs.running(record.job.project_id))
        if refusal is not None:
            record.refused_at = time.time()
            self._jobs.save(record)
            raise refusal
        record.job.actual_cloud_instance_type.name = record.job.job_parameters.cloud_instance_types[0].name
        with self._jobs.database.transaction():
            operation = operations.create(
                "execute",
                "Execute job",
                service_pb2.ExecuteProjectJobMetadata(),
                project_id=record.job.project_id,
                subject=subject,
                job_id=job_id,
            )
            self._jobs.begin(record, operation)
            operations.remember("Execute", subject, key, operation)
        self._scheduler.start(record)
        return operation

    def cancel(self, subject: str | None, job_id: str, reason: str = "", graceful: bool = False) -> None:
        """Cancel a job. A second cancel without ``graceful`` ends a graceful shutdown at once."""
        record = self.find(subject, job_id, "developer")
        if self._jobs.has_ended(record):
            if self._settings.cancel_finished == "ok":
                return
            raise precondition(f"Job {job_id} has already ended ({_status_name(record)}).")
        now = time.time()
        if not record.active:
            record.job.status = JobStatus.CANCELLED
            record.job.status_details = "Job was cancelled before its execution."
            set_time(record.job.finished_at, now)
            self._jobs.save(record)
            self._jobs.log(job_id).wake()
            return
        if record.cancel is not None and (graceful or not record.cancel.graceful):
            return
        record.cancel = Cancel(reason, graceful, now)
        record.job.status = JobStatus.CANCELLING
        self._jobs.save(record)
        self._scheduler.cancel(record)

    # Reads

    def list_jobs(
        self, subject: str | None, request: service_pb2.ListProjectJobRequest
    ) -> service_pb2.ListProjectJobResponse:
        """List jobs of a project."""
        self.allow(subject, request.project_id, self._settings.read_role)
        statuses = parse_filter(request.filter)
        order, seed = self._settings.list_order, self._settings.seed
        self._jobs.refresh(*self._jobs)
        records, token = page(
            (
                record
                for record in self._jobs
                if record.job.project_id == request.project_id
                and (statuses is None or record.job.status in statuses)
                and self._is_visible(record)
            ),
            lambda record: order_key(order, seed, record.sequence, record.id),
            request.page_size,
            request.page_token,
        )
        return service_pb2.ListProjectJobResponse(jobs=[record.job for record in records], next_page_token=token)

    def download_files(
        self, subject: str | None, job_id: str, files: list[jobs_pb2.File]
    ) -> list[jobs_pb2.StorageFile]:
        """Return presigned URLs of files of a job."""
        record = self.find(subject, job_id, self._settings.read_role)
        if not files:
            raise invalid("files: at least one is required.")
        job = record.job
        if job.data_cleared:
            raise precondition(f"Data of job {job_id} are cleared.")
        known = {
            (file.desc.path, file.sha256): file for file in (*job.output_files, *job.log_files, *job.diagnostic_files)
        }
        answer = []
        for file in files:
            found = known.get((file.desc.path, file.sha256))
            if found is None:
                raise not_found(f"Job {job_id} has no file {file.desc.path!r} with sha256 {file.sha256!r}.")
            answer.append(self._jobs.storage_file(job.project_id, found))
        return answer

    # Data

    def set_data_ttl(self, subject: str | None, job_id: str, ttl: Duration | None) -> None:
        """Set when a job's data expire. :param ttl: from now; None: never."""
        record = self.find(subject, job_id, "developer")
        if record.job.data_cleared:
            raise precondition(f"Data of job {job_id} are cleared.")
        record.job.ClearField("data_expires_at")
        if ttl is not None:
            set_time(record.job.data_expires_at, time.time() + _seconds(ttl, "ttl"))
        self._jobs.save(record)

    def delete(self, subject: str | None, job_id: str) -> OperationRecord:
        """Delete a job that is not running."""
        record = self.find(subject, job_id, "developer")
        self._check_not_running(record)
        metadata = service_pb2.DeleteProjectJobMetadata(job_id=job_id)
        operation = self._instant("delete", "Delete job", metadata, record.job.project_id, subject)
        self._jobs.remove(record)
        self._jobs.operations.end(operation)
        return operation

    def delete_data(self, subject: str | None, job_id: str) -> OperationRecord:
        """Clear the data of a job that is not running."""
        record = self.find(subject, job_id, "developer")
        self._check_not_running(record)
        metadata = service_pb2.DeleteProjectJobDataMetadata(job_id=job_id)
        operation = self._instant("delete_data", "Delete job data", metadata, record.job.project_id, subject)
        self._jobs.clear_data(record)
        self._jobs.operations.end(operation, service_pb2.DeleteProjectJobDataResponse())
        return operation

    def delete_all_data(self, subject: str | None, project_id: str) -> OperationRecord:
        """Clear the data of all jobs of a project that are not running."""
        self.allow(subject, project_id, "developer")
        metadata = service_pb2.DeleteAllProjectJobDataMetadata(project_id=project_id)
        operation = self._instant("delete_all_data", "Delete data of all jobs", metadata, project_id, subject)
        idle = [record for record in self._jobs if record.job.project_id == project_id and not record.active]
        self._jobs.clear_data(*idle)
        self._jobs.operations.end(operation, service_pb2.DeleteAllProjectJobDataResponse())
        return operation

    def _instant(
        self, kind: str, description: str, metadata: Message, project_id: str, subject: str | None
    ) -> OperationRecord:
        return self._jobs.operations.create(kind, description, metadata, project_id=project_id, subject=subject)

    def _check_not_running(self, record: JobRecord) -> None:
        if record.active:
            raise precondition(f"Job {record.id} is running ({_status_name(record)}); cancel it first.")


def _status_name(record: JobRecord) -> str:
    status = record.job.status
    return JobStatus.Name(status) if status in JobStatus.values() else str(status)


def _seconds(duration: Duration, field: str) -> float:
    seconds: float = duration.ToNanoseconds() / 1e9
    if seconds <= 0:
        raise invalid(f"{field}={seconds} s: must be positive.")
    return seconds
