"""Target path of each of a job's files below a destination."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.errors import PermanentResultsError
from airflow_provider_datasphere.client.model import is_archive
from airflow_provider_datasphere.client.transfer.presigned_url import file_key
from airflow_provider_datasphere.client.uri import plain_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.transfer.selection import JobFile


@dataclass(frozen=True)
class Item:
    """A file and its target.

    :param kind: ``output``, ``log`` or ``diagnostic``.
    :param target: path below the destination.
    """

    kind: str
    file: jobs_pb2.File
    target: PurePosixPath

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.file.desc.path or self.file.desc.var

    @property
    def key(self) -> str:
        """The same for the same content at the same place."""
        return hashlib.sha256(f"{self.target}\0{self.file.sha256}".encode()).hexdigest()[:16]

    @property
    def is_archive(self) -> bool:
        """Whether it is the zip file of a directory, to be unpacked."""
        return is_archive(self.file)


def assign_targets(selected: Iterable[JobFile], job_id: str) -> list[Item]:
    """Assign a target to each file. Several files have one target only if their content is known to be the same.

    Nothing leaves the destination, see :func:`plain_path`. A log or diagnostic file with the path of an output goes to
    ``logs`` or ``diagnostics``.

    :raises PermanentResultsError: an invalid path, or files that would overwrite each other.
    """
    items: list[Item] = []
    taken: dict[PurePosixPath, Item] = {}
    keys: dict[tuple[str, str, str], Item] = {}
    for kind, file in selected:
        path = plain_path(file.desc.path)
        # A directory output may be the working folder itself; a file must have a name.
        if "\0" in path or not (path or is_archive(file)):
            raise PermanentResultsError(f"Job {job_id} has a file with an invalid path: {file.desc.path!r}.")
        item = Item(kind, file, PurePosixPath(path))
        other = keys.setdefault(file_key(file), item)
        if other is not item and not file.sha256:
            # Their URLs can't be told apart either.
            raise PermanentResultsError(
                f"Job {job_id} has two files {item.name!r} ({other.kind} and {kind}) without a sha256: they can't be "
                "told apart. Download without with_logs or with_diagnostics, or select outputs with files=[…]."
            )
        if kind != "output" and item.target in taken and not _same(item, taken[item.target]):
            item = Item(kind, file, PurePosixPath(f"{kind}s", path))
        other = taken.setdefault(item.target, item)
        if not _same(other, item):
            raise _clash(job_id, other, item, f"both become {str(item.target)!r}")
        items.append(item)
    for item in items:
        for parent in item.target.parents:
            other = taken.get(parent, item)
            if other is not item and not other.is_archive:
                raise _clash(job_id, other, item, f"make {str(parent)!r} a file and a directory")
    return items


def _same(one: Item, other: Item) -> bool:
    return one is other or (
        bool(one.file.sha256)
        and one.file.sha256.lower() == other.file.sha256.lower()
        and one.is_archive == other.is_archive
    )


def _clash(job_id: str, one: Item, other: Item, what: str) -> PermanentResultsError:
    return PermanentResultsError(
        f"The files {one.name!r} and {other.name!r} of job {job_id} would {what}. "
        "Select them with files=[…] and download them to different destinations."
    )
