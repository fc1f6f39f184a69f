"""Destinations of downloads: the interface, and a local folder. Only verified files get their final names."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from airflow_provider_datasphere.client.errors import PermanentResultsError, ResultsError
from airflow_provider_datasphere.client.transfer.archive import COPY_BYTES, Listing, Member, copy_member
from airflow_provider_datasphere.client.transfer.partial_file import KEEP_BYTES, LocalPartialFile, PartialFile

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Callable, Collection, Iterator

# Between attempts to take the lock that another download holds.
_LOCK_RETRY_SECONDS = 0.01

log = logging.getLogger(__name__)


class ExistingFile(NamedTuple):
    """A file that a destination has already.

    :param modified: when it was written, seconds since the epoch; None: unknown.
    """

    size_bytes: int
    modified: float | None


class Destination(ABC):
    """Where files are downloaded to; a context manager. Its methods may be called from several threads.

    :ivar max_parallel: limit of files at once that bounds the memory; None: no limit.
    :ivar scratch: local folder that exists during the download.
    :ivar check_stop: called repeatedly while files are read or unpacked; what it raises ends that.
    """

    max_parallel: int | None = None
    scratch: Path

    def __init__(self) -> None:
        self.check_stop: Callable[[], None] = lambda: None

    @abstractmethod
    def __enter__(self) -> Destination: ...

    @abstractmethod
    def __exit__(self, *exc_info: Any) -> None: ...

    @abstractmethod
    def find(self, path: PurePosixPath) -> ExistingFile | None:
        """Return the file that exists at ``path``; None: there is none.

        :raises OSError: no permission, for example.
        """

    def missing(self) -> str | None:
        """Return what is missing of the destination itself, such as its bucket, as a sentence; None: nothing."""
        return None

    @abstractmethod
    def has_folder(self, path: PurePosixPath) -> bool:
        """Return whether there is a folder at ``path``."""

    @abstractmethod
    def read(self, path: PurePosixPath) -> BinaryIO: ...

    @abstractmethod
    def partial_file(self, path: PurePosixPath, key: str, size: int) -> PartialFile:
        """Create the partial file of a download.

        :param key: identifies content and target, to resume it.
        :param size: expected size in bytes.
        """

    @abstractmethod
    def unpack(
        self, archive: zipfile.ZipFile, listing: Listing, path: PurePosixPath, check: Callable[[], None]
    ) -> None:
        """Unpack an archive below ``path``; files that are up to date stay as they are.

        :param check: called just before files get their names; what it raises prevents it.
        """

    @abstractmethod
    def uri(self, path: PurePosixPath) -> str:
        """Return the URI of a file, for the manifest."""

    def has(self, path: PurePosixPath, size: int | None, sha256: str) -> bool:
        """Return whether the file exists with this content.

        :param size: bytes; None: any.
        """
        return bool(sha256) and self._is_same(path, size, sha256.lower(), hashlib.sha256())

    def sha256(self, path: PurePosixPath) -> str:
        """Return the sha256 of an existing file, in hexadecimal digits.

        :raises OSError: it can't be read.
        """
        digest = hashlib.sha256()
        self._digest(path, digest)
        return digest.hexdigest()

    def _digest(self, path: PurePosixPath, digest: Any) -> None:
        with self.read(path) as stream:
            while chunk := stream.read(COPY_BYTES):
                self.check_stop()
                digest.update(chunk)

    def has_all(self, path: PurePosixPath, listing: Listing) -> bool:
        """Return whether these files are below ``path``; there may be others too."""
        return self.has_folder(path) and all(self.has_member(path / member.path, member) for member in listing.files)

    def has_member(self, path: PurePosixPath, member: Member) -> bool:
        return self._is_same(path, member.size_bytes, f"{member.crc:08x}", _Crc32())

    def _is_same(self, path: PurePosixPath, size: int | None, expected: str, digest: Any) -> bool:
        try:
            existing = self.find(path)
            if existing is None or size not in (None, existing.size_bytes):
                return False
            self._digest(path, digest)
        except OSError as error:
            # Write permission without read permission. S3 also refuses a HEAD of a missing object without permission to
            # list the bucket.
            log.debug("Can't compare %s: %s", path, error)
            return False
        return bool(digest.hexdigest() == expected)


class LocalDestination(Destination):
    """A folder on this machine.

    Partial files are in one hidden folder in it, which is removed after the download. When the download fails, large
    partial files stay there, as after a ``kill -9``: the next download of the same job resumes them and removes the
    folder.

    :param root: the folder; created if it doesn't exist.
    :param name: name of the hidden folder, the same for each download of a job.
    :param reserved: names in ``root`` that the job's own files need.
    """

    def __init__(self, root: Path, name: str, reserved: Collection[str] = ()) -> None:
        self.root = root.absolute()
        super().__init__()
        while name in reserved:
            name += "_"
        self._name, self._reserved = name, frozenset(reserved)
        self._stack = ExitStack()
        self._naming = Lock()
        self._checked_folders: set[Path] = set()
        self._changed_folders: set[Path] = set()

    def __enter__(self) -> LocalDestination:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.scratch = self._lock_scratch()
        except OSError as error:
            self._stack.close()
            raise ResultsError(f"The destination {self.root} is not writable: {error.strerror}.") from error
        self._remove_leftovers()
        return self

    def _lock_scratch(self) -> Path:
        # A killed process loses its lock; one that still runs (a try believed dead) keeps its folder to itself.
        for name in (self._name, *(f"{self._name}-{secrets.token_hex(4)}" for _ in range(3))):
            folder = self.root / name
            folder.mkdir(exist_ok=True)
            if self._locked(folder):
                break
        else:  # a file system without locks: nobody else has this name
            folder.mkdir(exist_ok=True)
        self._stack.push(self._remove_scratch)
        return folder

    def _remove_scratch(self, kind: object, *_: object) -> None:
        # A folder with another name than the job's is never resumed.
        if kind is not None and self.scratch == self.root / self._name:
            with suppress(OSError):
                for entry in list(self.scratch.iterdir()):
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry, ignore_errors=True)
                    elif entry.suffix != ".part" or entry.stat().st_size < KEEP_BYTES:
                        entry.unlink()
                self.scratch.rmdir()  # if nothing is left
            return
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _locked(self, folder: Path) -> bool:
        """Lock the folder; return whether that succeeded. It never does on a file system without locks."""
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            return False  # removed by its owner just now
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), folder.stat()):
                self._stack.callback(os.close, handle)
                return True
        except OSError:
            pass
        os.close(handle)
        return False

    def _scratch_name(self) -> re.Pattern[str]:
        return re.compile(re.escape(self._name) + r"(-[0-9a-f]{8})?")

    def _remove_leftovers(self) -> None:
        pattern = self._scratch_name()
        for folder in self.root.iterdir():
            left = pattern.fullmatch(folder.name) and folder != self.scratch and folder.name not in self._reserved
            if left and self._locked(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def __exit__(self, *exc_info: Any) -> None:
        try:
            # The content of each file is on the disk before it gets its name; the names follow here, together.
            for directory in self._changed_folders:
                with suppress(FileNotFoundError):
                    _sync_directory(directory)
        finally:
            self._stack.__exit__(*exc_info)

    def _target(self, path: PurePosixPath) -> Path:
        """Return the local path of a file; checks that it is inside the destination."""
        target = self.root / path
        if target.parent not in self._checked_folders:
            # Symbolic links in the destination may point outside of it.
            if not target.parent.resolve().is_relative_to(self.root.resolve()):
                raise PermanentResultsError(
                    f"a symbolic link in the destination points outside of it ({target.parent})"
                )
            self._require_same_disk(target.parent)
            self._checked_folders.add(target.parent)
        return target

    def _require_same_disk(self, folder: Path) -> None:
        """Raise if files can't be renamed atomically to the folder."""
        while not folder.exists():
            folder = folder.parent
        if folder.stat().st_dev != self.root.stat().st_dev:
            raise PermanentResultsError(
                f"{folder} is on another file system than the destination {self.root}: give it as the destination of a "
                "download of its own"
            )

    def _create_parent(self, path: PurePosixPath) -> Path:
        """Same as :meth:`_target`; creates the parent folder."""
        target = self._target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._changed_folders.add(target.parent)
        return target

    def find(self, path: PurePosixPath) -> ExistingFile | None:
        target = self._target(path)
        try:
            found = target.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return ExistingFile(found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def has_folder(self, path: PurePosixPath) -> bool:
        return not path.parts or self._target(path).is_dir()

    def read(self, path: PurePosixPath) -> BinaryIO:
        return self._target(path).open("rb")

    def partial_file(self, path: PurePosixPath, key: str, size: int) -> PartialFile:
        self._target(path)  # raises before anything is downloaded
        return LocalPartialFile(
            self.scratch / f"{key}.part", lambda: self._create_parent(path), size, self._exclusively
        )

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Hold the lock under which files get their final names, across all downloads to this folder."""
        with self._naming:  # the file lock is for other processes, and is polled
            handle = os.open(self.root, os.O_RDONLY)
            try:
                while not _lock(handle):
                    self.check_stop()
                    time.sleep(_LOCK_RETRY_SECONDS)
                yield
            finally:
                os.close(handle)

    def unpack(
        self, archive: zipfile.ZipFile, listing: Listing, path: PurePosixPath, check: Callable[[], None]
    ) -> None:
        if not path.parts:
            ours = self._scratch_name()
            for name in {member.path.partition("/")[0] for member in listing.files}:
                if ours.fullmatch(name):
                    raise PermanentResultsError(
                        f"it has an entry {name!r}, which is what the download calls its own hidden folder; read it by "
                        "datasphere:// instead"
                    )
        needed, free = sum(member.size_bytes for member in listing.files), shutil.disk_usage(self.root).free
        if needed > free:
            raise ResultsError(f"unpacked it needs {needed} bytes, but the disk has {free} bytes free")
        staged = Path(tempfile.mkdtemp(dir=self.scratch))
        # mkdtemp() creates with mode 0700; setgid keeps the group.
        staged.chmod(self.root.stat().st_mode & (stat.S_ISGID | 0o777))
        for member in listing.files:
            file = staged / member.path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as stream:
                copy_member(archive, member, stream, self.check_stop)
                stream.flush()
                os.fsync(stream.fileno())
        for directory in listing.directories:
            (staged / directory).mkdir(parents=True, exist_ok=True)
        with self._exclusively():
            check()
            self._move(staged, listing, path)

    def _move(self, staged: Path, listing: Listing, path: PurePosixPath) -> None:
        if path.parts:
            target = self._create_parent(path)
            try:
                # Only an absent or empty directory can be replaced atomically.
                staged.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.is_dir():
                    raise
        for directory in listing.directories:
            self._create_parent(path / directory / "_")
        for member in listing.files:
            (staged / member.path).replace(self._create_parent(path / member.path))

    def uri(self, path: PurePosixPath) -> str:
        return f"file://{self.root / path}"


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, chunk: bytes) -> None:
        self._value = zlib.crc32(chunk, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _lock(handle: int) -> bool:
    """Try to take the lock; return False only if another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by the file system
            raise
    finally:
        os.close(handle)
