"""Download of one file: streamed in bounded memory, resumed at its offset, checked against size and sha256."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import ResultsError
from airflow_provider_datasphere.client.http.errors import (
    StoppedError,
    TransferError,
    TransientTransferError,
    UrlRejectedError,
)
from airflow_provider_datasphere.client.http.exchange import STOP_SECONDS
from airflow_provider_datasphere.client.transfer.parallel_ranges import (
    MAX_CONNECTIONS_PER_FILE,
    ConnectionBudget,
    ParallelRangeDownload,
    RangesNotSupportedError,
)
from airflow_provider_datasphere.client.transfer.partial_file import LocalPartialFile, PartialFile
from airflow_provider_datasphere.client.transfer.presigned_url import PresignedUrl, recorded_size
from airflow_provider_datasphere.client.transfer.workers import Workers, wait_for

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.http.client import HttpClient
    from airflow_provider_datasphere.client.http.exchange import Stop
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.transfer.parallel_ranges import ByteRange

#: How often a file with wrong content is downloaded from its beginning.
WHOLE_TRIES = 3
#: A local file of which at least this much is missing is downloaded over several connections.
LARGE_BYTES = 64 * 1024 * 1024


class FileDownloader:
    """Downloads files. Thread-safe.

    :param stop: set from another thread to end all downloads.
    :param connections: limit for all files together. Each file has one; large files share the spare ones.
    """

    def __init__(
        self, http: HttpClient, stop: Event, logger: LoggerLike, connections: int = MAX_CONNECTIONS_PER_FILE
    ) -> None:
        self._http, self._stop, self._logger = http, stop, logger
        self._connections = ConnectionBudget(connections)
        self._lock = Lock()
        self._received = 0

    @property
    def received(self) -> int:
        """Bytes received so far, retransmitted ones included."""
        return self._received

    def fetch(self, link: PresignedUrl, part: PartialFile) -> None:
        """Fill ``part`` with the bytes of the URL's file. The caller commits or discards it.

        :raises TransferError: the download failed, after retries.
        :raises ResultsError: the content repeatedly differs from what the job recorded.
        """
        file, size = link.file, recorded_size(link.file)
        if size is None or (not file.sha256 and part.size >= size):
            # A request for no bytes is an error (HTTP 416), and the bytes there can't be verified.
            part.restart()
        with self._connections:
            for tries_left in reversed(range(WHOLE_TRIES)):
                if size is None or part.size < size or not file.sha256:
                    self._receive(link, part)
                wrong = _difference(file, part.size, part.sha256(self.check_stop))
                if wrong is None:
                    return
                if not tries_left:
                    raise ResultsError(wrong)
                self._logger.warning("%s: %s; re-downloading it.", file.desc.path, wrong)
                part.restart()

    def _receive(self, link: PresignedUrl, part: PartialFile) -> None:
        size = link.file.size_bytes  # 0: unknown
        if isinstance(part, LocalPartialFile) and link.file.sha256 and size - part.size >= LARGE_BYTES:
            try:
                ParallelRangeDownload(part, size, self._connections, partial(self._stream, link), self._stop).run()
            except RangesNotSupportedError as error:
                self._logger.debug("%s: downloading it in one request: %s.", link.file.desc.path, error)
            else:
                return
        self._stream(link, part, self._stop)

    def _stream(self, link: PresignedUrl, to: PartialFile | ByteRange, stop: Stop) -> None:
        file, received = link.file, 0
        # One byte more than recorded proves that it is another file.
        limit = file.size_bytes + 1 if file.sha256 and recorded_size(file) is not None else math.inf

        def attempt() -> None:
            nonlocal received
            self.check_stop()
            url = link.url
            try:
                with self._http.get(url, to.position, to.end, stop) as body:
                    as_asked = to.end is None or (body.ranged and body.total in (None, file.size_bytes))
                    if body.start != to.position or not as_asked:  # the storage ignored the range, say
                        to.restart()
                    for chunk in body.chunks():
                        self.check_stop()
                        link.mark_succeeded()
                        to.write(chunk)
                        received = max(received, to.position)
                        with self._lock:
                            self._received += len(chunk)
                        if to.position >= (to.end or limit):
                            return
            except UrlRejectedError as error:
                link.mark_rejected(url, error)
            if to.end is not None and to.position < to.end:
                raise TransientTransferError("the storage sent fewer bytes than requested")

        def note(error: TransientTransferError, delay: float) -> None:
            self._logger.warning(
                "%s: %s; retrying from byte %d of %d in %.1f s.",
                file.desc.path,
                error,
                to.position,
                file.size_bytes,
                delay,
            )

        self._http.retry(attempt, stop, lambda: received, note)

    def check_stop(self) -> None:
        """
        :raises StoppedError: the transfer was stopped.
        """
        if self._stop.is_set():
            raise StoppedError("the download was stopped")


def download_file(
    client: JobApi, job_id: str, file: jobs_pb2.File, target: Path, stop: Event, logger: LoggerLike
) -> None:
    """Download one file of a job to ``target`` and verify it; the archive of a directory stays packed.

    :param stop: set from another thread to end it.
    :raises ResultsError: the download failed, or the content differs from what the job recorded.
    """

    def fetch() -> None:
        part = LocalPartialFile(target.with_name(f"{target.name}.part"), lambda: target, file.size_bytes)
        try:
            FileDownloader(client.http, stop, logger).fetch(PresignedUrl(client, job_id, file), part)
            part.commit()
        finally:
            # In this thread: it has stopped writing.
            part.discard()

    try:
        with Workers(1, "datasphere-fetch") as workers:
            pending = {workers.submit(fetch)}
            try:
                while pending:
                    done, pending = wait_for(pending, STOP_SECONDS, stop)
            except BaseException:  # such as a task timeout, raised in this thread only
                stop.set()
                raise
            done.pop().result()
    except TransferError as error:
        raise ResultsError(f"{file.desc.path!r} of job {job_id} failed to download: {error}.") from error
    except ResultsError as error:
        raise ResultsError(f"{file.desc.path!r} of job {job_id} is damaged: {error}.") from error


def _difference(file: jobs_pb2.File, size: int, sha256: str) -> str | None:
    if recorded_size(file) not in (None, size):
        return f"{size} bytes received, the job records {file.size_bytes}"
    if file.sha256 and sha256 != file.sha256.lower():  # some log files have none
        return f"its sha256 is {sha256}, the job records {file.sha256}"
    return None
