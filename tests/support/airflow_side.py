"""What Airflow gives a task, as far as our operators, sensors and triggers look at it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from datasphere_emulator import Emulator

#: The same for all tries of a task.
RUN_START = datetime.now(timezone.utc)


class TaskInstance:
    """A task instance that keeps its XComs, in the order in which they were pushed."""

    def __init__(self, task_id: str = "task", *, try_number: int = 1, max_tries: int = 0, map_index: int = -1) -> None:
        self.dag_id, self.run_id, self.task_id = "dag", "run", task_id
        self.try_number, self.max_tries, self.map_index = try_number, max_tries, map_index
        self.start_date = datetime.now(timezone.utc)
        self.xcoms: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        json.dumps(value)  # plain JSON, or every backend but Airflow's own breaks
        self.xcoms[key] = value

    def xcom_pull(self, task_ids: str, key: str, map_indexes: int) -> Any:
        assert (task_ids, map_indexes) == (self.task_id, self.map_index)
        return self.xcoms.get(key)

    def get_first_reschedule_date(self, _context: Any) -> None:
        """This is the first poke."""


def context_of(task: Any, **fields: Any) -> Any:
    """A context for ``task.execute``."""
    ti = TaskInstance(task.task_id, **fields)
    return {"ti": ti, "task": task, "dag_run": SimpleNamespace(start_date=RUN_START), "run_id": ti.run_id}


def connect(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, conn_id: str = "datasphere_default") -> None:
    """Make the connection, as an environment variable."""
    value = {"conn_type": "datasphere", "extra": emulator.connection_extra()}
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(value))
