"""Checks of the arguments that a fork and a new job have in common, the same when a DAG is parsed and when it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from airflow_provider_datasphere.client.uri import SCHEME, check_job_file_uri
from airflow_provider_datasphere.client.validation import (
    check_docker,
    check_instance_types,
    check_strings,
    check_text,
    parse_ttl,
    parse_working_storage,
)

#: The limit of the official SDK for inputs, outputs, S3 connectors and datasets each.
MAX_ENTRIES = 100
_PATTERN = re.compile(r"[*?\[]")


def is_pattern(path: str) -> bool:
    """Return whether an output's path is a glob pattern: DataSphere accepts it, and fails the job at its end."""
    return bool(_PATTERN.search(path))


def check_vars(values: object, field_name: str = "vars") -> None:
    """Raise JobRequestError unless this is a mapping of variables to paths and URIs; a URI of a job's file names both.

    Inputs and outputs can be distinguished only when the source job, or the configuration, is known.
    """
    check_strings(field_name, values)
    assert isinstance(values, Mapping)
    for name, value in values.items():
        if value.startswith(f"{SCHEME}://"):
            check_job_file_uri(f"{field_name}[{name!r}]", value)


#: The check of each argument, for its whole value; raises :class:`JobRequestError`.
OVERRIDE_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "args": lambda value: check_strings("args", value),
    "vars": check_vars,
    "env_vars": lambda value: check_strings("env_vars", value),
    "name": lambda value: check_text("name", value),
    "desc": lambda value: check_text("desc", value),
    "docker": check_docker,
    "working_storage": parse_working_storage,
    "cloud_instance_types": check_instance_types,
    "data_ttl": lambda value: parse_ttl("data_ttl", value),
}
