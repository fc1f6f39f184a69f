"""IAM token cache of a connection: refreshed ahead of expiry, never used after it.

One :class:`TokenSource` per process and settings serves threads and event loops alike. A refresh runs in a thread of
its own, so that it blocks no event loop, and there is one at a time, however many callers wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from airflow_provider_datasphere.client.connection import iam
from airflow_provider_datasphere.client.connection.credentials import IamToken, OAuthToken
from airflow_provider_datasphere.client.connection.errors import (
    CredentialError,
    CredentialRefusedError,
    CredentialUnavailableError,
    NoMetadataServiceError,
    SettingsError,
)
from airflow_provider_datasphere.client.connection.settings import OAUTH_WARNING
from airflow_provider_datasphere.client.time_limit import within

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.settings import Settings

log = logging.getLogger(__name__)

#: Called with each new token before its first use, in the thread or event loop that uses it. Returns False to be called
#: again on the next use, from another thread perhaps.
Listener = Callable[[str], bool]

#: A token is refreshed when this share of its life is left, but at most ``REFRESH_SECONDS`` before it expires ...
REFRESH_SHARE = 0.25
REFRESH_SECONDS = 3600.0
#: ... and no longer used when this share is left, but at most ``EXPIRY_MARGIN_SECONDS`` before it expires: the call
#: still has to reach the service, whose clock may be ahead.
EXPIRY_MARGIN_SHARE = 0.08
EXPIRY_MARGIN_SECONDS = 60.0
#: Pause after a failed refresh, while the current token is still valid.
REFRESH_RETRY_SECONDS = 30.0
#: An IAM token lives 12 hours at most: one that has been in use for this long is about to expire.
STATIC_TOKEN_WARNING_SECONDS = 11 * 3600.0


@dataclass(frozen=True)
class _CachedToken:
    """A token and when to refresh it. Times are of the monotonic clock, the last one of the wall clock, seconds."""

    value: str = field(repr=False)
    refresh_at: float
    unusable_at: float
    unusable_at_wall_clock: float

    @classmethod
    def of(cls, token: iam.IssuedToken) -> _CachedToken:
        if token.expires_at is None:
            return cls(token.value, *[float("inf")] * 3)
        now = time.monotonic()
        life = token.expires_at - time.time()
        margin = min(EXPIRY_MARGIN_SECONDS, life * EXPIRY_MARGIN_SHARE)
        return cls(
            token.value,
            now + life - min(REFRESH_SECONDS, life * REFRESH_SHARE),
            now + life - margin,
            token.expires_at - margin,
        )

    @property
    def usable(self) -> bool:
        # Both clocks: one stands still while a machine sleeps, the other may be set back.
        return time.monotonic() < self.unusable_at and time.time() < self.unusable_at_wall_clock


class TokenSource:
    """The IAM token of one connection. Thread-safe, usable from any event loop, survives ``fork``.

    :param settings: the connection.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cached: _CachedToken | None = None
        self._has_had_one = False
        self._refresh_not_before = 0.0
        self._listeners: list[Listener] = []
        self._announced: str | None = None
        self._first_use = time.monotonic()
        self._warned = False
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._refresh: Future[_CachedToken] | None = None

    def __repr__(self) -> str:
        return f"<TokenSource of {self.description}>"

    @classmethod
    def shared(cls, settings: Settings) -> TokenSource:
        """Return this process's source for these settings."""
        key = settings.fingerprint
        with _shared_lock:
            source = _shared.get(key)
            if source is None:
                source = _shared[key] = cls(settings)
            return source

    @property
    def description(self) -> str:
        """Whose tokens these are, for messages."""
        return self._settings.description

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` with each new token, the current one included, before its next use."""
        if listener not in self._listeners:
            self._listeners.append(listener)
            self._announced = None

    def token(self, *, refused: str | None = None, timeout: float | None = None) -> str:
        """Return a valid token, after a refresh if necessary.

        :param refused: a token that the service has just answered UNAUTHENTICATED to; it isn't used again.
        :param timeout: how long to wait for a refresh, seconds; default: until it ends.
        :raises CredentialRefusedError: the credential is wrong, expired or revoked.
        :raises CredentialUnavailableError: IAM or the metadata service doesn't answer, or not in time.
        """
        cached = self._valid_token(refused)
        if cached is None:
            try:
                cached = self._start_refresh().result(timeout)
            except (TimeoutError, FutureTimeoutError):
                self._raise_timeout(timeout)
            except CredentialError as error:
                # A copy: the same exception object raised in many threads collects all their tracebacks.
                raise type(error)(str(error)) from None
        return self._use(cached)

    def current(self) -> str | None:
        """Return the token if it is valid, without waiting; ``None``: :meth:`token` or :meth:`atoken` gets one."""
        cached = self._valid_token(None)
        return None if cached is None else self._use(cached)

    async def atoken(self, *, refused: str | None = None, timeout: float | None = None) -> str:
        """Same as :meth:`token`, for coroutines."""
        cached = self._valid_token(refused)
        if cached is None:
            try:
                # Shielded: one waiter that is cancelled must not take the token from all others.
                cached = await within(asyncio.shield(asyncio.wrap_future(self._start_refresh())), timeout)
            except (TimeoutError, asyncio.TimeoutError):
                self._raise_timeout(timeout)
            except CredentialError as error:
                raise type(error)(str(error)) from None
        return self._use(cached)

    def forget(self, token: str) -> None:
        """Don't use a token again, because the service refused it. A static token stays: there is no other."""
        if not self._is_static:
            with self._lock:
                if self._cached is not None and self._cached.value == token:
                    self._cached = None

    @property
    def _is_static(self) -> bool:
        return isinstance(self._settings.credential, IamToken) and not self._settings.impersonate_service_account_id

    def _valid_token(self, refused: str | None) -> _CachedToken | None:
        """Return the current token unless it has expired, and start a refresh if one is due."""
        if self._pid != os.getpid():
            self._reset_after_fork()
        if refused is not None:
            self.forget(refused)
            if self._is_static:
                raise CredentialRefusedError(
                    "The service refuses the IAM token of the connection: it is expired (an IAM token lives 12 hours "
                    "at most), revoked or mistyped. Put a new one into iam_token (`yc iam create-token`), or better "
                    "use a credential that is refreshed: service_account_json."
                )
        cached = self._cached
        if cached is None or not cached.usable:
            return None
        now = time.monotonic()
        if now >= cached.refresh_at and now >= self._refresh_not_before:
            self._start_refresh(instead_of=cached)
        return cached

    def _start_refresh(self, instead_of: _CachedToken | None = None) -> Future[_CachedToken]:
        """Return the refresh in progress; start one if there is none.

        :param instead_of: a token that is still valid and due for a refresh.
        """
        with self._lock:
            if self._refresh is None:
                cached = self._cached
                if cached is not None and cached is not instead_of and cached.usable:
                    # Another thread has refreshed it meanwhile.
                    done: Future[_CachedToken] = Future()
                    done.set_result(cached)
                    return done
                refresh: Future[_CachedToken] = Future()
                thread = threading.Thread(target=self._fetch, args=(refresh,), name="datasphere-token", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    problem = str(error)
                else:
                    # Only now: nobody may wait for a refresh that never ends. The thread needs the lock to end it.
                    self._refresh = refresh
            if self._refresh is not None:
                return self._refresh
        # No thread can be started now: the next use of the token tries again.
        self._failed(refresh, CredentialUnavailableError(f"No token for {self.description}: {problem}."))
        return refresh

    def _fetch(self, refresh: Future[_CachedToken]) -> None:
        try:
            if isinstance(self._settings.credential, OAuthToken) and not self._warned:
                self._warned = True
                log.warning(OAUTH_WARNING)
            cached = _CachedToken.of(iam.fetch_token(self._settings))
        except BaseException as error:
            self._failed(refresh, error)
        else:
            with self._lock:
                self._cached = cached
                self._has_had_one = True
                self._refresh = None
            refresh.set_result(cached)

    def _failed(self, refresh: Future[_CachedToken], error: BaseException) -> None:
        if not isinstance(error, CredentialError):
            # A SettingsError is made to be shown. Of an unforeseen error only the kind: its text may hold anything.
            what = str(error) if isinstance(error, SettingsError) else type(error).__name__
            kind = CredentialRefusedError if isinstance(error, SettingsError) else CredentialUnavailableError
            error = kind(f"No token for {self.description}: {what}")
        elif isinstance(error, NoMetadataServiceError) and not self._has_had_one:
            # A machine that has had a token is a VM: its metadata service may come back.
            error = CredentialRefusedError(str(error))
        with self._lock:
            self._refresh = None
            self._refresh_not_before = time.monotonic() + REFRESH_RETRY_SECONDS
            still_valid = self._cached is not None and self._cached.usable
        if still_valid:
            log.warning("Token refresh for %s failed, using the current token: %s", self.description, error)
        refresh.set_exception(error)

    def _use(self, cached: _CachedToken) -> str:
        # All listeners are called, also after one that returns False.
        if self._announced != cached.value and all([listener(cached.value) for listener in self._listeners]):
            self._announced = cached.value
        if self._is_static and not self._warned and time.monotonic() - self._first_use > STATIC_TOKEN_WARNING_SECONDS:
            self._warned = True
            log.warning(
                "The IAM token of the connection has been in use for %.0f hours; such a token lives 12 hours at most "
                "and isn't refreshed. Put a new one into iam_token, or use service_account_json.",
                STATIC_TOKEN_WARNING_SECONDS / 3600,
            )
        return cached.value

    def _raise_timeout(self, timeout: float | None) -> NoReturn:
        raise CredentialUnavailableError(f"No token for {self.description} within {timeout:g} seconds.") from None

    def _reset_after_fork(self) -> None:
        # After fork() the refreshing thread is gone, and it may have held the lock.
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._refresh = None


_shared: dict[str, TokenSource] = {}
_shared_lock = threading.Lock()


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
