"""What every task that owns a job does: wait for it, on a worker or deferred, and end it when it is killed itself."""

from __future__ import annotations

import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Collection
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_datasphere import killing
from airflow_provider_datasphere.compat import (
    AIRFLOW_V_3_0_PLUS,
    AirflowSkipException,
    AirflowTaskTimeout,
    BaseOperator,
    current_context,
    resumed_by_this_try,
    task_state,
)
from airflow_provider_datasphere.exceptions import DataSphereError, JobLostError, airflow_side, translated
from airflow_provider_datasphere.generation import has_a_try_left
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.links.jobs import DataSphereJobLink

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.client.outcome import JobHandle
    from airflow_provider_datasphere.compat import Context


class JobOperator(BaseOperator):
    """A task that owns one job. A subclass says how the job is come by, and has the arguments named below.

    They are arguments of the subclass itself, since a DAG's ``default_args`` reach only those that a class names.
    """

    wait_for_completion: bool
    deferrable: bool
    poll_interval: float
    stream_logs: bool
    on_kill_action: killing.OnKillAction
    reattach: bool
    fail_on_missing_outputs: bool
    skip_on_exit_code: int | Collection[int] | None
    datasphere_conn_id: str

    operator_extra_links = (DataSphereJobLink(),)
    ui_color = "#dbe9ff"
    # An Event can't be copied; Airflow copies operators with their DAG (3.0's dag.test(), partial_subset).
    shallow_copy_attrs = ("_killed",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._context: Context | None = None
        self._client: DataSphereClient | None = None
        self._job_id: str | None = None
        self._link: str | None = None
        self._started = False
        self._timed_out = False
        self._killed = threading.Event()
        self._resumed = False
        self._began: float | None = None
        self._ended: dict[tuple[str, bool], object] = {}
        self._left_running = False

    @abstractmethod
    def _obtain(self, context: Context, client: DataSphereClient) -> tuple[JobHandle, bool]:
        """The running job of the task's generation, and whether an earlier try started it.

        Tells :meth:`_has_job` its id as soon as there is one.
        """

    # The task ----------------------------------------------------------------------------------------------------

    def execute(self, context: Context) -> str:
        from airflow_provider_datasphere.client.service import Interrupted

        self._context, self._resumed, self._started = context, False, False
        try:
            with translated():
                self._client = client = DataSphereHook(self.datasphere_conn_id).get_conn()
                if self._killed.is_set():
                    client.interrupt()  # the kill came before there was anything to interrupt
                handle, found = self._obtain(context, client)
                self._started = True
                if handle.operation_id is not None:
                    context["ti"].xcom_push(key="operation_id", value=handle.operation_id)
                client.pause(0)
                if not self.wait_for_completion:
                    self.log.info("Job %s is started; not waiting for it.", handle.job_id)
                    return handle.job_id
                if self.deferrable and not self._over(handle):
                    self._defer(context, handle)
                return self._wait(context, handle, from_start=not found)
        except DataSphereError as error:
            if isinstance(error.__cause__, Interrupted):
                raise self._end_of_killed_try() from error
            raise
        finally:
            if self._killed.is_set():
                self._end_job_unless_left()

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> str:
        """Resume after the triggerer has seen the end of the job (or of the task's time)."""
        self._context = context
        event = event or {}
        status, job_id = event.get("status"), event.get("job_id")
        if status not in ("ended", "timeout", "lost") or not job_id:
            raise DataSphereError(f"The trigger sent an event that this operator doesn't know: {event!r}.")
        self._link = event.get("link")
        if status == "ended" or event.get("cancelled"):
            # Nothing is left for on_kill() to do.
            self._ended[job_id, True] = None
        if status == "timeout":
            self._job_id, self._started = job_id, True
            self._end_job("execution_timeout passed while the task was deferred")
            raise AirflowTaskTimeout(f"execution_timeout passed while job {job_id} ran; {event.get('message')}")
        if status == "lost":
            raise JobLostError(event.get("message") or f"Job {job_id} is out of sight.")

        from airflow_provider_datasphere.client.outcome import JobHandle

        with translated():
            # The log has been read in the triggerer.
            return self._wait(context, JobHandle(job_id, event.get("operation_id")), from_start=False, logs=False)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """A net under the trigger: if Airflow ends the deferral itself, ``execute_complete`` isn't called."""
        if not resumed_by_this_try(next_kwargs, context):
            self._began = time.time()
            return self.execute(context)
        self._context, self._resumed = context, True
        if next_method == "__fail__":
            timed_out = "timeout" in str((next_kwargs or {}).get("error", "")).lower()
            if timed_out or not self._picked_up(context):
                self._remember_job(context)
                self._end_job("Airflow ended the wait for it")
        return super().resume_execution(next_method, next_kwargs, context)

    def on_kill(self) -> None:
        """End the job as ``on_kill_action`` says, unless a later try goes on with it.

        Called by a signal handler, by Airflow after a timeout, and possibly twice.
        """
        if isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            # Airflow calls from where it handles the timeout: no person has come.
            self._timed_out = True
        if self._context is None:
            # Airflow 2 doesn't even begin to resume a task whose time is up.
            with suppress(Exception):
                self._context, self._resumed = current_context(), True
        worker = threading.Thread(target=self._on_kill, name="datasphere-on-kill", daemon=True)
        worker.start()
        # Not longer: the task is killed for good about five seconds after the signal.
        worker.join(killing.ASK_SECONDS + killing.CANCEL_SECONDS + 0.5)

    # Steps -------------------------------------------------------------------------------------------------------

    def _has_job(self, context: Context, job_id: str) -> None:
        """There is a job: tell everybody who may need it, whatever becomes of the task."""
        if job_id == self._job_id:
            return
        assert self._client is not None
        self._job_id = job_id
        ti: Any = context["ti"]
        ti.xcom_push(key="job_id", value=job_id)
        if self.do_xcom_push:
            # Now, not only at the end: a teardown cancels, and a download brings, the job of a failed task too.
            ti.xcom_push(key="return_value", value=job_id)
        self._link = self._client.job_link(job_id)
        ti.xcom_push(key="job_url", value=self._link)
        ti.xcom_push(key=DataSphereJobLink.link_key, value=self._link)
        self.log.info("Job %s: %s", job_id, self._link)

    def _over(self, handle: JobHandle) -> bool:
        """Whether the job is over already. In doubt it isn't: the triggerer has the patience to find out."""
        from airflow_provider_datasphere.client.waiting import Waiting
        from airflow_provider_datasphere.client.watch import Narrator, look

        assert self._client is not None
        waiting, narrator = Waiting(handle, link=self._link), Narrator(self.log)
        while waiting.ended is None:
            look(self._client, handle, waiting, narrator)
            if waiting.still_running or waiting.failures:
                return False
            self._client.pause(waiting.delay if waiting.ended is None else 0)
        return True

    def _defer(self, context: Context, handle: JobHandle) -> NoReturn:
        from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger

        self.log.info("Waiting for job %s in the triggerer.", handle.job_id)
        deadline = self._deadline(context)
        self.defer(
            trigger=DataSphereJobTrigger(
                job_id=handle.job_id,
                operation_id=handle.operation_id,
                datasphere_conn_id=self.datasphere_conn_id,
                poll_interval=self.poll_interval,
                stream_logs=self.stream_logs,
                deadline=deadline,
                on_kill_action=self.on_kill_action,
                link=self._link,
            ),
            method_name="execute_complete",
            # A net for a triggerer that doesn't keep the deadline. Airflow's own timeout tells nobody.
            timeout=timedelta(seconds=max(1.0, deadline - time.time()) + 300) if deadline is not None else None,
        )

    def _deadline(self, context: Context) -> float | None:
        """When ``execution_timeout`` of this try is over, in epoch seconds."""
        if self.execution_timeout is None:
            return None
        ti: Any = context["ti"]
        # Where Airflow has begun this try with the deferral of an earlier one, it shows that one's start.
        began = self._began or float(ti.start_date.timestamp())
        deadline = began + self.execution_timeout.total_seconds()
        # Airflow 2 ends the deferral itself at that moment, without a word to the trigger: be ahead of it.
        return deadline if AIRFLOW_V_3_0_PLUS else deadline - 5.0

    def _wait(self, context: Context, handle: JobHandle, *, from_start: bool, logs: bool = True) -> str:
        from airflow_provider_datasphere.client.outcome import Policy, judge
        from airflow_provider_datasphere.client.watch import watch

        if self._client is None:
            self._client = DataSphereHook(self.datasphere_conn_id).get_conn()
        if logs and self.stream_logs and not from_start:
            self.log.info("The job's log follows from its beginning; an earlier try may have shown it already.")
        ended = watch(
            self._client,
            handle,
            poll_interval=self.poll_interval,
            link=self._link,
            emit=(lambda line: self.log.info("%s", line)) if logs and self.stream_logs else None,
            logger=self.log,
        )
        outcome = judge(
            handle.job_id,
            ended.operation,
            ended.job,
            Policy.of(fail_on_missing_outputs=self.fail_on_missing_outputs, skip_on_exit_code=self.skip_on_exit_code),
            link=self._link,
        )
        ti: Any = context["ti"]
        ti.xcom_push(key="result", value=outcome.result.to_dict())
        for warning in outcome.warnings:
            self.log.warning("%s", warning)
        if outcome.skip is not None:
            raise AirflowSkipException(outcome.skip)
        if outcome.error is not None:
            raise airflow_side(outcome.error)
        self.log.info("Job %s succeeded. Output files: %d.", handle.job_id, len(outcome.result.output_files))
        return handle.job_id

    # Being killed ------------------------------------------------------------------------------------------------

    def _picked_up(self, context: Context) -> bool:
        return self.reattach and has_a_try_left(context)

    def _on_kill(self) -> None:
        self._killed.set()
        try:
            if self._context is not None and not self._timed_out:
                ti = self._context["ti"]
                answered, state = killing.ask_state(lambda: task_state(ti), self.log)
                self._left_running = killing.goes_on(answered, state, picked_up=self._picked_up(self._context))
                if self._left_running:
                    self.log.info("%s goes on, and the next try attaches to it.", self._named_job())
            if self._job_id is None and self._resumed and self._context is not None:
                self._remember_job(self._context)
            self._end_job_unless_left()
        finally:
            if self._client is not None:
                self._client.interrupt()

    def _end_job_unless_left(self) -> None:
        if not self._left_running:
            self._end_job("execution_timeout passed" if self._timed_out else "the task was ended")

    def _remember_job(self, context: Context) -> None:
        """The job of a task that was resumed; in a new process, so only Airflow remembers it."""
        ti: Any = context["ti"]
        self._job_id = ti.xcom_pull(task_ids=ti.task_id, key="job_id", map_indexes=ti.map_index)
        self._started = True

    def _end_job(self, reason: str) -> None:
        """End the job, once; and once more if Execute has answered since."""
        job_id, started = self._job_id, self._started
        if job_id is None:
            return
        # Two threads may come here, and neither may wait for the other: a signal may have interrupted it.
        mine = object()
        if self._ended.setdefault((job_id, started), mine) is not mine:
            return
        again = started and (job_id, False) in self._ended
        ending = killing.Ending(
            job_id,
            self.on_kill_action,
            f"Airflow: {reason}",
            self.log,
            started=started,
            surely_running=not (again or self._resumed),
        )
        settings = self._client.settings if self._client else DataSphereHook(self.datasphere_conn_id).settings
        killing.cancel_job(settings, ending)

    def _end_of_killed_try(self) -> DataSphereError:
        job = self._named_job()
        if self._left_running:
            what = f"This try of the task was ended from outside while Airflow still counts on the task. {job} goes on"
            return DataSphereError(f"{what}, and the next try attaches to it.")
        if self.on_kill_action == "keep":
            return DataSphereError(f"The task was ended from outside. {job} goes on (on_kill_action='keep').")
        return DataSphereError(f"The task was ended from outside. {job} doesn't go on.")

    def _named_job(self) -> str:
        return f"Job {self._job_id}" if self._job_id is not None else "A job that is just being made"
