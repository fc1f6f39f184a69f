"""Download of a job's files: in parallel, resumed, verified before they become visible; all of them or an error."""

from __future__ import annotations

import errno
import logging
import time
from concurrent.futures import Future, wait
from io import BufferedReader
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from airflow_provider_datasphere.client.errors import DataSphereError, PermanentResultsError, ResultsError
from airflow_provider_datasphere.client.http.errors import StoppedError, TransferError, TransientTransferError
from airflow_provider_datasphere.client.http.exchange import STOP_SECONDS
from airflow_provider_datasphere.client.transfer.archive import list_archive, open_archive
from airflow_provider_datasphere.client.transfer.file_download import FileDownloader
from airflow_provider_datasphere.client.transfer.layout import Item, assign_targets
from airflow_provider_datasphere.client.transfer.local_destination import Destination, LocalDestination
from airflow_provider_datasphere.client.transfer.overwrite_guard import OverwriteError, OverwriteGuard
from airflow_provider_datasphere.client.transfer.partial_file import LocalPartialFile, PartialFile
from airflow_provider_datasphere.client.transfer.presigned_url import (
    PresignedUrl,
    RangeReader,
    recorded_size,
    url_of,
    urls_by_file,
)
from airflow_provider_datasphere.client.transfer.selection import select_files
from airflow_provider_datasphere.client.transfer.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike

log = logging.getLogger(__name__)

#: How many files are downloaded at once.
MAX_PARALLEL = 8
_TAIL_BYTES = 64 * 1024


def download_job_files(
    client: JobApi,
    job_id: str,
    *,
    with_logs: bool = False,
    with_diagnostics: bool = False,
    output_dir: Path | str | None = None,
    files: Sequence[str] | None = None,
    destination: Callable[[str, frozenset[str]], Destination] | None = None,
    max_parallel: int = MAX_PARALLEL,
    progress_interval: float = 5.0,
    since: datetime | None = None,
    logger: LoggerLike = log,
) -> list[dict[str, Any]]:
    """Download the files of an ended job.

    :param with_logs: download the job's log files too.
    :param with_diagnostics: download its diagnostic files too.
    :param output_dir: local folder, default the current one.
    :param files: glob patterns over output paths and vars; None for all outputs.
    :param destination: makes the place they go to, instead of ``output_dir``, from a name for temporary files and the
        names that the files need there.
    :param max_parallel: limit of files at once, and of connections for all of them.
    :param progress_interval: seconds between progress lines in the log.
    :param since: a file that was written after this moment and is another job's output is not overwritten; None: the
        start of the download.
    :return: one mapping per file: ``path``, ``var``, ``kind`` (output, log, diagnostic), ``size_bytes``, ``sha256``,
        ``uri``; ``uri`` of an unpacked directory ends with a slash.
    :raises ResultsError: the job is still running, its data are gone, or files failed to download; the message names
        each.
    :raises PermanentResultsError: the same, where a retry can't succeed.
    :raises JobRequestError: the job doesn't exist, or nothing matches ``files``.
    """
    job = client.get(job_id)
    selected = select_files(job, files, with_logs=with_logs, with_diagnostics=with_diagnostics, logger=logger)
    items = assign_targets(selected, job_id)
    reserved = frozenset(item.target.parts[0] for item in items if item.target.parts)
    name = f".datasphere-{job_id}"
    target = destination(name, reserved) if destination else LocalDestination(Path(output_dir or "."), name, reserved)
    if not items:
        return []
    stop = Event()
    client.add_interrupt_callback(stop.set)
    parallel = min(max_parallel, target.max_parallel or max_parallel)
    with target:
        guard = OverwriteGuard(client, job, target, since.timestamp() if since else None, logger)
        return _Download(client, job_id, target, guard, parallel, stop, logger).run(items, progress_interval)


