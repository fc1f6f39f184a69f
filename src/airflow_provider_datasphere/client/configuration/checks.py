"""Checks of a job as a whole: names against names, paths against paths, counts. Pure: reads no file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath, PurePosixPath
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.configuration.faults import Faults, Place
from airflow_provider_datasphere.client.configuration.job_config import (
    PROJECT_DISK_FLAG,
    PROJECT_HOME,
    JobConfig,
    PathEntry,
)
from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.overrides import MAX_ENTRIES, is_pattern
from airflow_provider_datasphere.client.uri import SCHEME, check_job_file_uri, is_uri
from airflow_provider_datasphere.client.validation import check_characters

if TYPE_CHECKING:
    from airflow_provider_datasphere.client.configuration.section import Reader

_REFERENCE = re.compile(r"\$\{(.+?)}")


def check_config(config: JobConfig, cmd_place: Place, reader: Reader) -> JobConfig:
    """Check a job; return it with the command that is sent."""
    faults = reader.faults
    for entry in (*config.s3_mounts, *config.datasets):
        what = "an S3 connector" if entry in config.s3_mounts else "a dataset"
        reader.check_resource_id(entry.path, entry.place, what)
    _check_names(config, reader)
    _check_inputs(config, reader)
    _check_outputs(config, reader)
    _check_counts(config, faults)
    _check_characters(config, cmd_place, faults)
    return replace(config, cmd=_checked_cmd(config, cmd_place, reader))


# The command and its names ----------------------------------------------------------------------------------------


def _names(config: JobConfig) -> Iterator[tuple[str, Place, str]]:
    """Iterate over all names that ``cmd`` may use, with their places and what they name."""
    for what, entries in (("an input", config.inputs), ("an output", config.outputs)):
        yield from ((entry.var, entry.place, what) for entry in entries if entry.var)
    for what, entries in (("an S3 connector", config.s3_mounts), ("a dataset", config.datasets)):
        for entry in entries:
            yield entry.path, entry.place, what
            if entry.var:
                yield entry.var, entry.place, what
    for dataset in config.output_datasets:
        if dataset.var:
            yield dataset.var, dataset.place, "an output dataset"


def _check_names(config: JobConfig, reader: Reader) -> None:
    seen: dict[str, tuple[Place, str]] = {}
    for name, place, what in _names(config):
        if name in seen:
            first, first_what = seen[name]
            reader.faults.add(
                place, f"the name {name!r} stands for {what} here and for {first_what} in {_where(first)}: rename one."
            )
        elif name in config.args:
            reader.faults.add(place, f"the name {name!r} stands for {what} here and for an argument: rename one.")
        seen.setdefault(name, (place, what))


def _where(place: Place) -> str:
    return f"line {place.line}" if place.line else place.field or "the configuration"


def _checked_cmd(config: JobConfig, place: Place, reader: Reader) -> str:
    """Return the command with ids in place of the names of S3 connectors and datasets, as the official SDK does."""
    cmd = config.cmd
    names = {name for name, _, _ in _names(config)} | set(config.args)
    ids = {entry.var: entry.path for entry in (*config.s3_mounts, *config.datasets) if entry.var}
    unknown = []
    for name in _REFERENCE.findall(cmd):
        if name == PROJECT_HOME:
            continue
        if name in ids:
            cmd = cmd.replace(f"${{{name}}}", f"${{{ids[name]}}}")
        elif name not in names and reader.is_final(name):
            unknown.append(name)
    for name in dict.fromkeys(unknown):
        shell = f"; for the shell's own variable write ${name}" if name.isidentifier() else ""
        known = f" Known are {', '.join(sorted(names))}." if names else ""
        reader.faults.add(
            place, f"${{{name}}} is neither an argument nor a variable of this configuration{shell}.{known}"
        )
    if f"${{{PROJECT_HOME}}}" in cmd and not config.attach_project_disk:
        reader.faults.add(place, f"${{{PROJECT_HOME}}} needs the project's disk: add 'flags: [{PROJECT_DISK_FLAG}]'.")
    return cmd.strip()


# Paths ------------------------------------------------------------------------------------------------------------


def _check_inputs(config: JobConfig, reader: Reader) -> None:
    local = []
    for entry in config.inputs:
        if not reader.is_final(entry.path):
            continue
        if is_uri(entry.path):
            _check_uri(entry, reader.faults)
            continue
        local.append(entry)
        _check_relative(entry, reader.faults)
    # As the official SDK does: by absolute paths, those with a variable included.
    _check_overlaps(local, lambda path: PurePath(os.path.abspath(config.base_dir / path)), reader.faults)
    if config.python is not None:
        _check_modules(config.python.local_paths, local, config, reader)


def _check_uri(entry: PathEntry, faults: Faults) -> None:
    if not entry.var:
        faults.add(entry.place, f"{entry.path!r} is a URI, which needs a variable: write '{entry.path}: NAME'.")
    elif entry.path.startswith(f"{SCHEME}://"):
        try:
            check_job_file_uri(f"input {entry.var}", entry.path)
        except JobRequestError as error:
            faults.add(entry.place, str(error))


def _check_relative(entry: PathEntry, faults: Faults) -> None:
    path = PurePosixPath(entry.path)
    if entry.var:
        return
    if path.is_absolute():
        faults.add(
            entry.place,
            f"{entry.path!r} is absolute, which needs a variable: write '{entry.path}: NAME' and ${{NAME}}.",
        )
    elif ".." in path.parts:
        faults.add(
            entry.place,
            f"{entry.path!r} leads out of the job's folder, which needs a variable: write '{entry.path}: NAME' and "
            "${NAME}.",
        )


def _check_modules(
    modules: Sequence[PathEntry], inputs: Sequence[PathEntry], config: JobConfig, reader: Reader
) -> None:
    """Modules may overlap with inputs, and then lie in the job twice."""
    absolute = {entry.path: PurePath(os.path.abspath(config.base_dir / entry.path)) for entry in (*modules, *inputs)}
    for module in modules:
        for entry in inputs:
            module_path, input_path = absolute[module.path], absolute[entry.path]
            if module_path == input_path or module_path in input_path.parents or input_path in module_path.parents:
                reader.faults.warn(module.place, f"{module.path!r} and the input {entry.path!r} overlap.")


def _check_outputs(config: JobConfig, reader: Reader) -> None:
    relative, absolute = [], []
    for entry in config.outputs:
        if not reader.is_final(entry.path):
            continue
        if is_uri(entry.path):
            reader.faults.add(
                entry.place,
                f"{entry.path!r} is a URI: give the path inside the job where the program writes, and download it with "
                "DownloadJobResultsOperator.",
            )
            continue
        if is_pattern(entry.path):
            reader.faults.add(
                entry.place,
                f"{entry.path!r} is a pattern: DataSphere accepts it, and fails the job at its end without the files. "
                "Give the path of one file or folder.",
            )
        _check_relative(entry, reader.faults)
        if PurePosixPath(entry.path).is_absolute():
            absolute.append(entry)
        elif ".." not in PurePosixPath(entry.path).parts:
            relative.append(entry)
    # Where they lie in the job isn't known, so that only like is compared with like, as in the official SDK.
    for entries in (relative, absolute):
        _check_overlaps(entries, PurePosixPath, reader.faults)


def _check_overlaps(entries: Sequence[PathEntry], path_of: Callable[[str], PurePath], faults: Faults) -> None:
    seen: dict[PurePath, PathEntry] = {}
    above: dict[PurePath, PathEntry] = {}
    for entry in entries:
        path = path_of(entry.path)
        other = seen.get(path)
        if other is not None:
            faults.add(entry.place, f"{entry.path!r} stands here and in {_where(other.place)}: keep one.")
            continue
        other = above.get(path) or next((seen[parent] for parent in path.parents if parent in seen), None)
        if other is not None:
            faults.add(
                entry.place,
                f"{entry.path!r} and {other.path!r} in {_where(other.place)} overlap: give the outer one only.",
            )
        seen[path] = entry
        for parent in path.parents:
            above.setdefault(parent, entry)


def _check_counts(config: JobConfig, faults: Faults) -> None:
    for what, entries in (
        ("inputs", config.inputs),
        ("outputs", config.outputs),
        ("s3-mounts", config.s3_mounts),
        ("datasets", config.datasets),
    ):
        if len(entries) > MAX_ENTRIES:
            faults.add(
                replace(entries[MAX_ENTRIES].place, field=what),
                f"there are {len(entries)} entries, {MAX_ENTRIES} are allowed: put files into a folder.",
            )


def _check_characters(config: JobConfig, cmd_place: Place, faults: Faults) -> None:
    """No message can carry a NUL or half a character."""
    texts: Iterable[tuple[Place, str]] = [
        (cmd_place, config.cmd),
        (Place(field="name"), config.name),
        (Place(field="desc"), config.desc),
        *((Place(field=f"args[{name!r}]"), f"{name}{value}") for name, value in config.args.items()),
        *((Place(field=f"env_vars[{name!r}]"), f"{name}{value}") for name, value in config.env_vars.items()),
        *((entry.place, entry.path) for entry in (*config.inputs, *config.outputs)),
    ]
    for place, text in texts:
        try:
            check_characters("it", text)
        except JobRequestError as error:
            faults.add(place, str(error))
