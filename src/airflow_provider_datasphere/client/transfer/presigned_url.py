"""Presigned URLs of a job's files: requested again when the storage rejects them, readable as a seekable file."""

from __future__ import annotations

import hashlib
import io
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_datasphere.client.http.errors import TransferError, TransientTransferError, UrlRejectedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.http.client import HttpClient
    from airflow_provider_datasphere.client.http.exchange import Stop

    class DownloadUrlProvider(Protocol):
        """The part of :class:`~airflow_provider_datasphere.client.api.JobApi` that this module needs."""

        def download_urls(self, job_id: str, files: Sequence[jobs_pb2.File]) -> list[jobs_pb2.StorageFile]: ...


#: How many new URLs in a row may be rejected before the download fails.
_RENEWALS = 2
_NO_BYTES = hashlib.sha256().hexdigest()


class PresignedUrl:
    """The presigned URL of one file of a job. Thread-safe.

    :param url: a URL from the service; None: it is requested when needed.
    """

    def __init__(self, client: DownloadUrlProvider, job_id: str, file: jobs_pb2.File, url: str | None = None) -> None:
        self._client, self._job_id, self._url = client, job_id, url
        self._rejected = 0
        self._lock = Lock()
        self.file = file

    @property
    def url(self) -> str:
        """The current URL.

        :raises TransferError: the service has none.
        """
        with self._lock:
            if not self._url:
                stored = self._client.download_urls(self._job_id, [self.file])
                self._url = url_of(self.file, urls_by_file(stored))
                if not self._url:
                    raise TransferError("DataSphere returned no download URL for it; its data may be cleared")
            return self._url

    def mark_succeeded(self) -> None:
        """Note that the storage accepted the URL."""
        self._rejected = 0

    def mark_rejected(self, url: str, error: UrlRejectedError) -> NoReturn:
        """Note that the storage rejected ``url``: the next attempt requests a new one.

        :raises TransientTransferError: always, or :class:`TransferError` where new URLs are rejected repeatedly.
        """
        with self._lock:
            if url == self._url:  # else another thread has noted it already
                self._url = None
                self._rejected += 1
            rejected = self._rejected
        if rejected > _RENEWALS:
            raise TransferError(f"the storage rejects new URLs too: {error}") from error
        raise TransientTransferError(f"the URL was rejected or has expired ({error})") from error


def urls_by_file(stored: Sequence[jobs_pb2.StorageFile]) -> dict[tuple[str, str, str], str]:
    """Index the URLs of a DownloadJobFiles response, for :func:`url_of`."""
    by_content = {("", "", entry.file.sha256): entry.url for entry in stored if entry.file.sha256}
    return {**by_content, **{file_key(entry.file): entry.url for entry in stored}}


def url_of(file: jobs_pb2.File, urls: Mapping[tuple[str, str, str], str]) -> str | None:
    """Return a file's URL. The response may name only one of several files with the same content."""
    return urls.get(file_key(file)) or (urls.get(("", "", file.sha256)) if file.sha256 else None)


def file_key(file: jobs_pb2.File) -> tuple[str, str, str]:
    """Return what identifies a file among those of its job."""
    return file.desc.path, file.desc.var, file.sha256


def recorded_size(file: jobs_pb2.File) -> int | None:
    """Return the size in bytes that the job recorded; None: unknown.

    0 may mean unknown too: only the sha256 of no bytes proves an empty file.
    """
    return file.size_bytes or (0 if file.sha256.lower() == _NO_BYTES else None)


def measured_size(http: HttpClient, link: PresignedUrl, stop: Stop | None = None) -> int:
    """Return a file's size in bytes, as the storage reports it.

    :raises OSError: it doesn't.
    """
    stop = stop or Event()
    size: int | None = None

    def attempt() -> None:
        nonlocal size
        url = link.url
        try:
            with http.get(url, 0, 1, stop) as body:
                size = body.total if body.ranged else body.length
        except UrlRejectedError as error:
            link.mark_rejected(url, error)
        except TransferError as error:
            if "answered 416" not in str(error):
                raise
            size = 0  # an empty file has no first byte

    try:
        http.retrying(stop)(attempt)
    except TransferError as error:
        raise OSError(f"Reading {link.file.desc.path!r}: {error}") from error
    if size is None:
        raise OSError(f"Reading {link.file.desc.path!r}: neither the job nor the storage reports its size")
    return size


class RangeReader(io.RawIOBase):
    """A file behind a :class:`PresignedUrl`, with random access: one Range request per read. For BufferedReader."""

    def __init__(self, http: HttpClient, link: PresignedUrl, size: int, stop: Stop | None = None) -> None:
        self._http, self._link, self._size = http, link, size
        self._stop = stop or Event()
        self._position = 0

    @property
    def file(self) -> jobs_pb2.File:
        """The file as the job records it."""
        return self._link.file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        data = self.fetch(self._position, end)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def fetch(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to ``end`` (exclusive); resumes a broken response at its offset.

        :raises OSError: reading failed, after retries.
        """
        data = bytearray()

        def attempt() -> None:
            url = self._link.url
            try:
                with self._http.get(url, start + len(data), end, self._stop) as body:
                    skip = start + len(data) - body.start  # the storage ignored the range
                    for chunk in body.chunks():
                        self._link.mark_succeeded()
                        data.extend(chunk[max(skip, 0) :])
                        skip -= len(chunk)
                        if len(data) >= end - start:
                            break
            except UrlRejectedError as error:
                self._link.mark_rejected(url, error)
            if len(data) < end - start:
                raise TransientTransferError(f"the storage sent {len(data)} of {end - start} requested bytes")

        if start >= end:
            return b""
        try:
            self._http.retrying(self._stop, received=lambda: len(data))(attempt)
        except TransferError as error:
            raise OSError(f"Reading {self._link.file.desc.path!r}: {error}") from error
        return bytes(data[: end - start])
