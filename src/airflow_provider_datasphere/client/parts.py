"""Files on their way: invisible until they are complete, hashed as they grow."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.http import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: How much of a local file may wait in memory for the disk (bytes).
WRITE_BEHIND_BYTES = 32 * 1024 * 1024
#: Local files from this size on (bytes) are hashed in a thread beside those that receive and write them.
HASH_ASIDE_BYTES = 8 * 1024 * 1024


class Part(ABC):
    """A file on its way: invisible until :meth:`commit`.

    :ivar size: how many bytes it has, from its beginning on without a gap.
    :ivar end: up to where chunks are wanted; None: to the file's end.
    """

    size: int = 0
    end: int | None = None

    @property
    def position(self) -> int:
        """Where the next chunk is to begin."""
        return self.size

    @abstractmethod
    def write(self, chunk: bytes) -> int:
        """Append all of ``chunk``; returns its length."""

    @abstractmethod
    def sha256(self, check_stop: Callable[[], None]) -> str:
        """Of its ``size`` bytes, in hexadecimal digits.

        :param check_stop: called now and then, as this may take long; what it raises ends it.
        """

    @abstractmethod
    def restart(self) -> None:
        """Forget what was written."""

    @abstractmethod
    def commit(self) -> None:
        """Give it its final name, at once and as a whole."""

    @abstractmethod
    def discard(self) -> None:
        """Leave no trace of it. Idempotent; does nothing after :meth:`commit`."""


class LocalPart(Part):
    """A file in ``file`` that gets the name that ``target`` gives; goes on from what a killed download left there.

    Its pieces may come in any order, from several threads (:meth:`write_at`). The sha256 of a large one follows behind
    them in a thread of its own, and takes them from where they were written to, the system's page cache: nothing
    queues in this process's memory.

    :param expected: bytes it will have.
    """

    def __init__(self, file: Path, target: Callable[[], Path], expected: int) -> None:
        self._file, self._target = file, target
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self._committed = self._closed = False
        self._lock = Lock()
        self.size = _size_without_gaps(self._handle)
        os.ftruncate(self._handle, self.size)
        self._beyond: dict[int, int] = {}  # of pieces behind a gap: where each ends, and where it begins
        self._handed_over = 0  # bytes from the start that the disk is already at
        self._hashing = Lock()
        self._sha256, self._hashed = hashlib.sha256(), 0
        self._buffer = memoryview(b"")
        self._grown = Event()
        self._follower: Thread | None = None
        if expected >= HASH_ASIDE_BYTES:
            self._follower = Thread(target=self._follow, name="datasphere-sha256", daemon=True)
            self._follower.start()

    def write(self, chunk: bytes) -> int:
        return self.write_at(chunk, self.size)

    def write_at(self, chunk: bytes, offset: int) -> int:
        """Put all of ``chunk`` at ``offset``, where nothing was put before; returns its length."""
        end, view = offset, memoryview(chunk)
        while view:
            written = os.pwrite(self._handle, view, end)
            end, view = end + written, view[written:]
        if self._follower is None and offset == self._hashed:
            self._sha256.update(chunk)
            self._hashed = end
        with self._lock:
            self._beyond[end] = self._beyond.pop(offset, offset)
            for piece_end, begin in sorted(self._beyond.items()):
                if begin == self.size:
                    self.size = piece_end
                    del self._beyond[piece_end]
            behind, size = self._handed_over, self.size
            if size - behind >= WRITE_BEHIND_BYTES:
                self._handed_over = size
        if self._handed_over == size > behind:
            _start_writing(self._handle, behind, size)
        self._grown.set()
        return len(chunk)

    def close_gaps(self) -> None:
        """Forget the pieces behind the first gap."""
        with self._lock:
            self._beyond.clear()
            os.ftruncate(self._handle, self.size)

    def sha256(self, check_stop: Callable[[], None]) -> str:
        while self._hash_on():
            check_stop()
        return self._sha256.hexdigest()

    def _hash_on(self) -> bool:
        """Take the next bytes into the hash; returns whether there were any."""
        with self._hashing:
            wanted = min(self.size - self._hashed, CHUNK_BYTES)
            if not wanted:
                return False
            self._buffer = self._buffer or memoryview(bytearray(CHUNK_BYTES))
            read = os.preadv(self._handle, [self._buffer[:wanted]], self._hashed)
            if not read:
                raise OSError(errno.EIO, "Somebody else shortened the file", str(self._file))
            self._sha256.update(self._buffer[:read])
            self._hashed += read
            return True

    def _follow(self) -> None:
        with suppress(OSError):  # sha256() meets it too
            while not self._closed:
                self._grown.wait()
                self._grown.clear()
                while not self._closed and self._hash_on():
                    pass

    def restart(self) -> None:
        with self._hashing, self._lock:
            self.size = self._hashed = self._handed_over = 0
            self._sha256 = hashlib.sha256()
            self._beyond.clear()
            os.ftruncate(self._handle, 0)

    def commit(self) -> None:
        os.fsync(self._handle)
        self._close()
        self._file.replace(self._target())
        self._committed = True

    def discard(self) -> None:
        self._close()
        if not self._committed:
            self._file.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._follower:
            self._grown.set()
            self._follower.join()
        os.close(self._handle)


def _size_without_gaps(handle: int) -> int:
    """Up to where a file can be trusted whose pieces came in any order, as far as its file system knows."""
    size = os.fstat(handle).st_size
    try:
        gap = os.lseek(handle, 0, os.SEEK_HOLE)
    except OSError:  # an empty file, or a file system that doesn't know
        return size
    # Gaps begin at a block's end: what precedes this one may end before it. What is taken wrongly fails the sha256.
    return size if gap >= size else max(0, gap - 1) // CHUNK_BYTES * CHUNK_BYTES


def _start_writing(handle: int, start: int, end: int) -> None:
    """Have the disk write while more comes from the network: at the end only the last bytes have to be waited for."""
    if sys.platform == "linux":
        # Of what isn't needed in memory any longer, Linux begins to write what is dirty, and doesn't wait for it.
        with suppress(OSError):
            os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_DONTNEED)
