"""Python modules and packages that are shipped with a job: each a zip file that the service unpacks in ``/job``."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.transfer.archive import (
    COPY_BYTES,
    check_name,
    is_disk_full,
    require_regular_file,
    unreadable,
)
from airflow_provider_datasphere.client.transfer.inputs import writing
from airflow_provider_datasphere.client.transfer.upload import hash_file_input

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.transfer.inputs import JobInput

#: What tools leave beside sources; no program needs it, and it may be large.
LEFT_OUT_FOLDERS = frozenset(
    {
        "__pycache__",
        ".git",
        ".hg",
        ".svn",
        ".idea",
        ".vscode",
        ".venv",
        ".tox",
        ".nox",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".ipynb_checkpoints",
    }
)
LEFT_OUT_SUFFIXES = (".pyc", ".pyo")
LEFT_OUT_FILES = frozenset({".DS_Store"})
#: The variables by which the official SDK names modules; no variable of a user can be called that.
_VAR = "_LOCAL_MODULE_{}"


def module_files(path: Path) -> Iterator[tuple[Path, PurePath]]:
    """Iterate over the files of a module or package, and their paths in the job; sorted.

    :raises JobRequestError: one can't be read, or is neither a file nor a directory.
    """
    if not path.is_dir():
        yield path, PurePath(path.name)
        return
    for root, folders, names in os.walk(path, onerror=_unreadable):
        folders[:] = sorted(folder for folder in folders if folder not in LEFT_OUT_FOLDERS)
        for name in sorted(names):
            if not _is_left_out(name):
                file = Path(root, name)
                # Of "." and "../code" as the official SDK does: without, and with the last name.
                yield file, file.relative_to(path.parent)


def _is_left_out(name: str) -> bool:
    return name in LEFT_OUT_FILES or name.endswith(LEFT_OUT_SUFFIXES)


def _unreadable(error: OSError) -> None:
    raise unreadable(str(error.filename), error) from error


def left_out(path: Path) -> list[str]:
    """Return what :func:`module_files` leaves out of a directory, relative to it."""
    found: list[str] = []
    for root, folders, names in os.walk(path):
        below = Path(root).relative_to(path)
        found += [str(below / folder) for folder in sorted(folders) if folder in LEFT_OUT_FOLDERS]
        found += [str(below / name) for name in sorted(names) if _is_left_out(name)]
        folders[:] = sorted(folder for folder in folders if folder not in LEFT_OUT_FOLDERS)
    return found


def pack_modules(paths: Sequence[str], base_dir: Path, scratch: Path, logger: LoggerLike) -> list[JobInput]:
    """Zip modules, so that the same files make the same bytes on each machine: the service stores them once.

    :param paths: files and folders, relative to ``base_dir``.
    :param scratch: an existing folder for the zip files.
    :raises JobRequestError: a file can't be read.
    :raises DataSphereError: ``scratch`` has no room.
    """
    return [_packed(number, path, base_dir, scratch, logger) for number, path in enumerate(paths)]


def _packed(number: int, path: str, base_dir: Path, scratch: Path, logger: LoggerLike) -> JobInput:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    source = Path(os.path.normpath(base_dir / path))
    # "." ships the content of the folder itself: its parent is itself, as in the official SDK.
    entries = [(file, file.relative_to(source) if _is_here(path) else entry) for file, entry in module_files(source)]
    if source.is_dir() and (rest := left_out(source)):
        shown = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
        logger.info("Local module %s is shipped without %s.", path, shown)
    handle, name = tempfile.mkstemp(suffix=".zip", dir=scratch)
    os.close(handle)
    with writing(f"Local module {path}", scratch), zipfile.ZipFile(name, "w") as archive:
        for file, entry in entries:
            _write(archive, file, entry)
    # The service doesn't use the path; it must be the same in each try, and unlike others.
    return hash_file_input(_VAR.format(number), f"local_modules/{number}/{source.name}", Path(name), jobs_pb2.ZIP)


def _is_here(path: str) -> bool:
    return PurePath(path) == PurePath(".")


def _write(archive: zipfile.ZipFile, file: Path, entry: PurePath) -> None:
    check_name("A local module", str(entry))
    found = require_regular_file(file, f"Local module {file}")
    info = zipfile.ZipInfo(entry.as_posix())
    info.external_attr = (found.st_mode & 0xFFFF) << 16
    info.file_size = found.st_size
    try:
        with file.open("rb") as source, archive.open(info, "w") as target:
            while chunk := source.read(COPY_BYTES):
                target.write(chunk)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise unreadable(f"Local module {file}", error) from error
