"""A deferred task is ended, by a person or by its timeout, and a sensor, which ends nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from datasphere_emulator import Script
from harness import RealAirflow
from kill_stage import PATIENCE, Act, Scene, Scenes, stage, wanted_scenes

pytestmark = [pytest.mark.airflow, pytest.mark.long]

FOR_EVER = Script(never_ends=True, log=["it runs"])
QUICK = Script(log=["it is over"])
#: Long enough to be deferred for.
SOON = Script(executing_seconds=3.0, log=["it is over"])
FORK = 'ForkJobOperator(task_id="fork", source_job_id=SOURCE, deferrable=True, poll_interval=0.5, {})'

#: Tasks whose time is up while they are deferred, all at once.
TIMEOUTS = 20

scenes = Scenes()


# A person ----------------------------------------------------------------------------------------------------------


@scenes.add(FORK.format("retries=1"), script=FOR_EVER)
def deferred_marked_failed(act: Act) -> None:
    act.wait_deferred()
    act.mark("failed")
    act.assert_cancelled_once()
    assert act.state() == "failed"


@scenes.add(FORK.format("retries=1"), script=FOR_EVER)
def deferred_marked_success(act: Act) -> None:
    act.wait_deferred()
    act.mark("success")
    act.assert_cancelled_once()
    assert act.state() == "success"


@scenes.add(FORK.format("retries=0"), script=[FOR_EVER, QUICK])
def deferred_cleared(act: Act) -> None:
    act.wait_deferred()
    act.clear()
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.assert_cancelled_once("SUCCESS")


@scenes.add(FORK.format("retries=2"), script=[FOR_EVER, QUICK])
def deferred_cleared_with_tries_left(act: Act) -> None:
    act.wait_deferred()
    act.clear()
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.assert_cancelled_once("SUCCESS")


@scenes.add(FORK.format('on_kill_action="graceful"'), script=FOR_EVER, graceful_shutdown=("SIGTERM", 1))
def deferred_marked_failed_with_grace(act: Act) -> None:
    act.wait_deferred()
    act.mark("failed")
    act.assert_cancelled_once()
    assert [call.request and call.request["graceful"] for call in act.cancels()] == [True]


@scenes.add(FORK.format('on_kill_action="keep"'), script=FOR_EVER)
def deferred_marked_failed_and_kept(act: Act) -> None:
    act.wait_deferred()
    act.mark("failed")
    act.settle()
    # The log stream's end tells that the trigger has gone.
    act.airflow.until(lambda: all(call.finished for call in act.calls("ReadLogs")), PATIENCE, "trigger gone")
    assert act.statuses() == ["EXECUTING"]
    assert act.cancels() == []


# The clock ---------------------------------------------------------------------------------------------------------


@scenes.add(
    """
    ForkJobOperator.partial(
        task_id="fork", source_job_id=SOURCE, deferrable=True, execution_timeout=timedelta(seconds=25)
    ).expand(name=[f"job {number}" for number in range(TIMEOUTS)])
    """.replace("TIMEOUTS", str(TIMEOUTS)),
    script=FOR_EVER,
)
def deferred_timed_out_many_at_once(act: Act) -> None:
    act.settle()
    act.wait_statuses(*["CANCELLED"] * TIMEOUTS)
    calls = act.cancels()
    assert Counter(call.job_id for call in calls) == Counter(job.id for job in act.jobs())
    assert {call.code for call in calls} == {"OK"}
    assert {(call.request or {}).get("reason") for call in calls} == {
        "Airflow: execution_timeout passed while the task was deferred"
    }
    states = act.airflow.task_states(act.dag_id, act.run_id)
    assert Counter(states.values()) == {"failed": TIMEOUTS}


@scenes.add(FORK.format("retries=1, execution_timeout=timedelta(seconds=40)"), script=[FOR_EVER, SOON])
def deferred_timed_out_with_a_try_left(act: Act) -> None:
    assert act.wait({"success", "failed"}) == "success"
    act.assert_cancelled_once("SUCCESS")


@scenes.add(FORK.format('on_kill_action="keep", execution_timeout=timedelta(seconds=25)'), script=FOR_EVER)
def deferred_timed_out_and_kept(act: Act) -> None:
    assert act.wait({"success", "failed"}) == "failed"
    act.settle()
    assert act.statuses() == ["EXECUTING"]
    assert act.cancels() == []


# Sensors -----------------------------------------------------------------------------------------------------------

SENSED = """
fork = ForkJobOperator(task_id="fork", source_job_id=SOURCE, wait_for_completion=False)
sensor = DataSphereJobSensor(task_id="sensor", job_id=fork.output, poke_interval=1, {})
"""
WITH_TEARDOWN = (
    SENSED
    + """
cancel = CancelJobOperator(task_id="cancel", job_id=fork.output)
fork >> sensor >> cancel.as_teardown(setups=fork)
"""
)


def assert_nothing_was_cancelled(act: Act) -> None:
    act.settle()
    assert act.statuses() == ["EXECUTING"]
    assert act.cancels() == []


@scenes.add(SENSED.format("deferrable=True, timeout=5"), script=FOR_EVER)
def deferred_sensor_timed_out(act: Act) -> None:
    assert act.wait({"success", "failed"}, "sensor") == "failed"
    assert_nothing_was_cancelled(act)


@scenes.add(SENSED.format("deferrable=True, retries=1"), script=FOR_EVER)
def deferred_sensor_marked_failed(act: Act) -> None:
    act.wait_deferred("sensor")
    act.mark("failed", "sensor")
    assert_nothing_was_cancelled(act)


@scenes.add(SENSED.format('mode="poke"'), script=FOR_EVER)
def poking_sensor_marked_failed(act: Act) -> None:
    process = act.process("sensor")
    act.mark("failed", "sensor")
    process.wait(PATIENCE)
    assert_nothing_was_cancelled(act)


@scenes.add(WITH_TEARDOWN.format("deferrable=True, timeout=5"), script=FOR_EVER)
def deferred_sensor_timed_out_before_a_teardown(act: Act) -> None:
    assert act.wait({"success", "failed"}, "cancel") == "success"
    act.assert_cancelled_once()
    assert act.state("sensor") == "failed"


@scenes.add(WITH_TEARDOWN.format("timeout=3"), script=FOR_EVER)
def rescheduled_sensor_timed_out_before_a_teardown(act: Act) -> None:
    assert act.wait({"success", "failed"}, "cancel") == "success"
    act.assert_cancelled_once()
    assert act.state("sensor") == "failed"


@scenes.add(WITH_TEARDOWN.format("timeout=600"), script=Script(return_code=3))
def failed_job_before_a_teardown(act: Act) -> None:
    assert act.wait({"success", "failed"}, "cancel") == "success"
    act.settle()
    assert act.state("sensor") == "failed"
    assert act.statuses() == ["ERROR"]
    assert act.cancels() == []


@pytest.fixture(scope="module")
def played(
    each_airflow: RealAirflow, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    with stage(each_airflow, wanted_scenes(request), "kill_deferred", tmp_path_factory.mktemp("flags")) as results:
        yield results


@pytest.mark.parametrize("scene", scenes.params())
@pytest.mark.timeout(600)
def test_deferred(scene: Scene, played: dict[str, Future[None]]) -> None:
    played[scene.name].result()
