"""Parse-time validation of operator arguments."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from pathlib import PurePath
from typing import Any

from airflow_provider_datasphere.client import cancellation, overrides
from airflow_provider_datasphere.client import validation as checks
from airflow_provider_datasphere.client.submission import fork_request as fork
from airflow_provider_datasphere.compat import ObjectStoragePath
from airflow_provider_datasphere.exceptions import JobRequestError, airflow_exceptions

#: A timeout beyond this is no limit, and too long to compute dates with.
LONGEST_TIMEOUT = timedelta(days=3650)

#: Arguments of operators and sensors that are either on or off. They aren't templated.
_FLAGS = (
    "wait_for_completion",
    "deferrable",
    "stream_logs",
    "reattach",
    "fail_on_missing_outputs",
    "graceful",
    "with_logs",
    "with_diagnostics",
)


#: How a template begins, unless the DAG's ``jinja_environment_kwargs`` say otherwise.
_TEMPLATE_MARKS = {"variable_start_string": "{{", "block_start_string": "{%", "comment_start_string": "{#"}

FieldChecks = Mapping[str, Callable[[Any], object]]

_OVERRIDE_CHECKS: FieldChecks = {
    **overrides.OVERRIDE_CHECKS,
    "vars": lambda value: overrides.check_vars(paths_as_text(value)),
}
#: The check of each data argument of a fork, for its whole value; raises :class:`JobRequestError`.
FORK_CHECKS: FieldChecks = {
    "source_job_id": fork.FIELD_CHECKS["source_job_id"],
    **_OVERRIDE_CHECKS,
    "source_data_ttl": lambda value: checks.parse_ttl("source_data_ttl", value),
}
#: The same of a new job.
NEW_JOB_CHECKS: FieldChecks = {
    "config": lambda value: _check_config(value),
    "project_id": lambda value: checks.check_text("project_id", value),
    "base_dir": lambda value: checks.check_text("base_dir", path_as_text(value)),
    **_OVERRIDE_CHECKS,
}
#: The same of a function.
FUNCTION_CHECKS: FieldChecks = {
    "project_id": lambda value: checks.check_text("project_id", value),
    "requirements": lambda value: _check_requirements(value),
    "python_version": lambda value: _check_python_version(value),
    "inputs": lambda value: overrides.check_vars(paths_as_text(value), "inputs"),
    "outputs": lambda value: _check_paths("outputs", value),
    "modules": lambda value: _check_paths("modules", value),
    "serializer": lambda value: _check_serializer(value),
    **{name: check for name, check in _OVERRIDE_CHECKS.items() if name not in ("args", "vars")},
}
_REQUIRED = ("source_job_id", "config")
_MAPPINGS = ("args", "vars", "env_vars", "inputs")


def check_job_arguments(operator: Any, field_checks: FieldChecks) -> None:
    """Check the arguments of a task that runs a job, as far as they are known at parse time.

    Templates and XComs are checked when the task runs.

    :raises JobRequestError: names the field, the value and what to give instead.
    """
    names = (
        *field_checks,
        "on_kill_action",
        "poll_interval",
        "start_timeout",
        "skip_on_exit_code",
        "datasphere_conn_id",
    )
    marks = template_marks(operator.get_dag())
    check_known_values({name: getattr(operator, name) for name in names}, marks, field_checks)
    check_common(operator)


def check_known_values(values: Mapping[str, Any], marks: Collection[str], field_checks: FieldChecks) -> None:
    """Check those arguments that are given, and known at parse time.

    :param marks: what a template contains; see :func:`template_marks`.
    :raises JobRequestError: names the field, the value and what to give instead.
    """
    with airflow_exceptions():
        for name, check in field_checks.items():
            value = values.get(name)
            if name in _MAPPINGS and isinstance(value, Mapping):
                # One template among the values hides none of the others.
                value = {key: part for key, part in value.items() if is_literal(part, marks)}
            if name == "config" and isinstance(value, Mapping):
                value = with_placeholders(value, marks)
            elif name == "config" and not is_literal(value, marks):
                continue
            required = name in _REQUIRED and name in values
            if (value is not None or required) and (name == "config" or is_literal(value, marks)):
                check(value)
    action = values.get("on_kill_action", "cancel")
    if action not in cancellation.ON_KILL_ACTIONS:
        actions = ", ".join(map(repr, cancellation.ON_KILL_ACTIONS))
        raise JobRequestError(f"on_kill_action is {action!r}: give one of {actions}.")
    if "poll_interval" in values:
        check_poll_interval(values["poll_interval"])
    _check_start_timeout(values.get("start_timeout"))
    check_exit_codes(values.get("skip_on_exit_code"))
    _check_flags(values)
    if "datasphere_conn_id" in values:
        _check_conn_id(values["datasphere_conn_id"], marks)


def _check_requirements(value: Any) -> None:
    value = path_as_text(value)
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, (list, tuple)) or not all(isinstance(line, str) and line.strip() for line in lines):
        raise JobRequestError(
            f"requirements is {value!r}: give lines such as ['torch==2.9.0'], or the path of a requirements file."
        )


def _check_python_version(value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"3\.\d{1,2}", value):
        raise JobRequestError(f"python_version is {value!r}: give text such as '3.11'; it isn't templated.")


def _check_paths(name: str, value: Any) -> None:
    paths = [path_as_text(path) for path in value] if isinstance(value, (list, tuple)) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path.strip() for path in paths):
        raise JobRequestError(f"{name} is {value!r}: give a list of paths.")
    if name == "outputs" and (pattern := next((path for path in paths if overrides.is_pattern(path)), None)):
        raise JobRequestError(
            f"outputs has {pattern!r}, a pattern: DataSphere accepts it, and fails the job at its end. Give the path "
            "of one file or folder."
        )


def _check_serializer(value: Any) -> None:
    if value not in ("json", "cloudpickle"):
        raise JobRequestError(f"serializer is {value!r}: give 'json' or 'cloudpickle'.")


def _check_config(value: Any) -> None:
    """Check the configuration of a new job: the whole of a mapping, but for files; of a file its name."""
    from airflow_provider_datasphere.client.configuration.read import check_mapping, is_config_file

    checks.refuse_task("config", value)
    value = path_as_text(value)
    if isinstance(value, Mapping):
        check_mapping(value)
    elif not (isinstance(value, str) and is_config_file(value)):
        raise JobRequestError(f"config is {value!r}: give a mapping, or the path of a .yaml or .yml file.")


class CheckedPartial:
    """What ``.partial()`` returns; checks the known arguments before the tasks are expanded.

    :param partial: Airflow's own.
    :param given: the arguments of ``.partial()``.
    """

    def __init__(self, partial: Any, given: Mapping[str, Any], field_checks: FieldChecks) -> None:
        self._partial = partial
        self._field_checks = field_checks
        self._marks = template_marks(partial.kwargs.get("dag"))
        check_known_values(given, self._marks, field_checks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._partial, name)

    def expand(self, **mapped: Any) -> Any:
        """Map over arguments, as Airflow's own."""
        for name, values in mapped.items():
            for value in values if isinstance(values, (list, tuple)) else ():
                check_known_values({name: value}, self._marks, self._field_checks)
        return self._partial.expand(**mapped)

    def expand_kwargs(self, kwargs: Any, *, strict: bool = True) -> Any:
        """Map over sets of arguments, as Airflow's own."""
        for values in kwargs if isinstance(kwargs, (list, tuple)) else ():
            if isinstance(values, Mapping):
                check_known_values(values, self._marks, self._field_checks)
        return self._partial.expand_kwargs(kwargs, strict=strict)


