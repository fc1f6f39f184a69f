"""Reading parts of a document, each fault collected: text, mappings with known keys, lists, paths with variables."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.configuration.document import Value, is_template
from airflow_provider_datasphere.client.configuration.job_config import PROJECT_HOME, PathEntry

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.configuration.faults import Faults, Place

# The official SDK's pattern has A-z by mistake, which takes in [ \ ] ^ and `.
_VAR = re.compile(r"[0-9A-Za-z_\-]{1,50}")
_RESOURCE_ID = re.compile(r"[0-9a-z]{20}")

#: Keys that people write for others, and that aren't near enough to be found by their letters.
_MEANT = {
    "description": "desc",
    "command": "cmd",
    "environment": "env",
    "instance-type": "cloud-instance-types",
    "instance-types": "cloud-instance-types",
    "variables": "vars",
    "requirements": "requirements-file",
    "modules": "local-paths",
    "local-modules": "local-paths",
    "root-path": "root-paths",
    "image-id": "docker",
    "arguments": "args",
    "extra-index-url": "extra-index-urls",
    "trusted-host": "trusted-hosts",
    "no_deps": "no-deps",
    "storage": "working-storage",
    "secret_id": "secret-id",
}
#: Keys that are arguments of the operator and of ``execute_job``, not of a configuration.
_ARGUMENTS = {"project-id": "project_id", "project_id": "project_id", "data-ttl": "data_ttl", "data_ttl": "data_ttl"}


@dataclass(frozen=True)
class Reader:
    """What all sections need.

    :param base_dir: what relative paths are relative to.
    :param early: before the configuration is rendered, perhaps on another machine: text with a Jinja template in it
        isn't final, and the environment isn't the job's.
    :param read_files: look at the files that it names.
    """

    faults: Faults
    base_dir: Path
    early: bool = False
    read_files: bool = True

    def is_final(self, text: str) -> bool:
        """Return whether the text is what the job gets: no template is in it that will be rendered."""
        return not (self.early and is_template(text))

    def text(self, value: Value | None, *, hint: str = "give text") -> str:
        """Return a text; nothing where there is none."""
        if value is None:
            return ""
        if isinstance(value.content, (list, dict)):
            self.faults.add(value.place, f"this is {value.kind}: {hint}.")
            return ""
        return value.text

    def mapping(self, value: Value | None, known: Collection[str], *, hint: str) -> dict[str, Value]:
        """Return the entries of a mapping that has only known keys."""
        entries = self.any_mapping(value, hint=hint)
        for key in entries:
            if key not in known:
                assert value is not None
                self.faults.add(value.keys.get(key, value.place), _unknown_key(key, known))
        return entries

    def any_mapping(self, value: Value | None, *, hint: str) -> dict[str, Value]:
        """Return the entries of a mapping with any keys."""
        if value is None or value.content is None:
            return {}
        if isinstance(value.content, dict):
            return value.content
        self.faults.add(value.place, f"this is {value.kind}, not a mapping: {hint}.")
        return {}

    def items(self, value: Value | None, *, hint: str) -> list[Value]:
        """Return the items of a list."""
        if value is None or value.content in (None, ""):
            return []
        if isinstance(value.content, list):
            return value.content
        self.faults.add(value.place, f"this is {value.kind}, not a list: {hint}.")
        return []

    def texts(self, value: Value | None, *, hint: str) -> Iterator[Value]:
        """Iterate over a list of texts; empty ones are faults."""
        for item in self.items(value, hint=hint):
            if self.text(item, hint=hint):
                yield item
            elif not isinstance(item.content, (list, dict)):
                self.faults.add(item.place, f"an entry is empty: {hint}.")

    def paths(self, value: Value | None) -> list[PathEntry]:
        """Return entries of the forms ``path``, ``path: VAR`` and ``path: {var: VAR}``."""
        hint = "write '- path', or '- path: VAR'"
        entries = [self._path(item, hint) for item in self.items(value, hint=hint)]
        return [entry for entry in entries if entry is not None]

    def _path(self, item: Value, hint: str) -> PathEntry | None:
        if isinstance(item.content, list):
            self.faults.add(item.place, f"this is a list, not a path: {hint}.")
            return None
        if not isinstance(item.content, dict):
            if not item.text.strip():
                self.faults.add(item.place, f"an entry is empty: {hint}.")
                return None
            return PathEntry(item.text, "", item.place)
        if len(item.content) != 1:
            names = ", ".join(item.content)
            self.faults.add(item.place, f"one entry has {len(item.content)} paths ({names}): begin each with '- '.")
            return None
        ((path, var_value),) = item.content.items()
        if isinstance(var_value.content, dict):
            if set(var_value.content) != {"var"}:
                keys = ", ".join(var_value.content)
                self.faults.add(item.place, f"{path!r} has the keys {keys}: only var is known; {hint}.")
                return None
            var_value = var_value.content["var"]
        if isinstance(var_value.content, (list, dict)):
            self.faults.add(item.place, f"the variable of {path!r} is {var_value.kind}: {hint}.")
            return None
        var = var_value.text
        if var and self.is_final(var):
            self.check_name(var, item.place)
        return PathEntry(path, var, item.place)

    def check_name(self, name: str, place: Place) -> None:
        """Check the name of a variable."""
        if name == PROJECT_HOME:
            self.faults.add(place, f"{PROJECT_HOME} is reserved for the project's disk: use another name.")
        elif not _VAR.fullmatch(name):
            self.faults.add(
                place, f"{name!r} can't name a variable: give 1 to 50 letters, digits, '_' or '-', as in ${{NAME}}."
            )

    def check_resource_id(self, text: str, place: Place, what: str) -> None:
        """Check the id of a resource of the project."""
        if self.is_final(text) and not _RESOURCE_ID.fullmatch(text):
            self.faults.add(place, f"{text!r} is no id of {what}: it has 20 digits and small letters, such as bt1….")


def _unknown_key(key: str, known: Collection[str]) -> str:
    """Return what to say about a key that nobody reads."""
    if key in _ARGUMENTS:
        return f"{key!r} is not a key of a configuration: give it as the argument {_ARGUMENTS[key]}."
    if key == "<<":
        return "YAML merge keys ('<<') aren't read, by the official CLI neither: write the keys out."
    normalized = key.strip().lower().replace("_", "-")
    candidates = [normalized] if normalized in known else []
    candidates += [_MEANT[name] for name in (key, normalized) if _MEANT.get(name) in known]
    candidates += difflib.get_close_matches(normalized, known, n=1, cutoff=0.6)
    if candidates:
        return f"unknown key {key!r}; did you mean {candidates[0]!r}?"
    return f"unknown key {key!r}; the keys here are {', '.join(known)}."


def plain_text_entries(reader: Reader, value: Value | None, *, hint: str) -> Mapping[str, str]:
    """Return a mapping of text to text."""
    entries: dict[str, str] = {}
    for name, part in reader.any_mapping(value, hint=hint).items():
        if part.content is None and not part.place.file:
            reader.faults.add(part.place, "this is None: give text, or leave it out.")
        else:
            entries[name] = reader.text(part, hint=hint)
    return entries
