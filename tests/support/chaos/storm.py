"""The storm: one real Airflow and one emulator, shared by all runs, and the blows that the schedule deals them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from chaos.judge import Verdict, judge
from chaos.plan import ENDS_THE_JOB, MODES, NEW, Run
from datasphere_emulator import Emulator, Settings
from harness import RealAirflow
from harness.api import ApiError

INPUT_BYTES = 400_000
PROGRAM = """
import hashlib, pathlib, sys, time
data, nonce, out = sys.argv[1:]
for step in range(8):
    print("step", step, flush=True)
    time.sleep(0.35)
print("read", hashlib.sha256(pathlib.Path(data).read_bytes()).hexdigest(), nonce, flush=True)
pathlib.Path(out).write_text(nonce)
"""
DAGS = """
from datetime import datetime, timedelta, timezone

try:
    from airflow.sdk import DAG
except ImportError:
    from airflow import DAG

from airflow_provider_datasphere.operators.jobs import ExecuteJobOperator, ForkJobOperator

CONFIG = {
    "cmd": "python main.py ${DATA} ${NONCE} out.txt",
    "args": {"NONCE": "none"},
    "inputs": ["main.py", {"data.bin": "DATA"}],
    "outputs": [{"out.txt": "OUT"}],
}

for mode in ("blocking", "deferred", "new", "new_deferred"):
    begin = datetime(2026, 1, 1, tzinfo=timezone.utc)
    common = dict(
        task_id="fork",
        args={"NONCE": "{{ dag_run.conf['nonce'] }}"},
        vars={"DATA": "{{ dag_run.conf['data'] }}"},
        deferrable=mode.endswith("deferred"),
        poll_interval=1,
        retries=10,
        retry_delay=timedelta(seconds=2),
    )
    with DAG(f"chaos_{mode}", schedule=None, start_date=begin, catchup=False) as dag:
        if mode.startswith("new"):
            project, folder = "{{ dag_run.conf['project'] }}", "{{ dag_run.conf['folder'] }}"
            ExecuteJobOperator(config=CONFIG, project_id=project, base_dir=folder, **common)
        else:
            ForkJobOperator(source_job_id="{{ dag_run.conf['source'] }}", **common)
    globals()[dag.dag_id] = dag
"""
TASK = "fork"
#: Three times what the harness sets for a triggerer that counts as dead, seconds.
STILL_SECONDS = 15.0


@dataclass(frozen=True)
class Origin:
    """Where the jobs of a run come from: its own source job, or its own project."""

    emulator: Emulator
    source: str = ""
    project: str = ""

    @property
    def conf(self) -> dict[str, str]:
        return {"source": self.source, "project": self.project}

    @property
    def creation(self) -> tuple[str, dict[str, str]]:
        """The call that makes the run's job, and what tells it from that of other runs."""
        return ("Clone", {"job_id": self.source}) if self.source else ("Create", {"project_id": self.project})

    def jobs(self) -> list[jobs_pb2.Job]:
        """The jobs that the run has made."""
        if self.source:
            return self.emulator.jobs(parent=self.source)
        return [job for job in self.emulator.jobs() if job.project_id == self.project]

    def is_called(self) -> bool:
        """Whether the call that makes the job has come."""
        method, _ = self.creation
        name = "source_job_id" if self.source else "project_id"
        calls = self.emulator.journal.calls(method)
        return any((call.request or {}).get(name) == (self.source or self.project) for call in calls)


