"""The state that survives a restart, in one SQLite file.

Each change is written before the call that made it is answered. ``synchronous=OFF`` makes that cheap (hundreds of jobs
a second): a killed emulator loses nothing, a power failure may lose the last changes.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Database:
    """Records (``kind``, ``id`` -> JSON value) and log entries of jobs. Used only in the event loop's thread."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        # After a failed start another thread than the loop's may close it.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=OFF")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS records (kind TEXT, id TEXT, value TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID"
        )
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS log_entries (job_id TEXT, number INTEGER, entry TEXT,"
            " PRIMARY KEY (job_id, number)) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes inside, or none. Must not be nested or contain an ``await``."""
        self._connection.execute("BEGIN")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has ended it already
                self._connection.execute("ROLLBACK")
            raise

    def put(self, kind: str, id: str, value: Any) -> None:
        """Insert or replace a record."""
        self._connection.execute(
            "INSERT INTO records VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
            (kind, id, json.dumps(value, separators=(",", ":"))),
        )

    def get(self, kind: str, id: str) -> Any:
        """Return the value of a record, None if there is none."""
        row = self._connection.execute("SELECT value FROM records WHERE kind = ? AND id = ?", (kind, id)).fetchone()
        return None if row is None else json.loads(row[0])

    def all(self, kind: str) -> dict[str, Any]:
        """Return all records of a kind by id."""
        rows = self._connection.execute("SELECT id, value FROM records WHERE kind = ?", (kind,))
        return {id: json.loads(value) for id, value in rows}

    def delete(self, kind: str, id: str) -> None:
        """Delete a record if it exists."""
        self._connection.execute("DELETE FROM records WHERE kind = ? AND id = ?", (kind, id))

    def append_log(self, job_id: str, number: int, entry: Any) -> None:
        """Append an entry to the log of a job."""
        self._connection.execute(
            "INSERT INTO log_entries VALUES (?, ?, ?)", (job_id, number, json.dumps(entry, separators=(",", ":")))
        )

    def log(self, job_id: str) -> list[Any]:
        """Return all log entries of a job, in order."""
        rows = self._connection.execute("SELECT entry FROM log_entries WHERE job_id = ? ORDER BY number", (job_id,))
        return [json.loads(entry) for (entry,) in rows]

    def delete_log(self, job_id: str) -> None:
        """Delete the log of a job."""
        self._connection.execute("DELETE FROM log_entries WHERE job_id = ?", (job_id,))
