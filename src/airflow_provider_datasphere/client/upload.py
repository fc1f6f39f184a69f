"""A job's inputs: what is sent about them, and their upload to the presigned URLs that the service gives out."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from airflow_provider_datasphere.client.archive import directory_size, require_regular_file, zip_directory
from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.http import (
    CHUNK_BYTES,
    Http,
    StoppedError,
    TransferError,
    TransientError,
    UrlRefusedError,
)
from airflow_provider_datasphere.client.staging import Found, read_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

_PARALLEL = 4
_PROGRESS_INTERVAL = 5.0


class UploadUrlExpired(DataSphereError):
    """The storage refuses the upload URLs; the operation that made the job gives new ones."""


@dataclass(frozen=True)
class JobInput:
    """One input of a job.

    :param var: the variable that the program's command line names it by; empty where it has none.
    :param path: what the job calls it: the path as the user gave it, or the base name of something staged.
    :param sha256: of the bytes to upload, hexadecimal.
    :param size_bytes: how many bytes there are to upload.
    :param compression_type: a value of ``jobs_pb2.FileCompressionType``: NONE for a file, ZIP for a directory.
    :param content: gives a local file with these bytes, for as long as the context lasts. It may be fetched only
        then: where the service has the content already, nobody asks. The event that it is given ends the fetching.
    """

    var: str
    path: str
    sha256: str
    size_bytes: int
    compression_type: int
    content: Callable[[Event], AbstractContextManager[Path]]


def local_input(var: str, path: str, scratch: Path) -> JobInput:
    """Describe a local file or directory as the official SDK does.

    ``FileDesc.path`` is a file's path as it is given, and a directory's without what changes nothing (``./``, ``/``).

    :param scratch: an existing folder for the zip files of directories.
    :raises JobRequestError: ``path`` is empty, there is nothing at it, it can't be read, is neither a file nor a
        directory, or too large.
    :raises DataSphereError: ``scratch`` has no room for it.
    """
    return read_inputs([find_local(var, path, scratch)], scratch)[0]


def find_local(var: str, path: str, scratch: Path) -> Found:
    """The first half of :func:`local_input`: nothing is read or written yet.

    :raises JobRequestError: as there, but for what shows only when it is read.
    """
    what = f"Input {var}: {path}" if var else f"Input {path}"
    if not path.removeprefix("file://").strip():
        # Path("") is the current folder.
        raise JobRequestError(f"Input {var}: its path is {path!r}: give the path of a file or directory.")
    source = Path(path)
    if not source.exists():
        raise JobRequestError(
            f"{what} doesn't exist on this worker (current folder: {os.getcwd()}). Give an existing path, or a URI "
            "such as s3://connection@bucket/key or datasphere://job/file, which every worker can read."
        )
    if source.is_dir():
        size = directory_size(source)
        return Found(what, size, size, lambda: _zipped(var, source, scratch))
    size = require_regular_file(source, what).st_size

    def read() -> JobInput:
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        return described(var, path, source, jobs_pb2.NONE)

    return Found(what, size, 0, read)


def _zipped(var: str, directory: Path, scratch: Path) -> JobInput:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    handle, name = tempfile.mkstemp(suffix=".zip", dir=scratch)
    os.close(handle)
    # resolve(): the entries begin with the directory's name, which "." or "data/.." doesn't have.
    zip_directory(directory if directory.name else directory.resolve(), Path(name))
    return described(var, str(directory), Path(name), jobs_pb2.ZIP)


def described(var: str, path: str, source: Path, compression_type: int) -> JobInput:
    """A :class:`JobInput` whose content is the local file ``source``, hashed here.

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
        raise JobRequestError(f"Input {var or path}: {source} can't be read: {error.strerror}.") from error
    expected = (before.st_size, before.st_mtime_ns)

    @contextmanager
    def content(_stop: Event) -> Iterator[Path]:
        try:
            found = source.stat()
        except OSError as error:
            raise JobRequestError(f"Input {var or path}: {source} went away before its upload.") from error
        if (found.st_size, found.st_mtime_ns) != expected:
            raise JobRequestError(_changed(var or path))
        yield source

    return JobInput(var, path, digest.hexdigest(), size, compression_type, content)


