"""Connection settings: endpoints, credential and project, checked."""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from airflow_provider_datasphere.client.connection.credentials import (
    Credential,
    IamToken,
    InstanceMetadataCredential,
    OAuthToken,
    ServiceAccountKey,
    parse_authorized_key,
    read_key_file,
)
from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.secret_detection import secret_kind, shown

log = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "datasphere.api.cloud.yandex.net:443"
DEFAULT_OPERATION_ENDPOINT = "operation.api.cloud.yandex.net:443"
DEFAULT_IAM_ENDPOINT = "iam.api.cloud.yandex.net:443"
DEFAULT_UI_ENDPOINT = "https://datasphere.yandex.cloud"
DEFAULT_METADATA_ADDRESS = "169.254.169.254"

CREDENTIAL_FIELDS = ("iam_token", "service_account_json", "service_account_json_path", "oauth")
FIELDS = (
    *CREDENTIAL_FIELDS,
    "impersonate_service_account_id",
    "project_id",
    "endpoint",
    "operation_endpoint",
    "iam_endpoint",
    "ui_endpoint",
    "root_certificates",
    "insecure",
)
#: Labels of up to 63 letters, digits, hyphens and (in container networks) underscores.
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
#: Fields of type ``yandexcloud`` that mean nothing to DataSphere.
_FOREIGN_FIELDS = ("folder_id", "public_ssh_key")

OAUTH_WARNING = (
    "The connection uses an OAuth token. Yandex Cloud is withdrawing OAuth; use an authorized key of a service "
    "account (service_account_json), or no credential at all on a VM or Managed Airflow cluster with a service account."
)


def job_url(ui_endpoint: str, community_id: str | None, project_id: str, job_id: str) -> str:
    """Return the URL of a job's page; without the community's id that of the list of projects."""
    if not community_id:
        return f"{ui_endpoint}/projects"
    return f"{ui_endpoint}/communities/{community_id}/projects/{project_id}/job/{job_id}"


