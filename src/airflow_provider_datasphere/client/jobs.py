"""The client: what people call, with the public methods of the official SDK's ``SDK`` class.

Code written for the SDK moves over by changing one line.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.download import download_job_files
from airflow_provider_datasphere.client.fork import ForkRequest
from airflow_provider_datasphere.client.outcome import TERMINAL, JobHandle, JobResult, Policy, judge, status_name
from airflow_provider_datasphere.client.service import JobService
from airflow_provider_datasphere.client.submit import Submission, submit
from airflow_provider_datasphere.client.watch import watch

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.settings import Settings

log = logging.getLogger(__name__)


class DataSphereClient(JobService):
    """A synchronous client of DataSphere Jobs on one connection. Thread-safe; connects lazily.

    :param translated: makes a context in which the methods of this class, and those of its jobs, run; may raise the
        errors of :mod:`.errors` as other classes.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        patience: float = 300.0,
        translated: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(settings, patience=patience)
        self.translated = translated

    def fork_job(
        self,
        source_job_id: str,
        args: Mapping[str, str] | None = None,
        vars: Mapping[str, str] | None = None,
        env_vars: Mapping[str, str] | None = None,
        name: str | None = None,
        desc: str | None = None,
        docker: str | Mapping[str, Any] | None = None,
        working_storage: Mapping[str, Any] | None = None,
        cloud_instance_types: Sequence[str] | None = None,
    ) -> Job:
        """Clone a job with overrides and run it, as ``SDK().fork_job``; returns at once.

        :param vars: input variable -> local path; output variable -> path inside the job.
        :raises JobRequestError: the request can't be carried out as written.
        """
        if isinstance(docker, Mapping) and set(docker) == {"docker"}:
            docker = docker["docker"]  # the form that the SDK wants a mapping in
        with self.translated():
            request = ForkRequest(
                source_job_id=source_job_id,
                args=args or {},
                vars=vars or {},
                env_vars=env_vars or {},
                name=name,
                desc=desc,
                docker=docker,
                working_storage=working_storage,
                cloud_instance_types=cloud_instance_types or (),
            )
            return Job(self, submit(self, request, Submission(key=uuid.uuid4().hex)))

    def get_job(self, id: str) -> Job:
        """A job by its id, as ``SDK().get_job``."""
        with self.translated():
            return Job(self, JobHandle(id), self.get(id))

    def download_job_files(
        self,
        id: str,
        with_logs: bool = False,
        with_diagnostics: bool = False,
        output_dir: str | Path | None = None,
    ) -> None:
        """Download a job's outputs to ``output_dir`` (default: the current folder), as ``SDK().download_job_files``.

        Unlike the SDK: files of any size, checked against their sha256, relative paths kept, and an error where
        something is missing or the job is still running.

        :raises ResultsError: the download is incomplete.
        """
        with self.translated():
            download_job_files(
                self, id, with_logs=with_logs, with_diagnostics=with_diagnostics, output_dir=Path(output_dir or ".")
            )


class Job:
    """One job, as the SDK's ``JobWrapper`` shows it."""

    def __init__(self, client: DataSphereClient, handle: JobHandle, job: jobs_pb2.Job | None = None) -> None:
        self._client = client
        self._handle = handle
        self._job = job

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    @property
    def id(self) -> str:
        return self._handle.job_id

    @property
    def operation_id(self) -> str | None:
        """The Execute operation; ``None`` for a job from ``get_job``: a job doesn't tell its operation."""
        return self._handle.operation_id

    @property
    def status(self) -> str:
        """The status right now: ``EXECUTING``, ``SUCCESS``, …"""
        return status_name(self._get().status)

    @property
    def done(self) -> bool:
        """Whether the job is over, well or badly. For a job from ``get_job`` as of that call, like the SDK."""
        return (self._job or self._get()).status in TERMINAL

    def wait(self, *, poll_interval: float = 10.0) -> JobResult:
        """Wait for the end, with the job's log lines going to this module's logger.

        Unlike the SDK's it downloads nothing; ``download_job_files`` does.

        :raises JobFailedError: return code other than 0; and the other classes of :mod:`.errors`.
        """
        with self._client.translated():
            link = self._client.job_link(self.id, self._job.project_id if self._job else None)
            log.info("Waiting for job %s: %s", self.id, link)
            ended = watch(
                self._client,
                self._handle,
                poll_interval=poll_interval,
                link=link,
                emit=lambda line: log.info("%s", line),
            )
            outcome = judge(self.id, ended.operation, ended.job, Policy(fail_on_missing_outputs=False), link=link)
            for warning in outcome.warnings:
                log.warning("%s", warning)
            if outcome.error is not None:
                raise outcome.error
            return outcome.result

    def cancel(self, graceful: bool = False) -> None:
        with self._client.translated():
            self._client.cancel(self.id, graceful=graceful)

    def _get(self) -> jobs_pb2.Job:
        with self._client.translated():
            return self._client.get(self.id)
