"""What must survive a restart, in one SQLite file.

Every change is written before the call that made it is answered. ``synchronous=OFF`` makes that cheap (hundreds of jobs
a second): a killed emulator loses nothing, a machine that loses power may.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Store:
    """Records (``kind``, ``id`` -> JSON value) and the log entries of jobs. Used by the event loop's thread alone."""

    def __init__(self, path: Path) -> None:
        # The loop's thread is another one than the one that may close it after a failed start.
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS records (kind TEXT, id TEXT, value TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID"
        )
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS log_entries (job_id TEXT, number INTEGER, entry TEXT,"
            " PRIMARY KEY (job_id, number)) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside, or none. Must not be nested, and nothing inside may wait."""
        self._database.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def put(self, kind: str, id: str, value: Any) -> None:
        """Write a record in place of the one there is."""
        self._database.execute(
            "INSERT INTO records VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
            (kind, id, json.dumps(value, separators=(",", ":"))),
        )

    def get(self, kind: str, id: str) -> Any:
        """The record's value, None if there is none."""
        row = self._database.execute("SELECT value FROM records WHERE kind = ? AND id = ?", (kind, id)).fetchone()
        return None if row is None else json.loads(row[0])

    def all(self, kind: str) -> dict[str, Any]:
        """All records of a kind."""
        rows = self._database.execute("SELECT id, value FROM records WHERE kind = ?", (kind,))
        return {id: json.loads(value) for id, value in rows}

    def delete(self, kind: str, id: str) -> None:
        """Remove a record, if it is there."""
        self._database.execute("DELETE FROM records WHERE kind = ? AND id = ?", (kind, id))

    def append_log(self, job_id: str, number: int, entry: Any) -> None:
        """Write a log entry of a job."""
        self._database.execute(
            "INSERT INTO log_entries VALUES (?, ?, ?)", (job_id, number, json.dumps(entry, separators=(",", ":")))
        )

    def log(self, job_id: str) -> list[Any]:
        """All log entries of a job, in order."""
        rows = self._database.execute("SELECT entry FROM log_entries WHERE job_id = ? ORDER BY number", (job_id,))
        return [json.loads(entry) for (entry,) in rows]

    def delete_log(self, job_id: str) -> None:
        """Remove a job's log."""
        self._database.execute("DELETE FROM log_entries WHERE job_id = ?", (job_id,))
