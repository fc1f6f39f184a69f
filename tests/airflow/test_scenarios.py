"""One scenario table in every mode: whatever becomes of a job, each way of waiting for it ends alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator
from harness import NEWEST, RealAirflow
from harness.cells import COLUMNS, Column, Scenario
from harness.playing import Cell, Play
from harness.scenarios import SCENARIOS
from harness.settings_scenarios import SETTINGS_SCENARIOS

pytestmark = [pytest.mark.airflow, pytest.mark.long, pytest.mark.timeout(3600)]

#: What Airflow 2.11 plays too: each kind of end, and what depends on Airflow itself (reschedules, retries, skips).
ON_AIRFLOW_2 = (
    "success",
    "return_code_1",
    "fails_then_succeeds",
    "cancelled_by_a_person",
    "missing_outputs",
    "skip_on_exit_code",
    "ended_before_the_first_look",
    "deleted_and_operation_gone",
    "token_revoked",
)
VERSIONS = {
    NEWEST: (*SCENARIOS, *SETTINGS_SCENARIOS),
    "2.11.2": tuple(scenario for scenario in SCENARIOS if scenario.name in ON_AIRFLOW_2),
}

ENVIRONMENT = {
    # A waiting task costs no processor time, so more of them than processors can wait at once.
    "AIRFLOW__CORE__PARALLELISM": "12",
    # Hundreds of tasks at once on a busy machine: slow isn't dead.
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "600",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "300",
    "AIRFLOW__SCHEDULER__SCHEDULER_ZOMBIE_TASK_THRESHOLD": "300",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "5",
    "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
    "AIRFLOW__SCHEDULER__LOCAL_TASK_JOB_HEARTBEAT_SEC": "5",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "120",
}

CELLS = [
    pytest.param(version, scenario, column, retries, id=f"{version}-{scenario.name}-{column.name}-retries{retries}")
    for version, scenarios in VERSIONS.items()
    for scenario in scenarios
    for column in COLUMNS
    for retries in (0, 1)
    if scenario.is_played(column, retries)
]


@dataclass(frozen=True)
class Played:
    """A table that has been played."""

    emulator: Emulator
    play: Play

    def cell(self, scenario: Scenario, column: Column, retries: int) -> Cell:
        return self.play.cells[scenario.name, column.name, retries]


@pytest.fixture(scope="module")
def tables() -> Iterator[Callable[[str], Played]]:
    """A version's whole table, played at once and once: one by one it would take the better part of an hour."""
    with ExitStack() as stack:
        played: dict[str, Played] = {}

        def play(version: str) -> None:
            emulator = stack.enter_context(Emulator(tls=False))
            table = Play(emulator, COLUMNS, VERSIONS[version])
            stack.callback(table.close)
            played[version] = Played(emulator, table)
            table.run(stack.enter_context(RealAirflow(version, connections=table.connections(), env=ENVIRONMENT)))

        def once(version: str) -> Played:
            # A table that couldn't be played to its end isn't tried again by each of its cells.
            if version not in played:
                play(version)
            return played[version]

        yield once


@pytest.fixture
def played(request: pytest.FixtureRequest, tables: Callable[[str], Played]) -> Played:
    # Not a parametrised fixture of the module: pytest would play the table anew for each cell.
    return tables(request.param)


@pytest.mark.parametrize(("played", "scenario", "column", "retries"), CELLS, indirect=["played"])
def test_every_mode_ends_alike(played: Played, scenario: Scenario, column: Column, retries: int) -> None:
    cell = played.cell(scenario, column, retries)
    expected = scenario.expects(column, retries)
    log = cell.log
    shown = f"\n{log[-6000:]}"

    assert (cell.state, cell.tries) == (expected.state, expected.tries), shown
    assert cell.result == expected.result, shown
    if expected.error is not None:
        assert expected.error in log, shown

    emulator = cell.emulator
    jobs = [job for job in cell.jobs if emulator.executions(job.id)]
    # A job that was deleted has left no more than its calls.
    executed = [call for call in emulator.journal.calls("Execute", subject=cell.subject) if call.effect]
    assert len({call.job_id for call in executed if call.code != "RESOURCE_EXHAUSTED"}) == expected.jobs
    assert emulator.journal.calls("Cancel", subject=cell.subject) == []
    still = [job.id for job in jobs if job.status not in (jobs_pb2.SUCCESS, jobs_pb2.ERROR, jobs_pb2.CANCELLED)]
    assert len(still) == (expected.jobs if scenario.left_running else 0)

    if expected.result is not None and not column.sensor:
        # A task that is skipped returns nothing; its job is still told.
        returned = None if expected.state == "skipped" else cell.xcom("job_id")
        assert cell.xcom("return_value") == returned
        assert cell.xcom("job_id") == cell.xcom("result")["job_id"]
        if cell.xcom("job_id") in {job.id for job in jobs}:
            assert cell.xcom("operation_id") == emulator.operation_of(cell.xcom("job_id"))
    if column.sensor and expected.state == "success":
        assert cell.xcom("return_value") == cell.xcom("result")
    if not column.sensor:
        position = 0
        for line in scenario.log:
            position = log.find(line, position)
            assert position >= 0, f"{line!r} isn't in the log, or not in order{shown}"


@pytest.mark.parametrize("played", VERSIONS, indirect=True)
def test_all_events_happened(played: Played) -> None:
    assert played.play.errors == []


@pytest.mark.parametrize("played", [NEWEST], indirect=True)
@pytest.mark.parametrize("column", ["blocking", "deferrable"])
def test_a_burst_of_output_is_complete(played: Played, column: str) -> None:
    log = played.play.cells["log_burst_10_mb", column, 0].log
    assert log.count("burst line ") == 100_000


@pytest.mark.parametrize("played", [NEWEST], indirect=True)
def test_a_lost_job_says_that_it_goes_on_and_costs_money(played: Played) -> None:
    for column in COLUMNS:
        cell = played.play.cells["role_taken_away", column.name, 0]
        job_id = cell.jobs[0].id
        log = cell.log
        assert f"Job {job_id} " in log
        assert "may still be running and costing money" in log
        assert f"CancelJobOperator(job_id='{job_id}')" in log
