"""The hook: connections in every form Airflow knows, masking, laziness, the official SDK."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from airflow_provider_datasphere import compat
from airflow_provider_datasphere.client.connection.credentials import ServiceAccountKey
from airflow_provider_datasphere.compat import AirflowException, AirflowFailException
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.hooks import _masking, datasphere
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from datasphere_emulator import Emulator

Connect = Callable[..., DataSphereHook]


@pytest.fixture
def connect(datasphere_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """A hook on the emulator by an environment variable with JSON; keywords change the extra."""

    def connect(conn_type: str = "datasphere", conn_id: str = "datasphere_default", **extra: Any) -> DataSphereHook:
        value = {"conn_type": conn_type, "extra": datasphere_emulator.connection_extra(**extra)}
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(value))
        return DataSphereHook(conn_id)

    return connect


def key_of(emulator: Emulator) -> str:
    return json.dumps(emulator.service_account_key())


# Connections -------------------------------------------------------------------------------------------------------


def test_constructing_does_nothing() -> None:
    hook = DataSphereHook("no_such_connection")
    assert hook.datasphere_conn_id == "no_such_connection"
    assert DataSphereHook().datasphere_conn_id == "datasphere_default"
    with pytest.raises(AirflowException, match="no_such_connection"):
        hook.get_conn()


def test_json_form(datasphere_emulator: Emulator, connect: Connect) -> None:
    hook = connect()
    assert hook.settings.project_id == datasphere_emulator.project_id
    assert hook.settings is hook.settings
    assert hook.get_conn() is hook.get_conn()
    job_id = datasphere_emulator.create_job()
    assert hook.get_conn().get_job(job_id).id == job_id


@pytest.mark.parametrize("form", ["query", "extra"])
def test_uri_form(datasphere_emulator: Emulator, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    extra = datasphere_emulator.connection_extra(iam_token=None, service_account_json=key_of(datasphere_emulator))
    uri = (
        f"datasphere://?{urlencode(extra)}"
        if form == "query"
        else f"datasphere://?__extra__={quote(json.dumps(extra))}"
    )
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", uri)
    works, text = DataSphereHook().test_connection()
    assert works, text
    assert datasphere_emulator.service_account_id in text


def test_flags_of_a_uri(datasphere_emulator_factory: Callable[..., Emulator], monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = datasphere_emulator_factory(tls=False)
    extra = {**emulator.connection_extra(), "insecure": "true"}
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", f"datasphere://?{urlencode(extra)}")
    works, text = DataSphereHook().test_connection()
    assert works, text


def test_yandexcloud_type(datasphere_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {
        "extra__yandexcloud__service_account_json": key_of(datasphere_emulator),
        "extra__yandexcloud__endpoint": datasphere_emulator.endpoint,
        "extra__yandexcloud__folder_id": "b1gfolder",
        "root_certificates": str(datasphere_emulator.root_certificates),
    }
    monkeypatch.setenv("AIRFLOW_CONN_YANDEXCLOUD_DEFAULT", json.dumps({"conn_type": "yandexcloud", "extra": extra}))
    works, text = DataSphereHook("yandexcloud_default").test_connection()
    assert works, text
    assert datasphere_emulator.service_account_id in text
    assert datasphere_emulator.journal.calls("Endpoint.List")


def test_two_connections_in_one_process(datasphere_emulator: Emulator, connect: Connect) -> None:
    other = datasphere_emulator.iam.add_service_account("other")
    datasphere_emulator.iam.set_role(other, datasphere_emulator.project_id, "viewer")
    job_id = datasphere_emulator.create_job()
    hooks = {
        datasphere_emulator.service_account_id: connect(conn_id="one"),
        other: connect(conn_id="two", iam_token=datasphere_emulator.iam.issue_token(other)),
    }
    for _ in range(2):
        for account, hook in hooks.items():
            hook.get_conn().get(job_id)
            assert datasphere_emulator.journal.calls("Get")[-1].subject == account


def test_a_wrong_field_is_not_retried(connect: Connect) -> None:
    hook = connect(oauth="y0_canary", iam_token="t1.canary")
    for attempt in (lambda: hook.settings, hook.get_conn, lambda: asyncio.run(hook.aget_client())):
        with pytest.raises(JobRequestError, match="iam_token and oauth are both set") as raised:
            attempt()
        assert isinstance(raised.value, AirflowFailException)
    works, text = hook.test_connection()
    assert (works, "both set" in text, "canary" in text) == (False, True, False)


def test_an_extra_that_is_not_json(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = SimpleNamespace(conn_type="datasphere", extra='{"iam_token": "t1.canary"', host=None)
    monkeypatch.setattr(DataSphereHook, "get_connection", lambda *_: connection)
    with pytest.raises(JobRequestError, match="'datasphere_default': its extra is not valid JSON") as raised:
        DataSphereHook().get_conn()
    assert "canary" not in "".join(traceback.format_exception(raised.value))
    connection.extra = '["t1.canary"]'
    with pytest.raises(JobRequestError, match="must be a JSON object"):
        DataSphereHook().get_conn()


def test_fields_without_meaning_are_named(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = connect()
    value = json.loads(os.environ["AIRFLOW_CONN_DATASPHERE_DEFAULT"])
    monkeypatch.setenv(
        "AIRFLOW_CONN_DATASPHERE_DEFAULT", json.dumps({**value, "host": "ds.example.com", "password": "t1.canary"})
    )
    said: list[Any] = []
    monkeypatch.setattr(DataSphereHook, "log", SimpleNamespace(warning=lambda *arguments: said.append(arguments)))
    assert hook.settings
    ((text, *arguments),) = said
    assert "datasphere_default: its host and password are ignored;" in text % tuple(arguments)
    assert "canary" not in text % tuple(arguments)


LOCKBOX = """
import json
from airflow.secrets import BaseSecretsBackend

