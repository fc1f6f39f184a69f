"""Requirements files, read as pip reads them, for an environment that the service makes.

The service takes a list of requirements and four options of pip. What pip knows beside these is refused by name; the
official SDK passes most of it on, or fails on it without naming the line.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from airflow_provider_datasphere.client.configuration.faults import Faults, Place
from airflow_provider_datasphere.client.configuration.job_config import PipOptions

# As in pip._internal.req.req_file.
_COMMENT = re.compile(r"(^|\s+)#.*$")
_ENVIRONMENT_VARIABLE = re.compile(r"(?P<reference>\$\{(?P<name>[A-Z0-9_]+)\})")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*:)?//|^(git|hg|svn|bzr)\+|^file:", re.IGNORECASE)
_NAMED_URL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]*(\[[^\]]*\])?\s*@")
_ARCHIVE = (".whl", ".tar.gz", ".zip", ".tgz", ".tar.bz2")
_NOT_HERE = "the service can't install it; upload its package to an index, or ship its module with local-paths"


@dataclass
class Requirements:
    """What requirements files say together.

    :param lines: requirements without comments and markers, in the order of the files.
    :param constraints: name -> specifier of a constraints file, and its place.
    """

    lines: list[tuple[str, Place]] = field(default_factory=list)
    pip: PipOptions = field(default_factory=PipOptions)
    constraints: dict[str, tuple[str, Place]] = field(default_factory=dict)


def read_requirements(path: Path, shown: str, python_version: str, faults: Faults) -> tuple[list[str], PipOptions]:
    """Read a requirements file, and those that it includes with ``-r`` and ``-c``.

    :param path: the file; it exists.
    :param shown: its name in messages.
    :param python_version: the job's, for markers: ``3.11``.
    :return: the requirements, constraints applied, and the options of pip.
    """
    reader = _FileReader(python_version, faults)
    reader.read(path, shown, constraint=False)
    return reader.constrained(), reader.found.pip


class _FileReader:
    def __init__(self, python_version: str, faults: Faults) -> None:
        self._faults = faults
        self._environment = _job_environment(python_version)
        self._seen: set[tuple[Path, bool]] = set()
        self.found = Requirements()

    def read(self, path: Path, shown: str, *, constraint: bool) -> None:
        if (path.resolve(), constraint) in self._seen:
            return
        self._seen.add((path.resolve(), constraint))
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeError) as error:
            self._faults.add(Place(shown), f"this file can't be read: {getattr(error, 'strerror', None) or error}.")
            return
        for line, number in _logical_lines(text):
            place = Place(shown, number)
            if line.startswith("-"):
                self._option(line, place, path, shown, constraint)
            else:
                self._requirement(line, place, constraint)

    # Options -----------------------------------------------------------------------------------------------------

    def _option(self, line: str, place: Place, path: Path, shown: str, constraint: bool) -> None:
        try:
            words = shlex.split(line)
        except ValueError as error:
            self._faults.add(place, f"{_without_credentials(line)!r} can't be split into words: {error}.")
            return
        option, _, value = words[0].partition("=")
        if not value and len(option) > 2 and not option.startswith("--"):
            option, value = option[:2], option[2:]  # -rfile, as pip takes it
        rest = words[1:]
        if not value and rest and not rest[0].startswith("-"):
            value, rest = rest[0], rest[1:]
        pip = self.found.pip
        if option in ("-r", "--requirement", "-c", "--constraint"):
            self._include(option, value, place, path, shown, constraint)
        elif option in ("-i", "--index-url", "--pypi-url"):
            self.found.pip = replace(pip, index_url=value)
        elif option == "--extra-index-url":
            self.found.pip = replace(pip, extra_index_urls=(*pip.extra_index_urls, value))
        elif option == "--trusted-host":
            self.found.pip = replace(pip, trusted_hosts=(*pip.trusted_hosts, value))
        elif option == "--no-deps":
            self.found.pip = replace(pip, no_deps=True)
            rest = [value, *rest] if value else rest
        elif option in ("-e", "--editable"):
            self._faults.add(place, f"'-e {_without_credentials(value)}' is an editable install: {_NOT_HERE}.")
            return
        else:
            self._faults.add(
                place,
                f"the option {option} can't be passed to the service, which takes --index-url, --extra-index-url, "
                "--trusted-host and --no-deps: remove it.",
            )
            return
        if not value and option != "--no-deps":
            self._faults.add(place, f"the option {option} has no value.")
        if rest and rest[0].startswith("-"):
            self._option(shlex.join(rest), place, path, shown, constraint)
        elif rest:
            self._faults.add(place, f"{rest[0]!r} after {option} belongs to no option: write one per line.")

    def _include(self, option: str, value: str, place: Place, path: Path, shown: str, constraint: bool) -> None:
        if not value:
            return
        if _URL.search(value):
            self._faults.add(place, f"{option} {_without_credentials(value)}: only local files are read; copy it here.")
            return
        # Relative to the file that includes it, as in pip.
        target = path.parent / value
        if not target.is_file():
            self._faults.add(place, f"{option} {value}: there is no file {os.path.normpath(target)}.")
            return
        name = os.path.normpath(os.path.join(os.path.dirname(shown), value))
        self.read(target, name, constraint=constraint or option in ("-c", "--constraint"))

    # Requirements ------------------------------------------------------------------------------------------------

    def _requirement(self, line: str, place: Place, constraint: bool) -> None:
        from packaging.requirements import InvalidRequirement, Requirement

        line, _, options = line.partition(" --")
        line = line.strip()
        if options:
            name = options.split("=")[0].split()[0]
            self._faults.add(place, f"the option --{name} of a requirement can't be passed to the service: remove it.")
            return
        bare = line.split(";")[0].strip()
        named = bool(_NAMED_URL.match(bare))
        is_path = bare.startswith((".", "/", "~")) or bare.lower().endswith(_ARCHIVE)
        if not named and (is_path or _URL.search(bare)):
            self._faults.add(place, f"{_without_credentials(line)!r} is a path or URL: {_NOT_HERE}.")
            return
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            self._faults.add(place, f"{_without_credentials(line)!r} is no requirement: {str(error).splitlines()[0]}.")
            return
        if requirement.url:
            self._faults.add(place, f"{requirement.name} comes from a URL: {_NOT_HERE}.")
            return
        if requirement.marker is not None:
            if not requirement.marker.evaluate(dict(self._environment)):
                return
            line = line[: line.index(";")].rstrip()
        if not constraint:
            self.found.lines.append((line, place))
        elif requirement.extras:
            self._faults.add(place, f"{line!r}: a constraint has no extras.")
        else:
            self.found.constraints[_normal(requirement.name)] = (str(requirement.specifier), place)

    def constrained(self) -> list[str]:
        """Return the requirements with the constraints of their packages.

        The service knows no constraints, so those of packages that aren't listed can't be applied.
        """
        from packaging.requirements import Requirement

        lines, used = [], set()
        for line, _ in self.found.lines:
            requirement = Requirement(line)
            name = _normal(requirement.name)
            specifier, _ = self.found.constraints.get(name, ("", Place()))
            used.add(name)
            if specifier:
                requirement.specifier &= type(requirement.specifier)(specifier)
                line = str(requirement)
            lines.append(line)
        for name, (specifier, place) in self.found.constraints.items():
            if name not in used:
                self._faults.warn(
                    place,
                    f"the constraint {name}{specifier} is left out: the service knows constraints of listed packages "
                    f"only. List {name} in the requirements to pin it.",
                )
        return lines


def _logical_lines(text: str) -> Iterator[tuple[str, int]]:
    """Iterate over lines and their numbers: continued ones joined, without comments, variables replaced, as in pip."""
    joined, began = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        began = began or number
        if line.endswith("\\") and not _COMMENT.match(line):
            joined += line[:-1]
            continue
        whole = _COMMENT.sub("", joined + line).strip()
        if whole:
            yield _with_environment(whole), began
        joined, began = "", 0
    if joined.strip():
        yield _with_environment(joined.strip()), began


def _with_environment(line: str) -> str:
    return _ENVIRONMENT_VARIABLE.sub(lambda match: os.environ.get(match["name"]) or match["reference"], line)


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//…@", text)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _job_environment(python_version: str) -> dict[str, str]:
    """Return the marker environment of a job: Linux, CPython of this version."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python_version}.0",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python_version}.0",
        "python_version": python_version,
        "sys_platform": "linux",
        "extra": "",
    }
