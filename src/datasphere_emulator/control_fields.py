"""Checks of request fields in the control API; errors name the field."""

from __future__ import annotations

import difflib
import inspect
import signal
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

#: Annotations that are checked: what JSON has for them.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "float": (int, float),
    "int": (int,),
    "bool": (bool,),
    "None": (type(None),),
}
_NAMES = {"str": "a string", "float": "a number", "int": "an integer", "bool": "true or false", "None": "null"}


def call(function: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    """Call a function with the fields of a request and return its result.

    :raises TypeError: a field is unknown, missing or of the wrong type.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    check_names(fields, parameters)
    missing = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty and name not in fields
    ]
    if missing:
        raise TypeError(f"The field {missing[0]!r} is missing.")
    for name, value in fields.items():
        check_kind(name, value, str(parameters[name].annotation))
    return function(**fields)


def check_names(fields: Iterable[str], known: Iterable[str]) -> None:
    """Check that all fields are known.

    :raises TypeError: a field is unknown; the message suggests a similar one.
    """
    known = list(known)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"There is no field {name!r}.{meant} Fields: {', '.join(known) or 'none'}.")


def check_kind(name: str, value: Any, annotation: str) -> None:
    """Check a value against an annotation; annotations without a JSON type are not checked.

    :raises TypeError: the value is of the wrong type.
    """
    wanted = [kind.strip() for kind in annotation.split("|")]
    if any(kind not in _KINDS for kind in wanted):
        return
    # A bool is an int for Python, and for nobody else.
    if isinstance(value, bool) and "bool" not in wanted:
        good = False
    else:
        good = any(isinstance(value, kind) for names in wanted for kind in _KINDS[names])
    if not good:
        raise wrong(name, value, " or ".join(_NAMES[kind] for kind in wanted))


def wrong(name: str, value: Any, wanted: str) -> TypeError:
    """Return the error of a value of the wrong type."""
    return TypeError(f"{name}={value!r}: must be {wanted}.")


def check_strings(name: str, value: Any) -> None:
    """Check a list of strings; a plain string would pass for a list of its letters."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise wrong(name, value, "a list of strings")
    for number, item in enumerate(value):
        if not isinstance(item, str):
            raise wrong(f"{name}[{number}]", item, "a string")


def check_mapping(name: str, value: Any, kinds: tuple[type, ...] = (str,), wanted: str = "a string") -> None:
    """Check a mapping of strings to values of these kinds."""
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a mapping")
    for key, item in value.items():
        if not isinstance(key, str):
            raise wrong(f"{name}: the key", key, "a string")
        if not isinstance(item, kinds):
            raise wrong(f"{name}[{key!r}]", item, wanted)


def check_paths(name: str, value: Any) -> None:
    """Check a list of paths, or of pairs of path and variable."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise wrong(name, value, "a list of paths, or of pairs of path and variable")
    for number, item in enumerate(value):
        pair = isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(part, str) for part in item)
        if not (isinstance(item, str) or pair):
            raise wrong(f"{name}[{number}]", item, "a path, or a pair of path and variable")


def check_job(fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check the fields of a new job for :class:`~datasphere_emulator.job_draft.JobDraft`.

    :raises TypeError: a field is unknown or of the wrong type.
    """
    check_names(fields, known)
    for name, value in fields.items():
        if name in ("cmd", "name", "desc", "python_version", "config", "project_id"):
            check_kind(name, value, "str")
        elif name == "attach_project_disk":
            check_kind(name, value, "bool")
        elif name == "working_storage_gb":
            check_kind(name, value, "int | None")
        elif name in ("args", "env_vars"):
            check_mapping(name, value)
        elif name in ("files", "local_modules"):
            check_mapping(name, value, (str, bytes), "text, or {'base64': …}")
        elif name in ("inputs", "outputs"):
            check_paths(name, value)
        elif name in ("cloud_instance_types", "requirements", "s3_mount_ids", "dataset_ids"):
            check_strings(name, value)
        else:
            _check_other(name, value)


def _check_other(name: str, value: Any) -> None:
    if name == "docker" and not isinstance(value, (str, type(None))):
        check_mapping(name, value)
    elif name == "graceful_shutdown" and value is not None:
        pair = list(value) if isinstance(value, (list, tuple)) else []
        if len(pair) != 2 or not isinstance(pair[0], (str, int)) or not isinstance(pair[1], (int, float, type(None))):
            raise wrong(name, value, "a pair of signal and seconds (null: no timeout)")
        if isinstance(pair[0], str) and pair[0] not in signal.Signals.__members__:
            raise wrong(f"{name}[0]", pair[0], "a signal such as SIGTERM")
    elif name == "data_ttl":
        # JobDraft checks the text of a string.
        if isinstance(value, bool) or not isinstance(value, (int, float, str, timedelta, type(None))):
            raise wrong(name, value, "seconds, null (never expires) or 'unset'")
    elif name == "output_datasets" and not (
        isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)
    ):
        raise wrong(name, value, "a list of mappings")
