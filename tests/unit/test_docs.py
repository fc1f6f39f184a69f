"""The pages for contributors name modules that there are, and every module of the client."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "src" / "airflow_provider_datasphere"
PAGES = [PROJECT / "CONTRIBUTING.md", PROJECT / "docs" / "architecture.md"]
_PATH = re.compile(r"`([\w/.]+(?:\.py|\.md|/))`")
#: "`module.py` (`Name`, `other_name`)"
_NAMES = re.compile(r"`([\w/.]+\.py)` \(((?:`\w+`(?:, )?)+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    named = _PATH.findall(page.read_text())
    assert named
    missing = [name for name in named if not any((root / name).exists() for root in (PROJECT, PACKAGE))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_says_of_a_module_is_defined_there(page: Path) -> None:
    missing = [
        f"{name} in {module}"
        for module, names in _NAMES.findall(page.read_text())
        for name in re.findall(r"\w+", names)
        if name not in defined_in(next(root / module for root in (PROJECT, PACKAGE) if (root / module).exists()))
    ]
    assert missing == []


def defined_in(path: Path) -> set[str]:
    """Names of a module's classes, functions and constants, and those of its classes' methods."""
    tree = ast.parse(path.read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_module_of_the_client_has_its_place_in_the_architecture() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text()
    modules = [path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "client").rglob("*.py")]
    assert [name for name in modules if not name.endswith("__init__.py") and f"`{name}`" not in page] == []


def test_the_longest_lines_are_tables() -> None:
    for page in PAGES:
        long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
        assert long == []
