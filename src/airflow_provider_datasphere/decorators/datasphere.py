"""``@task.datasphere``: a Python function runs as a DataSphere job."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_datasphere.arguments import (
    FUNCTION_CHECKS,
    check_job_arguments,
    check_known_values,
    is_literal,
    paths_as_text,
    template_marks,
)
from airflow_provider_datasphere.compat import decorator_classes
from airflow_provider_datasphere.exceptions import JobRequestError, airflow_exceptions
from airflow_provider_datasphere.operators.function import FunctionJobOperator

if TYPE_CHECKING:
    from datetime import timedelta
    from pathlib import Path

    from airflow_provider_datasphere.client import cancellation
    from airflow_provider_datasphere.compat import ObjectStoragePath

_DecoratedOperator, _task_decorator_factory = decorator_classes()

#: Context variables that can't leave the worker, and what to do instead.
_WORKER_ONLY = {
    **dict.fromkeys(("ti", "task_instance"), "pull what you need by a template in an argument"),
    **dict.fromkeys(("task", "dag", "dag_run"), "take dag_run.conf, run_id or the like by a template in an argument"),
    **dict.fromkeys(("conn", "var", "macros", "conf"), "take the value by a template in an argument"),
    **dict.fromkeys(
        (
            "inlets",
            "outlets",
            "inlet_events",
            "outlet_events",
            "triggering_asset_events",
            "triggering_dataset_events",
            "task_state_store",
            "asset_state_store",
            "exception",
            "task_reschedule_count",
        ),
        "take what you need by a template in an argument",
    ),
}


class DataSphereDecoratedOperator(_DecoratedOperator, FunctionJobOperator):  # type: ignore[misc, valid-type]
    """The operator of one task of ``@task.datasphere``."""

    custom_operator_name = "@task.datasphere"
    template_fields: Sequence[str] = FunctionJobOperator.template_fields
    template_fields_renderers = FunctionJobOperator.template_fields_renderers

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = paths_as_text(inputs)
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            # Airflow binds the call when the DAG is parsed; an input's place stands for the path that the job has.
            op_kwargs=_with_inputs(python_callable, op_args or (), op_kwargs or {}, given),
            inputs=given,
            **kwargs,
        )
        check_job_arguments(self, FUNCTION_CHECKS)
        if self.serializer == "json":
            _check_call(self)


def _with_inputs(
    function: Callable[..., Any], op_args: Collection[Any], op_kwargs: Mapping[str, Any], inputs: Any
) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        return dict(op_kwargs)
    positional = list(inspect.signature(function).parameters)[: len(op_args)]
    for name in inputs:
        if name in positional or (name in op_kwargs and op_kwargs[name] != inputs[name]):
            raise JobRequestError(
                f"{function.__name__}: {name!r} is given by inputs and in the call: leave it out of the call, and pass "
                "what follows it by name."
            )
    return {**op_kwargs, **inputs}


def _check_call(operator: DataSphereDecoratedOperator) -> None:
    """
    :raises JobRequestError: an argument that is known at parse time can't be passed.
    """
    from airflow_provider_datasphere.client.function.encoding import encoded

    name = operator.python_callable.__name__
    parameters = list(inspect.signature(operator.python_callable).parameters)
    marks = template_marks(operator.get_dag())
    positional = [
        (parameters[n] if n < len(parameters) else f"argument {n}", v) for n, v in enumerate(operator.op_args)
    ]
    with airflow_exceptions():
        for parameter, value in (*positional, *operator.op_kwargs.items()):
            if is_literal(value, marks):
                encoded(name, parameter, value)
    _check_defaults(operator.python_callable)


def _check_defaults(function: Callable[..., Any]) -> None:
    from airflow_provider_datasphere.client.function.encoding import encoded

    with airflow_exceptions():
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                encoded(function.__name__, name, parameter.default)


def check_function(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check a function, and the arguments of its decorator, when the DAG is parsed.

    :param given: the decorator's arguments.
    :raises JobRequestError: it can't run in a job: it is no plain function, uses names that it hasn't there, takes what
        only the worker has; or an argument can't be what it is.
    """
    import sys

    from airflow_provider_datasphere.client.function.names import check_names
    from airflow_provider_datasphere.client.function.source import read_source

    check_known_values(given, template_marks(None), FUNCTION_CHECKS)
    version = given.get("python_version") or f"{sys.version_info.major}.{sys.version_info.minor}"
    with airflow_exceptions():
        source = read_source(function, version)
        check_names(source)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in _WORKER_ONLY and parameter.default in (None, parameter.empty):
            raise JobRequestError(
                f"{function.__name__} takes {name!r}, which exists on the worker only: {_WORKER_ONLY[name]}."
            )
    inputs = given.get("inputs")
    if isinstance(inputs, Mapping) and (unknown := [name for name in inputs if name not in source.parameters]):
        raise JobRequestError(
            f"inputs names {', '.join(map(repr, unknown))}, and {function.__name__} has no such parameter; it has "
            f"{', '.join(source.parameters) or 'none'}."
        )


