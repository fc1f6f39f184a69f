"""``datasphere://[conn_id@]<job_id>/<output path or var>``: a job's output files as a read-only file system.

Airflow finds it through the provider's ``filesystems``, fsspec (pandas, duckdb, …) through its entry point, so it
works in ``ObjectStoragePath`` and in everything that takes fsspec URLs. Directory outputs show as directories: their
archives are read in place, file by file.
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
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import isfilelike

from airflow_provider_datasphere.client.uri import plain_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fsspec.callbacks import Callback
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.archive import Listing
    from airflow_provider_datasphere.client.jobs import DataSphereClient

#: For Airflow's registry of file systems.
schemes = ["datasphere"]

# An ended job's files stay the same until they are cleared.
_JOB_SECONDS = 30.0
_BLOCK_BYTES = 4 * 1024 * 1024


def get_fs(conn_id: str | None, storage_options: dict[str, Any] | None = None) -> DataSphereFileSystem:
    """The file system on an Airflow connection; called by Airflow.

    :param conn_id: None for ``datasphere_default``.
    """
    return DataSphereFileSystem(conn_id=conn_id, **(storage_options or {}))


class DataSphereFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The output files of jobs; a path is ``<job_id>/<output path or var>``. Connects when it is first used.

    What doesn't exist, isn't there yet (the job runs) or not any more (its data are cleared) raises
    ``FileNotFoundError``, with the reason; a wrong connection or a missing role raises the provider's own exceptions.
    Files read from beginning to end are checked against their sha256.

    :param conn_id: Airflow connection; None for ``datasphere_default``.
    """

    protocol = "datasphere"
    root_marker = ""

    def __init__(self, conn_id: str | None = None, **storage_options: Any) -> None:
        super().__init__(conn_id=conn_id, **storage_options)
        self._conn_id = conn_id
        self._client: DataSphereClient | None = None
        self._jobs: dict[str, tuple[float, jobs_pb2.Job]] = {}
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
        """Ask the service again when a job is looked at next."""
        self._jobs.clear()
        super().invalidate_cache(path)

    # Looking ----------------------------------------------------------------------------------------------------

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The entries of a job or of a directory in it.

        :raises FileNotFoundError: there is nothing of that name.
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
        """Size, type, sha256 and var of one entry; exact path first, then the same path written otherwise, then var.

        :raises FileNotFoundError: there is nothing of that name.
        """
        from airflow_provider_datasphere.client.archive import Member

        job, rest = self._locate(path)
        if not plain_path(rest):
            return self._directory(job, rest)
        found = self._find(job, rest)
        if isinstance(found, Member):
            return {**self._directory(job, rest), "type": "file", "size": found.size_bytes}
        if found is not None:
            return self._entry(job, found, rest)
        if any(True for _ in self._children(job, rest)):
            return self._directory(job, rest)
        names = ", ".join(file.desc.path for file in job.output_files) or "none"
        raise FileNotFoundError(
            errno.ENOENT, f"Job {job.id} has no output {rest!r}; it has: {names}", f"{self.protocol}://{path}"
        )

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether there is something of that name. Unlike fsspec's own it doesn't say no to all that goes wrong."""
        try:
            self.info(path, **kwargs)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: str) -> bool:
        """Whether there is a file of that name; as :meth:`exists`."""
        try:
            return bool(self.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def created(self, path: str) -> Any:
        """When the job ended."""
        return self.info(path)["created"]

    modified = created

    def ukey(self, path: str) -> str:
        """The file's sha256 where the job records it."""
        found = self.info(path)
        return str(found.get("sha256") or super().ukey(path))

    def _locate(self, path: str) -> tuple[jobs_pb2.Job, str]:
        job_id, _, rest = self._strip_protocol(path).partition("/")
        if not job_id:
            raise FileNotFoundError(errno.ENOENT, "name a job: datasphere://<job id>/<output path or var>", path)
        return self._job(job_id), rest

    def _job(self, job_id: str) -> jobs_pb2.Job:
        from airflow_provider_datasphere.client.errors import DataSphereError, ResultsError
        from airflow_provider_datasphere.client.results import require_results
        from airflow_provider_datasphere.exceptions import translated

        at, job = self._jobs.get(job_id, (0.0, None))
        if job is None or time.monotonic() - at > _JOB_SECONDS:
            with translated():
                try:
                    job = self.client.get(job_id)
                    require_results(job)
                except DataSphereError as error:
                    if isinstance(error, ResultsError) or _says_not_found(error):
                        raise FileNotFoundError(errno.ENOENT, str(error), f"{self.protocol}://{job_id}") from error
                    # fsspec takes "not found" for an empty folder; of a refused credential that would be a lie.
                    raise
            self._jobs[job_id] = (time.monotonic(), job)
        return job

    def _find(self, job: jobs_pb2.Job, rest: str) -> Any:
        """The ``File``, or the ``Member`` of a directory output's archive, that ``rest`` names; None if none does."""
        plain = plain_path(rest)
        for named, wanted in ((_path, rest), (_place, plain), (_var, rest)):
            for file in job.output_files:
                if wanted and named(file) == wanted:
                    return file
        archive, base = self._archive_at(job, plain)
        if archive is None:
            return None
        inner = plain[len(base) + 1 :] if base else plain
        return next((member for member in self._listing(job, archive).files if str(member.path) == inner), None)

    def _archive_at(self, job: jobs_pb2.Job, plain: str) -> tuple[jobs_pb2.File | None, str]:
        """The directory output that the plain path is or lies in, and by which name it is called there.

        That name is empty where the directory is the working folder itself, in which everything else lies.
        """
        archives = [file for file in job.output_files if _is_archive(file)]
        for named in (_place, _var):
            for file in archives:
                if named(file) and f"{plain}/".startswith(f"{named(file)}/"):
                    return file, named(file)
        return next((file for file in archives if not _place(file)), None), ""

    def _children(self, job: jobs_pb2.Job, rest: str) -> Iterator[dict[str, Any]]:
        plain = plain_path(rest)
        prefix = f"{plain}/" if plain else ""
        for file in job.output_files:
            if _place(file) and _place(file).startswith(prefix):
                yield self._child(job, prefix, _place(file), self._entry(job, file, _place(file)))
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
        entry = {**self._directory(job, rest), "var": file.desc.var or None, "sha256": file.sha256}
        return entry if _is_archive(file) else {**entry, "type": "file", "size": file.size_bytes}

    # Reading ----------------------------------------------------------------------------------------------------

    def _reader(self, job: jobs_pb2.Job, file: jobs_pb2.File) -> Any:
        from airflow_provider_datasphere.client.links import Link, RangeReader

        return RangeReader(self.client.http, Link(self.client, job.id, file), file.size_bytes)

    def _archive(self, job: jobs_pb2.Job, file: jobs_pb2.File, buffer_bytes: int) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(cast("Any", io.BufferedReader(self._reader(job, file), buffer_bytes)))
        except zipfile.BadZipFile as error:
            raise OSError(errno.EIO, f"The directory {file.desc.path} of job {job.id} is damaged: {error}") from error

    def _listing(self, job: jobs_pb2.Job, file: jobs_pb2.File) -> Listing:
        from airflow_provider_datasphere.client.archive import list_archive
        from airflow_provider_datasphere.client.errors import ResultsError

        key = (job.id, file.desc.path)
        if key not in self._listings:
            with self._archive(job, file, 64 * 1024) as archive:
                try:
                    self._listings[key] = list_archive(archive, _place(file).rpartition("/")[2], file.size_bytes)
                except ResultsError as error:
                    raise OSError(
                        errno.EIO, f"The directory {file.desc.path} of job {job.id} can't be used: {error}"
                    ) from error
        return self._listings[key]

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        from airflow_provider_datasphere.client.archive import Member

        if mode != "rb":
            self._refuse(path)
        job, rest = self._locate(path)
        found = self._find(job, rest)
        if isinstance(found, Member):
            file, _ = self._archive_at(job, plain_path(rest))
            assert file is not None
            # The open member keeps the archive's file open; closing the archive itself then loses nothing.
            with self._archive(job, file, 1024 * 1024) as archive:
                return archive.open(found.info)
        entry = self.info(path)
        if found is None or entry["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        kwargs.setdefault("cache_type", "readahead")
        # "size" comes where an open file was pickled; the job knows it.
        for name in ("cache_options", "autocommit", "size"):
            kwargs.pop(name, None)
        return _OutputFile(
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
        """Download one file; it gets its name when it is complete and checked.

        :param lpath: its path, or an open file to write to.
        """
        if outfile is not None or isfilelike(lpath) or self.isdir(rpath):
            super().get_file(rpath, lpath, callback=callback, outfile=outfile, **kwargs)
            return
        target = Path(lpath)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            super().get_file(rpath, str(partial), callback=callback, **kwargs)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    # Writing isn't ----------------------------------------------------------------------------------------------

    def _refuse(self, path: str, *_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.EROFS, "The files of a DataSphere job can't be changed", path)

    cp_file = _rm = rm_file = mkdir = makedirs = rmdir = touch = put_file = mv = _refuse


class _OutputFile(AbstractBufferedFile):  # type: ignore[misc]
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


def _says_not_found(error: Exception) -> bool:
    import grpc

    call = error.__cause__
    return isinstance(call, grpc.RpcError) and call.code() is grpc.StatusCode.NOT_FOUND


def _path(file: jobs_pb2.File) -> str:
    path: str = file.desc.path
    return path


def _place(file: jobs_pb2.File) -> str:
    return plain_path(file.desc.path)


def _var(file: jobs_pb2.File) -> str:
    var: str = file.desc.var
    return var


def _is_archive(file: jobs_pb2.File) -> bool:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    return file.compression_type == jobs_pb2.ZIP
