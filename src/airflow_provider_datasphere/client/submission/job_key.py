"""Identity of a task's job: the key of the task's generation, and its tag in the job's description."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

MAX_DESC_CHARACTERS = 200
#: Characters of a description that the tag leaves at least, with the space between the two.
KEPT_DESC_CHARACTERS = 100

_TOKEN = r"airflow:[0-9a-f]{20}"
_TAG = re.compile(rf"\s*\[[^\[\]]*{_TOKEN}[^\[\]]*\]")
_LOOSE_TOKEN = re.compile(rf"\s*{_TOKEN}(?: retries:\d+)?(?: request:[0-9a-f]+)?")
_RECORD = re.compile(rf"({_TOKEN}) retries:(\d+)(?: request:([0-9a-f]+))?\]")


@dataclass(frozen=True)
class Key:
    """The identity of a task's generation, whose jobs carry its token.

    :param parts: what identifies the generation and the operator: DAG, run, the run's start, task, map index, number
        of the generation, operator. Names alone are the same in two deployments, and in a run that was deleted and
        triggered again.
    :param label: for people, in the job's description: ``dag.task run``.
    :param retries: the task's ``retries`` when the job was created.
    :param since: when the run started, by Airflow's clock; ``None`` if unknown.
    """

    parts: tuple[str | int | None, ...]
    label: str
    retries: int
    since: datetime | None = None

    def for_try(self, number: int) -> Key:
        """Return a key of one try alone, for a task that doesn't reattach."""
        return replace(self, parts=(*self.parts, "try", number))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:20]

    @property
    def token(self) -> str:
        return f"airflow:{self.digest}"

    def submission_key(self, ordinal: int) -> str:
        """Return what is the same for each repetition of the same submission, and for no other.

        :param ordinal: number of this key's jobs that ended and can't be adopted.
        """
        return f"{self.digest}-{ordinal}"

    def tag_description(self, desc: str | None, request: str) -> str:
        """Return ``desc`` with this key's tag at its end, and without one that is inherited from a source job.

        :param request: digest of the request that the job is created for.
        """
        base = without_tag(desc or "")
        tail = f" {self.token} retries:{self.retries} request:{request}]"
        room = MAX_DESC_CHARACTERS - len(tail) - 1
        # Of a description that somebody wrote more is kept than of the label, which the token replaces.
        kept = min(len(base) + 1, KEPT_DESC_CHARACTERS) if base else 0
        label = _shorten_middle(re.sub(r"[\[\]]", "", self.label), room - kept)
        tag = f"[{label}{tail}"
        base = _shorten(base, MAX_DESC_CHARACTERS - len(tag) - 1)
        return f"{base} {tag}" if base else tag

    def owns(self, desc: str) -> bool:
        """Return whether a job with this description was created for this key, or inherited its token."""
        return self.token in desc


class Store(Protocol):
    """Where the key's job is recorded, if anywhere: Airflow's task state store."""

    def get(self) -> dict[str, Any] | None: ...

    def set(self, entry: dict[str, Any]) -> None: ...


def retries_of(desc: str) -> int | None:
    """Return the task's ``retries`` when the job with this description was created; ``None`` without a tag."""
    match = _RECORD.search(desc)
    return int(match.group(2)) if match else None


def request_of(desc: str) -> str | None:
    """Return the digest of the request that the job with this description was created for; ``None`` without a tag."""
    match = _RECORD.search(desc)
    return match.group(3) if match else None


def without_tag(desc: str) -> str:
    """Return the description as a person wrote it."""
    return _LOOSE_TOKEN.sub("", _TAG.sub("", desc)).strip()


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 1)] + "…"[: max(0, length)]


def _shorten_middle(text: str, length: int) -> str:
    """Keep both ends, which say the most: the DAG, and the run."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"
