"""Requests for IAM tokens; :mod:`.token_source` caches and refreshes them."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import grpc
import tenacity

from airflow_provider_datasphere.client.connection.credentials import (
    IamToken,
    InstanceMetadataCredential,
    OAuthToken,
    ServiceAccountKey,
)
from airflow_provider_datasphere.client.connection.errors import (
    CredentialError,
    CredentialRefusedError,
    CredentialUnavailableError,
    NoMetadataServiceError,
)
from airflow_provider_datasphere.client.rpc import IAM_DEADLINE_SECONDS, code_and_details

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.connection.settings import Settings

#: How long a service that doesn't answer is retried; less than the deadline of a caller's own call.
FETCH_RETRY_SECONDS = 6.0
#: Audience of the signed request, from the IAM documentation.
JWT_AUDIENCE = "https://iam.api.cloud.yandex.net/iam/v1/tokens"
JWT_LIFETIME_SECONDS = 3600

_METADATA_URL = "http://{}/computeMetadata/v1/instance/service-accounts/default/token"
_NOBODY_THERE = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN})
_REFUSALS = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


@dataclass(frozen=True)
class IssuedToken:
    """An IAM token.

    :param expires_at: seconds since the epoch; None: unknown.
    """

    value: str = field(repr=False)
    expires_at: float | None


def fetch_token(settings: Settings) -> IssuedToken:
    """Request a token for these settings; a service that doesn't answer is retried for :data:`FETCH_RETRY_SECONDS`.

    :raises CredentialRefusedError: the credential is wrong, expired or revoked.
    :raises CredentialUnavailableError: IAM or the metadata service doesn't answer.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(CredentialUnavailableError),
        wait=tenacity.wait_random_exponential(multiplier=0.3, max=2.0),
        stop=tenacity.stop_after_delay(FETCH_RETRY_SECONDS),
        reraise=True,
    )
    token: IssuedToken = retrying(_fetch, settings)
    return token


def _fetch(settings: Settings) -> IssuedToken:
    credential = settings.credential
    if isinstance(credential, IamToken):
        token = IssuedToken(credential.token, None)
    elif isinstance(credential, InstanceMetadataCredential):
        token = _from_metadata(credential)
    else:
        token = _IamClient(settings).exchange(credential)
    if settings.impersonate_service_account_id is None:
        return token
    return _IamClient(settings).impersonate(settings.impersonate_service_account_id, token)


def _from_metadata(credential: InstanceMetadataCredential) -> IssuedToken:
    """Request a token from the metadata service (Compute Cloud documentation, "Authentication from inside a VM")."""
    import requests

    service = f"the metadata service at {credential.address}"
    hint = (
        "Outside a VM or Managed Airflow cluster with a service account, fill in a credential of the connection "
        "(service_account_json)."
    )
    session = requests.Session()
    session.trust_env = False  # no proxy for a link-local address
    asked_at = time.time()
    try:
        answer = session.get(
            _METADATA_URL.format(credential.address),
            headers={"Metadata-Flavor": "Google"},
            timeout=(1.0, IAM_DEADLINE_SECONDS),
        )
    except requests.RequestException as error:
        if why := _nobody_there(error):
            raise NoMetadataServiceError(
                f"No token: the connection has no credential, and {service}, which a VM or Managed Airflow cluster "
                f"with a service account has, isn't there ({why}). Fill in a credential of the connection: "
                "service_account_json, service_account_json_path or iam_token."
            ) from None
        raise CredentialUnavailableError(
            f"No token: {service} doesn't answer ({type(error).__name__}). {hint}"
        ) from None
    finally:
        session.close()
    if answer.status_code in (401, 403, 404):
        raise CredentialRefusedError(
            f"No token: {service} answers {answer.status_code}: no service account is attached to this machine. Attach "
            f"one to the VM or cluster. {hint}"
        )
    if answer.status_code != 200:
        raise CredentialUnavailableError(f"No token: {service} answers {answer.status_code}. {hint}")
    try:
        body = answer.json()
        value, expires_in = str(body["access_token"]), float(body["expires_in"])
    except (ValueError, KeyError, TypeError):
        # Neither chained nor quoted: half a token may be in it.
        raise CredentialUnavailableError(f"No token: {service} returned an invalid answer. {hint}") from None
    return IssuedToken(value, asked_at + expires_in)


