"""A running task is ended: by a person, by its timeout, by its worker. Who decides, and what happens to the job?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import psutil
import pytest

from datasphere_emulator import Script
from harness import RealAirflow
from kill_stage import PATIENCE, Act, Scene, Scenes, stage, wanted_scenes

pytestmark = [pytest.mark.airflow, pytest.mark.long]

FOR_EVER = Script(never_ends=True, log=["it runs"])
QUICK = Script(log=["it is over"])
FORK = 'ForkJobOperator(task_id="fork", source_job_id=SOURCE, poll_interval=0.5, {})'

scenes = Scenes()


def skip_where_a_killed_task_has_no_other_try(act: Act) -> None:
    if act.version == (3, 0):
        pytest.skip("Airflow 3.0 fails a killed task, whatever its retries")


def skip_where_nobody_tells_the_task(act: Act) -> None:
    if (3, 0) <= act.version < (3, 3):
        pytest.skip("Airflow 3.0 to 3.2 tell the task nothing")


# A person ----------------------------------------------------------------------------------------------------------


@scenes.add(FORK.format("retries=1"), script=FOR_EVER)
def marked_failed(act: Act) -> None:
    process = act.process()
    act.mark("failed")
    process.wait(PATIENCE)
    act.assert_cancelled_once()
    assert act.state() == "failed"


@scenes.add(FORK.format("retries=1"), script=FOR_EVER)
def marked_success(act: Act) -> None:
    process = act.process()
    act.mark("success")
    process.wait(PATIENCE)
    act.assert_cancelled_once()
    assert act.state() == "success"


def assert_cancelled_and_forgotten(act: Act) -> None:
    """Airflow 3.0 never runs such a task again until somebody marks it."""
    act.wait_statuses("CANCELLED")
    act.wait("restarting")
    assert [call.code for call in act.cancels()] == ["OK"], act.log()


@scenes.add(FORK.format("retries=0"), script=[FOR_EVER, QUICK])
def cleared(act: Act) -> None:
    act.process()
    act.clear()
    if act.version == (3, 0):
        assert_cancelled_and_forgotten(act)
        return
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.assert_cancelled_once("SUCCESS")


@scenes.add(FORK.format("retries=2"), script=[FOR_EVER, QUICK])
def cleared_with_tries_left(act: Act) -> None:
    act.process()
    act.clear()
    if act.version == (3, 0):
        assert_cancelled_and_forgotten(act)
        return
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.assert_cancelled_once("SUCCESS")


@scenes.add(FORK.format('on_kill_action="keep"'), script=FOR_EVER)
def marked_failed_and_kept(act: Act) -> None:
    process = act.process()
    act.mark("failed")
    process.wait(PATIENCE)
    act.settle()
    assert act.statuses() == ["EXECUTING"]
    assert act.cancels() == []


@scenes.add(FORK.format('on_kill_action="graceful"'), script=FOR_EVER, graceful_shutdown=("SIGTERM", 1))
def marked_failed_with_grace(act: Act) -> None:
    process = act.process()
    act.mark("failed")
    process.wait(PATIENCE)
    act.assert_cancelled_once()
    assert [call.request and call.request["graceful"] for call in act.cancels()] == [True]


@scenes.add(FORK.format('on_kill_action="graceful"'), script=FOR_EVER)
def marked_failed_with_no_grace_in_the_job(act: Act) -> None:
    process = act.process()
    act.mark("failed")
    process.wait(PATIENCE)
    act.assert_cancelled_once()
    assert not (act.cancels()[0].request or {}).get("graceful")
    assert "no graceful-shutdown section" in act.log()


# The clock ---------------------------------------------------------------------------------------------------------


@scenes.add(FORK.format("execution_timeout=timedelta(seconds=15)"), script=FOR_EVER)
def timed_out(act: Act) -> None:
    assert act.wait({"success", "failed"}) == "failed"
    act.assert_cancelled_once()
    assert "execution_timeout passed" in act.log()


@scenes.add(FORK.format("retries=1, execution_timeout=timedelta(seconds=15)"), script=[FOR_EVER, QUICK])
def timed_out_with_a_try_left(act: Act) -> None:
    assert act.wait({"success", "failed"}) == "success"
    act.assert_cancelled_once("SUCCESS")


# The worker --------------------------------------------------------------------------------------------------------


def assert_the_next_try_goes_on(act: Act) -> None:
    """Try 2 attaches to the job of try 1, which ends well."""
    act.wait("running", try_number=2)
    act.airflow.until(lambda: "attaching to it" in act.log(try_number=2), PATIENCE, "try 2 attached")
    act.let_the_program_end()
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.settle()
    assert act.statuses() == ["SUCCESS"]
    assert act.emulator.executions(act.jobs()[0].id) == 1
    assert act.cancels() == []
    assert act.airflow.xcom(act.dag_id, act.run_id, "fork") == act.jobs()[0].id


@scenes.add(FORK.format("retries=1"), script=None)
def supervisor_stopped_with_a_try_left(act: Act) -> None:
    supervisor = act.process().parent()
    assert supervisor is not None
    supervisor.terminate()
    if (3, 0) <= act.version < (3, 3):
        # The task is told nothing, and goes on as long as its worker lets it.
        act.let_the_program_end()
        act.settle()
        assert act.statuses() == ["SUCCESS"]
        assert act.emulator.executions(act.jobs()[0].id) == 1
        assert act.cancels() == []
        return
    assert_the_next_try_goes_on(act)
    assert "the next try attaches to it" in act.log()


@scenes.add(FORK.format("retries=0"), script=FOR_EVER)
def supervisor_stopped_in_the_last_try(act: Act) -> None:
    skip_where_nobody_tells_the_task(act)
    supervisor = act.process().parent()
    assert supervisor is not None
    supervisor.terminate()
    assert act.wait({"success", "failed"}) == "failed"
    act.assert_cancelled_once()


@scenes.add(FORK.format("retries=1, reattach=False"), script=[FOR_EVER, QUICK])
def supervisor_stopped_without_reattach(act: Act) -> None:
    skip_where_nobody_tells_the_task(act)
    supervisor = act.process().parent()
    assert supervisor is not None
    supervisor.terminate()
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.assert_cancelled_once("SUCCESS")


@scenes.add(FORK.format("retries=1"), script=None)
def task_killed(act: Act) -> None:
    skip_where_a_killed_task_has_no_other_try(act)
    act.process().kill()
    assert_the_next_try_goes_on(act)


@scenes.add(FORK.format("retries=1"), script=None)
def late_signal_to_a_zombie(act: Act) -> None:
    if act.airflow.is_2:
        pytest.skip("a zombie of Airflow 2 fails the newer try itself, which then ends its job")
    process = act.process()
    supervisor = process.parent()
    assert supervisor is not None
    # The worker is cut off: Airflow gives the try up and starts the next one, while this one still runs.
    supervisor.suspend()
    try:
        act.wait("running", try_number=2)
        act.airflow.until(lambda: "attaching to it" in act.log(try_number=2), PATIENCE, "try 2 attached")
        assert process.is_running()
    finally:
        # The worker is back, learns that the task isn't its own any more, and ends it.
        supervisor.resume()
    process.wait(PATIENCE)
    assert_the_next_try_goes_on(act)


# In the middle of the start ----------------------------------------------------------------------------------------


def assert_nothing_runs(act: Act) -> None:
    act.settle()
    act.airflow.until(lambda: all(call.finished for call in act.emulator.journal.calls()), PATIENCE, "no open call")
    act.airflow.until(lambda: not {"PREPARING", "EXECUTING"} & {*act.statuses()}, PATIENCE, "jobs at rest")


@scenes.add(FORK.format(""), script=FOR_EVER, own_emulator=True)
def marked_failed_during_clone(act: Act) -> None:
    process = _stuck_in(act, "Clone")
    act.mark("failed")
    process.wait(PATIENCE)
    act.emulator.faults.clear()
    assert_nothing_runs(act)


@scenes.add(FORK.format(""), script=FOR_EVER, own_emulator=True)
def marked_failed_during_execute(act: Act) -> None:
    process = _stuck_in(act, "Execute")
    act.mark("failed")
    process.wait(PATIENCE)
    act.emulator.faults.clear()
    assert_nothing_runs(act)


@scenes.add(FORK.format(""), script=FOR_EVER, own_emulator=True)
def marked_failed_while_answers_to_execute_get_lost(act: Act) -> None:
    act.emulator.faults.inject("Execute", lost_answer=True)
    process = act.process()
    act.mark("failed")
    process.wait(PATIENCE)
    act.assert_cancelled_once()


@scenes.add(FORK.format("execution_timeout=timedelta(seconds=15)"), script=FOR_EVER, own_emulator=True)
def timed_out_during_execute(act: Act) -> None:
    _stuck_in(act, "Execute")
    assert act.wait({"success", "failed"}) == "failed"
    act.emulator.faults.clear()
    assert_nothing_runs(act)


@scenes.add(FORK.format("retries=1"), script=QUICK, own_emulator=True)
def task_killed_during_execute(act: Act) -> None:
    skip_where_a_killed_task_has_no_other_try(act)
    _stuck_in(act, "Execute", times=1).kill()
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.emulator.faults.clear()
    act.settle()
    assert act.statuses() == ["SUCCESS"]
    assert act.emulator.executions(act.jobs()[0].id) == 1
    assert act.cancels() == []


@scenes.add(
    FORK.format('retries=1, vars={"DATA": __file__}'),
    script=QUICK,
    own_emulator=True,
    files={"data.txt": "old"},
    inputs=[("data.txt", "DATA")],
)
def supervisor_stopped_during_upload(act: Act) -> None:
    skip_where_nobody_tells_the_task(act)
    supervisor = _stuck_in(act, "storage.put", times=1).parent()
    assert supervisor is not None
    supervisor.terminate()
    assert act.wait({"success", "failed"}, try_number=2) == "success"
    act.emulator.faults.clear()
    act.settle()
    assert act.statuses().count("SUCCESS") == 1
    assert sum(act.emulator.executions(job.id) for job in act.jobs()) == 1
    assert act.cancels() == []


def _stuck_in(act: Act, method: str, *, times: int | None = None) -> psutil.Process:
    """The task's process, in the middle of a call that gets no answer until the fault is removed."""
    act.emulator.faults.inject(method, hang=True, times=times)
    act.airflow.until(lambda: act.emulator.journal.count(method), PATIENCE, f"call of {method}")
    return act.airflow.task_process(act.dag_id, act.run_id, "fork")


@pytest.fixture(scope="module")
def played(
    each_airflow: RealAirflow, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    with stage(each_airflow, wanted_scenes(request), "kill_blocking", tmp_path_factory.mktemp("flags")) as results:
        yield results


@pytest.mark.parametrize("scene", scenes.params())
@pytest.mark.timeout(600)
def test_blocking(scene: Scene, played: dict[str, Future[None]]) -> None:
    played[scene.name].result()
