"""A Redis server as Celery's broker: each message is on disk before it is acknowledged, as on clusters that keep it."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from harness.server_process import ServerProcess


def program() -> str | None:
    """Redis' server; None where it isn't installed."""
    return shutil.which("redis-server")


class RedisServer(ServerProcess):
    """A server of its own, for whoever is on the loopback interface."""

    name = "Redis"
    users = ("redis",)

    def command(self) -> Sequence[str | Path]:
        executable = program()
        assert executable is not None
        settings = {
            "--bind": "127.0.0.1",
            "--port": str(self.port),
            "--dir": str(self.path),
            "--appendonly": "yes",
            "--appendfsync": "always",
            "--save": "",
            "--daemonize": "no",
        }
        return [executable, *(word for setting in settings.items() for word in setting)]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    @property
    def url(self) -> str:
        """Its first database, as Celery wants it."""
        return f"redis://127.0.0.1:{self.port}/0"
