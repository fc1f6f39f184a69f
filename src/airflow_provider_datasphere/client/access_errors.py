"""Why a connection can't be used.

A call that fails because no token can be had is, to its caller, a failed call: these errors are also
:class:`grpc.RpcError` and have its ``code()``, so that the code which retries, waits and gives up needs no second
set of rules.
"""

from __future__ import annotations

import grpc

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError


class SettingsError(JobRequestError):
    """A field of the connection is wrong; the message names it, its value (never a secret) and the way out."""


class CredentialError(DataSphereError, grpc.RpcError):
    """There is no token for the call.

    ``retryable`` says whether trying again later can help without anybody changing anything.
    """

    retryable = False
    _code = grpc.StatusCode.UNAUTHENTICATED

    def code(self) -> grpc.StatusCode:
        """The status that the call counts as having ended with."""
        return self._code

    def details(self) -> str:
        """The message, as of any failed call."""
        return str(self)


class CredentialRefusedError(CredentialError, JobRequestError):
    """The credential is wrong, expired or revoked, or has no right to what was asked; somebody must change it."""


class CredentialUnavailableError(CredentialError):
    """The service that hands out tokens didn't answer; it may do so later."""

    retryable = True
    _code = grpc.StatusCode.UNAVAILABLE


class ServerCertificateError(CredentialRefusedError):
    """The other end showed a certificate that isn't trusted, or doesn't speak TLS at all."""
