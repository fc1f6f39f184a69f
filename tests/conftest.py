"""Fixtures for all tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

MASKING = "airflow_provider_datasphere.hooks._masking"


@pytest.fixture(autouse=True)
def no_file_systems_of_other_tests() -> None:
    """Airflow and fsspec keep file systems by the name of their connection, which is another one in each test."""
    if "airflow.sdk.io.store" in sys.modules:
        sys.modules["airflow.sdk.io.store"]._STORE_CACHE.clear()
    if "airflow_provider_datasphere.filesystems.datasphere" in sys.modules:
        sys.modules["airflow_provider_datasphere.filesystems.datasphere"].DataSphereFileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests() -> Iterator[None]:
    """Airflow compiles all secrets that it masks into one pattern, which a thousand tests would make a slow one."""
    yield
    if MASKING in sys.modules:
        masking = sys.modules[MASKING]
        masking._registered.clear()
        for name in masking._MASKERS:
            if name in sys.modules:
                sys.modules[name]._secrets_masker().reset_masker()


@pytest.hookimpl(optionalhook=True)
def pytest_configure() -> None:
    """Let Ctrl-C reach the tests that send it: a shell starts what it runs in the background with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadgroup":
        return None
    from groups import GroupScheduling

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from groups import place_of

    items.sort(key=lambda item: place_of(item.nodeid))
