"""Plays the cells of the scenario table on a real Airflow, all at once, and tells what each ended in."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator, Script, Settings
from harness.airflow import RealAirflow
from harness.cells import OUTPUTS, Column, Scenario, Stage

#: How often the events' director looks at the journal, seconds.
_TICK = 0.2
_LOOKS = frozenset({"Get", "Operation.Get"})
#: What differs from run to run.
_OWN = ("job_id", "started_at", "finished_at", "queued_seconds", "setup_seconds", "run_seconds")

_DAG = '''
"""A column of the scenario table: one task per scenario."""
import json
import os
import time
from datetime import datetime, timedelta
from pathlib import Path

# A dozen tasks that start at once must not keep the scheduler from noticing those that have ended.
os.nice(10)

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow import DAG

from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from airflow_provider_datasphere.operators.jobs import ExecuteJobOperator, ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

COLUMN = json.loads(@COLUMN@)
CELLS = COLUMN["cells"]


def forked(name):
    """The job that a sensor waits for: forked by the sensor's first look at its own arguments."""
    cell, note = CELLS[name], Path(COLUMN["folder"], name + ".json")
    if not note.exists():
        client = DataSphereHook(cell["conn_id"]).get_conn()
        job = client.fork_job(cell["source"])
        while cell["ended_first"] and not client.get_job(job.id).done:
            time.sleep(0.1)
        note.write_text(json.dumps({"job_id": job.id, "operation_id": job.operation_id}))
    return json.loads(note.read_text())


with DAG(
    COLUMN["dag_id"],
    schedule=None,
    start_date=datetime(2024, 1, 1),
    user_defined_macros={"forked": forked},
    default_args={"retries": COLUMN["retries"], "retry_delay": timedelta(seconds=0.1)},
    render_template_as_native_obj=False,
):
    for name, cell in CELLS.items():
        common = dict(task_id=name, datasphere_conn_id=cell["conn_id"], priority_weight=cell["weight"])
        if COLUMN["new"]:
            ExecuteJobOperator(config={"name": cell["job_name"], **cell["config"]}, **common, **cell["arguments"])
            continue
        if not COLUMN["sensor"]:
            ForkJobOperator(source_job_id=cell["source"], **common, **cell["arguments"])
            continue
        operation = {}
        if cell["with_operation"]:
            operation["operation_id"] = "{{ forked(task.task_id)['operation_id'] }}"
        DataSphereJobSensor(
            job_id="{{ forked(task.task_id)['job_id'] }}", timeout=2400, **operation, **common, **cell["arguments"]
        )
