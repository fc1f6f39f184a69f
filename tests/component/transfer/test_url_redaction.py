"""Presigned URLs in urllib3's own log lines, from real requests to a real server."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import urllib3

from airflow_provider_datasphere.client.http import url_redaction
from airflow_provider_datasphere.client.http.errors import TransferError
from airflow_provider_datasphere.client.http.url_redaction import without_queries
from http_server import http_client, send, served

SIGNED = "/bucket/file?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=canary&X-Amz-Signature=canary0123"


def fetch(address: str, path: str = SIGNED) -> None:
    http = http_client(max_attempts=1)
    try:
        with http.get(address + path) as body:
            list(body.chunks())
    except TransferError:
        pass
    finally:
        http.close()


def logged(caplog: pytest.LogCaptureFixture) -> str:
    formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
    return "\n".join(formatter.format(record) for record in caplog.records)


@pytest.fixture(autouse=True)
def debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def test_a_request_is_logged_without_its_signature(caplog: pytest.LogCaptureFixture) -> None:
    with served(lambda handler: send(handler, b"body")) as (address, asked):
        fetch(address)
    assert asked == [SIGNED]
    assert '"GET /bucket/file?… HTTP/1.1" 200' in logged(caplog)
    assert "canary" not in logged(caplog)


def test_a_redirect_is_logged_without_either_signature(caplog: pytest.LogCaptureFixture) -> None:
    def answer(handler: Any) -> None:
        if "other" in handler.path:
            send(handler, b"body")
        else:
            send(handler, b"", 307, Location=SIGNED.replace("bucket", "other"))

    with served(answer) as (address, _):
        fetch(address)
    text = logged(caplog)
    assert re.search(r"INFO \S+ Redirecting http://\S+/bucket/file\?… -> \S*/other/file\?…", text)
    assert "canary" not in text


def test_headers_that_can_not_be_read_are_logged_without_the_signature(caplog: pytest.LogCaptureFixture) -> None:
    def answer(handler: Any) -> None:
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nbroken header\r\n"
            b"Location: https://storage/file?X-Amz-Signature=canary\r\nETag: Signature=canary\r\n\r\nbody"
        )
        handler.close_connection = True

    with served(answer) as (address, _):
        fetch(address)
    text = logged(caplog)
    assert re.search(r"WARNING urllib3\S* Failed to parse headers \(url=\S+/bucket/file\?…\)", text)
    assert "HeaderParsingError" in text  # the traceback is there, too
    assert "canary" not in text


def test_broken_connections_and_retries_are_logged_without_the_signature(caplog: pytest.LogCaptureFixture) -> None:
    def answer(handler: Any) -> None:
        if handler.path.startswith("/busy"):
            send(handler, b"", 503, Retry_After="0")
        handler.close_connection = True

    with served(answer) as (address, _):
        fetch(address)
        # Whoever else uses urllib3 in this process, with retries of its own.
        pool = urllib3.PoolManager(retries=urllib3.Retry(2, backoff_factor=0))
        for path in (SIGNED, SIGNED.replace("/bucket", "/busy")):
            with pytest.raises(urllib3.exceptions.HTTPError):
                pool.request("GET", address + path, retries=urllib3.Retry(2, status_forcelist=[503]))
    assert "Retry" in logged(caplog)
    assert "canary" not in logged(caplog)


def test_every_logger_of_urllib3_is_known() -> None:
    spec = find_spec("urllib3")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    modules = [path for path in root.rglob("*.py") if "getLogger(__name__)" in path.read_text()]
    names = {
        ".".join(("urllib3", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for path in modules
        if "emscripten" not in path.parts  # browsers
    }
    assert names <= set(url_redaction._LOGGERS)


def test_the_filter_is_there_once() -> None:
    for _ in range(3):
        http_client().close()
    for name in url_redaction._LOGGERS:
        assert sum(isinstance(f, url_redaction._HideQueries) for f in logging.getLogger(name).filters) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET /a?b=c&d=e HTTP/1.1", "GET /a?… HTTP/1.1"),
        ("'https://h/p?X=1': broken", "'https://h/p?…': broken"),
        ("(url=https://h/p?a=1): what?", "(url=https://h/p?…): what?"),
        ("X-Amz-Signature=abc&y=1", "X-Amz-Signature=…&y=1"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert without_queries(text) == shown
