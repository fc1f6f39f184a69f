"""Partial files: hidden until complete, hashed incrementally."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.http.client import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: How many bytes of a local file may be dirty before writeback is started.
WRITE_BEHIND_BYTES = 32 * 1024 * 1024
#: Local files of at least this size are hashed in a background thread.
BACKGROUND_HASH_BYTES = 8 * 1024 * 1024
#: A local partial file of at least this size is kept for the next download when this one fails.
KEEP_BYTES = 8 * 1024 * 1024


class PartialFile(ABC):
    """A file that is being downloaded: hidden until :meth:`commit`.

    :ivar size: bytes from its beginning without a gap.
    :ivar end: offset up to which chunks are wanted; None: to the file's end.
    """

    size: int = 0
    end: int | None = None

    @property
    def position(self) -> int:
        """Offset of the next chunk."""
        return self.size

    @abstractmethod
    def write(self, chunk: bytes) -> int:
        """Append all of ``chunk``; return its length."""

    @abstractmethod
    def sha256(self, check_stop: Callable[[], None]) -> str:
        """Return the sha256 of its ``size`` bytes, in hexadecimal digits.

        :param check_stop: called repeatedly, as this may take long; what it raises ends it.
        """

    @abstractmethod
    def restart(self) -> None:
        """Discard what was written, to begin again."""

    @abstractmethod
    def commit(self, check: Callable[[], None] = lambda: None) -> None:
        """Give it its final name, atomically.

        :param check: called just before that; what it raises prevents it.
        """

    def keep(self) -> None:
        """Make :meth:`discard` keep it for a later download, if it is local and large enough."""
        return

    @abstractmethod
    def discard(self) -> None:
        """Remove it, unless :meth:`keep` was called. Idempotent; does nothing after :meth:`commit`."""


class LocalPartialFile(PartialFile):
    """A partial file on this machine; resumes what a killed download left in it.

    Chunks may be written in any order, from several threads (:meth:`write_at`). A background thread hashes a large
    file: it reads the bytes back from the page cache, so that nothing queues in this process's memory.

    :param file: path of the partial file.
    :param target: returns the final path.
    :param expected: size in bytes of the complete file.
    :param exclusively: makes the context in which the file is renamed.
    """

    def __init__(
        self,
        file: Path,
        target: Callable[[], Path],
        expected: int,
        exclusively: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._file, self._target, self._exclusively = file, target, exclusively
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self._committed = self._closed = self._keep = False
        self._lock = Lock()
        if os.fstat(self._handle).st_size:
            self.size = _size_without_gaps(self._handle)
            os.ftruncate(self._handle, self.size)
        self._out_of_order: dict[int, int] = {}  # chunks behind a gap: end -> begin
        self._writeback_end = 0  # writeback has been started up to this offset
        self._hashing = Lock()
        self._sha256, self._hashed = hashlib.sha256(), 0
        self._buffer = memoryview(b"")
        self._grown = Event()
        self._hasher: Thread | None = None
        if expected >= BACKGROUND_HASH_BYTES:
            self._hasher = Thread(target=self._hash_in_background, name="datasphere-sha256", daemon=True)
            self._hasher.start()

    def write(self, chunk: bytes) -> int:
        return self.write_at(chunk, self.size)

    def write_at(self, chunk: bytes, offset: int) -> int:
        """Write all of ``chunk`` at ``offset``, where nothing was written before; return its length."""
        end, view = offset, memoryview(chunk)
        while view:
            written = os.pwrite(self._handle, view, end)
            end, view = end + written, view[written:]
        if self._hasher is None and offset == self._hashed:
            self._sha256.update(chunk)
            self._hashed = end
        with self._lock:
            self._out_of_order[end] = self._out_of_order.pop(offset, offset)
            for piece_end, begin in sorted(self._out_of_order.items()):
                if begin == self.size:
                    self.size = piece_end
                    del self._out_of_order[piece_end]
            behind, size = self._writeback_end, self.size
            if size - behind >= WRITE_BEHIND_BYTES:
                self._writeback_end = size
        if self._writeback_end == size > behind:
            _start_writeback(self._handle, behind, size)
        self._grown.set()
        return len(chunk)

    def close_gaps(self) -> None:
        """Discard the chunks behind the first gap."""
        with self._lock:
            self._out_of_order.clear()
            os.ftruncate(self._handle, self.size)

    def sha256(self, check_stop: Callable[[], None]) -> str:
        while self._hash_on():
            check_stop()
        return self._sha256.hexdigest()

    def _hash_on(self) -> bool:
        """Hash the next bytes; return whether there were any."""
        with self._hashing:
            wanted = min(self.size - self._hashed, CHUNK_BYTES)
            if not wanted:
                return False
            self._buffer = self._buffer or memoryview(bytearray(CHUNK_BYTES))
            read = os.preadv(self._handle, [self._buffer[:wanted]], self._hashed)
            if not read:
                raise OSError(errno.EIO, "The file was truncated by another process", str(self._file))
            self._sha256.update(self._buffer[:read])
            self._hashed += read
            return True

    def _hash_in_background(self) -> None:
        with suppress(OSError):  # sha256() raises it again
            while not self._closed:
                self._grown.wait()
                self._grown.clear()
                while not self._closed and self._hash_on():
                    pass

    def restart(self) -> None:
        with self._hashing, self._lock:
            self.size = self._hashed = self._writeback_end = 0
            self._sha256 = hashlib.sha256()
            self._out_of_order.clear()
            os.ftruncate(self._handle, 0)

    def commit(self, check: Callable[[], None] = lambda: None) -> None:
        os.fsync(self._handle)
        self._close()
        with self._exclusively():
            check()
            self._file.replace(self._target())
        self._committed = True

    def keep(self) -> None:
        self._keep = self.size >= KEEP_BYTES

    def discard(self) -> None:
        if not self._closed:
            self.close_gaps()
        self._close()
        if not (self._committed or self._keep):
            self._file.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._hasher:
            self._grown.set()
            self._hasher.join()
        os.close(self._handle)


def _size_without_gaps(handle: int) -> int:
    """Return the size up to the first hole of a file whose chunks came in any order, if its file system knows holes."""
    size = os.fstat(handle).st_size
    try:
        gap = os.lseek(handle, 0, os.SEEK_HOLE)
    except OSError:  # an empty file, or a file system that doesn't know
        return size
    # Holes begin at a block's end: the data may end before it. A wrong guess fails the sha256.
    return size if gap >= size else max(0, gap - 1) // CHUNK_BYTES * CHUNK_BYTES


def _start_writeback(handle: int, start: int, end: int) -> None:
    """Start writing to the disk while more is received: the final fsync then waits for the last bytes only."""
    if sys.platform == "linux":
        # Linux starts writeback of dirty pages that aren't needed any more, without waiting for it.
        with suppress(OSError):
            os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_DONTNEED)
