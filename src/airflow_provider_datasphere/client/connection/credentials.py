"""Credentials of a connection: the four kinds, and how an authorized key is read.

Secrets appear in no repr, pickle or message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.secret_detection import shown

_MAKE_KEY = (
    "Make one with `yc iam key create --service-account-id <id> --output key.json` and give that file's whole text"
)
_PEM_BEGIN = "-----BEGIN PRIVATE KEY-----"
_PEM_END = "-----END PRIVATE KEY-----"


class _Confidential:
    """Prevents pickling, so that secrets reach no queue, database or task row."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds secrets and can't be serialized; pass on the connection id instead."
        )

    def __copy__(self) -> _Confidential:
        return self

    def __deepcopy__(self, memo: Any) -> _Confidential:
        return self


@dataclass(frozen=True)
class IamToken(_Confidential):
    """A static IAM token. It isn't refreshed; it lives 12 hours at most."""

    token: str = field(repr=False)

    @property
    def description(self) -> str:
        return "the account of the connection's IAM token"

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.token,)


@dataclass(frozen=True)
class ServiceAccountKey(_Confidential):
    """An authorized key of a service account, which signs requests for IAM tokens.

    :param origin: the field it comes from, for messages.
    """

    key_id: str
    service_account_id: str
    private_key: str = field(repr=False)
    origin: str = "service_account_json"

    @property
    def description(self) -> str:
        return f"service account {self.service_account_id} (by its authorized key {self.key_id})"

    @property
    def secrets(self) -> tuple[str, ...]:
        # Also as it is escaped in JSON.
        return (self.private_key, self.private_key.replace("\n", "\\n"))


@dataclass(frozen=True)
class OAuthToken(_Confidential):
    """An OAuth token of a Yandex account. Yandex Cloud is withdrawing OAuth."""

    token: str = field(repr=False)

    @property
    def description(self) -> str:
        return "the user of the connection's OAuth token"

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.token,)


@dataclass(frozen=True)
class InstanceMetadataCredential(_Confidential):
    """The service account of this VM or Managed Airflow cluster.

    :param address: ``host`` or ``host:port`` of the metadata service.
    """

    address: str

    @property
    def description(self) -> str:
        return f"this machine's service account (metadata service {self.address})"

    @property
    def secrets(self) -> tuple[str, ...]:
        return ()


Credential: TypeAlias = IamToken | ServiceAccountKey | OAuthToken | InstanceMetadataCredential


def read_key_file(path: str, *, origin: str) -> ServiceAccountKey:
    """Read an authorized key from a file on this machine.

    :raises SettingsError: the file can't be read, or isn't an authorized key.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or (
            "it is not a text file" if isinstance(error, UnicodeDecodeError) else "invalid path"
        )
        raise SettingsError(
            f"{origin}={shown(path)}: can't be read: {reason}. The file must exist on every machine that runs "
            "tasks, and on the triggerer's."
        ) from None
    return parse_authorized_key(text, origin=f"{origin}={shown(path)}")


def parse_authorized_key(value: str | Mapping[str, Any], *, origin: str) -> ServiceAccountKey:
    """Read an authorized key as ``yc iam key create`` writes it.

    :param value: its JSON text, or the decoded JSON.
    :param origin: where it comes from, for messages.
    :raises SettingsError: it isn't an authorized key. The message never quotes it.
    """
    key = _decoded(value, origin) if isinstance(value, str) else value
    if not isinstance(key, Mapping):
        raise SettingsError(
            f"{origin}: is JSON, but not an object with id, service_account_id and private_key. {_MAKE_KEY}."
        )
    _refuse_other_kinds(key, origin)
    missing = [name for name in ("id", "service_account_id", "private_key") if not key.get(name)]
    if missing:
        raise SettingsError(f"{origin}: the authorized key has no {' and no '.join(missing)}. {_MAKE_KEY}.")
    return ServiceAccountKey(
        key_id=str(key["id"]),
        service_account_id=str(key["service_account_id"]),
        private_key=_checked_pem(str(key["private_key"]), origin),
        origin=origin,
    )


def _decoded(text: str, origin: str) -> Any:
    text = text.strip().lstrip("\ufeff")
    try:
        value = json.loads(text, strict=False)
        # JSON that was encoded twice is a JSON string of JSON.
        return json.loads(value, strict=False) if isinstance(value, str) else value
    except ValueError as error:
        # Not chained: the error's attributes hold the whole text.
        where = (
            f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "at its start"
        )
    if text.startswith("-----BEGIN") or "PRIVATE KEY-----" in text[:200]:
        hint = "It is the private key alone. "
    elif len(text) < 1000 and "{" not in text and ("/" in text or text.endswith(".json")):
        hint = "It looks like a file's path: put it into service_account_json_path. "
    else:
        hint = ""
    raise SettingsError(f"{origin}: is not JSON ({where}). {hint}{_MAKE_KEY}.")


def _refuse_other_kinds(key: Mapping[str, Any], origin: str) -> None:
    if "client_email" in key or key.get("type") == "service_account":
        kind = "a Google Cloud service account key"
    elif "access_key" in key or ("key_id" in key and "secret" in key):
        kind = "a static access key (for object storage)"
    elif "api_key" in key or ("secret" in key and "private_key" not in key):
        kind = "an API key"
    elif "iam_token" in key:
        kind = "an IAM token: put it into the field iam_token"
    else:
        return
    raise SettingsError(f"{origin}: is {kind}; DataSphere needs an authorized key. {_MAKE_KEY}.")


def _checked_pem(text: str, origin: str) -> str:
    # Shells, .env files and URIs may turn line breaks into the two characters "\n".
    text = text.replace("\\r", "").replace("\\n", "\n").replace("\r", "")
    if _PEM_BEGIN not in text:
        if "-----BEGIN PUBLIC KEY-----" in text:
            found = "it is the public key"
        elif "-----BEGIN ENCRYPTED PRIVATE KEY-----" in text:
            found = "it is encrypted with a passphrase"
        elif "-----BEGIN" in text:
            found = "it is another kind of key"
        else:
            found = "its first line is missing"
        raise SettingsError(f"{origin}: private_key has no line {_PEM_BEGIN!r}: {found}. {_MAKE_KEY}.")
    # The service writes a warning above the key.
    pem = text[text.index(_PEM_BEGIN) :]
    body, end, _ = pem.partition(_PEM_END)
    if not end:
        raise SettingsError(f"{origin}: private_key has no line {_PEM_END!r}: its end is cut off. {_MAKE_KEY}.")
    if "\n" not in body.strip():
        raise SettingsError(f"{origin}: private_key has lost its line breaks. {_MAKE_KEY}.")
    return f"{body.rstrip()}\n{_PEM_END}\n"
