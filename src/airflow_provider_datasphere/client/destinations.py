"""Where downloaded files go; here a local folder. Nothing unchecked gets its final name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_provider_datasphere.client.archive import COPY_BYTES, Listing, Member, copy_member
from airflow_provider_datasphere.client.errors import ResultsError
from airflow_provider_datasphere.client.parts import LocalPart, Part

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Collection

log = logging.getLogger(__name__)


class Destination(ABC):
    """A place for files; use it as a context manager. Its methods may be called from several threads.

    :ivar max_parallel: how many files it can take at once within bounded memory; None for any number.
    :ivar scratch: a local folder for the time of the download.
    """

    max_parallel: int | None = None
    scratch: Path

    @abstractmethod
    def __enter__(self) -> Destination: ...

    @abstractmethod
    def __exit__(self, *exc_info: object) -> None: ...

    @abstractmethod
    def size_of(self, path: PurePosixPath) -> int | None:
        """Bytes of the file that is there, None where there is none."""

    @abstractmethod
    def has_folder(self, path: PurePosixPath) -> bool:
        """Whether there is a folder."""

    @abstractmethod
    def read(self, path: PurePosixPath) -> BinaryIO: ...

    @abstractmethod
    def part(self, path: PurePosixPath, key: str, size: int) -> Part:
        """Begin a file.

        :param key: the same for the same content at the same place.
        :param size: expected bytes.
        """

    @abstractmethod
    def unpack(self, archive: zipfile.ZipFile, listing: Listing, path: PurePosixPath) -> None:
        """Put an archive's files below ``path``; files that are right already stay as they are."""

    @abstractmethod
    def uri(self, path: PurePosixPath) -> str:
        """The address of a file there, for the manifest."""

    def has(self, path: PurePosixPath, size: int, sha256: str) -> bool:
        """Whether exactly this content is there, as far as that can be seen."""
        return bool(sha256) and self._is_same(path, size, sha256.lower(), hashlib.sha256())

    def has_all(self, path: PurePosixPath, listing: Listing) -> bool:
        """Whether exactly these files are below ``path`` (others may be there too)."""
        return self.has_folder(path) and all(self._same_member(path / member.path, member) for member in listing.files)

    def _same_member(self, path: PurePosixPath, member: Member) -> bool:
        return self._is_same(path, member.size_bytes, f"{member.crc:08x}", _Crc32())

    def _is_same(self, path: PurePosixPath, size: int, expected: str, digest: Any) -> bool:
        try:
            if self.size_of(path) != size:
                return False
            with self.read(path) as stream:
                while chunk := stream.read(COPY_BYTES):
                    digest.update(chunk)
        except OSError as error:
            # Who may write somewhere needn't have the right to look there. S3 even forbids looking for what isn't there
            # to those who may not list the bucket.
            log.debug("Can't compare what is at %s: %s", path, error)
            return False
        return bool(digest.hexdigest() == expected)


class LocalFolder(Destination):
    """A folder on this machine.

    What isn't checked yet lies in one hidden folder in it, which ends with the download. After a ``kill -9`` the next
    download of the same job finds it, goes on with what is there and removes it.

    :param root: made if it isn't there.
    :param name: of the hidden folder, the same for each download of a job.
    :param reserved: names in ``root`` that the job's own files need.
    """

    def __init__(self, root: Path, name: str, reserved: Collection[str] = ()) -> None:
        self.root = root.absolute()
        while name in reserved:
            name += "_"
        self._name, self._reserved = name, frozenset(reserved)
        self._stack = ExitStack()
        self._inside: set[Path] = set()
        self._changed: set[Path] = set()

    def __enter__(self) -> LocalFolder:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.scratch = self._lock_scratch()
        except OSError as error:
            self._stack.close()
            raise ResultsError(f"The destination {self.root} can't be written: {error.strerror}.") from error
        self._remove_leftovers()
        return self

    def _lock_scratch(self) -> Path:
        # A killed process loses its lock; a living one (a try that is believed dead) keeps its folder for itself.
        for name in (self._name, *(f"{self._name}-{secrets.token_hex(4)}" for _ in range(3))):
            folder = self.root / name
            folder.mkdir(exist_ok=True)
            if self._locked(folder):
                break
        else:  # a file system without locks: nobody else has this name
            folder.mkdir(exist_ok=True)
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _locked(self, folder: Path) -> bool:
        """Whether this process has the folder for itself now; never on a file system that has no locks."""
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            return False  # its owner has just ended
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), folder.stat()):
                self._stack.callback(os.close, handle)
                return True
        except OSError:
            pass
        os.close(handle)
        return False

    def _remove_leftovers(self) -> None:
        pattern = re.compile(re.escape(self._name) + r"(-[0-9a-f]{8})?")
        for folder in self.root.iterdir():
            left = pattern.fullmatch(folder.name) and folder != self.scratch and folder.name not in self._reserved
            if left and self._locked(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def __exit__(self, *exc_info: object) -> None:
        try:
            # The content of each file is on the disk before it gets its name; the names follow here, together.
            for directory in self._changed:
                with suppress(FileNotFoundError):
                    _sync_directory(directory)
        finally:
            self._stack.close()

    def _target(self, path: PurePosixPath) -> Path:
        """The place of a file, in an existing folder."""
        target = self.root / path
        if target.parent not in self._inside:
            # Links that lie in the destination may lead out of it.
            if not target.parent.resolve().is_relative_to(self.root.resolve()):
                raise ResultsError(f"a link in the destination leads outside of it ({target.parent})")
            self._inside.add(target.parent)
        return target

    def _room_for(self, path: PurePosixPath) -> Path:
        """The same, in a folder that is made where it isn't there."""
        target = self._target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._changed.add(target.parent)
        return target

    def size_of(self, path: PurePosixPath) -> int | None:
        target = self._target(path)
        return target.stat().st_size if target.is_file() and not target.is_symlink() else None

    def has_folder(self, path: PurePosixPath) -> bool:
        return self._target(path).is_dir()

    def read(self, path: PurePosixPath) -> BinaryIO:
        return self._target(path).open("rb")

    def part(self, path: PurePosixPath, key: str, size: int) -> Part:
        self._target(path)  # refuses what would leave the destination before anything is fetched
        return LocalPart(self.scratch / f"{key}.part", lambda: self._room_for(path), size)

    def unpack(self, archive: zipfile.ZipFile, listing: Listing, path: PurePosixPath) -> None:
        needed, free = sum(member.size_bytes for member in listing.files), shutil.disk_usage(self.root).free
        if needed > free:
            raise ResultsError(f"unpacked it needs {needed} bytes, the disk has {free} left")
        staged = Path(tempfile.mkdtemp(dir=self.scratch))
        staged.chmod(self.root.stat().st_mode & 0o777)
        for member in listing.files:
            file = staged / member.path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as stream:
                copy_member(archive, member, stream)
                stream.flush()
                os.fsync(stream.fileno())
        for directory in listing.directories:
            (staged / directory).mkdir(parents=True, exist_ok=True)
        if path.parts:
            target = self._room_for(path)
            try:
                # Only an absent or empty directory can be replaced at once, as a whole.
                staged.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.is_dir():
                    raise
        for directory in listing.directories:
            self._room_for(path / directory / "_")
        for member in listing.files:
            (staged / member.path).replace(self._room_for(path / member.path))

    def uri(self, path: PurePosixPath) -> str:
        return f"file://{self.root / path}"


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, chunk: bytes) -> None:
        self._value = zlib.crc32(chunk, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that can't sync a directory
            raise
    finally:
        os.close(handle)
