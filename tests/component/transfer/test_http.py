"""The HTTP side of presigned URLs, against servers that the emulator isn't."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.connection.proxy import proxy_for
from airflow_provider_datasphere.client.http.client import HttpClient
from airflow_provider_datasphere.client.http.errors import TransferError, TransientTransferError, UrlRejectedError
from airflow_provider_datasphere.client.transfer.presigned_url import PresignedUrl, RangeReader
from datasphere_emulator import Emulator
from http_server import http_client, send, served

if TYPE_CHECKING:
    pass

CONTENT = bytes(range(256)) * 4000
SECRET = "X-Amz-Signature=0123456789abcdef"


def everything(client: HttpClient, url: str, start: int = 0) -> tuple[int, bytes]:
    with client.get(url, start) as body:
        return body.start, b"".join(body.chunks())


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def test_a_storage_that_ignores_ranges_says_so_by_its_start() -> None:
    with served(lambda handler: send(handler, CONTENT)) as (url, _):
        assert everything(HttpClient(), url, 1000) == (0, CONTENT)

        class Links:
            def download_urls(self, *_: object) -> list[Any]:
                raise AssertionError

        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        link = PresignedUrl(Links(), "job", jobs_pb2.File(), url)
        reader = RangeReader(HttpClient(), link, len(CONTENT))
        assert reader.fetch(300_000, 300_500) == CONTENT[300_000:300_500]


def test_another_range_than_asked_for_is_refused() -> None:
    def answer(handler: Any) -> None:
        send(handler, CONTENT[:10], 206, Content_Range=f"bytes 0-9/{len(CONTENT)}")

    with (
        served(answer) as (url, _),
        pytest.raises(TransientTransferError, match="sent a range from 0, requested was one from 5"),
    ):
        everything(HttpClient(), url, 5)


def test_redirects_of_the_storage_are_followed() -> None:
    def answer(handler: Any) -> None:
        if handler.path.startswith("/first"):
            send(handler, b"", 307, Location="/second?x=1")
        else:
            send(handler, CONTENT)

    with served(answer) as (url, asked):
        assert everything(HttpClient(), f"{url}/first") == (0, CONTENT)
        assert asked == ["/first", "/second?x=1"]


def test_connections_are_used_again() -> None:
    ports: list[int] = []

    def answer(handler: Any) -> None:
        ports.append(handler.client_address[1])
        send(handler, CONTENT)

    with served(answer) as (url, _):
        client = HttpClient()
        for _ in range(5):
            everything(client, url)
        assert len(set(ports)) == 1
        client.close()
        everything(client, url)
        assert len(set(ports)) == 2
        client.close()


def test_proxies_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(lambda handler: send(handler, b"by proxy")) as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("http_proxy", proxy)
        assert everything(HttpClient(), f"http://storage.invalid/file?{SECRET}") == (0, b"by proxy")
        assert asked == [f"http://storage.invalid/file?{SECRET}"]
        with served(lambda handler: send(handler, b"direct")) as (direct, _):
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            assert everything(HttpClient(), direct) == (0, b"direct")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_without_a_scheme_is_told_the_password_as_it_is(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    told: list[str] = []

    def answer(handler: Any) -> None:
        told.append(handler.headers["Proxy-Authorization"])
        send(handler, b"by proxy")

    with served(answer) as (proxy, _):
        monkeypatch.setenv(variable, f"us%C3%A9r:p%40ss%25@{proxy.removeprefix('http://')}")
        assert everything(HttpClient(), "http://storage.invalid/file") == (0, b"by proxy")
    assert told == [f"Basic {b64encode('usér:p@ss%'.encode()).decode()}"]


def test_this_machine_is_not_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with served(lambda handler: send(handler, b"direct")) as (direct, _):
        assert everything(HttpClient(), direct) == (0, b"direct")


@pytest.mark.parametrize(
    ("named", "canonical"),
    [
        ("proxy.corp:3128", "http://proxy.corp:3128"),
        ("HTTP://proxy.corp", "http://proxy.corp:80"),
        ("http://proxy.corp:3128/", "http://proxy.corp:3128"),
        ("http://[2001:db8::1]:3128", "http://[2001:db8::1]:3128"),
        ("http://user@proxy.corp:3128", "http://user@proxy.corp:3128"),
        ("http://user:a/b@c#d%@proxy.corp:3128", "http://user:a%2Fb%40c%23d%25@proxy.corp:3128"),
    ],
)
def test_a_proxy_has_one_form_for_all_who_use_it(monkeypatch: pytest.MonkeyPatch, named: str, canonical: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", named)
    assert proxy_for("https://storage.invalid/file") == canonical


@pytest.mark.parametrize(
    "named", ["socks5h://{}proxy.corp:1080", "https://{}proxy.corp", "{}proxy.corp:http", "http://{}"]
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", named.format("user:se@cret@"))
    words = r"proxy for storage\.invalid is '.*://(proxy\.corp.*)?'.*HTTPS_PROXY"
    with pytest.raises(SettingsError, match=words) as caught:
        everything(HttpClient(), f"https://storage.invalid/file?{SECRET}")
    assert not any(word in str(caught.value) for word in ("cret", "user", SECRET))


def test_a_bundle_of_the_environment_may_be_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl names the files of such a directory")
    with Emulator(tls=True) as emulator:
        shutil.copy(str(emulator.root_certificates), tmp_path / "ca.pem")
        subprocess.run(["openssl", "rehash", str(tmp_path)], check=True)
        with pytest.raises(TransferError, match=r"TLS failed.*root_certificates"):
            everything(HttpClient(), emulator.url)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
        assert everything(HttpClient(), emulator.url)[1]


@pytest.mark.parametrize("name", ["nothing.pem", "empty.pem"])
def test_certificates_that_are_none_are_named_with_where_they_come_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty.pem").touch()
    reason = rf"='{tmp_path}/{name}': (can't be read: No such|has no)"
    with pytest.raises(SettingsError, match=f"root_certificates{reason}"):
        HttpClient(str(tmp_path / name))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / name))
    with pytest.raises(SettingsError, match=f"REQUESTS_CA_BUNDLE{reason}"):
        HttpClient()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (500, "", TransientTransferError),
        (503, "<Error><Code>SlowDown</Code><Message>Reduce</Message></Error>", TransientTransferError),
        (429, "", TransientTransferError),
        (400, "<Error><Code>RequestTimeout</Code></Error>", TransientTransferError),
        (401, "", UrlRejectedError),
        (
            403,
            f"<Error><Code>AccessDenied</Code><Message>expired</Message><Url>{SECRET}</Url></Error>",
            UrlRejectedError,
        ),
        (404, "<Error><Code>NoSuchKey</Code></Error>", TransferError),
        (400, "", TransferError),
        (301, "", TransferError),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_errors_are_sorted_and_keep_the_link_to_themselves(
    status: int, body: str, error: type[Exception], method: str
) -> None:
    def answer(handler: Any) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        send(handler, body.encode(), status)

    actions = {
        "GET": lambda link: everything(HttpClient(), link),
        "PUT": lambda link: HttpClient().put(link, io.BytesIO(b"x"), 1),
    }
    with served(answer) as (url, _), pytest.raises(TransferError, match=f"127.0.0.1 answered {status}") as caught:
        actions[method](f"{url}/file?{SECRET}")
    assert type(caught.value) is error
    chain: BaseException | None = caught.value
    while chain is not None:
        assert SECRET not in f"{chain!r} {chain}"
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file", "http://storage.invalid/file", "https://127.0.0.1:9/file"])
def test_who_cannot_be_reached_is_named_without_the_link(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    host = url.split("/")[2].split(":")[0]
    with pytest.raises(
        TransientTransferError, match=f"{host}: (connecting failed|the host name can't be resolved)"
    ) as caught:
        everything(http_client(connect_timeout=2), f"{url}?{SECRET}")
    assert SECRET not in f"{caught.value!r} {caught.value} {caught.value.__cause__} {caplog.text}"


def test_a_body_without_a_length_is_read_to_its_end() -> None:
    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(CONTENT)
        handler.close_connection = True

    with served(answer) as (url, _):
        assert everything(HttpClient(), url) == (0, CONTENT)
