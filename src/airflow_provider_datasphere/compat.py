"""Differences between Airflow 2.11 and the newest 3.x, in one place; other modules import from here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any
from uuid import UUID

from airflow import __version__ as _airflow_version

_VERSION: tuple[int, int] = tuple(int(part) for part in _airflow_version.split(".")[:2])  # type: ignore[assignment]
AIRFLOW_V_3_0_PLUS = _VERSION >= (3, 0)
AIRFLOW_V_3_1_PLUS = _VERSION >= (3, 1)
AIRFLOW_V_3_3_PLUS = _VERSION >= (3, 3)


def _first(name: str, *modules: str) -> Any:
    """Return attribute ``name`` of the first of ``modules`` that has it, as Airflow moves its public names."""
    for module in modules:
        try:
            # vars(), not getattr(): a deprecated module's __getattr__ would warn, and hide the new home.
            return vars(import_module(module))[name]
        except (ImportError, KeyError):
            continue
    return getattr(import_module(modules[-1]), name)


if TYPE_CHECKING:
    from airflow.sdk import BaseHook, BaseOperator, BaseOperatorLink, BaseSensorOperator, Context, ObjectStoragePath
    from airflow.sdk.bases.sensor import PokeReturnValue
    from airflow.sdk.configuration import conf
    from airflow.sdk.exceptions import (
        AirflowException,
        AirflowFailException,
        AirflowNotFoundException,
        AirflowSensorTimeout,
        AirflowSkipException,
        AirflowTaskTimeout,
        TaskDeferred,
    )
    from airflow.sdk.execution_time.xcom import XCom
else:
    BaseHook = _first("BaseHook", "airflow.sdk.bases.hook", "airflow.hooks.base")
    BaseOperator = _first("BaseOperator", "airflow.sdk.bases.operator", "airflow.models.baseoperator")
    BaseOperatorLink = _first("BaseOperatorLink", "airflow.sdk.bases.operatorlink", "airflow.models.baseoperatorlink")
    BaseSensorOperator = _first("BaseSensorOperator", "airflow.sdk.bases.sensor", "airflow.sensors.base")
    PokeReturnValue = _first("PokeReturnValue", "airflow.sdk.bases.sensor", "airflow.sensors.base")
    Context = _first("Context", "airflow.sdk.definitions.context", "airflow.utils.context")
    XCom = _first("XCom", "airflow.sdk.execution_time.xcom", "airflow.models.xcom")
    conf = _first("conf", "airflow.sdk.configuration", "airflow.configuration")
    ObjectStoragePath = _first("ObjectStoragePath", "airflow.sdk.io.path", "airflow.sdk.io", "airflow.io.path")
    if not AIRFLOW_V_3_0_PLUS:
        # Airflow 2 takes the layout of datasphere:// paths from the file system's class, if it is registered in time.
        _first("register_implementation", "fsspec")(
            "datasphere",
            _first("DataSphereFileSystem", "airflow_provider_datasphere.filesystems.datasphere"),
            clobber=True,
        )

    def _error(name: str) -> Any:
        return _first(name, "airflow.sdk.exceptions", "airflow.exceptions")

    AirflowException = _error("AirflowException")
    AirflowFailException = _error("AirflowFailException")
    AirflowNotFoundException = _error("AirflowNotFoundException")
    AirflowSensorTimeout = _error("AirflowSensorTimeout")
    AirflowSkipException = _error("AirflowSkipException")
    AirflowTaskTimeout = _error("AirflowTaskTimeout")
    TaskDeferred = _error("TaskDeferred")


def decorator_classes() -> tuple[Any, Any]:
    """Return the base class of decorated operators, and what makes a decorator of one; only decorators need them."""
    modules = ("airflow.sdk.bases.decorator", "airflow.decorators.base")
    return _first("DecoratedOperator", *modules), _first("task_decorator_factory", *modules)


def current_context() -> Context:
    """Return the running task's context, for code that doesn't receive it.

    :raises Exception: no task is running.
    """
    get_current_context = _first("get_current_context", "airflow.sdk.definitions.context", "airflow.operators.python")
    context: Context = get_current_context()
    return context


def resumed_by_this_try(next_kwargs: dict[str, Any] | None, context: Context) -> bool:
    """Return whether a task is resumed from its own deferral, by the ``try_number`` in the trigger's event.

    Airflow 3.0 keeps the deferral of a failed try, and resumes the next try from it.
    """
    event = (next_kwargs or {}).get("event")
    deferred_in = event.get("try_number") if isinstance(event, dict) else None
    # Airflow 2.11 on SQLite may count a try twice; it has never resumed one try from another's deferral.
    return not AIRFLOW_V_3_0_PLUS or deferred_in in (None, context["ti"].try_number)


def deferral_timed_out(next_method: str, next_kwargs: dict[str, Any] | None) -> bool:
    """Whether Airflow itself has ended a deferral because its timeout has passed, by the error it resumes with.

    Airflow 2 says "Trigger/execution timeout", Airflow 3 "Trigger timeout".
    """
    return next_method == "__fail__" and "timeout" in str((next_kwargs or {}).get("error", "")).lower()


def was_rescheduled(context: Context) -> bool:
    """Return whether this is not the first poke of a sensor in reschedule mode."""
    if AIRFLOW_V_3_0_PLUS:
        return bool(context.get("task_reschedule_count"))

    from airflow.models.taskreschedule import TaskReschedule
    from airflow.utils.session import create_session

    ti: Any = context["ti"]
    with create_session() as session:
        return session.scalar(TaskReschedule.stmt_for_task_instance(ti)) is not None


def task_state(ti: Any) -> str | None:
    """Return the current state of a task instance in Airflow's database; ``None``: no state.

    Blocks for one request to Airflow; on Airflow 3 over the process's only channel to its supervisor.

    :param ti: anything with ``dag_id``, ``run_id``, ``task_id`` and ``map_index``.
    """
    if not AIRFLOW_V_3_0_PLUS:
        return _task_state_2(ti)

    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    map_index = ti.map_index if ti.map_index is not None else -1
    states = RuntimeTaskInstance.get_task_states(
        dag_id=ti.dag_id,
        task_ids=[ti.task_id],
        run_ids=[ti.run_id],
        map_index=map_index if map_index >= 0 else None,
    ).get(ti.run_id, {})
    # A mapped task instance is listed by task id and map index.
    state = states.get(f"{ti.task_id}_{map_index}" if map_index >= 0 else ti.task_id)
    return str(getattr(state, "value", state)) if state else None


def _task_state_2(ti: Any) -> str | None:
    row = _row_2(ti)
    return str(row.state) if row is not None and row.state else None


def _row_2(ti: Any) -> Any:
    """Return a task instance's state and the id of its Airflow job from Airflow 2's database."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        return session.execute(
            select(TaskInstance.state, TaskInstance.job_id).where(
                TaskInstance.dag_id == ti.dag_id,
                TaskInstance.run_id == ti.run_id,
                TaskInstance.task_id == ti.task_id,
                TaskInstance.map_index == ti.map_index,
            )
        ).one_or_none()


