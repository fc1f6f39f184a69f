"""Channel pools: one connection per address for all unary calls, and others for log streams.

A gateway may limit the streams of a connection: with streams apart, logs can't starve the polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from airflow_provider_datasphere.client.connection.endpoints import (
    Endpoints,
    find_endpoints,
    known_endpoints,
)
from airflow_provider_datasphere.client.connection.grpc_channel import (
    OWN_CONNECTION,
    call_metadata,
    open_aio_channel,
    open_channel,
    stub,
    tls_problem,
)
from airflow_provider_datasphere.client.connection.token_source import TokenSource
from airflow_provider_datasphere.client.rpc import READ_DEADLINE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from airflow_provider_datasphere.client.connection.grpc_channel import Service
    from airflow_provider_datasphere.client.connection.settings import Settings

#: Log streams per connection. Servers commonly allow 100.
STREAMS_PER_CONNECTION = 50
#: Polls under way at once on one connection, of all waits: below the streams that servers commonly allow. The others
#: wait for their turn, whether they are due because a triggerer has started or because the event loop was held up.
POLLS_AT_ONCE = 80
#: How many Airflow connections' channels an event loop keeps open while they are idle.
_IDLE_CHANNELS = 16

_Channel = TypeVar("_Channel")


class _Pool(Generic[_Channel]):
    """The channels of one process (and event loop): opened on demand, streams on as few as possible."""

    def __init__(self, opener: Callable[..., _Channel], settings: Settings) -> None:
        self._opener = opener
        self._settings = settings
        self._lock = threading.Lock()
        self._unary: dict[str, _Channel] = {}
        self._stubs: dict[tuple[Service, str], Any] = {}
        # Per address: channel, its stubs (each takes a millisecond to create), and a ticket for each of its streams.
        self._streams: dict[str, list[tuple[_Channel, dict[Service, Any], list[object]]]] = {}

    def stub(self, service: Service, target: str) -> Any:
        """Return the service's stub on the connection for unary calls."""
        found = self._stubs.get((service, target))
        if found is not None:
            return found
        with self._lock:
            channel = self._unary.get(target)
            if channel is None:
                channel = self._unary[target] = self._opener(self._settings, target)
            found = self._stubs[service, target] = stub(service, channel)
            return found

    def stream_stub(self, service: Service, target: str) -> tuple[Any, Callable[[], None]]:
        """Return the service's stub on a connection that allows another stream, and a function to call at its end."""
        ticket = object()
        with self._lock:
            lines = self._streams.setdefault(target, [])
            line = next((line for line in lines if len(line[2]) < STREAMS_PER_CONNECTION), None)
            if line is None:
                line = (self._opener(self._settings, target, OWN_CONNECTION), {}, [])
                lines.append(line)
            channel, stubs, tickets = line
            tickets.append(ticket)
            if service not in stubs:
                stubs[service] = stub(service, channel)

        def release() -> None:
            with self._lock, contextlib.suppress(ValueError):
                tickets.remove(ticket)

        return stubs[service], release

    def take_all(self) -> list[_Channel]:
        """Return all channels and empty the pool."""
        with self._lock:
            channels = [*self._unary.values(), *(line[0] for lines in self._streams.values() for line in lines)]
            self._unary, self._stubs, self._streams = {}, {}, {}
            return channels


