"""An HTTP server that answers as a test wants, also as the emulator never would, and clients with other limits."""

from __future__ import annotations

import http.server
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.client.http.client import HttpClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def served(answer: Callable[[Any], None]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers with ``answer(handler)``; its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self)

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: Any, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def http_client(root_certificates: str | None = None, **limits: float) -> HttpClient:
    """A client whose timeouts, attempts or backoff, attributes of its class, are other ones."""
    assert all(hasattr(HttpClient, name) for name in limits)
    return type("HttpClient", (HttpClient,), limits)(root_certificates)
