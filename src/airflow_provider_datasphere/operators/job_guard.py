"""Guards the job of a running task: publishes its id, and keeps or cancels it however the task ends.

From its creation to its end, a job belongs to a try: this one, or a later one that reattaches to it. A job that no try
would reattach to is cancelled. This module decides that, and every error that ends a try names the job.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_datasphere import task_end
from airflow_provider_datasphere.client import cancellation, errors
from airflow_provider_datasphere.client.cancel_reason import START_TIMED_OUT, TASK_ENDED, TASK_FAILED, TIMED_OUT
from airflow_provider_datasphere.compat import (
    AirflowFailException,
    AirflowSkipException,
    AirflowTaskTimeout,
    TaskDeferred,
    current_context,
    is_overtaken,
    task_state,
)
from airflow_provider_datasphere.exceptions import DataSphereError, to_airflow_exception, was_interrupted
from airflow_provider_datasphere.generation import StateStore, has_retries_left
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.links.jobs import DataSphereJobLink

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.compat import Context
    from airflow_provider_datasphere.operators.submitting import SubmittingOperator


class OvertakenError(DataSphereError):
    """This try lost its connection to Airflow, and a newer one has begun: this one must start nothing any more."""


class JobGuard:
    """Keeps or cancels the job of one operator when its task ends."""

    def __init__(self) -> None:
        self.context: Context | None = None
        self.client: DataSphereClient | None = None
        self.job_id: str | None = None
        self.project_id: str | None = None
        self.link: str | None = None
        #: Whether Execute has answered.
        self.started = False
        #: Whether the job is known to be over.
        self.over = False
        self.killed = threading.Event()
        self._kill_threads: list[threading.Thread] = []
        self._timed_out = False
        self._resumed = False
        self._kept_running = False
        self._end_requests: dict[tuple[str, bool], object] = {}

    def __deepcopy__(self, _memo: Any) -> JobGuard:
        # Airflow copies operators with their DAG; a copy has no job, and an Event can't be copied.
        return JobGuard()

    def begin(self, context: Context, *, resumed: bool = False) -> None:
        """Reset the state for a try that begins, or is resumed from its deferral."""
        self.context, self._resumed, self.started, self.over = context, resumed, resumed, False
        self.job_id, self.link, self._timed_out = None, None, False

    @property
    def never_had_a_job(self) -> bool:
        """Whether this process has executed the try from its beginning, and created no job."""
        return self.context is not None and not self._resumed and self.job_id is None

    # Publishing the job ------------------------------------------------------------------------------------------

    def publish_job(self, operator: SubmittingOperator, job_id: str, project_id: str) -> None:
        """Push the job's id and URL to XCom, as soon as the job exists."""
        if job_id == self.job_id:
            return
        assert self.client is not None
        assert self.context is not None
        self.job_id, self.project_id = job_id, project_id
        ti: Any = self.context["ti"]
        ti.xcom_push(key="job_id", value=job_id)
        if operator.do_xcom_push and operator.returns_job_id:
            # Not only at the end: a teardown cancels, and a download reads, the job of a failed task too.
            ti.xcom_push(key="return_value", value=job_id)
        self.link = self.client.job_link(job_id, project_id)
        ti.xcom_push(key="job_url", value=self.link)
        ti.xcom_push(key=DataSphereJobLink.link_key, value=self.link)
        operator.log.info("Job %s: %s", job_id, self.link)

    def require_newest_try(self) -> None:
        """Raise unless this is the task's newest try; a worker that Airflow has given up on must start nothing.

        :raises OvertakenError: a newer try has begun.
        :raises DataSphereError: Airflow doesn't answer.
        """
        assert self.context is not None
        try:
            overtaken = is_overtaken(self.context["ti"])
        except Exception as error:
            raise DataSphereError(
                f"Couldn't ask Airflow whether this is still the task's newest try ({type(error).__name__}: {error}), "
                "so no job is started."
            ) from error
        if overtaken:
            raise OvertakenError("A newer try of this task has begun: this try ends and starts nothing.")

    # Task kill handling ------------------------------------------------------------------------------------------

    def on_kill(self, operator: SubmittingOperator) -> None:
        """End the job as ``on_kill_action`` says, unless a later try will reattach to it.

        Called by a signal handler, by Airflow after a timeout, and possibly twice.
        """
        if self.context is None:
            # Airflow 2 doesn't resume a task whose timeout has passed.
            with suppress(Exception):
                self.begin(current_context(), resumed=True)
        if isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            # Airflow calls this while it handles the timeout: no person has ended the task.
            self._timed_out = True
        worker = threading.Thread(target=self._on_kill, args=(operator,), name="datasphere-on-kill", daemon=True)
        self._kill_threads.append(worker)
        worker.start()
        # Not longer: the task is killed for good about five seconds after the signal.
        worker.join(task_end.KILL_SECONDS + 0.2)

    def _on_kill(self, operator: SubmittingOperator) -> None:
        self.killed.set()
        begun = time.monotonic()
        try:
            if self.context is not None and not self._timed_out:
                self._kept_running = self._keeps_job_running(operator, self.context)
        finally:
            # At once, so that nothing more is started while the job is cancelled.
            if self.client is not None:
                self.client.interrupt()
        if self.job_id is None and self._resumed and self.context is not None:
            self.restore_job()
        seconds = max(1.0, min(cancellation.CANCEL_SECONDS, task_end.KILL_SECONDS - (time.monotonic() - begun)))
        self.end_job_unless_kept(operator, seconds)

    def _keeps_job_running(self, operator: SubmittingOperator, context: Context) -> bool:
        """Return whether the job is kept, by what Airflow says of the task."""
        ti: Any = context["ti"]
        will_reattach = self.will_reattach(operator)

        def read_status() -> task_end.TaskStatus:
            state = task_state(ti)
            job_id = _job_id_of(ti) if will_reattach else None
            return task_end.TaskStatus(True, state, job_id)

        seconds = task_end.QUERY_SECONDS_BEFORE_KEEPING if will_reattach else task_end.QUERY_SECONDS
        status = task_end.query_task(read_status, seconds, operator.log)
        ended_by = task_end.who_ended(status, self.job_id, deferred=False)
        kept = task_end.keeps_job_running(ended_by, has_successor=will_reattach)
        if kept and status.answered:
            operator.log.info("%s keeps running, and the next try attaches to it.", self.label)
        elif kept:
            operator.log.warning(
                "Airflow doesn't answer who ended this try, so an outage is assumed: %s keeps running, and the next "
                "try attaches to it. If a person ended the task, cancel the job on its page or with CancelJobOperator.",
                self.label,
            )
        return kept

    def will_reattach(self, operator: SubmittingOperator) -> bool:
        """Return whether a later try would reattach to the job."""
        return self.context is not None and operator.reattach and has_retries_left(self.context)

    def restore_job(self) -> None:
        """Read the job id of a resumed task from XCom: it runs in a new process."""
        assert self.context is not None
        self.started = True
        with suppress(Exception):
            self.job_id = _job_id_of(self.context["ti"])

    # Cancelling the job ------------------------------------------------------------------------------------------

    def end_job_unless_kept(self, operator: SubmittingOperator, seconds: float = cancellation.CANCEL_SECONDS) -> None:
        if not self._kept_running:
            self.end_job(operator, TIMED_OUT if self._timed_out else TASK_ENDED, seconds)

    def end_job(
        self,
        operator: SubmittingOperator,
        reason: str,
        seconds: float = cancellation.CANCEL_SECONDS,
        *,
        action: cancellation.OnKillAction | None = None,
    ) -> bool:
        """End the job as ``on_kill_action`` says, once; and once more if Execute has answered since.

        :param action: instead of the operator's ``on_kill_action``.
        :return: whether it doesn't keep running, as far as this call knows.
        """
        job_id, started = self.job_id, self.started
        if job_id is None:
            return True
        # Two threads may get here, and neither may wait for the other: a signal may have interrupted it.
        mine = object()
        if self._end_requests.setdefault((job_id, started), mine) is not mine:
            return operator.on_kill_action != "keep"
        again = started and (job_id, False) in self._end_requests
        cancellation_request = cancellation.JobCancellation(
            job_id,
            action or operator.on_kill_action,
            reason,
            operator.log,
            started=started,
            known_running=not (again or self._resumed),
        )
        try:
            settings = self.client.settings if self.client else DataSphereHook(operator.datasphere_conn_id).settings
        except Exception as error:
            cancellation_request.warn(error)
            return False
        ended = cancellation.cancel_job_on_new_connection(settings, cancellation_request, seconds)
        if ended:
            self.record_own_cancel(operator)
        return ended

    def record_own_cancel(self, operator: SubmittingOperator) -> None:
        """Record that this task cancelled its job, so that a later try knows that no person did."""
        with suppress(Exception):
            if self.context is not None and (store := StateStore.of(self.context, operator)) is not None:
                store.add(cancelled=self.job_id)

    def cancelled_for_start_timeout(self, operator: SubmittingOperator, error: errors.DataSphereError) -> Exception:
        """Cancel the job because it took too long to start, whatever ``on_kill_action`` says; return the error.

        :param error: says that it did.
        """
        cancelled = self.over or self.end_job(operator, START_TIMED_OUT, action="cancel")
        self.over = True  # nothing more is done about it when the try ends
        if cancelled:
            return _append_sentence(error, "The job was cancelled.")
        return _append_sentence(error, self._not_cancelled)

    def mark_job_ended(self, job_id: str) -> None:
        """Record that the job is over, or that another process has cancelled it for this task."""
        self._end_requests[job_id, True] = None
        self.over = True

    # Ending the try ----------------------------------------------------------------------------------------------

    def raise_final_error(self, operator: SubmittingOperator, error: BaseException) -> NoReturn:
        """End the try with ``error``, after the job was kept or cancelled; the raised error names the job."""
        settled = self._final_error(operator, error)
        if settled is error:
            raise error
        if isinstance(error, errors.DataSphereError):
            # It replaces the other: two errors of one name in one traceback would read as two.
            raise settled.with_traceback(error.__traceback__) from error.__cause__
        raise settled from error

    def _final_error(self, operator: SubmittingOperator, error: BaseException) -> BaseException:
        if isinstance(error, (TaskDeferred, OvertakenError)):
            return error
        if self.killed.is_set():
            for thread in self._kill_threads:
                thread.join(task_end.KILL_SECONDS)  # it may be cancelling the job, and dies with this process
            self.end_job_unless_kept(operator)
            interrupted = isinstance(error, DataSphereError) and was_interrupted(error)
            return self._killed_error(operator) if interrupted else error
        if isinstance(error, AirflowTaskTimeout):
            self._timed_out = True
            self.end_job_unless_kept(operator)
            return error
        if not isinstance(error, Exception):
            # Ctrl-C in dag.test() or `airflow tasks test`, and whatever else ends the process deliberately.
            if not self.over:
                self.end_job(operator, TASK_ENDED)
            return error
        if self.job_id is None:
            return self._with_earlier_jobs(operator, error)
        if self.over:
            return error if _is_own_error(error) else _append_sentence(error, f"{self.label} is over.")
        if isinstance(error, errors.JobLostError):
            return error  # it names the job, and says how to cancel it
        if _is_own_error(error) and not self.started:
            # The submission has deleted what it created; a job that an earlier try started may be running.
            if not self._will_be_retried(operator, error):
                self.end_job(operator, TASK_FAILED)
            return error
        return self._with_running_job(operator, error)

    def _will_be_retried(self, operator: SubmittingOperator, error: Exception) -> bool:
        return self.will_reattach(operator) and not isinstance(error, AirflowFailException)

    def _with_earlier_jobs(self, operator: SubmittingOperator, error: Exception) -> Exception:
        """This try ends before it has reattached to the jobs of earlier ones, and no later try will."""
        context = self.context
        first_run = context is not None and context["ti"].try_number <= 1 and not self._resumed
        if context is None or not operator.reattach or first_run:
            return error
        if self._will_be_retried(operator, error):
            return error
        try:
            if self.client is None:
                raise DataSphereError("there is no connection")
            left = operator.find_unfinished_jobs(context, self.client)
        except Exception as reason:
            entry = store.get() if (store := StateStore.of(context, operator)) is not None else None
            job = f"job {entry['job_id']}" if entry and entry.get("job_id") else "a job"
            return _append_sentence(
                error,
                f"An earlier try may have left {job} running and costing money; reading it failed: {reason}",
            )
        for job_id, started in left:
            self.job_id, self.started = job_id, started
            error = self._with_running_job(operator, error)
        return error

    def _with_running_job(self, operator: SubmittingOperator, error: Exception) -> Exception:
        """The try ends with an error of its own while the job is running: keep or cancel the job, and say so."""
        if self._will_be_retried(operator, error):
            return _append_sentence(error, f"{self.label} keeps running, and the next try attaches to it.")
        if operator.on_kill_action == "keep":
            return _append_sentence(error, f"{self.label} keeps running (on_kill_action='keep').")
        if self.end_job(operator, TASK_FAILED):
            return _append_sentence(error, f"{self.label} was cancelled, since no later try would reattach to it.")
        return _append_sentence(error, self._not_cancelled)

    def _killed_error(self, operator: SubmittingOperator) -> DataSphereError:
        if self.job_id is None:
            return DataSphereError("This task was stopped in Airflow before a job was created.")
        if self._kept_running:
            return DataSphereError(
                f"This try was terminated, and Airflow will retry the task. {self.label} keeps running, and the next "
                "try attaches to it."
            )
        if operator.on_kill_action == "keep":
            return DataSphereError(
                f"This task was stopped in Airflow. {self.label} keeps running (on_kill_action='keep')."
            )
        return DataSphereError(f"This task was stopped in Airflow, so its job was cancelled: {self.label}.")

    @property
    def _not_cancelled(self) -> str:
        return f"{self.label} couldn't be cancelled; it may still be running and costing money: cancel it on its page."

    @property
    def label(self) -> str:
        """The job as messages name it."""
        if self.job_id is None:
            return "The job"
        return f"Job {self.job_id} ({self.link})" if self.link else f"Job {self.job_id}"


def _job_id_of(ti: Any) -> str | None:
    job_id = ti.xcom_pull(task_ids=ti.task_id, key="job_id", map_indexes=ti.map_index)
    return job_id if isinstance(job_id, str) else None


def _is_own_error(error: Exception) -> bool:
    return isinstance(error, (errors.DataSphereError, AirflowSkipException))


def _append_sentence(error: Exception, what: str) -> Exception:
    """Return the error with one more sentence; one that isn't this provider's becomes a :class:`DataSphereError`."""
    if isinstance(error, errors.DataSphereError):
        return type(to_airflow_exception(error))(f"{str(error).rstrip('.')}. {what}")
    if isinstance(error, AirflowFailException):
        return AirflowFailException(f"{str(error).rstrip('.')}. {what}")
    return DataSphereError(f"{type(error).__name__}: {str(error).rstrip('.')}. {what}")
