"""What a program imports, read from its source: nothing of it is imported."""

from __future__ import annotations

import ast
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Shown at most, so that a message stays readable.
_MOST_NAMES = 20


def manual_section(cmd: str, base_dir: Path | None, *, version: str = "", requirements_file: str = "") -> str:
    """Return the section ``env.python`` to write in place of an automatic one, in a line of YAML.

    :param cmd: the job's command, whose program is read.
    :param base_dir: what relative paths are relative to; ``None`` reads no file.
    """
    local, packages = (["…"], []) if base_dir is None else _imports(cmd, base_dir)
    requirements = requirements_file or "requirements.txt"
    version = version or f"{sys.version_info.major}.{sys.version_info.minor}"
    block = (
        f"python: {{type: manual, version: '{version}', requirements-file: {requirements}, "
        f"local-paths: [{', '.join(local)}]}}"
    )
    if packages and not requirements_file:
        block += f" and a file {requirements} with the packages of {', '.join(packages[:_MOST_NAMES])}"
    return block


def _imports(cmd: str, base_dir: Path) -> tuple[list[str], list[str]]:
    """Return paths of the program and of what it imports from beside it; and names of other modules."""
    entry = _entry_point(cmd, base_dir)
    if entry is None:
        return [], []
    roots = [base_dir / entry.parent, base_dir]
    found: dict[str, None] = {entry.as_posix(): None}
    others: set[str] = set()
    to_read, read = [base_dir / entry], set()
    while to_read:
        file = to_read.pop()
        if file in read:
            continue
        read.add(file)
        for name in _imported_names(file):
            place = _beside(name, roots)
            if place is None:
                if name not in sys.stdlib_module_names:
                    others.add(name)
                continue
            found[place.relative_to(base_dir).as_posix()] = None
            to_read += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    # A file below a folder keeps its place in the job only as a part of that folder.
    return list(dict.fromkeys(Path(path).parts[0] for path in found)), sorted(others)


def _entry_point(cmd: str, base_dir: Path) -> Path | None:
    """Return the program of a command, relative to the base: ``python train.py``, ``python -m train``, ``train.py``."""
    try:
        words = shlex.split(cmd)
    except ValueError:
        words = cmd.split()
    for number, word in enumerate(words):
        path = Path(word)
        if word == "-m" and number + 1 < len(words):
            path = Path(*words[number + 1].split("."))
            path = path / "__main__.py" if (base_dir / path).is_dir() else path.with_suffix(".py")
        if path.suffix == ".py" and not path.is_absolute() and ".." not in path.parts and (base_dir / path).is_file():
            return path
    return None


def _imported_names(file: Path) -> Iterable[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return list(_names_of(tree))


def _names_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def _beside(name: str, roots: Iterable[Path]) -> Path | None:
    for root in roots:
        for place in (root / name, root / f"{name}.py"):
            if place.is_file() or (place / "__init__.py").is_file():
                return place
    return None
