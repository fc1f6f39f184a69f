"""The HTTP side of presigned URLs: one connection pool, timeouts, retries, and errors that don't leak the URLs.

A presigned URL is a credential for its file: it appears in no message here, only its host does.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

import tenacity
import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError

from airflow_provider_datasphere.client.certificates import ssl_context
from airflow_provider_datasphere.client.proxy import proxy_for, proxy_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from urllib3.response import BaseHTTPResponse

#: How much is read from a socket, hashed and written at once (bytes).
CHUNK_BYTES = 256 * 1024
#: A retry counts as the first one again when at least this much came since the last failure (bytes).
PROGRESS_BYTES = 1024 * 1024

_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
_REFUSED_URL_STATUSES = frozenset({401, 403})
# S3 gives these with HTTP 400: what arrived isn't what was announced, or arrived too slowly.
_TRANSIENT_CODES = ("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch")


class TransferError(Exception):
    """A file can't be transferred, and trying again won't help."""


class TransientError(TransferError):
    """The network or the storage stumbled; the same request may well succeed later."""


class UrlRefusedError(TransferError):
    """The storage no longer (or never did) accept the presigned URL: HTTP 401 or 403. A new URL may work."""


class StoppedError(TransferError):
    """The transfer was told to stop."""


class Http:
    """A pool of HTTP(S) connections to the hosts of presigned URLs. Thread-safe.

    Trusts what :func:`~airflow_provider_datasphere.client.certificates.ssl_context` says, and goes through the proxies
    of :func:`~airflow_provider_datasphere.client.proxy.proxy_for`.

    :param root_certificates: path of a PEM file with certificates to trust in addition.
    :param connect_timeout: seconds to establish a connection.
    :param read_timeout: seconds without a single byte.
    :param attempts: failures in a row, without progress between them, after which a transfer is given up.
    :param backoff: seconds to wait after the first failure; doubles, with jitter, up to ``max_backoff``.
    :param slow_after: seconds within which each :data:`CHUNK_BYTES` of a body must arrive; slower is a failure too (a
        connection that drips never runs into ``read_timeout``).
    :param connections: how many idle connections per host are kept.
    """

    def __init__(
        self,
        root_certificates: str | None = None,
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 60.0,
        attempts: int = 6,
        backoff: float = 0.5,
        max_backoff: float = 20.0,
        slow_after: float = 60.0,
        connections: int = 32,
    ) -> None:
        self.attempts = attempts
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.slow_after = slow_after
        self._options: dict[str, Any] = {
            "maxsize": connections,
            "timeout": urllib3.Timeout(connect=connect_timeout, read=read_timeout),
            # Redirects of the storage are followed; everything else is retried by us, who know the offset.
            "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=3),
            "ssl_context": ssl_context(root_certificates),
        }
        if not version("urllib3").startswith("1."):  # urllib3 1.26 sends bodies in pieces of its own size
            self._options["blocksize"] = CHUNK_BYTES
        self._direct = urllib3.PoolManager(**self._options)
        self._proxied: dict[str, urllib3.ProxyManager] = {}
        self._bodies: set[Body] = set()
        self._closed = Event()
        self._watchdog: Thread | None = None
        self._lock = Lock()

    def close(self) -> None:
        """Close all connections; the object can be used again."""
        with self._lock:
            self._closed.set()
            self._closed, self._watchdog = Event(), None
        self._direct.clear()
        for proxy in self._proxied.values():
            proxy.clear()

    def __enter__(self) -> Http:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def get(self, url: str, start: int = 0, end: int | None = None) -> Iterator[Body]:
        """GET the bytes ``start`` to ``end`` (exclusive; None: to the file's end) as a :class:`Body`.

        :raises TransientError: timeout, broken connection, HTTP 5xx, 408 or 429 (also while the body is read).
        :raises UrlRefusedError: HTTP 401 or 403.
        :raises TransferError: any other status.
        """
        headers = {"Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        body = Body(self._request("GET", url, headers=headers), url, start)
        with self._lock:
            self._bodies.add(body)
            if self._watchdog is None:
                self._watchdog = Thread(target=self._watch, args=(self._closed,), name="slow-bodies", daemon=True)
                self._watchdog.start()
        try:
            yield body
        finally:
            with self._lock:
                self._bodies.discard(body)
            body.release()

    def _watch(self, closed: Event) -> None:
        # A read of a whole chunk can't be given a deadline: each byte that drips in restarts the socket's timeout.
        while not closed.wait(min(1.0, self.slow_after / 4)):
            with self._lock:
                slow = [body for body in self._bodies if body.waited() > self.slow_after]
            for body in slow:
                body.abort()

    def put(self, url: str, body: BinaryIO, size: int) -> None:
        """PUT ``body``, of which exactly ``size`` bytes are announced in Content-Length (0 as well).

        :raises TransientError: timeout, broken connection, HTTP 5xx, 408 or 429.
        :raises UrlRefusedError: HTTP 401 or 403.
        :raises TransferError: any other status.
        """
        # An empty body must be bytes: of an empty file object http.client makes a chunked request, which
        # S3-like storages refuse.
        response = self._request("PUT", url, headers={"Content-Length": str(size)}, body=body if size else b"")
        response.drain_conn()
        response.release_conn()

    def retrying(
        self,
        stop: Event,
        received: Callable[[], int] = lambda: 0,
        note: Callable[[TransientError, float], None] | None = None,
    ) -> tenacity.Retrying:
        """The retry policy of one transfer, for ``retrying(...)(function)``: repeats on :class:`TransientError`.

        :param stop: set from outside to end the transfer (also in the middle of a wait).
        :param received: how many bytes came so far; progress since the last failure resets the count of failures.
        :param note: told of each failure that is followed by another try, with the seconds until then.
        """
        row, mark = 0, received()

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal row, mark
            row = 1 if received() - mark >= PROGRESS_BYTES else row + 1
            mark = received()

        def wait(state: tenacity.RetryCallState) -> float:
            delays = tenacity.wait_exponential(self.backoff, self.max_backoff) + tenacity.wait_random(0, self.backoff)
            repeated = tenacity.RetryCallState(state.retry_object, state.fn, state.args, state.kwargs)
            repeated.attempt_number = row
            return delays(repeated)

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if note and isinstance(error, TransientError):
                note(error, state.next_action.sleep if state.next_action else 0.0)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            after=count,
            stop=lambda state: row >= self.attempts or stop.is_set(),
            wait=wait,
            sleep=tenacity.sleep_using_event(stop),
            before_sleep=before_sleep,
            reraise=True,
        )

    def _request(self, method: str, url: str, **options: Any) -> BaseHTTPResponse:
        # `from None`: urllib3's errors and their causes may quote the URL.
        try:
            response = self._pool(url).request(method, url, preload_content=False, **options)
        except MaxRetryError as error:
            raise TransientError(f"{host_of(url)}: {_describe(error.reason or error)}") from None
        except (HTTPError, OSError) as error:
            raise TransientError(f"{host_of(url)}: {_describe(error)}") from None
        if response.status in (200, 201, 204, 206):
            return response
        try:
            text = response.read(4096).decode("utf-8", "replace")
        except (HTTPError, OSError):
            text = ""
        response.close()
        answer = f"{host_of(url)} answered {response.status} {response.reason or ''}".rstrip() + _storage_message(text)
        transient_code = any(f"<Code>{code}</Code>" in text for code in _TRANSIENT_CODES)
        if transient_code or response.status in _TRANSIENT_STATUSES or response.status >= 500:
            raise TransientError(answer)
        if response.status in _REFUSED_URL_STATUSES:
            raise UrlRefusedError(answer)
        raise TransferError(answer)

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = proxy_for(url)
        if proxy is None:
            return self._direct
        if proxy not in self._proxied:
            self._proxied[proxy] = urllib3.ProxyManager(proxy, proxy_headers=proxy_headers(proxy), **self._options)
        return self._proxied[proxy]


class Body:
    """The body of one GET answer.

    :ivar start: offset in the file of its first byte: 0 where the storage ignored the range that was asked for.
    :ivar length: how many bytes the answer announced, None if it didn't.
    :ivar ranged: whether the answer is the range that was asked for, and not the whole file.
    :ivar total: bytes of the whole file, where a ranged answer tells them.
    """

    def __init__(self, response: BaseHTTPResponse, url: str, start: int) -> None:
        self._response, self._host = response, host_of(url)
        self._reading_since: float | None = None
        self._aborted = self._finished = False
        self.ranged = response.status == 206
        self.start = start if self.ranged else 0
        length = response.headers.get("Content-Length")
        self.length = int(length) if length and length.isdigit() else None
        sent, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        sent = sent.partition("-")[0]
        self.total = int(total) if total.isdigit() else None
        if self.ranged and sent != str(start):
            response.close()
            raise TransientError(f"{self._host} sent a range from {sent or '?'} where one from {start} was asked for")

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces of :data:`CHUNK_BYTES`.

        :raises TransientError: it broke off, timed out, was too slow or shorter than announced.
        """
        came = 0
        while not self._finished:
            self._reading_since = time.monotonic()
            try:
                chunk = self._response.read(CHUNK_BYTES, decode_content=False)
            except (HTTPError, OSError) as error:
                raise TransientError(f"{self._host}: {self._why(_describe(error))}") from None
            finally:
                self._reading_since = None
            came += len(chunk)
            self._finished = not chunk or came == self.length
            if chunk:
                yield chunk
        if self.length is not None and came < self.length:
            self._finished = False
            broke = f"the connection broke after {came} of {self.length} bytes"
            raise TransientError(f"{self._host}: {self._why(broke)}")

    def waited(self) -> float:
        """For how many seconds the chunk that is being read has been awaited."""
        since = self._reading_since
        return 0.0 if since is None else time.monotonic() - since

    def abort(self) -> None:
        """End a read that another thread waits in."""
        self._aborted = True
        sock = getattr(self._response.connection, "sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the connection back, or close it where part of the body is still under way."""
        if not self._finished:
            self._response.close()
        self._response.release_conn()

    def _why(self, description: str) -> str:
        return f"less than {CHUNK_BYTES // 1024} KiB came within the time allowed" if self._aborted else description


def host_of(url: str) -> str:
    """The part of a presigned URL that may be shown."""
    return urlsplit(url).hostname or "the storage"


def _describe(error: BaseException) -> str:
    kinds = {
        "ConnectTimeoutError": "connecting timed out",
        "ReadTimeoutError": "reading timed out",
        "TimeoutError": "timed out",
        "NewConnectionError": "no connection",
        "NameResolutionError": "the host name can't be resolved",
        "ProxyError": "the proxy can't be reached",
    }
    name = type(error).__name__
    if name in kinds:
        return kinds[name]
    if isinstance(error, ssl.SSLError) or name == "SSLError":
        return f"TLS failed: {error}"
    return f"the connection broke ({name})"


def _storage_message(text: str) -> str:
    # S3's errors are XML with a Code and a Message; nothing else of the answer is worth showing.
    found = [
        text.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        for tag in ("Code", "Message")
        if f"<{tag}>" in text and f"</{tag}>" in text
    ]
    return f" ({': '.join(found)[:300]})" if found else ""
