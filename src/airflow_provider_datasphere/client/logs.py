"""A job's log, from chunks of bytes to lines, and when to go on reading it. Pure; does no I/O.

ReadLogs may end at any time, cleanly or not, and may split lines and characters anywhere (FACTS of the service:
its own SDK prepares for both ways). Nothing may be lost, and nothing about logs may fail a job.
"""

from __future__ import annotations

import codecs
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.waiting import TRANSIENT

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2

STDOUT, STDERR, SYSTEM, PROGRESS = "stdout", "stderr", "system", "progress"
#: A line longer than this is cut in pieces, so that a program that never ends its line can't fill the memory.
MAX_LINE_CHARACTERS = 32_768
#: How long the tail of an ended job's log is waited for while nothing comes, seconds.
DRAIN_WINDOW = 60.0
#: How long an ended job's log must be silent before it counts as complete where that is in doubt, seconds.
SETTLE_WINDOW = 5.0
#: A stream that ended cleanly so long before its job was not at the log's end, seconds.
EARLY_END = 2.0

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


class _Progress:
    """Tells which progress lines are new. Two sources tell the same: the log all of it, and late; the operation only
    what a poll happens to see, and early. Two threads bring them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged: deque[str] = deque(maxlen=100)
        self._told_early: deque[str] = deque(maxlen=100)

    def from_operation(self, text: str) -> bool:
        with self._lock:
            news = text not in self._told_early and text not in self._logged
            if news:
                self._told_early.append(text)
            return news

    def from_log(self, text: str) -> bool:
        with self._lock:
            changed = not self._logged or text != self._logged[-1]
            if changed:
                self._logged.append(text)
            if text in self._told_early:
                self._told_early.remove(text)
                return False
            return changed


class LogDecoder:
    """Chunks of several streams in, whole lines out; system and progress lines once per change."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._last_system_line = ""
        self._progress = _Progress()

    def feed(self, messages: Iterable[project_job_service_pb2.LogMessage]) -> Iterator[LogLine]:
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
        text = f"{percent} % {message}".rstrip()
        if self._progress.from_operation(text):
            yield LogLine(PROGRESS, text)

    def _lines(self, name: str, lines: Iterator[str]) -> Iterator[LogLine]:
        for line in lines:
            if name == PROGRESS:
                line = _progress_text(line)
                if not line or not self._progress.from_log(line):
                    continue
            elif name == SYSTEM:
                if not line or line == self._last_system_line:
                    continue
                self._last_system_line = line
            yield LogLine(name, line)


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
        self._from_start = offset == 0
        self._last_message_at = clock()
        self._received_bytes = 0
        self._messages = 0
        self._messages_at_open = 0
        self._opened_after_end = False
        self._ended_cleanly_at: float | None = None
        self._ended_at: float | None = None
        self._expected_bytes = 0
        self._doubt = False
        self._failures = 0

    def opened(self) -> None:
        self._messages_at_open = self._messages
        self._opened_after_end = self._ended_at is not None

    def received(self, response: project_job_service_pb2.ReadProjectJobLogsResponse) -> Iterator[LogLine]:
        """The lines that an answer completes. They must all be taken: the offset counts them as delivered."""
        self._failures = 0
        self.trouble = None
        received = sum(len(message.content) for message in response.logs)
        if received and response.offset != self.offset:
            # Empty answers, and what was told already, are no sign that more is to come.
            self._messages += 1
            self._last_message_at = self._clock()
            self._received_bytes += received
        self.offset = response.offset or self.offset
        return self.decoder.feed(response.logs)

    def job_ended(self, logged_bytes: int = 0) -> None:
        """The job is over.

        :param logged_bytes: size of its log files, where the service tells; what is missing is waited for.
        """
        if self._ended_at is not None:
            return
        self._ended_at = self._clock()
        self._expected_bytes = logged_bytes if self._from_start else 0
        if self._ended_cleanly_at is not None and self._ended_at - self._ended_cleanly_at > EARLY_END:
            # The job ran on after a clean end, so the next clean end needn't be the log's end either.
            self._doubt = True

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
            return self._broke(code, details)
        if self._ended_at is None:
            # The service may end the stream while the job runs. Ask again, less and less often while nothing comes.
            self._ended_cleanly_at = self._ended_cleanly_at or self._clock()
            self._failures = 0 if news else self._failures + 1
            return min(5.0, 0.1 * 2.0 ** min(self._failures, 6))
        if not self._opened_after_end:
            return 0.0  # read once more from here, now that everything has been written
        if news:
            # The last stream had ended before the end of the log: this service does that, so trust silence only.
            self._doubt = True
            return 0.0
        silent_for = self._clock() - max(self._ended_at, self._last_message_at)
        if (self._doubt or self._received_bytes < self._expected_bytes) and silent_for < SETTLE_WINDOW:
            return 0.5
        self.trouble = None
        return None

    def _broke(self, code: str, details: str) -> float | None:
        self._doubt = True
        self._failures += 1
        self.trouble = f"{code}: {details}" if details else code
        refused = code not in TRANSIENT  # which isn't healed by asking often; the rest may be a passing break
        if self._ended_at is None:
            return min(15.0 if refused else 5.0, 0.1 * 2.0 ** min(self._failures, 8))
        if self.overdue or (refused and self._failures > 2):
            return None
        return min(2.0, 0.1 * 2.0 ** min(self._failures, 6))
