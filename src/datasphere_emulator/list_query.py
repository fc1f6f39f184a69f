"""Queries of List methods: filter, order and pages."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING, TypeVar

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_FILTER_LENGTH = 1000

_FILTER = re.compile(r"\s*(?P<field>\w+)\s+(?P<operator>\w+|=|!=)\s*\(?(?P<values>[^()]*)\)?\s*")

_Item = TypeVar("_Item")


def parse_filter(text: str) -> frozenset[int] | None:
    """Return the statuses in ``status IN (EXECUTING, SUCCESS)``, None for no filter. Raises StatusError."""
    if not text.strip():
        return None
    if len(text) > MAX_FILTER_LENGTH:
        raise invalid(f"filter: longer than {MAX_FILTER_LENGTH} characters.")
    match = _FILTER.fullmatch(text)
    if match is None:
        raise invalid(f"filter={text!r}: must look like 'status IN (EXECUTING, SUCCESS)'.")
    if match["field"] != "status":
        raise invalid(f"filter: field {match['field']!r} is not supported; the only field is status.")
    if match["operator"].upper() != "IN" or "(" not in text or ")" not in text:
        raise invalid(f"filter={text!r}: the only operator is IN, with its values in parentheses.")
    names = [name.strip().strip("\"'") for name in match["values"].split(",")]
    unknown = [name for name in names if name not in jobs_pb2.JobStatus.keys()]  # noqa: SIM118 (no mapping)
    if unknown:
        raise invalid(f"filter: unknown status {unknown[0]!r}.")
    return frozenset(jobs_pb2.JobStatus.Value(name) for name in names)


def order_key(order: str, seed: int, sequence: int, id: str) -> str:
    """Return the sort key of an item: a string, so that a page token can name a place between items."""
    if order == "oldest":
        return f"{sequence:020d}"
    if order == "newest":
        return f"{10**20 - sequence:020d}"
    return hashlib.sha256(f"{seed} {id}".encode()).hexdigest()


def page(
    items: Iterable[_Item], key: Callable[[_Item], str], page_size: int, page_token: str
) -> tuple[list[_Item], str]:
    """Return one page of items and the token of the next page, "" at the end.

    Items added or removed between two requests don't move other items to another page.

    :raises StatusError: INVALID_ARGUMENT.
    """
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise invalid(f"page_size={page_size}: must be 0..{MAX_PAGE_SIZE}.")
    page_size = page_size or DEFAULT_PAGE_SIZE
    after = ""
    if page_token:
        try:
            label, _, after = base64.urlsafe_b64decode(page_token.encode()).decode().partition(":")
        except ValueError:
            label = ""
        if label != "after":
            raise invalid(f"page_token={page_token!r}: is not a token of this list.")
    rest = sorted((item for item in items if key(item) > after), key=key)
    found = rest[:page_size]
    if len(rest) <= page_size:
        return found, ""
    return found, base64.urlsafe_b64encode(f"after:{key(found[-1])}".encode()).decode()