def _nobody_there(error: BaseException | None) -> str | None:
    """Return why nothing can be at an address: refused, or no route. None: another failure, such as a timeout."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NOBODY_THERE:
            return os.strerror(error.errno).lower()
        inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else None
        error = getattr(error, "reason", None) or error.__cause__ or error.__context__ or inner
        if not isinstance(error, BaseException):
            return None
    return None


class _IamClient:
    """``yandex.cloud.iam.v1.IamTokenService``, with a channel per call: tokens are requested hours apart."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def exchange(self, credential: ServiceAccountKey | OAuthToken) -> IssuedToken:
        """RPC ``IamTokenService.Create``."""
        from yandex.cloud.iam.v1.iam_token_service_pb2 import CreateIamTokenRequest

        if isinstance(credential, OAuthToken):
            return self._call(
                "Create",
                CreateIamTokenRequest(yandex_passport_oauth_token=credential.token),
                None,
                "IAM refuses the connection's OAuth token: it is expired, revoked or no longer supported. Use an "
                "authorized key of a service account",
            )
        request = CreateIamTokenRequest(jwt=_signed_request(credential, _audience(self._target())))
        clock = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        return self._call(
            "Create",
            request,
            None,
            f"IAM refuses authorized key {credential.key_id} of service account {credential.service_account_id} (from "
            f"{credential.origin}): the key or the account was deleted, or this machine's clock is wrong (it shows "
            f"{clock} UTC). Make a new key with `yc iam key create`",
        )

    def impersonate(self, service_account_id: str, token: IssuedToken) -> IssuedToken:
        """RPC ``IamTokenService.CreateForServiceAccount``."""
        from yandex.cloud.iam.v1.iam_token_service_pb2 import CreateIamTokenForServiceAccountRequest

        return self._call(
            "CreateForServiceAccount",
            CreateIamTokenForServiceAccountRequest(service_account_id=service_account_id),
            token.value,
            f"IAM doesn't let {self._settings.credential.description} impersonate service account {service_account_id} "
            "(impersonate_service_account_id): check that id, and grant the former the role "
            "iam.serviceAccounts.tokenCreator on the latter",
        )

    def _target(self) -> str:
        from airflow_provider_datasphere.client.connection.endpoints import find_endpoints

        try:
            return find_endpoints(self._settings, timeout=IAM_DEADLINE_SECONDS).iam
        except CredentialError:
            raise
        except grpc.RpcError as error:
            raise CredentialUnavailableError(
                f"No token: {self._settings.discovery_endpoint} returned no IAM endpoint: {code_and_details(error)}."
            ) from None

    def _call(self, method: str, request: Any, token: str | None, refusal: str) -> IssuedToken:
        from airflow_provider_datasphere.client.connection.grpc_channel import (
            call_metadata,
            open_channel,
            stub,
            tls_problem,
        )

        target = self._target()
        with open_channel(self._settings, target) as channel:
            try:
                answer = getattr(stub("iam", channel), method)(
                    request, timeout=IAM_DEADLINE_SECONDS, metadata=call_metadata(token)
                )
            except grpc.RpcError as error:
                if problem := tls_problem(error, self._settings, target):
                    raise problem from None
                if error.code() in _REFUSALS:
                    raise CredentialRefusedError(f"{refusal}. ({code_and_details(error)})") from None
                raise CredentialUnavailableError(
                    f"No token: IAM at {target} doesn't answer: {code_and_details(error)}."
                ) from None
        expires_at = answer.expires_at.ToNanoseconds() / 1e9 if answer.HasField("expires_at") else None
        return IssuedToken(answer.iam_token, expires_at)


def _signed_request(key: ServiceAccountKey, audience: str) -> str:
    import jwt

    now = int(time.time())
    claims = {"iss": key.service_account_id, "aud": audience, "iat": now, "exp": now + JWT_LIFETIME_SECONDS}
    try:
        return jwt.encode(claims, key.private_key, algorithm="PS256", headers={"kid": key.key_id})
    except (ValueError, TypeError, jwt.PyJWTError) as error:
        raise CredentialRefusedError(
            f"{key.origin}: the private key can't be read ({type(error).__name__}): it is damaged or isn't an RSA key. "
            "Make a new authorized key with `yc iam key create --service-account-id <id> --output key.json`."
        ) from None


def _audience(iam_target: str) -> str:
    host = iam_target.rpartition(":")[0]
    # Other installations of the cloud have their own audience.
    return f"https://{host}/iam/v1/tokens" if host.startswith("iam.") else JWT_AUDIENCE
