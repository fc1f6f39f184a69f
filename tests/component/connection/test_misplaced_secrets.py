"""Secrets that somebody has put into the wrong field of a connection: recognised, masked, and never shown."""

from __future__ import annotations

import asyncio
import json
import traceback
from importlib import import_module
from typing import Any

import pytest

from airflow_provider_datasphere.client.connection.settings import FIELDS
from airflow_provider_datasphere.client.secret_detection import possible_secrets, secret_kind, shown
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.hooks import _masking
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook

CANARY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDCanaryCanary01"
PEM = f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n{CANARY}\n-----END PRIVATE KEY-----\n"
KEY = {"id": "ajekey00000000000000", "service_account_id": "ajesa000000000000000", "private_key": PEM}
TOKEN = "t1.9euelZqCanary" + "Canary0123456789" * 12

MISPLACED = {
    "key": (json.dumps(KEY), "service_account_json"),
    "key in lines": (json.dumps(KEY, indent=2), "service_account_json"),
    "key in a string": (json.dumps(json.dumps(KEY)), "service_account_json"),
    "key with a mark": ("\ufeff" + json.dumps(KEY), "service_account_json"),
    "half a key": (json.dumps(KEY)[:120], "service_account_json"),
    "key as an object": (KEY, "service_account_json"),
    "pem": (PEM, "service_account_json"),
    "pem in one line": (PEM.replace("\n", "\\n"), "service_account_json"),
    "pem without its ends": (f"{CANARY}\n{CANARY}", "key or certificate"),
    "iam token": (TOKEN, "iam_token"),
    "header": (f"Bearer {TOKEN}", "iam_token"),
    "oauth": ("y0_AgAAAACanary" + "Canary01" * 5, "oauth"),
    "api key": ("AQVNCanary" + "Canary01" * 5, "API key"),
}
PLAIN_FIELDS = [name for name in FIELDS if name not in ("iam_token", "oauth", "service_account_json", "insecure")]


def everything_said(hook: DataSphereHook, said: pytest.CaptureFixture[str]) -> str:
    """All that a hook on this connection says: its errors with their tracebacks, Test, and logs."""
    texts: list[str] = []
    for way in (lambda: hook.settings, hook.get_conn, lambda: asyncio.run(hook.aget_settings())):
        try:
            way()
        except JobRequestError as error:
            texts += traceback.format_exception(error)
    texts.append(str(hook.test_connection()))
    return "".join(texts) + "".join(said.readouterr())


def connect(monkeypatch: pytest.MonkeyPatch, **extra: Any) -> DataSphereHook:
    value = {"conn_type": "datasphere", "extra": {"iam_token": "t1.x", **extra}}
    if "service_account_json_path" in extra or "oauth" in extra or "service_account_json" in extra:
        del value["extra"]["iam_token"]
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", json.dumps(value))
    return DataSphereHook()


@pytest.mark.parametrize("form", MISPLACED)
@pytest.mark.parametrize("field", PLAIN_FIELDS)
def test_a_secret_in_another_field_is_recognised_and_not_shown(
    field: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret, place = MISPLACED[form]
    hook = connect(monkeypatch, **{field: secret})
    with pytest.raises(JobRequestError, match=f"^{field}: holds .*{place}"):
        hook.get_conn()
    said = everything_said(hook, capsys) + caplog.text
    assert "Canary" not in said
    assert "PRIVATE KEY-----" not in said


@pytest.mark.parametrize("form", MISPLACED)
@pytest.mark.parametrize("field", ["iam_token", "oauth", "insecure"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_secret_in_the_field_of_another_kind_of_secret_is_not_shown(
    field: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret, place = MISPLACED[form]
    hook = (
        connect(monkeypatch, **{field: secret}, endpoint="localhost:1", insecure=True)
        if field != "insecure"
        else (connect(monkeypatch, insecure=secret))
    )
    if place != field and form != "header":
        with pytest.raises(JobRequestError, match=f"^{field}"):
            hook.get_conn()
    said = everything_said(hook, capsys) + caplog.text
    assert "Canary" not in said


@pytest.mark.parametrize("field", ["service_account_json_path", "project_id", "iam_token", "service_account_json"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_is_masked_before_it_is_looked_at(field: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with it, in whatever library."""
    # Not like those of other tests: Airflow's masker takes either of two secrets that begin alike.
    pem = PEM.replace("-----\nMII", f"-----\n{field[:4]}{asynchronous:d}MII")
    text = json.dumps({**KEY, "id": f"{field}{asynchronous:d}", "private_key": pem})
    hook = connect(monkeypatch, **{field: text})
    seen: list[str] = []

    def look(connection: Any) -> None:
        redact = import_module(_masking._MASKERS[0]).redact
        seen.extend(str(redact(f"error: {secret}!")) for secret in (text, pem, pem.replace("\n", "\\n")))
        raise JobRequestError("oh")

    monkeypatch.setattr(hook, "_read", look)
    with pytest.raises(JobRequestError, match="oh"):
        asyncio.run(hook.aget_settings()) if asynchronous else hook.settings
    assert len(seen) == 3
    assert [line for line in seen if "MIIEv" in line] == []


@pytest.mark.parametrize(
    "value",
    [
        "/opt/airflow/secrets/Key2.json",
        "~/key.json",
        "keys/key.json",
        "key",
        "bt1abcdefghijklmnopq",
        "ajeabcdefghijklmnopq",
        "datasphere.api.cloud.yandex.net:443",
        "https://datasphere.yandex.cloud",
        "t1.example.com:443",
        "[::1]:443",
    ],
)
def test_what_belongs_there_is_no_secret_and_is_shown(value: str) -> None:
    assert secret_kind(value) is None
    assert shown(value) == repr(value)
    assert possible_secrets({"endpoint": value}) == ()


@pytest.mark.parametrize(
    "value",
    ["user:password@host:443", "https://user:password@host", "YCPxAbCdEf0123456789AbCdEf0123456789AbCd", "x" * 101],
)
def test_what_may_be_a_secret_is_not_quoted(value: str) -> None:
    assert shown(value) == f"a text of {len(value)} characters"


def test_certificates_in_place_of_their_path_are_told_apart() -> None:
    pem = f"-----BEGIN CERTIFICATE-----\n{CANARY}\n-----END CERTIFICATE-----\n"
    assert secret_kind(pem) == "the certificates themselves: give the path of a PEM file instead"


@pytest.mark.parametrize("path", ["no\0path.json", "\udc80.json", "x/" * 3000 + "key.json"])
def test_a_path_that_is_none_is_a_clear_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow_provider_datasphere.client.connection.certificates import read_certificates
    from airflow_provider_datasphere.client.connection.errors import SettingsError
    from airflow_provider_datasphere.client.connection.settings import Settings

    with pytest.raises(SettingsError, match=r"^service_account_json_path=.*: can't be read: "):
        Settings.from_extra({"service_account_json_path": path})
    with pytest.raises(SettingsError, match=r"^root_certificates=.*: can't be read: "):
        read_certificates(path)
