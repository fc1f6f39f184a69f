"""Finding the jobs of a key among all jobs of a project, where no record names them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import DataSphereError, JobInfrastructureError, JobRequestError
from airflow_provider_datasphere.client.rpc import error_code

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.job_key import Key
    from airflow_provider_datasphere.client.submission.job_request import JobOrigin

log = logging.getLogger(__name__)

#: How long one search may take, seconds.
MAX_SEARCH_SECONDS = 600.0
#: How often a long search logs its progress, seconds.
REPORT_SECONDS = 30.0
#: How far beyond the run's start a list is read that begins with the newest job: clocks may differ.
CLOCK_MARGIN = timedelta(days=1)
#: This many jobs, each not newer than the one before, show that the list begins with the newest.
ORDERED_JOBS = 20
#: The jobs that aren't over: usually few, so that a running one is found with one call. (The List filter knows
#: the field ``status`` and the operator ``IN``.)
UNFINISHED = "status IN (CREATING, PREPARING, EXECUTING, UPLOADING_OUTPUT, CANCELLING)"
_NOT_RUNNING = (jobs_pb2.CREATING, jobs_pb2.CANCELLING)


def find_jobs(
    client: JobApi, project_id: str, key: Key, origin: JobOrigin, logger: LoggerLike = log
) -> list[jobs_pb2.Job]:
    """Return the jobs of a key, oldest first (RPC ``List``, whatever its order): one that is running, or all.

    :param origin: tells the key's own jobs from forks that somebody made of them.
    :raises JobInfrastructureError: the search couldn't be finished; that is not the same as finding nothing.
    """
    search = _Search(client, project_id, key, origin, logger)
    try:
        found = search.unfinished()
        if not any(job.status not in _NOT_RUNNING for job in found):
            found = search.all()
    except DataSphereError as error:
        raise search_failed(error) from error
    return sorted(found, key=_created)


def search_failed(error: Exception, known: str = "") -> JobInfrastructureError:
    """Return the error of a search that couldn't be finished, for whatever reason.

    :param known: a sentence about a job that is known to exist, with a space before it.
    """
    return JobInfrastructureError(
        f"Couldn't search for the job that an earlier try may have started: {error}{known} To avoid a second job, no "
        "new one is created; the next try searches again. (reattach=False never searches.)"
    )


class _Search:
    def __init__(self, client: JobApi, project_id: str, key: Key, origin: JobOrigin, logger: LoggerLike) -> None:
        self._client, self._project_id, self._key, self._log = client, project_id, key, logger
        self._origin = origin
        self._deadline = time.monotonic() + MAX_SEARCH_SECONDS
        self._report_at = time.monotonic() + REPORT_SECONDS

    def unfinished(self) -> list[jobs_pb2.Job]:
        try:
            return [job for job in self._jobs(UNFINISHED) if self._is_ours(job)]
        except JobRequestError as error:
            if error_code(error) != "INVALID_ARGUMENT":
                raise
            return []  # a service without this filter

    def all(self) -> list[jobs_pb2.Job]:
        return [job for job in self._jobs("") if self._is_ours(job)]

    def _jobs(self, filter: str) -> Iterator[jobs_pb2.Job]:
        since = self._key.since - CLOCK_MARGIN if self._key.since is not None else None
        count, newest_first = 0, True
        before: datetime | None = None
        for page in self._client.list_job_pages(self._project_id, filter=filter):
            yield from page
            for job in page:
                created = _created(job)
                newest_first = newest_first and (before is None or created <= before)
                before = created
            count += len(page)
            if newest_first and count >= ORDERED_JOBS and since is not None and before is not None and before < since:
                return
            self._check_time(count)

    def _check_time(self, count: int) -> None:
        now = time.monotonic()
        if now > self._deadline:
            raise JobInfrastructureError(
                f"project {self._project_id} has too many jobs ({count} read in {MAX_SEARCH_SECONDS:.0f} seconds)."
            )
        if now > self._report_at:
            self._report_at = now + REPORT_SECONDS
            self._log.info(
                "Searching for the job of an earlier try: %d jobs of project %s read so far.", count, self._project_id
            )

    def _is_ours(self, job: jobs_pb2.Job) -> bool:
        return self._key.owns(job.desc) and self._origin.is_origin_of(job, self._key)


def _created(job: jobs_pb2.Job) -> datetime:
    created: datetime = job.created_at.ToDatetime(tzinfo=timezone.utc)
    return created
