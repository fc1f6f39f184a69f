"""Pytest fixtures: an emulator per test.

Pytest loads the plugin in each run of an environment with this package, so heavy imports wait until a test uses a
fixture.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from datasphere_emulator.emulator import Emulator


@pytest.fixture
def datasphere_emulator_factory() -> Iterator[Callable[..., Emulator]]:
    """Factory of started emulators with the arguments of ``Emulator``; closes them after the test."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.fail("The emulator needs another package: pip install 'airflow-provider-datasphere[emulator]'")
    from datasphere_emulator.emulator import Emulator

    emulators: list[Emulator] = []

    def make(*arguments: Any, **options: Any) -> Emulator:
        emulator = Emulator(*arguments, **options)
        emulators.append(emulator)
        return emulator.start()

    yield make
    for emulator in reversed(emulators):
        emulator.close()


@pytest.fixture
def datasphere_emulator(datasphere_emulator_factory: Callable[..., Emulator]) -> Emulator:
    """A new emulator with TLS for each test."""
    return datasphere_emulator_factory()
