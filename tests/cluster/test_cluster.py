"""A cluster of Celery workers, two schedulers and two triggerers: whatever part dies, each task has exactly one job."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from cluster_stage import Act, assert_log, failed_logs
from datasphere_emulator import Emulator
from harness import Cluster
from harness.cluster import TRIGGERERS, WORKERS

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1200)]

Play = Callable[[str, str], Act]

EXAMPLES = Path(__file__).parents[2] / "example_dags"
#: Each task of the examples that shows a job's log.
SHOWN = {
    "fork_job_sync": [("fork_job", -1)],
    "fork_job_deferrable": [("train", -1)],
    "fork_job_mapped": [("fork_job", index) for index in range(3)],
    "results_to_s3": [("fork_job", -1)],
    "output_files_for_other_job": [("first_job", -1), ("second_job", -1)],
    "fork_job_async": [],
}
#: A job whose log nobody shows.
UNSHOWN = {"fork_job_async": 1}
QUICK = ["fork_job_sync", "fork_job_deferrable", "results_to_s3"]

#: How long the broker and the database are away.
AWAY_SECONDS = 3.0

FORKS = """
ForkJobOperator.partial(
    task_id="{mode}",
    source_job_id=SOURCE,
    poll_interval=1,
    deferrable={deferrable},
    retries=5,
    retry_delay=timedelta(seconds={delay}),
    priority_weight={weight},
).expand(name=[f"{mode} {{number}}" for number in range({count})])
"""


def forks(*, blocking: int = 0, deferred: int = 0, delay: int = 1) -> str:
    """Mapped tasks of both kinds; those that will be deferred get the workers first.

    :param delay: between two tries, seconds.
    """
    counts = {"blocking": blocking, "deferred": deferred}
    return "".join(
        FORKS.format(
            mode=mode, deferrable=mode == "deferred", delay=delay, weight=10 if mode == "deferred" else 1, count=count
        )
        for mode, count in counts.items()
        if count
    )


@pytest.mark.parametrize(
    "names", [pytest.param(QUICK, id="quick"), pytest.param(list(SHOWN), id="all", marks=pytest.mark.long)]
)
def test_the_examples_and_their_logs_in_the_object_store(
    cluster: Cluster, emulator: Emulator, names: list[str]
) -> None:
    source = emulator.create_job(
        'for i in 1 2 3 4 5 6; do echo "line $i of it, ${RANGE}"; sleep 0.3; done; echo 1 > result.txt',
        args={"RANGE": "10"},
        outputs=["result.txt"],
    )
    second = emulator.create_job(
        "echo 'line 1 of it'; cat ${INPUT_DATA} > upper.txt",
        files={"placeholder.txt": "-"},
        inputs=[("placeholder.txt", "INPUT_DATA")],
        outputs=["upper.txt"],
    )
    cluster.add_connection("datasphere_default", conn_type="datasphere", extra=emulator.connection_extra())
    variables = {"source_job": source, "first_job": source, "second_job": second}
    for name, job in variables.items():
        cluster.set_variable(f"datasphere_{name}_id", job)
    cluster.set_variable("results_bucket", "results")
    cluster.s3.create_bucket("results")
    for name in names:
        cluster.add_dag(name, (EXAMPLES / f"{name}.py").read_text(), timeout=180)
    runs = {name: cluster.trigger(name) for name in names}
    for name, run_id in runs.items():
        ended = cluster.wait_run(name, run_id, 300)
        assert ended == "success", failed_logs(cluster, name, run_id)
    jobs = [*emulator.jobs(source), *emulator.jobs(second)]
    assert [emulator.executions(job.id) for job in jobs] == [1] * len(jobs)
    assert len(jobs) == sum(len(SHOWN[name]) + UNSHOWN.get(name, 0) for name in names)
    assert emulator.journal.calls("Cancel") == []
    assert {job.status for job in jobs} == {jobs_pb2.SUCCESS}
    for name, run_id in runs.items():
        for task_id, map_index in SHOWN[name]:
            assert_log(cluster, emulator, name, run_id, task_id, map_index)


def test_a_worker_that_is_killed_and_one_that_is_shut_down(cluster: Cluster, play: Play) -> None:
    """The one with all its processes at once; the other ends its tasks, and tells them."""
    act = play(
        "workers",
        """
        common = dict(source_job_id=SOURCE, poll_interval=1)
        ForkJobOperator.partial(task_id="killed", queue="w1", retries=2, **common).expand(name=["a", "b"])
        ForkJobOperator(task_id="ended", queue="w2", retries=2, **common)
        ForkJobOperator(task_id="ended_in_its_last_try", queue="w2", **common)
        """,
    )
    act.wait_watched(4)
    last = act.wait_jobs([("ended_in_its_last_try", -1)])
    cluster.components.kill_session("worker@1")
    cluster.components.shut_down("worker@2")
    for worker in WORKERS:
        cluster.start(worker, wait=False)
    tried_again = [("killed", 0), ("killed", 1), ("ended", -1)]
    act.until(lambda: all(act.tries()[task] > 1 for task in tried_again), "second tries")
    act.wait_watched(3)
    act.end("failed")
    act.assert_jobs(success=3, cancelled=last.values())
    act.wait_states("success", tried_again)
    act.assert_logs(*tried_again)


@pytest.mark.long
def test_a_worker_that_is_shut_down_warmly_ends_its_tasks(cluster: Cluster, play: Play) -> None:
    act = play(
        "warm_shutdown",
        """
        common = dict(source_job_id=SOURCE, poll_interval=1, queue="w1")
        ForkJobOperator.partial(task_id="fork", **common).expand(name=["a", "b"])
        """,
    )
    act.wait_watched(2)
    process = cluster.components.running["worker@1"]
    process.send_signal(signal.SIGTERM)
    time.sleep(10)
    assert process.poll() is None, "it is meant to wait for its tasks"
    act.end()
    process.wait(120)
    cluster.start("worker@1")
    act.assert_jobs(success=2)
    assert set(act.tries().values()) == {1}
    act.assert_logs()


@pytest.mark.parametrize(
    ("whole", "count", "rounds"),
    [
        pytest.param(True, 6, 1, id="process"),
        pytest.param(False, 6, 1, id="runner", marks=pytest.mark.long),
        pytest.param(True, 10, 20, id="process-20-times", marks=pytest.mark.long),
        pytest.param(False, 10, 20, id="runner-20-times", marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(7200)
def test_a_triggerer_that_stands_still_and_goes_on(
    cluster: Cluster, play: Play, whole: bool, count: int, rounds: int
) -> None:
    """Airflow 3.3 calls on_kill() for each trigger that another triggerer has meanwhile taken."""
    if not whole and cluster.is_2:
        pytest.skip("Airflow 2 runs the triggers in the triggerer's own process")
    act = play(f"stands_still_{whole}_{rounds}".lower(), forks(deferred=count))
    act.wait_watched(count)
    for _ in range(rounds):
        act.until(lambda: sum(cluster.owners().values()) == count, "triggers")
        # The one that has most; the other may have the rest.
        name, other = sorted(TRIGGERERS, key=act.triggers_of, reverse=True)
        moved, frozen_at = act.triggers_of(name), time.time()
        if whole:
            cluster.components.freeze(name)
        else:
            cluster.components.runner(name).suspend()
        act.until(lambda other=other: act.triggers_of(other) == count, "take-over")
        act.wait_read_since(frozen_at, moved)
        if whole:
            cluster.components.thaw(name)
        else:
            cluster.components.runner(name).resume()
        act.wait_watched(count)
    act.end()
    act.assert_jobs(success=count)
    act.assert_logs(once=False)


@pytest.mark.long
def test_triggerers_that_are_killed_and_rolled(cluster: Cluster, play: Play) -> None:
    count = 10
    act = play("rolled", forks(deferred=count))
    act.wait_watched(count)
    for signal_number in (signal.SIGKILL, signal.SIGTERM, signal.SIGTERM):
        for name in TRIGGERERS:
            cluster.components.kill(name, signal_number, whole=signal_number == signal.SIGKILL)
            cluster.start(name)
            act.wait_watched(count)
    act.end()
    act.assert_jobs(success=count)
    act.assert_logs(once=False)


def test_what_persons_and_timeouts_end_is_cancelled_once(cluster: Cluster, play: Play) -> None:
    act = play(
        "acts",
        """
        for deferrable in (False, True):
            mode = "deferred" if deferrable else "blocking"
            common = dict(
                source_job_id=SOURCE, poll_interval=1, deferrable=deferrable, priority_weight=10 if deferrable else 1
            )
            ForkJobOperator.partial(task_id=mode, retries=2, **common).expand(name=["failed", "success", "clear"])
            ForkJobOperator(task_id=f"{mode}_timeout", execution_timeout=timedelta(seconds=30), **common)
        """,
    )
    tasks = [(mode, index) for mode in ("blocking", "deferred") for index in range(3)]
    timeouts = [("blocking_timeout", -1), ("deferred_timeout", -1)]
    act.until(lambda: sum(act.statuses().values()) == 8, "jobs")
    jobs = act.wait_jobs([*tasks, *timeouts])
    act.wait_states("failed", timeouts)
    act.wait_watched(6)
    act.wait_states("running", tasks[:3])
    act.wait_states("deferred", tasks[3:])
    for task_id, index in tasks:
        if index < 2:
            cluster.set_task_state(act.name, act.run_id, task_id, ("failed", "success")[index], index)
        else:
            cluster.clear(act.name, act.run_id, task_id, map_index=index)
    act.until(lambda: act.statuses()["CANCELLED"] == 8 and sum(act.statuses().values()) == 10, "cancels and new jobs")
    act.wait_watched(2)
    act.end("failed")
    act.assert_jobs(success=2, cancelled=jobs.values())
    act.assert_logs(("blocking", 2), ("deferred", 2))


def test_schedulers_broker_and_database_are_restarted(cluster: Cluster, play: Play) -> None:
    """Six tasks block, four of which run and two are in the broker; four are deferred."""
    act = play("infrastructure", forks(blocking=6, deferred=4))
    act.wait_watched(8)
    act.until(lambda: sorted(map(str, act.states().values())).count("queued") == 2, "queued tasks")
    with cluster.service_manager():
        cluster.components.kill_session("scheduler")
        cluster.redis.kill(signal.SIGKILL)
        time.sleep(AWAY_SECONDS)
        cluster.redis.start()
        act.wait_watched(8)
        cluster.postgres.kill(signal.SIGQUIT)
        time.sleep(AWAY_SECONDS)
        cluster.postgres.start()
        cluster.wait_healthy()
        act.wait_watched(8)
        act.end()
    act.assert_jobs(success=10)
    act.assert_logs(once=False)


@pytest.mark.long
def test_an_api_server_that_is_away(cluster: Cluster, play: Play) -> None:
    """Airflow 3's workers give their tasks up after half a minute; Airflow 2's don't need it."""
    act = play("api_server", forks(blocking=3, deferred=3, delay=20))
    act.wait_watched(6)
    cluster.kill("api-server")
    time.sleep(35)
    cluster.start("api-server")
    act.end()
    act.assert_jobs(success=6)
    act.assert_logs(once=False)


@pytest.mark.long
def test_a_broker_that_delivers_again_what_still_runs(cluster: Cluster, play: Play) -> None:
    """Redis looks for messages past their visibility timeout once in 100 seconds."""
    key = "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT"
    settings = cluster.home.extra
    try:
        cluster.home.extra = {**settings, key: "20"}
        for worker in WORKERS:
            cluster.components.kill(worker, signal.SIGTERM, whole=False)
            cluster.start(worker)
        act = play("delivered_again", forks(blocking=3))
        act.wait_watched(3)
        received = [cluster.components.printed(worker).count("received") for worker in WORKERS]

        def delivered_again() -> bool:
            return [cluster.components.printed(worker).count("received") for worker in WORKERS] > received

        act.until(delivered_again, "second delivery")
        act.wait_watched(3)
        act.end()
        act.assert_jobs(success=3)
        assert set(act.tries().values()) == {1}
        act.assert_logs()
    finally:
        cluster.home.extra = settings
        for worker in WORKERS:
            cluster.components.kill(worker, signal.SIGTERM, whole=False)
            cluster.start(worker)
