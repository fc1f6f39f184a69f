"""Operations: their records, responses, ends and idempotency keys."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2
from yandex.cloud.operation import operation_pb2

from datasphere_emulator.errors import not_found
from datasphere_emulator.iam import new_id
from datasphere_emulator.records import OperationRecord, set_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from datasphere_emulator.database import Database
    from datasphere_emulator.records import JobRecord
    from datasphere_emulator.settings import Settings


def job_metadata(job: jobs_pb2.Job) -> jobs_pb2.JobMetadata:
    """Return the ``JobMetadata`` of an execution's operation."""
    metadata = jobs_pb2.JobMetadata(
        id=job.id,
        name=job.name,
        description=job.desc,
        status=job.status,
        status_details=job.status_details,
        created_by_id=job.created_by_id,
        project_id=job.project_id,
        parent_job_id=job.parent_job_id,
    )
    for field in ("created_at", "started_at", "finished_at", "data_expires_at"):
        if job.HasField(field):
            getattr(metadata, field).CopyFrom(getattr(job, field))
    return metadata


def execution_metadata(record: JobRecord) -> service_pb2.ExecuteProjectJobMetadata:
    """Return the metadata of an execution's operation, with the deprecated ``job`` that the SDK still reads."""
    return service_pb2.ExecuteProjectJobMetadata(
        job=record.job, progress=record.progress, metadata=job_metadata(record.job)
    )


class Operations:
    """All operations. Used only in the event loop's thread.

    :param find_job: returns a job's record, None if the job was deleted.
    :param creation_response: returns the response of a Create's or Clone's operation.
    :param execution_response: returns the response of an execution that ended without an error.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        find_job: Callable[[str], JobRecord | None],
        creation_response: Callable[[OperationRecord], Message],
        execution_response: Callable[[JobRecord, int], Message],
    ) -> None:
        self._database = database
        self._settings = settings
        self._find_job = find_job
        self._creation_response = creation_response
        self._execution_response = execution_response
        self._records = {id: OperationRecord.from_json(value) for id, value in database.all("operation").items()}
        self._keys: dict[str, str] = database.all("idempotency")

    def _save(self, record: OperationRecord) -> None:
        self._database.put("operation", record.id, record.to_json())

    # Idempotency

    def known(self, method: str, subject: str | None, key: str | None) -> OperationRecord | None:
        """Return the operation of an earlier call with this idempotency key, None if there is none."""
        if not key or not self._settings.idempotency:
            return None
        operation_id = self._keys.get(f"{method} {subject} {key}")
        return None if operation_id is None else self._records.get(operation_id)

    def remember(self, method: str, subject: str | None, key: str | None, record: OperationRecord) -> None:
        """Save the idempotency key of an operation for :meth:`known`."""
        if key:
            name = f"{method} {subject} {key}"
            self._database.put("idempotency", name, record.id)
            self._keys[name] = record.id

    # Life of an operation

    def create(
        self,
        kind: str,
        description: str,
        metadata: Message,
        *,
        project_id: str,
        subject: str | None,
        job_id: str = "",
        ready_after: float = 0.0,
    ) -> OperationRecord:
        """Add a running operation.

        :param kind: see :class:`~datasphere_emulator.records.OperationRecord`.
        :param ready_after: seconds until a creation is done.
        """
        now = time.time()
        operation = operation_pb2.Operation(id=new_id("bt1"), description=description, created_by=subject or "")
        set_time(operation.created_at, now)
        set_time(operation.modified_at, now)
        operation.metadata.Pack(metadata)
        record = OperationRecord(operation, kind, project_id, job_id, ready_at=now + ready_after)
        self._save(record)
        self._records[record.id] = record
        return record

    def end(self, record: OperationRecord, response: Message | None = None) -> None:
        """End an operation with a response (Empty by default)."""
        record.operation.response.Pack(Empty() if response is None else response)
        self._close(record)

    def fail(self, record: OperationRecord, code: int, message: str) -> None:
        """End an operation with an error."""
        record.operation.error.code = code
        record.operation.error.message = message
        self._close(record)

    def show_error(self, operation_id: str, code: int, message: str) -> None:
        """Show the error of an operation before it is done."""
        record = self.record(operation_id)
        record.operation.error.code = code
        record.operation.error.message = message
        self._save(record)

    def _close(self, record: OperationRecord) -> None:
        record.ended_at = time.time()
        set_time(record.operation.modified_at, record.ended_at)
        if record.kind == "execute" and (job := self._find_job(record.job_id)) is not None:
            record.operation.metadata.Pack(execution_metadata(job))
        record.operation.done = True
        self._save(record)

    def forget(self, operation_id: str) -> None:
        """Make OperationService forget an operation."""
        record = self.record(operation_id)
        record.forgotten = True
        self._save(record)

    # Reads

    def record(self, operation_id: str) -> OperationRecord:
        """Return the record of an operation, even a forgotten one. Raises StatusError (NOT_FOUND)."""
        try:
            return self._records[operation_id]
        except KeyError:
            raise not_found(f"Operation {operation_id!r} is not found.") from None

    def is_ready(self, record: OperationRecord) -> bool:
        """Return whether an operation is done; a creation is ended when it is due."""
        if record.ended_at is None and record.kind in ("create", "clone") and time.time() >= record.ready_at:
            self.end(record, self._creation_response(record))
        return record.ended_at is not None

    def answer(self, record: OperationRecord) -> operation_pb2.Operation:
        """Return the operation with its current metadata and response."""
        self.is_ready(record)
        job = self._find_job(record.job_id)
        if job is None:
            return record.operation
        if record.ended_at is None:
            if record.kind == "execute":
                record.operation.metadata.Pack(execution_metadata(job))
                set_time(record.operation.modified_at, time.time())
        elif self._settings.fresh_operation_urls and record.operation.HasField("response"):
            record.operation.response.Pack(self._fresh_response(record, job))
        return record.operation

    def _fresh_response(self, record: OperationRecord, job: JobRecord) -> Message:
        if record.kind == "execute":
            response = service_pb2.ExecuteProjectJobResponse()
            record.operation.response.Unpack(response)
            return self._execution_response(job, response.result.return_code)
        return self._creation_response(record)

    def get(self, operation_id: str) -> OperationRecord:
        """Return the record of an operation that OperationService still knows. Raises StatusError (NOT_FOUND)."""
        record = self.record(operation_id)
        retention = self._settings.operation_retention_seconds
        over = retention is not None and record.ended_at is not None and time.time() > record.ended_at + retention
        if record.forgotten or over:
            raise not_found(f"Operation {operation_id!r} is not found.")
        return record
