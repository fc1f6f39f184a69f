"""The connection's fields: what each means, what is refused, and that no secret shows."""

from __future__ import annotations

import copy
import json
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from airflow_provider_datasphere.client.connection.credentials import (
    IamToken,
    InstanceMetadataCredential,
    OAuthToken,
    ServiceAccountKey,
)
from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.connection.settings import FIELDS, Settings, job_url

PUBLIC = (
    "datasphere.api.cloud.yandex.net:443",
    "operation.api.cloud.yandex.net:443",
    "iam.api.cloud.yandex.net:443",
)


def pem() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


PEM = pem()
KEY = {"id": "ajekey00000000000000", "service_account_id": "ajesa000000000000000", "private_key": PEM}


def endpoints(settings: Settings) -> tuple[str, str, str]:
    return settings.endpoint, settings.operation_endpoint, settings.iam_endpoint


def test_an_empty_connection_is_the_metadata_service_and_the_public_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YC_METADATA_ADDR", raising=False)
    settings = Settings.from_extra({})
    assert settings.credential == InstanceMetadataCredential("169.254.169.254")
    assert endpoints(settings) == PUBLIC
    assert settings.ui_endpoint == "https://datasphere.yandex.cloud"
    assert not settings.insecure
    assert settings.project_id is settings.root_certificates is settings.impersonate_service_account_id is None
    assert settings == Settings(InstanceMetadataCredential("169.254.169.254"))


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_empty_fields_count_as_absent(empty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YC_METADATA_ADDR", raising=False)
    assert Settings.from_extra(dict.fromkeys(FIELDS, empty)) == Settings.from_extra({})


def test_metadata_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YC_METADATA_ADDR", "127.0.0.1:6770")
    assert Settings.from_extra({}).credential == InstanceMetadataCredential("127.0.0.1:6770")


def test_each_credential(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text(json.dumps(KEY))
    assert Settings.from_extra({"iam_token": " t1.abc\n"}).credential == IamToken("t1.abc")
    with pytest.warns(DeprecationWarning, match="OAuth"):
        assert Settings.from_extra({"oauth": "y0_abc"}).credential == OAuthToken("y0_abc")
    for extra in ({"service_account_json": json.dumps(KEY)}, {"service_account_json_path": str(path)}):
        credential = Settings.from_extra(extra).credential
        assert isinstance(credential, ServiceAccountKey)
        assert (credential.key_id, credential.service_account_id) == (KEY["id"], KEY["service_account_id"])
        assert credential.private_key == PEM


@pytest.mark.parametrize("first", ["iam_token", "service_account_json", "service_account_json_path", "oauth"])
@pytest.mark.parametrize("second", ["iam_token", "service_account_json", "service_account_json_path", "oauth"])
def test_two_credentials_are_an_error_that_names_both(first: str, second: str) -> None:
    if first == second:
        return
    with pytest.raises(SettingsError) as raised:
        Settings.from_extra({first: "value-1", second: "value-2"})
    assert first in str(raised.value)
    assert second in str(raised.value)
    assert "value-" not in str(raised.value)


# Authorized keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        KEY,
        json.dumps(KEY),
        json.dumps(json.dumps(KEY)),
        "\ufeff" + json.dumps(KEY, indent=2) + "\n",
        json.dumps({**KEY, "private_key": "PLEASE DO NOT REMOVE THIS LINE! Yandex.Cloud SA Key ID <x>\n" + PEM}),
        json.dumps({**KEY, "private_key": PEM.replace("\n", "\\n")}),
        json.dumps({**KEY, "private_key": PEM.replace("\n", "\r\n")}),
        json.dumps(KEY).replace("\\n", "\n"),
    ],
    ids=["object", "text", "twice encoded", "BOM", "warning line", "escaped ends", "CRLF", "raw line ends"],
)
def test_forms_of_a_key(value: Any) -> None:
    credential = Settings.from_extra({"service_account_json": value}).credential
    assert isinstance(credential, ServiceAccountKey)
    assert credential.private_key == PEM


