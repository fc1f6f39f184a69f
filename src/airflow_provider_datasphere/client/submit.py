"""Submitting a fork: Clone, upload, Execute, each exactly once in its effect.

Clone makes a job but doesn't run it; Execute runs it. Neither is blindly repeated: both carry a deterministic
``idempotency-key``, and after an answer that got lost the client looks at what is there before it acts again. Whether
the service honours the key is not documented; it is right either way.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import grpc
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2

from airflow_provider_datasphere.client.errors import (
    DataSphereError,
    JobInfrastructureError,
    JobRequestError,
)
from airflow_provider_datasphere.client.execute import Backoff, discard, execute, idempotency_key, start, take_back
from airflow_provider_datasphere.client.fork import (
    ForkPlan,
    ForkRequest,
    expiry_warning,
    overrides_message,
    parse_ttl,
    plan_fork,
)
from airflow_provider_datasphere.client.outcome import TERMINAL, JobHandle
from airflow_provider_datasphere.client.service import (
    WRITE_DEADLINE,
    call_error,
    code_name,
    duration,
    error_code,
)
from airflow_provider_datasphere.client.upload import JobInput, UploadUrlExpired, local_input, upload_inputs
from airflow_provider_datasphere.client.waiting import TRANSIENT

if TYPE_CHECKING:
    from yandex.cloud.operation import operation_pb2

    from airflow_provider_datasphere.client.reporting import Reporter
    from airflow_provider_datasphere.client.service import JobService

log = logging.getLogger(__name__)

#: How many jobs of earlier tries an honoured key may lead back to, one after the other.
MAX_REPLAYS = 10
#: The same for Clones that failed; this try's own may fail as well.
MAX_FAILED_REPLAYS = 3

Stager = Callable[[Mapping[str, str], jobs_pb2.JobParameters, Path], Sequence[JobInput]]


def _local_inputs(input_vars: Mapping[str, str], _source: jobs_pb2.JobParameters, scratch: Path) -> Sequence[JobInput]:
    return [local_input(var, path, scratch) for var, path in input_vars.items()]


def _nothing(_job_id: str) -> None:
    """No ledger to keep."""


@dataclass(frozen=True)
class Submission:
    """Whose submission this is, and who wants to know how far it has come.

    :param key: the same for each repetition of the same Clone, and for no other.
    :param stage: turns input variables into files to upload; the default takes local paths.
    :param cloned: called with the new job's id as soon as it is known, before anything else happens to the job.
    :param uploaded: called with the job's id when all its inputs are in place, before Execute.
    :param find: looks for jobs that unanswered Clones of this key may have made and that don't run.
    :param resume: jobs of this key that were cloned but, by their status, not executed; Clone is repeated for the
        upload links, and those that it doesn't lead back to are deleted. Only with ``verify``.
    :param verify: other tries have been or are under way. An honoured key may lead back to a job of an earlier one
        that is gone or over, which is of no use, or to one that another try has just started, which is this try's too.
    :param source_data_ttl: keep the source job's data for so long from now (``"infinity"``: for ever); ``None``
        leaves it alone.
    """

    key: str
    stage: Stager = _local_inputs
    cloned: Callable[[str], None] = _nothing
    uploaded: Callable[[str], None] = _nothing
    find: Callable[[], Sequence[str]] | None = None
    resume: Sequence[str] = ()
    verify: bool = False
    source_data_ttl: timedelta | int | str | None = None
    log: Reporter | None = None


def submit(
    client: JobService, request: ForkRequest, submission: Submission, *, source: jobs_pb2.Job | None = None
) -> JobHandle:
    """Fork and run.

    :param source: the source job, where the caller has just read it.
    :return: the running job.
    :raises JobRequestError: the request can't be carried out as written; nothing is left behind.
    :raises JobInfrastructureError: the service didn't take it in time; the message names the job where there is one.
    """
    return _Submitter(client, request, submission).run(source)


class _RunsError(Exception):
    """A job of an earlier try that seemed never to have been executed runs."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