class Storm:
    """Deals blows, and brings back what they felled."""

    def __init__(self, emulator: Emulator, airflow: RealAirflow, folder: Path) -> None:
        self.emulator = emulator
        self.airflow = airflow
        self._folder = folder
        (folder / "main.py").write_text(PROGRAM)
        #: Held while a component that all runs share is down.
        self._shared = threading.Lock()

    def run(self, run: Run) -> Verdict:
        """One run, from its source job to its verdict."""
        rng = random.Random(run.seed)
        nonce = f"n{run.seed}-{run.number}"
        data = self._folder / f"{nonce}.bin"
        data.write_bytes(rng.randbytes(INPUT_BYTES))
        with self.shared():
            origin = self._origin(run, nonce)
        dag_id = f"chaos_{run.mode.replace(' ', '_')}"
        conf = {**origin.conf, "nonce": nonce, "data": str(data), "folder": str(self._folder)}
        hit = _Hit(self, run, rng, origin, dag_id, f"{nonce}")
        with self.shared():
            hit.prepare()
        self.airflow.trigger(dag_id, conf, run_id=nonce)
        missed = ""
        try:
            hit.strike()
        except (TimeoutError, psutil.NoSuchProcess) as error:
            missed = f"the blow missed: {error}"
        state = self._end(dag_id, nonce)
        with self.shared():
            self._settle(origin)
        proof = f"read {hashlib.sha256(data.read_bytes()).hexdigest()} {nonce}"
        result = self._ask(lambda: self.airflow.xcom(dag_id, nonce, TASK, "result"))
        # A person who came too late has changed nothing, or has been just in time.
        expected = state if missed and hit.expected == "failed" else hit.expected
        with self.shared():
            verdict = judge(
                self.emulator,
                origin.jobs(),
                state,
                result,
                expected=expected,
                proof=proof,
                may_cancel=run.point in ENDS_THE_JOB,
            )
        verdict.notes += hit.notes
        if missed:
            verdict.notes.append(missed)
        data.unlink()
        return verdict

    def _end(self, dag_id: str, run_id: str, timeout: float = 240) -> str:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.airflow.components.check()  # one that has died by itself is no fault of the provider's
            state = self.state(dag_id, run_id)
            if state in ("success", "failed", "skipped") and self._ask(
                lambda: self.airflow.run_state(dag_id, run_id)
            ) in ("success", "failed"):
                return str(state)
            time.sleep(0.5)
        return f"no end, {self.state(dag_id, run_id)}"

    def _origin(self, run: Run, nonce: str) -> Origin:
        if run.mode in NEW:
            project = self.emulator.add_project(nonce)
            self.emulator.iam.set_role(self.emulator.service_account_id, project, "developer")
            return Origin(self.emulator, project=project)
        source = self.emulator.create_job(
            "python main.py ${DATA} ${NONCE} out.txt",
            files={"main.py": PROGRAM, "data.bin": b"the source's own"},
            inputs=["main.py", ("data.bin", "DATA")],
            outputs=[("out.txt", "OUT")],
            args={"NONCE": "none"},
        )
        return Origin(self.emulator, source=source)

    def _settle(self, origin: Origin) -> None:
        """Give a job that was just cancelled the moment it needs to end."""
        deadline = time.monotonic() + 6
        alive = (jobs_pb2.PREPARING, jobs_pb2.EXECUTING, jobs_pb2.UPLOADING_OUTPUT, jobs_pb2.CANCELLING)
        while time.monotonic() < deadline and any(job.status in alive for job in origin.jobs()):
            time.sleep(0.2)

    def state(self, dag_id: str, run_id: str) -> str | None:
        return self._ask(lambda: self.airflow.state(dag_id, run_id, TASK))  # type: ignore[no-any-return]

    @staticmethod
    def _ask(question: Callable[[], Any]) -> Any:
        """A question to Airflow's API, which may be busy on its shared SQLite, or away for a while."""
        for attempt in range(180):
            try:
                return question()
            except (ApiError, OSError):
                if attempt == 179:
                    raise
                time.sleep(0.5)
        return None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._shared:
            yield

    def restart(self, component: str) -> None:
        with self.shared():
            self.airflow.kill(component, signal.SIGKILL)
            self.airflow.start(component, wait=False)

    def api_server_away(self, seconds: float) -> None:
        """For longer than it takes a supervisor to give up its task."""
        with self.shared():
            self.airflow.kill("api-server", signal.SIGKILL)
            time.sleep(seconds)
            self.airflow.start("api-server", wait=False)

    def triggerer_stands_still(self) -> None:
        """For longer than Airflow waits before it gives a triggerer's triggers to another one; then it comes back."""
        with self.shared():
            self.airflow.components.freeze("triggerer")
            time.sleep(STILL_SECONDS)
            self.airflow.components.thaw("triggerer")

    def restart_service(self) -> None:
        with self.shared():
            self.emulator.kill()
            time.sleep(1)
            self.emulator.start()