class Lockbox(BaseSecretsBackend):
    '''As the LockboxSecretBackend of apache-airflow-providers-yandex: JSON by the secret's name.'''

    def __init__(self, secrets):
        super().__init__()
        self.secrets = json.loads(secrets)

    def get_conn_value(self, conn_id, team_name=None):
        return self.secrets.get(f"airflow/connections/{conn_id}")
"""


def test_a_secrets_backend(datasphere_emulator: Emulator, tmp_path: Path) -> None:
    extra = datasphere_emulator.connection_extra(iam_token=None, service_account_json=key_of(datasphere_emulator))
    connection = {"conn_type": "datasphere", "host": "", "port": None, "schema": "", "login": "", "extra": extra}
    (tmp_path / "lockbox_like.py").write_text(LOCKBOX)
    secrets = json.dumps({"airflow/connections/datasphere_default": json.dumps(connection)})
    program = (
        "from airflow_provider_datasphere.hooks.datasphere import DataSphereHook; import asyncio\n"
        "print('RESULT', *DataSphereHook().test_connection())\n"
        "print('ASYNC', asyncio.run(DataSphereHook().aget_settings()).project_id)\n"
    )
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
        "AIRFLOW__SECRETS__BACKEND": "lockbox_like.Lockbox",
        "AIRFLOW__SECRETS__BACKEND_KWARGS": json.dumps({"secrets": secrets}),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert f"RESULT True Connected as service account {datasphere_emulator.service_account_id}" in done.stdout, done
    assert f"ASYNC {datasphere_emulator.project_id}" in done.stdout
    secret = datasphere_emulator.service_account_key()["private_key"].splitlines()[1]
    assert secret not in done.stdout + done.stderr


# Coroutines --------------------------------------------------------------------------------------------------------


async def test_coroutines(datasphere_emulator: Emulator, connect: Connect) -> None:
    hook = connect(iam_token=None, service_account_json=key_of(datasphere_emulator))
    settings = await hook.aget_settings()
    assert isinstance(settings.credential, ServiceAccountKey)
    first, second = await asyncio.gather(hook.aget_client(), connect().aget_client())
    assert first is second  # who asks at the same time shares the reading, and all that it takes


async def test_a_thousand_coroutines_read_the_connection_once(
    datasphere_emulator: Emulator, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    reads = []
    read = DataSphereHook._aget_connection

    async def counted(hook: DataSphereHook) -> Any:
        reads.append(hook)
        return await read(hook)

    monkeypatch.setattr(DataSphereHook, "_aget_connection", counted)
    clients = await asyncio.gather(*(DataSphereHook().aget_client() for _ in range(1000)))
    assert len(reads) == 1
    assert len({id(client) for client in clients}) == 1


async def test_a_changed_connection_is_another_client(
    datasphere_emulator: Emulator, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasphere, "SHARED_READING_SECONDS", 0.0)
    first = await connect().aget_client()
    assert await DataSphereHook().aget_client() is first
    second = await connect(iam_token="t1.another").aget_client()
    assert second.settings.secrets != first.settings.secrets
    monkeypatch.setattr(datasphere, "SHARED_READING_SECONDS", 3600.0)
    assert await connect().aget_client() is second  # read a moment ago


async def test_a_reading_that_failed_is_not_shared_with_those_that_come_later(
    datasphere_emulator: Emulator, connect: Connect
) -> None:
    broken = connect(project_id=None, iam_token="t1.x", oauth="y0_x")
    results = await asyncio.gather(broken.aget_client(), DataSphereHook().aget_client(), return_exceptions=True)
    assert [type(result) for result in results] == [JobRequestError, JobRequestError]
    assert (await connect().aget_client()).settings.secrets


async def test_many_coroutines_at_once(datasphere_emulator: Emulator, connect: Connect) -> None:
    connect(iam_token=None, service_account_json=key_of(datasphere_emulator))
    hooks = [DataSphereHook() for _ in range(50)]
    settings = await asyncio.gather(*(hook.aget_settings() for hook in hooks))
    assert len({one.fingerprint for one in settings}) == 1


# Secrets -----------------------------------------------------------------------------------------------------------


def redacted(text: str) -> str:
    """What Airflow's log of this process shows of a text."""
    return str(import_module(_masking._MASKERS[0]).redact(text))


