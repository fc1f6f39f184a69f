"""The deferred wait for a job, behind the operator and the sensor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_datasphere import killing
from airflow_provider_datasphere.compat import AIRFLOW_V_3_3_PLUS, atask_state
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.aio import AsyncDataSphereClient

#: How long Airflow may take to tell the state of a task whose trigger was cancelled, seconds.
ASK_SECONDS = 20.0
#: How long the last look at a job takes at most when the task's time is up, and so long the rest of its log, seconds.
LAST_LOOK_SECONDS = 2.0
#: How long after each other the waits of a process begin at least, seconds: a triggerer that starts takes on a thousand
#: at once, and each begins with a connection to look up, a log to open and a poll.
PACE_SECONDS = 0.003


class DataSphereJobTrigger(BaseTrigger):
    """Fires when a job is over, is out of sight, or the task's time is up.

    All triggers of a process share one connection to the service for polls, a few for logs, and one token source per
    Airflow connection.

    :param job_id: the job.
    :param operation_id: its Execute operation; ``None``: the job itself is polled.
    :param datasphere_conn_id: the connection; looked up in the triggerer.
    :param poll_interval: longest pause between two polls, seconds.
    :param stream_logs: bring the job's log into the task's log.
    :param log_offset: where the log begins: 0, or an offset that the service gave.
    :param deadline: when the task's time is up (an operator's ``execution_timeout``, a sensor's ``timeout``), epoch
        seconds; the trigger then ends the job as ``on_kill_action`` says, and fires.
    :param on_kill_action: what becomes of the job when a person or the deadline ends the task; ``"keep"`` for a wait
        that only looks on.
    :param link: the job's page, for messages.
    """

    def __init__(
        self,
        job_id: str,
        operation_id: str | None = None,
        datasphere_conn_id: str = DataSphereHook.default_conn_name,
        poll_interval: float = 10.0,
        stream_logs: bool = False,
        log_offset: int = 0,
        deadline: float | None = None,
        on_kill_action: killing.OnKillAction = "keep",
        link: str | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.job_id = job_id
        self.operation_id = operation_id
        self.datasphere_conn_id = datasphere_conn_id
        self.poll_interval = poll_interval
        self.stream_logs = stream_logs
        self.log_offset = log_offset
        self.deadline = deadline
        self.on_kill_action = on_kill_action
        self.link = link
        self._over = False

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "job_id": self.job_id,
                "operation_id": self.operation_id,
                "datasphere_conn_id": self.datasphere_conn_id,
                "poll_interval": self.poll_interval,
                "stream_logs": self.stream_logs,
                "log_offset": self.log_offset,
                "deadline": self.deadline,
                "on_kill_action": self.on_kill_action,
                "link": self.link,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        try:
            event = await self._wait()
        except asyncio.CancelledError:
            if not AIRFLOW_V_3_3_PLUS:
                # The triggerer stops, hands the trigger to another one, or a person ended the task: only Airflow knows.
                await asyncio.shield(self._cancel_unless_still_deferred())
            raise
        self._over = True
        yield TriggerEvent(event)

    async def on_kill(self) -> None:
        """A person ended the deferred task (Airflow 3.3+ says so)."""
        if not self._over:
            await self._cancel("the task was ended while deferred")

    async def _wait(self) -> dict[str, Any]:
        await _turn_to_begin()
        from airflow_provider_datasphere.client.errors import JobLostError
        from airflow_provider_datasphere.client.logs import LogTail
        from airflow_provider_datasphere.client.outcome import JobHandle

        event: dict[str, Any] = {"job_id": self.job_id, "operation_id": self.operation_id, "link": self.link}
        if (task_instance := getattr(self, "task_instance", None)) is not None:
            event["try_number"] = task_instance.try_number
        client = await DataSphereHook(self.datasphere_conn_id).aget_client()
        if self.stream_logs:
            self.log.info(
                "The log of job %s follows from %s. A restarted triggerer begins here again.",
                self.job_id,
                f"offset {self.log_offset}" if self.log_offset else "its beginning",
            )
        tail = LogTail(offset=self.log_offset)

        async def watch(seconds: float | None) -> None:
            watching = client.watch(
                JobHandle(self.job_id, self.operation_id),
                poll_interval=self.poll_interval,
                link=self.link,
                emit=(lambda line: self.log.info("%s", line)) if self.stream_logs else None,
                tail=tail,
                logger=self.log,
            )
            await asyncio.wait_for(watching, seconds)

        try:
            await watch(None if self.deadline is None else max(0.0, self.deadline - time.time()))
        except asyncio.TimeoutError:
            if await self._has_ended(client):
                with suppress(asyncio.TimeoutError):
                    await watch(LAST_LOOK_SECONDS)
                return {**event, "status": "ended"}
            self.log.warning("The task's time is over; job %s is still running.", self.job_id)
            cancelled = await self._cancel("execution_timeout passed while the task was deferred")
            what = "it was cancelled" if cancelled else f"on_kill_action is {self.on_kill_action!r}"
            return {**event, "status": "timeout", "cancelled": cancelled, "message": what}
        except JobLostError as error:
            return {**event, "status": "lost", "message": str(error)}
        return {**event, "status": "ended"}

    async def _has_ended(self, client: AsyncDataSphereClient) -> bool:
        """Whether the job has ended after all: between two polls, or while no triggerer ran."""
        from airflow_provider_datasphere.client.errors import DataSphereError
        from airflow_provider_datasphere.client.outcome import TERMINAL

        try:
            job = await asyncio.wait_for(client.get(self.job_id), LAST_LOOK_SECONDS)
        except (DataSphereError, asyncio.TimeoutError):
            return False
        return job.status in TERMINAL

    async def _cancel_unless_still_deferred(self) -> None:
        if self.on_kill_action == "keep":
            return
        try:
            state = await asyncio.wait_for(asyncio.shield(atask_state(self.task_instance)), ASK_SECONDS)
        except Exception as error:
            # The triggerer is most likely stopping: another one goes on with this trigger.
            self.log.debug("Airflow didn't tell the task's state: %s", error)
        else:
            if state != "deferred":
                await self._cancel("the task was ended while deferred")

    async def _cancel(self, reason: str) -> bool:
        """Whether the job doesn't go on. Never raises: the task is ending anyway."""
        if self.on_kill_action == "keep":
            return False
        try:
            client = await DataSphereHook(self.datasphere_conn_id).aget_client()
        except Exception as error:
            self.log.warning("Job %s couldn't be cancelled and may go on costing money: %s", self.job_id, error)
            return False
        ending = killing.Ending(self.job_id, self.on_kill_action, f"Airflow: {reason}", self.log)
        return await killing.acancel_job(client, ending)


_next_begins = 0.0


async def _turn_to_begin() -> None:
    """Wait until the triggers that came before have begun; a lone one begins at once."""
    global _next_begins
    now = time.monotonic()
    begins = max(now, _next_begins)
    _next_begins = begins + PACE_SECONDS
    await asyncio.sleep(begins - now)
