"""Prepare inputs for upload: a local path, an object-store URI or another job's output."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.submission.fork_request import overlapping
from airflow_provider_datasphere.client.transfer.archive import is_disk_full
from airflow_provider_datasphere.client.transfer.inputs import (
    InputCandidate,
    prepare_inputs,
    require_disk_space,
    writing,
)
from airflow_provider_datasphere.client.uri import SCHEME, check_job_file_uri, find_file, is_uri, plain_path
from airflow_provider_datasphere.object_store import check_key, missing_bucket, unknown_store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.client.transfer.inputs import InputSource, JobInput

_READ_BYTES = 5 * 1024 * 1024
_COPY_BYTES = 1024 * 1024

logger = logging.getLogger(__name__)


def stage_inputs(
    sources: Sequence[InputSource],
    kept: Sequence[str],
    client: DataSphereClient,
    scratch: Path,
    log: Any = logger,
) -> list[JobInput]:
    """Prepare the inputs of a job for upload.

    A local path stays where it is; an object-store URI is streamed to ``scratch``; of a ``datasphere://`` file the
    job knows sha256 and size, so it is downloaded only if the service asks for its upload. Directories (local, or
    everything below a URI) become zip files.

    :param sources: local paths or URIs. ``datasphere://`` without a connection uses ``client``.
    :param kept: the paths inside the job of inputs that are there already.
    :param scratch: an existing folder, removed by the caller when the job has its inputs.
    :raises JobRequestError: an input that isn't there, can't be uploaded or is over the service's 5 GiB (10 together).
    :raises DataSphereError: a store that can't be read now, or not enough space on this worker's disk.
    """
    from airflow_provider_datasphere.client.transfer.upload import inspect_local_input

    local = [one.place.removeprefix("file://") for one in sources if _is_local(one.place)]
    stage = _Stage(client, scratch, [_in_job(path) for path in (*kept, *local)], log)
    found = []
    for one in sources:
        if _is_local(one.place):
            path = one.place.removeprefix("file://")
            found.append(inspect_local_input(one.var, path, scratch, one.base_dir))
        elif one.place.startswith(f"{SCHEME}://"):
            found.append(stage.from_job(one.var, one.place))
        else:
            found.append(stage.from_store(one.var, one.place))
    return prepare_inputs(found, scratch)


def _is_local(place: str) -> bool:
    return place.startswith("file://") or not is_uri(place)


def _in_job(path: str) -> PurePosixPath:
    """Return the path to compare with others: relative ones as if they were here, as the SDK does."""
    return PurePosixPath(os.path.abspath(path))


class _Stage:
    def __init__(self, client: DataSphereClient, scratch: Path, taken: list[PurePosixPath], log: Any) -> None:
        self._clients: dict[str | None, DataSphereClient] = {None: client}
        self._scratch, self._taken, self._log = scratch, taken, log
        # An interrupt of this client ends downloads from another connection too.
        self._stop = Event()
        client.add_interrupt_callback(self._stop.set)

    def _path_for(self, var: str, name: str) -> str:
        """Return a staged input's path in the job: its base name, or below the variable's name if that is taken."""
        path, folder = name, var
        while overlapping(_in_job(path), self._taken):
            path = f"{folder}/{name}"
            folder += "_"
        self._taken.append(_in_job(path))
        return path

    def _new_file(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._scratch)) / "content"

    def from_job(self, var: str, place: str) -> InputCandidate:
        from airflow_provider_datasphere.client.errors import ResultsError, ResultsGoneError
        from airflow_provider_datasphere.client.transfer.file_download import download_file
        from airflow_provider_datasphere.client.transfer.inputs import JobInput
        from airflow_provider_datasphere.client.transfer.presigned_url import recorded_size
        from airflow_provider_datasphere.client.transfer.selection import require_results
        from airflow_provider_datasphere.client.transfer.upload import hash_file_input

        uri = check_job_file_uri(f"Input {var}", place)
        client = self._client(uri.conn_id)
        job = client.get(uri.job_id)
        try:
            require_results(job)
            file = find_file(job, uri.path)
        except ResultsGoneError as error:
            raise JobRequestError(f"Input {var}: {place}: {error}") from error
        except (ResultsError, JobRequestError) as error:
            raise type(error)(f"Input {var}: {place}: {error}") from error
        what, size = f"Input {var}: {place}", file.size_bytes
        path = self._path_for(var, plain_path(file.desc.path).rpartition("/")[2] or file.desc.var or var)

        def fetch(stop: Event) -> Path:
            require_disk_space(what, size, self._scratch)
            self._log.info("%s: downloading %d bytes.", what, size)
            with writing(what, self._scratch):
                fetched = self._new_file()
                download_file(client, job.id, file, fetched, stop, self._log)
                return fetched

        @contextmanager
        def content(stop: Event) -> Iterator[Path]:
            fetched = fetch(stop)
            try:
                yield fetched
            finally:
                fetched.unlink()

        if file.sha256 and recorded_size(file) is not None:
            given = JobInput(var, path, file.sha256.lower(), size, file.compression_type, content)
            return InputCandidate(what, size, 0, lambda: given)
        return InputCandidate(
            what, size, size, lambda: hash_file_input(var, path, fetch(self._stop), file.compression_type)
        )

    def _client(self, conn_id: str | None) -> DataSphereClient:
        if conn_id not in self._clients:
            from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

            self._clients[conn_id] = DataSphereHook(conn_id or DataSphereHook.default_conn_name).get_conn()
        return self._clients[conn_id]

    def from_store(self, var: str, place: str) -> InputCandidate:
        from airflow_provider_datasphere.compat import ObjectStoragePath

        what = f"Input {var}: {place}"
        check_key(f"Input {var}", place)
        try:
            path = ObjectStoragePath(place)
            fs, key = path.fs, path.path.rstrip("/")
        except (ValueError, ImportError) as error:
            raise JobRequestError(f"{what}: {unknown_store(place, error)}") from error
        except Exception as error:  # stores raise errors of any class
            raise DataSphereError(f"{what} can't be read: {type(error).__name__}: {error}") from error
        with _readable(what, fs, key):
            found = fs.info(key)
            files = None
            if found["type"] == "directory":
                below = fs.find(key, detail=True)
                files = {name: entry for name, entry in below.items() if entry["type"] == "file"}
                if not files:
                    raise JobRequestError(f"{what} has no files.")
                for name in files:
                    if {".", ".."} & set(name.removeprefix(key).split("/")):
                        raise JobRequestError(f"{what}: its key {name!r} has a step '.' or '..', which no path has.")
            # Some stores don't report sizes; then the input is measured after its download.
            size = sum(entry.get("size") or 0 for entry in ([found] if files is None else files.values()))
        name = self._path_for(var, PurePosixPath(key).name)
        return InputCandidate(what, size, size, lambda: self._fetched(var, what, name, size, fs, key, files))

    def _fetched(
        self, var: str, what: str, name: str, size: int, fs: Any, key: str, files: dict[str, Any] | None
    ) -> JobInput:
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        from airflow_provider_datasphere.client.transfer.upload import hash_file_input

        local = self._new_file()
        with _readable(what, fs, key):
            if files is not None:
                self._log.info("%s: downloading %d files (%d bytes).", what, len(files), size)
                _zip_tree(fs, key, files, local)
                compression = jobs_pb2.ZIP
            else:
                self._log.info("%s: downloading %d bytes.", what, size)
                with fs.open(key, "rb", block_size=_READ_BYTES) as source, local.open("wb") as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
                compression = jobs_pb2.NONE
        return hash_file_input(var, name, local, compression)


@contextmanager
def _readable(what: str, fs: Any, key: str) -> Iterator[None]:
    try:
        yield
    except DataSphereError:
        raise
    except FileNotFoundError as error:
        if bucket := missing_bucket(fs, key):
            raise JobRequestError(f"{what}: there is no bucket {bucket!r}.") from error
        raise JobRequestError(f"{what} doesn't exist.") from error
    except Exception as error:  # stores raise errors of any class
        if is_disk_full(error):
            raise
        raise DataSphereError(f"{what} can't be read: {type(error).__name__}: {error}") from error


def _zip_tree(fs: Any, root: str, files: dict[str, Any], archive: Path) -> None:
    """Pack files like a local directory: uncompressed, sorted, entry names beginning with the directory's own."""
    with zipfile.ZipFile(archive, "w") as target:
        for key in sorted(files):
            entry = PurePosixPath(root).name + key.removeprefix(root)
            # A fixed time stamp: the same content makes the same archive, which is then stored once.
            info = zipfile.ZipInfo(entry)
            info.external_attr = 0o644 << 16
            info.file_size = files[key].get("size") or 0
            with fs.open(key, "rb", block_size=_READ_BYTES) as source, target.open(info, "w") as packed:
                shutil.copyfileobj(source, packed, _COPY_BYTES)
