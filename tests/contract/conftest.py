"""Starts all scenarios of the session at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.register_assert_rewrite("contract.cli_stage", "contract.watching", "harness.sdk_venv")

from airflow_provider_datasphere.client.jobs import DataSphereClient  # noqa: E402
from airflow_provider_datasphere.client.settings import Settings  # noqa: E402
from contract.cli_stage import Stage, theatre  # noqa: E402
from contract.watching import Watcher  # noqa: E402
from datasphere_emulator import Emulator  # noqa: E402


@pytest.fixture(scope="session")
def scenarios(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Callable[[Stage], None], Future[None]]]:
    """Scenario -> its run, of those that the session has collected."""
    functions = [getattr(getattr(item, "function", None), "scenario", None) for item in request.session.items]
    with theatre(tmp_path_factory.mktemp("cli")) as stage:
        chosen = [function for function in functions if function is not None]
        with ThreadPoolExecutor(len(chosen)) as pool:
            yield {function: pool.submit(function, stage(function.__name__)) for function in chosen}


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
