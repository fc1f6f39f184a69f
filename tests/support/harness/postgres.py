"""A PostgreSQL server for the Airflows of one test process: own folder, own port, gone with the process.

Managed Airflows run on PostgreSQL. SQLite locks the whole file, loses updates under load and makes busy components
give up, which says nothing about the provider.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.server_process import ServerProcess, unprivileged_user

#: Nobody else uses the server, and nothing has to survive the machine.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "300",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "log_min_messages": "fatal",
}
_PROGRAMS = ("initdb", "postgres", "psql", "createdb", "dropdb", "pg_dump")


@functools.cache
def programs() -> Path | None:
    """The folder of PostgreSQL's programs; None where it isn't installed or can't run."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    usable = [folder for folder in folders if all((folder / name).exists() for name in _PROGRAMS)]
    return usable[0] if usable and (os.getuid() != 0 or unprivileged_user(*PostgresServer.users)) else None


@functools.cache
def server() -> PostgresServer:
    """The server of this process, started when it is first needed."""
    server = PostgresServer()
    server.start()
    return server


class PostgresServer(ServerProcess):
    """``trust`` for everybody on the loopback interface.

    :param survives: whether what was committed survives :meth:`kill`.
    """

    name = "PostgreSQL"
    users = ("postgres",)

    def __init__(self, *, survives: bool = False) -> None:
        folder = programs()
        assert folder is not None
        self._programs = folder
        super().__init__()
        self._settings = _SETTINGS | ({"synchronous_commit": "on"} if survives else {})
        options = ("-U", "airflow", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions")
        self._run("initdb", "-D", self.path / "data", *options)

    def command(self) -> Sequence[str | Path]:
        settings = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        data = self.path / "data"
        return [self._programs / "postgres", "-D", data, "-p", str(self.port), "-k", self.path, *settings]

    def answers(self) -> bool:
        return self._try("psql", *self._at("postgres"), "-qc", "select 1").returncode == 0

    def create_database(self, name: str, dump: Path | None = None) -> None:
        """Make a database, with the content of a dump."""
        self._run("createdb", *self._connection(), name)
        if dump is not None:
            with dump.open("rb") as content:
                self._run("psql", *self._at(name), "-qX", "-v", "ON_ERROR_STOP=1", stdin=content)

    def drop_database(self, name: str) -> None:
        self._run("dropdb", *self._connection(), "--if-exists", "--force", name)

    def dump(self, name: str, path: Path) -> None:
        """Write all of a database down for :meth:`create_database`."""
        done = self._run("pg_dump", *self._connection(), "--no-owner", name)
        path.write_bytes(done.stdout)

    def url(self, name: str) -> str:
        """The database as SQLAlchemy wants it."""
        return f"postgresql+psycopg2://airflow@127.0.0.1:{self.port}/{name}"

    def query(self, name: str, sql: str) -> list[tuple[Any, ...]]:
        """Rows of a query, in autocommit."""
        import psycopg2

        connection = psycopg2.connect(host="127.0.0.1", port=self.port, user="airflow", dbname=name)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    def _connection(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "airflow"]

    def _at(self, name: str) -> list[str]:
        return [*self._connection(), "-d", name]

    def _try(self, program: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
        command = self.as_user([self._programs / program, *arguments])
        run: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run
        return run(command, capture_output=True, cwd=self.path, **options)

    def _run(self, program: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
        done = self._try(program, *arguments, **options)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stderr.decode(errors='replace')[-3000:]}")
        return done
