"""A cluster for all scenes on one version of Airflow, and an emulator for each scene."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_stage import Act
from datasphere_emulator import Emulator
from harness import NEWEST, Cluster, missing_programs


@pytest.fixture(
    scope="session",
    params=[pytest.param(NEWEST, id="airflow3"), pytest.param("2.11.2", id="airflow2", marks=pytest.mark.long)],
)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"{' and '.join(missing)} can't be started here: tests/packages.sh installs them")
    with Cluster(request.param) as cluster:
        yield cluster


@pytest.fixture
def emulator(cluster: Cluster) -> Iterator[Emulator]:
    with Emulator() as emulator:
        # What an earlier scene that failed has left behind.
        cluster.remove_dags()
        with cluster.service_manager():
            pass
        cluster.add_connection("cluster", conn_type="datasphere", extra=emulator.connection_extra())
        yield emulator


@pytest.fixture
def play(cluster: Cluster, emulator: Emulator, tmp_path: Path) -> Callable[[str, str], Act]:
    """Start one run of a DAG with these tasks."""
    return lambda name, tasks: Act(cluster, emulator, name, tasks, tmp_path)
