"""Waiting for a storage ends when it is told to stop and when nothing moves any more. What is only slow goes on."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.http.client import HttpClient
from airflow_provider_datasphere.client.http.errors import StoppedError, TransferError, TransientTransferError
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from http_server import http_client, send, served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEBIBYTE = 1024 * 1024
CONTENT = bytes(range(256)) * 4000
#: More than the kernels on both sides keep for a connection.
LARGE = 24 * MEBIBYTE


class Storage:
    """Answers that never come to their end, until :attr:`over` is set."""

    def __init__(self) -> None:
        self.over, self.reached = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        self.over.wait(60)

    def no_answer(self, handler: Any) -> None:
        handler.close_connection = True
        self.wait()

    def drip(self, handler: Any, before: bytes, drop: bytes) -> None:
        handler.close_connection = True
        handler.wfile.write(before)
        self.reached.set()
        while not self.over.wait(0.02):
            try:
                handler.wfile.write(drop)
            except OSError:
                return

    def dripping_headers(self, handler: Any) -> None:
        self.drip(handler, b"HTTP/1.1 200 OK\r\nX-Header: ", b"x")

    def dripping_body(self, handler: Any) -> None:
        self.drip(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x")

    def dripping_body_without_a_length(self, handler: Any) -> None:
        self.drip(handler, b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"x")

    def dripping_error(self, handler: Any) -> None:
        self.drip(handler, b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000\r\n\r\n", b"x")

    def stalled_body(self, handler: Any) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nxxx")
        self.wait()

    def unread_upload(self, handler: Any) -> None:
        self.no_answer(handler)

    def unanswered_upload(self, handler: Any) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        self.no_answer(handler)

    def answer_dripping_after_upload(self, handler: Any) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        self.dripping_headers(handler)


DOWNLOADS = [
    "no_answer",
    "dripping_headers",
    "dripping_body",
    "dripping_body_without_a_length",
    "dripping_error",
    "stalled_body",
]
UPLOADS = ["unread_upload", "unanswered_upload", "answer_dripping_after_upload"]


def get(http: HttpClient, url: str, stop: threading.Event) -> None:
    with http.get(url, stop=stop) as body:
        for _ in body.chunks():
            pass


def put(http: HttpClient, url: str, stop: threading.Event) -> None:
    http.put(url, io.BytesIO(bytes(LARGE)), LARGE, stop)


@contextmanager
def storage(kind: str) -> Iterator[tuple[Storage, str, Callable[[HttpClient, str, threading.Event], None]]]:
    one = Storage()
    with served(getattr(one, kind)) as (url, _):
        try:
            yield one, url, put if kind in UPLOADS else get
        finally:
            one.over.set()


@pytest.mark.parametrize("kind", [*DOWNLOADS, *UPLOADS])
def test_a_stop_reaches_whatever_is_waited_for(kind: str) -> None:
    errors: list[BaseException] = []
    stop = threading.Event()
    with storage(kind) as (one, url, transfer):

        def run() -> None:
            try:
                HttpClient().retrying(stop)(transfer, HttpClient(), url, stop)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert one.reached.wait(20)
        stop.set()
        thread.join(10)  # the timeouts are 60 s
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [StoppedError]


def test_a_stop_before_the_request_sends_nothing() -> None:
    stop = threading.Event()
    stop.set()
    with served(lambda handler: send(handler, CONTENT)) as (url, asked):
        for transfer in (get, put):
            with pytest.raises(StoppedError):
                transfer(HttpClient(), url, stop)
        assert asked == []


@pytest.mark.parametrize("kind", [*DOWNLOADS, *UPLOADS])
def test_what_stands_still_ends_as_something_that_may_pass(kind: str) -> None:
    http = http_client(step_timeout=1.0, read_timeout=1.0)
    with storage(kind) as (_, url, transfer), pytest.raises(TransientTransferError, match=r"127\.0\.0\.1"):
        transfer(http, url, threading.Event())


@pytest.mark.parametrize("kind", ["dripping_headers", "dripping_error", "dripping_body_without_a_length"])
def test_what_drips_never_runs_into_the_sockets_timeout(kind: str) -> None:
    with storage(kind) as (_, url, transfer), pytest.raises(TransientTransferError, match=r"127\.0\.0\.1"):
        transfer(http_client(step_timeout=0.5, read_timeout=30), url, threading.Event())


def received(handler: Any, pause: Callable[[int], float]) -> int:
    """Read an upload with pauses: how many bytes came."""
    came, size = 0, int(handler.headers["Content-Length"])
    while came < size:
        time.sleep(pause(came))
        came += len(handler.rfile.read(min(64 * 1024, size - came)))
    return came


def test_an_upload_may_pause_for_longer_than_connecting_may_take() -> None:
    got: list[int] = []

    def answer(handler: Any) -> None:
        got.append(received(handler, lambda came: 0 if came else 1.5))
        send(handler, b"")

    with served(answer) as (url, asked):
        put(http_client(connect_timeout=0.3, step_timeout=20), url, threading.Event())
        assert got == [LARGE]
        assert len(asked) == 1


def test_what_the_kernel_still_has_to_send_is_no_silence_of_the_storage() -> None:
    # A slow line: the kernel took all of it at once, and the storage answers long after that.
    size, got = MEBIBYTE, []

    def answer(handler: Any) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        got.append(received(handler, lambda _: 0.2))
        send(handler, b"")

    with served(answer) as (url, asked):
        http_client(connect_timeout=0.3, read_timeout=2.0, step_timeout=20).put(url, io.BytesIO(bytes(size)), size)
        assert got == [size]
        assert len(asked) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("unread", [False, True])
def test_an_upload_that_is_redirected_arrives_whole(status: int, unread: bool) -> None:
    got: dict[str, bytes] = {}

    def answer(handler: Any) -> None:
        if not (handler.path == "/first" and unread):
            got[handler.path] = handler.rfile.read(int(handler.headers["Content-Length"]))
        if handler.path == "/first":
            handler.close_connection = unread
            send(handler, b"go there", status, Location="/second?x=1", Connection="close" if unread else "keep-alive")
        else:
            send(handler, b"")

    with served(answer) as (url, asked):
        HttpClient().put(f"{url}/first", io.BytesIO(CONTENT[:1000]), 1000)
        assert asked == ["/first", "/second?x=1"]
    assert got.pop("/second?x=1") == CONTENT[:1000]


def test_redirects_in_a_circle_end() -> None:
    def answer(handler: Any) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        send(handler, b"", 307, Location=handler.path)

    with served(answer) as (url, asked), pytest.raises(TransferError, match="redirects"):
        HttpClient().put(url, io.BytesIO(b"x"), 1)
    assert len(asked) == 4


def test_a_child_process_has_connections_and_a_watchdog_of_its_own() -> None:
    ports: list[int] = []
    one = Storage()

    def answer(handler: Any) -> None:
        ports.append(handler.client_address[1])
        if handler.path == "/drip":
            one.dripping_body(handler)
        else:
            send(handler, CONTENT)

    with served(answer) as (url, _):
        try:
            http = http_client(step_timeout=1.0, read_timeout=30)
            get(http, url, threading.Event())
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    get(http, url, threading.Event())
                    get(http, f"{url}/drip", threading.Event())
                except TransientTransferError:
                    code = 0
                finally:
                    os._exit(code)
            deadline = time.monotonic() + 20
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.05)
            if ended == (0, 0):
                os.kill(child, 9)
                os.waitpid(child, 0)
            assert ended == (child, 0)
            get(http, url, threading.Event())
        finally:
            one.over.set()
    parent, in_child, _, parent_again = ports
    assert parent == parent_again != in_child


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "datasphere-http"]


def test_closing_the_client_closes_what_files_came_by() -> None:
    ports: list[int] = []
    closed = threading.Event()

    def answer(handler: Any) -> None:
        ports.append(handler.client_address[1])
        send(handler, CONTENT)
        finish = handler.finish

        def told() -> None:
            finish()
            closed.set()

        handler.finish = told

    before = set(watchdogs())
    with served(answer) as (url, _):
        client = DataSphereClient(
            Settings.from_extra({"iam_token": "t1.x", "endpoint": "127.0.0.1:9", "insecure": True})
        )
        get(client.http, url, threading.Event())
        assert not closed.is_set()
        client.close()
        assert closed.wait(10)
        deadline = time.monotonic() + 10
        while set(watchdogs()) - before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert set(watchdogs()) - before == set()
        get(client.http, url, threading.Event())  # and can be used again
        client.close()
    assert len(set(ports)) == 2
