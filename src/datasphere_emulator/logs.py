"""A job's log: pieces of stdout, stderr and log files in the order they were seen, addressed by offsets.

An offset is a position in the whole log. It counts a header per piece as well, so nobody can compute one from the bytes
received (the service's clients may not either); it may lie inside a piece. It stays valid after a restart, since the
pieces are stored with their order.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
from typing import TYPE_CHECKING, Any

from datasphere_emulator.script import burst_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from datasphere_emulator.store import Store

STDOUT = "stdout"
STDERR = "stderr"
SYSTEM = ".system.log"
PROGRESS = "job_progress.jsonl"

_HEADER = 24


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the log that was seen at once.

    :param time: seconds since the epoch.
    :param source: ``stdout``, ``stderr`` or the path of a log file.
    :param size: bytes.
    :param text: its content, if that is stored with it.
    :param file: name of the file in the job's folder that holds the content, from ``file_offset`` on.
    :param file_offset: bytes.
    :param burst: the content is a scripted burst.
    """

    time: float
    source: str
    size: int
    text: str | None = None
    file: str | None = None
    file_offset: int = 0
    burst: bool = False


class JobLog:
    """One job's log. Used by the event loop's thread alone.

    :param folder: folder of the files that pieces refer to.
    """

    def __init__(self, store: Store, job_id: str, folder: Path) -> None:
        self._store = store
        self._job_id = job_id
        self._folder = folder
        self._pieces: list[Piece] = []
        self._starts: list[int] = []
        self._changed = asyncio.Event()
        self.end = 0
        for stored in store.log(job_id):
            self._add(Piece(**stored))

    def _add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._starts.append(self.end)
        self.end += _HEADER + piece.size

    def append(self, piece: Piece) -> None:
        """Add a piece and wake the readers."""
        values: dict[str, Any] = {
            name: value for name, value in vars(piece).items() if value not in (None, False) or name == "file_offset"
        }
        self._store.append_log(self._job_id, len(self._pieces), values)
        self._add(piece)
        self.wake()

    def write(self, time: float, source: str, text: str) -> None:
        """Add a piece with this text."""
        self.append(Piece(time, source, len(text.encode("utf-8", "surrogateescape")), text=text))

    def system(self, time: float, line: str) -> None:
        """Add a line of ``.system.log``."""
        self.write(time, SYSTEM, line + "\n")

    def wake(self) -> None:
        """Make the readers look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def changed(self) -> asyncio.Event:
        """Set as soon as there is something new (get it anew for each wait, before looking)."""
        return self._changed

    def pieces(self) -> list[Piece]:
        """All pieces so far."""
        return self._pieces

    def piece_at(self, offset: int) -> tuple[Piece, int, int] | None:
        """The piece an offset lies in, the place inside it, and the offset of its end; None at the end of the log."""
        if offset >= self.end:
            return None
        number = bisect.bisect_right(self._starts, offset) - 1
        piece = self._pieces[number]
        inside = max(0, offset - self._starts[number] - _HEADER)
        return piece, inside, self._starts[number] + _HEADER + piece.size

    def content(self, piece: Piece, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a piece."""
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
        """How many bytes of this file are in the log already."""
        return max((piece.file_offset + piece.size for piece in self._pieces if piece.file == file), default=0)
