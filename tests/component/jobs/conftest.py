"""A fresh emulator for each test, and who watches its jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

pytest.register_assert_rewrite("watching")

from airflow_provider_datasphere.client.connection.settings import Settings  # noqa: E402
from airflow_provider_datasphere.client.sync_client import DataSphereClient  # noqa: E402
from datasphere_emulator import Emulator  # noqa: E402
from watching import Watcher  # noqa: E402


@pytest.fixture
def emulator(datasphere_emulator_factory: Callable[..., Emulator]) -> Emulator:
    """A fresh emulator without TLS."""
    return datasphere_emulator_factory(tls=False)


@pytest.fixture
def client(emulator: Emulator) -> Iterator[DataSphereClient]:
    """A client of the emulator."""
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()))
    yield client
    client.interrupt()
    client.close()


@pytest.fixture(params=[False, True], ids=["threads", "asyncio"])
def watcher(request: pytest.FixtureRequest, emulator: Emulator) -> Watcher:
    """Waits for jobs of the emulator, in both ways."""
    return Watcher(emulator, request.param, logging.getLogger("watcher"))