def test_secrets_and_tokens_are_masked(datasphere_emulator: Emulator, connect: Connect) -> None:
    key = datasphere_emulator.service_account_key()
    hook = connect(iam_token=None, service_account_json=json.dumps(key))
    hook.get_conn().get_project(datasphere_emulator.project_id)
    token = hook.get_conn().channels.tokens.token()
    assert token not in redacted(f"log: {token}.")
    assert key["private_key"] not in redacted(f"log: {key['private_key']}")
    assert json.dumps(key["private_key"])[1:-1] not in redacted(f"log: {json.dumps(key)}")
    oauth = connect(iam_token=None, oauth="y0_CanaryOfOauth", conn_id="oauth")
    with pytest.warns(DeprecationWarning, match="OAuth"):
        assert oauth.settings
    assert "Canary" not in redacted("log: y0_CanaryOfOauth")


@pytest.mark.skipif(not compat.AIRFLOW_V_3_0_PLUS, reason="Airflow 2 has no supervisor")
async def test_the_supervisor_is_told_from_safe_places_only(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    async def asend(message: Any) -> None:
        told.append(("loop", message.value))

    runner = import_module("airflow.sdk.execution_time.task_runner")
    monkeypatch.setattr(runner, "SUPERVISOR_COMMS", SimpleNamespace(asend=asend), raising=False)
    monkeypatch.setattr(compat, "mask_secret", lambda secret: told.append(("main", secret)))
    # A thread (a token is used by a log reader, say): not there.
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_masking.mask_token("t1.inthread")))
    thread.start()
    thread.join()
    assert (answers, told) == ([False], [])
    assert "inthread" not in redacted("t1.inthread")
    # A coroutine in the loop's thread.
    assert _masking.mask_token("t1.inloop")
    while _masking._pending:
        await asyncio.sleep(0)
    assert told == [("loop", "t1.inloop")]


@pytest.mark.skipif(not compat.AIRFLOW_V_3_0_PLUS, reason="Airflow 2 has no supervisor")
def test_the_main_thread_tells_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(compat, "mask_secret", told.append)
    assert _masking.mask_token("t1.inmain")
    assert told == ["t1.inmain"]


def test_copies_and_pickles_hold_no_secret(datasphere_emulator: Emulator, connect: Connect) -> None:
    hook = connect(iam_token="t1.CanaryInPickle")
    assert hook.get_conn()
    for again in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert again.datasphere_conn_id == hook.datasphere_conn_id
        assert again.settings == hook.settings
    assert b"CanaryInPickle" not in pickle.dumps(hook)
    assert "CanaryInPickle" not in repr(hook)
    assert "CanaryInPickle" not in repr(vars(hook))


def test_importing_the_hook_is_cheap() -> None:
    program = (
        "import sys\n"
        "from airflow_provider_datasphere import compat\n"
        "before = set(sys.modules)\n"
        "import airflow_provider_datasphere.hooks.datasphere, airflow_provider_datasphere.links.jobs\n"
        "airflow_provider_datasphere.hooks.datasphere.DataSphereHook()\n"
        "heavy = ('grpc', 'yandex', 'yandexcloud', 'datasphere', 'requests', 'jwt', 'google')\n"
        "print('HEAVY', sorted(m for m in set(sys.modules) - before if m.split('.')[0] in heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


# The official SDK --------------------------------------------------------------------------------------------------


def test_get_sdk_without_the_package(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasphere", None)
    monkeypatch.setitem(sys.modules, "datasphere.client", None)
    with pytest.raises(JobRequestError, match=r"get_sdk\(\) needs .*pip install .*datasphere>=0.10"):
        connect().get_sdk()
