"""Fetching one file: streamed in bounded memory, resumed where it broke off, checked against size and sha256."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.errors import ResultsError
from airflow_provider_datasphere.client.http import Http, StoppedError, TransferError, TransientError, UrlRefusedError
from airflow_provider_datasphere.client.lanes import MAX_LANES, Connections, Lanes, OneLaneError
from airflow_provider_datasphere.client.links import Link
from airflow_provider_datasphere.client.parts import LocalPart, Part

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.lanes import Piece
    from airflow_provider_datasphere.client.service import JobService

#: How often a file is fetched anew from its beginning because its content is wrong.
WHOLE_TRIES = 3
#: A local file of which at least this much is missing (bytes) may be fetched over several connections.
LARGE_BYTES = 64 * 1024 * 1024


class Fetcher:
    """Fetches files, several at once from several threads.

    :param stop: set from outside to end what is under way.
    :param connections: for all files together. Each has one; those that are left over speed up large ones.
    """

    def __init__(self, http: Http, stop: Event, log: Any, connections: int = MAX_LANES) -> None:
        self._http, self._stop, self._log = http, stop, log
        self._connections = Connections(connections)
        self._lock = Lock()
        self._received = 0

    @property
    def received(self) -> int:
        """Bytes that came so far, those that had to be fetched twice twice."""
        return self._received

    def fetch(self, link: Link, part: Part) -> None:
        """Fill ``part`` with the bytes of the link's file. The caller commits or discards it.

        :raises TransferError: it can't be fetched.
        :raises ResultsError: what comes isn't what the job recorded, again and again.
        """
        file = link.file
        if not file.sha256 and part.size >= file.size_bytes:
            # Nothing may be left to ask for (which is an error, HTTP 416), and what is there can't be checked.
            part.restart()
        with self._connections:
            for tries_left in reversed(range(WHOLE_TRIES)):
                if part.size < file.size_bytes or not file.sha256:
                    self._receive(link, part)
                wrong = _difference(file, part.size, part.sha256(self.check_stop))
                if wrong is None:
                    return
                if not tries_left:
                    raise ResultsError(wrong)
                self._log.warning("%s: %s; fetching it anew.", file.desc.path, wrong)
                part.restart()

    def _receive(self, link: Link, part: Part) -> None:
        size = link.file.size_bytes
        if isinstance(part, LocalPart) and link.file.sha256 and size - part.size >= LARGE_BYTES:
            try:
                Lanes(part, size, self._connections, lambda piece: self._stream(link, piece)).run()
            except OneLaneError as error:
                self._log.debug("%s: fetching it in one: %s.", link.file.desc.path, error)
            else:
                return
        self._stream(link, part)

    def _stream(self, link: Link, to: Part | Piece) -> None:
        file, received = link.file, 0
        # One byte more than the job recorded is enough to know that it is another file.
        limit = file.size_bytes + 1 if file.sha256 else math.inf

        def attempt() -> None:
            nonlocal received
            self.check_stop()
            url = link.url
            try:
                with self._http.get(url, to.position, to.end) as body:
                    as_asked = to.end is None or (body.ranged and body.total in (None, file.size_bytes))
                    if body.start != to.position or not as_asked:  # the storage ignored the range, say
                        to.restart()
                    for chunk in body.chunks():
                        self.check_stop()
                        link.worked()
                        to.write(chunk)
                        received = max(received, to.position)
                        with self._lock:
                            self._received += len(chunk)
                        if to.position >= (to.end or limit):
                            return
            except UrlRefusedError as error:
                link.refused(url, error)
            if to.end is not None and to.position < to.end:
                raise TransientError("the storage sent less than it was asked for")

        def note(error: TransientError, delay: float) -> None:
            self._log.warning(
                "%s: %s; going on at byte %d of %d in %.1f s.",
                file.desc.path,
                error,
                to.position,
                file.size_bytes,
                delay,
            )

        self._http.retrying(self._stop, lambda: received, note)(attempt)

    def check_stop(self) -> None:
        """
        :raises StoppedError: the transfer was told to stop.
        """
        if self._stop.is_set():
            raise StoppedError("the download was told to stop")


def fetch_file(client: JobService, job_id: str, file: jobs_pb2.File, target: Path, stop: Event, log: Any) -> None:
    """Fetch one file of a job to ``target``, checked; the archive of a directory stays packed.

    :param stop: set from outside to end it.
    :raises ResultsError: it can't be had as the job recorded it.
    """
    part = LocalPart(target.with_name(f"{target.name}.part"), lambda: target, file.size_bytes)
    try:
        Fetcher(client.http, stop, log).fetch(Link(client, job_id, file), part)
        part.commit()
    except TransferError as error:
        raise ResultsError(f"{file.desc.path!r} of job {job_id} can't be fetched: {error}.") from error
    except ResultsError as error:
        raise ResultsError(f"{file.desc.path!r} of job {job_id} is damaged: {error}.") from error
    finally:
        part.discard()


def _difference(file: jobs_pb2.File, size: int, sha256: str) -> str | None:
    if not file.sha256:  # some log files have none
        return f"{size} bytes came, the job records {file.size_bytes}" if file.size_bytes not in (0, size) else None
    if size != file.size_bytes:
        return f"{size} bytes came, the job records {file.size_bytes}"
    if sha256 != file.sha256.lower():
        return f"its sha256 is {sha256}, the job records {file.sha256}"
    return None
