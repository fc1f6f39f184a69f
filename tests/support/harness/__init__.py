"""Real Airflows for tests: environments per version, components to kill one by one, one API over 2.11 and 3.x.

Start with :class:`RealAirflow` (or the fixtures ``airflow3`` and ``airflow2`` of ``tests/conftest.py``) when the
scheduler, the triggerer or a person's click matters, with :class:`Cluster` when it matters that there are several of
them, and with :func:`run_dags` when only the tasks' own work does.
"""

from __future__ import annotations

from harness.airflow import RealAirflow
from harness.api import ApiError
from harness.cluster import Cluster, missing_programs
from harness.dagtest import DagResult, run_dags
from harness.ports import free_port
from harness.venvs import NEWEST, SUPPORTED, AirflowVenv, airflow_venv, find_python, uv

__all__ = [
    "NEWEST",
    "SUPPORTED",
    "AirflowVenv",
    "ApiError",
    "Cluster",
    "DagResult",
    "RealAirflow",
    "airflow_venv",
    "find_python",
    "free_port",
    "missing_programs",
    "run_dags",
    "uv",
]
