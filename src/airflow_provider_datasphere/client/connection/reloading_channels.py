"""Channels that reload a connection that was changed while they are in use.

A wait for a job may last for days; its token or key may be replaced meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import grpc

from airflow_provider_datasphere.client.connection.channels import AsyncChannels, Channels
from airflow_provider_datasphere.client.connection.token_source import TokenSource

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from airflow_provider_datasphere.client.connection.grpc_channel import Service
    from airflow_provider_datasphere.client.connection.settings import Settings

log = logging.getLogger(__name__)

_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_CHANGED = "The connection has changed; continuing as %s."


class ReloadingChannels(Channels):
    """Synchronous calls that reload the connection when the service refuses them.

    :param settings: endpoints and credential to begin with.
    :param refresh_settings: returns the connection's current settings; None: unknown. Called for each refused call: it
        should limit its own rate, and must not raise.
    """

    def __init__(self, settings: Settings, refresh_settings: Callable[[], Settings | None]) -> None:
        self._refresh_settings = refresh_settings
        self._swapping = threading.Lock()
        super().__init__(settings)

    def unary(
        self, service: Service, method: str, request: Any, *, timeout: float, idempotency_key: str | None = None
    ) -> Any:
        """Same as :meth:`Channels.unary`; a refused call is retried if the connection has changed.

        A refused call has had no effect.
        """
        used = self.settings
        try:
            return super().unary(service, method, request, timeout=timeout, idempotency_key=idempotency_key)
        except grpc.RpcError as error:
            if error.code() not in _REFUSALS or not self._has_changed(used):
                raise
        return super().unary(service, method, request, timeout=timeout, idempotency_key=idempotency_key)

    def close(self) -> None:
        if self._pid == os.getpid():
            for pool in self._retired:
                for channel in pool.take_all():
                    channel.close()
        super().close()

    def _has_changed(self, used: Settings) -> bool:
        """Return whether the settings differ from those that a call was made with."""
        if self.settings is not used:
            return True  # another thread has reloaded them
        fresh = self._refresh_settings()
        if fresh is None or fresh.fingerprint == used.fingerprint:
            return False
        log.info(_CHANGED, fresh.description)
        with self._swapping:
            # Not closed: other threads may be using it.
            self._retired.append(self._pool)
            self.settings, self.tokens, self._pool = fresh, TokenSource.shared(fresh), self._open_pool(fresh)
        return True

    def _reset_after_fork(self) -> None:
        # As the pool: a child must not clean them up.
        self._abandoned_too = getattr(self, "_retired", [])
        self._retired: list[Any] = []
        self._swapping = threading.Lock()
        super()._reset_after_fork()


class AsyncReloadingChannels(AsyncChannels):
    """Same as :class:`ReloadingChannels`, for coroutines, on the event loop's shared channels.

    :param refresh_settings: awaited.
    """

    def __init__(self, settings: Settings, refresh_settings: Callable[[], Awaitable[Settings | None]]) -> None:
        super().__init__(settings)
        self._refresh_settings = refresh_settings
        self._current = AsyncChannels.shared(settings)

    async def unary(
        self, service: Service, method: str, request: Any, *, timeout: float, idempotency_key: str | None = None
    ) -> Any:
        """Same as :meth:`ReloadingChannels.unary`."""
        used = self._current
        try:
            return await used.unary(service, method, request, timeout=timeout, idempotency_key=idempotency_key)
        except grpc.RpcError as error:
            if error.code() not in _REFUSALS or not await self._has_changed(used):
                raise
        return await self._current.unary(service, method, request, timeout=timeout, idempotency_key=idempotency_key)

    async def stream(
        self, service: Service, method: str, request: Any, *, timeout: float | None = None
    ) -> AsyncIterator[Any]:
        """Same as :meth:`AsyncChannels.stream`. The caller restarts a refused one."""
        messages = self._current.stream(service, method, request, timeout=timeout)
        async with aclosing(cast("AsyncGenerator[Any, None]", messages)) as stream:
            async for message in stream:
                yield message

    async def close(self) -> None:
        await self._current.close()

    async def _has_changed(self, used: AsyncChannels) -> bool:
        if self._current is not used:
            return True
        fresh = await self._refresh_settings()
        if fresh is None or fresh.fingerprint == used.settings.fingerprint:
            return False
        if self._current is used:
            log.info(_CHANGED, fresh.description)
            self.settings, self._current = fresh, AsyncChannels.shared(fresh)
            self.tokens = self._current.tokens
        return True
