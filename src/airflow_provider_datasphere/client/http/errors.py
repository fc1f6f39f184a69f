"""Errors of HTTP transfers: transient, URL rejected, or permanent.

A presigned URL is a credential for its file: no message shows more of it than its host.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from urllib3.exceptions import LocationValueError, MaxRetryError

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.http.exchange import Exchange

_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
_REFUSED_URL_STATUSES = frozenset({401, 403})
# S3 sends these with HTTP 400: the content isn't the announced one, or arrived too slowly.
_TRANSIENT_CODES = ("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch")


class TransferError(Exception):
    """The transfer failed; a retry won't help."""


class TransientTransferError(TransferError):
    """A transient network or storage error; the request may be retried."""


class UrlRejectedError(TransferError):
    """The storage rejected the presigned URL (HTTP 401 or 403): it has expired, perhaps. A new URL may work."""


class StoppedError(TransferError):
    """The transfer was stopped."""


def host_of(url: str) -> str:
    """Return the part of a presigned URL that may be shown."""
    return urlsplit(url).hostname or "the storage"


def transport_error(exchange: Exchange, host: str, error: Exception | None) -> TransferError:
    """Return the error for a request that got no answer, or whose body broke off.

    :param error: what the HTTP library raised; None: it noticed nothing.
    """
    if isinstance(error, MaxRetryError):
        error = error.reason or error
    if exchange.stopped:
        return StoppedError("the transfer was stopped")
    if exchange.reason:
        return TransientTransferError(f"{host}: the transfer stalled or was too slow")
    if isinstance(error, LocationValueError):
        return TransferError(f"{host}: invalid URL")
    untrusted = _certificate_problem(error)
    if untrusted is not None:
        return TransferError(f"{host}: TLS failed: {untrusted}")
    return TransientTransferError(f"{host}: {_describe(error)}")


def _certificate_problem(error: BaseException | None) -> str | None:
    """Return why the server's certificate isn't trusted; None if that isn't the problem."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        inner = error.args[-1] if error.args else None
        error = inner if isinstance(inner, BaseException) else getattr(error, "original_error", None)
    if error is None:
        return None
    if "expired" in error.verify_message:
        hint = "it must be renewed"
    elif "mismatch" in error.verify_message:
        hint = "it is another host's, or a proxy's"
    else:
        hint = "set the connection's root_certificates to a PEM file with its authority"
    return f"the certificate isn't trusted ({error.verify_message}): {hint}"


def _describe(error: BaseException | None) -> str:
    kinds = {
        "ConnectTimeoutError": "connecting timed out",
        "ReadTimeoutError": "reading timed out",
        "TimeoutError": "timed out",
        "NewConnectionError": "connecting failed",
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
    # S3's errors are XML with a Code and a Message.
    found = [
        text.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        for tag in ("Code", "Message")
        if f"<{tag}>" in text and f"</{tag}>" in text
    ]
    return f" ({': '.join(found)[:300]})" if found else ""


def status_error(host: str, status: int, reason: str, text: str) -> TransferError:
    """Return the error for an answer with an error status.

    :param text: the beginning of its body.
    """
    answer = f"{host} answered {status} {reason}".rstrip() + _storage_message(text)
    transient_code = any(f"<Code>{code}</Code>" in text for code in _TRANSIENT_CODES)
    if transient_code or status in _TRANSIENT_STATUSES or status >= 500:
        return TransientTransferError(answer)
    if status in _REFUSED_URL_STATUSES:
        return UrlRejectedError(answer)
    return TransferError(answer)
