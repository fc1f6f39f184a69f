"""A job's log: from chunks of bytes to lines, and when to reopen the stream. Pure: no I/O.

ReadLogs may end at any time, cleanly or not, and may split lines and characters anywhere. No line may be lost, and no
error of the log may fail a job.
"""

from __future__ import annotations

import enum
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2

from airflow_provider_datasphere.client.monitoring.lines import LineSplitter
from airflow_provider_datasphere.client.monitoring.rpc_call import RpcCall
from airflow_provider_datasphere.client.rpc import TRANSIENT

STDOUT, STDERR, SYSTEM, PROGRESS = "stdout", "stderr", "system", "progress"
#: Said about the log by this package.
NOTICE = "notice"
#: Deadline of one log stream, seconds; reading continues in a new one.
STREAM_DEADLINE = 3600.0
#: How long the rest of an ended job's log is waited for while the service can't be reached, or while a stream stays
#: open although the log is complete, seconds.
DRAIN_WINDOW = 60.0
#: The same while the service can be reached: its logs may be minutes late, seconds.
LAG_WINDOW = 180.0
#: A stream that failed after this time had reached the service; gateways cut silent ones, seconds.
_REACHED_SECONDS = 10.0
#: How often the log is read from its beginning while lines are missing, seconds.
RECOUNT_SECONDS = 30.0
#: How long an ended job's log must be silent to count as complete where its end is uncertain, seconds.
SILENCE_SECONDS = 5.0
#: A stream that ended cleanly this long before its job hadn't reached the end of the log, seconds.
EARLY_END = 2.0

REPEATED = (
    "The log above is incomplete: DataSphere returned only a part of it while the job ran. The complete log follows "
    "from its beginning; lines from above are repeated."
)

_FILES = {".system.log": SYSTEM, "job_progress.jsonl": PROGRESS}
#: Samples of CPU, memory and GPU: for graphs, not for a log. with_diagnostics=True downloads them.
_NOT_SHOWN = frozenset({".docker_stats.tsv", ".gpu_stats.tsv"})


@dataclass(frozen=True)
class LogLine:
    """One line of one stream: stdout, stderr, system, progress, notice, or the path of a log file of the job."""

    stream: str
    text: str

    def __str__(self) -> str:
        return self.text if self.stream in (STDOUT, PROGRESS, NOTICE) else f"[{self.stream}] {self.text}"


class _Progress:
    """Deduplicates progress lines. They have two sources: the log has all of them, late; the operation only those that
    a poll happens to see, early. Each source has its own thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged: deque[str] = deque(maxlen=100)
        self._shown_early: deque[str] = deque(maxlen=100)

    def from_operation(self, text: str) -> bool:
        with self._lock:
            news = text not in self._shown_early and text not in self._logged
            if news:
                self._shown_early.append(text)
            return news

    def from_log(self, text: str) -> bool:
        with self._lock:
            changed = not self._logged or text != self._logged[-1]
            if changed:
                self._logged.append(text)
            if text in self._shown_early:
                self._shown_early.remove(text)
                return False
            return changed


class LogDecoder:
    """Decodes chunks of several streams into lines; system and progress lines once per change.

    One thread feeds it; another one may call :meth:`progress` and :meth:`idle_bars` meanwhile.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._streams: dict[str, LineSplitter] = {}
        self._last_system_line = ""
        self._progress = _Progress()

    def feed(self, messages: Iterable[project_job_service_pb2.LogMessage]) -> Iterator[LogLine]:
        """Yield the lines that ``messages`` complete."""
        for message in messages:
            name = _stream_name(message)
            if name is None:
                continue
            # A list, so that no line is emitted while the lock is held.
            with self._lock:
                if name not in self._streams:
                    self._streams[name] = LineSplitter(self._clock)
                lines = [*self._lines(name, self._streams[name].feed(message.content))]
            yield from lines

    def flush(self) -> Iterator[LogLine]:
        """Yield what follows the last line break of each stream, at the end of the log."""
        with self._lock:
            lines = [
                line
                for name, stream in self._streams.items()
                for line in self._lines(name, stream.feed(b"", final=True))
            ]
        yield from lines

    def idle_bars(self) -> Iterator[LogLine]:
        """Yield the last state of each progress bar that has stopped, unless it was shown."""
        with self._lock:
            lines = [line for name, stream in self._streams.items() for line in self._lines(name, stream.idle_bar())]
        yield from lines

    def progress(self, percent: int, message: str) -> Iterator[LogLine]:
        """Yield the progress that the operation shows, once per change, whatever its source."""
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
    """Format ``{"progress": 37, "message": "…"}`` as ``37 % …``; a line of another shape stays as it is."""
    try:
        point = json.loads(line)
        return f"{int(point['progress'])} % {point.get('message') or ''}".rstrip()
    except (ValueError, TypeError, KeyError, AttributeError):
        return line.strip()


