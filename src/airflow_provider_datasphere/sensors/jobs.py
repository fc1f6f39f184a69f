"""A sensor that waits for a DataSphere job, whoever started it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import check_exit_codes
from airflow_provider_datasphere.compat import (
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    PokeReturnValue,
    conf,
    resumed_by_this_try,
)
from airflow_provider_datasphere.exceptions import (
    DataSphereError,
    JobLostError,
    airflow_side,
    translated,
)
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.client.outcome import JobHandle
    from airflow_provider_datasphere.client.waiting import Ended
    from airflow_provider_datasphere.client.watch import Narrator
    from airflow_provider_datasphere.compat import Context

#: How many transient errors in a row one poke waits out before it leaves the job to the next poke.
ATTEMPTS_PER_POKE = 3
#: How much later than the trigger Airflow ends the wait itself, should the trigger not do so, seconds.
NET_SECONDS = 300.0
#: A deferred sensor polls no more often than this, whatever its ``poke_interval``, seconds.
SHORTEST_DEFERRED_PAUSE = 1.0


class DataSphereJobSensor(BaseSensorOperator):
    """Wait for a job. Succeeds on SUCCESS only; a terminal failure ends it at once, without a retry.

    It never starts and never cancels anything. A poke costs one call, the last one two.

    .. seealso:: ``docs/waiting.md``; RPCs ``OperationService.Get``, ``ProjectJobService.Get``.

    :param job_id: the job: a literal, or ``fork.output``. (templated)
    :param operation_id: its Execute operation (XCom ``operation_id`` of the fork), which alone knows the return code
        of a failed program. (templated)
    :param mode: ``"reschedule"`` holds no worker slot between pokes; ``"poke"`` does.
    :param poke_interval: seconds between two pokes; when deferred, the longest pause between two polls.
    :param deferrable: wait in the triggerer. Default: ``[operators] default_deferrable``.
    :param skip_on_exit_code: return code or codes that skip the task.
    :param fail_on_missing_outputs: fail when the program didn't make a declared output.
    :param datasphere_conn_id: the connection. (templated)
    :return: the ``result`` mapping, as the operator's XCom of that key; pushed under that key as well, also when the
        sensor fails or skips.
    :raises JobFailedError: and the other classes of a job's failure, not retried.
    :raises AirflowSensorTimeout: ``timeout`` has passed, in any mode; not retried. The job goes on.
    """

    template_fields: Sequence[str] = ("job_id", "operation_id", "datasphere_conn_id")
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
        super().__init__(mode=mode, poke_interval=poke_interval, **kwargs)
        check_exit_codes(skip_on_exit_code)
        self.job_id = job_id
        self.operation_id = operation_id
        self.deferrable = deferrable
        self.skip_on_exit_code = skip_on_exit_code
        self.fail_on_missing_outputs = fail_on_missing_outputs
        self.datasphere_conn_id = datasphere_conn_id
        self._client: DataSphereClient | None = None
        self._narrator: Narrator | None = None

    def execute(self, context: Context) -> Any:
        if not self.deferrable:
            return super().execute(context)
        with self._skips_softly():
            result = self._look(context)
        if result is not None:
            return result

        from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger

        handle = self._handle()
        self.log.info("Waiting for job %s in the triggerer.", handle.job_id)
        return self.defer(
            trigger=DataSphereJobTrigger(
                job_id=handle.job_id,
                operation_id=handle.operation_id,
                datasphere_conn_id=self.datasphere_conn_id,
                poll_interval=max(SHORTEST_DEFERRED_PAUSE, float(self.poke_interval)),
                # Airflow's own end of a wait is, on 2.11, a failure like any other, which is retried.
                deadline=time.time() + self.timeout,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout + NET_SECONDS),
        )

    def poke(self, context: Context) -> bool | PokeReturnValue:
        with self._skips_softly():
            result = self._look(context)
        return PokeReturnValue(is_done=True, xcom_value=result) if result is not None else False

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> Any:
        """Resume after the triggerer has seen the end of the job (or of the time to wait for it)."""
        event = event or {}
        if event.get("status") not in ("ended", "timeout", "lost"):
            raise DataSphereError(f"The trigger sent an event that this sensor doesn't know: {event!r}.")
        with self._skips_softly():
            if event["status"] == "lost":
                raise JobLostError(event.get("message") or f"Job {self.job_id} is out of sight.")
            if event["status"] == "timeout":
                # It may have ended since.
                if (result := self._look(context)) is not None:
                    return result
                raise self._timed_out()
            with translated(final=True):
                from airflow_provider_datasphere.client.watch import watch

                client = self._connect()
                return self._result(context, client, watch(client, self._handle(), logger=self.log))

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """A net under the trigger: if Airflow ends the deferral itself, ``execute_complete`` isn't called."""
        if not resumed_by_this_try(next_kwargs, context):
            return self.execute(context)
        timed_out = next_method == "__fail__" and "timeout" in str((next_kwargs or {}).get("error", "")).lower()
        if timed_out and self.execution_timeout is None:
            with self._skips_softly():
                raise self._timed_out()
        return super().resume_execution(next_method, next_kwargs, context)

    def _timed_out(self) -> AirflowSensorTimeout:
        return AirflowSensorTimeout(f"Job {self.job_id} hasn't ended in {self.timeout:.0f} seconds. It goes on.")

    def _look(self, context: Context) -> dict[str, Any] | None:
        """The result of an ended job; ``None`` while it runs."""
        from airflow_provider_datasphere.client.logs import LogTail
        from airflow_provider_datasphere.client.waiting import Waiting
        from airflow_provider_datasphere.client.watch import Narrator, look

        handle = self._handle()
        waiting = Waiting(handle, own_operation=False)
        with translated(final=True):
            client = self._connect()
            # Kept from poke to poke where they share a process, so that only changes are told.
            if self._narrator is None:
                self._narrator, self._tail = Narrator(self.log), LogTail()
            while waiting.ended is None:
                look(client, handle, waiting, self._narrator, self._tail, lambda line: self.log.info("%s", line))
                if waiting.still_running or (waiting.failures >= ATTEMPTS_PER_POKE and not waiting.refused):
                    return None
                client.pause(waiting.delay if waiting.ended is None else 0)
            return self._result(context, client, waiting.ended)

    def _connect(self) -> DataSphereClient:
        if self._client is None:
            self._client = DataSphereHook(self.datasphere_conn_id).get_conn()
        return self._client

    @contextmanager
    def _skips_softly(self) -> Iterator[None]:
        """``soft_fail`` and ``never_fail`` alike in every mode; Airflow's own handling covers poking only."""
        try:
            yield
        except (DataSphereError, AirflowSensorTimeout) as error:
            if self.soft_fail or getattr(self, "never_fail", False):
                raise AirflowSkipException(f"Skipping instead of failing: {error}") from error
            raise

    def _handle(self) -> JobHandle:
        from airflow_provider_datasphere.client.fork import check_job_id
        from airflow_provider_datasphere.client.outcome import JobHandle

        with translated():
            check_job_id("job_id", self.job_id, "give the id of a DataSphere job, such as fork.output")
        # A template of an XCom that isn't there renders to "None".
        operation_id = self.operation_id if self.operation_id not in ("", "None") else None
        return JobHandle(self.job_id, operation_id)

    def _result(self, context: Context, client: DataSphereClient, ended: Ended) -> dict[str, Any]:
        from airflow_provider_datasphere.client.outcome import Policy, judge

        outcome = judge(
            self.job_id,
            ended.operation,
            ended.job,
            Policy.of(fail_on_missing_outputs=self.fail_on_missing_outputs, skip_on_exit_code=self.skip_on_exit_code),
            link=client.job_link(self.job_id, ended.job.project_id if ended.job else None),
        )
        result = outcome.result.to_dict()
        # Under the operator's key too, and before a failure: whoever handles it finds the result in one place.
        context["ti"].xcom_push(key="result", value=result)
        for warning in outcome.warnings:
            self.log.warning("%s", warning)
        if outcome.skip is not None:
            raise AirflowSkipException(outcome.skip)
        if outcome.error is not None:
            raise airflow_side(outcome.error, final=True)
        self.log.info("Job %s succeeded. Output files: %d.", self.job_id, len(outcome.result.output_files))
        return result