SECRET = "s3cr3tCanary"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("/home/me/key.json", ["is not JSON", "service_account_json_path"]),
        (f"{{'id': '{SECRET}'}}", ["is not JSON", "yc iam key create"]),
        (PEM, ["is not JSON", "private key alone"]),
        (f'["{SECRET}"]', ["not an object"]),
        (json.dumps({"access_key": {"key_id": "x"}, "secret": SECRET}), ["static access key", "authorized key"]),
        (json.dumps({"api_key": {"id": "x"}, "secret": SECRET}), ["API key"]),
        (json.dumps({"type": "service_account", "client_email": "x", "private_key": SECRET}), ["Google Cloud"]),
        (json.dumps({"iam_token": SECRET, "expires_at": "…"}), ["IAM token", "field iam_token"]),
        (json.dumps({"id": "x", "private_key": SECRET}), ["no service_account_id"]),
        (json.dumps({**KEY, "private_key": SECRET}), ["its first line is missing"]),
        (json.dumps({**KEY, "private_key": PEM.replace("\n", " ")}), ["lost its line breaks"]),
        (json.dumps({**KEY, "private_key": PEM[:900]}), ["its end is cut off"]),
        (json.dumps({**KEY, "private_key": f"-----BEGIN PUBLIC KEY-----\n{SECRET}"}), ["public key"]),
        (json.dumps({**KEY, "private_key": f"-----BEGIN ENCRYPTED PRIVATE KEY-----\n{SECRET}"}), ["encrypted"]),
        (json.dumps({**KEY, "private_key": f"-----BEGIN EC PRIVATE KEY-----\n{SECRET}"}), ["another kind"]),
        (17, ["is int"]),
    ],
)
def test_usual_mistakes_with_keys(value: Any, words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.from_extra({"service_account_json": value})
    text = "".join(traceback.format_exception(raised.value))
    assert str(raised.value).startswith("service_account_json: ")
    for word in words:
        assert word in str(raised.value)
    assert SECRET not in text
    assert PEM[40:80] not in text
    # Nor does a chained exception carry the text along.
    assert raised.value.__cause__ is None


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"service_account_json_path='/no/where.json': can't be read: No such file"):
        Settings.from_extra({"service_account_json_path": "/no/where.json"})
    (tmp_path / "key.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not a text file"):
        Settings.from_extra({"service_account_json_path": str(tmp_path / "key.json")})


def test_a_token_with_a_line_in_it() -> None:
    with pytest.raises(SettingsError, match=r"^iam_token: has blanks") as raised:
        Settings.from_extra({"iam_token": f"Bearer {SECRET}"})
    assert SECRET not in str(raised.value)


# Where the service is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"endpoint": "localhost:9000"}, ("localhost:9000",) * 3),
        ({"endpoint": "ds.example.com"}, ("ds.example.com:443",) * 3),
        ({"endpoint": "other.api.cloud.yandex.net"}, ("other.api.cloud.yandex.net:443", *PUBLIC[1:])),
        ({"endpoint": "notcloud.yandex.net:1"}, ("notcloud.yandex.net:1",) * 3),
        ({"endpoint": "[::1]:9000"}, ("[::1]:9000",) * 3),
        ({"endpoint": "h:1", "operation_endpoint": "o:2", "iam_endpoint": "i:3"}, ("h:1", "o:2", "i:3")),
        ({"iam_endpoint": "i:3"}, (PUBLIC[0], PUBLIC[1], "i:3")),
    ],
)
def test_endpoints(extra: dict[str, str], expected: tuple[str, str, str]) -> None:
    assert endpoints(Settings.from_extra(extra)) == expected


