"""What pages show is true: each Python block is whole and uses our names as they are, each link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from form_digest import form_digest

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted([*PROJECT.glob("docs/*.md"), *PROJECT.glob("*.md")])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_REPOSITORY = "https://github.com/airflow-provider-datasphere/airflow-provider-datasphere/blob/main/"
#: The names that a page's blocks may use without saying where they come from.
_OURS = {
    "ForkJobOperator": "operators.jobs",
    "ExecuteJobOperator": "operators.jobs",
    "CancelJobOperator": "operators.jobs",
    "DownloadJobResultsOperator": "operators.results",
    "DataSphereJobSensor": "sensors.jobs",
    "DataSphereHook": "hooks.datasphere",
}


def python_blocks() -> list[Any]:
    return [
        pytest.param(page, text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (language, text) in enumerate(_BLOCK.findall(page.read_text()))
        if language == "python"
    ]


@pytest.mark.parametrize(("page", "text"), python_blocks())
def test_python_blocks_parse_and_use_our_names_as_they_are(page: Path, text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("airflow_provider_datasphere", "datasphere_emulator")
        ):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Call) and _name(node.func) in _OURS:
            kind = getattr(
                importlib.import_module(f"airflow_provider_datasphere.{_OURS[_name(node.func)]}"), _name(node.func)
            )
            known = set(inspect.signature(kind.__init__).parameters) | _AIRFLOWS
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= known


#: Arguments of every task that pages use.
_AIRFLOWS = {
    *("task_id", "retries", "retry_delay", "execution_timeout", "trigger_rule", "pool", "poke_interval", "timeout"),
    *("mode", "soft_fail", "on_failure_callback"),
}


def _name(function: ast.expr) -> str:
    """The class of a call, also of ``.partial``."""
    if isinstance(function, ast.Attribute) and function.attr == "partial":
        return _name(function.value)
    return function.id if isinstance(function, ast.Name) else ""


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = _BLOCK.sub("", page.read_text())
    found = set()
    for _, title in _HEADING.findall(text):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", title).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in _LINK.findall(_BLOCK.sub("", page.read_text())):
        # Of the pages that PyPI shows too.
        own = target.startswith(_REPOSITORY)
        if not own and target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.removeprefix(_REPOSITORY).partition("#")
        place = ((PROJECT if own else page.parent) / path).resolve() if path else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors_of(place)):
            broken.append(target)
    assert broken == []


def test_no_picture_is_older_than_the_form() -> None:
    """``make screenshots`` takes them anew."""
    taken = json.loads((PROJECT / "docs" / "images" / "screenshots.json").read_text())
    shown = {path.stem for path in (PROJECT / "docs" / "images").glob("*.png")}
    assert set(taken) == shown
    assert taken["connection-form"] == form_digest()


def test_external_links_are_recorded() -> None:
    """A list to check by hand, or by a tool, now and then: nothing here asks the network."""
    found = {
        target.partition("#")[0]
        for page in PAGES
        for target in _LINK.findall(_BLOCK.sub("", page.read_text()))
        if target.startswith("http") and not target.startswith((_REPOSITORY, "https://raw.githubusercontent.com/"))
    }
    recorded = set((PROJECT / "docs" / "external_links.txt").read_text().split())
    assert recorded == found
