"""Which tests run in one process, one after another, when several processes share them.

``pytest --dist loadgroup`` should do that by marks, but pytest-xdist 3.8 ignores them with pytest 9.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

#: What takes longest comes first, so that no process is left alone at the end.
_ORDER = ("airflow3", "test_two_triggerers", "test_chaos", "airflow2", "test_airflow_facts", "sdk_parity")
_VERSION = re.compile(r"\[(airflow[23]|\d+\.\d+\.\d+)\b")


def group_of(node_id: str) -> str:
    """The group of a test: all that share an Airflow, or whatever their module starts."""
    path, _, test = node_id.partition("::")
    folder, stem = PurePosixPath(path).parent.name, PurePosixPath(path).stem
    if folder != "airflow":
        return folder if folder in ("sdk_parity", "cluster") else node_id
    match = _VERSION.search(test)
    version = match.group(1) if match else ""
    if version.startswith("airflow"):
        return version
    if stem in ("test_browser", "test_outages"):
        return "airflow2" if test == "test_airflow_2" else "airflow3"
    return f"{stem} {version}".strip()


def place_of(node_id: str) -> int:
    """Where a test's group comes in the order of all."""
    group = group_of(node_id)
    return next((place for place, name in enumerate(_ORDER) if group.startswith(name)), len(_ORDER))


class GroupScheduling(LoadScopeScheduling):
    """Sends a group as a whole to one process."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