class _Phase(enum.Enum):
    """What the current stream is read for."""

    LINES = "lines"
    #: To count, after the job's end, the bytes of the log from its beginning.
    COUNT = "count"
    #: To read once more from where the lines ended, since the count is higher: the log may have grown meanwhile.
    REREAD = "reread"


class LogTail:
    """The state of reading one job's log: the offset, and whether and when to open the stream again.

    The service may show only the newest lines of a running job, and the complete log after its end. So after the end
    the log is checked for missing lines; if there are some, all of it is read once more, after a notice.

    :param job_id: the job whose log is read, from its beginning.
    """

    def __init__(self, job_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.offset = 0
        self._job_id = job_id
        self.decoder = LogDecoder(clock)
        #: Why the log may be incomplete; ``None``: no reason is known.
        self.incomplete_reason: str | None = None
        self._clock = clock
        self._opened_at = self._reached_at = self._last_message_at = clock()
        self._received = _ByteCount()
        self._messages = 0
        self._messages_at_open = 0
        self._opened_after_end = False
        self._ended_cleanly_at: float | None = None
        self._ended_at: float | None = None
        self._expected_bytes = 0
        self._end_uncertain = False
        self._failures = 0
        self._phase = _Phase.LINES
        self._counted = _ByteCount()
        self._counts = 0
        self._counted_at: float | None = None
        self._lines_end = (0, 0.0)
        self._read_from_start = False
        self._restarts = False

    def open(self) -> RpcCall:
        """Return the stream to open now; its responses go to :meth:`received`, its end to :meth:`closed`."""
        self._opened_at = self._clock()
        self._messages_at_open = self._messages
        self._opened_after_end = self._ended_at is not None
        if self._opened_after_end and self.offset == 0 and self._phase is _Phase.LINES:
            self._read_from_start = True  # to the end, so a count can't find more
        request = project_job_service_pb2.ReadProjectJobLogsRequest(job_id=self._job_id, offset=self.offset)
        return RpcCall("jobs", "ReadLogs", request, STREAM_DEADLINE)

    def received(self, response: project_job_service_pb2.ReadProjectJobLogsResponse) -> Iterator[LogLine]:
        """Return the lines that a response completes. The caller must take them all: the offset is past them."""
        self._failures = 0
        self.incomplete_reason = None
        self._reached_at = self._clock()
        counting = self._phase is _Phase.COUNT
        if response.offset != self.offset and any(message.content for message in response.logs):
            # Empty responses and repeated ones are no sign of more lines to come.
            self._messages += 1
            self._last_message_at = self._clock()
            (self._counted if counting else self._received).add(response.logs)
        self.offset = response.offset or self.offset
        if counting:
            return iter(())
        return self._lines(response.logs)

    def _lines(self, messages: Iterable[project_job_service_pb2.LogMessage]) -> Iterator[LogLine]:
        if self._restarts:
            self._restarts = False
            decoder, self.decoder = self.decoder, LogDecoder(self._clock)
            yield from decoder.flush()
            yield LogLine(NOTICE, REPEATED)
        yield from self.decoder.feed(messages)

    def job_ended(self, logged_bytes: int = 0) -> None:
        """Note that the job is over.

        :param logged_bytes: the size of its stdout and stderr, 0 where the service doesn't say; missing bytes are
            waited for.
        """
        if self._ended_at is not None:
            return
        self._ended_at = self._clock()
        self._expected_bytes = logged_bytes
        if self._ended_cleanly_at is not None and self._ended_at - self._ended_cleanly_at > EARLY_END:
            # The job still ran after a clean end, so the next clean end may not be the log's end either.
            self._end_uncertain = True

    @property
    def overdue(self) -> bool:
        """Whether the job is over and the open stream has been silent for too long."""
        return self._ended_at is not None and self._silent_for > (DRAIN_WINDOW if self._is_complete else LAG_WINDOW)

    @property
    def missing(self) -> str | None:
        """What is known to be missing of the ended job's log, for people; ``None``: nothing."""
        if self._ended_at is None or self._received.printed >= self._expected_bytes:
            return None
        return f"{self._received.printed} of {self._expected_bytes} bytes received"

    def closed(self, code: str | None, details: str = "") -> float | None:
        """Note that the stream has ended.

        :param code: the gRPC status code's name; ``None``: it ended cleanly.
        :return: seconds until it should be opened again; ``None``: the log is complete, or given up with
            :attr:`incomplete_reason` set.
        """
        news = self._messages > self._messages_at_open
        if code is not None:
            return self._stream_failed(code, details)
        self._reached_at = self._clock()
        if self._ended_at is None:
            # The service may end the stream while the job runs. Back off while it is empty.
            self._ended_cleanly_at = self._ended_cleanly_at or self._clock()
            self._failures = 0 if news else self._failures + 1
            return min(5.0, 0.1 * 2.0 ** min(self._failures, 6))
        if not self._opened_after_end:
            return 0.0  # read on from here, now that the log has been written
        if self._phase is _Phase.COUNT:
            return self._count_ended(news)
        if news:
            # The last stream had ended before the log's end: this service does that, so only silence counts.
            self._end_uncertain = True
            return 0.0
        if self._phase is _Phase.REREAD:
            return self._reread_ended()
        if not self._is_complete and (self._end_uncertain or self.missing) and self._silent_for < SILENCE_SECONDS:
            return 0.5
        if self._needs_count:
            return self._start_count()
        if self.missing and self._silent_for < LAG_WINDOW:
            return 5.0
        self.incomplete_reason = self.missing
        return None

    @property
    def _silent_for(self) -> float:
        return self._clock() - max(self._ended_at or 0.0, self._last_message_at)

    @property
    def _is_complete(self) -> bool:
        """Whether all that the program printed is known to have been received."""
        return 0 < self._expected_bytes <= self._received.printed

    @property
    def _needs_count(self) -> bool:
        # An offset of 0: nothing was received yet, not even from the beginning.
        if self._read_from_start or self._is_complete or self.offset == 0:
            return False
        if self._counted_at is None:
            return True
        return self.missing is not None and self._clock() - self._counted_at > RECOUNT_SECONDS

    def _start_count(self) -> float:
        self._phase, self._counted, self._counts = _Phase.COUNT, _ByteCount(), 0
        self._lines_end, self.offset = (self.offset, self._last_message_at), 0
        return 0.0

    def _count_ended(self, news: bool) -> float | None:
        if news and self._counted.shown <= self._received.shown:
            self._counts = 0
            return 0.0
        if self._counted.shown < self._received.shown and self._counts < 4:
            # The stream ended before the log's end: more bytes than that were received before.
            self._counts += 1
            return 0.5
        self._counted_at = self._clock()
        self.offset, self._last_message_at = self._lines_end
        if self._counted.shown > self._received.shown:
            self._phase = _Phase.REREAD
            return 0.0
        self._phase = _Phase.LINES
        return 0.0 if self.missing else None

    def _reread_ended(self) -> float:
        self._phase = _Phase.LINES
        if self._counted.shown > self._received.shown:
            self._restarts = self._read_from_start = True
            self._received, self.offset = _ByteCount(), 0
        return 0.0

    def _stream_failed(self, code: str, details: str) -> float | None:
        self._end_uncertain = True
        self._failures += 1
        self.incomplete_reason = f"{code}: {details}" if details else code
        permanent = code not in TRANSIENT
        now = self._clock()
        if now - self._opened_at >= _REACHED_SECONDS:
            self._reached_at = now
        if self._ended_at is None:
            return min(15.0 if permanent else 5.0, 0.1 * 2.0 ** min(self._failures, 8))
        unreachable = now - max(self._ended_at, self._reached_at) > DRAIN_WINDOW
        if unreachable or self.overdue or (permanent and self._failures > 2):
            return None
        return min(2.0, 0.1 * 2.0 ** min(self._failures, 6))


class _ByteCount:
    """Counts received bytes: of the streams that are shown, and of those that the program printed."""

    def __init__(self) -> None:
        self.shown = 0
        self.printed = 0

    def add(self, messages: Iterable[project_job_service_pb2.LogMessage]) -> None:
        for message in messages:
            name = _stream_name(message)
            self.shown += len(message.content) if name is not None else 0
            self.printed += len(message.content) if name in (STDOUT, STDERR) else 0
