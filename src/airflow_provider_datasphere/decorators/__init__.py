"""Decorators for TaskFlow.

``from airflow_provider_datasphere.decorators import task`` is Airflow's own ``task``; with Airflow 3 editors and
type checkers know its ``task.datasphere`` there.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "task":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from airflow.sdk import task
    except ImportError:  # Airflow 2
        from airflow.decorators import task
    return task