def check_common(operator: Any) -> None:
    """Check what operators and the sensor have in common, as far as this one has it: flags and the connection's id.

    :raises JobRequestError: text, a template or an XCom where True or False is due; no connection id.
    """
    _check_flags(vars(operator))
    _check_conn_id(operator.datasphere_conn_id, template_marks(operator.get_dag()))


def _check_flags(values: Mapping[str, Any]) -> None:
    for name in _FLAGS:
        value = values.get(name, False)
        if not isinstance(value, bool):
            raise JobRequestError(f"{name} is {value!r}: give True or False; it isn't templated.")


def _check_conn_id(conn_id: object, marks: Collection[str]) -> None:
    if is_literal(conn_id, marks):
        with airflow_exceptions():
            checks.check_text("datasphere_conn_id", conn_id)
        if not conn_id:
            raise JobRequestError(f"datasphere_conn_id is {conn_id!r}: give the id of an Airflow connection.")


def check_literal_job_id(operator: Any, job_id: object, hint: str) -> None:
    """Check a job's id, if it is known at parse time.

    :param hint: what to give instead: "give the id of …".
    :raises JobRequestError: it can't be one.
    """
    if is_literal(job_id, template_marks(operator.get_dag())):
        with airflow_exceptions():
            checks.check_job_id("job_id", job_id, hint)


