"""Open files of a job: an output file, and a file in the archive of a directory output."""

from __future__ import annotations

import errno
import hashlib
import io
import lzma
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

from fsspec.spec import AbstractBufferedFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_provider_datasphere.client.transfer.archive import Member
    from airflow_provider_datasphere.filesystems.datasphere import DataSphereFileSystem

#: What zipfile raises for invalid or damaged archives.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)


class MemberFile(io.RawIOBase):
    """A file in a directory's archive; damage is raised as OSError."""

    def __init__(self, archive: zipfile.ZipFile, member: Member, path: str) -> None:
        self._path = path
        self._file: Any = None
        self._file = self._checked(archive.open, member.name)

    def _checked(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except DAMAGED as error:
            raise OSError(errno.EIO, f"It is damaged in its directory's archive: {error}", self._path) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._checked(self._file.seek, offset, whence))

    def readinto(self, buffer: Any) -> int:
        return int(self._checked(self._file.readinto, buffer))

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


class OutputFile(AbstractBufferedFile):  # type: ignore[misc]
    def __init__(self, fs: DataSphereFileSystem, path: str, reader: Any, **options: Any) -> None:
        super().__init__(fs, path, mode="rb", **options)
        self._reader = reader
        self._sha256 = hashlib.sha256()
        self._hashed = 0

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = bytes(self._reader.fetch(start, min(end, self.size)))
        if start <= self._hashed < start + len(data):
            self._sha256.update(data[self._hashed - start :])
            self._hashed = start + len(data)
            expected = self._reader.file.sha256.lower()
            if self._hashed == self.size and expected and self._sha256.hexdigest() != expected:
                raise OSError(
                    errno.EIO, f"Its sha256 is {self._sha256.hexdigest()}, the job records {expected}", self.path
                )
        return data