'''


@dataclass
class Cell:
    """One scenario in one column with one number of retries."""

    scenario: Scenario
    column: Column
    retries: int
    dag_id: str
    emulator: Emulator
    subject: str
    source: str
    airflow: RealAirflow | None = None
    run_id: str = ""
    state: str | None = None
    tries: int = 0

    @property
    def conn_id(self) -> str:
        return f"{self.dag_id}_{self.scenario.name}"

    @property
    def jobs(self) -> list[jobs_pb2.Job]:
        """The jobs that it has made."""
        if self.column.new:
            return [job for job in self.emulator.jobs() if job.name == self.conn_id]
        return self.emulator.jobs(parent=self.source)

    @property
    def result(self) -> dict[str, Any] | None:
        """The XCom ``result`` without what differs from run to run."""
        shown = self.xcom("result")
        return None if shown is None else {name: value for name, value in shown.items() if name not in _OWN}

    def xcom(self, key: str) -> Any:
        assert self.airflow is not None
        return self.airflow.xcom(self.dag_id, self.run_id, self.scenario.name, key)

    @property
    def log(self) -> str:
        """The last try's log."""
        assert self.airflow is not None
        return self.airflow.task_log(self.dag_id, self.run_id, self.scenario.name, self.tries)


@dataclass
class Play:
    """All cells of a table on one Airflow.

    :param emulator: plays the service, but for scenarios with settings of their own. Those emulators run until
        :meth:`close`.
    """

    emulator: Emulator
    columns: Iterable[Column]
    scenarios: Iterable[Scenario]
    retries: Iterable[int] = (0, 1)
    cells: dict[tuple[str, str, int], Cell] = field(init=False, default_factory=dict)
    #: What went wrong in an event.
    errors: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._emulators: dict[str, Emulator] = {}
        # Kept: an open folder's name is all that the DAGs know of it.
        self._folder = tempfile.TemporaryDirectory(prefix="scenarios-")
        for column in self.columns:
            for retries in self.retries:
                for scenario in self.scenarios:
                    if scenario.is_played(column, retries):
                        self._add(scenario, column, retries)

    def close(self) -> None:
        """Stop the emulators that it has started."""
        for emulator in self._emulators.values():
            emulator.close()

    def _emulator_of(self, scenario: Scenario) -> Emulator:
        if not scenario.settings:
            return self.emulator
        if scenario.name not in self._emulators:
            self._emulators[scenario.name] = Emulator(Settings(**scenario.settings), tls=False).start()
        return self._emulators[scenario.name]

    def _add(self, scenario: Scenario, column: Column, retries: int, again: str = "") -> Cell:
        emulator = self._emulator_of(scenario)
        dag_id = f"{column.name}_{retries}{again}"
        subject = emulator.iam.add_service_account(f"{dag_id}-{scenario.name}")
        emulator.iam.set_role(subject, emulator.project_id, "developer")
        if scenario.settings.get("clone_requires_started_source"):
            # Its own run takes the first script of all.
            source = emulator.create_scripted_job([Script(), *scenario.scripts], outputs=OUTPUTS, execute=True)
            emulator.wait_job(source)
        else:
            source = emulator.create_scripted_job(list(scenario.scripts), outputs=OUTPUTS)
        if scenario.source_cleared:
            emulator.clear_data(source)
        for fault in scenario.faults:
            method = "Create" if column.new and fault["method"] == "Clone" else fault["method"]
            emulator.faults.inject(subject=subject, **{**fault, "method": method})
        cell = Cell(scenario, column, retries, dag_id, emulator, subject, source)
        if column.new:
            emulator.script_new_jobs(cell.conn_id, list(scenario.scripts))
        self.cells[scenario.name, column.name, retries] = cell
        return cell

    def connections(self) -> dict[str, dict[str, Any]]:
        """Airflow's connections, for :class:`RealAirflow`."""
        return {cell.conn_id: self._connection(cell) for cell in self.cells.values()}

    def _connection(self, cell: Cell) -> dict[str, Any]:
        if cell.scenario.key:
            key = json.dumps(cell.emulator.iam.create_key(cell.subject))
            extra = cell.emulator.connection_extra(iam_token=None, service_account_json=key)
        else:
            extra = cell.emulator.connection_extra(iam_token=cell.emulator.iam.issue_token(cell.subject))
        return {"conn_type": "datasphere", "extra": extra}

    def _dags(self, cells: Iterable[Cell]) -> dict[str, str]:
        """DAG id → text; a file per column and number of retries, since each task parses its whole file."""
        columns: dict[str, list[Cell]] = {}
        for cell in cells:
            columns.setdefault(cell.dag_id, []).append(cell)
        return {
            dag_id: _DAG.replace("@COLUMN@", repr(json.dumps(self._column(dag_id, cells))))
            for dag_id, cells in columns.items()
        }

    def _column(self, dag_id: str, cells: list[Cell]) -> dict[str, Any]:
        folder = Path(self._folder.name, dag_id)
        folder.mkdir(exist_ok=True)
        column = cells[0].column
        return {
            "dag_id": dag_id,
            "folder": str(folder),
            "sensor": column.sensor,
            "new": column.new,
            "retries": cells[0].retries,
            "cells": {cell.scenario.name: self._cell(cell) for cell in cells},
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        arguments = {**cell.column.arguments, **cell.scenario.arguments}
        if cell.scenario.poke_interval is not None and arguments.get("mode") == "reschedule":
            arguments["poke_interval"] = cell.scenario.poke_interval
        return {
            "conn_id": cell.conn_id,
            "source": cell.source,
            "job_name": cell.conn_id,
            "config": {"cmd": "scripted", "outputs": [{path: var} for path, var in OUTPUTS]},
            "weight": cell.scenario.weight,
            "ended_first": cell.scenario.ended_first,
            "with_operation": cell.column.with_operation,
            "arguments": arguments,
        }

    def run(self, airflow: RealAirflow, timeout: float = 2400) -> None:
        """Play all cells together, and those again that a busy Airflow has lost on the way."""
        cells = list(self.cells.values())
        for attempt in range(1, 4):
            self._play(airflow, cells, timeout)
            lost = [cell for cell in cells if airflow.has_lost(cell.dag_id, cell.run_id, f"{cell.scenario.name} ")]
            cells = [self._add(cell.scenario, cell.column, cell.retries, f"_again{attempt}") for cell in lost]
            for cell in cells:
                airflow.add_connection(cell.conn_id, **self._connection(cell))
            if not cells:
                return

    def _play(self, airflow: RealAirflow, cells: Sequence[Cell], timeout: float) -> None:
        """Trigger the cells' DAGs, let the events happen, and wait for the end of all."""
        dags = self._dags(cells)
        for dag_id, source in dags.items():
            airflow.add_dag(dag_id, source, timeout=180)
        over = threading.Event()
        director = threading.Thread(target=self._direct, args=(over,), name="director", daemon=True)
        director.start()
        try:
            run_ids = {dag_id: airflow.trigger(dag_id) for dag_id in dags}
            deadline = time.monotonic() + timeout
            for dag_id, run_id in run_ids.items():
                # A run that doesn't end is told by its cells, each for itself.
                with suppress(TimeoutError):
                    airflow.wait_run(dag_id, run_id, max(1.0, deadline - time.monotonic()))
        finally:
            over.set()
            director.join()
        for dag_id, run_id in run_ids.items():
            instances = {instance["task_id"]: instance for instance in airflow.api.task_instances(dag_id, run_id)}
            for cell in cells:
                if cell.dag_id == dag_id:
                    instance = instances[cell.scenario.name]
                    cell.airflow, cell.run_id = airflow, run_id
                    cell.state, cell.tries = instance["state"], instance["try_number"]

    def _direct(self, over: threading.Event) -> None:
        """Have each cell's event happen once to each job: as soon as it runs, or after the first look at it."""
        waiting = {cell.subject: cell for cell in self.cells.values() if cell.scenario.event is not None}
        begun: set[str] = set()
        unseen: dict[str, str] = {}
        executed_at: dict[str, float] = {}
        since = time.time()
        while not over.wait(_TICK):
            # Calls that are still being answered are looked at again in a moment.
            calls = [
                call
                for emulator in (self.emulator, *self._emulators.values())
                for call in emulator.journal.calls(since=since)
            ]
            since = max(since, time.time() - 5.0)
            for call in calls:
                cell = waiting.get(call.subject or "")
                if cell is None or not call.code:
                    continue
                if call.method == "Execute" and call.effect and call.job_id not in begun:
                    begun.add(call.job_id)
                    if cell.scenario.at_once:
                        self._happen(cell, call.job_id)
                    else:
                        unseen[cell.subject] = call.job_id
                        executed_at[cell.subject] = call.time
                elif call.method in _LOOKS and cell.subject in unseen and call.time > executed_at[cell.subject]:
                    self._happen(cell, unseen.pop(cell.subject))

    def _happen(self, cell: Cell, job_id: str) -> None:
        event = cell.scenario.event
        assert event is not None

        def act() -> None:
            try:
                event(Stage(cell.emulator, cell.subject, job_id))
            except Exception as error:
                self.errors.append(f"{cell.conn_id}: {error!r}")

        threading.Thread(target=act, name=f"event-{cell.conn_id}", daemon=True).start()
