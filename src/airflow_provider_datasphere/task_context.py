"""Checks of the context that Airflow passes to ``execute``: is a task running, and which operator's?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_provider_datasphere.exceptions import JobRequestError

if TYPE_CHECKING:
    from airflow_provider_datasphere.compat import BaseOperator, Context


def require_task(operator: BaseOperator, context: Context) -> None:
    """Raise JobRequestError if ``execute`` is called outside a running task.

    :raises JobRequestError: there is no task instance.
    """
    if "ti" not in context:
        raise JobRequestError(
            f"{type(operator).__name__} must run in a task. In a test use dag.test(); without Airflow's tasks use "
            "DataSphereHook().get_conn(), which has fork_job() and get_job()."
        )


def is_nested(operator: BaseOperator, context: Context) -> bool:
    """Return whether ``execute`` was called by the code of another task, such as a function with ``@task``.

    Airflow would resume that task, not this operator, after a deferral or a reschedule. A task with an
    ``execute_complete`` of its own is assumed to pass the event on.
    """
    task = context.get("task")
    return not (
        task is None
        or task is operator
        or hasattr(task, "execute_complete")
        or getattr(task, "operator_class", None) is type(operator)
    )


def can_defer(operator: BaseOperator, context: Context) -> bool:
    """Return whether this task can be deferred or rescheduled; log a warning if it can't."""
    if not is_nested(operator, context):
        return True
    operator.log.warning(
        "%s %r is executed inside the task %r, which Airflow would resume in its place: waiting on the worker instead "
        "of giving the slot back.",
        type(operator).__name__,
        operator.task_id,
        context["task"].task_id,
    )
    return False
