"""A job's log, from chunks of bytes to lines, and when to go on reading it. Pure; does no I/O.

ReadLogs may end at any time, cleanly or not, and may split lines and characters anywhere (FACTS of the service:
its own SDK prepares for both ways). Nothing may be lost, and nothing about logs may fail a job.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2

STDOUT, STDERR, SYSTEM, PROGRESS = "stdout", "stderr", "system", "progress"
#: A line longer than this is cut in pieces, so that a program that never ends its line can't fill the memory.
MAX_LINE_CHARACTERS = 32_768
#: How long the tail of an ended job's log is waited for while nothing comes, seconds.
DRAIN_WINDOW = 30.0
#: How long an ended job's log must be silent before it counts as complete where that is in doubt, seconds.
SETTLE_WINDOW = 3.0

_REFUSED = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED", "NOT_FOUND"})
_FILES = {".system.log": SYSTEM, "job_progress.jsonl": PROGRESS}
#: Samples of CPU, memory and GPU: for graphs, not for a log. They can be downloaded with_diagnostics=True.
_NOT_SHOWN = frozenset({".docker_stats.tsv", ".gpu_stats.tsv"})


@dataclass(frozen=True)
class LogLine:
    """One line of one stream: stdout, stderr, system, progress, or the path of a log file that the job writes."""

    stream: str
    text: str

    def __str__(self) -> str:
        return self.text if self.stream in (STDOUT, PROGRESS) else f"[{self.stream}] {self.text}"


class _Stream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
        self._rest = ""

    def feed(self, content: bytes, *, final: bool = False) -> Iterator[str]:
        text = self._rest + self._decoder.decode(content, final)
        *lines, self._rest = text.split("\n")
        while len(self._rest) > MAX_LINE_CHARACTERS:
            lines.append(self._rest[:MAX_LINE_CHARACTERS])
            self._rest = self._rest[MAX_LINE_CHARACTERS:]
        if final and self._rest:
            lines.append(self._rest)
            self._rest = ""
        for line in lines:
            line = line.removesuffix("\r")
            for start in range(0, max(len(line), 1), MAX_LINE_CHARACTERS):
                yield line[start : start + MAX_LINE_CHARACTERS]


class LogDecoder:
    """Chunks of several streams in, whole lines out; system and progress lines once per change."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._last: dict[str, str] = {}

    def feed(self, messages: Iterator[project_job_service_pb2.LogMessage]) -> Iterator[LogLine]:
        """Lines that ``messages`` complete."""
        for message in messages:
            name = _stream_name(message)
            if name is not None:
                yield from self._lines(name, self._streams.setdefault(name, _Stream()).feed(message.content))

    def flush(self) -> Iterator[LogLine]:
        """What stands after the last line break of each stream, at the very end."""
        for name, stream in self._streams.items():
            yield from self._lines(name, stream.feed(b"", final=True))

    def progress(self, percent: int, message: str) -> Iterator[LogLine]:
        """The progress that the operation shows; said once per change, whichever way it came."""
        yield from self._once(PROGRESS, f"{percent} % {message}".rstrip())

    def _lines(self, name: str, lines: Iterator[str]) -> Iterator[LogLine]:
        for line in lines:
            if name == PROGRESS:
                yield from self._once(name, _progress_text(line))
            elif name == SYSTEM:
                yield from self._once(name, line)
            else:
                yield LogLine(name, line)

    def _once(self, name: str, text: str) -> Iterator[LogLine]:
        if text and self._last.get(name) != text:
            self._last[name] = text
            yield LogLine(name, text)


def _stream_name(message: project_job_service_pb2.LogMessage) -> str | None:
    if message.HasField("standard_stream"):
        return STDERR if message.standard_stream == 2 else STDOUT
    if message.file_path in _NOT_SHOWN:
        return None
    return _FILES.get(message.file_path, message.file_path or STDOUT)


def _progress_text(line: str) -> str:
    """``{"progress": 37, "message": "…"}`` as ``37 % …``; what isn't that shape stays as it is."""
    try:
        point = json.loads(line)
        return f"{int(point['progress'])} % {point.get('message') or ''}".rstrip()
    except (ValueError, TypeError, KeyError, AttributeError):
        return line.strip()


class LogTail:
    """Where the reader of one job's log stands: the offset, and whether and when to open the stream again.

    :param offset: where to begin: 0 is the start, else an offset that the service gave.
    """

    def __init__(self, *, offset: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.offset = offset
        self.decoder = LogDecoder()
        #: Why the log may be incomplete; ``None`` while there is no doubt.
        self.trouble: str | None = None
        self._clock = clock
        self._last_message_at = clock()
        self._messages = 0
        self._messages_at_open = 0
        self._opened_after_end = False
        self._ended_at: float | None = None
        self._doubt = False
        self._failures = 0

    def opened(self) -> None:
        self._messages_at_open = self._messages
        self._opened_after_end = self._ended_at is not None

    def received(self, response: project_job_service_pb2.ReadProjectJobLogsResponse) -> Iterator[LogLine]:
        self._messages += 1
        self._failures = 0
        self.trouble = None
        self._last_message_at = self._clock()
        yield from self.decoder.feed(iter(response.logs))
        # Only now: whoever stops in the middle of a response goes on before it, not behind it.
        self.offset = response.offset

    def job_ended(self) -> None:
        if self._ended_at is None:
            self._ended_at = self._clock()

    @property
    def overdue(self) -> bool:
        """The job is over and the open stream has been silent for too long."""
        if self._ended_at is None:
            return False
        return self._clock() - max(self._ended_at, self._last_message_at) > DRAIN_WINDOW

    def closed(self, code: str | None, details: str = "") -> float | None:
        """The stream ended: cleanly (``None``) or with a gRPC status code name.

        :return: seconds until it should be opened again; ``None``: the log is complete, or given up with
            :attr:`trouble` set.
        """
        news = self._messages > self._messages_at_open
        if code is not None:
            self._doubt = True
            self._failures += 1
            self.trouble = f"{code}: {details}" if details else code
            refused = code in _REFUSED
            if self._ended_at is not None:
                given_up = self.overdue or (refused and self._failures > 2)
                return None if given_up else min(2.0, 0.1 * 2.0 ** min(self._failures, 6))
            # A refusal isn't healed by asking often; anything else may be a passing break.
            return 15.0 if refused else min(5.0, 0.2 * 2.0 ** min(self._failures, 6))
        if self._ended_at is None:
            # The service may end the stream while the job runs. Ask again, less and less often while nothing comes.
            self._failures = 0 if news else self._failures + 1
            return min(5.0, 0.1 * 2.0 ** min(self._failures, 6))
        if not self._opened_after_end:
            return 0.0  # read once more from here, now that everything has been written
        if news:
            # The last stream had ended before the end of the log: this service does that, so trust silence only.
            self._doubt = True
            return 0.0
        silent_for = self._clock() - max(self._ended_at, self._last_message_at)
        if (self._doubt or not self._messages) and silent_for < SETTLE_WINDOW:
            return 0.5
        self.trouble = None
        return None
