"""The section ``env.python``: manual environments. Automatic ones would have the client import the user's program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.configuration.entry_point import manual_section
from airflow_provider_datasphere.client.configuration.job_config import PathEntry, PipOptions, PythonEnvironment
from airflow_provider_datasphere.client.configuration.requirements_file import read_requirements

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.configuration.document import Value
    from airflow_provider_datasphere.client.configuration.section import Reader

_VERSION = re.compile(r"(3\.\d+)(\.\d+)?")
_KEYS = ("type", "version", "requirements-file", "root-paths", "local-paths", "pip")
_PIP_KEYS = ("index-url", "extra-index-urls", "trusted-hosts", "no-deps")


def read_python(value: Value | None, cmd: str, reader: Reader) -> PythonEnvironment | None:
    """Return the environment; ``None`` for the image's own.

    :param cmd: the job's command, for a suggestion in place of an automatic environment.
    """
    if value is None or value.content is None:
        return None
    if isinstance(value.content, str):
        if value.text.lower() == "auto":
            reader.faults.add(value.place, _instead_of_auto(cmd, reader))
        elif value.text or value.place.file:
            reader.faults.add(value.place, f"{value.text!r} is no Python environment: write type: manual and its keys.")
        return None
    keys = reader.mapping(value, _KEYS, hint="write type: manual and its keys")
    kind = reader.text(keys.get("type"))
    if kind == "auto":
        reader.faults.add(value.place, _instead_of_auto(cmd, reader))
        return None
    if kind != "manual":
        what = f"type is {kind!r}" if kind else "type is missing"
        reader.faults.add(keys["type"].place if kind else value.place, f"{what}: write type: manual.")
    version = _version(keys.get("version"), reader)
    python = PythonEnvironment(version, local_paths=_local_paths(keys.get("local-paths"), reader))
    python = replace(python, pip=_pip(keys.get("pip"), reader))
    requirements = keys.get("requirements-file")
    file = reader.text(requirements, hint="give the path of one file")
    _check_complete(value, keys, version, file, cmd, reader)
    if requirements is not None and file and reader.is_final(file) and reader.read_files:
        python = _with_requirements(python, requirements, reader)
    return python


def _instead_of_auto(cmd: str, reader: Reader) -> str:
    return (
        "an automatic environment would have your program imported here, where its packages aren't; write "
        f"{manual_section(cmd, reader.base_dir if reader.read_files else None)}"
    )


def _check_complete(
    value: Value, keys: Mapping[str, Value], version: str, requirements: str, cmd: str, reader: Reader
) -> None:
    """The official SDK imports the user's program to find out what is missing here."""
    if "root-paths" in keys:
        reader.faults.add(
            keys["root-paths"].place,
            "these programs would be imported here to find what they need; list what to ship in local-paths instead.",
        )
    missing = [
        key
        for key, given in (
            ("version", version or "version" in keys),
            ("requirements-file", requirements),
            ("local-paths", "local-paths" in keys),
        )
        if not given
    ]
    if missing:
        block = manual_section(
            cmd, reader.base_dir if reader.read_files else None, version=version, requirements_file=requirements
        )
        names = " and ".join(missing)
        reader.faults.add(
            value.place,
            f"{names} {'is' if len(missing) == 1 else 'are'} missing, which an environment of type manual needs "
            f"(an empty file, and an empty list, will do); write {block}",
        )


def _version(value: Value | None, reader: Reader) -> str:
    text = reader.text(value, hint="give a version such as '3.11'")
    match = _VERSION.fullmatch(text)
    if match is not None:
        return match[1]
    if value is not None and reader.is_final(text) and not isinstance(value.content, (list, dict)):
        reader.faults.add(value.place, f"{text!r} is no version of Python 3: write it as '3.11'.")
    return ""


def _local_paths(value: Value | None, reader: Reader) -> tuple[PathEntry, ...]:
    hint = "write '- path', or [] for none"
    return tuple(PathEntry(item.text, "", item.place) for item in reader.texts(value, hint=hint))


def _pip(value: Value | None, reader: Reader) -> PipOptions | None:
    if value is None or value.content in (None, ""):
        return None
    keys = reader.mapping(value, _PIP_KEYS, hint=f"give {', '.join(_PIP_KEYS)}")
    no_deps = reader.text(keys.get("no-deps"))
    if no_deps.lower() not in ("true", "false", "") and reader.is_final(no_deps):
        reader.faults.add(keys["no-deps"].place, f"{no_deps!r}: write 'true' or 'false'.")
    elif no_deps not in ("true", "false", ""):
        reader.faults.add(
            keys["no-deps"].place, f"{no_deps!r} is taken for false by the official CLI: write {no_deps.lower()!r}."
        )
    return PipOptions(
        index_url=reader.text(keys.get("index-url")),
        extra_index_urls=tuple(item.text for item in reader.texts(keys.get("extra-index-urls"), hint="give a list")),
        trusted_hosts=tuple(item.text for item in reader.texts(keys.get("trusted-hosts"), hint="give a list")),
        no_deps=no_deps == "true",
    )


def _with_requirements(python: PythonEnvironment, file: Value, reader: Reader) -> PythonEnvironment:
    path = reader.base_dir / file.text
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "doesn't exist"
        reader.faults.add(file.place, f"{file.text!r} {what} (looked in {reader.base_dir.absolute()}).")
        return python
    lines, found = read_requirements(path, file.text, python.version or "3.10", reader.faults)
    return replace(python, requirements=tuple(lines), pip=_merged(python.pip, found))


def _merged(section: PipOptions | None, found: PipOptions) -> PipOptions | None:
    """Return the options of the configuration with those of the requirements files; the configuration's come first."""
    if section is None:
        return found if found != PipOptions() else None
    return PipOptions(
        index_url=section.index_url or found.index_url,
        extra_index_urls=tuple(dict.fromkeys((*section.extra_index_urls, *found.extra_index_urls))),
        trusted_hosts=tuple(dict.fromkeys((*section.trusted_hosts, *found.trusted_hosts))),
        no_deps=section.no_deps or found.no_deps,
    )
