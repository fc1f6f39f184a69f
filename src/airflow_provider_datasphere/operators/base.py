"""Base class of operators that run a job: wait for it, on the worker or deferred, and cancel it when killed."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_datasphere.arguments import LONGEST_TIMEOUT
from airflow_provider_datasphere.client import errors
from airflow_provider_datasphere.client.cancel_reason import (
    DEFERRAL_ENDED,
    TIMED_OUT_WHILE_DEFERRED,
    cancelled_by_task,
)
from airflow_provider_datasphere.compat import (
    AIRFLOW_V_3_0_PLUS,
    AirflowTaskTimeout,
    deferral_timed_out,
    delete_return_value,
    resumed_by_this_try,
)
from airflow_provider_datasphere.exceptions import (
    JobCancelledError,
    JobInfrastructureError,
    JobLostError,
    airflow_exceptions,
)
from airflow_provider_datasphere.generation import StateStore
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.submitting import SubmittingOperator
from airflow_provider_datasphere.task_context import can_defer, require_task
from airflow_provider_datasphere.task_result import report_outcome
from airflow_provider_datasphere.triggers.event import JobEvent

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.model import JobHandle
    from airflow_provider_datasphere.client.monitoring.outcome import Outcome
    from airflow_provider_datasphere.client.submission.reattach import SubmittedJob
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.compat import Context

#: How much later than the trigger's deadline Airflow's own timeout of the deferral is, seconds.
DEFERRAL_TIMEOUT_MARGIN_SECONDS = 300.0
#: How much earlier than Airflow 2 the trigger ends the deferral at ``execution_timeout``, seconds.
AIRFLOW_2_DEADLINE_MARGIN_SECONDS = 5.0


class JobOperator(SubmittingOperator):
    """A task that owns one job, and waits for it: on its worker, or deferred."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._try_started_at: float | None = None

    # The task ----------------------------------------------------------------------------------------------------

    def execute(self, context: Context) -> Any:
        require_task(self, context)
        self._guard.begin(context)
        return self._run(context)

    def _run(self, context: Context, first_execute_at: float | None = None) -> Any:
        """Submit the job and wait for it, here or in the triggerer.

        :param first_execute_at: as of :meth:`_get_or_create_job`.
        """
        guard = self._guard
        try:
            with airflow_exceptions():
                guard.client = client = DataSphereHook(self.datasphere_conn_id).get_conn()
                if guard.killed.is_set():
                    client.interrupt()  # on_kill() came before there was a client
                may_defer = self.deferrable and can_defer(self, context)
                submitted = self._get_or_create_job(
                    context, client, wait_for_room=not may_defer, first_execute_at=first_execute_at
                )
                if submitted.queued is not None:
                    client.pause(0)
                    self._defer(context, submitted.handle, queued=submitted.queued)
                return self._continue(context, client, submitted, may_defer=may_defer)
        except BaseException as error:
            guard.raise_final_error(self, error)
        finally:
            if guard.killed.is_set():
                guard.end_job_unless_kept(self)

    def _continue(self, context: Context, client: DataSphereClient, submitted: SubmittedJob, *, may_defer: bool) -> Any:
        handle = submitted.handle
        self._guard.started = True
        if handle.operation_id is not None:
            context["ti"].xcom_push(key="operation_id", value=handle.operation_id)
        client.pause(0)
        if not self.wait_for_completion:
            self.log.info("Started job %s; not waiting for its end (wait_for_completion=False).", handle.job_id)
            return handle.job_id
        if may_defer and not self._has_ended(handle):
            self._defer(context, handle)
        return self._wait(context, handle, from_start=not submitted.reattached)

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> Any:
        """Resume after the trigger has fired: the job is over, or its time is, or it can't be started or watched."""
        guard = self._guard
        guard.begin(context, resumed=True)
        fired = JobEvent.parse(event)
        guard.job_id, guard.link = fired.job_id, fired.link
        if fired.status == "not_started":
            return self._submit_again(context, fired)
        guard.started = True
        if fired.status == "ended" or fired.cancelled:
            # Nothing is left for on_kill() to do.
            guard.mark_job_ended(fired.job_id)
        if fired.status in ("timeout", "start_timeout"):
            self._raise_timeout(fired)
        if fired.status == "lost":
            raise JobLostError(fired.message)

        from airflow_provider_datasphere.client.model import JobHandle

        try:
            with airflow_exceptions():
                self._record_start(context, fired)
                if fired.status == "started":
                    self.log.info("Started job %s; not waiting for its end (wait_for_completion=False).", fired.job_id)
                    return fired.job_id
                # The log has been read in the triggerer.
                handle = JobHandle(
                    fired.job_id,
                    fired.operation_id,
                    first_execute_at=fired.first_execute_at,
                    accepted_at=fired.accepted_at,
                )
                return self._wait(context, handle, from_start=False, logs=False)
        except BaseException as error:
            guard.raise_final_error(self, error)

    def _submit_again(self, context: Context, fired: JobEvent) -> Any:
        """Do on the worker what the triggerer couldn't: it starts jobs, but doesn't create any."""
        guard = self._guard
        guard.started = False
        if fired.error == "JobCancelledError":
            guard.over = True
            raise JobCancelledError(fired.message)
        if fired.error is not None:
            guard.raise_final_error(self, JobInfrastructureError(fired.message))
        self.log.info("Job %s wasn't started in the triggerer: %s", fired.job_id, fired.message)
        guard.job_id = None
        return self._run(context, first_execute_at=fired.first_execute_at)

    def _raise_timeout(self, fired: JobEvent) -> NoReturn:
        guard = self._guard
        if fired.cancelled:
            guard.record_own_cancel(self)
        if fired.status == "timeout":
            guard.end_job(self, TIMED_OUT_WHILE_DEFERRED)
            raise AirflowTaskTimeout(f"execution_timeout passed while job {fired.job_id} ran; {fired.message}")
        guard.raise_final_error(self, guard.cancelled_for_start_timeout(self, JobInfrastructureError(fired.message)))

    def _record_start(self, context: Context, fired: JobEvent) -> None:
        """Publish what the triggerer has found out about the start of a job that waited for room."""
        if fired.operation_id is None or fired.accepted_at is None or not fired.queued:
            return
        context["ti"].xcom_push(key="operation_id", value=fired.operation_id)
        if self.reattach and (store := StateStore.of(context, self)) is not None:
            store.add(operation_id=fired.operation_id, accepted_at=fired.accepted_at)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Keep or cancel the job if Airflow itself ended the deferral: it then doesn't call ``execute_complete``."""
        if not resumed_by_this_try(next_kwargs, context):
            self._try_started_at = time.time()
            return self.execute(context)
        guard = self._guard
        guard.begin(context, resumed=True)
        if next_method == "__fail__":
            timed_out = deferral_timed_out(next_method, next_kwargs)
            guard.restore_job()
            if not timed_out and guard.will_reattach(self):
                self.log.warning(
                    "An error ended the deferral. %s keeps running, and the next try attaches to it.", guard.label
                )
            else:
                guard.end_job(self, TIMED_OUT_WHILE_DEFERRED if timed_out else DEFERRAL_ENDED)
        return super().resume_execution(next_method, next_kwargs, context)

    def on_kill(self) -> None:
        """End the job as ``on_kill_action`` says, unless a later try will reattach to it."""
        self._guard.on_kill(self)

    # Steps -------------------------------------------------------------------------------------------------------

    def _has_ended(self, handle: JobHandle) -> bool:
        """Return whether the job has ended already. On errors return False and let the triggerer poll."""
        from airflow_provider_datasphere.client.monitoring.polling import PollState
        from airflow_provider_datasphere.client.monitoring.status_logger import StatusLogger
        from airflow_provider_datasphere.client.monitoring.watch import poll_until_known

        client = self._guard.client
        assert client is not None
        state = PollState(handle, link=self._guard.link, status_logger=StatusLogger(self.log))
        return poll_until_known(client, state, attempts=1) is not None

    def _defer(self, context: Context, handle: JobHandle, *, queued: str | None = None) -> NoReturn:
        """Wait in the triggerer.

        :param queued: the service's answer to Execute, where the job waits for room.
        """
        from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger, deferred_here

        if queued is None:
            self.log.info("Waiting for job %s in the triggerer.", handle.job_id)
        else:
            self.log.info(
                "Job %s waits for room in its project, in the triggerer: %s.", handle.job_id, queued.rstrip(".")
            )
        deadline = self._deadline(context)
        deferred_here.add(handle.job_id)
        self.defer(
            trigger=DataSphereJobTrigger(
                job_id=handle.job_id,
                operation_id=handle.operation_id,
                datasphere_conn_id=self.datasphere_conn_id,
                poll_interval=self.poll_interval,
                stream_logs=self.stream_logs,
                deadline=deadline,
                on_kill_action=self.on_kill_action,
                link=self._guard.link,
                queued=queued,
                project_id=self._guard.project_id,
                first_execute_at=handle.first_execute_at,
                accepted_at=handle.accepted_at,
                start_deadline=self._start_deadline(handle),
                wait_for_completion=self.wait_for_completion,
            ),
            method_name="execute_complete",
            timeout=None if deadline is None else _deferral_timeout(deadline),
        )

    def _start_deadline(self, handle: JobHandle) -> float | None:
        """Return until when the job must compute, epoch seconds; counted from now where its start isn't known."""
        seconds = self._start_seconds
        return None if seconds is None else (handle.first_execute_at or time.time()) + seconds

    def _deadline(self, context: Context) -> float | None:
        """Return when ``execution_timeout`` of this try passes, in epoch seconds; ``None`` for never."""
        if self.execution_timeout is None or self.execution_timeout > LONGEST_TIMEOUT:
            return None
        ti: Any = context["ti"]
        # Where Airflow has begun this try with the deferral of an earlier one, it shows that one's start.
        began = self._try_started_at or float(ti.start_date.timestamp())
        deadline = began + self.execution_timeout.total_seconds()
        # Airflow 2 ends the deferral itself at that moment, without telling the trigger: be ahead of it.
        return deadline if AIRFLOW_V_3_0_PLUS else deadline - AIRFLOW_2_DEADLINE_MARGIN_SECONDS

    def _wait(self, context: Context, handle: JobHandle, *, from_start: bool, logs: bool = True) -> Any:
        from airflow_provider_datasphere.client.model import JobRef
        from airflow_provider_datasphere.client.monitoring.outcome import evaluate_outcome
        from airflow_provider_datasphere.client.monitoring.watch import watch

        guard = self._guard
        if guard.client is None:
            guard.client = DataSphereHook(self.datasphere_conn_id).get_conn()
        if logs and self.stream_logs and not from_start:
            self.log.info("The job's log follows from its beginning; an earlier try may have shown it already.")
        try:
            ended = watch(
                guard.client,
                handle,
                poll_interval=self.poll_interval,
                start_deadline=self._start_deadline(handle),
                link=guard.link,
                emit=(lambda line: self.log.info("%s", line)) if logs and self.stream_logs else None,
                logger=self.log,
            )
        except errors.JobNotStartedError as late:
            raise guard.cancelled_for_start_timeout(self, late) from None
        guard.over = True
        outcome = evaluate_outcome(
            handle.job_id,
            ended.operation,
            ended.job,
            self._policy,
            link=guard.link,
            queued_seconds=handle.queued_seconds,
        )
        if (
            isinstance(outcome.error, errors.JobCancelledError)
            and ended.job is not None
            and cancelled_by_task(ended.job)
        ):
            error = errors.JobInfrastructureError(
                f"Job {JobRef(handle.job_id, guard.link)} was cancelled by another process of this task "
                f"({ended.job.status_details.rstrip('.')}), not by a person. Another try runs a new job."
            )
            outcome = replace(outcome, error=error)
        outcome = self._examine(handle, outcome)
        if outcome.skip is not None:
            delete_return_value(context["ti"], self.log)
        report_outcome(context, outcome, self.log)
        return self._return_value(handle)

    def _examine(self, handle: JobHandle, outcome: Outcome) -> Outcome:
        """Return the outcome with what an operator knows beyond the service: here, nothing."""
        return outcome

    def _return_value(self, handle: JobHandle) -> Any:
        """Return what the task returns after a success."""
        return handle.job_id


def _deferral_timeout(deadline: float) -> timedelta:
    """Return Airflow's own timeout, in case a triggerer doesn't keep the deadline; it skips ``execute_complete``."""
    return timedelta(seconds=max(1.0, deadline - time.time()) + DEFERRAL_TIMEOUT_MARGIN_SECONDS)
