"""The listening servers: gRPC, HTTP (files, pages, control API) and metadata service, in one event loop."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import ssl
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from aiohttp import web

from datasphere_emulator.grpc_handlers import add_handlers
from datasphere_emulator.http_app import build_app, build_metadata_app
from datasphere_emulator.interceptor import JournalInterceptor

if TYPE_CHECKING:
    from datasphere_emulator.access import Access
    from datasphere_emulator.state import EmulatorState
    from datasphere_emulator.tls import Certificates

#: Largest gRPC request, bytes.
_MAX_REQUEST = 64 << 20
_MAX_PENDING = 1_000_000


@dataclasses.dataclass
class Ports:
    """TCP ports; 0 before the start means any free port."""

    grpc: int = 0
    http: int = 0
    metadata: int = 0


class Listeners:
    """All servers of an emulator. :meth:`start` fills in ports that were 0.

    :param host: address to listen on.
    :param metadata_host: address of the metadata service.
    :param certificates: None for plaintext.
    :param access: access rules of the HTTP side.
    """

    def __init__(
        self, host: str, metadata_host: str, ports: Ports, certificates: Certificates | None, access: Access
    ) -> None:
        self._host = host
        self._metadata_host = metadata_host
        self._access = access
        self._ports = ports
        self._certificates = certificates
        self._grpc: Any = None
        self._runners: list[web.AppRunner] = []

    async def start(self, state: EmulatorState) -> None:
        """Start listening.

        :raises OSError: a port is taken.
        """
        tls = None
        if self._certificates is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._certificates.chain, self._certificates.key)
        # HTTP first: gRPC calls return presigned URLs with its address.
        app = build_app(state, self._access)
        self._ports.http = await self._serve(app, self._host, self._ports.http, tls, "--http-port")
        metadata = build_metadata_app(state.iam, state.journal, state.faults, self._access)
        self._ports.metadata = await self._serve(
            metadata, self._metadata_host, self._ports.metadata, None, "--metadata-port"
        )
        await self._start_grpc(state)

    async def _start_grpc(self, state: EmulatorState) -> None:
        server = grpc.aio.server(
            interceptors=[JournalInterceptor(state.journal, state.faults, state.iam)],
            options=[
                ("grpc.max_concurrent_streams", state.settings.max_concurrent_streams),
                # Otherwise grpc rejects calls of a burst: within that limit while it cleans up ended streams, and
                # beyond a thousand calls that wait for this loop.
                ("grpc.http.overload_protection", 0),
                ("grpc.server.max_pending_requests", _MAX_PENDING),
                ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
                ("grpc.max_receive_message_length", _MAX_REQUEST),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would share the calls between them instead of failing to start.
                ("grpc.so_reuseport", 0),
                # Clients may ping idle connections as often as they like.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        add_handlers(state, server)
        address = f"[{self._host}]:{self._ports.grpc}" if ":" in self._host else f"{self._host}:{self._ports.grpc}"
        try:
            if self._certificates is None:
                port = server.add_insecure_port(address)
            else:
                pair = (self._certificates.key.read_bytes(), self._certificates.chain.read_bytes())
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise _cannot_listen(self._host, self._ports.grpc, "--port", error) from error
        self._ports.grpc = port
        await server.start()
        self._grpc = server

    async def _serve(self, app: web.Application, host: str, port: int, tls: ssl.SSLContext | None, option: str) -> int:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
        await runner.setup()
        self._runners.append(runner)
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        try:
            await site.start()
        except OSError as error:
            raise _cannot_listen(host, port, option, error) from error
        address = runner.addresses[0]
        return int(address[1])

    async def stop(self, grace: float | None) -> None:
        """Stop listening. :param grace: seconds that running calls get to end."""
        if self._grpc is not None:
            await self._grpc.stop(grace)
        for runner in self._runners:
            await runner.cleanup()


def _cannot_listen(host: str, port: int, option: str, error: Exception) -> OSError:
    """Return the error of a failed listen. grpc doesn't report the reason, so find it by a bind."""
    number, reason = getattr(error, "errno", None), str(error)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except socket.gaierror as trouble:
        return OSError(f"--host {host}: {trouble.strerror}.")
    except OSError as trouble:
        number, reason = trouble.errno, os.strerror(trouble.errno or 0)
    if number == errno.EADDRINUSE:
        return OSError(
            f"Port {port} on {host} is already in use: choose another with {option}, or 0 for any free port."
        )
    return OSError(f"Failed to listen on {host}, port {port} ({option}): {reason}.")
