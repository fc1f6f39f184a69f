"""Trusted certificate authorities, for gRPC and for HTTP."""

from __future__ import annotations

import os
import ssl
import time

from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.secret_detection import shown


def read_certificates(path: str) -> bytes:
    """Read the PEM file of the connection's ``root_certificates``.

    :raises SettingsError: it can't be read, has no certificate, is truncated, or has expired.
    """
    hint = "It must be a PEM file that exists on every machine that runs tasks, and on the triggerer's."
    try:
        with open(path, "rb") as file:
            pem = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "invalid path"
        raise SettingsError(f"root_certificates={shown(path)}: can't be read: {reason}. {hint}") from None
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise SettingsError(f"root_certificates={shown(path)}: has no certificate. {hint}")
    _require_usable(path, pem)
    return pem


def _require_usable(path: str, pem: bytes) -> None:
    """Check what gRPC accepts silently, to fail later with UNAVAILABLE.

    :raises SettingsError: a truncated certificate, or none that is still valid.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if pem.count(b"-----BEGIN CERTIFICATE-----") > pem.count(b"-----END CERTIFICATE-----"):
            raise ssl.SSLError("the last one is truncated")
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(
            f"root_certificates={shown(path)}: has an invalid certificate ({error}). Copy the whole file again."
        ) from None
    ends = [str(authority["notAfter"]) for authority in context.get_ca_certs()]
    if ends and all(ssl.cert_time_to_seconds(end) < time.time() for end in ends):
        newest = max(ends, key=ssl.cert_time_to_seconds)
        raise SettingsError(
            f"root_certificates={shown(path)}: expired on {newest}. Set it to the authority's current certificate."
        )


def ssl_context(root_certificates: str | None) -> ssl.SSLContext:
    """Return the context for HTTPS: it trusts the system's authorities, those of `certifi` if installed, those of the
    environment's ``REQUESTS_CA_BUNDLE`` (a file or a directory, as in `requests`), and ``root_certificates``.

    :raises SettingsError: one of the last two is invalid.
    """
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        pass
    else:
        context.load_verify_locations(certifi.where())
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE"):
        _trust(context, "The environment's REQUESTS_CA_BUNDLE", bundle)
    if root_certificates:
        read_certificates(root_certificates)
        _trust(context, "root_certificates", root_certificates)
    return context


def _trust(context: ssl.SSLContext, name: str, path: str) -> None:
    hint = "It must be a PEM file, or a directory as `openssl rehash` makes it, on every machine that runs tasks."
    try:
        if os.path.isdir(path):
            context.load_verify_locations(capath=path)
        else:
            context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"{name}={shown(path)}: has no valid certificate ({error}). {hint}") from None
    except OSError as error:
        raise SettingsError(f"{name}={shown(path)}: can't be read: {error.strerror}. {hint}") from None