def is_overtaken(ti: Any) -> bool:
    """Return whether a newer try of the running task has begun, after this process lost contact with Airflow.

    Blocks for one request to Airflow. ``False`` outside a task.

    :raises Exception: Airflow doesn't answer.
    """
    if not AIRFLOW_V_3_0_PLUS:
        mine = getattr(ti, "job_id", None)
        if not isinstance(mine, int):
            return False
        row = _row_2(ti)
        return row is None or row.job_id not in (None, mine)

    # In Airflow 3 each try's task instance has an id of its own, and only the newest one exists.
    from airflow.sdk.exceptions import AirflowRuntimeError
    from airflow.sdk.execution_time import comms, task_runner

    supervisor, ti_id = getattr(task_runner, "SUPERVISOR_COMMS", None), getattr(ti, "id", None)
    if supervisor is None or not isinstance(ti_id, UUID):
        return False
    try:
        # The request with this id that changes nothing.
        supervisor.send(comms.ValidateInletsAndOutlets(ti_id=ti_id))
    except AirflowRuntimeError as error:
        if (error.error.detail or {}).get("status_code") == 404:
            return True
        raise
    return False


async def atask_state(ti: Any) -> str | None:
    """:func:`task_state`, for a trigger."""
    from asgiref.sync import sync_to_async

    # In a thread of asgiref's, and no other: there Airflow 3 puts the question on the trigger's own event loop. On
    # another one the answer would be lost, and all further answers to that triggerer with it.
    return await sync_to_async(task_state, thread_sensitive=False)(ti)