def is_loopback(endpoint: str) -> bool:
    """Return whether ``host:port`` is this machine."""
    host = _host(endpoint)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Settings:
    """The settings of a connection.

    :param credential: how to authenticate.
    :param impersonate_service_account_id: service account to impersonate with that credential.
    :param project_id: default project.
    :param endpoint: ``host:port`` of the DataSphere API. Empty while ``discovery_endpoint`` is set.
    :param operation_endpoint: ``host:port`` of OperationService; empty likewise.
    :param iam_endpoint: ``host:port`` of IamTokenService; empty likewise.
    :param discovery_endpoint: ``host:port`` that lists the three above (``ApiEndpointService.List``).
    :param ui_endpoint: base URL of job pages.
    :param root_certificates: path of a PEM file with the certificates to trust; None: the public authorities.
    :param insecure: plaintext without TLS; on loopback only.
    """

    credential: Credential
    impersonate_service_account_id: str | None = None
    project_id: str | None = None
    endpoint: str = DEFAULT_ENDPOINT
    operation_endpoint: str = DEFAULT_OPERATION_ENDPOINT
    iam_endpoint: str = DEFAULT_IAM_ENDPOINT
    discovery_endpoint: str | None = None
    ui_endpoint: str = DEFAULT_UI_ENDPOINT
    root_certificates: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.insecure:
            for field in ("discovery_endpoint", "endpoint", "operation_endpoint", "iam_endpoint"):
                value = getattr(self, field)
                if value and not is_loopback(value):
                    raise SettingsError(
                        f"insecure=true with {field}={shown(value)}: without TLS the token can be read by anybody "
                        "on the network, so only a service on this machine (localhost) is allowed. For a server with "
                        "its own certificate set root_certificates."
                    )

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any], *, conn_type: str = "datasphere") -> Settings:
        """Read a connection's extra fields; empty ones count as absent.

        :param extra: the decoded ``extra``; keys may have Airflow's old prefix ``extra__<type>__``.
        :param conn_type: ``datasphere`` (default), or ``yandexcloud`` with that type's meaning of the fields.
        :raises SettingsError: a field is invalid, or two contradict each other.
        """
        if conn_type not in ("datasphere", "yandexcloud"):
            raise SettingsError(
                f"connection type {shown(conn_type)}: must be datasphere (or yandexcloud). Change the "
                "connection's type."
            )
        fields = _Fields(extra, conn_type)
        if conn_type == "yandexcloud":
            endpoints = _yandexcloud_endpoints(fields)
            credential = _yandexcloud_credential(fields)
        else:
            endpoints = _endpoints(fields)
            credential = _credential(fields)
        if isinstance(credential, OAuthToken):
            warnings.warn(OAUTH_WARNING, DeprecationWarning, stacklevel=2)
        fields.warn_of_unknown()
        return cls(
            credential=credential,
            impersonate_service_account_id=fields.text("impersonate_service_account_id"),
            project_id=fields.text("project_id"),
            ui_endpoint=_ui_endpoint(fields),
            root_certificates=_root_certificates(fields),
            insecure=fields.flag("insecure"),
            **endpoints,
        )

    @property
    def description(self) -> str:
        """The account that the service sees, for messages."""
        if self.impersonate_service_account_id:
            return (
                f"service account {self.impersonate_service_account_id}, impersonated by {self.credential.description}"
            )
        return self.credential.description

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets in these settings, to be masked in logs."""
        return self.credential.secrets

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the settings that reveals no secret."""
        values = {name: value for name, value in vars(self).items() if name != "fingerprint"}
        values["credential"] = [type(self.credential).__name__, vars(self.credential)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class _Fields:
    """A connection's extra, by short name or with Airflow's old prefix; empty values count as absent."""

    def __init__(self, extra: Mapping[str, Any], conn_type: str) -> None:
        self._conn_type = conn_type
        prefix = f"extra__{conn_type}__"
        # The short name wins, as in Airflow's own providers.
        values = {key.removeprefix(prefix): value for key, value in extra.items() if key.startswith(prefix)}
        values |= {key: value for key, value in extra.items() if not key.startswith(prefix) and not _empty(value)}
        self.values = {key: value for key, value in values.items() if not _empty(value)}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def text(self, name: str) -> str | None:
        """Return the value of a field that isn't a secret and may be shown in messages."""
        value = self.values.get(name)
        if value is None:
            return None
        if (kind := secret_kind(value)) is not None:
            raise SettingsError(f"{name}: holds {kind}.")
        return self._string(name, value)

    def secret(self, name: str) -> str:
        value = self._string(name, self.values[name])
        if (kind := secret_kind(value)) is not None and name not in kind:
            raise SettingsError(f"{name}: holds {kind}.")
        if any(character.isspace() or not character.isprintable() or not character.isascii() for character in value):
            raise SettingsError(f"{name}: has blanks, line breaks or characters that no token has. Copy it again.")
        return value

    def _string(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise SettingsError(f"{name}: must be text, is {type(value).__name__}.")
        return value.strip()

    def key(self, name: str) -> ServiceAccountKey:
        value = self.values[name]
        if not isinstance(value, (str, Mapping)):
            raise SettingsError(f"{name}: must be the JSON of an authorized key, is {type(value).__name__}.")
        return parse_authorized_key(value, origin=name)

    def key_file(self, name: str) -> ServiceAccountKey:
        return read_key_file(os.path.expanduser(self.text(name) or ""), origin=name)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        # "y" is what Airflow 2's Test button sends for a tick; no tick sends nothing.
        if word in ("true", "1", "yes", "y", "on"):
            return True
        if word in ("false", "0", "no", "n", "off"):
            return False
        raise SettingsError(f"{name}={shown(value)}: must be true or false.")

    def address(self, name: str) -> str | None:
        value = self.text(name)
        return None if value is None else _address(name, value)

    def warn_of_unknown(self) -> None:
        known = (*FIELDS, *(_FOREIGN_FIELDS if self._conn_type == "yandexcloud" else ()))
        for name in self.values:
            if name not in known:
                similar = difflib.get_close_matches(name, FIELDS, n=1)
                log.warning(
                    "The connection's field %s is unknown%s",
                    shown(name),
                    f"; is {similar[0]!r} meant?" if similar else ".",
                )


def _empty(value: Any) -> bool:
    return value is None or value == {} or (isinstance(value, str) and not value.strip())


def _metadata() -> InstanceMetadataCredential:
    address = os.environ.get("YC_METADATA_ADDR", "").strip()
    return InstanceMetadataCredential(address.removeprefix("http://").rstrip("/") or DEFAULT_METADATA_ADDRESS)


def _credential(fields: _Fields) -> Credential:
    given = [name for name in CREDENTIAL_FIELDS if name in fields]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} are both set: a connection has one credential. Clear all but one.")
    if not given:
        return _metadata()
    name = given[0]
    if name == "iam_token":
        return IamToken(fields.secret(name))
    if name == "oauth":
        return OAuthToken(fields.secret(name))
    return fields.key(name) if name == "service_account_json" else fields.key_file(name)


def _yandexcloud_credential(fields: _Fields) -> Credential:
    # The order of apache-airflow-providers-yandex (its form's help texts say otherwise).
    if "oauth" in fields:
        return OAuthToken(fields.secret("oauth"))
    if "service_account_json_path" in fields:
        return fields.key_file("service_account_json_path")
    if "service_account_json" in fields:
        return fields.key("service_account_json")
    # Not a field of that type, but unambiguous.
    if "iam_token" in fields:
        return IamToken(fields.secret("iam_token"))
    return _metadata()


def _endpoints(fields: _Fields) -> dict[str, str]:
    endpoint = fields.address("endpoint") or DEFAULT_ENDPOINT
    public = _host(endpoint).endswith(".cloud.yandex.net")
    return {
        "endpoint": endpoint,
        "operation_endpoint": fields.address("operation_endpoint")
        or (DEFAULT_OPERATION_ENDPOINT if public else endpoint),
        "iam_endpoint": fields.address("iam_endpoint") or (DEFAULT_IAM_ENDPOINT if public else endpoint),
    }


def _yandexcloud_endpoints(fields: _Fields) -> dict[str, str]:
    endpoint = fields.address("endpoint")
    # The default discovery host lists the hosts that are the defaults here.
    if endpoint in (None, "api.cloud.yandex.net:443"):
        return {}
    return {"discovery_endpoint": endpoint, "endpoint": "", "operation_endpoint": "", "iam_endpoint": ""}


def _ui_endpoint(fields: _Fields) -> str:
    url = fields.text("ui_endpoint") or DEFAULT_UI_ENDPOINT
    if not url.startswith(("https://", "http://")):
        raise SettingsError(f"ui_endpoint={shown(url)}: must be a URL, such as {DEFAULT_UI_ENDPOINT!r}.")
    return url.rstrip("/")


def _root_certificates(fields: _Fields) -> str | None:
    path = fields.text("root_certificates")
    return None if path is None else os.path.expanduser(path)


def _host(endpoint: str) -> str:
    host, separator, port = endpoint.rpartition(":")
    return (host if separator and port.isdigit() else endpoint).strip("[]").lower()


def _address(name: str, value: str) -> str:
    """Return ``host:port``; the default port is 443."""
    wrong = SettingsError(
        f"{name}={shown(value)}: must be host:port, such as {DEFAULT_ENDPOINT!r} (no https://, no path)."
    )
    host, port = _split_address(value)
    # isdecimal() alone accepts digits of all scripts.
    if not (_is_host(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise wrong
    return f"{host}:{port}"


def _split_address(value: str) -> tuple[str, str]:
    if value.startswith("["):
        host, bracket, rest = value.partition("]")
        if not rest:
            return host + bracket, "443"
        # Without a colon the rest is invalid.
        return host + bracket, rest[1:] if rest[0] == ":" else ""
    host, _, port = value.partition(":")
    return host, port or "443"


def _is_host(host: str) -> bool:
    """Return whether this is a host name, an IPv4 address, or an IPv6 address in brackets."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if bare != host or not bare.strip("0123456789."):
        try:
            return isinstance(ipaddress.ip_address(bare), ipaddress.IPv6Address) == (bare != host)
        except ValueError:
            return False
    return len(host) <= 253 and _HOST_NAME.fullmatch(host) is not None
