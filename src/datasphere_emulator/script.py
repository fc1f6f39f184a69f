"""Scripted jobs: a job that acts a part instead of running a program."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_LINE = 100


@dataclasses.dataclass
class LogLine:
    """Something a scripted job prints.

    :param at: seconds after the start of EXECUTING.
    :param text: what is printed, as it is (end it with a newline yourself). Bytes are taken too, valid UTF-8 or not.
    :param stream: ``stdout``, ``stderr``, or the path of a log file (``.system.log``, ``logs/train.log``).
    """

    at: float
    text: str
    stream: str = "stdout"

    def __post_init__(self) -> None:
        if isinstance(self.text, bytes):
            self.text = self.text.decode("utf-8", "surrogateescape")


@dataclasses.dataclass
class Progress:
    """A progress message of a scripted job.

    :param at: seconds after the start of EXECUTING.
    :param progress: 0..100.
    :param message: for people.
    """

    at: float
    progress: int
    message: str = ""


@dataclasses.dataclass
class ScriptedOutput:
    """An output file that a scripted job makes: pseudo-random bytes, or given text, or a directory.

    :param size: bytes of a file.
    :param seed: equal seed, size and output (var, else path) give equal bytes.
    :param text: the file's content, in place of random bytes.
    :param directory: makes it a directory: relative path -> size in bytes of each file in it.
    """

    size: int = 16
    seed: int = 0
    text: str | None = None
    directory: dict[str, int] | None = None


@dataclasses.dataclass
class Script:
    """The part a scripted job acts. All times are in seconds.

    :param preparing_seconds: time in PREPARING.
    :param executing_seconds: time in EXECUTING; at least until the last thing that happens in it.
    :param uploading_seconds: time in UPLOADING_OUTPUT.
    :param log: what it prints, and when. A plain string is a line on stdout at time 0.
    :param burst_bytes: prints so many bytes of 100-byte lines at once. They are made while they are read.
    :param burst_at: when, after the start of EXECUTING.
    :param burst_stream: where to, as ``LogLine.stream``.
    :param outputs: declared output path or var -> what it makes there. A number is a size in bytes, a string the
        content. Declared outputs named neither here nor below become files of 16 bytes.
    :param missing_outputs: paths or vars of declared outputs that the program doesn't make (NOT_FOUND).
    :param failed_uploads: paths or vars of declared outputs whose upload fails (UPLOAD_FAILED).
    :param return_code: of the program.
    :param error: ends the operation with this error instead of a result: gRPC code (name or number) and message.
    :param error_in: status in which that error happens: PREPARING (as when there is no capacity) or EXECUTING.
    :param error_ahead_seconds: the operation shows its error so long before it is done.
    :param status_details: the job's status details at the end.
    :param statuses: raw status numbers, known or not, and when after the start of EXECUTING the job shows them.
    :param final_status: raw status number at the end, in place of the right one.
    :param progress: progress messages, and when.
    :param never_ends: stays in EXECUTING until it is cancelled.
    :param graceful_seconds: how long after a graceful cancel's signal it ends; None: not until it is killed.
    """

    preparing_seconds: float = 0.0
    executing_seconds: float = 0.0
    uploading_seconds: float = 0.0
    log: list[LogLine] = dataclasses.field(default_factory=list)
    burst_bytes: int = 0
    burst_at: float = 0.0
    burst_stream: str = "stdout"
    outputs: dict[str, ScriptedOutput] = dataclasses.field(default_factory=dict)
    missing_outputs: list[str] = dataclasses.field(default_factory=list)
    failed_uploads: list[str] = dataclasses.field(default_factory=list)
    return_code: int = 0
    error: tuple[int | str, str] | None = None
    error_in: str = "EXECUTING"
    error_ahead_seconds: float = 0.0
    status_details: str = ""
    statuses: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    final_status: int | None = None
    progress: list[Progress] = dataclasses.field(default_factory=list)
    never_ends: bool = False
    graceful_seconds: float | None = 0.0

    def __post_init__(self) -> None:
        log: list[Any] = self.log
        self.log = [LogLine(0.0, f"{line}\n") if isinstance(line, str) else _build(LogLine, line) for line in log]
        outputs: dict[str, Any] = self.outputs
        self.outputs = {name: _output(value) for name, value in outputs.items()}
        progress: list[Any] = self.progress
        self.progress = [_build(Progress, point) for point in progress]
        self.statuses = [(float(at), int(number)) for at, number in self.statuses]
        if self.error_in not in ("PREPARING", "EXECUTING"):
            raise ValueError(f"error_in={self.error_in!r}: must be PREPARING or EXECUTING.")
        if self.error is not None:
            self.error = (self.error[0], self.error[1])

    @property
    def least_executing_seconds(self) -> float:
        """How long EXECUTING lasts, given all that happens in it."""
        moments = [line.at for line in self.log]
        moments += [point.at for point in self.progress]
        moments += [at for at, _ in self.statuses]
        if self.burst_bytes:
            moments.append(self.burst_at)
        return max([self.executing_seconds, *moments])

    def to_json(self) -> dict[str, Any]:
        """The script as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Script:
        """The opposite of :meth:`to_json`; fields left out keep their defaults.

        :raises ValueError: a field that a script doesn't have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"Script has no field {', '.join(unknown)}. Fields: {', '.join(sorted(known))}.")
        return cls(**values)


_Kind = typing.TypeVar("_Kind", LogLine, Progress, ScriptedOutput)


def _build(kind: type[_Kind], value: Any) -> _Kind:
    return value if isinstance(value, kind) else kind(**value)


def _output(value: Any) -> ScriptedOutput:
    if isinstance(value, int):
        return ScriptedOutput(size=value)
    if isinstance(value, str):
        return ScriptedOutput(text=value)
    if isinstance(value, bytes):
        return ScriptedOutput(text=value.decode("utf-8", "surrogateescape"))
    return _build(ScriptedOutput, value)


def burst_bytes(start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a burst: numbered lines of 100 bytes."""
    first, last = start // _LINE, (stop + _LINE - 1) // _LINE
    lines = b"".join(b"burst line %012d %s\n" % (number, b"." * (_LINE - 25)) for number in range(first, last))
    return lines[start - first * _LINE : stop - first * _LINE]
