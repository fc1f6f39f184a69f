"""Object stores (any fsspec file system) as the destination of downloads."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_provider_datasphere.client.transfer.archive import copy_member
from airflow_provider_datasphere.client.transfer.local_destination import Destination, ExistingFile
from airflow_provider_datasphere.client.transfer.partial_file import PartialFile

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Callable
    from pathlib import PurePosixPath

    from fsspec import AbstractFileSystem

    from airflow_provider_datasphere.client.transfer.archive import Listing

# The minimum of S3 for parts of a multipart upload. Each file in flight costs that much memory.
_PART_BYTES = 5 * 1024 * 1024
_MAX_PARTS = 9000
# In these stores a file becomes visible when it is closed, atomically; in all others when it is opened.
_ATOMIC_ON_CLOSE_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "wasb"})


class ObjectStoreDestination(Destination):
    """A folder of an fsspec file system: S3, GCS, Azure and so on.

    Where a file becomes visible only when it is closed (object stores), it is written in place and closed after it was
    verified; elsewhere it is written under a temporary name and moved.

    :param root: path in the file system, without the protocol.
    :param uri: returns the URI of a path below the root.
    :param name: prefix of temporary file names.
    :param missing: returns what is missing of the root, such as its bucket, as a sentence; None: nothing.
    """

    # Each open file holds a part, copies of it that are being sent, and the next chunks: about 18 MiB.
    max_parallel = 3

    def __init__(
        self,
        fs: AbstractFileSystem,
        root: str,
        uri: Callable[[PurePosixPath], str],
        name: str,
        missing: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._missing = missing
        self._fs, self._root, self._uri, self._name = fs, root.rstrip("/"), uri, name
        self._scratch = tempfile.TemporaryDirectory(prefix="datasphere-results-")
        self.scratch = Path(self._scratch.name)

    def __enter__(self) -> ObjectStoreDestination:
        self._fs.invalidate_cache()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._scratch.cleanup()

    def _path(self, path: PurePosixPath) -> str:
        return f"{self._root}/{path}"

    def find(self, path: PurePosixPath) -> ExistingFile | None:
        try:
            found = self._fs.info(self._path(path))
        except FileNotFoundError:
            return None
        return ExistingFile(found["size"], _modified(found)) if found["type"] == "file" else None

    def missing(self) -> str | None:
        return self._missing()

    def read(self, path: PurePosixPath) -> BinaryIO:
        stream: BinaryIO = self._fs.open(self._path(path), "rb", block_size=_PART_BYTES)
        return stream

    def partial_file(self, path: PurePosixPath, key: str, size: int) -> PartialFile:
        return _ObjectStorePartialFile(self._fs, self._path(path), f"{self._root}/{self._name}-{key}.part", size)

    def unpack(
        self, archive: zipfile.ZipFile, listing: Listing, path: PurePosixPath, check: Callable[[], None]
    ) -> None:
        check()
        for member in listing.files:
            place = path / member.path
            if self.has_member(place, member):
                continue
            part = self.partial_file(place, hashlib.sha256(str(place).encode()).hexdigest()[:16], member.size_bytes)
            try:
                copy_member(archive, member, part, self.check_stop)
                part.commit()
            finally:
                part.discard()

    def has_folder(self, path: PurePosixPath) -> bool:
        return bool(self._fs.isdir(self._path(path)))

    def uri(self, path: PurePosixPath) -> str:
        return self._uri(path)


class _ObjectStorePartialFile(PartialFile):
    def __init__(self, fs: AbstractFileSystem, path: str, temporary: str, expected: int) -> None:
        self._fs, self._path = fs, path
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._in_place = bool(protocols & _ATOMIC_ON_CLOSE_PROTOCOLS)
        self._written_to = path if self._in_place else temporary
        self._options = {"block_size": max(_PART_BYTES, -(-expected // _MAX_PARTS))} if self._in_place else {}
        self._stream: Any = None
        self._sha256 = hashlib.sha256()
        self._committed = False

    def write(self, chunk: bytes) -> int:
        if self._stream is None:
            self._open()
        self._stream.write(chunk)
        self._sha256.update(chunk)
        self.size += len(chunk)
        return len(chunk)

    def sha256(self, check_stop: Callable[[], None]) -> str:
        return self._sha256.hexdigest()

    def _open(self) -> None:
        if not self._in_place:
            for path in (self._path, self._written_to):
                self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        self._stream = self._fs.open(self._written_to, "wb", **self._options)

    def restart(self) -> None:
        self._abandon()
        self.size, self._sha256 = 0, hashlib.sha256()

    def commit(self, check: Callable[[], None] = lambda: None) -> None:
        check()
        if self._stream is None:
            self._open()
        self._stream.close()
        if not self._in_place:
            try:
                self._fs.mv(self._written_to, self._path)
            except OSError:
                if not self._fs.isfile(self._path):
                    raise
                self._fs.rm_file(self._path)
                self._fs.mv(self._written_to, self._path)
        self._committed = True

    def discard(self) -> None:
        if not self._committed:
            self._abandon()

    def _abandon(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if self._in_place:
            if stream.offset is not None:  # a multipart upload has begun
                with suppress(Exception):
                    stream.discard()
            # Closing would make the incomplete file visible, and so would the garbage collector.
            stream.closed = True
        else:
            with suppress(Exception):
                stream.close()
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._written_to)


def _modified(info: dict[str, Any]) -> float | None:
    """Return when an object was written. Each file system has its own key for it."""
    for name in ("LastModified", "last_modified", "updated", "mtime"):
        value = info.get(name)
        if isinstance(value, str):
            with suppress(ValueError):
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None
