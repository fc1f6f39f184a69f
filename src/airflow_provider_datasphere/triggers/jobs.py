"""The trigger behind the deferred operator and sensor: monitors a job in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_datasphere import task_end
from airflow_provider_datasphere.client import cancellation
from airflow_provider_datasphere.client.cancel_reason import (
    START_TIMED_OUT,
    TASK_ENDED_WHILE_DEFERRED,
    TIMED_OUT_WHILE_DEFERRED,
)
from airflow_provider_datasphere.client.monitoring import DEFAULT_POLL_INTERVAL
from airflow_provider_datasphere.client.time_limit import within
from airflow_provider_datasphere.compat import AIRFLOW_V_3_3_PLUS, atask_state, atask_xcom
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.triggers.asyncio_tasks import (
    cancel_and_wait,
    end_of,
    run_to_completion,
    stagger_start,
)

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
    from airflow_provider_datasphere.client.monitoring.logs import LogLine, LogTail

#: How long the state of a task whose trigger was cancelled is queried, seconds.
STATE_QUERY_TIMEOUT = 10.0
#: How long it is queried after the trigger has ended, and the pause after a failed query, seconds.
STATE_QUERY_TIMEOUT_AFTER_KILL = 600.0
STATE_QUERY_RETRY_PAUSE = 1.0
#: How long reading the connection is retried, seconds.
CONNECT_TIMEOUT = 60.0
#: The same when the trigger is killed, seconds.
CONNECT_TIMEOUT_ON_KILL = 3.0
#: How long the last poll after the deadline may take, and then the rest of the job's log, seconds.
FINAL_POLL_TIMEOUT = 2.0


class DataSphereJobTrigger(BaseTrigger):
    """Starts a job that waits for room, and fires when it is over, can't be monitored any more, or its time has passed.

    All triggers of a process share one gRPC connection for polls, a few for logs, and one token source per Airflow
    connection.

    :param job_id: the job.
    :param operation_id: its Execute operation. Default: the job itself is polled.
    :param datasphere_conn_id: the connection; read in the triggerer.
    :param poll_interval: the longest pause between two polls, seconds.
    :param stream_logs: write the job's log to the task's log. Default: False.
    :param deadline: when the task times out (an operator's ``execution_timeout``, a sensor's ``timeout``), epoch
        seconds; the trigger then cancels the job as ``on_kill_action`` says, and fires. Default: never.
    :param on_kill_action: what happens to the job when a person or the deadline ends the task: ``"cancel"``,
        ``"graceful"`` or, default, ``"keep"``.
    :param link: the job's page, for messages.
    :param queued: the service's answer to the rejected Execute of a job that waits for room; default: it runs.
    :param project_id: the job's project; required with ``queued``.
    :param first_execute_at: when Execute was first called, epoch seconds; default: not known.
    :param accepted_at: when it was accepted, epoch seconds; default: not known, or not yet.
    :param start_deadline: until when the job must compute (``start_timeout``), epoch seconds; the trigger then cancels
        it, and fires. Default: any time.
    :param wait_for_completion: watch the job after its start. Default: True; False fires once it is started.
    """

    def __init__(
        self,
        job_id: str,
        operation_id: str | None = None,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        poll_interval: float = DEFAULT_POLL_INTERVAL,
        stream_logs: bool = False,
        deadline: float | None = None,
        on_kill_action: cancellation.OnKillAction = "keep",
        link: str | None = None,
        queued: str | None = None,
        project_id: str | None = None,
        first_execute_at: float | None = None,
        accepted_at: float | None = None,
        start_deadline: float | None = None,
        wait_for_completion: bool = True,
        **_: Any,  # of a row that another version has serialized
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.job_id = job_id
        self.operation_id = operation_id
        self.datasphere_conn_id = datasphere_conn_id
        self.poll_interval = poll_interval
        self.stream_logs = stream_logs
        self.deadline = deadline
        self.on_kill_action = on_kill_action
        self.link = link
        self.queued = queued
        self.project_id = project_id
        self.first_execute_at = first_execute_at
        self.accepted_at = accepted_at
        self.start_deadline = start_deadline
        self.wait_for_completion = wait_for_completion
        self._fired = False
        self._client: AsyncDataSphereClient | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "job_id": self.job_id,
                "operation_id": self.operation_id,
                "datasphere_conn_id": self.datasphere_conn_id,
                "poll_interval": self.poll_interval,
                "stream_logs": self.stream_logs,
                "deadline": self.deadline,
                "on_kill_action": self.on_kill_action,
                "link": self.link,
                "queued": self.queued,
                "project_id": self.project_id,
                "first_execute_at": self.first_execute_at,
                "accepted_at": self.accepted_at,
                "start_deadline": self.start_deadline,
                "wait_for_completion": self.wait_for_completion,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        # In an asyncio task of its own: gRPC replaces the CancelledError that ends this trigger, whose message makes
        # Airflow 3.3 call on_kill(), and asyncio.wait_for() of Python 3.11 may swallow it.
        waiting = asyncio.ensure_future(self._wait())
        try:
            await end_of(waiting)
        except asyncio.CancelledError:
            await cancel_and_wait(waiting)
            if self._runs_inline:
                # Ctrl-C in dag.test(): no other process monitors the job.
                await run_to_completion(self._cancel(TASK_ENDED_WHILE_DEFERRED))
            elif not AIRFLOW_V_3_3_PLUS:
                # The triggerer stops or hands the trigger over, or a person ended the task: only Airflow knows which.
                await run_to_completion(self._cancel_unless_monitored())
            raise
        event = waiting.result()
        self._fired = True
        yield TriggerEvent(event)

    async def on_kill(self) -> None:
        """Cancel the job if a person ended the task; Airflow 3.3+ also calls this when it hands the trigger over."""
        if self._fired:
            return
        if getattr(self, "task_instance", None) is None:
            # Without a task, no other process monitors the job.
            await run_to_completion(self._cancel(TASK_ENDED_WHILE_DEFERRED))
        else:
            await run_to_completion(self._cancel_unless_monitored())

    async def _wait(self) -> dict[str, Any]:
        """Start the job if it waits for room, and watch it to its end; return the event."""
        await stagger_start()
        queued = self.queued is not None
        end = await self._monitor()
        event = {
            "job_id": self.job_id,
            "operation_id": self.operation_id,
            "link": self.link,
            "first_execute_at": self.first_execute_at,
            "accepted_at": self.accepted_at,
            "queued": queued,
            **end,
        }
        if (task_instance := getattr(self, "task_instance", None)) is not None:
            event["try_number"] = task_instance.try_number
        return event

    async def _monitor(self) -> dict[str, Any]:
        """Monitor the job until it is over or lost, or its time has passed; return what the event says of that."""
        from airflow_provider_datasphere.client.errors import DataSphereError, JobLostError, JobNotStartedError
        from airflow_provider_datasphere.client.model import JobRef
        from airflow_provider_datasphere.client.monitoring.logs import LogTail

        try:
            client = await self._connect(CONNECT_TIMEOUT)
        except Exception as error:
            # Raised, it would end the wait without a message about the job.
            reason = str(error) if isinstance(error, DataSphereError) else f"{type(error).__name__}: {error}"
            ref = JobRef(self.job_id, self.link)
            return {"status": "lost", "message": f"Can't monitor job {ref}: {reason.rstrip('.')}. {ref.cancel_hint}"}
        tail = LogTail(self.job_id) if self.stream_logs else None
        working = self._start_and_watch(client, tail)
        try:
            # Without a limit there is no need for a task of its own: there may be ten thousand.
            if self.deadline is None:
                return await working
            return await within(working, max(0.0, self.deadline - time.time()))
        except asyncio.TimeoutError:
            if self.queued is not None or not await self._has_ended(client):
                return await self._time_out()
            # For the rest of its log; whatever comes of that, the job has ended.
            with suppress(asyncio.TimeoutError, JobLostError):
                await within(self._watch(client, tail), FINAL_POLL_TIMEOUT)
            return {"status": "ended"}
        except JobNotStartedError as error:
            cancelled = await self._cancel(START_TIMED_OUT, action="cancel")
            return {"status": "start_timeout", "cancelled": cancelled, "message": str(error)}
        except JobLostError as error:
            return {"status": "lost", "message": str(error)}

    async def _start_and_watch(self, client: AsyncDataSphereClient, tail: LogTail | None) -> dict[str, Any]:
        """Start the job if it waits for room, and wait until it is over.

        :param tail: ``None``: its log isn't read.

        :raises JobNotStartedError: ``start_timeout`` has passed.
        :raises JobLostError: it can't be monitored any more.
        """
        from airflow_provider_datasphere.client.errors import (
            DataSphereError,
            JobCancelledError,
            JobInfrastructureError,
            JobNotStartedError,
        )

        if self.queued is not None:
            try:
                await self._start(client, self.queued)
            except JobNotStartedError:
                raise
            except DataSphereError as error:
                # Otherwise the task does what it would have done on the worker.
                final = isinstance(error, (JobCancelledError, JobInfrastructureError))
                return {
                    "status": "not_started",
                    "error": type(error).__name__ if final else None,
                    "message": str(error),
                }
        if not self.wait_for_completion:
            return {"status": "started"}
        if self.stream_logs:
            self.log.info(
                "Streaming the log of job %s from its beginning; a restarted triggerer starts over here.", self.job_id
            )
        await self._watch(client, tail)
        return {"status": "ended"}

    async def _start(self, client: AsyncDataSphereClient, reason: str) -> None:
        from airflow_provider_datasphere.client.submission.start_clock import StartClock
        from airflow_provider_datasphere.client.submission.start_queue import QueuedJob

        began = self.first_execute_at or time.time()
        clock = StartClock(None if self.start_deadline is None else self.start_deadline - began, began)
        job = QueuedJob(self.job_id, clock, self._is_waited_for, self.log)
        handle = await client.start(job, self.project_id or "", reason)
        self.queued, self.operation_id = None, handle.operation_id
        self.first_execute_at, self.accepted_at = handle.first_execute_at, handle.accepted_at
        self.log.info("Started job %s.", self.job_id)

    async def _is_waited_for(self) -> bool:
        """Whether the task still waits for this job: a triggerer that stood still may have missed that it ended."""
        if getattr(self, "task_instance", None) is None:
            return True
        seen = await self._query_task(STATE_QUERY_TIMEOUT)
        return seen.answered and seen.state == "deferred" and seen.job_id in (None, self.job_id)

    def _watch(self, client: AsyncDataSphereClient, tail: LogTail | None) -> Coroutine[Any, Any, object]:
        """Wait until the job is over."""
        from airflow_provider_datasphere.client.model import JobHandle

        return client.watch(
            JobHandle(self.job_id, self.operation_id),
            poll_interval=self.poll_interval,
            start_deadline=self.start_deadline,
            link=self.link,
            emit=self._emit if self.stream_logs else None,
            tail=tail,
            logger=self.log,
        )

    def _emit(self, line: LogLine) -> None:
        self.log.info("%s", line)

    async def _time_out(self) -> dict[str, Any]:
        """End the job as ``on_kill_action`` says, after the deadline; return what the event says of it."""
        state = "waiting for room" if self.queued is not None else "running"
        self.log.warning("Deadline exceeded; job %s is still %s.", self.job_id, state)
        cancelled = await self._cancel(TIMED_OUT_WHILE_DEFERRED)
        message = "it was cancelled" if cancelled else f"on_kill_action is {self.on_kill_action!r}"
        return {"status": "timeout", "cancelled": cancelled, "message": message}

    async def _connect(self, seconds: float) -> AsyncDataSphereClient:
        """Read the connection and return the client; retry while the connection can't be read.

        :param seconds: how long to retry.
        :raises Exception: the connection still can't be read, or one of its fields is wrong.
        """
        from airflow_provider_datasphere.client.errors import JobRequestError

        give_up_at, pause = time.monotonic() + seconds, 0.5
        while True:
            try:
                self._client = await DataSphereHook(self.datasphere_conn_id).aget_client()
                return self._client
            except JobRequestError:
                raise
            except Exception as error:
                if time.monotonic() + pause > give_up_at:
                    raise
                self.log.warning(
                    "Failed to read connection %s: %s: %s; retrying.",
                    self.datasphere_conn_id,
                    type(error).__name__,
                    error,
                )
            await asyncio.sleep(pause)
            pause = min(10.0, 2 * pause)

    async def _has_ended(self, client: AsyncDataSphereClient) -> bool:
        """Whether the job has ended by the deadline after all: between two polls, or while no triggerer ran."""
        from airflow_provider_datasphere.client.errors import DataSphereError
        from airflow_provider_datasphere.client.model import TERMINAL

        try:
            job = await within(client.get(self.job_id), FINAL_POLL_TIMEOUT)
        except (DataSphereError, asyncio.TimeoutError):
            return False
        return job.status in TERMINAL

    @property
    def _runs_inline(self) -> bool:
        """Whether the process that deferred the task also runs the trigger, as ``dag.test()`` does."""
        return self.job_id in deferred_here and getattr(self, "task_instance", None) is None

    async def _cancel_unless_monitored(self) -> None:
        """Cancel the job unless another triggerer or a later try monitors it, by the task's state in Airflow."""
        if self.on_kill_action == "keep" and self.queued is None:
            return
        seen = await self._query_task(STATE_QUERY_TIMEOUT)
        if seen.answered:
            await self._keep_or_cancel(seen)
            return
        self.log.warning(
            "The trigger of job %s was stopped, and Airflow didn't return the task's state. The job keeps running "
            "while the state is queried again, for up to %.0f minutes. If somebody has ended the task, cancel the job "
            "on its page or with CancelJobOperator(job_id=%r).",
            self.job_id,
            STATE_QUERY_TIMEOUT_AFTER_KILL / 60,
            self.job_id,
        )
        later = asyncio.ensure_future(self._keep_or_cancel_later())
        _pending_decisions.add(later)
        later.add_done_callback(_pending_decisions.discard)

    async def _keep_or_cancel_later(self) -> None:
        """Decide after the trigger has ended: many tasks killed at once, or a busy Airflow, need longer than it has."""
        seen = await self._query_task(STATE_QUERY_TIMEOUT_AFTER_KILL)
        if seen.answered:
            await self._keep_or_cancel(seen)

    async def _keep_or_cancel(self, seen: task_end.TaskStatus) -> None:
        ended_by = task_end.who_ended(seen, self.job_id, deferred=True)
        if task_end.keeps_job_running(ended_by, has_successor=True):
            self.log.info(
                "Keeping job %s running: the task is %s, and the job is monitored elsewhere.", self.job_id, seen.state
            )
        else:
            await self._cancel(TASK_ENDED_WHILE_DEFERRED)

    async def _query_task(self, seconds: float) -> task_end.TaskStatus:
        """Query the task's state from Airflow; retry after errors, for ``seconds``."""
        give_up_at = time.monotonic() + seconds
        while (left := give_up_at - time.monotonic()) > 0:
            try:
                return await within(self._task_seen(), left)
            except Exception as error:
                self.log.debug("Failed to query the task's state: %s: %s", type(error).__name__, error)
            await asyncio.sleep(min(STATE_QUERY_RETRY_PAUSE, max(0.0, give_up_at - time.monotonic())))
        return task_end.TaskStatus(answered=False)

    async def _task_seen(self) -> task_end.TaskStatus:
        state = await atask_state(self.task_instance)
        # Read only where it matters: a person may end a thousand tasks at once.
        job_id = await atask_xcom(self.task_instance, "job_id") if state in task_end.WAITED_FOR else None
        return task_end.TaskStatus(True, state, job_id if isinstance(job_id, str) else None)

    async def _cancel(self, reason: str, *, action: cancellation.OnKillAction | None = None) -> bool:
        """Cancel the job, or delete one that waits for room. Never raises: the task is ending anyway.

        :param action: default: ``on_kill_action``.
        :return: whether the job is cancelled or over.
        """
        action = action or self.on_kill_action
        started = self.queued is None
        if action == "keep" and started:
            return False
        # Its status is read first: another triggerer may have seen its end by now.
        ending = cancellation.JobCancellation(
            self.job_id, action, reason, self.log, started=started, known_running=False
        )
        try:
            client = self._client or await self._connect(CONNECT_TIMEOUT_ON_KILL)
        except Exception as error:
            ending.warn(error)
            return False
        return await cancellation.cancel_job_async(client, ending)


#: The jobs whose wait this process has deferred.
deferred_here: set[str] = set()
#: Tasks that outlive their trigger; the event loop itself keeps only weak references.
_pending_decisions: set[asyncio.Future[None]] = set()
