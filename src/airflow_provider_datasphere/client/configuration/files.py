"""The files that a configuration names: whether they are there, and not too large. Their content isn't read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.configuration.faults import Place
from airflow_provider_datasphere.client.errors import DataSphereError
from airflow_provider_datasphere.client.transfer.archive import check_name, directory_size
from airflow_provider_datasphere.client.transfer.inputs import MAX_FILE_BYTES, MAX_TOTAL_BYTES
from airflow_provider_datasphere.client.transfer.local_modules import module_files
from airflow_provider_datasphere.client.uri import is_uri

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.configuration.job_config import JobConfig, PathEntry
    from airflow_provider_datasphere.client.configuration.section import Reader


def check_files(config: JobConfig, reader: Reader) -> None:
    """Check that local inputs and modules can be uploaded."""
    total, last = 0, Place()
    for entry, is_module in _local_entries(config, reader):
        size = _size(entry, is_module, config.base_dir, reader)
        if size > MAX_FILE_BYTES:
            reader.faults.add(
                entry.place, f"{entry.path!r} has {size} bytes: DataSphere takes at most {MAX_FILE_BYTES} (5 GiB) each."
            )
        total, last = total + size, entry.place
    if total > MAX_TOTAL_BYTES:
        reader.faults.add(
            Place(last.file, last.line),
            f"inputs and local-paths have {total} bytes together: DataSphere takes at most {MAX_TOTAL_BYTES} (10 GiB).",
        )


def _local_entries(config: JobConfig, reader: Reader) -> Iterator[tuple[PathEntry, bool]]:
    modules = config.python.local_paths if config.python is not None else ()
    for entries, is_module in ((config.inputs, False), (modules, True)):
        for entry in entries:
            if reader.is_final(entry.path) and not is_uri(entry.path):
                yield entry, is_module


def _size(entry: PathEntry, is_module: bool, base_dir: Path, reader: Reader) -> int:
    """Return the bytes to upload, about; 0 after a fault."""
    path = base_dir / entry.path.removeprefix("file://")
    try:
        check_name(entry.path, entry.path)
        if not path.exists():
            reader.faults.add(entry.place, f"{entry.path!r} doesn't exist{_where(entry.path, base_dir)}.")
            return 0
        if not is_module and path.is_dir():
            return directory_size(path)
        if path.is_dir() or path.is_file():
            return sum(os.path.getsize(file) for file, _ in module_files(path)) if is_module else os.path.getsize(path)
        reader.faults.add(entry.place, f"{entry.path!r} is neither a file nor a directory.")
    except DataSphereError as error:
        reader.faults.add(entry.place, str(error))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        reader.faults.add(entry.place, f"{entry.path!r} can't be read: {reason}.")
    return 0


def _where(path: str, base_dir: Path) -> str:
    return "" if os.path.isabs(path) else f" (looked in {base_dir.absolute()})"
