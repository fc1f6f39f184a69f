"""Errors of settings, credentials and TLS.

A call without a token is a failed call to its caller: credential errors are also :class:`grpc.RpcError` and have its
``code()``, so that the same code retries them and gives up.
"""

from __future__ import annotations

import grpc

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError


class SettingsError(JobRequestError):
    """A field of the connection is invalid; the message has its name, its value (never a secret) and a hint."""


class CredentialError(DataSphereError, grpc.RpcError):
    """No token is available for the call."""

    _code = grpc.StatusCode.UNAUTHENTICATED

    def code(self) -> grpc.StatusCode:
        """The status code of the failed call."""
        return self._code

    def details(self) -> str:
        """The message, as ``details()`` of any failed call."""
        return str(self)


class CredentialRefusedError(CredentialError, JobRequestError):
    """The credential is wrong, expired or revoked, or has no right to what was asked; somebody must change it."""


class CredentialUnavailableError(CredentialError):
    """IAM or the metadata service didn't answer: transient."""

    _code = grpc.StatusCode.UNAVAILABLE


class NoMetadataServiceError(CredentialUnavailableError):
    """Nothing listens at the metadata service's address: this machine has none, probably."""


class ServerCertificateError(CredentialRefusedError):
    """The server's certificate isn't trusted, or the server doesn't speak TLS."""
