"""The decision table: what to do about the jobs that earlier tries of a task's generation left."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.model import TERMINAL


class Action(enum.Enum):
    """What to do; the value is for the log."""

    CREATE = "creating a new job"
    ATTACH = "attaching to it"
    ADOPT = "adopting its result"
    EXECUTE = "starting it"
    RESUBMIT = "uploading its inputs again and starting it"
    WAIT_AND_CREATE = "waiting until it ends"


_RUNNING = 1
_PREFERENCE = {jobs_pb2.CREATING: 2, jobs_pb2.CANCELLING: 3}


@dataclass(frozen=True)
class Decision:
    """What to do, and with which job.

    :param job: the job that decides; ``None`` where there is none.
    :param ordinal: number of the generation's jobs that ended and can't be adopted; gives the next job another
        idempotency key.
    :param unexecuted: the ids of all that were created and never executed.
    """

    job: jobs_pb2.Job | None
    action: Action
    ordinal: int
    unexecuted: tuple[str, ...] = ()


def choose_action(
    jobs: Sequence[jobs_pb2.Job],
    *,
    adoptable: Callable[[jobs_pb2.Job], bool],
    uploaded: str | None = None,
    has_inputs: bool = False,
) -> Decision:
    """Look up the decision table. A result comes before a running job, and that before one that never ran.

    :param adoptable: whether an ended job's result is this task's.
    :param uploaded: id of the job whose inputs are known to be uploaded.
    :param has_inputs: whether the request uploads anything.
    """
    usable = [job for job in jobs if job.status not in TERMINAL or adoptable(job)]
    ordinal = len(jobs) - len(usable)
    unexecuted = tuple(job.id for job in usable if job.status == jobs_pb2.CREATING)
    preferred = sorted(usable, key=lambda job: 0 if job.status in TERMINAL else _PREFERENCE.get(job.status, _RUNNING))
    if not preferred:
        return Decision(jobs[-1] if jobs else None, Action.CREATE, ordinal)
    job = preferred[0]
    if job.status in TERMINAL:
        return Decision(job, Action.ADOPT, ordinal, unexecuted)
    if job.status == jobs_pb2.CANCELLING:
        return Decision(job, Action.WAIT_AND_CREATE, ordinal)
    if job.status != jobs_pb2.CREATING:
        return Decision(job, Action.ATTACH, ordinal, unexecuted)
    if not has_inputs:
        return Decision(job, Action.EXECUTE, ordinal, unexecuted)
    job = next((ready for ready in preferred if ready.id == uploaded), job)
    return Decision(job, Action.EXECUTE if job.id == uploaded else Action.RESUBMIT, ordinal, unexecuted)
