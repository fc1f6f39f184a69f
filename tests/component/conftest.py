"""What many of these modules share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from datasphere_emulator import Emulator

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def running() -> Iterator[Emulator]:
    """One emulator for a module."""
    with Emulator(tls=False) as emulator:
        yield emulator


@pytest.fixture
def emulator(running: Emulator) -> Iterator[Emulator]:
    """The same, without what other tests left in the journal and of faults."""
    running.journal.clear()
    yield running
    running.faults.clear()
