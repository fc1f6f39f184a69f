"""One HTTP request and its answer under a watchdog thread: a stop or a stall ends whatever it waits for.

A socket timeout can't do that: each received byte restarts it, and no other thread can end it.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class Stop(Protocol):
        """Stops a transfer when set; a ``threading.Event``, for example."""

        def is_set(self) -> bool: ...


#: A stop is noticed within this time.
STOP_SECONDS = 0.5
#: An upload stalls when less than this gets through within the time allowed for a step.
UPLOAD_STEP_BYTES = 64 * 1024
# The watchdog's thread ends after this many idle rounds.
_IDLE_ROUNDS = 4

_current = threading.local()


class Exchange:
    """One request, from connecting to the end of its answer.

    :param stop: aborts it when set.
    :param step_timeout: seconds for one step: until the answer's headers, each chunk of its body, or each
        :data:`UPLOAD_STEP_BYTES` of an upload.
    :param answer_timeout: seconds from the last byte of an upload until its answer; None: a request without a body.
    :ivar reason: why it was aborted; empty: it wasn't.
    """

    def __init__(self, stop: Stop, step_timeout: float, answer_timeout: float | None = None) -> None:
        self._stop, self._step_timeout, self._answer_timeout = stop, step_timeout, answer_timeout
        self.uploads = answer_timeout is not None
        self.reason = ""
        self._limit = step_timeout
        self._since: float | None = time.monotonic()
        self._connection: Any = None
        self._socket: socket.socket | None = None
        self._handed_over = self._through = 0
        self._body_sent = self._answer_awaited = False

    @property
    def stopped(self) -> bool:
        """Whether the stop is set."""
        return self._stop.is_set()

    @contextmanager
    def requesting(self) -> Iterator[None]:
        """Connections that this thread uses in this context belong to this exchange."""
        _current.exchange = self
        try:
            yield
        finally:
            _current.exchange = None

    def restart_upload(self) -> None:
        """Start the upload again, after a redirect."""
        self.uploads, self._limit, self._since = True, self._step_timeout, time.monotonic()
        self._handed_over = self._through = 0
        self._body_sent = self._answer_awaited = False

    def step(self) -> None:
        """Start the time of the next step of the answer."""
        self.uploads = False
        self._limit, self._since = self._step_timeout, time.monotonic()

    def rest(self) -> None:
        """Stop the time: nothing is awaited."""
        self._since = None

    def handed_over(self, size: int) -> None:
        """Count bytes of an upload that are about to be sent."""
        self._handed_over += size

    def check(self) -> None:
        """Abort it if it was stopped or is too slow. Called by the watchdog."""
        if self.stopped:
            self.abort("it was stopped")
            return
        if self.uploads:
            self._measure_upload()
        since = self._since
        if since is not None and time.monotonic() - since > self._limit:
            self.abort("too slow")

    def _measure_upload(self) -> None:
        # The kernel's send buffer may hold minutes of data on a slow line.
        unsent = _unsent_bytes(self._socket)
        through = self._handed_over - unsent
        if self._body_sent and not unsent:
            if not self._answer_awaited:
                self._answer_awaited = True
                self._limit, self._since = self._answer_timeout or self._step_timeout, time.monotonic()
        elif through - self._through >= UPLOAD_STEP_BYTES:
            self._through, self._since = through, time.monotonic()

    def abort(self, reason: str) -> None:
        """End what another thread waits for in this exchange."""
        self.reason = reason
        for sock in (self._socket, getattr(self._connection, "sock", None)):
            if sock is not None:
                with suppress(OSError):
                    # Not SSLSocket's method: after that the other thread would continue without TLS.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    # Called by the connections ------------------------------------------------------------------------------------

    @contextmanager
    def connecting(self, connection: Any) -> Iterator[None]:
        """Context of making the connection; :meth:`connected` gives its TCP socket."""
        self._connection = connection
        try:
            yield
        finally:
            raw, self._socket = self._socket, None
            if raw is not None:
                raw.close()

    def connected(self, sock: socket.socket) -> None:
        """Note the TCP socket. TLS detaches the socket object; hence a duplicate."""
        self._socket = sock.dup()

    def sending(self, connection: Any) -> None:
        """Note that the request is sent on this connection."""
        self._connection, self._socket = connection, connection.sock

    def awaiting_answer(self) -> None:
        """Note that the whole request was passed to the kernel."""
        self._body_sent = True


class _Watched:
    """A urllib3 connection that reports to its thread's exchange."""

    def _new_conn(self) -> Any:
        sock = super()._new_conn()  # type: ignore[misc]
        _exchange().connected(sock)
        return sock

    def connect(self) -> Any:
        with _exchange().connecting(self):
            return super().connect()  # type: ignore[misc]

    def request(self, *args: Any, **kwargs: Any) -> Any:
        connection: Any = self
        if connection.sock is None:
            connection.connect()
        _exchange().sending(connection)
        if _exchange().uploads:
            # urllib3 would apply the connect timeout to each block of the body.
            connection.timeout = None
            connection.sock.settimeout(None)
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:
        _exchange().awaiting_answer()
        return super().getresponse(*args, **kwargs)  # type: ignore[misc]


class _Http(_Watched, HTTPConnection):
    pass


class _Https(_Watched, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


#: For ``PoolManager.pool_classes_by_scheme``.
WATCHED_POOLS = {"http": _HttpPool, "https": _HttpsPool}


class Watchdog:
    """Checks exchanges regularly, in a thread that runs while there are any. Thread-safe.

    :param interval: seconds between checks.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._exchanges: set[Exchange] = set()
        self._thread: Thread | None = None
        self._closed = Event()
        self._lock = Lock()

    @contextmanager
    def watching(self, exchange: Exchange) -> Iterator[None]:
        """Check ``exchange`` during this context."""
        with self._lock:
            self._exchanges.add(exchange)
            if self._thread is None:
                self._closed.clear()
                thread = Thread(target=self._watch, name="datasphere-http", daemon=True)
                thread.start()
                self._thread = thread
        try:
            yield
        finally:
            with self._lock:
                self._exchanges.discard(exchange)

    def close(self) -> None:
        """End the thread as soon as no exchange is left."""
        self._closed.set()

    def _watch(self) -> None:
        idle = 0
        while True:
            if self._closed.is_set():
                time.sleep(min(self._interval, 0.05))
            else:
                self._closed.wait(self._interval)
            with self._lock:
                exchanges = list(self._exchanges)
                idle = 0 if exchanges else idle + 1
                if idle > _IDLE_ROUNDS or (self._closed.is_set() and not exchanges):
                    self._thread = None
                    return
            for exchange in exchanges:
                exchange.check()


def _exchange() -> Exchange:
    exchange: Exchange | None = getattr(_current, "exchange", None)
    if exchange is None:
        raise RuntimeError("these connections are used within Exchange.requesting()")
    return exchange


def _unsent_bytes(sock: socket.socket | None) -> int:
    """Return how many sent bytes the peer hasn't acknowledged yet; 0 where the system can't tell."""
    if sys.platform != "linux" or sock is None:
        return 0
    import fcntl
    import termios

    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    except (OSError, ValueError):
        return 0
