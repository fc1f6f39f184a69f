"""A configuration as a tree of text, each value with its place: read from YAML, or made of a mapping.

Every scalar is text, as in the official SDK (YAML's ``BaseLoader``): ``3.10`` stays ``3.10``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from airflow_provider_datasphere.client.configuration.faults import Faults, Place

#: How a Jinja template begins, in files that are checked before Airflow renders them.
_TEMPLATE = re.compile(r"\{\{|\{%")


@dataclass(frozen=True)
class Value:
    """A value and its place.

    :param content: text, a list, or a mapping; ``None`` for nothing: an empty value, or None.
    :param keys: of a mapping: where each key stands.
    :param style: how the text is written in YAML: ``">"`` for folded; empty for plain.
    """

    content: str | list[Value] | dict[str, Value] | None
    place: Place
    keys: Mapping[str, Place] = field(default_factory=dict)
    style: str = ""

    @property
    def text(self) -> str:
        """The text, or nothing: an empty value is empty text in YAML."""
        return self.content if isinstance(self.content, str) else ""

    @property
    def kind(self) -> str:
        """What it is, for messages."""
        if self.content is None or self.content == "":
            return "empty"
        return {str: "text", list: "a list", dict: "a mapping"}[type(self.content)]


def is_template(text: str) -> bool:
    """Return whether the text has a Jinja template in it, so that its value isn't known yet."""
    return bool(_TEMPLATE.search(text))


def read_yaml(text: str, file: str, faults: Faults) -> Value | None:
    """Return the document of a file; ``None`` if it isn't one.

    :param file: its name in messages.
    """
    import yaml

    # The one in C is ten times as fast, and isn't in every build of PyYAML.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        node = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = getattr(error, "problem", None) or str(error)
        faults.add(Place(file, mark.line + 1 if mark else 0), f"this is not YAML: {what}.{_yaml_hint(text, mark)}")
        return None
    except ValueError as error:  # characters that YAML doesn't allow
        faults.add(Place(file), f"this is not YAML: {error}.")
        return None
    if node is None:
        faults.add(Place(file), "the configuration is empty: it needs at least cmd.")
        return None
    return _YamlReader(file, faults).value(node, "")


def _yaml_hint(text: str, mark: Any) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return " YAML is indented with spaces; this line begins with a tab."
    if re.search(r":\s*\{\{", line):
        return " Write a value that begins with a template in quotes: '{{ … }}'."
    if line.count(": ") > 1:
        return " Write a value with a colon in it in quotes."
    return ""


class _YamlReader:
    def __init__(self, file: str, faults: Faults) -> None:
        self._file, self._faults = file, faults
        self._values: dict[int, Value] = {}
        self._open: set[int] = set()

    def value(self, node: Any, name: str) -> Value:
        """Return the node's value; an alias's is its anchor's, at its first place."""
        if id(node) in self._values:
            return self._values[id(node)]
        place = Place(self._file, node.start_mark.line + 1, name)
        if id(node) in self._open:
            self._faults.add(place, "this value contains itself.")
            return Value(None, place)
        self._open.add(id(node))
        value = self._read(node, place)
        self._open.discard(id(node))
        self._values[id(node)] = value
        return value

    def _read(self, node: Any, place: Place) -> Value:
        if node.id == "scalar":
            return Value(node.value, place, style=node.style or "")
        if node.id == "sequence":
            items = [self.value(item, f"{place.field}[{number}]") for number, item in enumerate(node.value)]
            return Value(items, place)
        entries: dict[str, Value] = {}
        keys: dict[str, Place] = {}
        for key_node, value_node in node.value:
            key_place = Place(self._file, key_node.start_mark.line + 1, place.field)
            if key_node.id != "scalar":
                self._faults.add(key_place, "a key must be text.")
                continue
            key = key_node.value
            if key in keys:
                self._faults.add(key_place, f"{key!r} stands here and in line {keys[key].line}: keep one of the two.")
            keys.setdefault(key, key_place)
            entries[key] = self.value(value_node, _field(place.field, key))
        return Value(entries, place, keys)


def read_mapping(config: Mapping[Any, Any], faults: Faults) -> Value:
    """Return a mapping of a DAG as a document; numbers and True become text as YAML has it."""
    return _of(config, "", faults)


def _of(value: Any, name: str, faults: Faults) -> Value:
    place = Place(field=name)
    if value is None or isinstance(value, str):
        return Value(value, place)
    if isinstance(value, bool):
        return Value("true" if value else "false", place)
    if isinstance(value, float):
        faults.add(place, f"{value!r} is a number with a point, which loses digits (3.10 is 3.1): write it in quotes.")
        return Value(None, place)
    if isinstance(value, (int, PurePath)):
        return Value(str(value), place)
    if isinstance(value, Mapping):
        entries = {str(key): _of(part, _field(name, str(key)), faults) for key, part in value.items()}
        return Value(entries, place, dict.fromkeys(entries, place))
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return Value([_of(part, f"{name}[{number}]", faults) for number, part in enumerate(value)], place)
    faults.add(place, f"a {type(value).__name__} is none of text, number, list and mapping.")
    return Value(None, place)


def _field(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def to_yaml(config: Mapping[Any, Any]) -> str:
    """Return a mapping as the text of a config.yaml, which is stored with the job."""
    import yaml

    return str(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=120))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
