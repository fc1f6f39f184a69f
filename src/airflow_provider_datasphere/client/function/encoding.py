"""Arguments of a function, with errors that name it."""

from __future__ import annotations

from typing import Any

from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.function import values


def encoded(function: str, name: str, value: Any) -> Any:
    """Return an argument as JSON has it.

    :raises JobRequestError: it can't be passed; names the function and the argument.
    """
    try:
        return values.encode(value, name)
    except values.UnsupportedValueError as error:
        raise JobRequestError(f"{function}: the argument {error}") from error
