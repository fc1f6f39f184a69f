"""Tests without I/O: a socket fails them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

FORBIDDEN = frozenset({"socket.bind", "socket.connect", "socket.getaddrinfo"})

_armed = False


def _refuse(event: str, _arguments: tuple[object, ...]) -> None:
    if _armed and event in FORBIDDEN:
        raise AssertionError(f"{event} in a unit test: move it to tests/component")


sys.addaudithook(_refuse)  # for the life of the process; armed during unit tests alone


@pytest.fixture(autouse=True)
def no_io() -> Iterator[None]:
    global _armed
    _armed = True
    yield
    _armed = False
