"""A job's log: pieces of stdout, stderr and log files in the order they were read, addressed by offsets.

An offset is a position in the whole log, which may be inside a piece. It includes a header per piece, so clients can't
compute it from the bytes received; the service doesn't allow that either. It stays valid after a restart, since pieces
are stored in order.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
from typing import TYPE_CHECKING, Any

from datasphere_emulator.script import burst_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from datasphere_emulator.database import Database

STDOUT = "stdout"
STDERR = "stderr"
SYSTEM = ".system.log"
PROGRESS = "job_progress.jsonl"

_HEADER = 24


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the log that was read at once.

    :param time: seconds since the epoch.
    :param source: ``stdout``, ``stderr`` or the path of a log file.
    :param size: bytes.
    :param text: content, if it is stored in the database.
    :param file: name of the file in the job's folder that holds the content, from ``file_offset`` on.
    :param file_offset: offset in that file, bytes.
    :param burst: the content is that of a scripted burst.
    """

    time: float
    source: str
    size: int
    text: str | None = None
    file: str | None = None
    file_offset: int = 0
    burst: bool = False


class JobLog:
    """The log of one job. Used only in the event loop's thread.

    :param folder: folder of the files that pieces refer to.
    """

    def __init__(self, database: Database, job_id: str, folder: Path) -> None:
        self._database = database
        self._job_id = job_id
        self._folder = folder
        self._pieces: list[Piece] = []
        self._starts: list[int] = []
        self._changed = asyncio.Event()
        self.end = 0
        for stored in database.log(job_id):
            self._add(Piece(**stored))

    def _add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._starts.append(self.end)
        self.end += _HEADER + piece.size

    def append(self, piece: Piece) -> None:
        """Append a piece and wake the readers."""
        values: dict[str, Any] = {
            name: value for name, value in vars(piece).items() if value not in (None, False) or name == "file_offset"
        }
        self._database.append_log(self._job_id, len(self._pieces), values)
        self._add(piece)
        self.wake()

    def write(self, time: float, source: str, text: str) -> None:
        """Append a piece with this text. :param time: seconds since the epoch."""
        self.append(Piece(time, source, len(text.encode("utf-8", "surrogateescape")), text=text))

    def system(self, time: float, line: str) -> None:
        """Append a line to ``.system.log``. :param time: seconds since the epoch."""
        self.write(time, SYSTEM, line + "\n")

    def wake(self) -> None:
        """Wake the readers: the log or the job has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def changed(self) -> asyncio.Event:
        """Event of the next change; get it before reading, once per wait."""
        return self._changed

    def pieces(self) -> list[Piece]:
        """Return all pieces so far."""
        return self._pieces

    def piece_at(self, offset: int) -> tuple[Piece, int, int] | None:
        """Return the piece at an offset, the position inside it, and its end's offset; None at the log's end."""
        if offset >= self.end:
            return None
        number = bisect.bisect_right(self._starts, offset) - 1
        piece = self._pieces[number]
        inside = max(0, offset - self._starts[number] - _HEADER)
        return piece, inside, self._starts[number] + _HEADER + piece.size

    def content(self, piece: Piece, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes of a piece."""
        stop = piece.size if stop is None else min(stop, piece.size)
        if piece.text is not None:
            return piece.text.encode("utf-8", "surrogateescape")[start:stop]
        if piece.burst:
            return burst_bytes(start, stop)
        assert piece.file is not None
        with (self._folder / piece.file).open("rb") as file:
            file.seek(piece.file_offset + start)
            return file.read(stop - start)

    def consumed(self, file: str) -> int:
        """Return how many bytes of a file are already in the log."""
        return max((piece.file_offset + piece.size for piece in self._pieces if piece.file == file), default=0)
