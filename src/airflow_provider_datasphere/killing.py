"""Who is ending a task, and what that means for its job.

A person who ends the task wants the job ended; a dying worker doesn't, as long as a later try picks the job up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.reporting import Reporter
    from airflow_provider_datasphere.client.settings import Settings

OnKillAction = Literal["cancel", "graceful", "keep"]
ON_KILL_ACTIONS: tuple[OnKillAction, ...] = ("cancel", "graceful", "keep")

#: How long Airflow may take to say what state the task is in, seconds. A killed task has about five in all.
ASK_SECONDS = 1.0
#: Deadline of the Cancel call of a dying task, seconds.
CANCEL_SECONDS = 3.0

#: States in which Airflow itself still counts on the task: this try, a newer one, or one to come.
_ALIVE = frozenset({"running", "deferred", "up_for_retry"})


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


def cancel_job(settings: Settings, job_id: str, action: OnKillAction, *, reason: str, log: Reporter) -> bool:
    """Cancel a job on fresh channels (the task's own may be locked by the thread that was interrupted).

    :return: whether the service took it. Never raises: the task is ending anyway.
    """
    from airflow_provider_datasphere.client.errors import DataSphereError
    from airflow_provider_datasphere.client.jobs import DataSphereClient

    if action == "keep":
        log.info("Job %s goes on (on_kill_action='keep').", job_id)
        return False
    client = DataSphereClient(settings, patience=CANCEL_SECONDS / 2)
    try:
        graceful = action == "graceful" and shuts_down_gracefully(client.get(job_id), log)
        client.cancel(job_id, graceful=graceful, reason=reason, timeout=CANCEL_SECONDS)
    except DataSphereError as error:
        log.warning("Job %s couldn't be cancelled and may go on costing money: %s", job_id, error)
        return False
    finally:
        client.close()
    log.info("Cancelled job %s%s: %s.", job_id, " gracefully" if graceful else "", reason)
    return True


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
