"""A sensor that waits for a DataSphere job, whoever started it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import (
    LONGEST_TIMEOUT,
    check_common,
    check_exit_codes,
    check_literal_job_id,
    is_literal,
    template_marks,
)
from airflow_provider_datasphere.client.validation import check_job_id, parse_operation_id
from airflow_provider_datasphere.compat import (
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    PokeReturnValue,
    conf,
    deferral_timed_out,
    resumed_by_this_try,
    was_rescheduled,
)
from airflow_provider_datasphere.exceptions import (
    DataSphereError,
    JobLostError,
    airflow_exceptions,
)
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.task_context import can_defer, require_task
from airflow_provider_datasphere.task_result import report_outcome
from airflow_provider_datasphere.templates import TextTemplates
from airflow_provider_datasphere.triggers.event import JobEvent

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.model import JobHandle
    from airflow_provider_datasphere.client.monitoring.polling import TerminalState
    from airflow_provider_datasphere.client.monitoring.status_logger import StatusLogger
    from airflow_provider_datasphere.client.sync_client import DataSphereClient
    from airflow_provider_datasphere.compat import Context

#: How many polls in a row may fail with a transient error before a poke ends and leaves the job to the next one.
ATTEMPTS_PER_POKE = 3
#: How long after the trigger's deadline Airflow itself ends the deferral, should the trigger not do so, seconds.
TRIGGER_TIMEOUT_MARGIN = 300.0
_HINT = "give the id of a DataSphere job, such as fork.output"
#: A deferred sensor polls no more often than this, whatever its ``poke_interval``, seconds.
MIN_DEFERRED_POLL_INTERVAL = 1.0


class DataSphereJobSensor(TextTemplates, BaseSensorOperator):
    """Wait for a job. Succeeds on SUCCESS only; any other terminal status fails it at once, without a retry.

    It never starts or cancels a job. A poke makes one call, the last one two.

    .. seealso:: ``docs/waiting.md``; RPCs ``OperationService.Get``, ``ProjectJobService.Get``.

    :param job_id: the job: a literal, or ``fork.output``. (templated)
    :param operation_id: its Execute operation (XCom ``operation_id`` of the fork), which alone has the return code of
        a failed program. Default: the return code of a failed program isn't known. (templated)
    :param mode: ``"reschedule"`` holds no worker slot between pokes; ``"poke"`` does.
    :param poke_interval: seconds between two pokes, default 60; when deferred, the longest pause between two polls.
    :param deferrable: wait in the triggerer. Default: ``[operators] default_deferrable``.
    :param skip_on_exit_code: return code or codes that skip the task. Default: none.
    :param fail_on_missing_outputs: fail when the program didn't create a declared output. Default: True.
    :param datasphere_conn_id: the connection. (templated)
    :return: the ``result`` mapping, as the operator's XCom of that key; also pushed as XCom ``result``, even when the
        sensor fails or skips.
    :raises JobFailedError: and the other classes of a job's failure; not retried.
    :raises AirflowSensorTimeout: ``timeout`` has passed, in any mode; not retried. The job keeps running.
    """

    template_fields: Sequence[str] = ("job_id", "operation_id", "datasphere_conn_id")
    text_fields = template_fields
    ui_color = "#dbe9ff"

    def __init__(
        self,
        *,
        job_id: str,
        operation_id: str | None = None,
        mode: str = "reschedule",
        poke_interval: float | timedelta = 60,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        skip_on_exit_code: int | Collection[int] | None = None,
        fail_on_missing_outputs: bool = True,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        timeout = kwargs.get("timeout")
        if isinstance(timeout, (int, float)) and timeout > LONGEST_TIMEOUT.total_seconds():
            kwargs["timeout"] = 2 * LONGEST_TIMEOUT  # Airflow raises an OverflowError for inf
        super().__init__(mode=mode, poke_interval=poke_interval, **kwargs)
        check_exit_codes(skip_on_exit_code)
        self.job_id = job_id
        self.operation_id = operation_id
        self.deferrable = deferrable
        self.skip_on_exit_code = skip_on_exit_code
        self.fail_on_missing_outputs = fail_on_missing_outputs
        self.datasphere_conn_id = datasphere_conn_id
        check_common(self)
        check_literal_job_id(self, job_id, _HINT)
        if is_literal(operation_id, template_marks(self.get_dag())):
            with airflow_exceptions():
                parse_operation_id(operation_id)
        self._client: DataSphereClient | None = None
        self._status_logger: StatusLogger | None = None
        #: Whether this process knows that the job exists.
        self._job_seen = False

    def execute(self, context: Context) -> Any:
        require_task(self, context)
        if (self.deferrable or self.reschedule) and not can_defer(self, context):
            self.deferrable, self.mode = False, "poke"
        if not self.deferrable:
            return super().execute(context)
        with self._soft_fail_as_skip():
            result = self._poll(context)
        if result is not None:
            return result

        from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger

        handle = self._handle()
        limited = self.timeout <= LONGEST_TIMEOUT.total_seconds()
        self.log.info("Waiting for job %s in the triggerer.", handle.job_id)
        return self.defer(
            trigger=DataSphereJobTrigger(
                job_id=handle.job_id,
                operation_id=handle.operation_id,
                datasphere_conn_id=self.datasphere_conn_id,
                poll_interval=max(MIN_DEFERRED_POLL_INTERVAL, float(self.poke_interval)),
                # When Airflow 2.11 itself times a deferral out, it retries the task.
                deadline=time.time() + self.timeout if limited else None,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout + TRIGGER_TIMEOUT_MARGIN) if limited else None,
        )

    def poke(self, context: Context) -> bool | PokeReturnValue:
        require_task(self, context)
        with self._soft_fail_as_skip():
            result = self._poll(context)
        return PokeReturnValue(is_done=True, xcom_value=result) if result is not None else False

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> Any:
        """Resume after the trigger has fired."""
        fired = JobEvent.parse(event)
        with self._soft_fail_as_skip():
            if fired.status == "lost":
                raise JobLostError(fired.message)
            if fired.status == "timeout":
                self._job_seen = True
                # The job may have ended since.
                if (result := self._poll(context)) is not None:
                    return result
                raise self._timed_out()
            with airflow_exceptions(retryable=False):
                from airflow_provider_datasphere.client.monitoring.watch import watch

                client = self._connect()
                return self._result(context, client, watch(client, self._handle(), logger=self.log))

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Safety net for deferrals that Airflow itself ends without calling ``execute_complete``."""
        if not resumed_by_this_try(next_kwargs, context):
            return self.execute(context)
        if deferral_timed_out(next_method, next_kwargs) and self.execution_timeout is None:
            with self._soft_fail_as_skip():
                raise self._timed_out()
        return super().resume_execution(next_method, next_kwargs, context)

    def _timed_out(self) -> AirflowSensorTimeout:
        return AirflowSensorTimeout(
            f"Timed out after {self.timeout:.0f} seconds waiting for job {self.job_id}; the job is still running."
        )

    def _poll(self, context: Context) -> dict[str, Any] | None:
        """Return the result of an ended job; ``None`` while it runs."""
        from airflow_provider_datasphere.client.monitoring.logs import LogTail
        from airflow_provider_datasphere.client.monitoring.polling import PollState
        from airflow_provider_datasphere.client.monitoring.status_logger import StatusLogger
        from airflow_provider_datasphere.client.monitoring.watch import poll_until_known

        handle = self._handle()
        with airflow_exceptions(retryable=False):
            client = self._connect()
            # Kept from poke to poke where they share a process, so that only changes are logged.
            if self._status_logger is None:
                tail = LogTail(handle.job_id)
                self._status_logger = StatusLogger(self.log, tail, lambda line: self.log.info("%s", line))
            state = PollState(
                handle,
                verify_operation_owner=True,
                known_job=self._is_known(handle, context),
                status_logger=self._status_logger,
            )
            ended = poll_until_known(client, state, attempts=ATTEMPTS_PER_POKE, wait_out_grace_period=True)
            self._job_seen = self._job_seen or state.still_running
            return self._result(context, client, ended) if ended is not None else None

    def _is_known(self, handle: JobHandle, context: Context) -> bool:
        """Whether the job is known to exist; the id of a sensor's first poke may be mistyped."""
        # Whoever gives an operation id has started the job. Before a retry or reschedule, an earlier poke found it.
        if handle.operation_id is not None or self._job_seen:
            return True
        return context["ti"].try_number > 1 or was_rescheduled(context)

    def _connect(self) -> DataSphereClient:
        if self._client is None:
            self._client = DataSphereHook(self.datasphere_conn_id).get_conn()
        return self._client

    @contextmanager
    def _soft_fail_as_skip(self) -> Iterator[None]:
        """Apply ``soft_fail`` and ``never_fail`` in every mode; Airflow itself does so only for ``poke``."""
        try:
            yield
        except (DataSphereError, AirflowSensorTimeout) as error:
            if self.soft_fail or getattr(self, "never_fail", False):
                raise AirflowSkipException(f"Skipping instead of failing: {error}") from error
            raise

    def _handle(self) -> JobHandle:
        from airflow_provider_datasphere.client.model import JobHandle

        with airflow_exceptions():
            check_job_id("job_id", self.job_id, _HINT)
            return JobHandle(self.job_id, parse_operation_id(self.operation_id))

    def _result(self, context: Context, client: DataSphereClient, ended: TerminalState) -> dict[str, Any]:
        from airflow_provider_datasphere.client.monitoring.outcome import OutcomePolicy, evaluate_outcome

        outcome = evaluate_outcome(
            self.job_id,
            ended.operation,
            ended.job,
            OutcomePolicy.of(
                fail_on_missing_outputs=self.fail_on_missing_outputs, skip_on_exit_code=self.skip_on_exit_code
            ),
            link=client.job_link(self.job_id, ended.job.project_id if ended.job else None),
        )
        return report_outcome(context, outcome, self.log, retryable=False)
