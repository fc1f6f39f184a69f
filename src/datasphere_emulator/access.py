"""Access control of the HTTP side: the ``Host`` header must name this emulator, the control API needs its secret."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

#: Addresses that only this machine reaches.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def peer_user(request: web.Request) -> int | None:
    """Return the id of the user whose program sent a request over loopback; None if it is unknown."""
    transport = request.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    if not peer or not ipaddress.ip_address(peer[0].partition("%")[0]).is_loopback:
        return None
    assert transport is not None
    ends = (peer[1], transport.get_extra_info("sockname")[1])
    # Linux: "sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid …", addresses as hex:port.
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                fields = line.split()
                if tuple(int(address.rpartition(":")[2], 16) for address in fields[1:3]) == ends:
                    return int(fields[7])
    return None


class NoSecret(Exception):
    """The secret of the control API is missing or wrong."""


@dataclasses.dataclass(frozen=True)
class Access:
    """Access rules of the HTTP side.

    :param secret: secret of the control API.
    :param names: host names of this emulator besides ``localhost``; ``*.domain`` matches all names of a domain.
    """

    secret: str
    names: tuple[str, ...] = ()

    def knows_host(self, header: str) -> bool:
        """Return whether a ``Host`` header names this emulator.

        IP addresses always pass: DNS rebinding needs a name that an attacker points to this machine.
        """
        try:
            host = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            ipaddress.ip_address(host)
        except ValueError:
            names = [name.lower() for name in ("localhost", *self.names)]
            return host in names or any(name.startswith("*.") and host.endswith(name[1:]) for name in names)
        return True

    def check_control(self, request: web.Request) -> None:
        """Check that a request may use the control API, which can run any command.

        :raises PermissionError: the request comes from a web page.
        :raises NoSecret: the secret is missing or wrong.
        """
        if "Origin" in request.headers:
            raise PermissionError("The control API refuses requests from web pages (header Origin).")
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(secret.strip().encode(), self.secret.encode()):
            raise NoSecret(
                "The control API needs its secret in the header 'Authorization: Bearer SECRET'. The emulator prints it "
                "at start and writes it to its ready file and to the file control-secret in its state folder."
            )

    @staticmethod
    def may_have_token(request: web.Request) -> bool:
        """Return whether the metadata service gives a token: not to programs of other users, who could run jobs."""
        return peer_user(request) in (None, 0, os.geteuid())

    @property
    def middleware(self) -> Middleware:
        """Middleware that rejects requests for other hosts with status 421."""

        @web.middleware
        async def check_host(request: web.Request, handler: Handler) -> web.StreamResponse:
            host = request.headers.get("Host", "localhost")
            if not self.knows_host(host):
                text = (
                    f"{host!r} is not a host name of this emulator. To use it, start the emulator with --public-host.\n"
                )
                return web.Response(status=421, text=text)
            return await handler(request)

        return check_host
