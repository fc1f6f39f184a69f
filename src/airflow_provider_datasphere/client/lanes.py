"""One large file over several connections at once, where one alone is slow.

Storages often bound what a single connection brings; several together then bring several times as much.
"""

from __future__ import annotations

import time
from threading import Lock, Thread
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.http import StoppedError, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_provider_datasphere.client.parts import LocalPart

#: What a connection asks for at once (bytes).
PIECE_BYTES = 16 * 1024 * 1024
#: Connections to one file.
MAX_LANES = 4
#: A connection that is this fast gets no company: not it, but a processor or the network is what bounds the file
#: (bytes per second).
FAST = 200e6


class OneLaneError(TransferError):
    """The storage doesn't give out pieces of the file as expected: it has to be fetched in one."""


class Connections:
    """Counts the connections that a download uses. A context manager for the one that each file has. Thread-safe.

    :param limit: how many there may be before a file gets further ones.
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
        """Take a further one, to be released, if there is one."""
        with self._lock:
            spare = self._used < self._limit
            self._used += spare
            return spare

    def release(self) -> None:
        """Give one back."""
        with self._lock:
            self._used -= 1

    @property
    def exceeded(self) -> bool:
        """Whether further ones stand in the way of files that want their own."""
        return self._used > self._limit


class Piece:
    """The bytes of a file from ``position`` on to ``end`` (exclusive), which may come nearer."""

    def __init__(self, lanes: Lanes, position: int, end: int) -> None:
        self._lanes = lanes
        self.position, self.end = position, end
        self._measured, self._since = position, time.monotonic()

    def write(self, chunk: bytes) -> int:
        """Put the chunk at its place, but what is beyond the piece's end.

        :raises StoppedError: the file failed in another lane.
        """
        if self._lanes.failed:
            raise StoppedError("another connection failed")
        chunk = chunk[: self.end - self.position]
        self._lanes.part.write_at(chunk, self.position)
        self.position += len(chunk)
        came, now = self.position - self._measured, time.monotonic()
        if came >= PIECE_BYTES:
            if came < FAST * (now - self._since):
                self._lanes.widen(self)
            self._measured, self._since = self.position, now
        return len(chunk)

    def restart(self) -> None:
        """
        :raises OneLaneError: always.
        """
        raise OneLaneError("the storage ignores ranges, or its file has another size")


class Lanes:
    """Receives the rest of a file in pieces. The first lane is the caller's own thread.

    :param size: of the whole file.
    :param connections: where further ones come from.
    :param receive: brings one piece; tries again by itself.
    """

    def __init__(self, part: LocalPart, size: int, connections: Connections, receive: Callable[[Piece], None]) -> None:
        self.part = part
        self._size, self._connections, self._receive = size, connections, receive
        self._next = part.size
        self._lanes = 1
        self._error: BaseException | None = None
        self._threads: list[Thread] = []
        self._lock = Lock()

    @property
    def failed(self) -> bool:
        """Whether a lane met an error, which ends all."""
        return self._error is not None

    def run(self) -> None:
        """Receive all that is missing.

        :raises OneLaneError: pieces can't be had; what came without a gap is kept.
        :raises TransferError: as ``receive`` raises.
        """
        try:
            self._work(own=True)
            self._join()
        except BaseException as error:  # a timeout of the task, say, which knows nothing of threads
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
            while (own or not self._connections.exceeded) and (piece := self._take()):
                self._receive(piece)
        except BaseException as error:  # raised in the caller's thread
            self._fail(error)
        finally:
            if not own:
                self._connections.release()
                with self._lock:
                    self._lanes -= 1

    def _take(self) -> Piece | None:
        with self._lock:
            position = self._next
            if self.failed or position >= self._size:
                return None
            # Alone, a lane asks for all at once; each request costs an answer's delay.
            self._next = self._size if self._lanes == 1 else min(position + PIECE_BYTES, self._size)
            return Piece(self, position, self._next)

    def widen(self, piece: Piece) -> None:
        """Open as many lanes as there may be. They begin where ``piece`` ends, which is cut short for that."""
        with self._lock:
            last = piece.end == self._next
            begin = min(piece.position + PIECE_BYTES, self._next) if last else self._next
            wanted = min(MAX_LANES - self._lanes, -(-(self._size - begin) // PIECE_BYTES))
            while wanted > 0 and self._connections.take():
                wanted -= 1
                self._lanes += 1
                thread = Thread(target=self._work, args=(False,), name="datasphere-lane", daemon=True)
                thread.start()  # waits for the lock
                self._threads.append(thread)
                if last:
                    piece.end = self._next = begin
