"""Fixtures for all tests: one running Airflow 3 and one Airflow 2 per session, started when a test first asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness import RealAirflow

NEWEST_2 = "2.11.2"


@pytest.fixture(scope="session")
def airflow3() -> Iterator[RealAirflow]:
    """The development environment's Airflow, the newest 3.x, with all components; shared by the session's tests."""
    with RealAirflow() as airflow:
        yield airflow


@pytest.fixture(scope="session")
def airflow2() -> Iterator[RealAirflow]:
    """Airflow 2.11 with all components; shared by the session's tests."""
    with RealAirflow(NEWEST_2) as airflow:
        yield airflow


@pytest.fixture(scope="session", params=["airflow3", "airflow2"])
def any_airflow(request: pytest.FixtureRequest) -> RealAirflow:
    """Each of the two in turn."""
    airflow: RealAirflow = request.getfixturevalue(request.param)
    return airflow
