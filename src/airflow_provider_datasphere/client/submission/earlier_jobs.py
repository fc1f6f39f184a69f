"""The jobs that earlier tries of a task's generation left: find them, and decide what to do about them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.cancel_reason import cancelled_by_task
from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.model import JobHandle, status_name
from airflow_provider_datasphere.client.monitoring.outcome import has_unstored_outputs, return_code_of
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.client.submission.decision import Action, Decision, choose_action
from airflow_provider_datasphere.client.submission.job_key import request_of, retries_of
from airflow_provider_datasphere.client.submission.job_search import find_jobs, search_failed
from airflow_provider_datasphere.client.submission.request_digest import changed_arguments, request_digest

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.logger import LoggerLike
    from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy
    from airflow_provider_datasphere.client.submission.job_key import Key
    from airflow_provider_datasphere.client.submission.job_record import JobRecord
    from airflow_provider_datasphere.client.submission.job_request import JobRequest

log = logging.getLogger(__name__)

#: Pause before a job that is being cancelled is read again, seconds.
CANCELLING_PAUSE_SECONDS = 2.0


class EarlierJobs:
    """The jobs of a generation.

    :param record: what an earlier try recorded.
    :param policy: what the task makes of an ended job: one that it would take for a success or a skip is adopted.
    :param poll_interval: longest pause between two polls of a job that is being cancelled, seconds.
    """

    def __init__(
        self,
        client: JobApi,
        request: JobRequest,
        key: Key,
        record: JobRecord,
        policy: OutcomePolicy,
        poll_interval: float,
        logger: LoggerLike,
    ) -> None:
        self._client = client
        self._request = request
        self._key = key
        self._record = record
        self._policy = policy
        self._poll_interval = poll_interval
        self._log = logger
        self._digest = request_digest(request)

    def decide(self) -> Decision:
        """Find the jobs, wait for the end of one that is being cancelled, and decide.

        :raises JobInfrastructureError: the search couldn't be finished.
        """
        jobs = self._find()
        up_to_date = {self._record.job_id}
        while True:
            decision = choose_action(
                jobs,
                adoptable=self._is_adoptable,
                uploaded=self._record.uploaded,
                has_inputs=self._request.has_inputs(jobs),
            )
            job = decision.job
            if job is None:
                break
            if job.id not in up_to_date:
                # A list may lag behind.
                up_to_date.add(job.id)
                current = self._read_or_none(job.id) or job
            elif decision.action is Action.WAIT_AND_CREATE:
                self._report(decision)
                current = self._wait_until_ended(job)
            else:
                break
            jobs = [current if known.id == job.id else known for known in jobs]
        self._report(decision)
        return self._with_changes(decision, len(jobs))

    # Finding -----------------------------------------------------------------------------------------------------

    def _find(self) -> list[jobs_pb2.Job]:
        """Return the recorded job, or all that the service has."""
        recorded = self._record.job_id
        if recorded:
            if (job := self._read_or_none(recorded)) is not None:
                return [job]
            log.debug("The recorded job %s is gone; searching.", recorded)
        try:
            project_id = self._request.origin.project_id()
        except JobRequestError as error:
            known = f" Job {recorded} may still be running and costing money." if recorded else ""
            raise search_failed(error, known) from error
        return find_jobs(self._client, project_id, self._key, self._request.origin, self._log)

    def _read_or_none(self, job_id: str) -> jobs_pb2.Job | None:
        try:
            return self._client.get(job_id)
        except JobRequestError:
            return None

    def _wait_until_ended(self, job: jobs_pb2.Job) -> jobs_pb2.Job:
        watch(self._client, JobHandle(job.id), poll_interval=self._poll_interval, logger=self._log)
        ended = self._read_or_none(job.id) or job
        if ended.status == jobs_pb2.CANCELLING:
            self._client.pause(CANCELLING_PAUSE_SECONDS)
        return ended

    # Adopting ----------------------------------------------------------------------------------------------------

    def _is_adoptable(self, job: jobs_pb2.Job) -> bool:
        """Return whether the task would end with this ended job, had it watched it: by the same rules as then."""
        # A clear after somebody edited `retries` can lead to the same key; a person who clears wants a new job.
        if retries_of(job.desc) != self._key.retries or request_of(job.desc) != self._digest:
            return False
        recorded = self._record.job_id == job.id
        if job.status == jobs_pb2.CANCELLED:
            # Only where the task records its own cancels is it certain that this was somebody else's.
            ran = recorded and self._record.operation_id is not None
            return ran and self._record.cancelled != job.id and not cancelled_by_task(job)
        code = self._return_code(job) if recorded else None
        if code:
            return code in self._policy.skip_on_exit_code
        return job.status == jobs_pb2.SUCCESS and not has_unstored_outputs(job) and self._policy.has_proof(job)

    def _return_code(self, job: jobs_pb2.Job) -> int | None:
        """Only the operation has it; whether a job shows SUCCESS though its program failed isn't documented."""
        operation_id = self._record.operation_id
        if not operation_id:
            return None
        if job.status == jobs_pb2.ERROR and not self._policy.skip_on_exit_code:
            return None  # no code would change anything
        try:
            return return_code_of(self._client.get_operation(operation_id))
        except JobRequestError:
            return None  # the operation has expired

    # Changed arguments -------------------------------------------------------------------------------------------

    def _with_changes(self, decision: Decision, count: int) -> Decision:
        """Take into account whether the job was created with other arguments than the task has now.

        A result of other arguments isn't adopted, and a job of others that never ran is replaced; a running one is
        attached to all the same, with a warning.

        :param count: how many jobs the generation has.
        """
        job = decision.job
        if job is None:
            return decision
        if decision.action is Action.CREATE:
            if job.status == jobs_pb2.SUCCESS and request_of(job.desc) not in (None, self._digest):
                names = ", ".join(self._changed_arguments(job))
                self._log.info("Job %s was created with other arguments: %s.", job.id, names)
            return decision
        changed = self._changes(job, compare_remote=decision.action is not Action.ATTACH)
        if not changed:
            return decision
        names = ", ".join(changed)
        if decision.action is Action.ADOPT:
            self._log.warning("Job %s was created with other arguments (%s): creating a new job.", job.id, names)
            return Decision(job, Action.CREATE, count, decision.unexecuted)
        if decision.action is Action.ATTACH:
            self._log.warning(
                "Job %s was created with other arguments than the task has now: %s differ. The job keeps running as "
                "it is; clear the task to run a job with the new arguments.",
                job.id,
                names,
            )
            return decision
        # It has never run, so nothing is lost by a new one.
        self._log.info("Job %s was created with other arguments (%s): replacing it.", job.id, names)
        return replace(decision, action=Action.RESUBMIT)

    def _changes(self, job: jobs_pb2.Job, *, compare_remote: bool) -> list[str]:
        arguments = [] if request_of(job.desc) == self._digest else self._changed_arguments(job)
        inputs = self._request.changed_inputs(job, compare_remote=compare_remote)
        return list(dict.fromkeys([*arguments, *inputs]))

    def _changed_arguments(self, job: jobs_pb2.Job) -> list[str]:
        changed: list[str] = []
        if self._record.job_id == job.id and self._record.request == request_of(job.desc):
            changed = changed_arguments(self._request, self._record.arguments or {})
        return changed or self._request.changed_arguments(job) or ["arguments it doesn't show"]

    def _report(self, decision: Decision) -> None:
        job = decision.job
        if job is None:
            self._log.info("Found no job of an earlier try of this task: %s.", Action.CREATE.value)
            return
        self._log.info(
            "Found job %s (%s) of an earlier try of this task, status %s: %s.",
            job.id,
            self._client.job_link(job.id, job.project_id),
            status_name(job.status),
            decision.action.value,
        )
