"""A task's generation, from Airflow's context: the unit that may run only one job.

Automatic retries and crashes stay in one generation; a person who clears the task begins a new one. ``max_tries`` is
the number that behaves so on every supported Airflow. Names and that number are the same in two deployments with the
same DAG, and in a run that was deleted and triggered again: the run's start tells those apart. It stays the same for
all automatic tries, also when other tasks of the run are cleared, as long as the run isn't over.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.submission.job_key import Key

if TYPE_CHECKING:
    from airflow_provider_datasphere.compat import BaseOperator, Context

STORE_KEY = "datasphere_job"


def key_of(context: Context, operator: BaseOperator) -> Key:
    """Return the key of the running task's generation, for one operator: a ``@task`` may execute several."""
    ti: Any = context["ti"]
    started = _run_start(context)
    return Key(
        parts=(
            ti.dag_id,
            ti.run_id,
            started.isoformat() if started is not None else None,
            ti.task_id,
            _map_index(ti),
            ti.max_tries,
            *_operator(operator, context),
        ),
        label=f"{ti.dag_id}.{ti.task_id} {ti.run_id}",
        retries=int(context["task"].retries or 0),
        since=started,
    )


def has_retries_left(context: Context) -> bool:
    """Return whether Airflow will retry the task when this try fails."""
    ti: Any = context["ti"]
    return bool(ti.try_number <= ti.max_tries)


def _run_start(context: Context) -> datetime | None:
    started = getattr(context.get("dag_run"), "start_date", None)
    return started if isinstance(started, datetime) else None


class _Executed:
    """The operators that the present try has executed, by the name of their task.

    A ``@task`` may make several of one name, in a loop for example, and makes them in the same order when it is tried
    again. A process runs one try at a time.
    """

    def __init__(self) -> None:
        self._ti: Any = None
        self._operators: dict[str, list[BaseOperator]] = {}

    def number(self, operator: BaseOperator, ti: Any) -> int:
        """Return how many others of its name were executed before it."""
        if ti is not self._ti:
            self._ti, self._operators = ti, {}
        executed = self._operators.setdefault(operator.task_id, [])
        for number, known in enumerate(executed):
            if known is operator:
                return number
        executed.append(operator)
        return len(executed) - 1


_executed = _Executed()


def _operator(operator: BaseOperator, context: Context) -> tuple[str | int, ...]:
    """Return what tells the operators of one task apart; nothing for the task's own."""
    ti: Any = context["ti"]
    number = _executed.number(operator, ti)
    return () if operator.task_id == ti.task_id and not number else (operator.task_id, number)


class StateStore:
    """The task state store of Airflow 3.3+, as a :class:`.job_key.Store`."""

    def __init__(self, accessor: Any, name: str = STORE_KEY) -> None:
        self._accessor = accessor
        self._name = name

    @classmethod
    def of(cls, context: Context, operator: BaseOperator) -> StateStore | None:
        """Return the operator's store; ``None`` where Airflow has none."""
        accessor = context.get("task_state_store")
        name = "-".join(map(str, (STORE_KEY, *_operator(operator, context))))
        return cls(accessor, name) if accessor is not None else None

    def get(self) -> dict[str, Any] | None:
        entry = self._accessor.get(self._name)
        return entry if isinstance(entry, dict) else None

    def set(self, entry: dict[str, Any]) -> None:
        self._accessor.set(self._name, entry)

    def add(self, **news: Any) -> None:
        """Update the entry, if there is one."""
        if (entry := self.get()) is not None:
            self.set({**entry, **news})


def _map_index(ti: Any) -> int:
    return -1 if ti.map_index is None else int(ti.map_index)
