"""Who is ending a task, and what that means for its job.

A person who ends the task wants the job ended; a dying worker doesn't, as long as a later try picks the job up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.aio import AsyncDataSphereClient
    from airflow_provider_datasphere.client.jobs import DataSphereClient
    from airflow_provider_datasphere.client.reporting import Reporter
    from airflow_provider_datasphere.client.settings import Settings

OnKillAction = Literal["cancel", "graceful", "keep"]
ON_KILL_ACTIONS: tuple[OnKillAction, ...] = ("cancel", "graceful", "keep")

#: How long Airflow may take to tell a dying task its state, seconds. A killed task has about five in all.
ASK_SECONDS = 1.0
#: How long a dying task tries to cancel its job, seconds.
CANCEL_SECONDS = 3.0
#: The same for a trigger, which nobody hurries so much (Airflow 3.3 gives ``on_kill`` 30 seconds).
TRIGGER_SECONDS = 20.0

#: First and longest pause before a failed call is made again, seconds.
_PAUSE, _LONGEST_PAUSE = 0.3, 5.0

#: States in which Airflow itself still counts on the task: this try, a newer one, or one to come.
_ALIVE = frozenset({"running", "deferred", "up_for_retry", "up_for_reschedule", "scheduled", "queued"})


def ask_state(ask: Callable[[], str | None], log: Reporter) -> tuple[bool, str | None]:
    """The task's state, asked in a thread of its own: the interrupted main thread may hold Airflow's channel.

    :return: whether an answer came, and the answer.
    """
    answer: list[str | None] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            log.debug("Airflow didn't tell the task's state: %s", error)

    thread = threading.Thread(target=run, name="datasphere-ask-state", daemon=True)
    thread.start()
    thread.join(ASK_SECONDS)
    return bool(answer), answer[0] if answer else None


def goes_on(answered: bool, state: str | None, *, picked_up: bool) -> bool:
    """Whether a killed task's job is left running.

    :param answered: whether Airflow told the state; without an answer a person is assumed.
    :param picked_up: whether a later try would attach to the job.
    """
    return answered and state in _ALIVE and picked_up


@dataclass(frozen=True)
class Ending:
    """The end of a job, for a task that ends.

    :param action: what ``on_kill_action`` says.
    :param started: whether Execute has answered. Otherwise the job may start at any moment, or never.
    :param surely_running: whether the job ran a moment ago; otherwise it is looked at first.
    """

    job_id: str
    action: OnKillAction
    reason: str
    log: Reporter
    started: bool = True
    surely_running: bool = True

    def warn(self, error: Exception) -> None:
        """Tell of the error that the job couldn't be ended for."""
        self.log.warning("Job %s couldn't be cancelled and may go on costing money: %s", self.job_id, error)

    def steps(self, seconds: float) -> Generator[tuple[str, Any], Any, bool]:
        """The calls to make, as (what, argument); wants their results, or the :class:`DataSphereError` of each.

        :param seconds: how long to go on after errors that pass.
        :return: whether the job doesn't go on.
        :raises DataSphereError: it couldn't be ended.
        """
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        from airflow_provider_datasphere.client.errors import DataSphereError
        from airflow_provider_datasphere.client.outcome import TERMINAL, status_name
        from airflow_provider_datasphere.client.service import error_code
        from airflow_provider_datasphere.client.waiting import TRANSIENT

        if self.action == "keep":
            self.log.info("Job %s goes on (on_kill_action='keep').", self.job_id)
            return False
        deadline, pause = time.monotonic() + seconds, _PAUSE
        graceful = self.action == "graceful"
        look = graceful or not self.started or not self.surely_running
        delete = not self.started
        while True:
            what = "get"
            try:
                if look:
                    job = yield "get", None
                    if job.status in TERMINAL or job.status == jobs_pb2.CANCELLING:
                        self.log.info("Job %s needs no cancel, it is %s.", self.job_id, status_name(job.status))
                        return True
                    if job.status == jobs_pb2.CREATING and delete:
                        # Nothing runs yet, and an Execute that is under way finds no job any more.
                        what = "delete"
                        yield "delete", None
                        self.log.info("Deleted job %s, which hadn't been started: %s.", self.job_id, self.reason)
                        return True
                    graceful = graceful and shuts_down_gracefully(job, self.log)
                what = "cancel"
                yield "cancel", graceful
                how = " gracefully" if graceful else ""
                self.log.info("Cancelled job %s%s: %s.", self.job_id, how, self.reason)
                return True
            except DataSphereError as error:
                code = error_code(error)
                if code == "NOT_FOUND":
                    self.log.info("Job %s needs no cancel, it is gone.", self.job_id)
                    return True
                refused = code == "FAILED_PRECONDITION"
                if not (refused or code in TRANSIENT) or time.monotonic() + pause >= deadline:
                    raise
                if refused:
                    # The job has just ended, or hasn't begun, or has just begun; looking tells which.
                    look, delete = True, what == "cancel"
            yield "pause", pause
            pause = min(2 * pause, _LONGEST_PAUSE)


def cancel_job(settings: Settings, ending: Ending) -> bool:
    """End a job on fresh channels (the task's own may be locked by the thread that was interrupted).

    :return: whether the job doesn't go on. Never raises: the task is ending anyway.
    """
    from airflow_provider_datasphere.client.errors import DataSphereError
    from airflow_provider_datasphere.client.jobs import DataSphereClient

    client = DataSphereClient(settings, patience=0.0)
    try:
        return end_job(client, ending, CANCEL_SECONDS)
    except DataSphereError as error:
        ending.warn(error)
        return False
    finally:
        client.close()


def end_job(client: DataSphereClient, ending: Ending, seconds: float) -> bool:
    """End a job.

    :param seconds: how long to go on after errors that pass.
    :return: whether the job doesn't go on.
    :raises DataSphereError: it couldn't be ended.
    """
    from airflow_provider_datasphere.client.errors import DataSphereError

    steps = ending.steps(seconds)
    try:
        step = next(steps)
        while True:
            try:
                answer = _make(client, ending, *step)
            except DataSphereError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        return bool(end.value)


def _make(client: DataSphereClient, ending: Ending, what: str, argument: Any) -> Any:
    if what == "pause":
        return client.pause(argument)
    if what == "cancel":
        return client.cancel(ending.job_id, graceful=argument, reason=ending.reason, timeout=CANCEL_SECONDS)
    return client.get(ending.job_id) if what == "get" else client.delete(ending.job_id)


async def acancel_job(client: AsyncDataSphereClient, ending: Ending) -> bool:
    """The same from a coroutine, on the channels that all triggers share."""
    import asyncio

    from airflow_provider_datasphere.client.errors import DataSphereError

    steps = ending.steps(TRIGGER_SECONDS)
    try:
        what, argument = next(steps)
        while True:
            try:
                answer: Any = None
                if what == "pause":
                    await asyncio.sleep(argument)
                elif what == "cancel":
                    await client.cancel(ending.job_id, graceful=argument, reason=ending.reason)
                elif what == "get":
                    answer = await client.get(ending.job_id)
                else:
                    await client.delete(ending.job_id)
            except DataSphereError as error:
                what, argument = steps.throw(error)
            else:
                what, argument = steps.send(answer)
    except StopIteration as end:
        return bool(end.value)
    except DataSphereError as error:
        ending.warn(error)
        return False


def shuts_down_gracefully(job: Any, log: Reporter) -> bool:
    """Whether a graceful cancel of this job ends by itself: the service kills it after the job's own timeout."""
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
