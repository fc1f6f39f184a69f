"""Pytest fixtures: an emulator per test.

The plugin is loaded in every pytest run of an environment that has this package, so it imports nothing heavy before a
test asks for a fixture.
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
    """Makes started emulators with the arguments of ``Emulator``; they are closed after the test."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.fail("The emulator needs a further package: pip install 'airflow-provider-datasphere[emulator]'")
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
    """A fresh emulator with TLS."""
    return datasphere_emulator_factory()
