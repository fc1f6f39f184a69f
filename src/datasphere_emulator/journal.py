"""The journal: all calls to the emulator, in memory and optionally in a file that survives restarts."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Call:
    """A call to the emulator, including rejected calls.

    :param method: short name: methods of ``ProjectJobService`` bare (``Create``, ``ReadLogs``), others with their
        service (``Operation.Get``, ``IamToken.Create``), HTTP as ``storage.get``, ``storage.put``, ``metadata.token``.
    :param subject: id of the account the token belongs to, None without a valid token.
    :param token: first 16 hex digits of the token's sha256, never the token itself.
    :param job_id: the request's job, or the new job of Create and Clone once the handler has answered.
    :param operation_id: the request's operation, or the one in the answer.
    :param deadline: the client's deadline in seconds from arrival; None without one.
    :param time: arrival, seconds since the epoch.
    :param code: name of the final gRPC status (HTTP: OK, or the nearest gRPC status); "" while the call runs.
    :param metadata: request metadata (HTTP: headers), without ``authorization``.
    :param request: the request message as a mapping with the proto's field names, credentials removed.
    :param peer: the client's address.
    :param effect: whether the handler ran: not for a rejected call, but for a call with a lost answer.
    :param finished: end, seconds since the epoch; None while the call runs.
    :param sequence: number in the journal, from 1.
    """

    method: str
    subject: str | None = None
    token: str = ""
    job_id: str = ""
    operation_id: str = ""
    deadline: float | None = None
    time: float = dataclasses.field(default_factory=time.time)
    code: str = ""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    request: dict[str, Any] | None = None
    peer: str = ""
    effect: bool = False
    finished: float | None = None
    sequence: int = 0


class Journal:
    """All calls in the order of their arrival. Thread-safe.

    :param path: JSON Lines file to append to; its calls are read back, so that the journal survives a restart. None for
        memory only.
    :param limit: number of calls kept in memory; older ones are dropped, so that memory stays bounded in load tests.
    """

    def __init__(self, path: Path | None = None, *, limit: int = 500_000) -> None:
        self._lock = threading.Lock()
        self._calls: deque[Call] = deque(maxlen=limit)
        self._sequence = 0
        self._path = path
        if path is not None:
            path.touch(mode=0o600)
            self._read(path)
            # Line-buffered: the kernel has each line before the call proceeds, so a killed emulator loses none.
            self._file = path.open("a", buffering=1, encoding="utf-8")
            if self._sequence:
                self._file.write("\n")  # ends a truncated line

    def _read(self, path: Path) -> None:
        calls: dict[int, Call] = {}
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    call = Call(**json.loads(line))
                except (ValueError, TypeError):
                    continue  # empty, or truncated by a kill
                calls[call.sequence] = call
        self._calls.extend(calls[number] for number in sorted(calls))
        self._sequence = max(calls, default=0)

    def _append(self, call: Call) -> None:
        if self._path is None:
            return
        try:
            self._file.write(json.dumps(dataclasses.asdict(call), separators=(",", ":")) + "\n")
        except OSError as error:
            # Calls must not fail because of the journal.
            logger.error("Failed to write a call to the journal %s: %s", self._path, error)

    def record(self, call: Call) -> Call:
        """Add a call, set its number and return it."""
        with self._lock:
            self._sequence += 1
            call.sequence = self._sequence
            self._calls.append(call)
            self._append(call)
        return call

    def finish(self, call: Call, code: str) -> None:
        """Set the final code of a recorded call. Only the first time counts."""
        with self._lock:
            if call.finished is None:
                call.code = code
                call.finished = time.time()
                self._append(call)

    def calls(
        self,
        method: str | None = None,
        *,
        job_id: str | None = None,
        operation_id: str | None = None,
        subject: str | None = None,
        code: str | None = None,
        since: float | None = None,
    ) -> list[Call]:
        """Return copies of the calls that match all filters, oldest first.

        :param method: short name as in :class:`Call`; the other filters are fields of it too.
        :param since: seconds since the epoch; only calls that arrived then or later.
        """
        with self._lock:
            return [
                dataclasses.replace(call)
                for call in self._calls
                if (method is None or call.method == method)
                and (job_id is None or call.job_id == job_id)
                and (operation_id is None or call.operation_id == operation_id)
                and (subject is None or call.subject == subject)
                and (code is None or call.code == code)
                and (since is None or call.time >= since)
            ]

    def count(self, method: str | None = None, **filters: Any) -> int:
        """Return the number of calls that match the filters of :meth:`calls`."""
        return len(self.calls(method, **filters))

    def clear(self) -> None:
        """Delete all calls, running ones too, also from the file."""
        with self._lock:
            self._calls.clear()
            if self._path is not None:
                self._file.truncate(0)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._path is not None:
                self._file.close()
                self._path = None
