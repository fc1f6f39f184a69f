"""Zip archives of directories: written as the official SDK does, read without trusting them."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError, ResultsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from _typeshed import SupportsWrite

COPY_BYTES = 1024 * 1024
# Deflate reaches 1:1032, real data stay far below this ratio. A large archive above it is taken for a zip bomb.
_BOMB_RATIO = 250
_BOMB_BYTES = 64 * 1024 * 1024


def zip_directory(directory: Path, archive: Path) -> None:
    """Write ``directory`` into an uncompressed zip whose entry names begin with the directory's own name.

    The same format as the official SDK's, in sorted order so that the same files make the same archive. As there,
    symbolic links to files are followed, those to directories and empty directories are left out.

    :raises JobRequestError: a file that can't be read, or that is neither a file nor a directory.
    :raises OSError: the disk is full.
    """
    with zipfile.ZipFile(archive, "w", strict_timestamps=False) as target:
        for path, _ in _files_of(directory):
            try:
                target.write(path, path.relative_to(directory.parent))
            except OSError as error:
                if is_disk_full(error):
                    raise
                raise unreadable(str(path), error) from error


def directory_size(directory: Path) -> int:
    """Return the total bytes of the files that :func:`zip_directory` packs.

    :raises JobRequestError: as there.
    """
    return sum(found.st_size for _, found in _files_of(directory))


def _files_of(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for root, directories, names in os.walk(directory, onerror=_unreadable):
        directories.sort()
        for name in sorted(names):
            path = Path(root, name)
            check_name(f"A file in the directory {_shown(directory)}", path)
            yield path, require_regular_file(path, f"{path} in the directory {directory}")


def require_regular_file(path: Path, what: str) -> os.stat_result:
    """Return the stat of ``path``, which must be a regular file.

    :param what: names the file at the beginning of the error.
    :raises JobRequestError: it doesn't exist, or is a device, pipe or socket.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(what, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise JobRequestError(f"{what} is neither a file nor a directory; nothing else can be uploaded.")
    return found


def _unreadable(error: OSError) -> None:
    raise unreadable(str(error.filename), error) from error


# Permanent errors. Others (a file server that is down, too many open files) are transient.
_LASTING = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
)


def unreadable(what: str, error: OSError) -> DataSphereError:
    """Return the error for a local input that can't be read: permanent or retryable."""
    kind = JobRequestError if error.errno in _LASTING else DataSphereError
    return kind(f"{_shown(what)} can't be read: {error.strerror}.")


def check_name(what: str, path: str | Path) -> None:
    """
    :raises JobRequestError: the path isn't UTF-8, which names of a job's files must be.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise JobRequestError(
            f"{what} has a name that isn't UTF-8, which DataSphere needs: {_shown(path)}. Rename it."
        ) from None


def _shown(path: str | Path) -> str:
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive. There may be hundreds of thousands.

    :param path: its path below the unpacked directory.
    :param size_bytes: declared size.
    :param crc: declared CRC-32.
    :param name: its name in the archive.
    """

    path: str
    size_bytes: int
    crc: int
    name: str


@dataclass(frozen=True)
class Listing:
    """Contents of a directory's archive; all paths are checked to lie inside it."""

    files: list[Member]
    directories: list[str]


def list_archive(archive: zipfile.ZipFile, name: str, archive_bytes: int) -> Listing:
    """Read and check the table of contents of a directory's archive.

    :param name: base name of the directory; removed from the paths if all begin with it.
    :param archive_bytes: size of the archive.
    :raises ResultsError: an entry is absolute, leaves the directory, is a link or device, exists twice or is encrypted;
        or the archive is a zip bomb.
    """
    infos = archive.infolist()
    for info in infos:
        _check_entry(info)
    total = sum(info.file_size for info in infos)
    if total > _BOMB_BYTES and total > _BOMB_RATIO * archive_bytes:
        raise ResultsError(f"it is a zip bomb or damaged: {archive_bytes} bytes that claim to unpack to {total} bytes")
    prefix = len(name) + 1 if _all_below(infos, name) else 0
    files: list[Member] = []
    directories: list[str] = []
    for info in infos:
        path = _path(info)[prefix:]
        if path and info.is_dir():
            directories.append(path)
        elif path:
            files.append(Member(path, info.file_size, info.CRC, info.filename))
    _check_names(files, directories)
    return Listing(files, directories)


def _all_below(infos: Iterable[zipfile.ZipInfo], name: str) -> bool:
    """Return whether all entries lie in a directory of this name."""
    paths = ((_path(info), info.is_dir()) for info in infos)
    return all(path.startswith(f"{name}/") or (path == name and is_dir) for path, is_dir in paths if path)


def _check_names(files: Sequence[Member], directories: Sequence[str]) -> None:
    """
    :raises ResultsError: two files have one name, or a file has a directory's.
    """
    names: set[str] = set()
    for member in files:
        if member.path in names:
            raise ResultsError(f"its entry {member.path!r} exists twice")
        names.add(member.path)
    parents = {member.path.rpartition("/")[0] for member in files}
    for parent in [*parents, *directories]:
        while parent:
            if parent in names:
                raise ResultsError(f"its entry {parent!r} is a file and a directory")
            parent = parent.rpartition("/")[0]


def _check_entry(info: zipfile.ZipInfo) -> None:
    # orig_filename: zipfile cuts names at NUL.
    raw = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not raw or "\0" in raw:
        raise ResultsError(f"it has an entry with an invalid name ({raw!r})")
    if raw.startswith("/") or ".." in raw.split("/"):
        raise ResultsError(f"its entry {raw!r} would be written outside the destination")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ResultsError(f"its entry {raw!r} is a link or a device, not a file or directory")
    if info.flag_bits & 0x1:
        raise ResultsError(f"its entry {raw!r} is encrypted")


def _path(info: zipfile.ZipInfo) -> str:
    return "/".join(part for part in info.orig_filename.split("/") if part not in ("", "."))


def copy_member(
    archive: zipfile.ZipFile, member: Member, target: SupportsWrite[bytes], check_stop: Callable[[], None]
) -> None:
    """Stream one file of an archive into ``target``; check its size and CRC-32.

    :param check_stop: called repeatedly; what it raises ends it.
    :raises ResultsError: the entry is damaged or doesn't have the declared size.
    """
    try:
        with archive.open(member.name) as source:
            while chunk := source.read(COPY_BYTES):
                check_stop()
                target.write(chunk)
            if source.tell() != member.size_bytes:
                raise ResultsError(
                    f"its entry {member.path!r} has {source.tell()} bytes, declared are {member.size_bytes}"
                )
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, zlib.error) as error:
        raise ResultsError(f"its entry {member.path!r} is damaged ({error})") from error


@contextmanager
def open_archive(file: IO[bytes] | Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file for reading.

    :raises ResultsError: it isn't one.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ResultsError(f"it is not a readable zip file ({error})") from error
    with archive:
        yield archive


def is_disk_full(error: BaseException) -> bool:
    """Return whether the error is a full disk or quota, not a problem of the file that was read."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
