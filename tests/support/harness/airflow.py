"""A real Airflow for tests: scheduler, triggerer, DAG processor and API server, each killable."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import tempfile
import textwrap
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from harness import postgres
from harness.api import Api, Api2, ApiError, Json
from harness.components import Components
from harness.home import AirflowHome
from harness.venvs import NEWEST, AirflowVenv, airflow_venv

END_STATES = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})
_HEALTH_NAMES = {"scheduler": "scheduler", "triggerer": "triggerer", "dag-processor": "dag_processor"}


class RealAirflow:
    """A running Airflow, 2.11 or 3.x, as a context manager.

    ::

        with RealAirflow("3.3.2", connections={"datasphere_default": emulator_connection}) as airflow:
            airflow.add_dag("forks", source)
            run_id = airflow.trigger("forks")
            assert airflow.wait_run("forks", run_id) == "success"

    :param version: an Airflow version; its environment is made when missing
    :param dags: file name (without ``.py``) → source, or a folder to copy
    :param connections: connection id → its fields (``conn_type``, ``host``, …, ``extra`` as a mapping)
    :param env: further environment variables of all components
    :param components: what to start; default: everything this version has
    :param venv: an environment other than the usual one of this version
    :param sqlite: whether its database is a SQLite file; default: PostgreSQL where this machine has it and the
        environment is the usual one
    """

    def __init__(
        self,
        version: str = NEWEST,
        *,
        dags: Mapping[str, str] | Path | None = None,
        connections: Mapping[str, Mapping[str, Json]] | None = None,
        env: Mapping[str, str] | None = None,
        components: Sequence[str] | None = None,
        venv: AirflowVenv | None = None,
        sqlite: bool = False,
    ) -> None:
        self.version = version
        self._venv = venv
        self.is_2 = version.startswith("2.")
        self._dags = dags or {}
        self._connections = connections or {}
        self._env = env or {}
        self._wanted = components
        self._sqlite = sqlite or venv is not None or postgres.programs() is None
        self._numbers = itertools.count(1)

    # ---- life ----

    def __enter__(self) -> RealAirflow:
        folder = Path(tempfile.mkdtemp(prefix=f"airflow-{self.version}-")).resolve()
        self.home = self._make_home(folder, self._connection_variables() | dict(self._env))
        self.components = self._make_components()
        self.api: Api = (Api2 if self.is_2 else Api)(f"http://127.0.0.1:{self.home.port}")
        try:
            self.home.prepare()
            if isinstance(self._dags, Path):
                shutil.copytree(self._dags, self.home.dags, dirs_exist_ok=True)
            else:
                for name, source in self._dags.items():
                    self._write_dag(name, source)
            for name in self._wanted or self.components.commands:
                self.components.start(name)
            self.wait_healthy()
        except BaseException:
            self.close()
            raise
        return self

    def _make_home(self, folder: Path, environment: dict[str, str]) -> AirflowHome:
        server = None if self._sqlite else postgres.server()
        return AirflowHome(self._venv or airflow_venv(self.version), folder, environment, postgres=server)

    def _make_components(self) -> Components:
        return Components(self.home)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes of this instance and remove its folder."""
        self.components.stop()
        self.home.remove_database()
        shutil.rmtree(self.home.path, ignore_errors=True)

    def _connection_variables(self) -> dict[str, str]:
        return {f"AIRFLOW_CONN_{name.upper()}": json.dumps(fields) for name, fields in self._connections.items()}

    # ---- components ----

    def start(self, name: str, *, wait: bool = True) -> None:
        """Start "scheduler", "triggerer", "dag-processor" (3.x) or "api-server", and wait until it is well."""
        self.components.start(name)
        if wait:
            self.wait_healthy()

    def kill(self, name: str, signal_number: int = signal.SIGKILL, *, whole: bool = True) -> None:
        """Signal a component and wait for its end; ``whole=False`` spares the children of its main process."""
        self.components.kill(name, signal_number, whole=whole)

    def output(self, name: str) -> str:
        """What a component has printed so far."""
        return self.components.output_file(name).read_text(errors="replace")

    def wait_healthy(self, timeout: float = 180) -> None:
        """Wait until each running component has reported itself to the API."""
        started = [_HEALTH_NAMES[name] for name in self.components.running if name in _HEALTH_NAMES]

        def healthy() -> bool:
            health = self.api.health()
            return bool(health) and all(health.get(name) == "healthy" for name in started)

        if "api-server" in self.components.running:
            self.until(healthy, timeout, f"components healthy, last seen {self.api.health()}")

    def until(self, condition: Any, timeout: float, what: str, interval: float = 0.25) -> Any:
        """Call ``condition`` until it returns something true, and return that.

        :raises TimeoutError: ``timeout`` seconds have passed
        :raises RuntimeError: a component has died meanwhile
        """
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            self.components.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"Airflow {self.version}, {timeout:.0f} s: no {what}")
            time.sleep(interval)
        return found

    # ---- DAGs, connections, variables ----

    def _write_dag(self, name: str, source: str) -> None:
        path = self.home.dags / f"{name}.py"
        # Renamed into place: the DAG processor never reads half a file.
        draft = path.with_suffix(".draft")
        draft.write_text(textwrap.dedent(source))
        draft.replace(path)

    def add_dag(self, name: str, source: str, dag_ids: Collection[str] = (), timeout: float = 60) -> None:
        """Write a DAG file and wait until its DAGs can be triggered; also replaces a file of that name.

        :param name: file name without ``.py``
        :param dag_ids: DAGs to wait for; default: one named as the file
        :raises AssertionError: the file does not import; with Airflow's traceback
        """
        self._write_dag(name, source)
        wanted = set(dag_ids or [name])

        def known() -> bool:
            for error in self.api.get("/importErrors", limit=100)["import_errors"]:
                if Path(error["filename"]).name == f"{name}.py":
                    raise AssertionError(error["stack_trace"])
            return all(self._has_dag(dag_id) for dag_id in wanted)

        self.until(known, timeout, f"DAG {sorted(wanted)} parsed")

    def remove_dags(self) -> None:
        """Remove all DAG files."""
        for path in self.home.dags.glob("*.py"):
            path.unlink()

    def _has_dag(self, dag_id: str) -> bool:
        try:
            return bool(self.api.get(f"/dags/{dag_id}/details")["dag_id"])
        except ApiError as error:
            # Airflow 2 answers 500 for a moment while it writes a new DAG down.
            if error.status != 404 and not (self.is_2 and error.status == 500):
                raise
            return False

    def add_connection(self, conn_id: str, **fields: Json) -> None:
        """Make or change a connection; ``extra`` may be a mapping."""
        self.api.put_connection(conn_id, fields)

    def set_variable(self, key: str, value: str) -> None:
        """Make or change an Airflow Variable."""
        self.api.put_variable(key, value)

    # ---- runs ----

    def trigger(self, dag_id: str, conf: dict[str, Json] | None = None, run_id: str | None = None) -> str:
        """Start a run and return its id."""
        run_id = run_id or f"run{next(self._numbers)}"
        self.api.trigger(dag_id, run_id, conf or {})
        return run_id

    def run_state(self, dag_id: str, run_id: str) -> str:
        return str(self.api.get(f"/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def wait_run(self, dag_id: str, run_id: str, timeout: float = 120) -> str:
        """Wait for the end of a run: "success" or "failed"."""
        state = ""

        def ended() -> bool:
            nonlocal state
            state = self.run_state(dag_id, run_id)
            return state in {"success", "failed"}

        try:
            self.until(ended, timeout, "end")
        except TimeoutError:
            states = self.task_states(dag_id, run_id)
            raise TimeoutError(f"{dag_id} {run_id} is {state} after {timeout:.0f} s: {states}") from None
        return state

    def run(self, dag_id: str, conf: dict[str, Json] | None = None, timeout: float = 120) -> str:
        """Trigger a run, wait for its end and return its id; another run, where Airflow has lost a task on the way."""
        for _ in range(3):
            run_id = self.trigger(dag_id, conf)
            self.wait_run(dag_id, run_id, timeout)
            if not self.has_lost(dag_id, run_id):
                break
        return run_id

    def has_lost(self, dag_id: str, run_id: str, task_id: str = "") -> bool:
        """Whether Airflow has failed a task of this run without running it.

        A slow scheduler takes the end of the part before a deferral or reschedule for the end of the part after it,
        which it has just queued.
        """
        marks = (f"<TaskInstance: {dag_id}.{task_id}", f" {run_id} ", "finished with state success, but")
        return any(all(mark in line for mark in marks) for line in self.output("scheduler").splitlines())

    # ---- tasks ----

    def task_instance(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[str, Json]:
        """A task instance as the API gives it: state, try_number, max_tries, pid, hostname, rendered_fields, …"""
        answer: dict[str, Json] = self.api.get(self.api.task_path(dag_id, run_id, task_id, map_index))
        return answer

    def task_states(self, dag_id: str, run_id: str) -> dict[tuple[str, int], str | None]:
        """(task id, map index) → state, None before Airflow has looked at the task."""
        found = self.api.task_instances(dag_id, run_id)
        return {(instance["task_id"], instance["map_index"]): instance["state"] for instance in found}

    def state(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str | None:
        return self.task_states(dag_id, run_id).get((task_id, map_index))

    def wait_task(
        self,
        dag_id: str,
        run_id: str,
        task_id: str,
        states: str | Collection[str] = END_STATES,
        timeout: float = 60,
        map_index: int = -1,
        try_number: int = 1,
    ) -> str:
        """Wait until a task is in one of these states, in this try or a later one, and return the state."""
        wanted = {states} if isinstance(states, str) else set(states)
        seen: Json = None

        def reached() -> str | None:
            nonlocal seen
            for instance in self.api.task_instances(dag_id, run_id):
                if (instance["task_id"], instance["map_index"]) == (task_id, map_index):
                    seen = instance["state"], instance["try_number"]
                    if instance["state"] in wanted and instance["try_number"] >= try_number:
                        return str(instance["state"])
            return None

        try:
            return str(self.until(reached, timeout, "state"))
        except TimeoutError:
            where = f"{dag_id} {run_id} {task_id} [{map_index}]"
            log = ""
            with contextlib.suppress(ApiError):
                log = self.task_log(dag_id, run_id, task_id, seen[1] if seen else 1, map_index)[-3000:]
            message = f"{where} is in (state, try) {seen}, not {sorted(wanted)}, after {timeout:.0f} s\n{log}"
            raise TimeoutError(message) from None

    def task_log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1) -> str:
        """A try's log as plain text, the triggerer's part included, as the page shows it."""
        return self.api.log(dag_id, run_id, task_id, try_number, map_index)

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1) -> Json:
        """An XCom's value; None if there is none."""
        try:
            return self.api.xcom(dag_id, run_id, task_id, key, map_index)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def xcoms(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[str, Json]:
        """All XComs of a task, key → value."""
        path = f"{self.api.task_path(dag_id, run_id, task_id)}/xcomEntries"
        entries = self.api.get(path, limit=100)["xcom_entries"]
        keys = {entry["key"] for entry in entries if entry.get("map_index", -1) == map_index}
        return {key: self.xcom(dag_id, run_id, task_id, key, map_index) for key in sorted(keys)}

    def links(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[str, str | None]:
        """The task's buttons, name → address."""
        path = f"{self.api.task_path(dag_id, run_id, task_id)}/links"
        answer = self.api.get(path, map_index=map_index)
        return dict(answer.get("extra_links", answer))

    def rendered_fields(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[str, Json]:
        return dict(self.task_instance(dag_id, run_id, task_id, map_index)["rendered_fields"])

    def set_task_state(self, dag_id: str, run_id: str, task_id: str, state: str, map_index: int = -1) -> None:
        """Mark a task "failed", "success" or "skipped" as a person does."""
        self.api.set_state(dag_id, run_id, task_id, state, map_index)

    def clear(self, dag_id: str, run_id: str, *task_ids: str, map_index: int = -1) -> None:
        """Clear tasks of a run as a person does; its state goes back to running."""
        if all(state in END_STATES for state in self.task_states(dag_id, run_id).values()):
            # The scheduler is about to end the run; a clear just before would be overwritten by that end.
            self.wait_run(dag_id, run_id, 60)
        tasks: list[Json] = [task_id if map_index < 0 else [task_id, map_index] for task_id in task_ids]
        self.api.clear(dag_id, run_id, tasks)

    # ---- processes of a task ----

    def task_process(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> psutil.Process:
        """The process that runs the operator's code now; its ``parent()`` is the supervisor (2.x: the task's job)."""

        def find() -> psutil.Process | None:
            instance = self.task_instance(dag_id, run_id, task_id, map_index)
            if instance["state"] != "running" or not instance["pid"]:
                return None
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(instance["pid"])
            return None

        process: psutil.Process = self.until(find, 60, f"process of {dag_id} {run_id} {task_id}")
        return process
