"""A fresh emulator for each test, and a plain client of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from datasphere_emulator import Emulator
from stub_client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def client(emulator: Emulator) -> Client:
    return Client(emulator)
