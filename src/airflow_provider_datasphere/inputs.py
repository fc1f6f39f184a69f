"""Inputs from anywhere: local path, object-store URI or another job's output, made ready to upload."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.uri import SCHEME, find_file, parse_job_file_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.client.upload import JobInput

_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_READ_BYTES = 5 * 1024 * 1024
_COPY_BYTES = 1024 * 1024

logger = logging.getLogger(__name__)


def stage_vars(
    vars: Mapping[str, str],
    source_parameters: jobs_pb2.JobParameters,
    client: DataSphereClient,
    scratch: Path,
    log: Any = logger,
) -> list[JobInput]:
    """Make the inputs of a job ready to upload.

    A local path stays where it is; an object-store URI is streamed to ``scratch``; of a ``datasphere://`` file the
    job knows sha256 and size, so that it is fetched only if the service asks for its upload. Directories (local, or
    everything below a URI) become zip files.

    :param vars: input variable → local path or URI. ``datasphere://`` without a connection uses ``client``.
    :param source_parameters: of the source job; its inputs that are not overridden keep their paths.
    :param scratch: an existing folder, removed by the caller when the job has its inputs.
    :raises JobRequestError: an input that isn't there, can't be uploaded or is over the service's 5 GiB.
    :raises DataSphereError: a store that can't be read now.
    """
    from airflow_provider_datasphere.client.upload import local_input

    stage = _Stage(client, scratch, log)
    stage.taken = {file.desc.path for file in source_parameters.input_files if file.desc.var not in vars}
    inputs = []
    for var, value in vars.items():
        place = str(value)
        if place.startswith(f"{SCHEME}://"):
            inputs.append(stage.from_job(var, place))
        elif place.startswith("file://"):
            inputs.append(local_input(var, place.removeprefix("file://"), scratch))
        elif _URI.match(place):
            inputs.append(stage.from_store(var, place))
        else:
            inputs.append(local_input(var, place, scratch))
    return inputs


class _Stage:
    def __init__(self, client: DataSphereClient, scratch: Path, log: Any) -> None:
        self._clients: dict[str | None, DataSphereClient] = {None: client}
        self._scratch, self._log = scratch, log
        self.taken: set[str] = set()

    def _path_for(self, var: str, name: str) -> str:
        """What the job calls a staged input: its base name, or below the variable's name where that is taken."""
        path = name if name not in self.taken else f"{var}/{name}"
        self.taken.add(path)
        return path

    def _new_file(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._scratch)) / "content"

    def from_job(self, var: str, place: str) -> JobInput:
        from airflow_provider_datasphere.client.errors import ResultsError
        from airflow_provider_datasphere.client.fetch import fetch_file
        from airflow_provider_datasphere.client.results import ResultsGoneError, require_results
        from airflow_provider_datasphere.client.upload import JobInput, described

        uri = parse_job_file_uri(place)
        client = self._client(uri.conn_id)
        job = client.get(uri.job_id)
        try:
            require_results(job)
            file = find_file(job, uri.path)
        except ResultsGoneError as error:
            raise JobRequestError(f"Input {var}: {place}: {error}") from error
        except (ResultsError, JobRequestError) as error:
            raise type(error)(f"Input {var}: {place}: {error}") from error
        _check_size(var, place, file.size_bytes)
        path = self._path_for(var, PurePosixPath(file.desc.path).name or file.desc.var)

        @contextmanager
        def content() -> Iterator[Path]:
            fetched = self._new_file()
            self._log.info("Input %s: fetching %s (%d bytes).", var, place, file.size_bytes)
            fetch_file(client, job.id, file, fetched, self._log)
            try:
                yield fetched
            finally:
                fetched.unlink()

        if file.sha256:
            return JobInput(var, path, file.sha256, file.size_bytes, file.compression_type, content)
        fetched = self._new_file()
        fetch_file(client, job.id, file, fetched, self._log)
        return described(var, path, fetched, file.compression_type)

    def _client(self, conn_id: str | None) -> DataSphereClient:
        if conn_id not in self._clients:
            from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

            self._clients[conn_id] = DataSphereHook(conn_id or DataSphereHook.default_conn_name).get_conn()
        return self._clients[conn_id]

    def from_store(self, var: str, place: str) -> JobInput:
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        from airflow_provider_datasphere.client.upload import described
        from airflow_provider_datasphere.compat import ObjectStoragePath

        try:
            path = ObjectStoragePath(place)
            fs, key = path.fs, path.path.rstrip("/")
            found = fs.info(key)
        except FileNotFoundError as error:
            raise JobRequestError(f"Input {var}: {place} doesn't exist.") from error
        except Exception as error:  # stores raise what they like; none of it is ours to know
            raise DataSphereError(f"Input {var}: {place} can't be read: {type(error).__name__}: {error}") from error
        name = PurePosixPath(key).name
        local = self._new_file()
        compression: int = jobs_pb2.NONE
        try:
            if found["type"] == "directory":
                compression = jobs_pb2.ZIP
                self._zip_tree(var, place, fs, key, local)
            else:
                _check_size(var, place, found["size"])
                self._check_room(var, place, found["size"])
                self._log.info("Input %s: fetching %s (%d bytes).", var, place, found["size"])
                with fs.open(key, "rb", block_size=_READ_BYTES) as source, local.open("wb") as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
        except DataSphereError:
            raise
        except Exception as error:
            raise DataSphereError(f"Input {var}: {place} can't be read: {type(error).__name__}: {error}") from error
        return described(var, self._path_for(var, name), local, compression)

    def _zip_tree(self, var: str, place: str, fs: Any, root: str, archive: Path) -> None:
        """As a local directory is packed: uncompressed, sorted, entry names beginning with the directory's own."""
        files = {key: entry for key, entry in fs.find(root, detail=True).items() if entry["type"] == "file"}
        if not files:
            raise JobRequestError(f"Input {var}: {place} has no files.")
        total = sum(entry["size"] for entry in files.values())
        _check_size(var, place, total)
        self._check_room(var, place, total)
        self._log.info("Input %s: fetching %d files of %s (%d bytes).", var, len(files), place, total)
        with zipfile.ZipFile(archive, "w") as target:
            for key in sorted(files):
                entry = PurePosixPath(root).name + key.removeprefix(root)
                # A fixed time stamp: the same content makes the same archive, which is then stored once.
                info = zipfile.ZipInfo(entry)
                info.external_attr = 0o644 << 16
                info.file_size = files[key]["size"]
                with fs.open(key, "rb", block_size=_READ_BYTES) as source, target.open(info, "w") as packed:
                    shutil.copyfileobj(source, packed, _COPY_BYTES)

    def _check_room(self, var: str, place: str, size: int) -> None:
        free = shutil.disk_usage(self._scratch).free
        if size > free:
            raise DataSphereError(
                f"Input {var}: {place} has {size} bytes, but this worker's {self._scratch} has only {free} left."
            )


def _check_size(var: str, place: str, size: int) -> None:
    from airflow_provider_datasphere.client.upload import MAX_FILE_BYTES

    if size > MAX_FILE_BYTES:
        raise JobRequestError(
            f"Input {var}: {place} has {size} bytes: DataSphere takes at most {MAX_FILE_BYTES} (5 GiB) a file."
        )
