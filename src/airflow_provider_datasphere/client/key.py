"""Whose job it is: the key of a task's generation, and its mark in a job's description."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

MAX_DESC_CHARACTERS = 200
#: So much of a description is kept at least, with the blank after it.
KEPT_DESC_CHARACTERS = 100

_MARK = re.compile(r"\s*\[[^\[\]]*\bairflow:[0-9a-f]{20}\b[^\[\]]*\]")
_RETRIES = re.compile(r"\bairflow:[0-9a-f]{20} retries:(\d+)\]")


@dataclass(frozen=True)
class Key:
    """Whose job it is.

    :param parts: what identifies the generation: dag, run, task, map index, number.
    :param label: for people, in the job's description: ``dag.task run``.
    :param retries: the task's ``retries`` when the job was made.
    :param since: no job of this key is older.
    """

    parts: tuple[str | int, ...]
    label: str
    retries: int
    since: datetime | None = None

    def for_try(self, number: int) -> Key:
        """A key of one try alone, for a task that doesn't attach to what an earlier try left."""
        return replace(self, parts=(*self.parts, "try", number))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:20]

    @property
    def token(self) -> str:
        return f"airflow:{self.digest}"

    def repeated(self, ordinal: int) -> str:
        """The same for each repetition of the same Clone, and for no other: not for that of a run that was deleted
        and made again under its old name.

        :param ordinal: how many of this key's jobs are of no use any more.
        """
        return f"{self.digest}-{self.since.isoformat() if self.since else ''}-{ordinal}"

    def describe(self, desc: str | None) -> str:
        """``desc`` with this key's mark at its end; a mark inherited from a source job is removed."""
        base = _MARK.sub("", desc or "").strip()
        tail = f" {self.token} retries:{self.retries}]"
        room = MAX_DESC_CHARACTERS - len(tail) - 1
        # A description that somebody wrote comes before the label, which the token makes up for.
        kept = min(len(base) + 1, KEPT_DESC_CHARACTERS) if base else 0
        label = _shorten_middle(re.sub(r"[\[\]]", "", self.label), room - kept)
        mark = f"[{label}{tail}"
        base = _shorten(base, MAX_DESC_CHARACTERS - len(mark) - 1)
        return f"{base} {mark}" if base else mark


class Store(Protocol):
    """Where the key's job is written down, if anywhere: Airflow's task state store."""

    def get(self) -> dict[str, Any] | None: ...

    def set(self, entry: dict[str, Any]) -> None: ...


def retries_of(desc: str) -> int | None:
    """The task's ``retries`` when the job with this description was made; ``None`` without a mark."""
    match = _RETRIES.search(desc)
    return int(match.group(1)) if match else None


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 1)] + "…"[: max(0, length)]


def _shorten_middle(text: str, length: int) -> str:
    """Both ends say the most: the DAG, and the run."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"