class _Hit:
    """How one run is hit."""

    def __init__(self, storm: Storm, run: Run, rng: random.Random, origin: Origin, dag_id: str, run_id: str) -> None:
        self._storm = storm
        self._point = run.point
        self._rng = rng
        self._origin = origin
        self._where = (dag_id, run_id)
        self.notes: list[str] = []
        self.expected = "failed" if run.point == "marked failed by a person" else "success"

    def prepare(self) -> None:
        """What must be in place before the run begins: a slow answer makes a moment long enough to hit."""
        inject = self._storm.emulator.faults.inject
        method, which = self._origin.creation
        if self._point == "before creation":
            inject("Get", job_id=self._origin.source, delay=1.5, times=1)
        elif self._point == "creation sent":
            inject(method, **which, delay=1.5, times=1)
        elif self._point == "creation's answer lost":
            inject(method, **which, lost_answer=True, times=self._rng.randint(1, 3))

    def strike(self) -> None:
        storm, point = self._storm, self._point
        if point == "before creation":
            self._until(lambda: self._called("Get", self._origin.source), "Get of the source")
            self._kill_task()
        elif point == "creation sent":
            self._until(self._origin.is_called, "creation")
            self._kill_task()
        elif point == "creation answered":
            self._child()
            self._kill_task()
        elif point == "creation's answer lost":
            return
        elif point == "during upload":
            self._child()
            time.sleep(self._rng.uniform(0.2, 0.9))
            self._kill_task()
        elif point == "Execute sent":
            child = self._child()
            storm.emulator.faults.inject("Execute", job_id=child, delay=1.5, times=1)
            self._until(lambda: self._called("Execute", child), "Execute")
            self._kill_task()
        elif point == "Execute's answer lost":
            times = self._rng.randint(1, 3)
            storm.emulator.faults.inject("Execute", job_id=self._child(), lost_answer=True, times=times)
        elif point == "after Execute":
            self._status(jobs_pb2.PREPARING, jobs_pb2.EXECUTING)
            self._kill_task()
        else:
            self._strike_later()

    def _strike_later(self) -> None:
        storm, point, rng = self._storm, self._point, self._rng
        running = (jobs_pb2.EXECUTING,)
        if point in ("running", "supervisor killed", "supervisor told to end"):
            self._status(*running)
            time.sleep(rng.uniform(0, 1.5))
            if point == "running":
                self._kill_task()
            else:
                self._kill_supervisor(signal.SIGKILL if point == "supervisor killed" else signal.SIGTERM)
        elif point in ("log tail", "finished"):
            self._status(jobs_pb2.UPLOADING_OUTPUT, jobs_pb2.SUCCESS)
            time.sleep(rng.uniform(0, 0.1) if point == "log tail" else rng.uniform(0.1, 0.4))
            self._kill_task()
        elif point == "XCom pushed":
            self._until(lambda: storm.airflow.xcom(*self._where, TASK, "result"), "XCom", pause=0.05)
            self._kill_task()
        elif point == "deferred, triggerer killed":
            self._until(lambda: storm.state(*self._where) == "deferred", "deferral")
            time.sleep(rng.uniform(0, 2))
            storm.restart("triggerer")
        elif point == "triggerer stopped and continued":
            self._until(lambda: storm.state(*self._where) == "deferred", "deferral")
            storm.triggerer_stands_still()
        elif point == "API server away":
            self._status(*running)
            storm.api_server_away(rng.uniform(2, 45))
        elif point == "Ctrl-C":
            self._status(*running)
            if (process := self._process()) is not None:
                process.send_signal(signal.SIGINT)
        elif point == "deferred, task resuming":
            self._status(jobs_pb2.SUCCESS)
            self._until(lambda: storm.state(*self._where) == "running", "resuming", pause=0.05)
            self._kill_task()
        elif point == "scheduler killed":
            self._status(*running)
            storm.restart("scheduler")
        elif point == "service restarted":
            self._status(*running)
            storm.restart_service()
        elif point == "answers cut":
            self._child()
            inject = storm.emulator.faults.inject
            inject("Operation.Get", code="UNAVAILABLE", times=rng.randint(1, 6))
            inject("ReadLogs", after_messages=rng.randint(0, 3), code=rng.choice(["UNAVAILABLE", None]), times=3)
            inject("Get", code="DEADLINE_EXCEEDED", times=rng.randint(1, 3))
        elif point == "token revoked":
            self._child()
            storm.emulator.iam.revoke(subject=storm.emulator.service_account_id)
        elif point == "cleared by a person":
            self._status(*running)
            storm.airflow.clear(*self._where, TASK)
        elif point == "marked failed by a person":
            self._status(*running)
            self._mark_failed()
            if any(job.status == jobs_pb2.SUCCESS for job in self._origin.jobs()):
                raise TimeoutError("the job had ended when the mark arrived")

    def _mark_failed(self) -> None:
        """As a person does who looks whether it has taken.

        Airflow reads a task instance, changes its state and writes it back; SQLite has no locks on rows, so that a task
        that defers in that very moment writes over the mark.
        """
        storm = self._storm
        for _ in range(5):
            storm.airflow.set_task_state(*self._where, TASK, "failed")
            time.sleep(1.0)
            if (state := storm.state(*self._where)) == "failed":
                return
            self.notes.append(f"Airflow lost a mark: the task was {state} a second after it")
        raise TimeoutError("Airflow lost all marks")

    def _child(self) -> str:
        """The id of the run's job, as soon as there is one."""
        children: list[jobs_pb2.Job] = self._until(lambda: self._origin.jobs(), "cloned job", pause=0.02)
        return children[0].id

    def _status(self, *wanted: int) -> None:
        self._until(
            lambda: any(job.status in wanted for job in self._origin.jobs()),
            "job in that status",
            pause=0.03,
        )

    def _called(self, method: str, job_id: str) -> bool:
        return bool(self._storm.emulator.journal.calls(method, job_id=job_id))

    def _kill_task(self) -> None:
        process = self._process()
        if process is not None:
            process.kill()

    def _kill_supervisor(self, number: int) -> None:
        process = self._process()
        parent = process.parent() if process is not None else None
        if parent is not None and parent.pid != os.getpid():
            parent.send_signal(number)

    def _process(self) -> psutil.Process | None:
        """The process that runs the operator now; ``None`` when the task has ended meanwhile."""
        instance = self._storm._ask(lambda: self._storm.airflow.task_instance(*self._where, TASK))
        if instance["state"] != "running" or not instance["pid"]:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(instance["pid"])
        return None

    def _until(self, condition: Callable[[], Any], what: str, *, pause: float = 0.1, timeout: float = 90) -> Any:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            # RuntimeError: the emulator is being restarted by another run's blow.
            with contextlib.suppress(ApiError, OSError, RuntimeError):
                if found := condition():
                    return found
            time.sleep(pause)
        raise TimeoutError(f"no {what} in {timeout:.0f} s")


