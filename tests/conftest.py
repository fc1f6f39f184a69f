"""Fixtures for all tests: a running Airflow 3 and Airflow 2, started when a module's test first asks."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from harness import NEWEST, SUPPORTED, RealAirflow

NEWEST_2 = "2.11.2"


@pytest.fixture(autouse=True)
def no_file_systems_of_other_tests() -> None:
    """Airflow and fsspec keep file systems by the name of their connection, which is another one in each test."""
    if "airflow.sdk.io.store" in sys.modules:
        sys.modules["airflow.sdk.io.store"]._STORE_CACHE.clear()
    if "airflow_provider_datasphere.filesystems.datasphere" in sys.modules:
        sys.modules["airflow_provider_datasphere.filesystems.datasphere"].DataSphereFileSystem.clear_instance_cache()


# For a module, not for the session: an Airflow that nobody uses still takes a fifth of a machine with two cores, and
# what runs beside it then waits for its turn.


@pytest.fixture(scope="module")
def airflow3() -> Iterator[RealAirflow]:
    """The development environment's Airflow, the newest 3.x, with all components; shared by the module's tests."""
    with RealAirflow() as airflow:
        yield airflow


@pytest.fixture(scope="module")
def airflow2() -> Iterator[RealAirflow]:
    """Airflow 2.11 with all components; shared by the module's tests."""
    with RealAirflow(NEWEST_2) as airflow:
        yield airflow


@pytest.fixture(scope="module", params=[NEWEST, NEWEST_2], ids=["airflow3", "airflow2"])
def any_airflow(request: pytest.FixtureRequest) -> Iterator[RealAirflow]:
    """Each of the two in turn, never both at once."""
    with RealAirflow(request.param) as airflow:
        yield airflow


@pytest.fixture(scope="module", params=SUPPORTED)
def each_airflow(request: pytest.FixtureRequest) -> Iterator[RealAirflow]:
    """All that are supported in turn."""
    with RealAirflow(request.param) as airflow:
        yield airflow
