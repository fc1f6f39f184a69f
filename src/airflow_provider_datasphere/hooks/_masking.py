"""Telling Airflow which strings are secrets, wherever a token happens to arrive."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from importlib import import_module
from typing import Any

from airflow_provider_datasphere import compat

#: Every masker there is in this process; since 3.1 Airflow has one for tasks and one for its own services.
_MASKERS: tuple[str, ...]
if compat.AIRFLOW_V_3_1_PLUS:
    _MASKERS = ("airflow.sdk._shared.secrets_masker", "airflow._shared.secrets_masker")
elif compat.AIRFLOW_V_3_0_PLUS:
    _MASKERS = ("airflow.sdk.execution_time.secrets_masker",)
else:
    _MASKERS = ("airflow.utils.log.secrets_masker",)

_telling: set[asyncio.Task[Any]] = set()
#: What was told already, as (process id, hash): a thousand triggers of one connection need no thousand messages.
_told: set[tuple[int, int]] = set()


def mask_token(token: str) -> bool:
    """Have Airflow mask a token in logs.

    The process that writes a task's log is another one in Airflow 3, and the line to it isn't safe to use from just
    any thread (there is no lock in 3.0 and 3.1): only the main thread tells it, or in a triggerer the event loop.

    :return: False if that process couldn't be told from here; to be called again from elsewhere.
    """
    mark = (os.getpid(), hash(token))
    if mark in _told:
        return True
    _mask_here(token)
    if not compat.AIRFLOW_V_3_0_PLUS:
        _told.add(mark)
        return True
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        if threading.current_thread() is not threading.main_thread():
            return False
        _told.add(mark)
        with suppress(Exception):
            compat.mask_secret(token)
        return True
    _told.add(mark)
    # Not awaited: a call must not wait for a log's sake. Not cancelled: half a message would break the line for all.
    task = loop.create_task(_tell(token))
    _telling.add(task)
    task.add_done_callback(_telling.discard)
    return True


def mask_secrets(secrets: tuple[str, ...]) -> None:
    """Have Airflow mask a connection's own secrets; what couldn't be told from here stays masked in this process."""
    for secret in secrets:
        mask_token(secret)


def _mask_here(secret: str) -> None:
    for name in _MASKERS:
        with suppress(ImportError, AttributeError):
            import_module(name)._secrets_masker().add_mask(secret)


async def _tell(secret: str) -> None:
    with suppress(Exception):
        comms = getattr(import_module("airflow.sdk.execution_time.task_runner"), "SUPERVISOR_COMMS", None)
        if comms is not None:
            await comms.asend(import_module("airflow.sdk.execution_time.comms").MaskSecret(value=secret, name=None))
