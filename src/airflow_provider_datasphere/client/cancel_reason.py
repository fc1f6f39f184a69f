"""The reasons that a task gives when it cancels its own job, and how they are recognized later.

A job that its own task has cancelled is followed by a new one; one that somebody else has cancelled is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

_PREFIX = "Airflow: "
#: Why a task cancels its own job; the ``reason`` of RPC ``Cancel``.
TASK_ENDED = f"{_PREFIX}the task was ended"
TASK_ENDED_WHILE_DEFERRED = f"{_PREFIX}the task was ended while deferred"
TIMED_OUT = f"{_PREFIX}execution_timeout passed"
TIMED_OUT_WHILE_DEFERRED = f"{_PREFIX}execution_timeout passed while the task was deferred"
START_TIMED_OUT = f"{_PREFIX}start_timeout passed"
DEFERRAL_ENDED = f"{_PREFIX}Airflow ended the wait for it"
TASK_FAILED = f"{_PREFIX}the task failed"
#: Why :class:`CancelJobOperator` cancels a job: a person wanted it ended.
CANCEL_OPERATOR = f"{_PREFIX}CancelJobOperator"

_OWN = (TASK_ENDED, TIMED_OUT, START_TIMED_OUT, DEFERRAL_ENDED, TASK_FAILED)


def cancelled_by_task(job: jobs_pb2.Job) -> bool:
    """Return whether the job shows that its task cancelled it. That the service shows the reason isn't documented."""
    return any(reason in job.status_details for reason in _OWN)
