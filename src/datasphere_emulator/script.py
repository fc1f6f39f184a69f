"""Scripts: what a scripted job does instead of running a program."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

from datasphere_emulator.control_fields import check_kind, check_names, wrong

if TYPE_CHECKING:
    from collections.abc import Mapping

_LINE = 100


@dataclasses.dataclass
class LogLine:
    """Output of a scripted job.

    :param at: seconds after the start of EXECUTING.
    :param text: output, written unchanged: a newline must be included. May be bytes, also invalid UTF-8.
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
    :param message: text of the message.
    """

    at: float
    progress: int
    message: str = ""


@dataclasses.dataclass
class ScriptedOutput:
    """An output file of a scripted job: pseudo-random bytes, a text, or a directory.

    :param size: size of the file, bytes.
    :param seed: equal seed, size and output (var, else path) give equal bytes.
    :param text: content of the file instead of random bytes.
    :param directory: makes the output a directory: relative path -> size of each file, bytes.
    """

    size: int = 16
    seed: int = 0
    text: str | None = None
    directory: dict[str, int] | None = None


@dataclasses.dataclass
class Script:
    """What a scripted job does. All times are in seconds.

    :param preparing_seconds: time in PREPARING.
    :param executing_seconds: time in EXECUTING; extended to the last event in it.
    :param uploading_seconds: time in UPLOADING_OUTPUT.
    :param log: log lines. A plain string is a line on stdout at time 0.
    :param burst_bytes: size of a burst of 100-byte log lines, bytes; generated while it is read.
    :param burst_at: time of the burst after the start of EXECUTING.
    :param burst_stream: stream of the burst, as ``LogLine.stream``.
    :param outputs: path or var of a declared output -> its content. A number is a size in bytes, a string the text.
        Declared outputs named neither here nor below become files of 16 bytes.
    :param missing_outputs: paths or vars of declared outputs that the program doesn't write (NOT_FOUND).
    :param failed_uploads: paths or vars of declared outputs whose upload fails (UPLOAD_FAILED).
    :param return_code: return code of the program.
    :param error: error of the operation instead of a result: gRPC code (name or number) and message.
    :param error_in: status in which that error happens: PREPARING (as without capacity) or EXECUTING.
    :param error_ahead_seconds: how long before it is done the operation shows its error.
    :param status_details: the job's final status details.
    :param statuses: pairs of time after the start of EXECUTING and status number, which may be an unknown one.
    :param final_status: final status number instead of the regular one.
    :param progress: progress messages.
    :param never_ends: stays in EXECUTING until it is cancelled.
    :param graceful_seconds: time to its end after the signal of a graceful cancel; None: it ignores the signal.
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
        """Time in EXECUTING, seconds, including all events."""
        moments = [line.at for line in self.log]
        moments += [point.at for point in self.progress]
        moments += [at for at, _ in self.statuses]
        if self.burst_bytes:
            moments.append(self.burst_at)
        return max([self.executing_seconds, *moments])

    def to_json(self) -> dict[str, Any]:
        """Return the script as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Script:
        """Restore from the values of :meth:`to_json`; omitted fields have their defaults.

        :raises ValueError: a field is unknown.
        :raises TypeError: a field is of the wrong type.
        """
        known = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"Script has no field {', '.join(unknown)}. Fields: {', '.join(sorted(known))}.")
        for name, value in values.items():
            check_kind(f"script: {name}", value, known[name])
            if known[name].startswith("list") and not isinstance(value, list):
                raise wrong(f"script: {name}", value, "a list")
            if known[name].startswith("dict") and not isinstance(value, dict):
                raise wrong(f"script: {name}", value, "a mapping")
        try:
            return cls(**values)
        except TypeError as error:
            raise TypeError(f"script: {error}") from None


_Kind = typing.TypeVar("_Kind", LogLine, Progress, ScriptedOutput)


def _build(kind: type[_Kind], value: Any) -> _Kind:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise wrong(kind.__name__, value, "a mapping")
    check_names(value, [field.name for field in dataclasses.fields(kind)])
    return kind(**value)


def _output(value: Any) -> ScriptedOutput:
    if isinstance(value, int):
        return ScriptedOutput(size=value)
    if isinstance(value, str):
        return ScriptedOutput(text=value)
    if isinstance(value, bytes):
        return ScriptedOutput(text=value.decode("utf-8", "surrogateescape"))
    return _build(ScriptedOutput, value)


def burst_bytes(start: int, stop: int) -> bytes:
    """Return bytes ``start`` to ``stop`` of a burst: numbered lines of 100 bytes."""
    first, last = start // _LINE, (stop + _LINE - 1) // _LINE
    lines = b"".join(b"burst line %012d %s\n" % (number, b"." * (_LINE - 25)) for number in range(first, last))
    return lines[start - first * _LINE : stop - first * _LINE]
