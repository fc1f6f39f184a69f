"""A fork as a :class:`.job_request.JobRequest`: clone a source job with overrides (RPC ``Clone``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.api import duration
from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.submission import fork_comparison
from airflow_provider_datasphere.client.submission.fork_request import (
    ForkRequest,
    expiry_warning,
    kept_paths,
    overrides_message,
    pattern_warning,
    plan_fork,
)
from airflow_provider_datasphere.client.submission.job_request import CreationRpc, PreparedJob
from airflow_provider_datasphere.client.transfer.inputs import InputSource
from airflow_provider_datasphere.client.transfer.upload import stage_local_inputs
from airflow_provider_datasphere.client.validation import parse_ttl

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.submission.job_key import Key
    from airflow_provider_datasphere.client.submission.job_request import DescriptionTagger, InputStager

log = logging.getLogger(__name__)


class SourceJob:
    """The job that is cloned; read once. It may be gone while a job that was forked from it still runs.

    Implements :class:`.job_request.JobOrigin`.
    """

    def __init__(self, client: JobApi, job_id: str) -> None:
        self._client = client
        self.job_id = job_id
        #: The job, if it has been read.
        self.known: jobs_pb2.Job | None = None

    def read(self) -> jobs_pb2.Job:
        """Return the job.

        :raises JobRequestError: it is gone, or the connection's account can't see it.
        """
        if self.known is None:
            self.known = self._client.get(self.job_id)
        return self.known

    def read_or_none(self) -> jobs_pb2.Job | None:
        """Return the job; ``None`` if it is gone."""
        try:
            return self.read()
        except JobRequestError:
            return None

    def project_id(self) -> str:
        """Return the id of the source's project; of the connection's, if the source is gone.

        :raises JobRequestError: it is gone, and the connection names no project.
        """
        try:
            return self.read().project_id
        except JobRequestError:
            if self._client.settings.project_id is None:
                raise
            return self._client.settings.project_id

    def is_origin_of(self, job: jobs_pb2.Job, key: Key) -> bool:
        if job.parent_job_id in ("", self.job_id):
            return job.parent_job_id != ""
        # The task had another source, or a person has forked one of our own jobs, whose description came with it.
        try:
            parent = self._client.get(job.parent_job_id)
        except JobRequestError:
            return False
        return not key.owns(parent.desc)


class Fork:
    """A fork of a source job.

    Implements :class:`.job_request.JobRequest`.

    :param request: what to fork, and what to change.
    :param stage_inputs: makes inputs ready for upload; the default takes local paths only.
    :param source_data_ttl: have the service keep the source job's data for this long from now: whole days or
        ``"infinity"``; ``None`` leaves them alone.
    """

    creation = CreationRpc(
        "Clone", project_job_service_pb2.CloneProjectJobMetadata, project_job_service_pb2.CloneProjectJobResponse
    )

    def __init__(
        self,
        client: JobApi,
        request: ForkRequest,
        *,
        stage_inputs: InputStager = stage_local_inputs,
        source_data_ttl: timedelta | int | str | None = None,
        logger: LoggerLike = log,
    ) -> None:
        self._client = client
        self._request = request
        self._stage_inputs = stage_inputs
        self._source_data_ttl = source_data_ttl
        self._log = logger
        self.origin = SourceJob(client, request.source_job_id)

    @property
    def label(self) -> str:
        return f"Cloning job {self._request.source_job_id}"

    @property
    def data_ttl(self) -> timedelta | None:
        return parse_ttl("data_ttl", self._request.data_ttl)

    def comparable_arguments(self) -> Mapping[str, Any]:
        return self._request.comparable_arguments()

    def has_inputs(self, jobs: Sequence[jobs_pb2.Job]) -> bool:
        described = [self.origin.known] if self.origin.known is not None else jobs
        inputs = {file.desc.var for job in described for file in job.job_parameters.input_files}
        return any(var in inputs for var in self._request.vars)

    def changed_arguments(self, job: jobs_pb2.Job) -> list[str]:
        return fork_comparison.changed_arguments(self._request, job, self.origin.read_or_none())

    def changed_inputs(self, job: jobs_pb2.Job, *, compare_remote: bool) -> list[str]:
        parameters = (self.origin.read_or_none() or job).job_parameters
        return fork_comparison.changed_inputs(
            self._request, job, parameters, self._stage_inputs, compare_remote=compare_remote
        )

    def prepare(self, scratch: Path, tag: DescriptionTagger | None) -> PreparedJob:
        source = self.origin.read()
        request = self._request
        if tag is not None:
            request = replace(request, desc=tag(source.desc if request.desc is None else request.desc))
        plan = plan_fork(request, source)
        if warning := pattern_warning(plan, source):
            self._log.warning("%s", warning)
        self._keep_source(source)
        sources = [InputSource(var, place) for var, place in plan.input_vars.items()]
        inputs = self._stage_inputs(sources, kept_paths(source.job_parameters, plan.input_vars), scratch)
        message = project_job_service_pb2.CloneProjectJobRequest(
            source_job_id=request.source_job_id,
            job_parameters_overrides=overrides_message(plan, inputs),
            name=request.name or "",
            desc=request.desc or "",
            data_ttl=duration(self.data_ttl),
        )
        return PreparedJob(source.project_id, message, inputs)

    def _keep_source(self, source: jobs_pb2.Job) -> None:
        if self._source_data_ttl is not None:
            self._client.set_data_ttl(source.id, parse_ttl("source_data_ttl", self._source_data_ttl))
        elif warning := expiry_warning(source, datetime.now(timezone.utc)):
            self._log.warning("%s", warning)
