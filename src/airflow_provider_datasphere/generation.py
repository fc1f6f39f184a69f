"""A task's generation, from Airflow's context: the unit that may run only one job.

Automatic retries and crashes stay in one generation; a person who clears the task begins a new one. ``max_tries`` is
the number that behaves so on every supported Airflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.key import Key

if TYPE_CHECKING:
    from airflow_provider_datasphere.compat import Context

STORE_KEY = "datasphere_job"


def key_of(context: Context) -> Key:
    """The key of the running task's generation."""
    ti: Any = context["ti"]
    dag_run = context.get("dag_run")
    return Key(
        parts=(ti.dag_id, ti.run_id, ti.task_id, _map_index(ti), ti.max_tries),
        label=f"{ti.dag_id}.{ti.task_id} {ti.run_id}",
        retries=int(context["task"].retries or 0),
        since=getattr(dag_run, "start_date", None),
    )


def has_a_try_left(context: Context) -> bool:
    """Whether Airflow will try the task again when this try fails."""
    ti: Any = context["ti"]
    return bool(ti.try_number <= ti.max_tries)


class StateStore:
    """The task state store of Airflow 3.3+, as the ledger wants it."""

    def __init__(self, accessor: Any) -> None:
        self._accessor = accessor

    @classmethod
    def of(cls, context: Context) -> StateStore | None:
        """``None`` where Airflow has no such store."""
        accessor = context.get("task_state_store")
        return cls(accessor) if accessor is not None else None

    def get(self) -> dict[str, Any] | None:
        entry = self._accessor.get(STORE_KEY)
        return entry if isinstance(entry, dict) else None

    def set(self, entry: dict[str, Any]) -> None:
        self._accessor.set(STORE_KEY, entry)


def _map_index(ti: Any) -> int:
    return -1 if ti.map_index is None else int(ti.map_index)
