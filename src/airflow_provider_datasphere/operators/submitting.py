"""The first half of an operator that runs a job: what makes it, and the one job of the task's generation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import as_seconds
from airflow_provider_datasphere.compat import BaseOperator
from airflow_provider_datasphere.generation import StateStore, key_of
from airflow_provider_datasphere.links.jobs import DataSphereJobLink
from airflow_provider_datasphere.operators.job_guard import JobGuard

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_provider_datasphere.client import cancellation
    from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy
    from airflow_provider_datasphere.client.submission.job_key import Key
    from airflow_provider_datasphere.client.submission.job_request import InputStager, JobOrigin, JobRequest
    from airflow_provider_datasphere.client.submission.reattach import SubmittedJob
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.client.transfer.inputs import InputSource, JobInput
    from airflow_provider_datasphere.compat import Context


class SubmittingOperator(BaseOperator):
    """A task that owns one job. Subclasses say which, and have the arguments named below.

    These are parameters of each subclass, since a DAG's ``default_args`` apply only to those that a class names.
    """

    wait_for_completion: bool
    deferrable: bool
    start_timeout: timedelta | float | None
    poll_interval: float
    stream_logs: bool
    on_kill_action: cancellation.OnKillAction
    reattach: bool
    fail_on_missing_outputs: bool
    skip_on_exit_code: int | Collection[int] | None
    datasphere_conn_id: str

    #: Whether the task returns the job's id, which is then its return value as soon as there is a job.
    returns_job_id = True
    operator_extra_links = (DataSphereJobLink(),)
    ui_color = "#dbe9ff"

    #: The output without which a success is none; empty: there is no such output.
    _proof = ""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._guard = JobGuard()

    @abstractmethod
    def _job_request(self, context: Context, client: DataSphereClient) -> JobRequest:
        """Return the job that the task wants to run.

        :raises JobRequestError: an argument can't be what it is.
        """

    @abstractmethod
    def _job_origin(self, context: Context, client: DataSphereClient) -> JobOrigin:
        """Return where the task's jobs come from, whatever else is wrong with its arguments."""

    # Submission --------------------------------------------------------------------------------------------------

    def _get_or_create_job(
        self,
        context: Context,
        client: DataSphereClient,
        *,
        wait_for_room: bool = True,
        first_execute_at: float | None = None,
    ) -> SubmittedJob:
        """Return the job of the task's generation: one that an earlier try created, or a new one.

        :param wait_for_room: wait here while the service has no room for it; otherwise it is returned as ``queued``.
        :param first_execute_at: when this try began to wait for room, epoch seconds, if it did: an unstarted job of
            this try may be there.
        """
        from airflow_provider_datasphere.client.submission.context import SubmissionCallbacks
        from airflow_provider_datasphere.client.submission.reattach import get_or_create_job

        return get_or_create_job(
            client,
            self._job_request(context, client),
            self._key(context),
            store=StateStore.of(context, self) if self.reattach else None,
            search_existing=first_execute_at is not None or (self.reattach and context["ti"].try_number > 1),
            policy=self._policy,
            callbacks=SubmissionCallbacks(
                require_newest_try=self._guard.require_newest_try,
                created=lambda job_id, project_id: self._guard.publish_job(self, job_id, project_id),
            ),
            poll_interval=self.poll_interval,
            start_timeout=self._start_seconds,
            first_execute_at=first_execute_at,
            wait_for_room=wait_for_room,
            logger=self.log,
        )

    def find_unfinished_jobs(self, context: Context, client: DataSphereClient) -> list[tuple[str, bool]]:
        """Return the ids of the jobs of the task's generation that aren't over, and whether each was started."""
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        from airflow_provider_datasphere.client.submission.reattach import find_unfinished_jobs

        origin = self._job_origin(context, client)
        left = find_unfinished_jobs(client, origin, self._key(context), StateStore.of(context, self))
        return [(job.id, job.status != jobs_pb2.CREATING) for job in left]

    def _key(self, context: Context) -> Key:
        key, ti = key_of(context, self), context["ti"]
        return key if self.reattach else key.for_try(ti.try_number)

    def _stage_inputs(self, client: DataSphereClient) -> InputStager:
        """Return what makes inputs ready for upload: local paths, objects of stores, outputs of other jobs."""

        def stage(sources: Sequence[InputSource], kept: Sequence[str], scratch: Path) -> Sequence[JobInput]:
            from airflow_provider_datasphere.inputs import stage_inputs

            return stage_inputs(sources, kept, client, scratch)

        return stage

    @property
    def _policy(self) -> OutcomePolicy:
        from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy

        return OutcomePolicy.of(
            fail_on_missing_outputs=self.fail_on_missing_outputs,
            skip_on_exit_code=self.skip_on_exit_code,
            proof=self._proof,
        )

    @property
    def _start_seconds(self) -> float | None:
        return as_seconds(self.start_timeout)
