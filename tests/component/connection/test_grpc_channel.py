"""How the service is reached over real sockets: TLS, discovery, proxies."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from yandex.cloud.datasphere.v2.project_service_pb2 import GetProjectRequest

from airflow_provider_datasphere.client.connection.channels import AsyncChannels, Channels
from airflow_provider_datasphere.client.connection.errors import ServerCertificateError, SettingsError
from airflow_provider_datasphere.client.connection.settings import Settings
from datasphere_emulator import Emulator
from emulated import get_project, settings_of, with_key


@pytest.fixture
def channels(datasphere_emulator: Emulator) -> Iterator[Channels]:
    channels = Channels(with_key(datasphere_emulator))
    yield channels
    channels.close()


# TLS ---------------------------------------------------------------------------------------------------------------


async def test_a_certificate_that_is_not_trusted(
    datasphere_emulator: Emulator, datasphere_emulator_factory: Callable[..., Emulator]
) -> None:
    other = datasphere_emulator_factory()
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    others = str(other.root_certificates)
    for certificates, words in ((None, "a public authority"), (others, others)):
        settings = settings_of(datasphere_emulator, root_certificates=certificates)
        with pytest.raises(ServerCertificateError, match="set the connection's root_certificates") as raised:
            Channels(settings).unary("projects", "Get", request, timeout=10)
        assert words in str(raised.value)
        with pytest.raises(ServerCertificateError):
            await AsyncChannels.shared(settings).unary("projects", "Get", request, timeout=10)


def test_iams_certificate_is_checked_too(datasphere_emulator: Emulator) -> None:
    with pytest.raises(ServerCertificateError, match="root_certificates"):
        Channels(with_key(datasphere_emulator, root_certificates=None)).tokens.token()


def test_a_server_without_tls(datasphere_emulator_factory: Callable[..., Emulator]) -> None:
    emulator = datasphere_emulator_factory(tls=False)
    with pytest.raises(ServerCertificateError, match="doesn't speak TLS"):
        get_project(emulator, Channels(settings_of(emulator, insecure=None)))


def test_insecure(datasphere_emulator_factory: Callable[..., Emulator]) -> None:
    emulator = datasphere_emulator_factory(tls=False)
    assert get_project(emulator, Channels(with_key(emulator))).id == emulator.project_id


def test_root_certificates_that_are_none(datasphere_emulator: Emulator, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"root_certificates='/no/ca.pem': can't be read: No such file"):
        get_project(datasphere_emulator, Channels(settings_of(datasphere_emulator, root_certificates="/no/ca.pem")))
    (tmp_path / "ca.pem").write_text("hello")
    with pytest.raises(SettingsError, match="has no certificate"):
        get_project(
            datasphere_emulator, Channels(settings_of(datasphere_emulator, root_certificates=str(tmp_path / "ca.pem")))
        )


# Discovery ---------------------------------------------------------------------------------------------------------


def yandexcloud(emulator: Emulator, **extra: Any) -> Settings:
    return Settings.from_extra(
        {
            "extra__yandexcloud__service_account_json": json.dumps(emulator.service_account_key()),
            "extra__yandexcloud__endpoint": emulator.endpoint,
            "root_certificates": str(emulator.root_certificates),
            **extra,
        },
        conn_type="yandexcloud",
    )


async def test_a_yandexcloud_connection_finds_its_services(datasphere_emulator: Emulator) -> None:
    settings = yandexcloud(datasphere_emulator)
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    await AsyncChannels.shared(settings).unary("projects", "Get", request, timeout=10)
    channels = Channels(settings)
    assert get_project(datasphere_emulator, channels).id == datasphere_emulator.project_id
    (call,) = datasphere_emulator.journal.calls("Endpoint.List")
    assert call.deadline is not None
    assert call.subject is None
    channels.close()


def test_discovery_that_is_away_is_asked_again(datasphere_emulator: Emulator) -> None:
    datasphere_emulator.faults.inject("Endpoint.List", code="UNAVAILABLE", times=1)
    channels = Channels(yandexcloud(datasphere_emulator))
    with pytest.raises(grpc.RpcError) as raised:
        get_project(datasphere_emulator, channels)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert get_project(datasphere_emulator, channels)


# Proxies -----------------------------------------------------------------------------------------------------------


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that knows CONNECT, and sends every connection to the emulator."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        self.asked: list[str] = []
        self.headers: list[str] = []
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                outer.asked.append(self.rfile.readline().decode().split()[1])
                while line := self.rfile.readline().strip():
                    outer.headers.append(line.decode())
                with socket.create_connection(target) as upstream:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    back = threading.Thread(target=self.copy, args=(upstream, self.connection), daemon=True)
                    back.start()
                    self.copy(self.connection, upstream)

            @staticmethod
            def copy(source: socket.socket, sink: socket.socket) -> None:
                try:
                    while data := source.recv(65536):
                        sink.sendall(data)
                except OSError:
                    pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def proxy(datasphere_emulator: Emulator) -> Iterator[Proxy]:
    server = Proxy(("127.0.0.1", int(datasphere_emulator.endpoint.rpartition(":")[2])))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY"])
async def test_the_environments_proxy_is_used(
    datasphere_emulator: Emulator, proxy: Proxy, no_proxies: pytest.MonkeyPatch, variable: str
) -> None:
    no_proxies.setenv(variable, proxy.url)
    no_proxies.setenv("NO_PROXY", "other.example")
    settings = settings_of(datasphere_emulator, endpoint=f"{variable.lower()}.example:443", root_certificates=None)
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    # The emulator's certificate isn't for that name, which shows that it was reached, through the proxy.
    with pytest.raises(ServerCertificateError):
        Channels(settings).unary("projects", "Get", request, timeout=10)
    with pytest.raises(ServerCertificateError):
        await AsyncChannels.shared(settings).unary("projects", "Get", request, timeout=10)
    assert set(proxy.asked) == {f"{variable.lower()}.example:443"}


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY"])
def test_a_proxy_without_a_scheme_and_with_a_password_is_used(
    datasphere_emulator: Emulator, proxy: Proxy, no_proxies: pytest.MonkeyPatch, variable: str
) -> None:
    no_proxies.setenv(variable, f"user:p%40ss%25@{proxy.url.removeprefix('http://')}")
    target = f"plain-{variable.lower()}.example:443"
    settings = settings_of(datasphere_emulator, endpoint=target, root_certificates=None)
    request = GetProjectRequest(project_id=datasphere_emulator.project_id)
    with pytest.raises(ServerCertificateError):
        Channels(settings).unary("projects", "Get", request, timeout=10)
    assert set(proxy.asked) == {target}
    assert f"Proxy-Authorization: Basic {b64encode(b'user:p@ss%').decode()}" in proxy.headers


def test_no_proxy_for_loopback_and_exceptions(
    datasphere_emulator: Emulator, channels: Channels, proxy: Proxy, no_proxies: pytest.MonkeyPatch
) -> None:
    no_proxies.setenv("https_proxy", proxy.url)
    no_proxies.setenv("NO_PROXY", ".invalid")
    get_project(datasphere_emulator, channels)
    settings = settings_of(datasphere_emulator, endpoint="ds.invalid:443")
    with pytest.raises(grpc.RpcError) as raised:
        Channels(settings).unary("projects", "Get", GetProjectRequest(project_id="p"), timeout=5)
    assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert proxy.asked == []