async def atask_xcom(ti: Any, key: str) -> Any:
    """Return an XCom of a task instance, for a trigger; ``None``: there is none."""
    from asgiref.sync import sync_to_async

    map_index = ti.map_index if ti.map_index is not None else -1
    return await sync_to_async(XCom.get_one, thread_sensitive=False)(
        key=key, dag_id=ti.dag_id, task_id=ti.task_id, run_id=ti.run_id, map_index=map_index
    )


def delete_return_value(ti: Any, logger: Any) -> None:
    """Delete the ``return_value`` XCom of a running task. On failure it stays, and a warning is logged.

    :param ti: the running task's own instance.
    """
    try:
        if AIRFLOW_V_3_0_PLUS:
            # XCom.delete would do, but that of 3.0 forgets the map index.
            comms = import_module("airflow.sdk.execution_time.comms")
            runner = import_module("airflow.sdk.execution_time.task_runner")
            message = comms.DeleteXCom(
                key="return_value", dag_id=ti.dag_id, run_id=ti.run_id, task_id=ti.task_id, map_index=ti.map_index
            )
            runner.SUPERVISOR_COMMS.send(message)
        else:
            _delete_xcom_2(ti, "return_value")
    except Exception as error:
        logger.warning("Failed to delete the task's return_value XCom: %s", error)


def _delete_xcom_2(ti: Any, key: str) -> None:
    from airflow.models.xcom import BaseXCom
    from airflow.utils.session import create_session
    from sqlalchemy import delete

    with create_session() as session:
        session.execute(
            delete(BaseXCom).where(
                BaseXCom.dag_id == ti.dag_id,
                BaseXCom.run_id == ti.run_id,
                BaseXCom.task_id == ti.task_id,
                BaseXCom.map_index == ti.map_index,
                BaseXCom.key == key,
            )
        )


def mask_secret(secret: str) -> None:
    """Make Airflow mask ``secret`` in everything that this process logs from now on."""
    _first(
        "mask_secret",
        "airflow.sdk.log",
        "airflow.sdk.execution_time.secrets_masker",
        "airflow.utils.log.secrets_masker",
    )(secret)


__all__ = [
    "AIRFLOW_V_3_0_PLUS",
    "AIRFLOW_V_3_1_PLUS",
    "AIRFLOW_V_3_3_PLUS",
    "AirflowException",
    "AirflowFailException",
    "AirflowNotFoundException",
    "AirflowSensorTimeout",
    "AirflowSkipException",
    "AirflowTaskTimeout",
    "BaseHook",
    "BaseOperator",
    "BaseOperatorLink",
    "BaseSensorOperator",
    "Context",
    "ObjectStoragePath",
    "PokeReturnValue",
    "TaskDeferred",
    "XCom",
    "atask_state",
    "atask_xcom",
    "conf",
    "current_context",
    "deferral_timed_out",
    "delete_return_value",
    "is_overtaken",
    "mask_secret",
    "resumed_by_this_try",
    "task_state",
    "was_rescheduled",
]
