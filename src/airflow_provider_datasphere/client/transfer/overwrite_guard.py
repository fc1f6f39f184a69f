"""Keeps a download from overwriting another job's results in the same destination.

A destination has no record of who wrote a file. But it shows when the file was written, and the service lists the
outputs of a project's jobs: a file that was written during this run with the content of another job's output is that
job's result. Files from before the run, such as yesterday's results, are replaced.
"""

from __future__ import annotations

import logging
import time
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from airflow_provider_datasphere.client.errors import DataSphereError, PermanentResultsError
from airflow_provider_datasphere.client.model import is_archive
from airflow_provider_datasphere.client.uri import plain_path

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.transfer.archive import Listing
    from airflow_provider_datasphere.client.transfer.layout import Item
    from airflow_provider_datasphere.client.transfer.local_destination import Destination

#: How many pages of the project's jobs are searched for the one that a file is of. A page has about 2 MB.
_PAGES = 20

log = logging.getLogger(__name__)


class OverwriteError(PermanentResultsError):
    """The existing file is another job's result of the same run."""


class _JobOutputs(NamedTuple):
    """A job's outputs.

    :param contents: base name and sha256 of its files.
    :param directories: plain paths of its directories, if it ended after the run's start.
    """

    job_id: str
    contents: frozenset[tuple[str, str]]
    directories: frozenset[str]


class OverwriteGuard:
    """Checks the files that a download is about to replace. Thread-safe.

    :param job: whose files are downloaded.
    :param since: seconds since the epoch; files written earlier may be replaced; None: now.
    """

    def __init__(
        self, client: JobApi, job: jobs_pb2.Job, destination: Destination, since: float | None, logger: LoggerLike
    ) -> None:
        self._client, self._job, self._destination, self._logger = client, job, destination, logger
        self._run_start = time.time() if since is None else min(since, time.time())
        self._lock = Lock()
        self._others: list[_JobOutputs] | None = None

    def check(self, item: Item) -> None:
        """
        :raises OverwriteError: the file at the item's target is another job's result of this run.
        """
        if not self._is_recent(item.target):
            return
        try:
            sha256 = self._destination.sha256(item.target)
        except OSError as error:
            log.debug("Can't read %s: %s", item.target, error)
            return
        if sha256 == item.file.sha256.lower():
            return
        name = item.target.name
        other = next((one.job_id for one in self._outputs_of_other_jobs() if (name, sha256) in one.contents), None)
        self._decide(item.target, item.name, other)

    def check_directory(self, item: Item, listing: Listing) -> None:
        """
        :param listing: of the item's archive.
        :raises OverwriteError: a file below the item's target is another job's result of this run.
        """
        try:
            if not self._destination.has_folder(item.target):
                return
        except OSError:  # write permission without read permission
            return
        for member in listing.files:
            path = item.target / member.path
            if self._is_recent(path) and not self._destination.has_member(path, member):
                other = next(
                    (
                        outputs.job_id
                        for outputs in self._outputs_of_other_jobs()
                        if str(item.target) in outputs.directories
                    ),
                    None,
                )
                self._decide(path, item.name, other)
                return

    def _is_recent(self, path: PurePosixPath) -> bool:
        try:
            existing = self._destination.find(path)
        except OSError as error:
            log.debug("Can't stat %s: %s", path, error)
            return False
        return existing is not None and existing.modified is not None and existing.modified >= self._run_start

    def _decide(self, path: PurePosixPath, name: str, other: str | None) -> None:
        uri = self._destination.uri(path)
        if other is None:
            self._logger.warning(
                "%s was written during this run with other content, and is not a known output of another job of the "
                "project: replacing it by %s of job %s.",
                uri,
                name,
                self._job.id,
            )
            return
        raise OverwriteError(
            f"{uri} is a result of job {other}, downloaded in this run; job {self._job.id}'s {name!r} would overwrite "
            "it. Give each download a destination of its own, such as one with {{ ti.map_index }} in it for mapped "
            "tasks"
        )

    def _outputs_of_other_jobs(self) -> list[_JobOutputs]:
        """Return the outputs of the project's other jobs, as far as they can be listed."""
        with self._lock:
            if self._others is None:
                self._others = []
                try:
                    for page in islice(self._client.list_job_pages(self._job.project_id), _PAGES):
                        self._others.extend(self._outputs(job) for job in page if job.id != self._job.id)
                except DataSphereError as error:
                    self._logger.debug("Can't list the other jobs of project %s: %s", self._job.project_id, error)
            return self._others

    def _outputs(self, job: jobs_pb2.Job) -> _JobOutputs:
        # Logs and diagnostics are downloaded too.
        files = [*job.output_files, *job.log_files, *job.diagnostic_files]
        ended = job.finished_at.seconds >= int(self._run_start)
        return _JobOutputs(
            job.id,
            frozenset(
                (plain_path(file.desc.path).rpartition("/")[2], file.sha256.lower())
                for file in files
                if file.sha256 and not is_archive(file)
            ),
            frozenset(plain_path(file.desc.path) for file in files if ended and is_archive(file)),
        )
