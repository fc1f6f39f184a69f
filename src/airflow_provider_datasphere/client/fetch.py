"""Fetching one file: streamed in bounded memory, resumed where it broke off, checked against size and sha256."""

from __future__ import annotations

import hashlib
import queue
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.destinations import LocalPart, Part
from airflow_provider_datasphere.client.errors import ResultsError
from airflow_provider_datasphere.client.http import Http, StoppedError, TransferError, TransientError, UrlRefusedError
from airflow_provider_datasphere.client.links import Link

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.service import JobService

#: How often a file is fetched anew from its beginning because its content is wrong.
WHOLE_TRIES = 3
#: Files from this size on (bytes) are hashed in a thread beside the one that receives and writes them.
HASH_ASIDE_BYTES = 8 * 1024 * 1024


class Fetcher:
    """Fetches files, several at once from several threads.

    :param stop: set from outside to end what is under way.
    """

    def __init__(self, http: Http, stop: Event, log: Any) -> None:
        self._http, self._stop, self._log = http, stop, log
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
        file, digest = link.file, _Digest(link.file.size_bytes, part.chunks_ahead)
        try:
            for chunk in part.existing():
                self.check_stop()
                digest.update(chunk)
            if not file.sha256 and part.size >= file.size_bytes:
                # Nothing may be left to ask for (which is an error, HTTP 416), and what is there can't be checked.
                part.restart()
                digest.restart()
            for tries_left in reversed(range(WHOLE_TRIES)):
                if part.size < file.size_bytes or not file.sha256:
                    self._stream(link, part, digest)
                wrong = _difference(file, part.size, digest.hexdigest())
                if wrong is None:
                    return
                if not tries_left:
                    raise ResultsError(wrong)
                self._log.warning("%s: %s; fetching it anew.", file.desc.path, wrong)
                part.restart()
                digest.restart()
        finally:
            digest.close()

    def _stream(self, link: Link, part: Part, digest: _Digest) -> None:
        file, received = link.file, 0

        def attempt() -> None:
            nonlocal received
            self.check_stop()
            try:
                with self._http.get(link.url, part.size) as body:
                    if body.start != part.size:  # the storage ignored the range
                        part.restart()
                        digest.restart()
                    for chunk in body.chunks():
                        self.check_stop()
                        link.worked()
                        part.write(chunk)
                        digest.update(chunk)
                        received = max(received, part.size)
                        with self._lock:
                            self._received += len(chunk)
                        if file.sha256 and part.size > file.size_bytes:
                            return
            except UrlRefusedError as error:
                link.refused(error)

        def note(error: TransientError, delay: float) -> None:
            self._log.warning(
                "%s: %s; going on at byte %d of %d in %.1f s.",
                file.desc.path,
                error,
                part.size,
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
    part = LocalPart(target.with_name(f"{target.name}.part"), lambda: target)
    try:
        Fetcher(client.http, stop, log).fetch(Link(client, job_id, file), part)
        part.commit()
    except TransferError as error:
        raise ResultsError(f"{file.desc.path!r} of job {job_id} can't be fetched: {error}.") from error
    except ResultsError as error:
        raise ResultsError(f"{file.desc.path!r} of job {job_id} is damaged: {error}.") from error
    finally:
        part.discard()


class _Digest:
    """sha256 of a stream; of a large one it is computed in a thread of its own, beside receiving and writing.

    :param chunks_ahead: how many chunks may wait for that thread.
    """

    def __init__(self, size: int, chunks_ahead: int) -> None:
        self._sha256 = hashlib.sha256()
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=chunks_ahead)
        self._thread = None
        if size >= HASH_ASIDE_BYTES:
            self._thread = Thread(target=self._work, name="datasphere-sha256", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._sha256.update(chunk)
            self._chunks.task_done()

    def update(self, chunk: bytes) -> None:
        if self._thread:
            self._chunks.put(chunk)
        else:
            self._sha256.update(chunk)

    def hexdigest(self) -> str:
        self._settle()
        return self._sha256.hexdigest()

    def restart(self) -> None:
        self._settle()
        self._sha256 = hashlib.sha256()

    def close(self) -> None:
        if self._thread:
            self._chunks.put(None)

    def _settle(self) -> None:
        if self._thread:
            self._chunks.join()


def _difference(file: jobs_pb2.File, size: int, sha256: str) -> str | None:
    if not file.sha256:  # some log files have none
        return f"{size} bytes came, the job records {file.size_bytes}" if file.size_bytes not in (0, size) else None
    if size != file.size_bytes:
        return f"{size} bytes came, the job records {file.size_bytes}"
    if sha256 != file.sha256.lower():
        return f"its sha256 is {sha256}, the job records {file.sha256}"
    return None
