"""The progress file of a program, which may append to it or overwrite it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

if TYPE_CHECKING:
    from pathlib import Path

#: Size of the tail that is read, bytes.
_MAX_TAIL = 1 << 20


def parse_progress(text: str) -> jobs_pb2.JobProgress | None:
    """Return the last complete progress message in a text, None if there is none.

    :param text: one JSON object, or one per line: ``{"progress": 40, "message": "…", "create_time": RFC 3339}``.
    """
    for candidate in (text, *reversed(text.splitlines())):
        try:
            values = json.loads(candidate)
            message = jobs_pb2.JobProgress(progress=int(values["progress"]), message=str(values.get("message", "")))
            if values.get("create_time"):
                created = Timestamp()
                created.FromJsonString(values["create_time"])
                message.create_time.CopyFrom(created)
            return message
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return None


class ProgressFile:
    """Reads what is new in a progress file.

    :param reported: content that was reported before a restart.
    """

    def __init__(self, path: Path, reported: bytes = b"") -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._content = reported
        self._restarted = bool(reported)

    def read(self) -> tuple[str, jobs_pb2.JobProgress | None]:
        """Return new text and the last message, ``("", None)`` if nothing is new."""
        try:
            stat = self._path.stat()
            if self._seen == (stat.st_mtime_ns, stat.st_size):
                return "", None
            with self._path.open("rb") as file:
                file.seek(max(0, stat.st_size - _MAX_TAIL))
                content = file.read()
        except FileNotFoundError:
            return "", None
        self._seen = (stat.st_mtime_ns, stat.st_size)
        if self._restarted and self._content.endswith(content):
            # For an overwritten file ``reported`` has all contents so far; the file has the last one.
            self._content = content
        self._restarted = False
        appended = content.startswith(self._content)
        new = content[len(self._content) :] if appended else content
        message = parse_progress(content.decode("utf-8", "replace"))
        # An incomplete line is read again when it is complete.
        if message is None or not new:
            return "", None
        if appended and not new.endswith((b"\n", b"}")):
            new = new[: new.rfind(b"\n") + 1]
            if not new:
                return "", None
            content = self._content + new
        self._content = content
        return new.decode("utf-8", "replace"), message
