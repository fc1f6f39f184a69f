"""Operators that run and cancel DataSphere jobs; the cancel lives in :mod:`.cancel`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_datasphere import killing
from airflow_provider_datasphere.arguments import check_literals
from airflow_provider_datasphere.client import fork
from airflow_provider_datasphere.compat import (
    AIRFLOW_V_3_0_PLUS,
    AirflowSkipException,
    AirflowTaskTimeout,
    BaseOperator,
    conf,
    current_context,
    task_state,
)
from airflow_provider_datasphere.exceptions import DataSphereError, JobLostError, airflow_side, translated
from airflow_provider_datasphere.generation import StateStore, has_a_try_left, key_of
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.links.jobs import DataSphereJobLink
from airflow_provider_datasphere.operators.cancel import CancelJobOperator

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.client.outcome import JobHandle
    from airflow_provider_datasphere.client.upload import JobInput
    from airflow_provider_datasphere.compat import Context


class ForkJobOperator(BaseOperator):
    """Clone a DataSphere job with overrides, run the clone, and wait for it.

    The task succeeds when the program ended with return code 0 and made its declared outputs. The job's log goes to
    the task's log. Whatever dies on the way, one generation of the task (all its automatic tries) runs one job.

    .. seealso:: ``docs/fork.md``; RPCs ``Clone``, ``Execute`` of ``ProjectJobService``, ``OperationService.Get``.

    :param source_job_id: the job to clone. (templated)
    :param args: argument name -> value, strings; names must exist in the source job. (templated)
    :param vars: input variable -> local path, object-store URI or ``datasphere://[conn@]<job id>/<output>``; output
        variable -> new path inside the job. (templated)
    :param env_vars: environment variables of the job. (templated)
    :param name: name of the new job. (templated)
    :param desc: description of the new job; the mark by which a later try finds the job is appended. (templated)
    :param docker: resource id or system image name, or
        ``{"image": …, "username": …, "password": {"secret-id": …}}``. (templated)
    :param working_storage: ``{"type": "SSD", "size": "100GB"}``, at least 100 GB. (templated)
    :param cloud_instance_types: in order of preference; replaces the source's list. (templated)
    :param data_ttl: how long the service keeps the new job's data: whole days, or ``"infinity"``; default 14 days.
        (templated)
    :param source_data_ttl: have the service keep the *source* job's data for so long from now, so that it can still
        be forked; default: left alone, with a warning three days before they expire. (templated)
    :param wait_for_completion: ``False`` ends the task as soon as the job is started.
    :param deferrable: wait in the triggerer, without a worker slot. Default: ``[operators] default_deferrable``.
    :param poll_interval: longest pause between two polls, seconds.
    :param stream_logs: bring the job's log into the task's log.
    :param on_kill_action: what becomes of the job when a person or a timeout ends the task: ``"cancel"``,
        ``"graceful"`` (with the job's own shutdown signal and timeout, where it has them), ``"keep"``.
    :param reattach: have a retry go on with the job that an earlier try started. ``False``: each try forks.
    :param fail_on_missing_outputs: fail when the program didn't make a declared output.
    :param skip_on_exit_code: return code or codes that skip the task.
    :param datasphere_conn_id: the connection. (templated)
    :return: the job id. Further XComs: ``operation_id``, ``job_url`` and, when it waited, ``result``.
    :raises JobRequestError: the request can't be carried out as written; not retried.
    :raises JobFailedError: return code other than 0.
    :raises MissingOutputsError: declared outputs weren't made; not retried.
    :raises JobCancelledError: somebody cancelled the job; not retried.
    :raises JobInfrastructureError: the service failed the job.
    :raises JobLostError: the job is out of sight, and may go on.
    """

    template_fields: Sequence[str] = (
        "source_job_id",
        "args",
        "vars",
        "env_vars",
        "name",
        "desc",
        "docker",
        "working_storage",
        "cloud_instance_types",
        "data_ttl",
        "source_data_ttl",
        "datasphere_conn_id",
    )
    template_fields_renderers = {  # noqa: RUF012 -- Airflow's own idiom
        "args": "json",
        "vars": "json",
        "env_vars": "json",
        "docker": "json",
        "working_storage": "json",
        "cloud_instance_types": "json",
    }
    operator_extra_links = (DataSphereJobLink(),)
    ui_color = "#dbe9ff"
    # An Event can't be copied; Airflow copies operators with their DAG (3.0's dag.test(), partial_subset).
    shallow_copy_attrs = ("_killed",)

    def __init__(
        self,
        *,
        source_job_id: str,
        args: Mapping[str, str] | None = None,
        vars: Mapping[str, str] | None = None,
        env_vars: Mapping[str, str] | None = None,
        name: str | None = None,
        desc: str | None = None,
        docker: str | Mapping[str, Any] | None = None,
        working_storage: Mapping[str, Any] | None = None,
        cloud_instance_types: Sequence[str] | None = None,
        data_ttl: timedelta | str | None = None,
        source_data_ttl: timedelta | str | None = None,
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: float = 10.0,
        stream_logs: bool = True,
        on_kill_action: killing.OnKillAction = "cancel",
        reattach: bool = True,
        fail_on_missing_outputs: bool = True,
        skip_on_exit_code: int | Collection[int] | None = None,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source_job_id = source_job_id
        self.args = args
        self.vars = vars
        self.env_vars = env_vars
        self.name = name
        self.desc = desc
        self.docker = docker
        self.working_storage = working_storage
        self.cloud_instance_types = cloud_instance_types
        self.data_ttl = data_ttl
        self.source_data_ttl = source_data_ttl
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.poll_interval = poll_interval
        self.stream_logs = stream_logs
        self.on_kill_action = on_kill_action
        self.reattach = reattach
        self.fail_on_missing_outputs = fail_on_missing_outputs
        self.skip_on_exit_code = skip_on_exit_code
        self.datasphere_conn_id = datasphere_conn_id
        check_literals(self)

        self._context: Context | None = None
        self._client: DataSphereClient | None = None
        self._job_id: str | None = None
        self._link: str | None = None
        self._started = False
        self._timed_out = False
        self._killed = threading.Event()
        self._resumed = False
        self._ended: dict[tuple[str, bool], object] = {}
        self._left_running = False

    # The task ----------------------------------------------------------------------------------------------------

    def execute(self, context: Context) -> str:
        from airflow_provider_datasphere.client.service import Interrupted

        self._context = context
        try:
            with translated():
                handle, found = self._obtain(context)
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

    def _obtain(self, context: Context) -> tuple[JobHandle, bool]:
        """The job of this generation: one that an earlier try started, or a new one."""
        from airflow_provider_datasphere.client.ledger import obtain
        from airflow_provider_datasphere.client.outcome import JobHandle
        from airflow_provider_datasphere.client.submit import Submission
        from airflow_provider_datasphere.client.watch import watch

        hook = DataSphereHook(self.datasphere_conn_id)
        client = self._client = hook.get_conn()
        ti: Any = context["ti"]
        request = fork.ForkRequest(
            source_job_id=self.source_job_id,
            args=self.args or {},
            vars=self.vars or {},
            env_vars=self.env_vars or {},
            name=self.name,
            desc=self.desc,
            docker=self.docker,
            working_storage=self.working_storage,
            cloud_instance_types=self.cloud_instance_types or (),
            data_ttl=self.data_ttl,
        )

        def cloned(job_id: str) -> None:
            if job_id == self._job_id:
                return
            self._job_id = job_id
            ti.xcom_push(key="job_id", value=job_id)
            # Now, not only at the end: a teardown cancels, and a download brings, the job of a failed task too.
            ti.xcom_push(key="return_value", value=job_id)
            self._link = client.job_link(job_id)
            ti.xcom_push(key="job_url", value=self._link)
            ti.xcom_push(key=DataSphereJobLink.link_key, value=self._link)
            self.log.info("Job %s: %s", job_id, self._link)

        def stage(input_vars: Mapping[str, str], source: Any, scratch: Path) -> Sequence[JobInput]:
            from airflow_provider_datasphere.inputs import stage_vars

            return stage_vars(input_vars, source, client, scratch)

        submission = Submission(
            key="",
            stage=stage,
            cloned=cloned,
            source_data_ttl=self.source_data_ttl,
            log=self.log,
        )
        key = key_of(context)
        obtained = obtain(
            client,
            request,
            submission,
            key if self.reattach else key.for_try(ti.try_number),
            store=StateStore.of(context) if self.reattach else None,
            look=self.reattach and ti.try_number > 1,
            link=lambda job: client.job_link(job.id, job.project_id),
            wait=lambda job_id: watch(client, JobHandle(job_id), poll_interval=self.poll_interval, logger=self.log),
        )
        self._started = True
        if obtained.handle.operation_id is not None:
            ti.xcom_push(key="operation_id", value=obtained.handle.operation_id)
        client.pause(0)
        return obtained.handle, obtained.found

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
        deadline = float(ti.start_date.timestamp() + self.execution_timeout.total_seconds())
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


__all__ = ["CancelJobOperator", "ForkJobOperator"]
