"""Messages about a service that doesn't answer: the reason, how long calls are retried, what to check."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.connection.errors import CredentialError
from airflow_provider_datasphere.client.rpc import code_name

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from airflow_provider_datasphere.client.connection.settings import Settings
    from airflow_provider_datasphere.client.logger import LoggerLike

#: Time between log lines of a call that is being retried.
REMINDER_SECONDS = 60.0
CHECK_NETWORK = (
    "Check the connection's endpoint, and that this machine may connect to it (NAT gateway, security group, proxy)."
)

# Texts of gRPC's connection errors, the most specific first.
_REASONS = (
    ("Connection refused", "connection refused"),
    ("No route to host", "no route to host"),
    ("Network is unreachable", "the network is unreachable"),
    ("errors resolving", "the host name can't be resolved"),
    ("DNS resolution failed", "the host name can't be resolved"),
    ("Connection reset", "the connection was reset"),
    ("Socket closed", "the connection was closed"),
    ("timed out", "timed out"),
)


def unreachable(error: grpc.RpcError, where: str, connection: str = "") -> str | None:
    """Describe a service that doesn't answer, without a full stop; None: it answered with an error.

    :param where: ``host:port`` of the service.
    :param connection: the connection's id; default: unknown.
    """
    code, details = code_name(error), error.details() or ""
    if isinstance(error, CredentialError) or code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return None
    # An UNAVAILABLE with another text is the service's answer.
    reason = next((words for text, words in _REASONS if text in details), None)
    if code == "DEADLINE_EXCEEDED":
        reason = "no answer in time"
    if reason is None:
        return None
    named = f"{where} (connection {connection})" if connection else where
    return f"DataSphere at {named} doesn't answer: {reason}"


def tls_hint(error: grpc.RpcError, settings: Settings) -> str:
    """Return a hint for a plaintext connection that the server closes at once; else an empty text."""
    details = error.details() or ""
    closed = "Socket closed" in details or "Connection reset" in details
    return "; the server may expect TLS: remove insecure from the connection" if settings.insecure and closed else ""


class Outage:
    """Log lines about the retries of one call: the first at once, then one a minute, and the end.

    :param describe: returns the text for an error.
    :param retry_timeout: seconds for which the call is retried.
    """

    def __init__(self, describe: Callable[[grpc.RpcError], str], retry_timeout: float, logger: LoggerLike) -> None:
        self._describe = describe
        self._retry_timeout = retry_timeout
        self._logger = logger
        self._started_at = time.monotonic()
        self._logged_at: float | None = None

    def failed(self, error: grpc.RpcError) -> None:
        """Note that the call failed and will be retried."""
        now = time.monotonic()
        if self._logged_at is not None and now - self._logged_at < REMINDER_SECONDS:
            return
        left = self._retry_timeout - (now - self._started_at)
        again = "retrying for up to" if self._logged_at is None else "still retrying, for another"
        self._logger.warning("%s; %s %s.", self._describe(error).rstrip("."), again, duration_text(left))
        self._logged_at = now

    def over(self) -> None:
        """Note that the call was answered."""
        if self._logged_at is not None:
            self._logger.info("Connection to DataSphere restored.")


def duration_text(seconds: float) -> str:
    """Return ``5 minutes``; below two minutes ``90 seconds``."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 119.5 else f"{max(1.0, seconds):.0f} seconds"