def upload_inputs(
    inputs: Sequence[JobInput],
    upload_files: Sequence[jobs_pb2.StorageFile],
    http: Http,
    log: Any,
    *,
    stop: Event | None = None,
) -> None:
    """Upload what the service asks for.

    :param inputs: all inputs of the job.
    :param upload_files: ``upload_files`` of CreateProjectJobResponse or CloneProjectJobResponse, in any order; an
        entry without a URL is stored already.
    :param stop: set from outside to end the uploads; it is also set here when one of them fails, so that it is good
        for one call.
    :raises UploadUrlExpired: the storage refuses a URL (HTTP 401 or 403).
    :raises JobRequestError: a file changed since it was hashed.
    :raises DataSphereError: an upload failed for good, or the service asks for a file that isn't among the inputs.
    """
    stop = stop or Event()
    wanted = {}
    for entry in upload_files:
        if entry.url:
            wanted[entry.url] = (_input_for(entry.file, inputs), entry.url)
    if not wanted:
        if inputs:
            log.info("No input has to be uploaded: the project has them already.")
        return
    total = sum(job_input.size_bytes for job_input, _ in wanted.values())
    log.info("Uploading %d of %d inputs (%d bytes).", len(wanted), len(inputs), total)
    began = time.monotonic()
    meter = _Meter()
    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="datasphere-upload") as pool:
        futures = [pool.submit(_upload, *pair, http, log, stop, meter) for pair in wanted.values()]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=_PROGRESS_INTERVAL, return_when=FIRST_EXCEPTION)
                failed = next((error for future in done if (error := future.exception())), None)
                if failed:
                    raise failed
                if pending:
                    log.info("Uploaded %d of %d bytes.", meter.sent, total)
        finally:
            if pending:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
    seconds = time.monotonic() - began
    log.info("Uploaded %d inputs: %d bytes in %.1f s.", len(wanted), total, seconds)


def _input_for(file: jobs_pb2.File, inputs: Sequence[JobInput]) -> JobInput:
    for job_input in inputs:
        if (job_input.sha256, job_input.size_bytes) == (file.sha256.lower(), file.size_bytes):
            return job_input
    raise DataSphereError(
        f"DataSphere asks for the upload of {file.desc.path!r} (var {file.desc.var!r}, {file.size_bytes} bytes, "
        f"sha256 {file.sha256}), which is none of the job's inputs: {', '.join(i.path for i in inputs) or 'none'}."
    )


def _upload(job_input: JobInput, url: str, http: Http, log: Any, stop: Event, meter: _Meter) -> None:
    name = job_input.var or job_input.path

    def send() -> None:
        source.seek(0)
        reader = _Reader(source, job_input, stop, meter)
        try:
            http.put(url, cast("BinaryIO", reader), job_input.size_bytes)
        finally:
            reader.end()
        if reader.digest.hexdigest() != job_input.sha256 or source.read(1):
            raise JobRequestError(_changed(name))

    def note(error: TransientError, delay: float) -> None:
        log.warning("Upload of input %s: %s; trying again in %.1f s.", name, error, delay)

    try:
        with job_input.content(stop) as path, path.open("rb") as source:
            http.retrying(stop, note=note)(send)
    except UrlRefusedError as error:
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
    """The body of a PUT: hashes what passes and never gives more than what was announced."""

    def __init__(self, source: BinaryIO, job_input: JobInput, stop: Event, meter: _Meter) -> None:
        self.digest = hashlib.sha256()
        self._source, self._input, self._stop, self._meter = source, job_input, stop, meter
        self._left, self._sent = job_input.size_bytes, 0

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise StoppedError("the task was told to stop")
        chunk = self._source.read(self._left if size < 0 else min(size, self._left))
        if not chunk and self._left:
            raise JobRequestError(_changed(self._input.var or self._input.path))
        self.digest.update(chunk)
        self._left -= len(chunk)
        self._sent += len(chunk)
        self._meter.add(len(chunk))
        return chunk

    def end(self) -> None:
        if self._left:
            self._meter.add(-self._sent)  # this try didn't get through