@pytest.mark.parametrize(
    "value",
    [
        "h:²",
        "h:٣",
        "h:0",
        "h:65536",
        "h:000443",
        "h:+1",
        "h:1:2",
        "[::1",
        "[::1]443",
        "[::1]x",
        "[]:1",
        "[h]:1",
        "[127.0.0.1]:1",
        "256.0.0.1:1",
        "1.2.3:1",
        "a..b:1",
        "-a:1",
        "a-:1",
        "a\tb:1",
        "a\nb:1",
        "a\0b:1",
        "a,b:1",
        "\udc80:1",
        "пример.рф:1",
        f"{'a' * 64}:1",
        f"{'a.' * 127}aa:1",
    ],
)
def test_hosts_and_ports_that_do_not_parse_are_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^endpoint=.*must be host:port"):
        Settings.from_extra({"endpoint": value})


@pytest.mark.parametrize("host", ["h", "my_host", "a-b.example.com.", "xn--e1afmkfd.xn--p1ai", "10.0.0.1", "[fe80::1]"])
def test_hosts_of_all_kinds(host: str) -> None:
    assert Settings.from_extra({"endpoint": f"{host}:1"}).endpoint == f"{host}:1"
    assert Settings.from_extra({"endpoint": host}).endpoint == f"{host}:443"


@pytest.mark.parametrize("value", ["https://x.net", "x.net:443/p", "x:y", "x:0", "x:70000", ":443", "a b:1", "a:1:2"])
@pytest.mark.parametrize("field", ["endpoint", "operation_endpoint", "iam_endpoint"])
def test_wrong_endpoints_are_named(field: str, value: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.from_extra({field: value})
    assert str(raised.value).startswith(f"{field}={value!r}: must be host:port")


def test_ui_endpoint() -> None:
    assert Settings.from_extra({"ui_endpoint": "http://localhost:8080/"}).ui_endpoint == "http://localhost:8080"
    with pytest.raises(SettingsError, match=r"ui_endpoint='datasphere.yandex.cloud': must be a URL"):
        Settings.from_extra({"ui_endpoint": "datasphere.yandex.cloud"})


def test_job_url() -> None:
    assert job_url("https://u", "bt1c", "bt1p", "bt1j") == "https://u/communities/bt1c/projects/bt1p/job/bt1j"
    assert job_url("https://u", None, "bt1p", "bt1j") == "https://u/projects"


@pytest.mark.parametrize("value", [True, "true", "True", "1", "yes", "y"])
@pytest.mark.parametrize("endpoint", ["localhost:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:1"])
def test_insecure_on_loopback(value: Any, endpoint: str) -> None:
    assert Settings.from_extra({"insecure": value, "endpoint": endpoint}).insecure


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({}, "endpoint="),
        ({"endpoint": "10.0.0.1:443"}, "endpoint='10.0.0.1:443'"),
        ({"endpoint": "localhost.example.com:443"}, "endpoint="),
        ({"endpoint": "127.0.0.1.nip.io:443"}, "endpoint="),
        ({"endpoint": "localhost:1", "iam_endpoint": "iam.api.cloud.yandex.net"}, "iam_endpoint="),
        ({"endpoint": "localhost:1", "operation_endpoint": "far:1"}, "operation_endpoint="),
    ],
)
def test_insecure_elsewhere_is_refused(extra: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match="insecure=true") as raised:
        Settings.from_extra({"insecure": True, **extra})
    assert named in str(raised.value)


def test_insecure_that_is_neither_true_nor_false() -> None:
    with pytest.raises(SettingsError, match="insecure='maybe': must be true or false"):
        Settings.from_extra({"insecure": "maybe"})


# Other connection types --------------------------------------------------------------------------------------------


