"""Cancel a job reliably: read it first where that is needed, retry transient errors, delete it if it never ran.

:meth:`JobCancellation.steps` decides; :func:`cancel_job` and :func:`cancel_job_async` make its calls.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.async_client import AsyncDataSphereClient
    from airflow_provider_datasphere.client.connection.settings import Settings
    from airflow_provider_datasphere.client.logger import LoggerLike

OnKillAction = Literal["cancel", "graceful", "keep"]
ON_KILL_ACTIONS: tuple[OnKillAction, ...] = ("cancel", "graceful", "keep")

#: How long a dying task tries to cancel its job, seconds.
CANCEL_SECONDS = 3.0
#: How long a trigger tries to cancel its job, seconds. Airflow 3.3 gives its ``on_kill`` 30 seconds for all it does.
TRIGGER_SECONDS = 16.0
#: First and longest pause before a failed call is made again, seconds.
_PAUSE, _LONGEST_PAUSE = 0.3, 5.0


@dataclass(frozen=True)
class JobCancellation:
    """A request to end the job of a task that ends.

    :param action: what ``on_kill_action`` says. With ``"keep"`` a job that hasn't been started is deleted all the same:
        nobody would ever start it.
    :param started: whether Execute has answered. If not, the job may start at any moment, or never.
    :param known_running: whether the job was running a moment ago; if not, it is read first.
    """

    job_id: str
    action: OnKillAction
    reason: str
    log: LoggerLike
    started: bool = True
    known_running: bool = True

    def warn(self, error: Exception) -> None:
        """Log the error that the job couldn't be cancelled for."""
        self.log.warning(
            "Job %s couldn't be cancelled; it may still be running and costing money: %s", self.job_id, error
        )

    def _log_kept(self) -> None:
        self.log.info("Job %s keeps running (on_kill_action='keep').", self.job_id)

    def steps(self, seconds: float) -> Generator[tuple[str, Any], Any, bool]:
        """Yield the calls to make as (name, argument); takes their results, or the :class:`DataSphereError` of each.

        :param seconds: how long to retry after transient errors.
        :return: whether the job doesn't keep running.
        :raises DataSphereError: it couldn't be cancelled.
        """
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        from airflow_provider_datasphere.client.errors import DataSphereError
        from airflow_provider_datasphere.client.model import TERMINAL, status_name
        from airflow_provider_datasphere.client.rpc import TRANSIENT, error_code

        if self.action == "keep" and self.started:
            self._log_kept()
            return False
        deadline, pause = time.monotonic() + seconds, _PAUSE
        graceful = self.action == "graceful"
        read_first = graceful or not self.started or not self.known_running
        delete = not self.started
        while True:
            what = "get"
            try:
                if read_first:
                    job = yield "get", None
                    if job.status in TERMINAL or job.status == jobs_pb2.CANCELLING:
                        self.log.info("Job %s is %s already; nothing to cancel.", self.job_id, status_name(job.status))
                        return True
                    if job.status == jobs_pb2.CREATING and delete:
                        # Nothing is running yet, and an Execute in flight finds no job any more.
                        what = "delete"
                        yield "delete", None
                        self.log.info("Deleted job %s, which hadn't been started: %s.", self.job_id, self.reason)
                        return True
                    if self.action == "keep":
                        self._log_kept()
                        return False
                    graceful = graceful and supports_graceful_shutdown(job, self.log)
                what = "cancel"
                yield "cancel", graceful
                how = " gracefully" if graceful else ""
                self.log.info("Cancelled job %s%s: %s.", self.job_id, how, self.reason)
                return True
            except DataSphereError as error:
                code = error_code(error)
                late = time.monotonic() + pause >= deadline
                # A job that was just cloned may not be there yet, and would be left behind.
                unseen = code == "NOT_FOUND" and not self.started
                if code == "NOT_FOUND" and (late or not unseen):
                    self.log.info("Job %s no longer exists; nothing to cancel.", self.job_id)
                    return True
                refused = code == "FAILED_PRECONDITION"
                if not (refused or unseen or code in TRANSIENT) or late:
                    raise
                if refused:
                    # The job has just ended, or hasn't begun, or has just begun; its status tells which.
                    read_first, delete = True, what == "cancel"
            yield "pause", pause
            pause = min(2 * pause, _LONGEST_PAUSE)


def cancel_job_on_new_connection(
    settings: Settings, cancellation: JobCancellation, seconds: float = CANCEL_SECONDS
) -> bool:
    """End a job on a new connection (the task's own may be locked by the thread that was interrupted).

    :param seconds: how long to retry after transient errors.
    :return: whether the job doesn't keep running. Never raises: the task is ending anyway.
    """
    from airflow_provider_datasphere.client.api import JobApi
    from airflow_provider_datasphere.client.errors import DataSphereError

    client = JobApi(settings, retry_timeout=0.0)
    try:
        return cancel_job(client, cancellation, seconds)
    except DataSphereError as error:
        cancellation.warn(error)
        return False
    finally:
        client.close()


def cancel_job(client: JobApi, cancellation: JobCancellation, seconds: float) -> bool:
    """End a job.

    :param seconds: how long to retry after transient errors.
    :return: whether the job doesn't keep running.
    :raises DataSphereError: it couldn't be cancelled.
    """
    from airflow_provider_datasphere.client.errors import DataSphereError

    steps = cancellation.steps(seconds)
    try:
        step = next(steps)
        while True:
            try:
                answer = _call(client, cancellation, *step)
            except DataSphereError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        return bool(end.value)


def _call(client: JobApi, cancellation: JobCancellation, what: str, argument: Any) -> Any:
    if what == "pause":
        return client.pause(argument)
    if what == "cancel":
        return client.cancel(cancellation.job_id, graceful=argument, reason=cancellation.reason, timeout=CANCEL_SECONDS)
    return client.get(cancellation.job_id) if what == "get" else client.delete(cancellation.job_id)


async def cancel_job_async(client: AsyncDataSphereClient, cancellation: JobCancellation) -> bool:
    """End a job from a coroutine, on the channels that all triggers share. Never raises, as a trigger is ending."""
    import asyncio

    from airflow_provider_datasphere.client.errors import DataSphereError

    steps = cancellation.steps(TRIGGER_SECONDS)
    try:
        what, argument = next(steps)
        while True:
            try:
                answer: Any = None
                if what == "pause":
                    await asyncio.sleep(argument)
                elif what == "cancel":
                    await client.cancel(cancellation.job_id, graceful=argument, reason=cancellation.reason)
                elif what == "get":
                    answer = await client.get(cancellation.job_id)
                else:
                    await client.delete(cancellation.job_id)
            except DataSphereError as error:
                what, argument = steps.throw(error)
            else:
                what, argument = steps.send(answer)
    except StopIteration as end:
        return bool(end.value)
    except DataSphereError as error:
        cancellation.warn(error)
        return False


def supports_graceful_shutdown(job: Any, log: LoggerLike) -> bool:
    """Return whether a graceful cancel ends this job for sure: the service kills it after the job's own timeout."""
    parameters = job.job_parameters
    if parameters.HasField("graceful_shutdown_parameters") and parameters.graceful_shutdown_parameters.HasField(
        "timeout"
    ):
        return True
    log.info(
        "Job %s has no graceful-shutdown section with a timeout in its configuration, so it is cancelled at once.",
        job.id,
    )
    return False
