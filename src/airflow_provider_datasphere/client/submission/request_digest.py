"""Digests of a request and of its single arguments: recorded beside a job, they tell two requests of a task apart.

The content of inputs isn't part of them: it may be large and far away. An ended job's is compared before the job is
adopted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

#: Characters of a digest: of a whole request; and of one argument, which is too short to guess a secret from.
REQUEST_CHARACTERS, ARGUMENT_CHARACTERS = 8, 4


class Comparable(Protocol):
    """A request, as far as it is compared with another."""

    def comparable_arguments(self) -> Mapping[str, Any]: ...


def argument_digests(request: Comparable) -> dict[str, str]:
    """Return a short digest of each argument's value by the argument's name in messages (``args['RANGE']``)."""
    return {name: _digest(value, ARGUMENT_CHARACTERS) for name, value in request.comparable_arguments().items()}


def request_digest(request: Comparable) -> str:
    """Return a digest that is the same for equal requests and, but for chance, for no others."""
    return _digest(request.comparable_arguments(), REQUEST_CHARACTERS)


def changed_arguments(request: Comparable, recorded: Mapping[str, str]) -> list[str]:
    """Return the names of the arguments that differ from the recorded ones, added and removed ones included."""
    digests = argument_digests(request)
    names = dict.fromkeys((*digests, *recorded))
    return [name for name in names if digests.get(name) != recorded.get(name)]


def _digest(value: Any, characters: int) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:characters]
