"""The servers: gRPC, the web side (files, pages, control API) and the metadata service, on one event loop."""

from __future__ import annotations

import dataclasses
import ssl
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from aiohttp import web

from datasphere_emulator.interceptor import JournalInterceptor
from datasphere_emulator.servicers import add_services
from datasphere_emulator.web import build_app, build_metadata_app

if TYPE_CHECKING:
    from datasphere_emulator.core import Core
    from datasphere_emulator.tls import Certificates

#: Largest request, bytes: a job's parameters may be big, and a test may want to see what a client does.
_MAX_REQUEST = 64 << 20
_MAX_PENDING = 1_000_000


@dataclasses.dataclass
class Ports:
    """TCP ports; 0 before the start means any free one."""

    grpc: int = 0
    http: int = 0
    metadata: int = 0


class Servers:
    """All servers of one core. Ports that were 0 are filled in by :meth:`start`.

    :param host: address to listen on.
    :param certificates: None for plaintext.
    """

    def __init__(self, host: str, ports: Ports, certificates: Certificates | None) -> None:
        self._host = host
        self._ports = ports
        self._certificates = certificates
        self._grpc: Any = None
        self._runners: list[web.AppRunner] = []

    async def start(self, core: Core) -> None:
        """Listen.

        :raises OSError: a port is taken.
        """
        tls = None
        if self._certificates is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._certificates.chain, self._certificates.key)
        # The web side first: its address stands in presigned URLs that gRPC calls hand out.
        self._ports.http = await self._serve(build_app(core), self._ports.http, tls)
        metadata = build_metadata_app(core.iam, core.journal, core.faults)
        self._ports.metadata = await self._serve(metadata, self._ports.metadata, None)
        await self._start_grpc(core)

    async def _start_grpc(self, core: Core) -> None:
        server = grpc.aio.server(
            interceptors=[JournalInterceptor(core.journal, core.faults, core.iam)],
            options=[
                ("grpc.max_concurrent_streams", core.settings.max_concurrent_streams),
                # Otherwise grpc drops calls of a burst: within that limit while ended streams are being cleaned away,
                # and beyond a thousand that wait for this loop.
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
        add_services(core, server)
        address = f"{self._host}:{self._ports.grpc}"
        try:
            if self._certificates is None:
                port = server.add_insecure_port(address)
            else:
                pair = (self._certificates.key.read_bytes(), self._certificates.chain.read_bytes())
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise OSError(f"{address}: {error}") from error
        self._ports.grpc = port
        await server.start()
        self._grpc = server

    async def _serve(self, app: web.Application, port: int, tls: ssl.SSLContext | None) -> int:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
        await runner.setup()
        self._runners.append(runner)
        site = web.TCPSite(runner, self._host, port, ssl_context=tls)
        await site.start()
        address = runner.addresses[0]
        return int(address[1])

    async def stop(self, grace: float | None) -> None:
        """Stop listening. :param grace: seconds that running calls get to end."""
        if self._grpc is not None:
            await self._grpc.stop(grace)
        for runner in self._runners:
            await runner.cleanup()
