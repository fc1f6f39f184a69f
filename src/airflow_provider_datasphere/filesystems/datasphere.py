"""Read-only fsspec file system of jobs' output files: ``datasphere://[conn_id@]<job_id>/<output path or var>``.

Airflow finds it by the provider's ``filesystems``, fsspec (pandas, duckdb, …) by its entry point, so it works in
``ObjectStoragePath`` and wherever fsspec URLs are accepted. Directory outputs appear as directories: their archives are
read in place, file by file.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from fsspec import AbstractFileSystem
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.utils import isfilelike

from airflow_provider_datasphere.client.uri import match_file, plain_path
from airflow_provider_datasphere.filesystems._files import DAMAGED, MemberFile, OutputFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fsspec.callbacks import Callback
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.client.transfer.archive import Listing

#: For Airflow's file system registry.
schemes = ["datasphere"]

# An ended job's files don't change until they are cleared.
_JOB_CACHE_SECONDS = 30.0
_BLOCK_BYTES = 4 * 1024 * 1024
_MEMBER_BUFFER_BYTES = 256 * 1024


def get_fs(conn_id: str | None, storage_options: dict[str, Any] | None = None) -> DataSphereFileSystem:
    """Return the file system of an Airflow connection; called by Airflow.

    :param conn_id: None: ``datasphere_default``.
    """
    return DataSphereFileSystem(conn_id=conn_id, **(storage_options or {}))


class DataSphereFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Output files of jobs; a path is ``<job_id>/<output path or var>``. Connects on first use.

    A file that doesn't exist, or not yet (the job is running), or no longer (its data are cleared) raises
    ``FileNotFoundError`` with the reason; an invalid connection or a missing role raises the provider's exceptions.
    Files read from beginning to end are verified by their sha256.

    :param conn_id: Airflow connection. Default: ``datasphere_default``.
    """

    protocol = "datasphere"
    root_marker = ""

    def __init__(self, conn_id: str | None = None, **storage_options: Any) -> None:
        super().__init__(conn_id=conn_id, **storage_options)
        self._conn_id = conn_id
        self._client: DataSphereClient | None = None
        self._jobs: dict[str, tuple[float, jobs_pb2.Job]] = {}
        self._sizes: dict[tuple[str, ...], int] = {}
        self._listings: dict[tuple[str, str], Listing] = {}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        text = os.fspath(path)
        if text.startswith(f"{cls.protocol}://"):
            text = text[len(cls.protocol) + 3 :]
            host, slash, rest = text.partition("/")
            text = f"{host.rpartition('@')[2]}{slash}{rest}"
        return text.strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        conn_id, at, _ = path.partition("://")[2].partition("/")[0].rpartition("@")
        return {"conn_id": conn_id} if at and conn_id else {}

    @property
    def client(self) -> DataSphereClient:
        """The connection's client."""
        if self._client is None:
            from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

            self._client = DataSphereHook(self._conn_id or DataSphereHook.default_conn_name).get_conn()
        return self._client

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget cached jobs: read them from the service on next use."""
        self._jobs.clear()
        super().invalidate_cache(path)

    # Listing ----------------------------------------------------------------------------------------------------

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List a job or a directory in it.

        :raises FileNotFoundError: the path doesn't exist.
        """
        job, rest = self._locate(path)
        entries = {entry["name"]: entry for entry in self._children(job, rest)}
        if not entries:
            found = self.info(path)
            if found["type"] == "file":
                entries[found["name"]] = found
        listed = [entries[name] for name in sorted(entries)]
        return listed if detail else [entry["name"] for entry in listed]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Return size, type, sha256 and var of one entry, found as :func:`match_file` does.

        :raises FileNotFoundError: the path doesn't exist.
        """
        from airflow_provider_datasphere.client.model import is_archive
        from airflow_provider_datasphere.client.transfer.archive import Member

        job, rest = self._locate(path)
        if not plain_path(rest):
            return self._directory(job, rest)
        found = self._find(job, rest)
        if isinstance(found, Member):
            return {**self._directory(job, rest), "type": "file", "size": found.size_bytes}
        if found is not None:
            entry = self._entry(job, found, rest)
            return entry if is_archive(found) else {**entry, "size": self._size(job, found)}
        if any(True for _ in self._children(job, rest)):
            return self._directory(job, rest)
        names = ", ".join(file.desc.path for file in job.output_files) or "none"
        raise FileNotFoundError(
            errno.ENOENT, f"Job {job.id} has no output {rest!r}; it has: {names}", f"{self.protocol}://{path}"
        )

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Return whether the path exists. Unlike fsspec's default, other errors are raised."""
        try:
            self.info(path, **kwargs)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: str) -> bool:
        """Return whether the path is a file; raises like :meth:`exists`."""
        try:
            return bool(self.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def created(self, path: str) -> Any:
        """Return when the job ended."""
        return self.info(path)["created"]

    modified = created

    def ukey(self, path: str) -> str:
        """Return the file's sha256, if recorded."""
        found = self.info(path)
        return str(found.get("sha256") or super().ukey(path))

    def _locate(self, path: str) -> tuple[jobs_pb2.Job, str]:
        job_id, _, rest = self._strip_protocol(path).partition("/")
        if not job_id:
            raise FileNotFoundError(errno.ENOENT, "name a job: datasphere://<job id>/<output path or var>", path)
        return self._job(job_id), rest

    def _job(self, job_id: str) -> jobs_pb2.Job:
        from airflow_provider_datasphere.client.errors import DataSphereError, ResultsError
        from airflow_provider_datasphere.client.rpc import error_code
        from airflow_provider_datasphere.client.transfer.selection import require_results
        from airflow_provider_datasphere.exceptions import airflow_exceptions

        at, job = self._jobs.get(job_id, (0.0, None))
        if job is None or time.monotonic() - at > _JOB_CACHE_SECONDS:
            with airflow_exceptions():
                try:
                    job = self.client.get(job_id)
                    require_results(job)
                except DataSphereError as error:
                    if isinstance(error, ResultsError) or error_code(error) == "NOT_FOUND":
                        raise FileNotFoundError(errno.ENOENT, str(error), f"{self.protocol}://{job_id}") from error
                    # fsspec takes FileNotFoundError for an empty folder, which would be wrong for a refused credential.
                    raise
            self._jobs[job_id] = (time.monotonic(), job)
        return job

    def _find(self, job: jobs_pb2.Job, rest: str) -> Any:
        """Return the ``File``, or the ``Member`` of a directory output's archive, at ``rest``; None: there is none."""
        plain = plain_path(rest)
        file = match_file(job, rest)
        if file is not None:
            return file
        archive, base = self._archive_at(job, plain)
        if archive is None:
            return None
        inner = plain[len(base) + 1 :] if base else plain
        return next((member for member in self._listing(job, archive).files if member.path == inner), None)

    def _archive_at(self, job: jobs_pb2.Job, plain: str) -> tuple[jobs_pb2.File | None, str]:
        """Return the directory output that is or contains the plain path, and the prefix that names it there.

        The prefix is empty if the directory is the job's working folder, which contains everything else.
        """
        from airflow_provider_datasphere.client.model import is_archive

        archives = [file for file in job.output_files if is_archive(file)]
        for named in (_plain_path, _var):
            for file in archives:
                if named(file) and f"{plain}/".startswith(f"{named(file)}/"):
                    return file, named(file)
        return next((file for file in archives if not _plain_path(file)), None), ""

    def _children(self, job: jobs_pb2.Job, rest: str) -> Iterator[dict[str, Any]]:
        plain = plain_path(rest)
        prefix = f"{plain}/" if plain else ""
        for file in job.output_files:
            if _plain_path(file) and _plain_path(file).startswith(prefix):
                yield self._child(job, prefix, _plain_path(file), self._entry(job, file, _plain_path(file)))
        archive, base = self._archive_at(job, plain)
        if archive is not None:
            listing = self._listing(job, archive)
            within = f"{base}/" if base else ""
            for member in listing.files:
                if f"{within}{member.path}".startswith(prefix):
                    entry = {"type": "file", "size": member.size_bytes}
                    yield self._child(job, prefix, f"{within}{member.path}", entry)
            for directory in listing.directories:
                if f"{within}{directory}".startswith(prefix):
                    yield self._child(job, prefix, f"{within}{directory}", {})

    def _child(self, job: jobs_pb2.Job, prefix: str, whole: str, entry: dict[str, Any]) -> dict[str, Any]:
        name, deeper, _ = whole[len(prefix) :].partition("/")
        directory = self._directory(job, prefix + name)
        return directory if deeper else {**directory, **entry}

    def _directory(self, job: jobs_pb2.Job, rest: str) -> dict[str, Any]:
        from datetime import timezone

        ended = job.finished_at.ToDatetime(tzinfo=timezone.utc)
        name = f"{job.id}/{rest}" if rest else job.id
        return {"name": name, "size": 0, "type": "directory", "created": ended, "mtime": ended.timestamp()}

    def _entry(self, job: jobs_pb2.Job, file: jobs_pb2.File, rest: str) -> dict[str, Any]:
        from airflow_provider_datasphere.client.model import is_archive

        entry = {**self._directory(job, rest), "var": file.desc.var or None, "sha256": file.sha256}
        return entry if is_archive(file) else {**entry, "type": "file", "size": file.size_bytes}

    # Reading ----------------------------------------------------------------------------------------------------

    def _size(self, job: jobs_pb2.Job, file: jobs_pb2.File) -> int:
        """Return a file's size in bytes; from the storage if the job didn't record it."""
        from airflow_provider_datasphere.client.transfer.presigned_url import (
            PresignedUrl,
            file_key,
            measured_size,
            recorded_size,
        )

        size = recorded_size(file)
        if size is not None:
            return size
        key = (job.id, *file_key(file))
        if key not in self._sizes:
            self._sizes[key] = measured_size(self.client.http, PresignedUrl(self.client, job.id, file))
        return self._sizes[key]

    def _reader(self, job: jobs_pb2.Job, file: jobs_pb2.File) -> Any:
        from airflow_provider_datasphere.client.transfer.presigned_url import PresignedUrl, RangeReader

        return RangeReader(self.client.http, PresignedUrl(self.client, job.id, file), self._size(job, file))

    def _archive(self, job: jobs_pb2.Job, file: jobs_pb2.File, buffer_bytes: int) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(cast("Any", io.BufferedReader(self._reader(job, file), buffer_bytes)))
        except DAMAGED as error:
            raise OSError(errno.EIO, f"The directory {file.desc.path} of job {job.id} is damaged: {error}") from error

    def _listing(self, job: jobs_pb2.Job, file: jobs_pb2.File) -> Listing:
        from airflow_provider_datasphere.client.errors import ResultsError
        from airflow_provider_datasphere.client.transfer.archive import list_archive

        key = (job.id, file.desc.path)
        if key not in self._listings:
            with self._archive(job, file, 64 * 1024) as archive:
                try:
                    self._listings[key] = list_archive(
                        archive, _plain_path(file).rpartition("/")[2], self._size(job, file)
                    )
                except ResultsError as error:
                    raise OSError(
                        errno.EIO, f"The directory {file.desc.path} of job {job.id} can't be used: {error}"
                    ) from error
        return self._listings[key]

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        from airflow_provider_datasphere.client.transfer.archive import Member

        if mode != "rb":
            self._refuse(path)
        job, rest = self._locate(path)
        found = self._find(job, rest)
        if isinstance(found, Member):
            file, _ = self._archive_at(job, plain_path(rest))
            assert file is not None
            # The open member keeps the archive's file open when the archive is closed.
            with self._archive(job, file, 1024 * 1024) as archive:
                return io.BufferedReader(MemberFile(archive, found, path), _MEMBER_BUFFER_BYTES)
        entry = self.info(path)
        if found is None or entry["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        kwargs.setdefault("cache_type", "readahead")
        # "size" is passed when an open file is unpickled; the job has it.
        for name in ("cache_options", "autocommit", "size"):
            kwargs.pop(name, None)
        return OutputFile(
            self, path, self._reader(job, found), block_size=block_size or _BLOCK_BYTES, size=entry["size"], **kwargs
        )

    def get_file(
        self,
        rpath: str,
        lpath: Any,
        callback: Callback = DEFAULT_CALLBACK,
        outfile: Any = None,
        **kwargs: Any,
    ) -> None:
        """Download one file; it gets its name when it is complete and verified.

        :param lpath: local path, or an open file to write to.
        """
        if outfile is not None or isfilelike(lpath) or self.isdir(rpath):
            super().get_file(rpath, lpath, callback=callback, outfile=outfile, **kwargs)
            return
        target = Path(lpath)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Hashed: the target's name may have the maximum length of names already.
        name = hashlib.sha256(target.name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        partial = target.with_name(f".{name}.{os.getpid()}.part")
        try:
            super().get_file(rpath, str(partial), callback=callback, **kwargs)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    # Writing: refused -------------------------------------------------------------------------------------------

    def _refuse(self, path: str, *_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.EROFS, "The files of a DataSphere job are read-only", path)

    cp_file = _rm = rm_file = mkdir = makedirs = rmdir = touch = put_file = mv = _refuse


def _plain_path(file: jobs_pb2.File) -> str:
    return plain_path(file.desc.path)


def _var(file: jobs_pb2.File) -> str:
    var: str = file.desc.var
    return var
