"""Faults of a configuration: all of them, each with the place where it stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from airflow_provider_datasphere.client.errors import JobRequestError


@dataclass(frozen=True)
class Place:
    """Where a value of a configuration stands.

    :param file: its file, as messages name it; empty in a mapping.
    :param line: line of that file, from 1; 0: unknown, or the file as a whole.
    :param field: its field, such as ``inputs[2]`` or ``env.python.version``; empty: the configuration as a whole.
    """

    file: str = ""
    line: int = 0
    field: str = ""

    def __str__(self) -> str:
        if not self.file:
            return "config"
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Fault:
    """What is wrong, and what to write instead.

    :param warning: it works, but hardly as meant.
    """

    place: Place
    message: str
    warning: bool = False

    def __str__(self) -> str:
        """``config.yaml:12: outputs[0]: …``."""
        return f"{self.place}: {'warning: ' if self.warning else ''}{self.message}"


@dataclass
class Faults:
    """The faults that were found so far."""

    found: list[Fault] = field(default_factory=list)

    def add(self, place: Place, message: str) -> None:
        """Add an error.

        :param message: what is wrong and what to write instead; the field's name is put before it.
        """
        self._add(Fault(place, _with_field(place, message)))

    def warn(self, place: Place, message: str) -> None:
        """Add a warning."""
        self._add(Fault(place, _with_field(place, message), warning=True))

    def _add(self, fault: Fault) -> None:
        if fault not in self.found:
            self.found.append(fault)

    @property
    def errors(self) -> list[Fault]:
        """The errors, by file and line."""
        return _sorted(fault for fault in self.found if not fault.warning)

    @property
    def warnings(self) -> list[Fault]:
        """The warnings, by file and line."""
        return _sorted(fault for fault in self.found if fault.warning)

    def raise_errors(self) -> None:
        """
        :raises JobRequestError: there are errors; its message has them all, a line each.
        """
        errors = self.errors
        if len(errors) == 1:
            raise JobRequestError(f"The configuration of the job has a fault; nothing was sent.\n{errors[0]}")
        if errors:
            lines = "\n".join(map(str, errors))
            raise JobRequestError(f"The configuration of the job has {len(errors)} faults; nothing was sent.\n{lines}")


def _with_field(place: Place, message: str) -> str:
    return f"{place.field}: {message}" if place.field else message


def _sorted(faults: Iterable[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: (fault.place.file, fault.place.line))
