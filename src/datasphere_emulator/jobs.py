"""The jobs of all projects: what is known of them, where their files lie, and how they end."""

from __future__ import annotations

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
from datasphere_emulator.parameters import uploaded_files
from datasphere_emulator.records import TERMINAL, JobRecord, ScriptSeries, get_time
from datasphere_emulator.uploads import upload_list
from datasphere_emulator.workspace import pack_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

    from datasphere_emulator.records import OperationRecord
    from datasphere_emulator.script import ScriptedOutput
    from datasphere_emulator.settings import Settings
    from datasphere_emulator.storage import Storage
    from datasphere_emulator.store import Store


class Jobs:
    """All jobs, their logs and operations. Used by the event loop's thread alone.

    :param folder: where programs run and project disks lie.
    :param owner: process id without which programs must not live, None if they outlive the emulator.
    :param service_agent_token: gives a new IAM token of the community's service agent.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        storage: Storage,
        settings: Settings,
        *,
        owner: int | None,
        service_agent_token: Callable[[], str],
    ) -> None:
        self.store = store
        self.storage = storage
        self.settings = settings
        self.owner = owner
        self.service_agent_token = service_agent_token
        self._folder = folder
        self._records = {id: JobRecord.from_json(value) for id, value in store.all("job").items()}
        positions = store.all("series_position")
        self._series = {
            id: ScriptSeries.from_json(scripts, positions.get(id, 0)) for id, scripts in store.all("series").items()
        }
        for record in self._records.values():
            if record.series_id and record.executions:
                record.script = self._series[record.series_id].scripts[record.script_number]
        self._active: Counter[str] = Counter(
            record.job.project_id for record in self._records.values() if record.active
        )
        self._logs: dict[str, JobLog] = {}
        self._sequence = max((record.sequence for record in self._records.values()), default=0)
        self.operations = Operations(
            store, settings, self._records.get, self.creation_response, self.execution_response
        )

    # Records

    def __iter__(self) -> Iterator[JobRecord]:
        """All jobs, in the order of their creation."""
        return iter(list(self._records.values()))

    def find(self, job_id: str) -> JobRecord:
        """A job's record, its data cleared if they have expired; raises Refused (NOT_FOUND)."""
        record = self._records.get(job_id)
        if record is None:
            raise not_found(f"Job {job_id!r} is not found.")
        self.expire(record)
        return record

    def add(self, job: jobs_pb2.Job, operation: OperationRecord, series_id: str = "") -> JobRecord:
        """Take in a new job."""
        self._sequence += 1
        record = JobRecord(job, self._sequence, operation.id, series_id=series_id)
        self._records[record.id] = record
        self.save(record)
        return record

    def remove(self, record: JobRecord) -> None:
        """Forget a job, with its data."""
        self.clear_data(record)
        del self._records[record.id]
        self.store.delete("job", record.id)

    def save(self, record: JobRecord) -> None:
        """Write a record down."""
        self.store.put("job", record.id, record.to_json())

    def add_series(self, series: ScriptSeries) -> str:
        """Take in the scripts of a source job and its forks; returns their id."""
        id = new_id("scr")
        self._series[id] = series
        self.store.put("series", id, series.to_json())
        return id

    def begin(self, record: JobRecord, operation: OperationRecord) -> None:
        """Write down the start of a job's execution."""
        record.operation_id = operation.id
        record.executions += 1
        record.execute_time = time.time()
        record.active = True
        self._active[record.job.project_id] += 1
        if self.settings.creating_seconds <= 0:
            record.job.status = jobs_pb2.JobStatus.PREPARING
        if record.series_id:
            series = self._series[record.series_id]
            record.script_number = series.take()
            record.script = series.scripts[record.script_number]
            record.script_position = 0
            self.store.put("series_position", record.series_id, series.position)
        self.save(record)

    def ended(self, record: JobRecord, return_code: int, error: tuple[int, str] | None) -> None:
        """Write down the end of a job's execution, and end its operation."""
        record.active = False
        self._active[record.job.project_id] -= 1
        with self.store.transaction():
            self.save(record)
            operation = self.operations.record(record.operation_id)
            if error is not None:
                self.operations.fail(operation, *error)
            else:
                self.operations.end(operation, self.execution_response(record, return_code))
        self.log(record.id).wake()

    def running(self, project_id: str) -> int:
        """How many jobs of a project run."""
        return self._active[project_id]

    @staticmethod
    def has_ended(record: JobRecord) -> bool:
        """Whether a job has had its execution, or was cancelled before it."""
        return not record.active and (bool(record.operation_id) or record.job.status in TERMINAL)

    # Files and logs

    def folder(self, job_id: str) -> Path:
        """Where a job's program runs."""
        return self._folder / "jobs" / job_id

    def project_folder(self, project_id: str) -> Path:
        """A project's disk (``home``), S3 connectors (``s3``) and datasets (``datasets``)."""
        return self._folder / "projects" / project_id

    def log(self, job_id: str) -> JobLog:
        """A job's log."""
        if job_id not in self._logs:
            self._logs[job_id] = JobLog(self.store, job_id, self.folder(job_id))
        return self._logs[job_id]

    def new_dataset(self, desc: jobs_pb2.OutputDatasetDesc, project_id: str) -> jobs_pb2.OutputDataset:
        """An empty dataset of a project."""
        dataset = jobs_pb2.OutputDataset(desc=desc, id=new_id("bt1"))
        (self.project_folder(project_id) / "datasets" / dataset.id).mkdir(parents=True)
        return dataset

    def store_scripted_directory(self, project_id: str, path: str, output: ScriptedOutput) -> tuple[str, int]:
        """Make and store the zip of a scripted directory; returns sha256 and size. Blocks."""
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

    # Responses of operations

    def creation_response(self, operation: OperationRecord) -> Message:
        """What Create's or Clone's operation ends with."""
        record = self._records.get(operation.job_id)
        kind = service_pb2.CreateProjectJobResponse
        if operation.kind == "clone":
            kind = service_pb2.CloneProjectJobResponse
        response: Message = kind(
            job_id=operation.job_id,
            upload_files=upload_list(record.job, self.storage, self.settings) if record else [],
        )
        return response

    def execution_response(self, record: JobRecord, return_code: int) -> Message:
        """What the operation of an execution ends with."""
        job = record.job
        response: Message = service_pb2.ExecuteProjectJobResponse(
            output_files=[self.storage_file(job.project_id, file) for file in job.output_files],
            output_files_errors=job.file_errors,
            output_datasets=job.output_datasets,
            result=jobs_pb2.JobResult(return_code=return_code),
        )
        return response

    def storage_file(self, project_id: str, file: jobs_pb2.File) -> jobs_pb2.StorageFile:
        """A file with a presigned URL to get it."""
        name = PurePosixPath(file.desc.path).name
        return jobs_pb2.StorageFile(file=file, url=self.storage.get_url(project_id, file.sha256, name))

    # Life of data

    def expire(self, *records: JobRecord) -> None:
        """Clear the data of those jobs whose data's time is over; not while they run."""
        now = time.time()
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

    def clear_data(self, *records: JobRecord) -> None:
        """Remove all stored data of jobs: inputs, outputs and logs, as far as no other job of the project has them."""
        cleared = {record.id: record for record in records if not record.job.data_cleared}
        kept = {
            (other.job.project_id, sha256)
            for other in self._records.values()
            if other.id not in cleared and not other.job.data_cleared
            for sha256 in _contents(other.job)
        }
        with self.store.transaction():
            for record in cleared.values():
                record.job.data_cleared = True
                record.job.data_size_bytes = 0
                self.save(record)
                self.store.delete_log(record.id)
        for record in cleared.values():
            project_id = record.job.project_id
            self.storage.delete(project_id, [sha for sha in _contents(record.job) if (project_id, sha) not in kept])
            self._logs.pop(record.id, None)
            shutil.rmtree(self.folder(record.id), ignore_errors=True)


def _contents(job: jobs_pb2.Job) -> set[str]:
    files = [*uploaded_files(job.job_parameters), *job.output_files, *job.log_files, *job.diagnostic_files]
    return {file.sha256 for file in files}