class Channels:
    """Synchronous calls. Thread-safe; connects on the first call, and again after ``fork``.

    :param settings: endpoints and credential. All channels of a process with equal settings share one token.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokens = TokenSource.shared(settings)
        self._reset_after_fork()

    def unary(
        self, service: Service, method: str, request: Any, *, timeout: float, idempotency_key: str | None = None
    ) -> Any:
        """Make a call. If the service refuses the token, retry once with a new one.

        :param timeout: the call's deadline, seconds.
        :param idempotency_key: sent as ``idempotency-key``.
        :return: the response message.
        :raises CredentialError: no token (also a :class:`grpc.RpcError`, UNAVAILABLE or UNAUTHENTICATED).
        :raises grpc.RpcError: the call failed.
        """
        self._check_process()
        target = find_endpoints(self.settings, timeout=timeout).of(service)
        token = self.tokens.token(timeout=timeout)
        call = getattr(self._pool.stub(service, target), method)
        try:
            return call(request, timeout=timeout, metadata=call_metadata(token, idempotency_key))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                raise tls_problem(error, self.settings, target) or error from None
        token = self.tokens.token(refused=token, timeout=timeout)
        return call(request, timeout=timeout, metadata=call_metadata(token, idempotency_key))

    def stream(self, service: Service, method: str, request: Any, *, timeout: float | None = None) -> Any:
        """Start a streaming call, on a connection for streams.

        :param timeout: deadline of the whole stream, seconds; default: none.
        :return: the gRPC call: iterate over it; ``cancel()`` ends it. Errors are raised while iterating.
        :raises CredentialError: no token.
        """
        self._check_process()
        target = find_endpoints(self.settings).of(service)
        token = self.tokens.token()
        streams, release = self._pool.stream_stub(service, target)
        try:
            call = getattr(streams, method)(request, timeout=timeout, metadata=call_metadata(token))
        except BaseException:
            release()
            raise

        def ended() -> None:
            release()
            if call.code() == grpc.StatusCode.UNAUTHENTICATED:
                self.tokens.forget(token)

        if not call.add_callback(ended):
            ended()
        return call

    def close(self) -> None:
        """Close all connections; a later call opens new ones."""
        if self._pid == os.getpid():
            for channel in self._pool.take_all():
                channel.close()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            self._reset_after_fork()

    def _reset_after_fork(self) -> None:
        # A forked child must not even clean up its parent's channels: their threads and sockets are the parent's.
        self._abandoned = getattr(self, "_pool", None)
        self._pid = os.getpid()
        self._pool = self._open_pool(self.settings)

    def _open_pool(self, settings: Settings) -> _Pool[grpc.Channel]:
        return _Pool(open_channel, settings)


class AsyncChannels:
    """Calls from coroutines of one event loop; create it with :meth:`shared`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokens = TokenSource.shared(settings)
        self._pool: _Pool[grpc.aio.Channel] = _Pool(open_aio_channel, settings)
        #: To be held during a poll; other calls, such as Cancel, don't wait for their turn.
        self.polls = asyncio.Semaphore(POLLS_AT_ONCE)

    @classmethod
    def shared(cls, settings: Settings) -> AsyncChannels:
        """Return the running loop's channels for these settings, the same for all its coroutines."""
        loop = asyncio.get_running_loop()
        with _loops_lock:
            for key, (known, _) in list(_loops.items()):
                # Those of a parent process stay: deleting them would run gRPC's clean-up in the child.
                if known.is_closed() and key[0] == os.getpid():
                    del _loops[key]
            _, kept = _loops.setdefault((os.getpid(), id(loop)), (loop, OrderedDict()))
            channels = kept.pop(settings.fingerprint, None) or cls(settings)
            kept[settings.fingerprint] = channels
            if len(kept) > _IDLE_CHANNELS:
                # Its users keep the oldest one alive; gRPC closes it when there are none.
                kept.popitem(last=False)
            return channels

    async def unary(
        self, service: Service, method: str, request: Any, *, timeout: float, idempotency_key: str | None = None
    ) -> Any:
        """Same as :meth:`Channels.unary`."""
        target = (known_endpoints(self.settings) or await self._endpoints(timeout)).of(service)
        token = self.tokens.current() or await self.tokens.atoken(timeout=timeout)
        call = getattr(self._pool.stub(service, target), method)
        try:
            return await call(request, timeout=timeout, metadata=call_metadata(token, idempotency_key))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                raise tls_problem(error, self.settings, target) or error from None
        token = await self.tokens.atoken(refused=token, timeout=timeout)
        return await call(request, timeout=timeout, metadata=call_metadata(token, idempotency_key))

    async def stream(
        self, service: Service, method: str, request: Any, *, timeout: float | None = None
    ) -> AsyncIterator[Any]:
        """Iterate over the messages of a streaming call; closing the iterator (``aclose``) cancels the call.

        :param timeout: deadline of the whole stream, seconds; default: none.
        :raises CredentialError: no token.
        :raises grpc.RpcError: the stream broke.
        """
        target = (await self._endpoints(READ_DEADLINE_SECONDS)).of(service)
        token = await self.tokens.atoken()
        streams, release = self._pool.stream_stub(service, target)
        call = None
        try:
            call = getattr(streams, method)(request, timeout=timeout, metadata=call_metadata(token))
            async for message in call:
                yield message
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                self.tokens.forget(token)
            raise
        finally:
            if call is not None:
                call.cancel()
            release()

    async def close(self) -> None:
        """Close all connections; a later call opens new ones."""
        for channel in self._pool.take_all():
            await channel.close(None)

    async def _endpoints(self, timeout: float) -> Endpoints:
        known = known_endpoints(self.settings)
        if known is not None:
            return known
        return await asyncio.to_thread(find_endpoints, self.settings, timeout=timeout)


_loops: dict[tuple[int, int], tuple[asyncio.AbstractEventLoop, OrderedDict[str, AsyncChannels]]] = {}
_loops_lock = threading.Lock()


def _after_fork() -> None:
    global _loops_lock
    _loops_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
