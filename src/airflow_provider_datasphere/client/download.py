"""Downloading a job's files: parallel, resumed, checked before they become visible, all or a clear error."""

from __future__ import annotations

import hashlib
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from airflow_provider_datasphere.client.archive import list_archive, open_archive
from airflow_provider_datasphere.client.destinations import Destination, LocalFolder
from airflow_provider_datasphere.client.errors import DataSphereError, ResultsError
from airflow_provider_datasphere.client.fetch import Fetcher
from airflow_provider_datasphere.client.http import StoppedError, TransferError, TransientError
from airflow_provider_datasphere.client.links import Link, RangeReader, file_key, urls_by_file
from airflow_provider_datasphere.client.parts import LocalPart
from airflow_provider_datasphere.client.results import JobFile, downloadable
from airflow_provider_datasphere.client.uri import plain_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.service import JobService

#: How many files are on their way at once.
MAX_PARALLEL = 8
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class _Item:
    kind: str
    file: jobs_pb2.File
    target: PurePosixPath

    @property
    def name(self) -> str:
        return self.file.desc.path or self.file.desc.var

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.target}\0{self.file.sha256}".encode()).hexdigest()[:16]


def download_job_files(
    client: JobService,
    job_id: str,
    *,
    with_logs: bool = False,
    with_diagnostics: bool = False,
    output_dir: Path | str | None = None,
    files: Sequence[str] | None = None,
    destination: Callable[[str, frozenset[str]], Destination] | None = None,
    max_parallel: int = MAX_PARALLEL,
    progress_interval: float = 5.0,
    stop: Event | None = None,
    log: Any = None,
) -> list[dict[str, Any]]:
    """Download the files of an ended job.

    :param with_logs: the job's log files too.
    :param with_diagnostics: its diagnostic files too.
    :param output_dir: local folder, default the current one.
    :param files: glob patterns over output paths and vars; None for all outputs.
    :param destination: makes the place they go to, instead of ``output_dir``, from a name for temporary files and the
        names that the files need there.
    :param max_parallel: files at once, and connections for all of them.
    :param progress_interval: seconds between two progress lines in the log.
    :param stop: set from another thread to end the download.
    :return: one mapping per file: ``path``, ``var``, ``kind`` (output, log, diagnostic), ``size_bytes``, ``sha256``,
        ``uri``; ``uri`` of an unpacked directory ends with a slash.
    :raises ResultsError: the job still runs, its data are gone, or not every file arrived; the message names each.
    :raises JobRequestError: there is no such job, or nothing fits ``files``.
    """
    log = log or logging.getLogger(__name__)
    job = client.get(job_id)
    selected = downloadable(job, files, with_logs=with_logs, with_diagnostics=with_diagnostics, log=log)
    items = _lay_out(selected, job_id)
    reserved = frozenset(item.target.parts[0] for item in items if item.target.parts)
    name = f".datasphere-{job_id}"
    place = destination(name, reserved) if destination else LocalFolder(Path(output_dir or "."), name, reserved)
    if not items:
        return []
    stop = stop or Event()
    client.on_interrupt(stop.set)
    with place:
        return _Download(client, job_id, place, min(max_parallel, place.max_parallel or max_parallel), stop, log).run(
            items, progress_interval
        )


def _lay_out(selected: Iterable[JobFile], job_id: str) -> list[_Item]:
    """Where each file goes below the destination.

    Nothing leaves it, see :func:`plain_path`. A log or diagnostic file with the path of an output goes to ``logs`` or
    ``diagnostics``.
    """
    items: dict[PurePosixPath, _Item] = {}
    for kind, file in selected:
        path = plain_path(file.desc.path)
        # A directory output may be the working folder itself; a file must have a name.
        if "\0" in path or not (path or _is_archive(file)):
            raise ResultsError(f"Job {job_id} has a file whose path can't be used here: {file.desc.path!r}.")
        target = PurePosixPath(path)
        if target in items and kind != "output":
            target = PurePosixPath(f"{kind}s", target)
        item = _Item(kind, file, target)
        other = items.setdefault(target, item)
        if other is not item and other.file.sha256 != file.sha256:
            raise ResultsError(
                f"The files {other.name!r} and {item.name!r} of job {job_id} would both become {str(item.target)!r}. "
                "Pick them with files=[…] and download them to different destinations."
            )
    return list(items.values())


def _is_archive(file: jobs_pb2.File) -> bool:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    return file.compression_type == jobs_pb2.ZIP


