"""The synchronous client, with the public methods of the official SDK's ``SDK`` class.

Code written for the SDK needs one changed line.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.api import JobApi
from airflow_provider_datasphere.client.model import TERMINAL, JobHandle, JobResult, status_name
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy, evaluate_outcome
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.client.submission.context import SubmissionIdentity
from airflow_provider_datasphere.client.submission.fork import Fork
from airflow_provider_datasphere.client.submission.fork_request import ForkRequest
from airflow_provider_datasphere.client.submission.submit import submit
from airflow_provider_datasphere.client.transfer.download import download_job_files
from airflow_provider_datasphere.client.validation import check_job_id

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    from airflow_provider_datasphere.client.connection.settings import Settings

log = logging.getLogger(__name__)


class DataSphereClient(JobApi):
    """A synchronous client of DataSphere Jobs on one connection. Thread-safe; connects lazily.

    :param translate_errors: context manager around each method of this class and of its jobs; may convert the errors of
        :mod:`.errors`. Default: no conversion.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        retry_timeout: float = 300.0,
        refresh_settings: Callable[[], Settings | None] | None = None,
        connection: str = "",
        translate_errors: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(
            settings, retry_timeout=retry_timeout, refresh_settings=refresh_settings, connection=connection
        )
        self.translate_errors = translate_errors

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
        """Clone a job with overrides and start it, as ``SDK().fork_job`` does; doesn't wait for its end.

        :param vars: input variable -> local path; output variable -> path inside the job.
        :raises JobRequestError: the request is invalid.
        """
        if isinstance(docker, Mapping) and set(docker) == {"docker"}:
            docker = docker["docker"]  # the form that the SDK wants a mapping in
        with self.translate_errors():
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
            return Job(self, submit(self, Fork(self, request), SubmissionIdentity(uuid.uuid4().hex)))

    def execute_job(
        self,
        config: str | Path | Mapping[str, Any],
        project_id: str | None = None,
        *,
        base_dir: str | Path | None = None,
        args: Mapping[str, str] | None = None,
        vars: Mapping[str, str] | None = None,
        env_vars: Mapping[str, str] | None = None,
        name: str | None = None,
        desc: str | None = None,
        docker: str | Mapping[str, Any] | None = None,
        working_storage: Mapping[str, Any] | None = None,
        cloud_instance_types: Sequence[str] | None = None,
        data_ttl: timedelta | int | str | None = None,
    ) -> Job:
        """Make a job from a configuration and start it, as ``datasphere project job execute`` does; doesn't wait.

        :param config: path of a config.yaml, or a mapping with its keys.
        :param project_id: where the job is made; default: the connection's project.
        :param base_dir: what relative paths of the configuration are relative to. Default: the file's folder; with a
            mapping the current folder.
        :param args: these and the following come in the place of the configuration's values; ``args``, ``vars`` and
            ``env_vars`` by name.
        :param vars: input variable -> local path; output variable -> path inside the job.
        :param data_ttl: how long the service keeps the job's data: whole days (timedelta or number), or
            ``"infinity"``; default 14 days.
        :raises JobRequestError: the configuration has faults: all of them, each with file and line; nothing was sent.
        """
        from airflow_provider_datasphere.client.configuration.overlay import Overlay
        from airflow_provider_datasphere.client.configuration.read import ConfigSource
        from airflow_provider_datasphere.client.submission.new_job import NewJob

        with self.translate_errors():
            base = None if base_dir is None else Path(base_dir)
            if isinstance(config, Mapping):
                source = ConfigSource(config, Path() if base is None else base)
            else:
                source = ConfigSource.of_file(Path(config), base)
            overlay = Overlay(
                args=args or {},
                vars=vars or {},
                env_vars=env_vars or {},
                name=name,
                desc=desc,
                docker=docker,
                working_storage=working_storage,
                cloud_instance_types=cloud_instance_types or (),
            )
            request = NewJob(self, project_id, source, overlay, data_ttl=data_ttl)
            return Job(self, submit(self, request, SubmissionIdentity(uuid.uuid4().hex)))

    def get_job(self, id: str) -> Job:
        """Return a job by its id, as ``SDK().get_job`` does."""
        with self.translate_errors():
            check_job_id("id", id, "give the id of a DataSphere job")
            return Job(self, JobHandle(id), self.get(id))

    def download_job_files(
        self,
        id: str,
        with_logs: bool = False,
        with_diagnostics: bool = False,
        output_dir: str | Path | None = None,
    ) -> None:
        """Download a job's outputs to ``output_dir`` (default: the current folder), as ``SDK().download_job_files``
        does.

        Unlike the SDK: files of any size, checked against their sha256, relative paths kept, and an error where
        something is missing or the job is still running.

        :raises ResultsError: the download is incomplete.
        """
        with self.translate_errors():
            check_job_id("id", id, "give the id of a DataSphere job")
            download_job_files(
                self, id, with_logs=with_logs, with_diagnostics=with_diagnostics, output_dir=Path(output_dir or ".")
            )


class Job:
    """One job, with the members of the SDK's ``JobWrapper``."""

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
        """The id of the Execute operation; ``None`` for a job from ``get_job``, as a job doesn't have it."""
        return self._handle.operation_id

    @property
    def status(self) -> str:
        """The current status: ``EXECUTING``, ``SUCCESS``, …"""
        return status_name(self._get().status)

    @property
    def done(self) -> bool:
        """Whether the job has ended, successfully or not. For a job from ``get_job`` as of that call, as in the SDK."""
        return (self._job or self._get()).status in TERMINAL

    def wait(self, *, poll_interval: float = DEFAULT_POLL_INTERVAL) -> JobResult:
        """Wait until the job ends, and log its lines to this module's logger.

        Unlike the SDK's it downloads nothing; ``download_job_files`` does.

        :param poll_interval: the longest pause between two polls, seconds.
        :raises JobFailedError: the return code isn't 0; and the other classes of :mod:`.errors`.
        """
        with self._client.translate_errors():
            link = self._client.job_link(self.id, self._job.project_id if self._job else None)
            log.info("Waiting for job %s: %s", self.id, link)
            ended = watch(
                self._client,
                self._handle,
                poll_interval=poll_interval,
                link=link,
                emit=lambda line: log.info("%s", line),
            )
            outcome = evaluate_outcome(
                self.id, ended.operation, ended.job, OutcomePolicy(fail_on_missing_outputs=False), link=link
            )
            outcome.log_warnings(log)
            if outcome.error is not None:
                raise outcome.error
            return outcome.result

    def cancel(self, graceful: bool = False) -> None:
        """Cancel the job, as the SDK's ``cancel`` does.

        :param graceful: send the job's own shutdown signal first.
        """
        with self._client.translate_errors():
            self._client.cancel(self.id, graceful=graceful)

    def _get(self) -> jobs_pb2.Job:
        with self._client.translate_errors():
            return self._client.get(self.id)
