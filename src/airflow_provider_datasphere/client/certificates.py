"""Which certificate authorities are trusted, for gRPC and for the HTTP of files."""

from __future__ import annotations

import os
import ssl

from airflow_provider_datasphere.client.access_errors import SettingsError


def read_certificates(path: str) -> bytes:
    """The PEM file of the connection's ``root_certificates``.

    :raises SettingsError: it can't be read, or is none.
    """
    way_out = "It must be a PEM file that exists on every machine that runs tasks, and on the triggerer's."
    try:
        with open(path, "rb") as file:
            pem = file.read()
    except OSError as error:
        raise SettingsError(f"root_certificates={path!r}: can't be read: {error.strerror}. {way_out}") from None
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise SettingsError(f"root_certificates={path!r}: holds no certificate. {way_out}")
    return pem


def ssl_context(root_certificates: str | None) -> ssl.SSLContext:
    """For HTTPS: the system's authorities, those of `certifi` where it is installed, ``REQUESTS_CA_BUNDLE`` of the
    environment (a file or a directory, as `requests` takes it), and ``root_certificates``.

    :raises SettingsError: one of the last two can't be used.
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
    way_out = "It must be a PEM file, or a directory as `openssl rehash` makes it, on every machine that runs tasks."
    try:
        if os.path.isdir(path):
            context.load_verify_locations(capath=path)
        else:
            context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"{name}={path!r}: holds no certificate that can be used ({error}). {way_out}") from None
    except OSError as error:
        raise SettingsError(f"{name}={path!r}: can't be read: {error.strerror}. {way_out}") from None
