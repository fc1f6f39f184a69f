"""Instance types of DataSphere that are known by name; the service's list grows, so that no other is an error."""

from __future__ import annotations

import difflib

#: From "Computing resource configurations" of the service's documentation, and its price list.
INSTANCE_TYPES = (
    "c1.4",
    "c1.8",
    "c1.32",
    "c1.80",
    "g1.1",
    "g1.2",
    "g1.4",
    "gt4.1",
    "gt4i.1",
    "g2.1",
    "g2.2",
    "g2.4",
    "g2.8",
)


def unknown_type(name: str) -> str | None:
    """Return what to say about a type that isn't in the list; ``None`` about one that is."""
    if name in INSTANCE_TYPES:
        return None
    near = difflib.get_close_matches(name.strip().lower().replace("-", "."), INSTANCE_TYPES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(INSTANCE_TYPES)}."
    return f"{name!r} is no instance type that this version knows; {hint}"