def test_yandexcloud_with_its_prefix_and_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YC_METADATA_ADDR", raising=False)
    path = tmp_path / "key.json"
    path.write_text(json.dumps({**KEY, "service_account_id": "ajefile"}))
    prefix = "extra__yandexcloud__"
    extra = {
        f"{prefix}oauth": "y0_abc",
        f"{prefix}service_account_json_path": str(path),
        f"{prefix}service_account_json": json.dumps(KEY),
        f"{prefix}folder_id": "b1g",
        f"{prefix}endpoint": "",
    }
    with pytest.warns(DeprecationWarning, match="OAuth"):
        assert Settings.from_extra(extra, conn_type="yandexcloud").credential == OAuthToken("y0_abc")
    del extra[f"{prefix}oauth"]
    credential = Settings.from_extra(extra, conn_type="yandexcloud").credential
    assert isinstance(credential, ServiceAccountKey)
    assert credential.service_account_id == "ajefile"
    extra["service_account_json_path"] = ""  # an empty short name doesn't hide the prefixed one
    assert Settings.from_extra(extra, conn_type="yandexcloud").credential == credential
    del extra[f"{prefix}service_account_json_path"]
    credential = Settings.from_extra(extra, conn_type="yandexcloud").credential
    assert isinstance(credential, ServiceAccountKey)
    assert credential.service_account_id == KEY["service_account_id"]
    assert endpoints(Settings.from_extra({}, conn_type="yandexcloud")) == PUBLIC
    assert Settings.from_extra({}, conn_type="yandexcloud").credential == InstanceMetadataCredential("169.254.169.254")


def test_yandexcloud_endpoint_is_the_discovery_host() -> None:
    settings = Settings.from_extra({"endpoint": "api.yandexcloud.kz"}, conn_type="yandexcloud")
    assert settings.discovery_endpoint == "api.yandexcloud.kz:443"
    assert endpoints(settings) == ("", "", "")
    assert Settings.from_extra({"endpoint": "api.cloud.yandex.net"}, conn_type="yandexcloud").discovery_endpoint is None


def test_other_types_are_refused() -> None:
    with pytest.raises(SettingsError, match="connection type 'http': must be datasphere"):
        Settings.from_extra({}, conn_type="http")


def test_an_unknown_field_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Settings.from_extra({"projectid": "bt1", "folder_id": "b1g"}, conn_type="yandexcloud")
    assert [record.getMessage() for record in caplog.records] == [
        "The connection's field 'projectid' is unknown; is 'project_id' meant?"
    ]


# Secrets -----------------------------------------------------------------------------------------------------------


def all_kinds() -> list[Settings]:
    with pytest.warns(DeprecationWarning, match="OAuth"):
        return [
            Settings.from_extra({"iam_token": SECRET}),
            Settings.from_extra({"oauth": SECRET}),
            Settings.from_extra({"service_account_json": {**KEY, "private_key": PEM}}),
        ]


def test_no_secret_in_reprs_fingerprints_and_descriptions() -> None:
    for settings in all_kinds():
        text = f"{settings!r} {settings} {settings.credential!r} {settings.fingerprint} {settings.description}"
        assert SECRET not in text
        assert PEM.splitlines()[1] not in text
        assert settings.secrets


def test_secrets_are_not_pickled() -> None:
    for settings in all_kinds():
        with pytest.raises(TypeError, match="holds secrets"):
            pickle.dumps(settings)
        assert copy.deepcopy(settings) == settings


def test_fingerprints_differ_exactly_where_settings_do() -> None:
    extras: list[dict[str, Any]] = [
        {"iam_token": "a"},
        {"iam_token": "b"},
        {"iam_token": "a", "project_id": "p"},
        {"iam_token": "a", "endpoint": "x:1"},
        {"iam_token": "a", "impersonate_service_account_id": "aje"},
        {"iam_token": "a", "root_certificates": "/x.pem"},
        {"service_account_json": KEY},
        {"service_account_json": {**KEY, "private_key": pem()}},
        {},
    ]
    prints = [Settings.from_extra(extra).fingerprint for extra in extras]
    assert len(set(prints)) == len(extras)
    assert prints == [Settings.from_extra(extra).fingerprint for extra in extras]
