"""The jobs of all projects: records, files, logs and ends."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from datasphere_emulator.errors import not_found
from datasphere_emulator.iam import new_id
from datasphere_emulator.logs import JobLog
from datasphere_emulator.operations import Operations
from datasphere_emulator.outputs import pack_directory
from datasphere_emulator.parameters import uploaded_files
from datasphere_emulator.records import TERMINAL, JobRecord, ScriptSeries, get_time, set_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

    from datasphere_emulator.database import Database
    from datasphere_emulator.records import OperationRecord
    from datasphere_emulator.script import ScriptedOutput
    from datasphere_emulator.settings import Settings
    from datasphere_emulator.storage import Storage


class Jobs:
    """All jobs, their logs and operations. Used only in the event loop's thread.

    :param folder: folder of job folders and project disks.
    :param owner: id of the process with which programs end; None if they outlive the emulator.
    :param service_agent_token: returns a new IAM token of the community's service agent.
    """

    def __init__(
        self,
        folder: Path,
        database: Database,
        storage: Storage,
        settings: Settings,
        *,
        owner: int | None,
        service_agent_token: Callable[[], str],
    ) -> None:
        self.database = database
        self.storage = storage
        self.settings = settings
        self.owner = owner
        self.service_agent_token = service_agent_token
        self._folder = folder
        self._records = {id: JobRecord.from_json(value) for id, value in database.all("job").items()}
        positions = database.all("series_position")
        self._series = {
            id: ScriptSeries.from_json(scripts, positions.get(id, 0)) for id, scripts in database.all("series").items()
        }
        #: Name of new jobs -> id of their scripts.
        self._series_of_name: dict[str, str] = database.all("series_of_name")
        for record in self._records.values():
            if record.series_id and record.executions:
                record.script = self._series[record.series_id].scripts[record.script_number]
        self._active: Counter[str] = Counter(
            record.job.project_id for record in self._records.values() if record.active
        )
        self._logs: dict[str, JobLog] = {}
        self._sequence = max((record.sequence for record in self._records.values()), default=0)
        self.operations = Operations(
            database, settings, self._records.get, self.creation_response, self.execution_response
        )

    # Records

    def __iter__(self) -> Iterator[JobRecord]:
        """Iterate over all jobs in the order of their creation."""
        return iter(list(self._records.values()))

    def find(self, job_id: str) -> JobRecord:
        """Return the record of a job, refreshed. Raises StatusError (NOT_FOUND)."""
        record = self._records.get(job_id)
        if record is None:
            raise not_found(f"Job {job_id!r} is not found.")
        self.refresh(record)
        return record

    def add(self, job: jobs_pb2.Job, operation: OperationRecord, series_id: str = "") -> JobRecord:
        """Add a new job."""
        self._sequence += 1
        record = JobRecord(job, self._sequence, operation.id, series_id=series_id)
        self.save(record)
        self._records[record.id] = record
        return record

    def remove(self, record: JobRecord) -> None:
        """Remove a job and its data."""
        self.clear_data(record)
        del self._records[record.id]
        self.database.delete("job", record.id)

    def save(self, record: JobRecord) -> None:
        """Save a record to the database."""
        self.database.put("job", record.id, record.to_json())

    def add_series(self, series: ScriptSeries) -> str:
        """Add the scripts of a source job and its forks; return their id."""
        id = new_id("scr")
        self._series[id] = series
        self.database.put("series", id, series.to_json())
        return id

    def script_new_jobs(self, name: str, series: ScriptSeries) -> None:
        """Have jobs that clients create with this name play these scripts."""
        self._series_of_name[name] = id = self.add_series(series)
        self.database.put("series_of_name", name, id)

    def series_of_name(self, name: str) -> str:
        """Return the id of the scripts of new jobs of this name; "" for a real program."""
        return self._series_of_name.get(name, "")

    def begin(self, record: JobRecord, operation: OperationRecord) -> None:
        """Save the start of a job's execution."""
        before, status = dict(vars(record)), record.job.status
        try:
            self._begin(record, operation)
        except BaseException:
            vars(record).update(before)
            record.job.status = status
            raise
        self._active[record.job.project_id] += 1

    def _begin(self, record: JobRecord, operation: OperationRecord) -> None:
        record.operation_id = operation.id
        record.executions += 1
        record.execute_time = time.time()
        record.active = True
        if self.settings.creating_seconds <= 0:
            record.job.status = jobs_pb2.JobStatus.PREPARING
        if record.series_id:
            series = self._series[record.series_id]
            record.script_number = series.take()
            record.script = series.scripts[record.script_number]
            record.script_position = 0
            self.database.put("series_position", record.series_id, series.position)
        self.save(record)

    def end(self, record: JobRecord, return_code: int, error: tuple[int, str] | None) -> None:
        """Save the end of a job's execution and end its operation.

        :param error: code and message of the operation's error; None for a result.
        """
        record.active = False
        try:
            with self.database.transaction():
                self.save(record)
                operation = self.operations.record(record.operation_id)
                if error is not None:
                    self.operations.fail(operation, *error)
                else:
                    self.operations.end(operation, self.execution_response(record, return_code))
        except BaseException:
            record.active = True
            raise
        self._active[record.job.project_id] -= 1
        self.log(record.id).wake()

    def running(self, project_id: str) -> int:
        """Return the number of running jobs of a project."""
        return self._active[project_id]

    @staticmethod
    def has_ended(record: JobRecord) -> bool:
        """Return whether a job's execution has ended, or the job was cancelled before it."""
        return not record.active and (bool(record.operation_id) or record.job.status in TERMINAL)

    # Files and logs

    def folder(self, job_id: str) -> Path:
        """Return the folder in which a job's program runs."""
        return self._folder / "jobs" / job_id

    def project_folder(self, project_id: str) -> Path:
        """Return the folder of a project's disk (``home``), S3 connectors (``s3``) and datasets (``datasets``)."""
        return self._folder / "projects" / project_id

    def log(self, job_id: str) -> JobLog:
        """Return the log of a job."""
        if job_id not in self._logs:
            self._logs[job_id] = JobLog(self.database, job_id, self.folder(job_id))
        return self._logs[job_id]

    def new_dataset(self, desc: jobs_pb2.OutputDatasetDesc, project_id: str) -> jobs_pb2.OutputDataset:
        """Create an empty dataset in a project."""
        dataset = jobs_pb2.OutputDataset(desc=desc, id=new_id("bt1"))
        (self.project_folder(project_id) / "datasets" / dataset.id).mkdir(parents=True)
        return dataset

    def store_scripted_directory(self, project_id: str, path: str, output: ScriptedOutput) -> tuple[str, int]:
        """Zip and store a scripted directory; return its sha256 (hex) and size. Blocks."""
        from datasphere_emulator.storage import generate

        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            root = Path(folder) / "root"
            root.mkdir()
            for name, size in (output.directory or {}).items():
                file = root / name
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as target:
                    target.writelines(generate(f"{output.seed}:{path}/{name}", size))
            archive = Path(folder) / "archive.zip"
            pack_directory(root, PurePosixPath(path).name, archive)
            return self.storage.put_file(project_id, archive)

    # Uploads

    def missing_uploads(self, job: jobs_pb2.Job) -> list[jobs_pb2.File]:
        """Return the files of a job that the project doesn't have yet, each content once."""
        return [file for file in _distinct_uploads(job) if not self.storage.has(job.project_id, file.sha256)]

    def upload_list(self, job: jobs_pb2.Job) -> list[jobs_pb2.StorageFile]:
        """Return ``upload_files`` of a Create's or Clone's response: each content once, with its upload URL."""
        listed = []
        for file in _distinct_uploads(job):
            if not self.storage.has(job.project_id, file.sha256):
                url = self.storage.put_url(job.project_id, file.sha256, file.size_bytes)
                listed.append(jobs_pb2.StorageFile(file=file, url=url))
            elif self.settings.stored_uploads == "empty_url":
                listed.append(jobs_pb2.StorageFile(file=file))
        if self.settings.upload_order == "shuffled":
            random.Random(f"{self.settings.seed} {job.id}").shuffle(listed)
        else:
            listed.reverse()
        return listed

    # Responses of operations

    def creation_response(self, operation: OperationRecord) -> Message:
        """Return the response of a Create's or Clone's operation."""
        record = self._records.get(operation.job_id)
        kind = service_pb2.CreateProjectJobResponse
        if operation.kind == "clone":
            kind = service_pb2.CloneProjectJobResponse
        response: Message = kind(
            job_id=operation.job_id,
            upload_files=self.upload_list(record.job) if record else [],
        )
        return response

    def execution_response(self, record: JobRecord, return_code: int) -> Message:
        """Return the response of an execution's operation."""
        job = record.job
        response: Message = service_pb2.ExecuteProjectJobResponse(
            output_files=[self.storage_file(job.project_id, file) for file in job.output_files],
            output_files_errors=job.file_errors,
            output_datasets=job.output_datasets,
            result=jobs_pb2.JobResult(return_code=return_code),
        )
        return response

    def storage_file(self, project_id: str, file: jobs_pb2.File) -> jobs_pb2.StorageFile:
        """Return a file with a presigned URL to download it."""
        name = PurePosixPath(file.desc.path).name
        return jobs_pb2.StorageFile(file=file, url=self.storage.get_url(project_id, file.sha256, name))

    # Expiry and clearing of data

    def refresh(self, *records: JobRecord) -> None:
        """Apply what is due: jobs rejected by the quota fail, expired data of jobs that don't run are cleared."""
        now = time.time()
        for record in records:
            if record.refused_at is not None and record.job.status == jobs_pb2.JobStatus.CREATING:
                self._fail_rejected(record, now)
        expired = [
            record
            for record in records
            if not record.active
            and not record.job.data_cleared
            and record.job.HasField("data_expires_at")
            and get_time(record.job.data_expires_at) <= now
        ]
        if expired:
            self.clear_data(*expired)

    def _fail_rejected(self, record: JobRecord, now: float) -> None:
        """Show ERROR for a job that Execute rejected for its quota, as if it had run and written nothing."""
        at = get_time(record.job.created_at) + self.settings.refused_job_seconds
        if self.settings.refused_job != "error" or record.active or now < at:
            return
        job = record.job
        job.status = jobs_pb2.JobStatus.ERROR
        set_time(job.finished_at, max(at, record.refused_at or 0.0))
        sha256, _ = self.storage.put_bytes(job.project_id, b"")
        for name in ("stdout.txt", "stderr.txt"):
            job.log_files.append(jobs_pb2.File(desc=jobs_pb2.FileDesc(path=name), sha256=sha256))
        self.save(record)
        self.log(record.id).wake()

    def clear_data(self, *records: JobRecord) -> None:
        """Remove the data of jobs (inputs, outputs, logs) that no other job of the project uses."""
        cleared = {record.id: record for record in records if not record.job.data_cleared}
        kept = {
            (other.job.project_id, sha256)
            for other in self._records.values()
            if other.id not in cleared and not other.job.data_cleared
            for sha256 in _contents(other.job)
        }
        with self.database.transaction():
            for record in cleared.values():
                record.job.data_cleared = True
                record.job.data_size_bytes = 0
                self.save(record)
                self.database.delete_log(record.id)
        for record in cleared.values():
            project_id = record.job.project_id
            self.storage.delete(project_id, [sha for sha in _contents(record.job) if (project_id, sha) not in kept])
            self._logs.pop(record.id, None)
            shutil.rmtree(self.folder(record.id), ignore_errors=True)


def _contents(job: jobs_pb2.Job) -> set[str]:
    files = [*uploaded_files(job.job_parameters), *job.output_files, *job.log_files, *job.diagnostic_files]
    return {file.sha256 for file in files}


def _distinct_uploads(job: jobs_pb2.Job) -> list[jobs_pb2.File]:
    """The files a client uploads for the job, each content once, last declared first."""
    return list({file.sha256: file for file in reversed(list(uploaded_files(job.job_parameters)))}.values())
