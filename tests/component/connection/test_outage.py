"""What people read while a service doesn't answer, and at the end."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from airflow_provider_datasphere.client.connection import outage
from airflow_provider_datasphere.client.connection.check import check_connection
from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.errors import JobInfrastructureError
from airflow_provider_datasphere.client.rpc import error_code
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator
from emulated import settings_of


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address of this machine where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"localhost:{held.getsockname()[1]}"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    name = "airflow_provider_datasphere.client.api"
    return lambda: [record.getMessage() for record in caplog.records if record.name == name]


def test_an_outage_is_said_at_once_now_and_then_and_at_its_end(
    nobody: str, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "REMINDER_SECONDS", 0.0)
    client = DataSphereClient(
        Settings.from_extra({"endpoint": nobody, "insecure": True, "iam_token": "t1.x"}),
        retry_timeout=4.0,
        connection="datasphere_default",
    )
    with pytest.raises(JobInfrastructureError) as raised:
        client.get("bt1job")
    first, *reminders = warnings()
    what = f"DataSphere at {nobody} (connection datasphere_default) doesn't answer: connection refused"
    assert first == f"{what}; retrying for up to 4 seconds."
    assert reminders
    assert all(line.startswith(f"{what}; still retrying, for another ") for line in reminders)
    message = str(raised.value)
    assert message.startswith(f"Reading job bt1job failed: {what}. Gave up after 4 seconds. Check the connection's end")
    assert "(UNAVAILABLE: " in message
    assert error_code(raised.value) == "UNAVAILABLE"
    client.close()


def test_the_end_of_an_outage_is_said_too(datasphere_emulator: Emulator, warnings: Callable[[], list[str]]) -> None:
    job_id = datasphere_emulator.create_job()
    datasphere_emulator.faults.inject("Get", code="INTERNAL", message="oops", times=3)
    client = DataSphereClient(settings_of(datasphere_emulator))
    assert client.get(job_id).id == job_id
    assert client.get(job_id).id == job_id
    first, last = warnings()
    where = datasphere_emulator.endpoint
    assert first == (
        f"Reading job {job_id}: DataSphere at {where} answers INTERNAL: oops; retrying for up to 5 minutes."
    )
    assert last == "Connection to DataSphere restored."
    client.close()


def test_no_token_is_said_while_it_is_waited_for(
    datasphere_emulator: Emulator, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_datasphere.client.connection.iam.FETCH_RETRY_SECONDS", 0.2)
    monkeypatch.setenv("YC_METADATA_ADDR", datasphere_emulator.metadata_address)
    datasphere_emulator.faults.inject("metadata.token", status=503, times=4)
    job_id = datasphere_emulator.create_job()
    client = DataSphereClient(settings_of(datasphere_emulator, iam_token=None))
    assert client.get(job_id).id == job_id
    assert warnings()[0].startswith("No token: the metadata service at ")
    assert warnings()[0].endswith("; retrying for up to 5 minutes.")
    client.close()


def test_a_client_without_patience_says_nothing_before_its_error(
    nobody: str, warnings: Callable[[], list[str]]
) -> None:
    settings = Settings.from_extra({"endpoint": nobody, "insecure": True, "iam_token": "t1.x"})
    with pytest.raises(JobInfrastructureError, match=r"connection refused\. Check the connection's endpoint"):
        DataSphereClient(settings, retry_timeout=0.0).get("bt1job")
    assert warnings() == []


def test_a_server_that_expects_tls_is_recognised(
    datasphere_emulator: Emulator, warnings: Callable[[], list[str]]
) -> None:
    settings = settings_of(datasphere_emulator, insecure=True, root_certificates=None)
    with pytest.raises(JobInfrastructureError, match="may expect TLS: remove insecure from the connection"):
        DataSphereClient(settings, retry_timeout=0.5).get("bt1job")
    assert "may expect TLS" in warnings()[0]
    address = datasphere_emulator.endpoint.replace("localhost", "127.0.0.1")
    works, text = check_connection(settings_of(datasphere_emulator, insecure=True, endpoint=address))
    assert not works
    assert "may expect TLS: remove insecure from the connection. Check the connection's endpoint" in text


def test_a_token_is_not_waited_for_where_none_can_come(
    datasphere_emulator: Emulator, nobody: str, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    """No credential in the connection, and this is no VM: five minutes would be in vain."""
    monkeypatch.setenv("YC_METADATA_ADDR", nobody.replace("localhost", "127.0.0.1"))
    begun = time.monotonic()
    with pytest.raises(Exception, match="the connection has no credential, and the metadata service at"):
        DataSphereClient(settings_of(datasphere_emulator, iam_token=None)).get("bt1job")
    assert warnings() == []
    assert time.monotonic() - begun < 60.0  # of the five minutes that passing trouble gets


@pytest.mark.parametrize(
    ("seconds", "text"), [(300, "5 minutes"), (290, "5 minutes"), (100, "100 seconds"), (0, "1 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert outage.duration_text(seconds).startswith(text)
