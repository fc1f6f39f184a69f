"""Split the bytes of a text stream into lines, progress bars included. Pure: no I/O."""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import Callable, Iterator

#: A longer line is cut into pieces, so that a program that never ends its line can't fill the memory.
MAX_LINE_CHARACTERS = 32_768
#: The shortest time between two shown states of a progress bar, seconds.
BAR_INTERVAL = 1.0

# A terminal driver may put several \r before the \n; a lone \r moves the cursor back to the start of the line.
_LINE_END = re.compile(r"\r*\n|\r+")


class LineSplitter:
    r"""Splits text that arrives in chunks, cut anywhere, into lines.

    ``\n`` and ``\r\n`` end a line. A lone ``\r`` is how progress bars overwrite their line: such a state becomes a line
    too, at most about one per :data:`BAR_INTERVAL`, and always the last one before an ordinary line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
        self._partial_line = ""
        self._fed_at = clock()
        #: Whether the current line overwrites what stood before a \r.
        self._overwriting = False
        self._pending_state: str | None = None
        self._shown_state: str | None = None
        self._shown_at = float("-inf")

    def feed(self, content: bytes, *, final: bool = False) -> Iterator[str]:
        r"""Yield the lines that ``content`` completes. The caller must take them all.

        :param final: nothing follows, so the rest is a line too.
        """
        self._fed_at = self._clock()
        text = self._partial_line + self._decoder.decode(content, final)
        start = 0
        for end in _LINE_END.finditer(text):
            if end.end() == len(text) and not final and text.endswith("\r"):
                break  # perhaps the first half of \r\n
            line, start = text[start : end.start()], end.end()
            yield from self._end_line(line) if text[start - 1] == "\n" else self._overwrite_line(line)
        text = text[start:]
        if text.endswith("\r"):
            text = text.rstrip("\r") + "\r"
        while len(text) > MAX_LINE_CHARACTERS:
            yield from self._end_line(text[:MAX_LINE_CHARACTERS])
            text = text[MAX_LINE_CHARACTERS:]
        self._partial_line = text
        if final:
            self._partial_line = ""
            if text or self._pending_state is not None:
                yield from self._end_line(text, blank=False)

    def idle_bar(self) -> Iterator[str]:
        """Yield the state of a progress bar that hasn't changed for :data:`BAR_INTERVAL`, once."""
        if self._clock() - self._fed_at < BAR_INTERVAL:
            return
        state = self._pending_state
        if (self._overwriting or self._partial_line.endswith("\r")) and self._partial_line.strip():
            state = self._partial_line.rstrip("\r")
        if state is not None and state != self._shown_state:
            yield from self._show(state)

    def _end_line(self, line: str, *, blank: bool = True) -> Iterator[str]:
        overwriting, shown = self._overwriting, self._shown_state
        pending = self._pending_state
        if pending is not None and pending != line:
            yield from self._show(pending)
        self._overwriting, self._pending_state, self._shown_state = False, None, None
        if line == shown or (overwriting and not line.strip()):
            return  # shown already, or it only clears the line
        if line or blank:
            yield from _pieces(line)

    def _overwrite_line(self, state: str) -> Iterator[str]:
        self._overwriting = True
        if not state.strip():
            return
        if state == self._shown_state:
            self._pending_state = None
        elif self._clock() - self._shown_at < BAR_INTERVAL:
            self._pending_state = state
        else:
            yield from self._show(state)

    def _show(self, state: str) -> Iterator[str]:
        self._pending_state, self._shown_state, self._shown_at = None, state, self._clock()
        yield from _pieces(state)


def _pieces(line: str) -> Iterator[str]:
    for start in range(0, max(len(line), 1), MAX_LINE_CHARACTERS):
        yield line[start : start + MAX_LINE_CHARACTERS]
