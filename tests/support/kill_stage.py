"""Scenes of tasks that are ended in the middle, played at the same time on one real Airflow and one emulator."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator, Script
from datasphere_emulator.journal import Call
from harness import RealAirflow

#: Tasks that run at once; Airflow has eight slots.
AT_ONCE = 5
#: Generous: a scene takes 5 to 20 seconds alone.
PATIENCE = 240.0

HEADER = """
from __future__ import annotations

from datetime import datetime, timedelta

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow.models.dag import DAG

from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor
"""

DAG_TEXT = """
SOURCE = "{source}"
with DAG(
    "{dag_id}",
    schedule=None,
    start_date=datetime(2024, 1, 1),
    default_args={{"datasphere_conn_id": "{conn_id}", "retry_delay": timedelta(seconds=1)}},
):
{tasks}
"""


@dataclass(frozen=True)
class Scene:
    """What happens to one DAG run.

    :param tasks: the DAG's tasks; ``SOURCE`` is the id of a job of the scene's own.
    :param script: what its forks do, execution by execution; ``None``: run until :meth:`Act.let_the_program_end`.
    :param draft: further fields of the source job.
    :param own_emulator: for scenes that spoil calls.
    """

    name: str
    play: Callable[[Act], None]
    tasks: str
    script: Script | list[Script] | None
    draft: dict[str, Any]
    own_emulator: bool


@dataclass
class Scenes:
    """The scenes of one test module."""

    scenes: list[Scene] = field(default_factory=list)

    def add(
        self, tasks: str, *, script: Script | list[Script] | None, own_emulator: bool = False, **draft: Any
    ) -> Callable[[Callable[[Act], None]], Callable[[Act], None]]:
        def register(play: Callable[[Act], None]) -> Callable[[Act], None]:
            self.scenes.append(Scene(play.__name__, play, tasks, script, draft, own_emulator))
            return play

        return register

    def params(self) -> list[Any]:
        return [pytest.param(scene, id=scene.name) for scene in self.scenes]


class Act:
    """One run of a scene's DAG."""

    def __init__(self, airflow: RealAirflow, emulator: Emulator, scene: Scene, conn_id: str, folder: Path) -> None:
        self.airflow = airflow
        self.version = tuple(int(part) for part in airflow.version.split(".")[:2])
        self.emulator = emulator
        self.scene = scene
        self.dag_id = scene.name
        self.conn_id = conn_id
        self.run_id = ""
        self._flag = folder / f"{scene.name}.ends"
        if scene.script is None:
            program = f"until [ -e {self._flag} ]; do sleep 0.2; done; echo the end"
            self.source = emulator.create_job(program, **scene.draft)
        else:
            self.source = emulator.create_scripted_job(scene.script, **scene.draft)

    @property
    def dag(self) -> str:
        tasks = textwrap.indent(textwrap.dedent(self.scene.tasks).strip(), "    ")
        return DAG_TEXT.format(source=self.source, dag_id=self.dag_id, conn_id=self.conn_id, tasks=tasks)

    def start(self) -> None:
        self.run_id = self.airflow.trigger(self.dag_id)

    def let_the_program_end(self) -> None:
        self._flag.touch()

    # ---- the service's side ----

    def jobs(self) -> list[jobs_pb2.Job]:
        """The jobs that the scene's tasks have made, oldest first."""
        return self.emulator.jobs(self.source)

    def statuses(self) -> list[str]:
        return [jobs_pb2.JobStatus.Name(job.status) for job in self.jobs()]

    def cancels(self) -> list[Call]:
        """All Cancel calls for the scene's jobs, refused ones too."""
        mine = {job.id for job in self.jobs()}
        return [call for call in self.emulator.journal.calls("Cancel") if call.job_id in mine]

    def calls(self, method: str) -> list[Call]:
        mine = {job.id for job in self.jobs()}
        return [call for call in self.emulator.journal.calls(method) if call.job_id in mine]

    def wait_statuses(self, *wanted: str, timeout: float = PATIENCE) -> None:
        """Wait until the scene's jobs, oldest first, have these statuses."""
        try:
            self.airflow.until(lambda: self.statuses() == list(wanted), timeout, f"jobs {wanted}")
        except TimeoutError as error:
            raise AssertionError(f"{error}; they are {self.statuses()}\n{self.log()}") from None

    def assert_cancelled_once(self, *others: str) -> None:
        """The first job was cancelled by one call; the later ones, if any, are as given."""
        self.wait_statuses("CANCELLED", *others)
        self.settle()
        assert self.statuses() == ["CANCELLED", *others]
        assert [call.code for call in self.cancels()] == ["OK"], self.log()

    # ---- Airflow's side ----

    def process(self, task_id: str = "fork") -> psutil.Process:
        """The process that runs the task, once its job runs."""
        self.airflow.until(lambda: "EXECUTING" in self.statuses(), PATIENCE, "job EXECUTING")
        return self.airflow.task_process(self.dag_id, self.run_id, task_id)

    def wait(self, states: str | Collection[str], task_id: str = "fork", try_number: int = 1) -> str:
        return self.airflow.wait_task(self.dag_id, self.run_id, task_id, states, PATIENCE, try_number=try_number)

    def wait_deferred(self, task_id: str = "fork") -> None:
        """Until the triggerer watches the job: it reads its log or, for a sensor, polls it."""
        self.wait("deferred", task_id)
        polls = len(self.calls("Get"))
        self.airflow.until(lambda: self.calls("ReadLogs") or len(self.calls("Get")) > polls, PATIENCE, "trigger")

    def state(self, task_id: str = "fork") -> str | None:
        return self.airflow.state(self.dag_id, self.run_id, task_id)

    def mark(self, state: str, task_id: str = "fork") -> None:
        self.airflow.set_task_state(self.dag_id, self.run_id, task_id, state)

    def clear(self, task_id: str = "fork") -> None:
        self.airflow.clear(self.dag_id, self.run_id, task_id)

    def log(self, task_id: str = "fork", try_number: int = 1) -> str:
        with contextlib.suppress(Exception):
            return self.airflow.task_log(self.dag_id, self.run_id, task_id, try_number)
        return "(no log)"

    def settle(self) -> None:
        """Until nobody of Airflow's does anything for the run any more; a second Cancel would have been sent."""
        self.airflow.wait_run(self.dag_id, self.run_id, PATIENCE)


