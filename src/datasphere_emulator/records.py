"""Records of jobs, operations, scripts and projects, and their JSON form in the database."""

from __future__ import annotations

import base64
import dataclasses
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.operation import operation_pb2

from datasphere_emulator.script import Script

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

JobStatus = jobs_pb2.JobStatus
TERMINAL = frozenset((JobStatus.SUCCESS, JobStatus.ERROR, JobStatus.CANCELLED))


def set_time(timestamp: Timestamp, seconds: float) -> None:
    """Set a protobuf timestamp from seconds since the epoch, with microseconds."""
    timestamp.FromMicroseconds(round(seconds * 1e6))


def get_time(timestamp: Timestamp) -> float:
    """Return a protobuf timestamp as seconds since the epoch."""
    return float(timestamp.ToMicroseconds() / 1e6)


def _encode(message: Message) -> str:
    return base64.b64encode(message.SerializeToString()).decode()


@dataclasses.dataclass
class Cancel:
    """A requested cancel.

    :param requested_at: seconds since the epoch.
    """

    reason: str
    graceful: bool
    requested_at: float


@dataclasses.dataclass
class JobRecord:
    """A job and the service's internal data about it.

    :param job: as in responses of Get.
    :param sequence: number in the order of creation.
    :param creation_id: id of its Create's or Clone's operation.
    :param operation_id: id of its Execute's operation, "" before Execute.
    :param executions: how often it was started.
    :param execute_time: time of Execute, seconds since the epoch.
    :param active: whether it is executing (the status can't tell: scripts may set any number).
    :param series_id: id of the scripts of the job and its forks, "" for a real program.
    :param script_number: index of the script of its execution.
    :param script: that script.
    :param script_position: number of the script's events that have happened.
    :param cancel: last requested cancel, None without one.
    :param progress: last progress message.
    :param refused_at: when Execute rejected it for the quota, seconds since the epoch; None if it never did.
    """

    job: jobs_pb2.Job
    sequence: int
    creation_id: str
    operation_id: str = ""
    executions: int = 0
    execute_time: float = 0.0
    active: bool = False
    series_id: str = ""
    script_number: int = 0
    script: Script | None = None
    script_position: int = 0
    cancel: Cancel | None = None
    progress: jobs_pb2.JobProgress | None = None
    refused_at: float | None = None

    @property
    def id(self) -> str:
        """The job's id."""
        return str(self.job.id)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        values = dict(vars(self))
        values["job"] = _encode(self.job)
        del values["script"]  # found again by its number
        values["cancel"] = dataclasses.asdict(self.cancel) if self.cancel else None
        values["progress"] = _encode(self.progress) if self.progress else None
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JobRecord:
        """Restore from the values of :meth:`to_json`."""
        values = dict(values)
        values["job"] = jobs_pb2.Job.FromString(base64.b64decode(values["job"]))
        values["cancel"] = Cancel(**values["cancel"]) if values["cancel"] else None
        if values["progress"]:
            values["progress"] = jobs_pb2.JobProgress.FromString(base64.b64decode(values["progress"]))
        return cls(**values)


@dataclasses.dataclass
class OperationRecord:
    """An operation.

    :param operation: as in responses; metadata of a running execution are updated when it is read.
    :param kind: ``create``, ``clone``, ``execute``, ``delete``, ``delete_data`` or ``delete_all_data``.
    :param project_id: project in which callers need a role.
    :param job_id: id of its job, "" for none.
    :param ready_at: when a creation is done, seconds since the epoch.
    :param ended_at: when it ended, seconds since the epoch; None while it runs.
    :param forgotten: whether OperationService answers NOT_FOUND.
    """

    operation: operation_pb2.Operation
    kind: str
    project_id: str
    job_id: str = ""
    ready_at: float = 0.0
    ended_at: float | None = None
    forgotten: bool = False

    @property
    def id(self) -> str:
        """The operation's id."""
        return str(self.operation.id)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {**vars(self), "operation": _encode(self.operation)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> OperationRecord:
        """Restore from the values of :meth:`to_json`."""
        operation = operation_pb2.Operation.FromString(base64.b64decode(values["operation"]))
        return cls(**{**values, "operation": operation})


@dataclasses.dataclass
class ScriptSeries:
    """Scripts shared by a source job and its forks; each execution takes the next, the last one repeats."""

    scripts: list[Script]
    position: int = 0

    def take(self) -> int:
        """Return the index of the next execution's script and advance the position."""
        number = min(self.position, len(self.scripts) - 1)
        self.position += 1
        return number

    def to_json(self) -> list[Any]:
        """Return the scripts as JSON values; the position is stored separately, since it changes often."""
        return [script.to_json() for script in self.scripts]

    @classmethod
    def from_json(cls, scripts: list[Any], position: int) -> ScriptSeries:
        """Restore from the values of :meth:`to_json`."""
        return cls([Script.from_json(script) for script in scripts], position)


@dataclasses.dataclass
class Project:
    """A DataSphere project.

    :param created_at: seconds since the epoch.
    """

    id: str
    name: str
    community_id: str
    created_at: float
    created_by_id: str
    description: str = ""
    unit_balance: int | None = None
