"""What a wait itself logs: changes of the job's status, progress, failed polls, and why the wait takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.model import status_name
from airflow_provider_datasphere.client.monitoring.logs import LAG_WINDOW, LogLine, LogTail
from airflow_provider_datasphere.client.monitoring.outcome import execute_metadata

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2
    from yandex.cloud.operation import operation_pb2

    from airflow_provider_datasphere.client.logger import LoggerLike

Emit = Callable[[LogLine], None]
#: How long after the job's end a wait that still reads the log says so, seconds.
DRAIN_NOTICE_SECONDS = 8.0
INCOMPLETE = "The log above may be incomplete: failed to read its end (%s). It can be downloaded from the job's page."


class StatusLogger:
    """Logs what changes between polls: the job's status and progress, and failures of the poll, once each.

    :param tail: the job's log, which has progress lines too.
    :param emit: gets progress lines, and the state of progress bars that no chunk of the log brings; ``None``: none.
    """

    __slots__ = ("_emit", "_failure", "_logger", "_status", "_tail")

    def __init__(self, logger: LoggerLike, tail: LogTail | None = None, emit: Emit | None = None) -> None:
        self._logger = logger
        self._tail = tail
        self._emit = emit
        self._status: int | None = None
        self._failure: str | None = None

    def operation(self, operation: operation_pb2.Operation) -> None:
        """Log what a poll of the Execute operation shows."""
        metadata = execute_metadata(operation)
        self._log_status(metadata.metadata.status or metadata.job.status)
        if self._tail is not None and self._emit is not None and metadata.HasField("progress"):
            for line in self._tail.decoder.progress(metadata.progress.progress, metadata.progress.message):
                self._emit(line)
        self._emit_idle_bars()

    def job(self, job: jobs_pb2.Job) -> None:
        """Log what a poll of the job shows."""
        self._log_status(job.status)
        self._emit_idle_bars()

    def failed(self, method: str, code: str, details: str) -> None:
        """Log a failed poll, unless the one before failed with the same code."""
        if code != self._failure:
            self._failure = code
            reason = (details or "no details").rstrip(".")
            self._logger.warning("%s failed: %s: %s; retrying.", method, code, reason)

    def _log_status(self, status: int) -> None:
        if self._failure is not None:
            self._logger.info("Polling of the job works again.")
            self._failure = None
        if status and status != self._status:
            self._status = status
            self._logger.info("Job status: %s", status_name(status))

    def _emit_idle_bars(self) -> None:
        # No chunk of the log brings the last state of a progress bar that has stopped; a poll does.
        if self._tail is not None and self._emit is not None:
            for line in self._tail.decoder.idle_bars():
                self._emit(line)


class DrainNotice:
    """Logs once why the task still waits although its job has ended."""

    def __init__(self, tail: LogTail, logger: LoggerLike) -> None:
        self._tail = tail
        self._logger = logger
        self._started_at = time.monotonic()
        self._logged = False

    def log_once(self) -> None:
        """Log the notice if it is due."""
        if not self._logged and time.monotonic() - self._started_at >= DRAIN_NOTICE_SECONDS:
            self._logged = True
            self._logger.info(
                "The job has ended; waiting for the rest of its log, up to %.0f minutes without a new line%s.",
                LAG_WINDOW / 60,
                f" ({self._tail.missing})" if self._tail.missing else "",
            )


def log_first_error_only(emit: Emit, logger: LoggerLike) -> Emit:
    """Wrap ``emit`` so that it never raises and logs only its first error: the log is read on."""
    logged = False

    def safely(line: LogLine) -> None:
        nonlocal logged
        try:
            emit(line)
        except Exception as error:
            if not logged:
                logged = True
                logger.warning("Failed to write lines of the job's log: %s: %s", type(error).__name__, error)

    return safely