class _Submitter:
    def __init__(self, client: JobService, request: ForkRequest, submission: Submission) -> None:
        self._client = client
        self._request = request
        self._submission = submission
        self._log = submission.log or log

    def run(self, source: jobs_pb2.Job | None) -> JobHandle:
        request = self._request
        if source is None:
            source = self._client.get(request.source_job_id)
        plan = plan_fork(request, source)
        self._keep_source(source)
        with tempfile.TemporaryDirectory(prefix="datasphere-inputs-") as scratch:
            inputs = self._submission.stage(plan.input_vars, source.job_parameters, Path(scratch))
            try:
                job_id = self._clone_with_inputs(plan, inputs)
            except _RunsError as running:
                self._log.info("Job %s of an earlier try runs already: attaching to it.", running.job_id)
                self._submission.cloned(running.job_id)
                return execute(self._client, running.job_id, self._log, may_run=True)
        self._submission.uploaded(job_id)
        return start(self._client, request, job_id, self._log, may_run=self._submission.verify)

    def _keep_source(self, source: jobs_pb2.Job) -> None:
        wanted = self._submission.source_data_ttl
        if wanted is not None:
            self._client.set_data_ttl(source.id, parse_ttl("source_data_ttl", wanted))
        elif warning := expiry_warning(source, datetime.now(timezone.utc)):
            self._log.warning("%s", warning)

    def _clone_with_inputs(self, plan: ForkPlan, inputs: Sequence[JobInput]) -> str:
        job_id, upload_files = self._clone(plan, inputs)
        if not inputs:
            return job_id
        try:
            for links_left in (2, 1, 0):
                # Where a link was refused the old one has ended the other uploads too.
                stop = Event()
                self._client.on_interrupt(stop.set)
                self._client.pause(0)  # an interrupt before that line was heard by nobody
                try:
                    upload_inputs(inputs, upload_files, self._client.http, self._log, stop=stop)
                    break
                except UploadUrlExpired:
                    if not links_left:
                        raise
                    # Only the Clone operation has the links, and the same key leads back to it.
                    earlier, (job_id, upload_files) = job_id, self._clone(plan, inputs)
                    if job_id != earlier:
                        discard(self._client, earlier)
        except DataSphereError:
            discard(self._client, job_id)
            self._client.pause(0)
            raise
        return job_id

    def _clone(self, plan: ForkPlan, inputs: Sequence[JobInput]) -> tuple[str, Sequence[jobs_pb2.StorageFile]]:
        """The new job, and where its inputs go."""
        request = self._request
        message = project_job_service_pb2.CloneProjectJobRequest(
            source_job_id=request.source_job_id,
            job_parameters_overrides=overrides_message(plan, inputs),
            name=request.name or "",
            desc=request.desc or "",
            data_ttl=duration(parse_ttl("data_ttl", request.data_ttl)),
        )
        backoff = Backoff(self._client)
        key, verify = self._submission.key, self._submission.verify
        unused: list[str] = []
        replays = 0
        while True:
            self._client.pause(0)
            if backoff.began and not inputs and (found := self._found()):
                # The effect of a Clone whose answer got lost. With inputs it is of no use without its upload links.
                self._submission.cloned(found[0])
                self._discard_all_but(found[0], found)
                return found[0], ()
            try:
                operation = self._client.channels.unary(
                    "jobs", "Clone", message, timeout=WRITE_DEADLINE, idempotency_key=idempotency_key("Clone", key)
                )
                job_id = _job_of(operation)
                if not verify:
                    self._submission.cloned(job_id)
                operation = self._wait_for_clone(operation)
                limit = MAX_FAILED_REPLAYS if operation.HasField("error") else MAX_REPLAYS
                if verify and replays < limit and not self._is_of_use(job_id, operation):
                    replays += 1
                    key = f"{key}-after-{job_id}"
                    self._client.pause(min(2.0, 0.05 * 2**replays))
                    continue
                upload_files = self._upload_files(job_id, operation)
                if verify:
                    self._supersede(job_id)
                    self._submission.cloned(job_id)
            except grpc.RpcError as error:
                code = code_name(error)
                if code == "RESOURCE_EXHAUSTED":
                    self._log.info("DataSphere takes no new job now (%s); trying again.", error.details())
                    backoff.pause_without_limit()
                elif code not in TRANSIENT or backoff.exhausted:
                    raise call_error(error, f"Cloning job {request.source_job_id}") from error
                else:
                    backoff.pause()
            else:
                if backoff.began:
                    # Where the key isn't honoured, each unanswered Clone has made a job of its own.
                    with suppress(DataSphereError):
                        unused += self._found()
                self._discard_all_but(job_id, unused)
                return job_id, upload_files

    def _found(self) -> Sequence[str]:
        return self._submission.find() if self._submission.find is not None else ()

    def _discard_all_but(self, job_id: str, job_ids: Sequence[str]) -> None:
        for unused in {*job_ids} - {job_id}:
            discard(self._client, unused)

    def _supersede(self, job_id: str) -> None:
        """Take back what earlier tries left unexecuted, before this job runs: one of them may run all the same.

        :raises _RunsError: one does; this job is deleted.
        """
        for earlier in {*self._submission.resume} - {job_id}:
            if not take_back(self._client, earlier):
                discard(self._client, job_id)
                raise _RunsError(earlier)

    def _is_of_use(self, job_id: str, operation: operation_pb2.Operation) -> bool:
        """Whether the job that Clone answered with is one to go on with, and not what an earlier try has left."""
        if operation.HasField("error"):
            return False
        for pause in (0.1, 0.4, 1.6, None):
            try:
                return self._client.get(job_id).status not in (*TERMINAL, jobs_pb2.CANCELLING)
            except JobRequestError as error:
                if error_code(error) != "NOT_FOUND":
                    raise
                if pause is not None:  # a new job may take a moment to be seen
                    self._client.pause(pause)
        return False

    def _wait_for_clone(self, operation: operation_pb2.Operation) -> operation_pb2.Operation:
        """Wait for a Clone operation: fast at first, since Clone takes fractions of a second."""
        delay = 0.03
        while not operation.done:
            self._client.pause(delay * random.uniform(0.8, 1.2))
            delay = min(1.0, delay * 1.3)
            operation = self._client.get_operation(operation.id)
        return operation

    def _upload_files(self, job_id: str, operation: operation_pb2.Operation) -> Sequence[jobs_pb2.StorageFile]:
        """Where the inputs of the new job go.

        :raises DataSphereError: the Clone failed.
        """
        if operation.HasField("error"):
            discard(self._client, job_id)
            code = next(
                (c.name for c in grpc.StatusCode if c.value[0] == operation.error.code), str(operation.error.code)
            )
            text = f"Cloning job {self._request.source_job_id} failed: {code}: {operation.error.message}."
            raise (JobInfrastructureError if code in TRANSIENT else JobRequestError)(text)
        response = project_job_service_pb2.CloneProjectJobResponse()
        operation.response.Unpack(response)
        return list(response.upload_files)


def _job_of(operation: operation_pb2.Operation) -> str:
    """The new job's id, from the operation's metadata: known before the operation is over."""
    metadata = project_job_service_pb2.CloneProjectJobMetadata()
    operation.metadata.Unpack(metadata)
    return str(metadata.job_id)