class _Download:
    def __init__(
        self,
        client: JobService,
        job_id: str,
        place: Destination,
        parallel: int,
        stop: Event,
        log: Any,
    ) -> None:
        self._client, self._job_id, self._place, self._stop, self._log = client, job_id, place, stop, log
        self._parallel = parallel
        self._fetcher = Fetcher(client.http, stop, log, parallel)
        self._links: dict[PurePosixPath, Link] = {}
        # Files in a row that were given up although each was tried for long: the storage is down for all of them.
        self._in_vain = 0

    def run(self, items: Sequence[_Item], progress_interval: float) -> list[dict[str, Any]]:
        self._interval = progress_interval
        began = time.monotonic()
        failures: dict[str, BaseException] = {}
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="datasphere-download") as pool:
            try:
                right = self._all(pool, self._already_right, items, failures)
                missing = [item for item in items if item.name not in failures and not right.get(item.target)]
                self._fetch_links(missing)
                fetched = self._all(pool, self._fetch, missing, failures)
            except BaseException as error:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, StoppedError):
                    raise ResultsError(f"The download of job {self._job_id} was stopped.") from None
                raise
        if failures:
            raise ResultsError(self._complaint(items, failures))
        new = sum(fetched.values())
        seconds = time.monotonic() - began
        self._log.info(
            "Job %s: %d files downloaded (%s in %.1f s), %d were right already.",
            self._job_id,
            new,
            _megabytes(self._fetcher.received),
            seconds,
            len(items) - new,
        )
        return [self._entry(item) for item in items]

    def _all(
        self,
        pool: ThreadPoolExecutor,
        work: Callable[[_Item], bool],
        items: Sequence[_Item],
        failures: dict[str, BaseException],
    ) -> dict[PurePosixPath, bool]:
        """Do the work for each item; log progress; what fails goes to ``failures``."""
        futures: dict[Future[bool], _Item] = {pool.submit(work, item): item for item in items}
        total = sum(item.file.size_bytes for item in items)
        began, before, results = time.monotonic(), self._fetcher.received, {}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=self._interval)
            for future in done:
                item = futures[future]
                if error := future.exception():
                    if isinstance(error, StoppedError):
                        raise error
                    failures[item.name] = error
                else:
                    results[item.target] = future.result()
            if pending and (came := self._fetcher.received - before):
                self._log.info(
                    "Downloaded %d of %d files, %s of %s (%s/s).",
                    len(futures) - len(pending),
                    len(futures),
                    _megabytes(came),
                    _megabytes(total),
                    _megabytes(came / (time.monotonic() - began)),
                )
            elif pending:
                self._log.info("Looked at %d of %d files.", len(futures) - len(pending), len(futures))
        return results

    def _fetch_links(self, items: Sequence[_Item]) -> None:
        if items:
            urls = urls_by_file(self._client.download_urls(self._job_id, [item.file for item in items]))
            for item in items:
                url = urls.get(file_key(item.file))
                self._links[item.target] = Link(self._client, self._job_id, item.file, url)

    def _already_right(self, item: _Item) -> bool:
        try:
            return self._is_right(item)
        except OSError as error:
            # Not to be allowed to look, where one may write, is no reason to fail.
            self._log.debug("Can't compare %s: %s", item.name, error)
            return False

    def _is_right(self, item: _Item) -> bool:
        file = item.file
        if not _is_archive(file):
            return self._place.has(item.target, file.size_bytes, file.sha256)
        if not item.target.parts or not self._place.has_folder(item.target):
            return False
        # The archive's table of contents is at its end: enough to compare what it would unpack to.
        link = Link(self._client, self._job_id, file)
        reader = RangeReader(self._client.http, link, file.size_bytes, self._stop)
        try:
            with open_archive(cast("BinaryIO", BufferedReader(reader, _TAIL_BYTES))) as archive:
                listing = list_archive(archive, item.target.name, file.size_bytes)
                return self._place.has_all(item.target, listing)
        except ResultsError as error:
            self._log.debug("Can't compare the directory %s: %s", item.name, error)
            return False

    def _fetch(self, item: _Item) -> bool:
        if self._in_vain >= self._parallel + 2:  # one bad file, or two, say nothing about the others
            raise _NotTriedError
        try:
            self._fetch_one(item)
        except TransientError:
            self._in_vain += 1
            raise
        self._in_vain = 0
        return True

    def _fetch_one(self, item: _Item) -> None:
        if not _is_archive(item.file):
            part = self._place.part(item.target, item.key, item.file.size_bytes)
            try:
                self._fetcher.fetch(self._links[item.target], part)
                part.commit()
            finally:
                part.discard()
            return
        archive_file = self._place.scratch / f"{item.key}.zip"
        part = LocalPart(self._place.scratch / f"{item.key}.part", lambda: archive_file, item.file.size_bytes)
        try:
            self._fetcher.fetch(self._links[item.target], part)
            part.commit()
            with open_archive(archive_file) as archive:
                listing = list_archive(archive, item.target.name, item.file.size_bytes)
                self._place.unpack(archive, listing, item.target)
        finally:
            part.discard()
            archive_file.unlink(missing_ok=True)

    def _entry(self, item: _Item) -> dict[str, Any]:
        slash = "/" if _is_archive(item.file) else ""
        return {
            "path": item.file.desc.path,
            "var": item.file.desc.var or None,
            "kind": item.kind,
            "size_bytes": item.file.size_bytes,
            "sha256": item.file.sha256,
            "uri": self._place.uri(item.target) + slash,
        }

    def _complaint(self, items: Sequence[_Item], failures: dict[str, BaseException]) -> str:
        names = dict.fromkeys(item.name for item in items if item.name in failures)
        tried = {name: failures[name] for name in names if not isinstance(failures[name], _NotTriedError)}
        lines = [f"- {name}: {_reason(error)}" for name, error in tried.items()]
        if others := [name for name in names if name not in tried]:
            lines.append(f"- not tried any more, since these failed one after the other: {', '.join(others)}")
        return (
            f"{len(failures)} of {len(items)} files of job {self._job_id} couldn't be downloaded:\n"
            + "\n".join(lines)
            + "\nThe others are in place; downloading again fetches only what is missing."
        )


class _NotTriedError(TransferError):
    """The storage is down, as the files before this one have shown."""


def _reason(error: BaseException) -> str:
    if isinstance(error, (DataSphereError, TransferError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