def datasphere_task(
    python_callable: Callable[..., Any] | None = None,
    multiple_outputs: bool | None = None,
    *,
    project_id: str | None = None,
    requirements: Sequence[str] | str | Path | None = None,
    python_version: str | None = None,
    inputs: Mapping[str, str | Path | ObjectStoragePath] | None = None,
    outputs: Sequence[str] | None = None,
    modules: Sequence[str | Path] | None = None,
    serializer: str | None = None,
    env_vars: Mapping[str, str] | None = None,
    name: str | None = None,
    desc: str | None = None,
    docker: str | Mapping[str, Any] | None = None,
    working_storage: Mapping[str, Any] | None = None,
    cloud_instance_types: Sequence[str] | None = None,
    data_ttl: timedelta | int | str | None = None,
    deferrable: bool | None = None,
    start_timeout: timedelta | float | None = None,
    poll_interval: float | None = None,
    stream_logs: bool | None = None,
    on_kill_action: cancellation.OnKillAction | None = None,
    reattach: bool | None = None,
    fail_on_missing_outputs: bool | None = None,
    skip_on_exit_code: int | Collection[int] | None = None,
    datasphere_conn_id: str | None = None,
    **kwargs: Any,
) -> Any:
    """Run the decorated function as a DataSphere job; what it returns is the task's return value.

    The function's source is shipped, not a pickle. It imports inside what it uses. A parameter named in ``inputs`` is
    a ``pathlib.Path`` inside the job; the others are passed as JSON, with datetime, date, timedelta, Decimal, Path,
    UUID, bytes and tuple beside JSON's own types. ``train.function(...)`` calls the function itself.

    .. seealso:: ``docs/functions.md``; RPCs ``Create`` and ``Execute`` of ``ProjectJobService``.

    :param python_callable: the function.
    :param multiple_outputs: push each entry of a returned mapping as an XCom, as with ``@task``.
    :param project_id: the project in which the job is made; default: the connection's. (templated)
    :param requirements: lines as in a requirements file, or the path of one, relative to the DAG file. (templated)
    :param python_version: the job's, such as ``"3.11"``; default: the worker's own.
    :param inputs: parameter -> local path (relative to the DAG file), object-store URI or ``datasphere://…``.
        (templated)
    :param outputs: paths that the function writes, inside the job. (templated)
    :param modules: files and folders to ship, relative to the DAG file; the function imports them by their names.
    :param serializer: ``"json"`` (default), or ``"cloudpickle"`` for arguments and return value: it needs the same
        minor version of Python on both sides.
    :param env_vars: environment variables of the job; no place for secrets. (templated)
    :param name: name of the job. (templated)
    :param desc: description of the job. (templated)
    :param docker: resource id or system image name, or ``{"image": …, "username": …, "password": {"secret-id": …}}``;
        alone, without ``requirements`` and ``python_version``, the image's own Python runs the function. (templated)
    :param working_storage: ``{"type": "SSD", "size": "100GB"}``, at least 100 GB. (templated)
    :param cloud_instance_types: in order of preference. (templated)
    :param data_ttl: how long the service keeps the job's data: whole days, or ``"infinity"``; default 14. (templated)
    :param deferrable: wait in the triggerer. Default: ``[operators] default_deferrable``.
    :param start_timeout: how long the job may take until it computes (timedelta, or seconds). Default: any time.
    :param poll_interval: longest pause between two polls, seconds. Default: 10.
    :param stream_logs: stream the job's log to the task's log. Default: ``True``.
    :param on_kill_action: ``"cancel"`` (default), ``"graceful"`` or ``"keep"``.
    :param reattach: have a retry reattach to the job of an earlier try. Default: ``True``.
    :param fail_on_missing_outputs: fail when the function didn't write one of ``outputs``. Default: ``True``.
    :param skip_on_exit_code: return code or codes that skip the task.
    :param datasphere_conn_id: the connection. Default: ``datasphere_default``. (templated)
    :raises JobRequestError: the function can't run in a job, or an argument can't be what it is.
    """
    given = {
        argument: value
        for argument, value in {
            "project_id": project_id,
            "requirements": requirements,
            "python_version": python_version,
            "inputs": inputs,
            "outputs": outputs,
            "modules": modules,
            "serializer": serializer,
            "env_vars": env_vars,
            "name": name,
            "desc": desc,
            "docker": docker,
            "working_storage": working_storage,
            "cloud_instance_types": cloud_instance_types,
            "data_ttl": data_ttl,
            "deferrable": deferrable,
            "start_timeout": start_timeout,
            "poll_interval": poll_interval,
            "stream_logs": stream_logs,
            "on_kill_action": on_kill_action,
            "reattach": reattach,
            "fail_on_missing_outputs": fail_on_missing_outputs,
            "skip_on_exit_code": skip_on_exit_code,
            "datasphere_conn_id": datasphere_conn_id,
        }.items()
        # None is each one's default: a DAG's default_args apply.
        if value is not None
    }
    decorator = _task_decorator_factory(
        python_callable=None,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=DataSphereDecoratedOperator,
        **given,
        **kwargs,
    )

    def decorate(function: Callable[..., Any]) -> Any:
        check_function(function, given)
        return decorator(function)

    return decorate if python_callable is None else decorate(python_callable)
