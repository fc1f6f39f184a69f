"""Object stores (any fsspec file system) as the destination of downloaded files."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_provider_datasphere.client.archive import copy_member
from airflow_provider_datasphere.client.destinations import Destination
from airflow_provider_datasphere.client.parts import Part

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Callable
    from pathlib import PurePosixPath

    from fsspec import AbstractFileSystem

    from airflow_provider_datasphere.client.archive import Listing

# Below this, S3 refuses parts of a multipart upload; above it, each file in flight costs that much memory.
_PART_BYTES = 5 * 1024 * 1024
_MAX_PARTS = 9000
# A file of these stores appears when it is closed, as a whole; on all others it appears when it is opened.
_SHOWN_WHEN_CLOSED = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "wasb"})


class StoreFolder(Destination):
    """A folder of an fsspec file system: S3, GCS, Azure and so on.

    Where a file appears only when it is closed (object stores) it is written in place and closed once it is checked;
    elsewhere it is written under another name and moved.

    :param root: its path there, without the protocol.
    :param uri: gives the address of a path below the root.
    :param name: begins the names of temporary files.
    """

    # Each open file holds a part, copies of it that are being sent, and what is being written: about 18 MiB.
    max_parallel = 3

    def __init__(self, fs: AbstractFileSystem, root: str, uri: Callable[[PurePosixPath], str], name: str) -> None:
        self._fs, self._root, self._uri, self._name = fs, root.rstrip("/"), uri, name
        self._scratch = tempfile.TemporaryDirectory(prefix="datasphere-results-")
        self.scratch = Path(self._scratch.name)

    def __enter__(self) -> StoreFolder:
        self._fs.invalidate_cache()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._scratch.cleanup()

    def _path(self, path: PurePosixPath) -> str:
        return f"{self._root}/{path}"

    def size_of(self, path: PurePosixPath) -> int | None:
        try:
            found = self._fs.info(self._path(path))
        except FileNotFoundError:
            return None
        return found["size"] if found["type"] == "file" else None

    def read(self, path: PurePosixPath) -> BinaryIO:
        stream: BinaryIO = self._fs.open(self._path(path), "rb", block_size=_PART_BYTES)
        return stream

    def part(self, path: PurePosixPath, key: str, size: int) -> Part:
        return _StorePart(self._fs, self._path(path), f"{self._root}/{self._name}-{key}.part", size)

    def unpack(self, archive: zipfile.ZipFile, listing: Listing, path: PurePosixPath) -> None:
        for member in listing.files:
            place = path / member.path
            if self._same_member(place, member):
                continue
            part = self.part(place, hashlib.sha256(str(place).encode()).hexdigest()[:16], member.size_bytes)
            try:
                copy_member(archive, member, part)
                part.commit()
            finally:
                part.discard()

    def has_folder(self, path: PurePosixPath) -> bool:
        return bool(self._fs.isdir(self._path(path)))

    def uri(self, path: PurePosixPath) -> str:
        return self._uri(path)


class _StorePart(Part):
    def __init__(self, fs: AbstractFileSystem, path: str, temporary: str, expected: int) -> None:
        self._fs, self._path = fs, path
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._in_place = bool(protocols & _SHOWN_WHEN_CLOSED)
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

    def commit(self) -> None:
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
            # Closing would make visible what there is; the collector would do that too.
            stream.closed = True
        else:
            with suppress(Exception):
                stream.close()
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._written_to)
