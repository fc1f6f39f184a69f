"""The token of a connection: fetched once for all who need it, renewed before it expires, never sent after it has.

One :class:`TokenSource` per process and settings serves threads and event loops alike. Fetching happens in a thread
of its own, so that nothing blocks a loop, and only once at a time, however many wait for it.
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
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NoReturn

from airflow_provider_datasphere.client import iam
from airflow_provider_datasphere.client.access_errors import (
    CredentialError,
    CredentialRefusedError,
    CredentialUnavailableError,
    SettingsError,
)
from airflow_provider_datasphere.client.identity import IamToken, OAuthToken
from airflow_provider_datasphere.client.settings import OAUTH_WARNING

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.settings import Settings

__all__ = ["CredentialError", "CredentialRefusedError", "CredentialUnavailableError", "Listener", "TokenSource"]

log = logging.getLogger(__name__)

#: Called with a token before its first use, in the thread or loop that is about to use it; False: this was not the
#: place to deal with it, call again with the next use.
Listener = Callable[[str], bool]

#: A token is renewed when this share of its life is left, but not earlier than ``RENEW_SECONDS`` before its end ...
RENEW_SHARE = 0.25
RENEW_SECONDS = 3600.0
#: ... and not used any more when this share is left, but at least until ``UNUSABLE_SECONDS`` before its end: the call
#: still has to reach the service, whose clock may be ahead.
UNUSABLE_SHARE = 0.08
UNUSABLE_SECONDS = 60.0
#: Pause after an early renewal that failed while the old token is still good, seconds.
RENEWAL_PAUSE = 30.0
#: An IAM token lives 12 hours at most, so one that has been in use for so long is about to end, seconds.
STATIC_TOKEN_WARNING_AGE = 11 * 3600.0


@dataclass(frozen=True)
class _Held:
    """A token in use. Times are monotonic, except ``expires_at``: seconds since the epoch."""

    value: str = field(repr=False)
    expires_at: float | None
    renew_at: float
    unusable_at: float
    unusable_at_wall_clock: float

    @classmethod
    def of(cls, token: iam.IssuedToken) -> _Held:
        if token.expires_at is None:
            return cls(token.value, None, *[float("inf")] * 3)
        now = time.monotonic()
        life = token.expires_at - time.time()
        margin = min(UNUSABLE_SECONDS, life * UNUSABLE_SHARE)
        return cls(
            token.value,
            token.expires_at,
            now + life - min(RENEW_SECONDS, life * RENEW_SHARE),
            now + life - margin,
            token.expires_at - margin,
        )

    @property
    def usable(self) -> bool:
        # Both clocks: one stands still while a machine sleeps, the other may be set back.
        return time.monotonic() < self.unusable_at and time.time() < self.unusable_at_wall_clock


class TokenSource:
    """The IAM token of one connection. Thread-safe, usable from any event loop, survives ``fork``.

    :param settings: whose token.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held: _Held | None = None
        self._renewal_not_before = 0.0
        self._listeners: list[Listener] = []
        self._announced: str | None = None
        self._first_use = time.monotonic()
        self._warned = False
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._flight: Future[_Held] | None = None

    def __repr__(self) -> str:
        return f"<TokenSource of {self.description}>"

    @classmethod
    def shared(cls, settings: Settings) -> TokenSource:
        """This process's source for these settings."""
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

    @property
    def expires_at(self) -> datetime | None:
        """When the present token expires; None while there is none or nobody knows."""
        held = self._held
        if held is None or held.expires_at is None:
            return None
        return datetime.fromtimestamp(held.expires_at, timezone.utc)

    def listen(self, listener: Listener) -> None:
        """Have a listener told of each new token, the present one included, before its next use."""
        if listener not in self._listeners:
            self._listeners.append(listener)
            self._announced = None

    def token(self, *, refused: str | None = None, timeout: float | None = None) -> str:
        """A token that is good now.

        :param refused: a token that the service has just answered UNAUTHENTICATED to; it isn't used again.
        :param timeout: how long to wait for a new one, seconds.
        :raises CredentialRefusedError: the credential is no good.
        :raises CredentialUnavailableError: nobody hands out a token right now, or not in time.
        """
        held = self._at_hand(refused)
        if held is None:
            try:
                held = self._flying().result(timeout)
            except (TimeoutError, FutureTimeoutError):
                self._too_late(timeout)
            except CredentialError as error:
                # A copy: the same exception object raised in many threads collects all their tracebacks.
                raise type(error)(str(error)) from None
        return self._used(held)

    async def atoken(self, *, refused: str | None = None, timeout: float | None = None) -> str:
        """The same, for coroutines."""
        held = self._at_hand(refused)
        if held is None:
            try:
                # Shielded: one waiter that is cancelled must not take the token from all others.
                held = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._flying())), timeout)
            except (TimeoutError, asyncio.TimeoutError):
                self._too_late(timeout)
            except CredentialError as error:
                raise type(error)(str(error)) from None
        return self._used(held)

    def forget(self, token: str) -> None:
        """Don't use a token again, because the service refused it. A token that can't be renewed stays."""
        if not self._is_static:
            with self._lock:
                if self._held is not None and self._held.value == token:
                    self._held = None

    @property
    def _is_static(self) -> bool:
        return isinstance(self._settings.credential, IamToken) and not self._settings.impersonate_service_account_id

    def _at_hand(self, refused: str | None) -> _Held | None:
        """The present token if it can be used, with a renewal begun if it is time for one."""
        if self._pid != os.getpid():
            self._start_afresh()
        if refused is not None:
            self.forget(refused)
            if self._is_static:
                raise CredentialRefusedError(
                    "The service refuses the IAM token of the connection: it is expired (an IAM token lives 12 hours "
                    "at most), revoked or mistyped. Put a new one into iam_token (`yc iam create-token`), or better a "
                    "credential that is renewed: service_account_json."
                )
        held = self._held
        if held is None or not held.usable:
            return None
        now = time.monotonic()
        if now >= held.renew_at and now >= self._renewal_not_before:
            self._flying(instead_of=held)
        return held

    def _flying(self, instead_of: _Held | None = None) -> Future[_Held]:
        """The fetch under way, begun now if there is none.

        :param instead_of: a token that is still good, but shall be renewed.
        """
        with self._lock:
            if self._flight is None:
                held = self._held
                if held is not None and held is not instead_of and held.usable:
                    # Another thread's fetch has ended since this one looked.
                    landed: Future[_Held] = Future()
                    landed.set_result(held)
                    return landed
                self._flight = Future()
                threading.Thread(target=self._fetch, args=(self._flight,), name="datasphere-token", daemon=True).start()
            return self._flight

    def _fetch(self, flight: Future[_Held]) -> None:
        try:
            if isinstance(self._settings.credential, OAuthToken) and not self._warned:
                self._warned = True
                log.warning(OAUTH_WARNING)
            held = _Held.of(iam.fetch_token(self._settings))
        except BaseException as error:
            self._failed(flight, error)
        else:
            with self._lock:
                self._held = held
                self._flight = None
            flight.set_result(held)

    def _failed(self, flight: Future[_Held], error: BaseException) -> None:
        if not isinstance(error, CredentialError):
            # A SettingsError is made to be shown. Of an unforeseen error only the kind: its text may hold anything.
            what = str(error) if isinstance(error, SettingsError) else type(error).__name__
            kind = CredentialRefusedError if isinstance(error, SettingsError) else CredentialUnavailableError
            error = kind(f"No token for {self.description}: {what}")
        with self._lock:
            self._flight = None
            self._renewal_not_before = time.monotonic() + RENEWAL_PAUSE
            still_good = self._held is not None and self._held.usable
        if still_good:
            log.warning("The token of %s can't be renewed yet, the old one goes on: %s", self.description, error)
        flight.set_exception(error)

    def _used(self, held: _Held) -> str:
        # All listeners are called, also after one that says "not here".
        if self._announced != held.value and all([listener(held.value) for listener in self._listeners]):
            self._announced = held.value
        if self._is_static and not self._warned and time.monotonic() - self._first_use > STATIC_TOKEN_WARNING_AGE:
            self._warned = True
            log.warning(
                "The IAM token of the connection has been in use for %.0f hours; such a token lives 12 hours at most "
                "and isn't renewed. Put a new one into iam_token, or use service_account_json.",
                STATIC_TOKEN_WARNING_AGE / 3600,
            )
        return held.value

    def _too_late(self, timeout: float | None) -> NoReturn:
        raise CredentialUnavailableError(f"No token for {self.description} within {timeout:g} seconds.") from None

    def _start_afresh(self) -> None:
        # After fork() the thread that was fetching is gone, and the lock may have been held by it.
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._flight = None


_shared: dict[str, TokenSource] = {}
_shared_lock = threading.Lock()


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