@contextlib.contextmanager
def stage(airflow: RealAirflow, scenes: Iterable[Scene], name: str, folder: Path) -> Iterator[dict[str, Future[None]]]:
    """Play all scenes, a few at a time; gives scene name → how it went.

    :param name: of the DAG file, and the beginning of the connection ids.
    """
    with contextlib.ExitStack() as stack:
        common = stack.enter_context(Emulator())
        acts = []
        for scene in scenes:
            emulator = stack.enter_context(Emulator()) if scene.own_emulator else common
            conn_id = f"{name}_{scene.name}" if scene.own_emulator else name
            acts.append(Act(airflow, emulator, scene, conn_id, folder))
        for act in {act.conn_id: act for act in acts}.values():
            airflow.add_connection(act.conn_id, conn_type="datasphere", extra=act.emulator.connection_extra())
        airflow.add_dag(name, HEADER + "".join(act.dag for act in acts), [act.dag_id for act in acts])
        players = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        stack.callback(players.shutdown, cancel_futures=True)
        yield {act.scene.name: players.submit(_play, act) for act in acts}


def wanted_scenes(request: pytest.FixtureRequest) -> list[Scene]:
    """The scenes of the requesting module that this session's tests ask for."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    scenes: list[Scene] = [item.callspec.params["scene"] for item in items if hasattr(item, "callspec")]
    return list({scene.name: scene for scene in scenes}.values())


def _play(act: Act) -> None:
    act.start()
    try:
        act.scene.play(act)
    finally:
        # Nothing of a failed scene stays in the others' way.
        act.let_the_program_end()
        for job in act.jobs():
            with contextlib.suppress(Exception):
                act.emulator.cancel_job(job.id)
        with contextlib.suppress(Exception):
            for (task_id, map_index), state in act.airflow.task_states(act.dag_id, act.run_id).items():
                if state in {"running", "deferred"}:
                    act.airflow.set_task_state(act.dag_id, act.run_id, task_id, "failed", map_index)
