"""Starts all scenarios of the session at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.register_assert_rewrite("cli_stage", "harness.sdk_venv")

from cli_stage import Stage, theatre  # noqa: E402
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
