"""A package index that knows one package: what the CLI asks after each command whether there is a newer one."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def package_index(
    address: tuple[str, int], chain: Path, key: Path, package: str, versions: Sequence[str]
) -> Iterator[list[str]]:
    """Serve the simple API (PEP 691) over TLS; gives the list of paths that were asked for so far.

    :param address: host and port to listen on.
    :param chain: PEM files of the certificate and its ``key``.
    :param versions: that the package has.
    """
    asked: list[str] = []
    names = [f"{package}-{version}-py3-none-any.whl" for version in versions]
    files = [{"filename": name, "url": f"https://{address[0]}/{name}", "hashes": {}} for name in names]
    page = json.dumps({"meta": {"api-version": "1.0"}, "name": package, "files": files}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            known = self.path == f"/simple/{package}/"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
            self.send_header("Content-Length", str(len(page) if known else 0))
            self.end_headers()
            if known:
                self.wfile.write(page)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(address, Handler)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(chain, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
