"""Download of one large file by parallel HTTP range requests.

Storages often limit the throughput of a single connection; several connections get several times as much.
"""

from __future__ import annotations

import time
from threading import Lock, Thread
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.http.errors import StoppedError, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_provider_datasphere.client.http.exchange import Stop
    from airflow_provider_datasphere.client.transfer.partial_file import LocalPartialFile

#: Size of one range request.
RANGE_BYTES = 16 * 1024 * 1024
#: Limit of connections to one file.
MAX_CONNECTIONS_PER_FILE = 4
#: A single connection that is this fast is enough: the processor or the network limits it, not the storage.
FAST_ENOUGH_BYTES_PER_SECOND = 200e6


class RangesNotSupportedError(TransferError):
    """The storage doesn't answer range requests as expected: the file must be fetched in one request."""


class ConnectionBudget:
    """Counts the connections that a download uses. A context manager for the one that each file has. Thread-safe.

    :param limit: connections at most, besides the one that each file has.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._lock = Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._used += 1

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> bool:
        """Take an additional connection, to be released, if there is one left."""
        with self._lock:
            spare = self._used < self._limit
            self._used += spare
            return spare

    def release(self) -> None:
        """Return a connection."""
        with self._lock:
            self._used -= 1

    @property
    def exceeded(self) -> bool:
        """Whether additional connections take those of files that have none yet."""
        return self._used > self._limit


class ByteRange:
    """The bytes of a file from ``position`` to ``end`` (exclusive), which may be moved closer."""

    def __init__(self, download: ParallelRangeDownload, position: int, end: int) -> None:
        self._download = download
        self.position, self.end = position, end
        self._measured, self._since = position, time.monotonic()

    def write(self, chunk: bytes) -> int:
        """Write the chunk at its offset, without what lies beyond the range.

        :raises StoppedError: another connection to the file failed.
        """
        if self._download.failed:
            raise StoppedError("another connection failed")
        chunk = chunk[: self.end - self.position]
        self._download.part.write_at(chunk, self.position)
        self.position += len(chunk)
        came, now = self.position - self._measured, time.monotonic()
        if came >= RANGE_BYTES:
            if came < FAST_ENOUGH_BYTES_PER_SECOND * (now - self._since):
                self._download.add_workers(self)
            self._measured, self._since = self.position, now
        return len(chunk)

    def restart(self) -> None:
        """
        :raises RangesNotSupportedError: always.
        """
        raise RangesNotSupportedError("the storage ignores ranges, or its file has another size")


class ParallelRangeDownload:
    """Downloads the rest of a file in byte ranges. The first worker is the caller's own thread.

    :param size: of the whole file.
    :param connections: the budget that further workers come from.
    :param receive: downloads one byte range, with retries; ends when :meth:`is_set`.
    :param stop: set from another thread to end the download.
    """

    def __init__(
        self,
        part: LocalPartialFile,
        size: int,
        connections: ConnectionBudget,
        receive: Callable[[ByteRange, Stop], None],
        stop: Stop,
    ) -> None:
        self.part, self._stop = part, stop
        self._size, self._connections, self._receive = size, connections, receive
        self._next = part.size
        self._workers = 1
        self._error: BaseException | None = None
        self._threads: list[Thread] = []
        self._lock = Lock()

    @property
    def failed(self) -> bool:
        """Whether a worker failed, which ends all."""
        return self._error is not None

    def is_set(self) -> bool:
        """Whether workers must end: another one failed, or the download was stopped."""
        return self.failed or self._stop.is_set()

    def run(self) -> None:
        """Download all that is missing.

        :raises RangesNotSupportedError: the storage doesn't support ranges; what came without a gap is kept.
        :raises TransferError: as ``receive`` raises.
        """
        try:
            self._work(own=True)
            self._join()
        except BaseException as error:  # such as a task timeout, raised in this thread only
            self._fail(error)
            self._join()
        self.part.close_gaps()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        for thread in self._threads:  # grows as long as one of them works
            thread.join()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error

    def _work(self, own: bool) -> None:
        try:
            while (own or not self._connections.exceeded) and (byte_range := self._take()):
                self._receive(byte_range, self)
        except BaseException as error:  # raised in the caller's thread
            self._fail(error)
        finally:
            if not own:
                self._connections.release()
                with self._lock:
                    self._workers -= 1

    def _take(self) -> ByteRange | None:
        with self._lock:
            position = self._next
            if self.failed or position >= self._size:
                return None
            # A single worker requests all at once: each request costs a round trip.
            self._next = self._size if self._workers == 1 else min(position + RANGE_BYTES, self._size)
            return ByteRange(self, position, self._next)

    def add_workers(self, byte_range: ByteRange) -> None:
        """Start as many workers as allowed. They begin at the end of ``byte_range``, which is shortened for that."""
        with self._lock:
            is_last = byte_range.end == self._next
            begin = min(byte_range.position + RANGE_BYTES, self._next) if is_last else self._next
            wanted = min(MAX_CONNECTIONS_PER_FILE - self._workers, -(-(self._size - begin) // RANGE_BYTES))
            while wanted > 0 and self._connections.take():
                wanted -= 1
                self._workers += 1
                thread = Thread(target=self._work, args=(False,), name="datasphere-range", daemon=True)
                thread.start()  # waits for the lock
                self._threads.append(thread)
                if is_last:
                    byte_range.end = self._next = begin
