"""Directories travel as zip files: making them as the official SDK does, and unpacking them without trusting them."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from airflow_provider_datasphere.client.errors import JobRequestError, ResultsError
from airflow_provider_datasphere.client.staging import is_full

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import SupportsWrite

COPY_BYTES = 1024 * 1024
# Deflate reaches 1:1032. Real data stay far below this ratio; what exceeds it and isn't small is taken for a bomb.
_BOMB_RATIO = 250
_BOMB_BYTES = 64 * 1024 * 1024


def zip_directory(directory: Path, archive: Path) -> None:
    """Write ``directory`` into an uncompressed zip whose entry names begin with the directory's own name.

    The same format as the official SDK's, in sorted order so that the same files make the same archive. As there,
    links to files are followed, links to directories and empty directories are left out.

    :raises JobRequestError: a file that can't be read, or that is neither a file nor a directory.
    :raises OSError: the disk is full.
    """
    with zipfile.ZipFile(archive, "w", strict_timestamps=False) as target:
        for path, _ in _files_of(directory):
            try:
                target.write(path, path.relative_to(directory.parent))
            except OSError as error:
                if is_full(error):
                    raise
                _unreadable(error)


def directory_size(directory: Path) -> int:
    """How many bytes the files have together that :func:`zip_directory` packs.

    :raises JobRequestError: as there.
    """
    return sum(found.st_size for _, found in _files_of(directory))


def _files_of(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for root, directories, names in os.walk(directory, onerror=_unreadable):
        directories.sort()
        for name in sorted(names):
            path = Path(root, name)
            yield path, require_regular_file(path, f"{path} in the directory {directory}")


def require_regular_file(path: Path, what: str) -> os.stat_result:
    """Stat ``path``, refusing what would block or can't be read.

    :raises JobRequestError: it doesn't exist, or is a device, pipe or socket; begins with ``what``.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise JobRequestError(f"{what} can't be read: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode):
        raise JobRequestError(f"{what} is neither a file nor a directory; only those can be uploaded.")
    return found


def _unreadable(error: OSError) -> None:
    raise JobRequestError(f"{error.filename} can't be read: {error.strerror}.") from error


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    :param path: where it belongs, relative to the unpacked directory.
    :param size_bytes: its size as the archive declares it.
    :param crc: its CRC-32 as the archive declares it.
    """

    path: PurePosixPath
    size_bytes: int
    crc: int
    info: zipfile.ZipInfo


@dataclass(frozen=True)
class Listing:
    """What an archive of a directory holds; all paths are checked to lie inside it."""

    files: list[Member]
    directories: list[PurePosixPath]


def list_archive(archive: zipfile.ZipFile, name: str, archive_bytes: int) -> Listing:
    """Read the table of contents of a directory's archive.

    :param name: base name of the directory: entries that all begin with it lose it.
    :param archive_bytes: size of the archive.
    :raises ResultsError: an entry that is absolute, leaves the directory, is a link or device, is there twice or is
        encrypted; or sizes that only a zip bomb has.
    """
    entries: list[tuple[PurePosixPath, zipfile.ZipInfo]] = []
    for info in archive.infolist():
        # orig_filename: zipfile cuts names at NUL, and those after it may differ.
        raw = info.orig_filename
        parts = raw.split("/")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not raw or "\0" in raw:
            raise ResultsError(f"it has an entry with an impossible name ({raw!r})")
        if raw.startswith("/") or ".." in parts:
            raise ResultsError(f"its entry {raw!r} would be written outside the destination")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ResultsError(f"its entry {raw!r} is a link or a device, not a file or directory")
        if info.flag_bits & 0x1:
            raise ResultsError(f"its entry {raw!r} is encrypted")
        path = PurePosixPath(*(part for part in parts if part not in ("", ".")))
        if path.parts:
            entries.append((path, info))

    total = sum(info.file_size for _, info in entries)
    if total > _BOMB_BYTES and total > _BOMB_RATIO * archive_bytes:
        raise ResultsError(f"it is a zip bomb or damaged: {archive_bytes} bytes that claim to unpack to {total} bytes")
    if entries and all(path.parts[0] == name and (len(path.parts) > 1 or info.is_dir()) for path, info in entries):
        entries = [(path.relative_to(name), info) for path, info in entries]
    files = [Member(path, info.file_size, info.CRC, info) for path, info in entries if not info.is_dir()]
    seen: set[PurePosixPath] = set()
    for member in files:
        if member.path in seen:
            raise ResultsError(f"its entry {str(member.path)!r} is there twice")
        seen.add(member.path)
    for member in files:
        if clash := seen.intersection(member.path.parents):
            raise ResultsError(f"its entry {str(clash.pop())!r} is a file and a directory")
    directories = [path for path, info in entries if info.is_dir() and path.parts]
    if clash := seen.intersection(directories):
        raise ResultsError(f"its entry {str(clash.pop())!r} is a file and a directory")
    return Listing(files, directories)


def copy_member(archive: zipfile.ZipFile, member: Member, target: SupportsWrite[bytes]) -> None:
    """Stream one file of an archive into ``target``; size and CRC-32 are checked on the way.

    :raises ResultsError: it is damaged or doesn't have the declared size.
    """
    try:
        with archive.open(member.info) as source:
            shutil.copyfileobj(source, target, COPY_BYTES)
            if source.tell() != member.size_bytes:
                raise ResultsError(
                    f"its entry {str(member.path)!r} has {source.tell()} bytes, declared are {member.size_bytes}"
                )
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, zlib.error) as error:
        raise ResultsError(f"its entry {str(member.path)!r} is damaged ({error})") from error


@contextmanager
def open_archive(file: IO[bytes] | Path) -> Iterator[zipfile.ZipFile]:
    """A zip file for reading.

    :raises ResultsError: it isn't one.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ResultsError(f"it is no readable zip file ({error})") from error
    with archive:
        yield archive