def storm(
    runs: list[Run], *, version: str, at_once: int, say: Callable[[str], None], settings: dict[str, Any] | None = None
) -> list[tuple[Run, Verdict]]:
    """Run the schedule, several at a time, and return all verdicts."""
    verdicts: list[tuple[Run, Verdict]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        emulator = stack.enter_context(
            Emulator(settings=Settings(log_delay_seconds=0.3, **(settings or {})), state_dir=folder / "emulator")
        )
        # Slow enough to be hit in the middle of an upload, and between Clone and upload.
        emulator.faults.inject("storage.put", bytes_per_second=INPUT_BYTES)
        emulator.faults.inject("Project.Get", delay=0.5)
        # A key, not a token: a revoked token can be replaced.
        extra = emulator.connection_extra(service_account_json=emulator.service_account_key(), iam_token=None)
        airflow = stack.enter_context(
            RealAirflow(version, connections={"datasphere_default": {"conn_type": "datasphere", "extra": extra}})
        )
        airflow.components.start("triggerer@2")
        airflow.add_dag("chaos", DAGS, [f"chaos_{mode.replace(' ', '_')}" for mode in MODES])
        weather = Storm(emulator, airflow, folder)
        pool = stack.enter_context(ThreadPoolExecutor(at_once))
        pending = {pool.submit(weather.run, run): run for run in runs}
        for done in as_completed(pending):
            run = pending[done]
            try:
                verdict = done.result()
            except Exception as error:
                verdict = Verdict(faults=[f"{type(error).__name__}: {error}"])
            verdicts.append((run, verdict))
            outcome = "FAULT: " + "; ".join(verdict.faults) if verdict.faults else "ok"
            notes = f"  ({'; '.join(verdict.notes)})" if verdict.notes else ""
            say(f"{run} {outcome}{notes}")
    return verdicts
