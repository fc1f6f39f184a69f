"""Presigned links to a job's files: renewed when the storage refuses them, readable as a seekable file."""

from __future__ import annotations

import io
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_datasphere.client.http import Http, TransferError, TransientError, UrlRefusedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    class LinkSource(Protocol):
        """What this module needs of :class:`~airflow_provider_datasphere.client.jobs.DataSphereClient`."""

        def download_urls(self, job_id: str, files: Sequence[jobs_pb2.File]) -> list[jobs_pb2.StorageFile]: ...


#: How often in a row a new link may be refused before the storage is believed.
_RENEWALS = 2


class Link:
    """The link to one file of a job. Thread-safe.

    :param url: a link that was fetched already; None fetches one when it is needed.
    """

    def __init__(self, client: LinkSource, job_id: str, file: jobs_pb2.File, url: str | None = None) -> None:
        self._client, self._job_id, self._url = client, job_id, url
        self._refused = 0
        self._lock = Lock()
        self.file = file

    @property
    def url(self) -> str:
        """The link.

        :raises TransferError: the service gives none.
        """
        with self._lock:
            if not self._url:
                stored = self._client.download_urls(self._job_id, [self.file])
                self._url = urls_by_file(stored).get(file_key(self.file))
                if not self._url:
                    raise TransferError("DataSphere gives no download link for it; its data may be cleared")
            return self._url

    def worked(self) -> None:
        """Bytes came through it."""
        self._refused = 0

    def refused(self, url: str, error: UrlRefusedError) -> NoReturn:
        """The storage refused ``url``: have the next try fetch a new one.

        :raises TransientError: always, but for new links that are refused again and again (:class:`TransferError`).
        """
        with self._lock:
            if url == self._url:  # else another thread has met this already
                self._url = None
                self._refused += 1
            refused = self._refused
        if refused > _RENEWALS:
            raise TransferError(f"the storage refuses new links too: {error}") from error
        raise TransientError(f"the link is refused or expired ({error})") from error


def urls_by_file(stored: Sequence[jobs_pb2.StorageFile]) -> dict[tuple[str, str, str], str]:
    """The URLs in an answer of DownloadJobFiles, whatever its order, by :func:`file_key`."""
    return {file_key(entry.file): entry.url for entry in stored}


def file_key(file: jobs_pb2.File) -> tuple[str, str, str]:
    """What tells a job's files apart."""
    return file.desc.path, file.desc.var, file.sha256


class RangeReader(io.RawIOBase):
    """A file behind a :class:`Link` for random access, each read one Range request. Wrap it in BufferedReader."""

    def __init__(self, http: Http, link: Link, size: int, stop: Event | None = None) -> None:
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
        """The bytes from ``start`` to ``end`` (exclusive); goes on where a broken answer ended.

        :raises OSError: they can't be read.
        """
        data = bytearray()

        def attempt() -> None:
            url = self._link.url
            try:
                with self._http.get(url, start + len(data), end) as body:
                    skip = start + len(data) - body.start  # the storage ignored the range
                    for chunk in body.chunks():
                        self._link.worked()
                        data.extend(chunk[max(skip, 0) :])
                        skip -= len(chunk)
                        if len(data) >= end - start:
                            break
            except UrlRefusedError as error:
                self._link.refused(url, error)
            if len(data) < end - start:
                raise TransientError(f"the storage sent {len(data)} bytes where {end - start} were asked for")

        if start >= end:
            return b""
        try:
            self._http.retrying(self._stop, received=lambda: len(data))(attempt)
        except TransferError as error:
            raise OSError(f"Reading {self._link.file.desc.path!r}: {error}") from error
        return bytes(data[: end - start])
