"""What the emulator remembers of jobs, operations and projects, and how it is stored."""

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
    """Write seconds since the epoch into a protobuf timestamp, to the microsecond."""
    timestamp.FromMicroseconds(round(seconds * 1e6))


def get_time(timestamp: Timestamp) -> float:
    """Seconds since the epoch."""
    return float(timestamp.ToMicroseconds() / 1e6)


def _encode(message: Message) -> str:
    return base64.b64encode(message.SerializeToString()).decode()


@dataclasses.dataclass
class Cancel:
    """A cancel that was asked for.

    :param requested_at: seconds since the epoch.
    """

    reason: str
    graceful: bool
    requested_at: float


@dataclasses.dataclass
class JobRecord:
    """A job and what only the service knows of it.

    :param job: as Job.Get answers it.
    :param sequence: number in the order of creation.
    :param creation_id: its Create's or Clone's operation.
    :param operation_id: operation of its execution, "" before Execute.
    :param executions: how often it was really started.
    :param execute_time: when it was, seconds since the epoch.
    :param active: whether an execution is going on (the status alone can't tell: scripts show unknown numbers).
    :param series_id: the scripts that it and its forks act, "" for a real program.
    :param script_number: which of them its execution acts.
    :param script: that one.
    :param script_position: how many of that script's events have happened.
    :param cancel: what was asked last, None if nobody did.
    :param progress: last progress message.
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

    @property
    def id(self) -> str:
        """The job's id."""
        return str(self.job.id)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dict(vars(self))
        values["job"] = _encode(self.job)
        del values["script"]  # found again by its number
        values["cancel"] = dataclasses.asdict(self.cancel) if self.cancel else None
        values["progress"] = _encode(self.progress) if self.progress else None
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JobRecord:
        """The opposite of :meth:`to_json`."""
        values = dict(values)
        values["job"] = jobs_pb2.Job.FromString(base64.b64decode(values["job"]))
        values["cancel"] = Cancel(**values["cancel"]) if values["cancel"] else None
        if values["progress"]:
            values["progress"] = jobs_pb2.JobProgress.FromString(base64.b64decode(values["progress"]))
        return cls(**values)


@dataclasses.dataclass
class OperationRecord:
    """An operation.

    :param operation: as it is answered once it is done; while it runs, metadata of an execution are made anew.
    :param kind: ``create``, ``clone``, ``execute``, ``delete``, ``delete_data`` or ``delete_all_data``.
    :param project_id: whose role decides who may see it.
    :param job_id: its job, "" for none.
    :param ready_at: when a creation is done, seconds since the epoch.
    :param ended_at: when it ended, seconds since the epoch, None while it runs.
    :param forgotten: OperationService no longer knows it.
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
        """Plain JSON values."""
        return {**vars(self), "operation": _encode(self.operation)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> OperationRecord:
        """The opposite of :meth:`to_json`."""
        operation = operation_pb2.Operation.FromString(base64.b64decode(values["operation"]))
        return cls(**{**values, "operation": operation})


@dataclasses.dataclass
class ScriptSeries:
    """Scripts shared by a source job and its forks; each execution takes the next, the last one repeats."""

    scripts: list[Script]
    position: int = 0

    def take(self) -> int:
        """Number of the next execution's script."""
        number = min(self.position, len(self.scripts) - 1)
        self.position += 1
        return number

    def to_json(self) -> list[Any]:
        """The scripts as plain JSON values; the position is stored apart, as it changes all the time."""
        return [script.to_json() for script in self.scripts]

    @classmethod
    def from_json(cls, scripts: list[Any], position: int) -> ScriptSeries:
        """The opposite of :meth:`to_json`."""
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
