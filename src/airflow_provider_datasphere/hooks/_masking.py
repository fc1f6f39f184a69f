"""Registration of secrets with Airflow's maskers, from any thread or event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from importlib import import_module
from typing import Any

from airflow_provider_datasphere import compat

#: All maskers of this process; since 3.1 Airflow has one for tasks and one for its services.
_MASKERS: tuple[str, ...]
if compat.AIRFLOW_V_3_1_PLUS:
    _MASKERS = ("airflow.sdk._shared.secrets_masker", "airflow._shared.secrets_masker")
elif compat.AIRFLOW_V_3_0_PLUS:
    _MASKERS = ("airflow.sdk.execution_time.secrets_masker",)
else:
    _MASKERS = ("airflow.utils.log.secrets_masker",)

_pending: set[asyncio.Task[Any]] = set()
#: Registered secrets, as (process id, hash): a thousand triggers of one connection send one message.
_registered: set[tuple[int, int]] = set()


def mask_token(token: str) -> bool:
    """Make Airflow mask a token in logs.

    In Airflow 3 another process writes a task's log, and the channel to it isn't thread-safe (3.0 and 3.1 have no
    lock): only the main thread may use it, or in a triggerer the event loop.

    :return: False if it can't be registered in that process from this thread: call it again from another one.
    """
    mark = (os.getpid(), hash(token))
    if mark in _registered:
        return True
    _mask_here(token)
    if not compat.AIRFLOW_V_3_0_PLUS:
        _registered.add(mark)
        return True
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        if threading.current_thread() is not threading.main_thread():
            return False
        _registered.add(mark)
        with suppress(Exception):
            compat.mask_secret(token)
        return True
    _registered.add(mark)
    # Not awaited: no call should wait for it. Not cancelled: half a message would break the channel.
    task = loop.create_task(_register(token))
    _pending.add(task)
    task.add_done_callback(_pending.discard)
    return True


def mask_secrets(secrets: tuple[str, ...]) -> None:
    """Make Airflow mask a connection's secrets: at least in this process, see :func:`mask_token`."""
    for secret in secrets:
        mask_token(secret)


def _mask_here(secret: str) -> None:
    for name in _MASKERS:
        with suppress(ImportError, AttributeError):
            import_module(name)._secrets_masker().add_mask(secret)


async def _register(secret: str) -> None:
    with suppress(Exception):
        comms = getattr(import_module("airflow.sdk.execution_time.task_runner"), "SUPERVISOR_COMMS", None)
        if comms is not None:
            await comms.asend(import_module("airflow.sdk.execution_time.comms").MaskSecret(value=secret, name=None))
