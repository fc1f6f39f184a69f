"""Decide who ended a task, and whether its job keeps running.

If a person ends the task, or a timeout, the job is cancelled; if a machine dies, it isn't, as long as a later try
reattaches to it. :func:`who_ended` tells them apart, for operators and triggers.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.logger import LoggerLike


#: Timeout of the query for the state of a task that is being killed, seconds. It has about five seconds in all.
QUERY_SECONDS = 1.0
#: The same where no answer means that the job is kept, so that no time is needed to cancel it, seconds.
QUERY_SECONDS_BEFORE_KEEPING = 3.0
#: How long query and cancel may take together, seconds.
KILL_SECONDS = 4.6

#: States in which Airflow runs the task, or will: this try, a newer one, or one to come.
_UNFINISHED = frozenset({"running", "deferred", "up_for_retry", "up_for_reschedule", "scheduled", "queued"})
#: Those of them in which a trigger waits for the job, or a later try will.
WAITED_FOR = frozenset({"deferred", "up_for_retry", "up_for_reschedule"})


class EndedBy(enum.Enum):
    """Who ended a try, or the wait of a trigger."""

    PERSON = "somebody marked or cleared the task"
    TIMEOUT = "the task timed out"
    MACHINE = "a machine or process went away"
    NEWER_TRY = "a newer try has taken over, with a job of its own"


@dataclass(frozen=True)
class TaskStatus:
    """A task instance's state in Airflow right now.

    :param answered: whether Airflow answered.
    :param state: its state; ``None`` for none.
    :param job_id: the job of the newest try (XCom ``job_id``); ``None`` while there is none, or it wasn't asked for.
    """

    answered: bool
    state: str | None = None
    job_id: str | None = None


def who_ended(seen: TaskStatus, job_id: str | None, *, deferred: bool, timed_out: bool = False) -> EndedBy:
    """Return who ended a try or a trigger.

    :param job_id: the try's own job.
    :param deferred: whether a trigger asks, whose task was deferred; else a process that ran the task.
    :param timed_out: whether a timeout is known to have ended it.
    """
    if timed_out:
        return EndedBy.TIMEOUT
    if not seen.answered:
        # A person's act reaches a task by an answer of Airflow's. No answer is an outage.
        return EndedBy.MACHINE
    if seen.state not in _UNFINISHED:
        return EndedBy.PERSON
    if job_id is not None and seen.job_id not in (None, job_id):
        return EndedBy.PERSON if deferred else EndedBy.NEWER_TRY
    if not deferred or seen.state in WAITED_FOR:
        # Another triggerer continues the wait, or a later try reattaches to the job.
        return EndedBy.MACHINE
    # The task is scheduled or running again: it was cleared, or resumed by another triggerer's event. In that case its
    # job is over, which is read before a Cancel.
    return EndedBy.PERSON


def keeps_job_running(ended_by: EndedBy, *, has_successor: bool) -> bool:
    """Return whether the job is kept.

    :param has_successor: whether a later try will reattach to it, or, for a trigger, another triggerer will watch it.
    """
    return ended_by is EndedBy.MACHINE and has_successor


def query_task(question: Callable[[], TaskStatus], seconds: float, log: LoggerLike) -> TaskStatus:
    """Return the task's state, read in a thread of its own: the interrupted main thread may hold Airflow's channel.

    :param seconds: timeout.
    """
    answer: list[TaskStatus] = []

    def run() -> None:
        try:
            answer.append(question())
        except Exception as error:
            log.debug("Reading the task's state from Airflow failed: %s", error)

    thread = threading.Thread(target=run, name="datasphere-query-task", daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else TaskStatus(answered=False)
