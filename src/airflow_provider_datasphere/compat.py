"""One place for what differs between Airflow 2.11 and the newest 3.x; everybody else imports from here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from airflow import __version__ as _airflow_version

AIRFLOW_VERSION: tuple[int, int] = tuple(int(part) for part in _airflow_version.split(".")[:2])  # type: ignore[assignment]
AIRFLOW_V_3_0_PLUS = AIRFLOW_VERSION >= (3, 0)
AIRFLOW_V_3_1_PLUS = AIRFLOW_VERSION >= (3, 1)
AIRFLOW_V_3_2_PLUS = AIRFLOW_VERSION >= (3, 2)
AIRFLOW_V_3_3_PLUS = AIRFLOW_VERSION >= (3, 3)


def _first(name: str, *modules: str) -> Any:
    """The attribute ``name`` of the first of ``modules`` that has it (Airflow moves its public names about)."""
    for module in modules:
        try:
            # vars(), not getattr(): a deprecated module's __getattr__ would warn, and hide the newer home.
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
        # Airflow 2 learns the layout of datasphere:// paths from the file system's class, if that is there in time.
        _first("register_implementation", "fsspec")(
            "datasphere",
            _first("DataSphereFileSystem", "airflow_provider_datasphere.filesystems.datasphere"),
            clobber=True,
        )

    def _error(name: str) -> Any:
        return _first(name, "airflow.sdk.exceptions", "airflow.exceptions")

    AirflowException = _error("AirflowException")
    AirflowFailException = _error("AirflowFailException")
    AirflowSensorTimeout = _error("AirflowSensorTimeout")
    AirflowSkipException = _error("AirflowSkipException")
    AirflowTaskTimeout = _error("AirflowTaskTimeout")
    TaskDeferred = _error("TaskDeferred")


def current_context() -> Context:
    """The running task's context, for code that Airflow doesn't give it to.

    :raises Exception: no task is running.
    """
    get_current_context = _first("get_current_context", "airflow.sdk.definitions.context", "airflow.operators.python")
    context: Context = get_current_context()
    return context


def resumed_by_this_try(next_kwargs: dict[str, Any] | None, context: Context) -> bool:
    """Whether the deferral that a task is resumed from is its own, by the ``try_number`` in the trigger's event.

    Airflow 3.0 doesn't forget the deferral of a try that has failed, and resumes the next one from it.
    """
    event = (next_kwargs or {}).get("event")
    deferred_in = event.get("try_number") if isinstance(event, dict) else None
    # Airflow 2.11 on SQLite may count a try twice; it has never resumed one try from another's deferral.
    return not AIRFLOW_V_3_0_PLUS or deferred_in in (None, context["ti"].try_number)


def task_state(ti: Any) -> str | None:
    """The state that Airflow's database holds for a task instance right now; ``None`` for none.

    Blocks for one question to Airflow; on Airflow 3 through the process's only channel to its supervisor.

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
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        state = session.scalar(
            select(TaskInstance.state).where(
                TaskInstance.dag_id == ti.dag_id,
                TaskInstance.run_id == ti.run_id,
                TaskInstance.task_id == ti.task_id,
                TaskInstance.map_index == ti.map_index,
            )
        )
        return str(state) if state else None


async def atask_state(ti: Any) -> str | None:
    """The same, for a trigger."""
    from asgiref.sync import sync_to_async

    # In a thread of asgiref's, and no other: there Airflow 3 puts the question on the trigger's own event loop. On
    # another one the answer would be lost, and all further answers to that triggerer with it.
    return await sync_to_async(task_state, thread_sensitive=False)(ti)


def mask_secret(secret: str) -> None:
    """Have Airflow replace ``secret`` by asterisks in everything this process logs from now on."""
    _first(
        "mask_secret",
        "airflow.sdk.log",
        "airflow.sdk.execution_time.secrets_masker",
        "airflow.utils.log.secrets_masker",
    )(secret)


__all__ = [
    "AIRFLOW_VERSION",
    "AIRFLOW_V_3_0_PLUS",
    "AIRFLOW_V_3_1_PLUS",
    "AIRFLOW_V_3_2_PLUS",
    "AIRFLOW_V_3_3_PLUS",
    "AirflowException",
    "AirflowFailException",
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
    "conf",
    "current_context",
    "mask_secret",
    "task_state",
]
