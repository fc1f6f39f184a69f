"""One run of a DAG on a cluster, and its judge: the emulator's journal, and the logs that came to S3."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator
from harness import Cluster
from harness.cluster import TRIGGERERS
from kill_stage import DAG_TEXT, HEADER

#: Seconds; ten times what is seen on a quiet machine.
PATIENCE = 300.0
#: Prints a line now and then, until it is told to end.
PROGRAM = 'i=0; until [ -e {flag} ]; do i=$((i+1)); echo "line $i of it"; sleep 0.7; done; echo "the last line of it"'
_LINE = re.compile(r"(?:line \d+|the last line) of it")
#: A trigger that begins, also one that takes over.
_STARTS_OVER = "a restarted triggerer starts over here"


class Act:
    """One run of a DAG whose jobs print lines until they are told to end.

    :param name: of the DAG; its connection is "cluster".
    :param tasks: the DAG's tasks; ``SOURCE`` is the id of the job that they fork.
    """

    def __init__(self, cluster: Cluster, emulator: Emulator, name: str, tasks: str, folder: Path) -> None:
        self.cluster, self.emulator, self.name = cluster, emulator, name
        self._flag = folder / f"{name}.ends"
        self.source = emulator.create_job(PROGRAM.format(flag=self._flag))
        body = textwrap.indent(textwrap.dedent(tasks).strip(), "    ")
        text = HEADER + DAG_TEXT.format(source=self.source, dag_id=name, conn_id="cluster", tasks=body)
        cluster.add_dag(name, text, timeout=PATIENCE)
        self.run_id = cluster.trigger(name)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something.

        :raises TimeoutError: with the states of tasks and jobs.
        """
        try:
            self.cluster.until(condition, PATIENCE, what, interval=0.5)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; tasks {self.states()}, jobs {self.statuses()}") from None

    def let_the_programs_end(self) -> None:
        self._flag.touch()

    def end(self, state: str = "success") -> None:
        """Let the programs end, and wait for the run's end in this state."""
        self.let_the_programs_end()
        ended = self.cluster.wait_run(self.name, self.run_id, PATIENCE)
        assert ended == state, f"{self.statuses()}, {failed_logs(self.cluster, self.name, self.run_id)}"

    # ---- the service's side ----

    def jobs(self) -> list[jobs_pb2.Job]:
        """The jobs that the tasks have made, oldest first."""
        return self.emulator.jobs(self.source)

    def statuses(self) -> Counter[str]:
        return Counter(jobs_pb2.JobStatus.Name(job.status) for job in self.jobs())

    def readers(self) -> Counter[str]:
        """How many read each running job's log at this moment."""
        mine = {job.id for job in self.jobs()}
        calls = self.emulator.journal.calls("ReadLogs")
        return Counter(call.job_id for call in calls if call.job_id in mine and call.finished is None)

    def wait_watched(self, count: int) -> None:
        """Until so many jobs run, and the log of each is read by one process, and no other does any more."""

        def watched() -> bool:
            running = [job.id for job in self.jobs() if job.status == jobs_pb2.EXECUTING]
            return len(running) == count and self.readers() == Counter(running)

        self.until(watched, f"{count} watched jobs")

    def wait_read_since(self, moment: float, count: int) -> None:
        """Until somebody has begun to read the logs of so many jobs after this moment."""
        calls = self.emulator.journal.calls
        self.until(lambda: len({call.job_id for call in calls("ReadLogs", since=moment)}) >= count, "new readers")

    def assert_jobs(self, *, success: int = 0, cancelled: Collection[str] = ()) -> None:
        """All jobs: so many were successful, and these have been cancelled by one call each; none was run twice."""
        jobs = self.jobs()
        found = {job.id: jobs_pb2.JobStatus.Name(job.status) for job in jobs}
        assert Counter(found.values()) == Counter(SUCCESS=success, CANCELLED=len(cancelled)), found
        assert {job for job, status in found.items() if status == "CANCELLED"} == set(cancelled)
        calls = self.emulator.journal.calls("Cancel")
        assert Counter(call.job_id for call in calls if call.job_id in found) == Counter(cancelled), calls
        assert [self.emulator.executions(job.id) for job in jobs] == [1] * len(jobs)

    # ---- Airflow's side ----

    def states(self) -> dict[tuple[str, int], str | None]:
        return self.cluster.task_states(self.name, self.run_id)

    def wait_states(self, wanted: str, tasks: Iterable[tuple[str, int]] | None = None) -> None:
        """Until these tasks, default: all, are in this state."""
        chosen = None if tasks is None else set(tasks)

        def reached() -> bool:
            states = self.states()
            return all(state == wanted for task, state in states.items() if chosen is None or task in chosen)

        self.until(reached, f"tasks {wanted}")

    def tries(self) -> dict[tuple[str, int], int]:
        """Which try each task is in."""
        found = self.cluster.api.task_instances(self.name, self.run_id)
        return {(instance["task_id"], instance["map_index"]): instance["try_number"] for instance in found}

    def job_of(self, task_id: str, map_index: int = -1) -> str:
        """The job of a task's newest try."""
        return str(self.cluster.xcom(self.name, self.run_id, task_id, "job_id", map_index))

    def wait_jobs(self, tasks: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
        """The jobs of these tasks, once Airflow knows them all."""
        found: dict[tuple[str, int], str] = {}
        wanted = list(tasks)

        def known() -> bool:
            found.update({task: self.job_of(*task) for task in wanted})
            return "None" not in found.values()

        self.until(known, "ids of the jobs")
        return found

    def triggers_of(self, name: str) -> int:
        """How many triggers a triggerer has."""
        return self.cluster.owners()[self.cluster.triggerer_id(name)]

    def assert_logs(self, *tasks: tuple[str, int], once: bool = True) -> None:
        """:func:`assert_log` of the last tries of these tasks; default: all."""
        for task, try_number in self.tries().items():
            if not tasks or task in tasks:
                assert_log(self.cluster, self.emulator, self.name, self.run_id, *task, try_number, once=once)


def failed_logs(cluster: Cluster, dag_id: str, run_id: str) -> str:
    """The ends of the logs of a run's tasks that have failed, for a message."""
    texts = [f"tasks {cluster.task_states(dag_id, run_id)}"]
    for instance in cluster.api.task_instances(dag_id, run_id):
        if instance["state"] in ("failed", "up_for_retry"):
            where = (instance["task_id"], instance["try_number"], instance["map_index"])
            with contextlib.suppress(Exception):
                texts.append(f"{where}: {cluster.task_log(dag_id, run_id, *where)[-3000:]}")
    return "\n".join(texts)


def assert_log(
    cluster: Cluster,
    emulator: Emulator,
    dag_id: str,
    run_id: str,
    task_id: str,
    map_index: int = -1,
    try_number: int = 1,
    *,
    once: bool = True,
) -> None:
    """A try's log has come to S3, with each line of its job in order.

    Each process that has shown it, a worker or a triggerer, begins with the first line and repeats none.

    :param once: only one of them has shown it. (Two triggerers may have: a fresh one can stand still for so long that
        Airflow gives its triggers away.)
    """
    where = (dag_id, run_id, task_id, try_number, map_index)
    job = cluster.xcom(dag_id, run_id, task_id, "job_id", map_index)
    printed = _lines("".join(text.decode() for kind, _, text in emulator.log_text(job) if kind == "stdout"))
    assert printed
    parts: dict[str, list[str]] = {}

    def ended_early(section: list[str]) -> bool:
        """Airflow 3 closes a task's log with the trigger; what it then hasn't read is in the triggerer's own output."""
        late = {line for name in TRIGGERERS for line in _lines(cluster.output(name))}
        return not cluster.is_2 and section == printed[: len(section)] and set(printed[len(section) :]) <= late

    def complete() -> bool:
        parts.update(cluster.stored_log(*where))
        shown = [section for part in parts.values() for section in _sections(part)]
        triggerers = sum(".trigger." in key for key in parts)
        return (
            (printed in shown or (triggerers > 0 and any(map(ended_early, shown))))
            and all(section == printed[: len(section)] for section in shown)
            and (not once or len(shown) <= max(1, triggerers))
        )

    # A component writes its part to S3 when its own work for the task is done.
    try:
        cluster.until(complete, 60, f"complete log of {where}")
    except TimeoutError as error:
        raise AssertionError(f"{error}: of {printed} are in S3: {parts}") from None
    stored = {line for part in parts.values() for line in _lines("\n".join(part))}
    assert stored <= set(_lines(cluster.task_log(*where))), "what S3 has must be in Airflow's page"


def _lines(text: str) -> list[str]:
    return [match.group() for match in _LINE.finditer(text)]


def _sections(part: list[str]) -> list[list[str]]:
    """The job's lines as each of the triggers that followed one another in a triggerer, or a worker, has shown them."""
    sections = [_lines(section) for section in "\n".join(part).split(_STARTS_OVER)]
    return [section for section in sections if section]