def check_count(name: str, value: object) -> None:
    """Check a number of things: 1 or more. It isn't templated."""
    if type(value) is not int or value < 1:
        raise JobRequestError(f"{name} is {value!r}: give a whole number, 1 or more; it isn't templated.")


def check_poll_interval(value: object) -> None:
    """Check a pause in seconds: no longer than Python can sleep (292 years)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= threading.TIMEOUT_MAX:
        raise JobRequestError(f"poll_interval is {value!r}: give a positive number of seconds; it isn't templated.")


def _check_start_timeout(value: object) -> None:
    """Check a duration: a timedelta or seconds, more than 0; None is any time."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or (isinstance(value, timedelta) and value > timedelta(0)) or (number and value > 0):  # type: ignore[operator]
        return
    raise JobRequestError(
        f"start_timeout is {value!r}: give a timedelta or a number of seconds, more than 0; it isn't templated."
    )


def as_seconds(timeout: timedelta | float | None) -> float | None:
    """Return a timeout in seconds; ``None`` for one that is no limit."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    return None if seconds is None or seconds > LONGEST_TIMEOUT.total_seconds() else float(seconds)


def check_exit_codes(value: object) -> None:
    """Check return codes that skip the task: one, or a collection of them."""
    codes: Iterable[object] = [value] if isinstance(value, int) else value if isinstance(value, Iterable) else [value]
    if value is not None and (
        isinstance(value, (str, bool)) or not all(type(code) is int and code != 0 for code in codes)
    ):
        raise JobRequestError(
            f"skip_on_exit_code is {value!r}: give a return code other than 0, or a list of them; it isn't templated."
        )


def path_as_text(value: Any) -> Any:
    """Return a path object, local or ``ObjectStoragePath``, as text; anything else unchanged."""
    return str(value) if isinstance(value, (PurePath, ObjectStoragePath)) else value


def paths_as_text(values: Any) -> Any:
    """Apply :func:`path_as_text` to the values of a mapping."""
    return {name: path_as_text(value) for name, value in values.items()} if isinstance(values, Mapping) else values


def template_marks(dag: Any) -> Collection[str]:
    """Return what begins a template in the fields of a DAG's tasks.

    :param dag: None where it isn't known yet.
    """
    given = getattr(dag, "jinja_environment_kwargs", None) or {}
    names = (*_TEMPLATE_MARKS, "line_statement_prefix", "line_comment_prefix")
    return [mark for name in names if (mark := given.get(name, _TEMPLATE_MARKS.get(name)))]


def is_literal(value: object, marks: Collection[str] = tuple(_TEMPLATE_MARKS.values())) -> bool:
    """Return whether a value is final: no template in it, and nothing that Airflow resolves later."""
    value = path_as_text(value)
    if isinstance(value, str):
        return not any(mark in value for mark in marks)
    if isinstance(value, Mapping):
        return all(is_literal(part, marks) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_literal(part, marks) for part in value)
    # XComArg, MappedArgument, DagParam and others show it by having resolve().
    return not hasattr(value, "resolve")


#: A template, in the place of what will only be known when the task runs.
_PLACEHOLDER = "{{ … }}"


def with_placeholders(value: Any, marks: Collection[str]) -> Any:
    """Return a mapping with a template in the place of everything in it that isn't known yet."""
    value = path_as_text(value)
    if isinstance(value, str):
        return value if is_literal(value, marks) else _PLACEHOLDER
    if isinstance(value, Mapping):
        return {with_placeholders(key, marks): with_placeholders(part, marks) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_placeholders(part, marks) for part in value]
    return _PLACEHOLDER if hasattr(value, "resolve") else value