class _Download:
    def __init__(
        self,
        client: JobApi,
        job_id: str,
        target: Destination,
        guard: OverwriteGuard,
        parallel: int,
        stop: Event,
        logger: LoggerLike,
    ) -> None:
        self._client, self._job_id, self._destination = client, job_id, target
        self._stop, self._logger = stop, logger
        self._guard, self._parallel = guard, parallel
        self._downloader = FileDownloader(client.http, stop, logger, parallel)
        target.check_stop = self._downloader.check_stop
        self._urls: dict[PurePosixPath, PresignedUrl] = {}
        # Files in a row that failed after all retries: the storage is down for all of them.
        self._consecutive_failures = 0

    def run(self, all_items: Sequence[Item], progress_interval: float) -> list[dict[str, Any]]:
        self._interval = progress_interval
        began = time.monotonic()
        # A file that the job lists twice, under two vars, is fetched once.
        items = list({item.target: item for item in reversed(all_items)}.values())[::-1]
        failures: dict[PurePosixPath, BaseException] = {}
        try:
            with Workers(self._parallel, "datasphere-download") as workers:
                try:
                    up_to_date = self._all(workers, self._is_up_to_date, items, failures)
                    overwritten = dict.fromkeys(str(e) for e in failures.values() if isinstance(e, OverwriteError))
                    if overwritten:
                        raise OverwriteError("; ".join(overwritten) + ". Nothing was downloaded.")
                    missing = [
                        item for item in items if item.target not in failures and not up_to_date.get(item.target)
                    ]
                    self._request_urls(missing)
                    fetched = self._all(workers, self._fetch, missing, failures)
                except BaseException:
                    self._stop.set()
                    raise
        except StoppedError:
            raise ResultsError(f"The download of job {self._job_id} was stopped.") from None
        if failures:
            raise self._error_message(items, failures)
        new = sum(fetched.values())
        seconds = time.monotonic() - began
        self._logger.info(
            "Job %s: %d files downloaded (%s in %.1f s), %d were already up to date.",
            self._job_id,
            new,
            _megabytes(self._downloader.received),
            seconds,
            len(items) - new,
        )
        return [self._entry(item) for item in all_items]

    def _all(
        self,
        workers: Workers,
        work: Callable[[Item], bool],
        items: Sequence[Item],
        failures: dict[PurePosixPath, BaseException],
    ) -> dict[PurePosixPath, bool]:
        """Do the work for each item, log progress, and collect errors in ``failures``."""
        futures: dict[Future[bool], Item] = {workers.submit(work, item): item for item in items}
        total = sum(item.file.size_bytes for item in items)
        began, before, results = time.monotonic(), self._downloader.received, {}
        pending = set(futures)
        while pending:
            done, pending = self._wait(pending)
            for future in done:
                item = futures[future]
                if error := future.exception():
                    if isinstance(error, StoppedError):
                        raise error
                    failures[item.target] = error
                else:
                    results[item.target] = future.result()
            if pending and (received := self._downloader.received - before):
                self._logger.info(
                    "Downloaded %d of %d files, %s of %s (%s/s).",
                    len(futures) - len(pending),
                    len(futures),
                    _megabytes(received),
                    _megabytes(total),
                    _megabytes(received / (time.monotonic() - began)),
                )
            elif pending:
                self._logger.info("Verified %d of %d files.", len(futures) - len(pending), len(futures))
        return results

    def _wait(self, futures: set[Future[bool]]) -> tuple[set[Future[bool]], set[Future[bool]]]:
        """Wait until the next progress line is due or all are done.

        :raises StoppedError: the download was stopped.
        """
        until = time.monotonic() + self._interval
        while True:
            left = until - time.monotonic()
            done, pending = wait(futures, timeout=max(0.0, min(left, STOP_SECONDS)))
            if not pending or left <= 0:
                return done, pending
            if self._stop.is_set():
                raise StoppedError("the download was stopped")

    def _request_urls(self, items: Sequence[Item]) -> None:
        if items:
            urls = urls_by_file(self._client.download_urls(self._job_id, [item.file for item in items]))
            for item in items:
                url = url_of(item.file, urls)
                self._urls[item.target] = PresignedUrl(self._client, self._job_id, item.file, url)

    def _is_up_to_date(self, item: Item) -> bool:
        try:
            if self._has_content(item):
                return True
            if not item.is_archive:
                self._guard.check(item)
            return False
        except OSError as error:
            # Write permission without read permission is no reason to fail.
            self._logger.debug("Can't compare %s: %s", item.name, error)
            return False

    def _has_content(self, item: Item) -> bool:
        file = item.file
        if not item.is_archive:
            return self._destination.has(item.target, recorded_size(file), file.sha256)
        if not item.target.parts or not file.size_bytes or not self._destination.has_folder(item.target):
            return False
        # The archive's table of contents is at its end: enough to compare what it would unpack to.
        link = PresignedUrl(self._client, self._job_id, file)
        reader = RangeReader(self._client.http, link, file.size_bytes, self._stop)
        try:
            with open_archive(cast("BinaryIO", BufferedReader(reader, _TAIL_BYTES))) as archive:
                listing = list_archive(archive, item.target.name, file.size_bytes)
                if self._destination.has_all(item.target, listing):
                    return True
                self._guard.check_directory(item, listing)
                return False
        except OverwriteError:
            raise
        except ResultsError as error:
            self._logger.debug("Can't compare the directory %s: %s", item.name, error)
            return False

    def _fetch(self, item: Item) -> bool:
        if self._consecutive_failures >= self._parallel + 2:  # one or two failures may be the files' own
            raise _SkippedError
        try:
            self._fetch_one(item)
        except TransientTransferError:
            self._consecutive_failures += 1
            raise
        self._consecutive_failures = 0
        return True

    def _fetch_one(self, item: Item) -> None:
        if not item.is_archive:
            part = self._destination.partial_file(item.target, item.key, item.file.size_bytes)
            try:
                self._fill(item, part)
                part.commit(lambda: self._guard.check(item))
            finally:
                part.discard()
            return
        archive_file = self._destination.scratch / f"{item.key}.zip"
        part = LocalPartialFile(
            self._destination.scratch / f"{item.key}.part", lambda: archive_file, item.file.size_bytes
        )
        try:
            self._fill(item, part)
            part.commit()
            with open_archive(archive_file) as archive:
                listing = list_archive(archive, item.target.name, archive_file.stat().st_size)
                self._destination.unpack(
                    archive, listing, item.target, lambda: self._guard.check_directory(item, listing)
                )
        finally:
            part.discard()
            archive_file.unlink(missing_ok=True)

    def _fill(self, item: Item, part: PartialFile) -> None:
        try:
            self._downloader.fetch(self._urls[item.target], part)
        except ResultsError:
            raise  # wrong content: nothing to keep
        except (TransferError, DataSphereError):
            part.keep()
            raise

    def _entry(self, item: Item) -> dict[str, Any]:
        slash = "/" if item.is_archive else ""
        return {
            "path": item.file.desc.path,
            "var": item.file.desc.var or None,
            "kind": item.kind,
            "size_bytes": item.file.size_bytes,
            "sha256": item.file.sha256,
            "uri": self._destination.uri(item.target) + slash,
        }

    def _error_message(self, items: Sequence[Item], failures: dict[PurePosixPath, BaseException]) -> ResultsError:
        """Return an error that names each file that failed, and each reason once."""
        others = len(items) - len(failures)
        rest = (
            f"The other {others} are in place; the next download fetches only the missing ones."
            if others
            else "Nothing was downloaded."
        )
        absent = any(isinstance(error, FileNotFoundError) for error in failures.values())
        if absent and (missing := self._destination.missing()):
            return PermanentResultsError(f"{missing}. {rest}")
        reasons: dict[str, list[str]] = {}
        for item in items:
            error = failures.get(item.target)
            if error is not None and not isinstance(error, _SkippedError):
                reasons.setdefault(_reason(error), []).append(item.name)
        lines = [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        if names := [item.name for item in items if isinstance(failures.get(item.target), _SkippedError)]:
            lines.append(f"- skipped, because the downloads before them failed: {', '.join(names)}")
        permanent = all(isinstance(error, PermanentResultsError) for error in failures.values())
        return (PermanentResultsError if permanent else ResultsError)(
            f"{len(failures)} of {len(items)} files of job {self._job_id} failed to download:\n"
            + "\n".join(lines)
            + f"\n{rest}"
        )


class _SkippedError(TransferError):
    """The file wasn't tried: the storage is down, as the files before it have shown."""


def _reason(error: BaseException) -> str:
    if isinstance(error, (DataSphereError, TransferError)):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.EXDEV:
        return (
            f"{error.filename2 or error.filename} is on another file system than the destination: give that folder as "
            "the destination of a download of its own"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
