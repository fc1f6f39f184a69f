"""Fetching IAM tokens, once per call; :mod:`.credentials` keeps and renews them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import grpc
import tenacity

from airflow_provider_datasphere.client.access_errors import (
    CredentialError,
    CredentialRefusedError,
    CredentialUnavailableError,
)
from airflow_provider_datasphere.client.identity import IamToken, Metadata, OAuthToken, ServiceAccountKey

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.settings import Settings

#: For how long a service that doesn't answer is asked again, seconds; less than the deadline of a caller's own call.
FETCH_SECONDS = 6.0
#: Deadline of a single call, seconds.
CALL_SECONDS = 4.0
#: Audience of the signed request, as the IAM documentation has it.
JWT_AUDIENCE = "https://iam.api.cloud.yandex.net/iam/v1/tokens"
JWT_LIFETIME = 3600

_METADATA_URL = "http://{}/computeMetadata/v1/instance/service-accounts/default/token"
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
    """An IAM token and its end, seconds since the epoch; None: not known."""

    value: str = field(repr=False)
    expires_at: float | None


def fetch_token(settings: Settings) -> IssuedToken:
    """A token for these settings; a service that doesn't answer is asked again for :data:`FETCH_SECONDS`.

    :raises CredentialRefusedError: the credential is no good.
    :raises CredentialUnavailableError: no answer.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(CredentialUnavailableError),
        wait=tenacity.wait_random_exponential(multiplier=0.3, max=2.0),
        stop=tenacity.stop_after_delay(FETCH_SECONDS),
        reraise=True,
    )
    token: IssuedToken = retrying(_fetch, settings)
    return token


def _fetch(settings: Settings) -> IssuedToken:
    credential = settings.credential
    if isinstance(credential, IamToken):
        token = IssuedToken(credential.token, None)
    elif isinstance(credential, Metadata):
        token = _from_metadata(credential)
    else:
        token = _IamClient(settings).exchange(credential)
    if settings.impersonate_service_account_id is None:
        return token
    return _IamClient(settings).impersonate(settings.impersonate_service_account_id, token)


def _from_metadata(credential: Metadata) -> IssuedToken:
    """Ask the machine's metadata service (Compute Cloud documentation, "Authentication from inside a VM")."""
    import requests

    service = f"the metadata service at {credential.address}"
    ways_out = (
        "Outside a VM or Managed Airflow cluster with a service account, fill in a credential of the connection "
        "(service_account_json)."
    )
    session = requests.Session()
    session.trust_env = False  # a link-local address is nothing for a proxy
    asked_at = time.time()
    try:
        answer = session.get(
            _METADATA_URL.format(credential.address), headers={"Metadata-Flavor": "Google"}, timeout=(1.0, CALL_SECONDS)
        )
    except requests.RequestException as error:
        raise CredentialUnavailableError(
            f"No token: {service} doesn't answer ({type(error).__name__}). {ways_out}"
        ) from None
    finally:
        session.close()
    if answer.status_code in (401, 403, 404):
        raise CredentialRefusedError(
            f"No token: {service} answers {answer.status_code}: no service account is attached to this machine. Attach "
            f"one to the VM or cluster. {ways_out}"
        )
    if answer.status_code != 200:
        raise CredentialUnavailableError(f"No token: {service} answers {answer.status_code}. {ways_out}")
    try:
        body = answer.json()
        value, expires_in = str(body["access_token"]), float(body["expires_in"])
    except (ValueError, KeyError, TypeError):
        # Neither chained nor quoted: half a token may be in it.
        raise CredentialUnavailableError(
            f"No token: {service} answers something else than a token. {ways_out}"
        ) from None
    return IssuedToken(value, asked_at + expires_in)


class _IamClient:
    """``yandex.cloud.iam.v1.IamTokenService``, on a connection for one call: tokens are fetched hours apart."""

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
            f"IAM doesn't let {self._settings.credential.description} act as service account {service_account_id} "
            "(impersonate_service_account_id): check that id, and give the former the role "
            "iam.serviceAccounts.tokenCreator on the latter",
        )

    def _target(self) -> str:
        from airflow_provider_datasphere.client.discovery import find_endpoints

        try:
            return find_endpoints(self._settings, timeout=CALL_SECONDS).iam
        except CredentialError:
            raise
        except grpc.RpcError as error:
            raise CredentialUnavailableError(
                f"No token: {self._settings.discovery_endpoint} doesn't tell where IAM is: {_words(error)}."
            ) from None

    def _call(self, method: str, request: Any, token: str | None, refusal: str) -> IssuedToken:
        from airflow_provider_datasphere.client.transport import call_metadata, open_channel, stub, tls_problem

        target = self._target()
        with open_channel(self._settings, target) as channel:
            try:
                answer = getattr(stub("iam", channel), method)(
                    request, timeout=CALL_SECONDS, metadata=call_metadata(token)
                )
            except grpc.RpcError as error:
                if problem := tls_problem(error, self._settings, target):
                    raise problem from None
                if error.code() in _REFUSALS:
                    raise CredentialRefusedError(f"{refusal}. ({_words(error)})") from None
                raise CredentialUnavailableError(
                    f"No token: IAM at {target} doesn't answer: {_words(error)}."
                ) from None
        expires_at = answer.expires_at.ToNanoseconds() / 1e9 if answer.HasField("expires_at") else None
        return IssuedToken(answer.iam_token, expires_at)


def _signed_request(key: ServiceAccountKey, audience: str) -> str:
    import jwt

    now = int(time.time())
    claims = {"iss": key.service_account_id, "aud": audience, "iat": now, "exp": now + JWT_LIFETIME}
    try:
        return jwt.encode(claims, key.private_key, algorithm="PS256", headers={"kid": key.key_id})
    except (ValueError, TypeError, jwt.PyJWTError) as error:
        raise CredentialRefusedError(
            f"{key.origin}: the private key can't be read ({type(error).__name__}): it is damaged or isn't an RSA key. "
            "Make a new authorized key with `yc iam key create --service-account-id <id> --output key.json`."
        ) from None


def _audience(iam_target: str) -> str:
    host = iam_target.rpartition(":")[0]
    # Other installations of the cloud have their own name for it.
    return f"https://{host}/iam/v1/tokens" if host.startswith("iam.") else JWT_AUDIENCE


def _words(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details() or 'no details'}"
