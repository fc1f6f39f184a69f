"""Running Airflows, shared by the modules of a session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from harness import NEWEST, SUPPORTED, RealAirflow

NEWEST_2 = "2.11.2"


class Pool:
    """One Airflow at a time, kept while the next module wants the same version.

    An idle Airflow takes a fifth of a machine with two cores, and what runs beside it then waits for its turn.
    """

    def __init__(self) -> None:
        self._airflow: RealAirflow | None = None

    def get(self, version: str) -> RealAirflow:
        """A healthy Airflow of this version, without the DAGs of other modules."""
        if self._airflow is not None:
            with contextlib.suppress(RuntimeError, TimeoutError):
                if self._airflow.version == version and self._airflow.components.all_alive():
                    self._airflow.wait_healthy(30)
                    self._airflow.remove_dags()
                    return self._airflow
            self.close()
        airflow = RealAirflow(version)
        airflow.__enter__()
        self._airflow = airflow
        return airflow

    def close(self) -> None:
        if self._airflow is not None:
            self._airflow.close()
            self._airflow = None


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def airflow3(pool: Pool) -> RealAirflow:
    """The development environment's Airflow, the newest 3.x, with all components."""
    return pool.get(NEWEST)


@pytest.fixture(scope="module")
def airflow2(pool: Pool) -> RealAirflow:
    """Airflow 2.11 with all components."""
    return pool.get(NEWEST_2)


@pytest.fixture(
    scope="module",
    params=[pytest.param(NEWEST, id="airflow3"), pytest.param(NEWEST_2, id="airflow2")],
)
def any_airflow(request: pytest.FixtureRequest, pool: Pool) -> RealAirflow:
    """Each of the two in turn."""
    return pool.get(request.param)


@pytest.fixture(scope="module", params=SUPPORTED)
def each_airflow(request: pytest.FixtureRequest, pool: Pool) -> RealAirflow:
    """All that are supported in turn."""
    return pool.get(request.param)
