"""A job's inputs: their descriptions, and their upload to presigned URLs."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, BinaryIO

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.http.client import CHUNK_BYTES, HttpClient
from airflow_provider_datasphere.client.http.errors import (
    StoppedError,
    TransferError,
    TransientTransferError,
    UrlRejectedError,
)
from airflow_provider_datasphere.client.transfer.archive import (
    check_name,
    directory_size,
    require_regular_file,
    unreadable,
    zip_directory,
)
from airflow_provider_datasphere.client.transfer.inputs import InputCandidate, InputSource, JobInput, prepare_inputs
from airflow_provider_datasphere.client.transfer.workers import Workers, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.logger import LoggerLike

_PARALLEL = 4
_PROGRESS_SECONDS = 5.0


class UploadUrlExpired(DataSphereError):
    """The storage rejected the upload URLs; the operation that created the job has new ones."""


def local_input(var: str, path: str, scratch: Path, base_dir: Path | None = None) -> JobInput:
    """Describe a local file or directory as the official SDK does.

    ``FileDesc.path`` is a file's path as it is given, and a directory's without what changes nothing (``./``, ``/``).

    :param scratch: an existing folder for the zip files of directories.
    :param base_dir: what a relative path is relative to; default: the current folder.
    :raises JobRequestError: ``path`` is empty, there is nothing at it, it can't be read, is neither a file nor a
        directory, or too large.
    :raises DataSphereError: ``scratch`` has no room for it.
    """
    return prepare_inputs([inspect_local_input(var, path, scratch, base_dir)], scratch)[0]


def stage_local_inputs(sources: Sequence[InputSource], _kept: Sequence[str], scratch: Path) -> Sequence[JobInput]:
    """Make inputs ready for upload that are all local paths."""
    return prepare_inputs([inspect_local_input(one.var, one.place, scratch, one.base_dir) for one in sources], scratch)


def inspect_local_input(var: str, path: str, scratch: Path, base_dir: Path | None = None) -> InputCandidate:
    """Check a local input without reading it: the first half of :func:`local_input`.

    :raises JobRequestError: as there, except for errors of reading.
    """
    what = f"Input {var}: {path}" if var else f"Input {path}"
    if not path.removeprefix("file://").strip():
        # Path("") is the current folder.
        raise JobRequestError(f"Input {var}: its path is {path!r}: give the path of a file or directory.")
    check_name(f"Input {var}", path)
    source = Path(path) if base_dir is None else base_dir / path
    try:
        source.stat()
    except FileNotFoundError:
        exists = False
    except ValueError as error:  # NUL
        raise JobRequestError(f"Input {var}: invalid path {path!r}: {error}.") from error
    except OSError as error:
        raise unreadable(what, error) from error
    else:
        exists = True
    if not exists:
        raise JobRequestError(
            f"{what} doesn't exist on this worker ({_folder_searched(base_dir)}). Give an existing path, or a URI "
            "such as s3://connection@bucket/key or datasphere://job/file, which every worker can read."
        )
    if source.is_dir():
        size = directory_size(source)
        return InputCandidate(what, size, size, lambda: _zipped(var, path, source, scratch))
    size = require_regular_file(source, what).st_size

    def read() -> JobInput:
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        return hash_file_input(var, path, source, jobs_pb2.NONE)

    return InputCandidate(what, size, 0, read)


def _folder_searched(base_dir: Path | None) -> str:
    return f"current folder: {os.getcwd()}" if base_dir is None else f"looked in {base_dir.absolute()}"


def _zipped(var: str, path: str, directory: Path, scratch: Path) -> JobInput:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    handle, name = tempfile.mkstemp(suffix=".zip", dir=scratch)
    os.close(handle)
    # resolve(): the entries begin with the directory's name, which "." or "data/.." doesn't have.
    zip_directory(directory if directory.name else directory.resolve(), Path(name))
    return hash_file_input(var, str(Path(path)), Path(name), jobs_pb2.ZIP)


def hash_file_input(var: str, path: str, source: Path, compression_type: int) -> JobInput:
    """Hash the local file ``source``; return it as a :class:`JobInput`.

    :raises JobRequestError: it can't be read.
    """
    digest, before = hashlib.sha256(), None
    try:
        with source.open("rb") as stream:
            before = os.fstat(stream.fileno())
            size = 0
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise unreadable(f"Input {var or path}: {source}", error) from error
    expected = (before.st_size, before.st_mtime_ns)

    @contextmanager
    def content(_stop: Event) -> Iterator[Path]:
        try:
            found = source.stat()
        except OSError as error:
            raise JobRequestError(f"Input {var or path}: {source} was removed before its upload.") from error
        if (found.st_size, found.st_mtime_ns) != expected:
            raise JobRequestError(_changed(var or path))
        yield source

    return JobInput(var, path, digest.hexdigest(), size, compression_type, content)


def upload_inputs(
    inputs: Sequence[JobInput],
    upload_files: Sequence[jobs_pb2.StorageFile],
    http: HttpClient,
    logger: LoggerLike,
    *,
    stop: Event | None = None,
) -> None:
    """Upload the inputs that the service doesn't have yet.

    :param inputs: all inputs of the job.
    :param upload_files: ``upload_files`` of CreateProjectJobResponse or CloneProjectJobResponse, in any order; an
        entry without a URL is stored already.
    :param stop: set from another thread to end the uploads; also set here when one fails, so use it for one call only.
    :raises UploadUrlExpired: the storage rejected a URL (HTTP 401 or 403).
    :raises JobRequestError: a file changed since it was hashed.
    :raises DataSphereError: an upload failed after retries, or the service requests a file that isn't among the inputs.
    """
    stop = stop or Event()
    wanted = {}
    for entry in upload_files:
        if entry.url:
            wanted[entry.url] = (_input_for(entry.file, inputs), entry.url)
    if not wanted:
        if inputs:
            logger.info("All inputs are in the project's storage already; nothing to upload.")
        return
    total = sum(job_input.size_bytes for job_input, _ in wanted.values())
    logger.info("Uploading %d of %d inputs (%d bytes).", len(wanted), len(inputs), total)
    began = time.monotonic()
    meter = _Meter()
    with Workers(_PARALLEL, "datasphere-upload") as workers:
        pending = {workers.submit(_upload, *pair, http, logger, stop, meter) for pair in wanted.values()}
        try:
            while pending:
                done, pending = wait_for(pending, _PROGRESS_SECONDS, stop)
                failed = next((error for future in done if (error := future.exception())), None)
                if failed:
                    raise failed
                if pending:
                    logger.info("Uploaded %d of %d bytes.", meter.sent, total)
        except StoppedError as error:
            raise DataSphereError("The upload was stopped, because the task is ending.") from error
        finally:
            if pending:
                stop.set()
    seconds = time.monotonic() - began
    logger.info("Uploaded %d inputs: %d bytes in %.1f s.", len(wanted), total, seconds)


def _input_for(file: jobs_pb2.File, inputs: Sequence[JobInput]) -> JobInput:
    for job_input in inputs:
        if (job_input.sha256, job_input.size_bytes) == (file.sha256.lower(), file.size_bytes):
            return job_input
    raise DataSphereError(
        f"DataSphere requests the upload of {file.desc.path!r} (var {file.desc.var!r}, {file.size_bytes} bytes, "
        f"sha256 {file.sha256}), which is none of the job's inputs: {', '.join(i.path for i in inputs) or 'none'}."
    )


def _upload(job_input: JobInput, url: str, http: HttpClient, logger: LoggerLike, stop: Event, meter: _Meter) -> None:
    name = job_input.var or job_input.path

    def send() -> None:
        source.seek(0)
        reader = _Reader(source, job_input, stop, meter)
        try:
            http.put(url, reader, job_input.size_bytes, stop)
        finally:
            reader.end()
        if reader.digest.hexdigest() != job_input.sha256 or source.read(1):
            raise JobRequestError(_changed(name))

    def note(error: TransientTransferError, delay: float) -> None:
        logger.warning("Upload of input %s: %s; retrying in %.1f s.", name, error, delay)

    try:
        with job_input.content(stop) as path, path.open("rb") as source:
            http.retrying(stop, note=note)(send)
    except UrlRejectedError as error:
        raise UploadUrlExpired(f"Upload of input {name}: {error}.") from error
    except (TransferError, OSError) as error:
        raise DataSphereError(f"Upload of input {name} ({job_input.size_bytes} bytes) failed: {error}.") from error


def _changed(name: str) -> str:
    return f"Input {name} changed while it was being uploaded; the job was not started. Write it before this task runs."


class _Meter:
    def __init__(self) -> None:
        self.sent = 0
        self._lock = Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.sent += size


class _Reader:
    """The body of a PUT: hashes what is read, and never returns more than the announced size."""

    def __init__(self, source: BinaryIO, job_input: JobInput, stop: Event, meter: _Meter) -> None:
        self.digest = hashlib.sha256()
        self._source, self._input, self._stop, self._meter = source, job_input, stop, meter
        self._left, self._sent = job_input.size_bytes, 0

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise StoppedError("the task is being stopped")
        chunk = self._source.read(self._left if size < 0 else min(size, self._left))
        if not chunk and self._left:
            raise JobRequestError(_changed(self._input.var or self._input.path))
        self.digest.update(chunk)
        self._left -= len(chunk)
        self._sent += len(chunk)
        self._meter.add(len(chunk))
        return chunk

    def seek(self, offset: int) -> None:
        """Start again from the beginning.

        :param offset: 0.
        """
        self._meter.add(-self._sent)
        self._source.seek(offset)
        self.digest = hashlib.sha256()
        self._left, self._sent = self._input.size_bytes, 0

    def end(self) -> None:
        if self._left:
            self._meter.add(-self._sent)  # this attempt failed
