"""HTTP client for presigned URLs: connection pool, timeouts, retries, and errors that don't leak the URLs.

A presigned URL is a credential for its file: no message shows more of it than its host.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from contextlib import contextmanager
from importlib.metadata import version
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin

import tenacity
import urllib3
from urllib3.exceptions import HTTPError

from airflow_provider_datasphere.client.connection.certificates import ssl_context
from airflow_provider_datasphere.client.connection.proxy import proxy_for, proxy_headers
from airflow_provider_datasphere.client.http.errors import (
    StoppedError,
    TransferError,
    TransientTransferError,
    host_of,
    status_error,
    transport_error,
)
from airflow_provider_datasphere.client.http.exchange import STOP_SECONDS, WATCHED_POOLS, Exchange, Watchdog
from airflow_provider_datasphere.client.http.url_redaction import hide_urls_in_logs, without_queries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from urllib3.response import BaseHTTPResponse

    from airflow_provider_datasphere.client.http.exchange import Stop

log = logging.getLogger(__name__)

#: How much is read from a socket, hashed and written at once.
CHUNK_BYTES = 256 * 1024
#: The count of failures starts again when at least this much came since the last one.
PROGRESS_BYTES = 1024 * 1024

#: Idle connections that are kept per host.
_IDLE_CONNECTIONS = 32
_REDIRECTS = 3
_REDIRECT_STATUSES = frozenset({301, 302, 307, 308})


class Source(Protocol):
    """The body of an upload."""

    def read(self, size: int = ..., /) -> bytes: ...

    def seek(self, offset: int, /) -> object: ...


class HttpClient:
    """A pool of HTTP(S) connections to the hosts of presigned URLs. Thread-safe.

    Trusts the authorities of :func:`.connection.certificates.ssl_context` and uses the proxies of
    :func:`.connection.proxy.proxy_for`.

    :param root_certificates: path of a PEM file with certificates to trust in addition; default None.
    """

    #: Seconds to establish a connection.
    connect_timeout = 10.0
    #: Seconds without a single byte of an answer.
    read_timeout = 60.0
    #: Seconds within which the headers of an answer, each :data:`CHUNK_BYTES` of its body, and each
    #: :data:`.exchange.UPLOAD_STEP_BYTES` of an upload must get through; slower is a failure (a connection that
    #: drips never runs into :attr:`read_timeout`).
    step_timeout = 60.0
    #: Failures in a row, without progress between them, after which a transfer is given up.
    max_attempts = 6
    #: Seconds to wait after the first failure; doubles, with jitter, up to :attr:`max_backoff`.
    min_backoff = 0.5
    max_backoff = 20.0

    def __init__(self, root_certificates: str | None = None) -> None:
        hide_urls_in_logs()
        self._options: dict[str, Any] = {
            "maxsize": _IDLE_CONNECTIONS,
            "timeout": urllib3.Timeout(connect=self.connect_timeout, read=self.read_timeout),
            # Redirects are followed; everything else is retried here, where the offset is known.
            "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=_REDIRECTS),
            "ssl_context": ssl_context(root_certificates),
        }
        if not version("urllib3").startswith("1."):  # urllib3 1.26 sends bodies in pieces of its own size
            self._options["blocksize"] = CHUNK_BYTES
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._direct = _watched(urllib3.PoolManager(**self._options))
        self._proxied: dict[str, urllib3.PoolManager] = {}
        self._watchdog = Watchdog(min(STOP_SECONDS, self.step_timeout / 4, self.read_timeout / 4))
        self._lock = Lock()

    def close(self) -> None:
        """Close all idle connections, and those in use after their request; the client can be used again."""
        self._watchdog.close()
        with self._lock:
            pools = [self._direct, *self._proxied.values()]
        for pool in pools:
            pool.clear()

    @contextmanager
    def get(self, url: str, start: int = 0, end: int | None = None, stop: Stop | None = None) -> Iterator[Body]:
        """GET the bytes ``start`` to ``end`` (exclusive; None: to the file's end) as a :class:`Body`.

        :param stop: set from another thread to end it, whatever it waits for.
        :raises TransientTransferError: timeout, broken connection, HTTP 5xx, 408 or 429 (also while the body is read).
        :raises UrlRejectedError: HTTP 401 or 403.
        :raises StoppedError: ``stop`` was set (also while the body is read).
        :raises TransferError: any other status, or a certificate that isn't trusted.
        """
        headers = {"Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        exchange = Exchange(stop or Event(), self.step_timeout)
        with self._watchdog.watching(exchange):
            body = Body(self._request(exchange, "GET", url, headers=headers), url, start, exchange)
            try:
                yield body
            finally:
                body.release()

    def put(self, url: str, body: Source, size: int, stop: Stop | None = None) -> None:
        """PUT ``body``, of which exactly ``size`` bytes are announced in Content-Length (0 as well).

        :param body: at its beginning; seekable, as a redirect sends it again.
        :param stop: set from another thread to end it, whatever it waits for.
        :raises TransientTransferError: timeout, broken connection, HTTP 5xx, 408 or 429.
        :raises UrlRejectedError: HTTP 401 or 403.
        :raises StoppedError: it was stopped.
        :raises TransferError: any other status, or a certificate that isn't trusted.
        """
        exchange = Exchange(stop or Event(), self.step_timeout, self.read_timeout)
        options: dict[str, Any] = {
            "headers": {"Content-Length": str(size)},
            # Empty bytes: http.client sends an empty file object as a chunked request, which S3 refuses.
            "body": _Counted(body, exchange) if size else b"",
            # urllib3 would send only the rest of the body after a redirect.
            "redirect": False,
            # The watchdog limits the wait for the answer, not the socket.
            "timeout": urllib3.Timeout(connect=self.connect_timeout, read=None),
        }
        with self._watchdog.watching(exchange):
            for _ in range(_REDIRECTS + 1):
                response = self._request(exchange, "PUT", url, **options)
                try:
                    response.drain_conn()
                finally:
                    response.release_conn()
                location = response.headers.get("Location")
                if response.status not in _REDIRECT_STATUSES or not location:
                    return
                url = urljoin(url, location)
                body.seek(0)
                exchange.restart_upload()
        raise TransferError(f"{host_of(url)}: more than {_REDIRECTS} redirects")

    def retrying(
        self,
        stop: Stop,
        received: Callable[[], int] = lambda: 0,
        note: Callable[[TransientTransferError, float], None] | None = None,
    ) -> tenacity.Retrying:
        """The retry policy of one transfer, for ``retrying(...)(function)``; retries :class:`TransientTransferError`.

        :param stop: set from another thread to end a pause between two attempts; the next one then raises.
        :param received: returns how many bytes came so far; progress since the last failure resets the failure count.
        :param note: called with each error that is retried, and the seconds until the retry.
        """
        row, mark = 0, received()

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal row, mark
            row = 1 if received() - mark >= PROGRESS_BYTES else row + 1
            mark = received()

        def wait(state: tenacity.RetryCallState) -> float:
            backoff = tenacity.wait_exponential(self.min_backoff, self.max_backoff)
            jitter = tenacity.wait_random(0, self.min_backoff)
            repeated = tenacity.RetryCallState(state.retry_object, state.fn, state.args, state.kwargs)
            repeated.attempt_number = row
            return backoff(repeated) + jitter(repeated)

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if note and isinstance(error, TransientTransferError):
                note(error, state.next_action.sleep if state.next_action else 0.0)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientTransferError),
            after=count,
            stop=lambda state: row >= self.max_attempts,
            wait=wait,
            sleep=lambda seconds: _sleep(seconds, stop),
            before_sleep=before_sleep,
            reraise=True,
        )

    def retry(
        self,
        attempt: Callable[[], None],
        stop: Stop,
        received: Callable[[], int] = lambda: 0,
        note: Callable[[TransientTransferError, float], None] | None = None,
    ) -> None:
        """Call ``attempt``, and again as :meth:`retrying` says, which is made only when the first one fails."""
        first: TransientTransferError | None = None
        try:
            attempt()
            return
        except TransientTransferError as error:
            first = error

        def next_attempt() -> None:
            nonlocal first
            if first is not None:
                error, first = first, None
                raise error
            attempt()

        self.retrying(stop, received, note)(next_attempt)

    def _request(self, exchange: Exchange, method: str, url: str, **options: Any) -> BaseHTTPResponse:
        if exchange.stopped:
            raise StoppedError("the transfer was stopped")
        try:
            with exchange.requesting():
                response = self._send(method, url, options)
        except (HTTPError, OSError) as error:
            # `from None`: urllib3's errors and their causes may quote the URL.
            raise transport_error(exchange, host_of(url), error) from None
        if exchange.reason:  # http.client takes truncated headers for complete ones
            response.close()
            raise transport_error(exchange, host_of(url), None)
        exchange.step()
        redirected = method == "PUT" and response.status in _REDIRECT_STATUSES and "Location" in response.headers
        if response.status in (200, 201, 204, 206) or redirected:
            return response
        try:
            text = response.read(4096).decode("utf-8", "replace")
        except (HTTPError, OSError):
            text = ""
        response.close()
        if exchange.stopped:
            raise StoppedError("the transfer was stopped")
        raise status_error(host_of(url), response.status, response.reason or "", text)

    def _send(self, method: str, url: str, options: dict[str, Any]) -> BaseHTTPResponse:
        origin, target = _split(url)
        manager = self._pool(origin)
        if manager is self._direct and method == "GET" and target:
            # Straight to the host's pool: to parse a presigned URL again and again costs as much as the request.
            pool = manager.connection_from_url(origin)
            response = pool.urlopen(method, target, redirect=False, preload_content=False, **options)
            location = response.get_redirect_location()
            if not location:
                return response
            response.drain_conn()
            response.release_conn()
            requested, url = url, urljoin(url, location)
            log.info("Redirecting %s -> %s", without_queries(requested), without_queries(url))
        return manager.request(method, url, preload_content=False, **options)

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = proxy_for(url)
        if proxy is None:
            return self._direct
        with self._lock:
            if proxy not in self._proxied:
                manager = urllib3.ProxyManager(proxy, proxy_headers=proxy_headers(proxy), **self._options)
                self._proxied[proxy] = _watched(manager)
            return self._proxied[proxy]


class Body:
    """The body of one GET answer.

    :ivar start: offset in the file of its first byte; 0 where the storage ignored the requested range.
    :ivar length: Content-Length in bytes; None: unknown.
    :ivar ranged: whether the answer is the requested range and not the whole file.
    :ivar total: bytes of the whole file, from Content-Range; None: unknown.
    """

    def __init__(self, response: BaseHTTPResponse, url: str, start: int, exchange: Exchange) -> None:
        self._response, self._host, self._exchange = response, host_of(url), exchange
        self._finished = False
        self.ranged = response.status == 206
        self.start = start if self.ranged else 0
        length = response.headers.get("Content-Length")
        self.length = int(length) if length and length.isdigit() else None
        sent, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        sent = sent.partition("-")[0]
        self.total = int(total) if total.isdigit() else None
        if self.ranged and sent != str(start):
            response.close()
            raise TransientTransferError(
                f"{self._host} sent a range from {sent or '?'}, requested was one from {start}"
            )

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces of :data:`CHUNK_BYTES`.

        :raises TransientTransferError: it broke off, timed out, was too slow or shorter than Content-Length.
        :raises StoppedError: the exchange was stopped.
        """
        came = 0
        while not self._finished:
            self._exchange.step()
            try:
                chunk = self._response.read(CHUNK_BYTES, decode_content=False)
            except (HTTPError, OSError) as error:
                raise transport_error(self._exchange, self._host, error) from None
            finally:
                self._exchange.rest()
            if not chunk and self._exchange.reason:
                # In a body without Content-Length, an aborted read looks like its end.
                raise transport_error(self._exchange, self._host, None)
            came += len(chunk)
            self._finished = not chunk or came == self.length
            if chunk:
                yield chunk
        if self.length is not None and came < self.length:
            self._finished = False
            raise TransientTransferError(f"{self._host}: the connection broke after {came} of {self.length} bytes")

    def release(self) -> None:
        """Return the connection to the pool, or close it if part of the body is unread."""
        if not self._finished:
            self._response.close()
        self._response.release_conn()


class _Counted:
    """The body of a PUT that counts what is sent for its exchange."""

    def __init__(self, source: Source, exchange: Exchange) -> None:
        self._source, self._exchange = source, exchange

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(size)
        self._exchange.handed_over(len(chunk))
        return chunk


def _split(url: str) -> tuple[str, str]:
    """Return a URL's scheme, host and port, and the rest; the whole URL and nothing if it is an unusual one."""
    end = url.find("/", url.find("://") + 3)
    origin = url[:end]
    if end < 0 or "?" in origin or "#" in url:
        return url, ""
    return origin, url[end:]


#: All clients of this process. A forked child must not write to its parent's connections.
_all: weakref.WeakSet[HttpClient] = weakref.WeakSet()


def _after_fork() -> None:
    for http in list(_all):
        http._begin()


os.register_at_fork(after_in_child=_after_fork)


def _watched(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    manager.pool_classes_by_scheme = WATCHED_POOLS
    return manager


def _sleep(seconds: float, stop: Stop) -> None:
    until = time.monotonic() + seconds
    while not stop.is_set() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, STOP_SECONDS / 2))
