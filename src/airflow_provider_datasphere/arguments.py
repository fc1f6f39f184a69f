"""What can be said about an operator's arguments when the DAG is parsed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from airflow_provider_datasphere import killing
from airflow_provider_datasphere.client import fork
from airflow_provider_datasphere.compat import ObjectStoragePath
from airflow_provider_datasphere.exceptions import JobRequestError, translated


def check_literals(operator: Any) -> None:
    """Check the arguments of a fork that are known now; templates and XComs are checked when the task runs.

    :raises JobRequestError: names the field, the value and the way out.
    """
    checks: dict[str, Callable[[Any], object]] = {
        "name": lambda value: fork.check_text("name", value),
        "desc": lambda value: fork.check_text("desc", value),
        "args": lambda value: fork.check_strings("args", value),
        "vars": lambda value: fork.check_strings("vars", paths_as_text(value)),
        "env_vars": lambda value: fork.check_strings("env_vars", value),
        "docker": fork.check_docker,
        "working_storage": fork.parse_working_storage,
        "cloud_instance_types": fork.check_instance_types,
        "data_ttl": lambda value: fork.parse_ttl("data_ttl", value),
        "source_data_ttl": lambda value: fork.parse_ttl("source_data_ttl", value),
    }
    with translated():
        if is_literal(operator.source_job_id):
            fork.check_source_job_id(operator.source_job_id)
        for name, check in checks.items():
            value = getattr(operator, name)
            if value is not None and is_literal(value):
                check(value)
    if operator.on_kill_action not in killing.ON_KILL_ACTIONS:
        raise JobRequestError(
            f"on_kill_action is {operator.on_kill_action!r}: "
            f"give one of {', '.join(map(repr, killing.ON_KILL_ACTIONS))}."
        )
    check_poll_interval(operator.poll_interval)
    check_exit_codes(operator.skip_on_exit_code)


def check_poll_interval(value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise JobRequestError(f"poll_interval is {value!r}: give a positive number of seconds.")


def check_exit_codes(value: object) -> None:
    codes: Iterable[object] = [value] if isinstance(value, int) else value if isinstance(value, Iterable) else [value]
    if value is not None and (
        isinstance(value, (str, bool)) or not all(type(code) is int and code != 0 for code in codes)
    ):
        raise JobRequestError(f"skip_on_exit_code is {value!r}: give a return code other than 0, or a list of them.")


def path_as_text(value: Any) -> Any:
    """A path object, local or ``ObjectStoragePath``, as the text that it stands for; anything else as it is."""
    return str(value) if isinstance(value, (PurePath, ObjectStoragePath)) else value


def paths_as_text(values: Any) -> Any:
    """The same for the values of a mapping."""
    return {name: path_as_text(value) for name, value in values.items()} if isinstance(values, Mapping) else values


def is_literal(value: object) -> bool:
    """Whether a value is final: no template in it, and nothing that Airflow resolves later."""
    value = path_as_text(value)
    if isinstance(value, str):
        return "{{" not in value and "{%" not in value
    if isinstance(value, Mapping):
        return all(is_literal(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_literal(part) for part in value)
    # XComArg, MappedArgument, DagParam and the like say so by having resolve().
    return not hasattr(value, "resolve")
