"""What a wait asks, when, and when it gives up; on a clock of its own."""

from __future__ import annotations

from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.operation import operation_pb2

from airflow_provider_datasphere.client.errors import JobLostError
from airflow_provider_datasphere.client.outcome import JobHandle
from airflow_provider_datasphere.client.waiting import DENIED_WINDOW, SETTLE_WINDOW, Look, Waiting

RUNNING = operation_pb2.Operation(id="bt1op")
DONE = operation_pb2.Operation(id="bt1op", done=True)
EXECUTING = jobs_pb2.Job(id="bt1job", status=jobs_pb2.EXECUTING)
SUCCESS = jobs_pb2.Job(id="bt1job", status=jobs_pb2.SUCCESS)


class Wait:
    """A wait and its clock; the random numbers are always the worst."""

    def __init__(self, operation_id: str | None = "bt1op", **options: Any) -> None:
        self.now = 1000.0
        self.waiting = Waiting(
            JobHandle("bt1job", operation_id), link="https://ui", clock=lambda: self.now, rng=lambda: 1.0, **options
        )

    def sleep(self) -> float:
        """Pass the time until the next look; returns it."""
        self.now += self.waiting.delay
        return self.waiting.delay

    def fail(self, code: str, seconds: float) -> float:
        """Let looks fail for so long; returns how long they really did."""
        begin = self.now
        while self.now - begin < seconds:
            self.sleep()
            self.waiting.failed(code, "details")
        return self.now - begin


def test_the_operation_is_asked_and_then_the_job() -> None:
    wait = Wait()
    assert wait.waiting.delay == 0
    assert wait.waiting.look is Look.OPERATION
    wait.waiting.saw_operation(RUNNING)
    assert wait.waiting.still_running
    assert wait.waiting.look is Look.OPERATION
    wait.waiting.saw_operation(DONE)
    assert not wait.waiting.still_running
    assert wait.waiting.ended is None
    assert (wait.waiting.look, wait.waiting.delay) == (Look.JOB, 0)
    wait.waiting.saw_job(SUCCESS)
    assert wait.waiting.ended is not None
    assert (wait.waiting.ended.operation, wait.waiting.ended.job) == (DONE, SUCCESS)


def test_without_an_operation_the_job_is_asked() -> None:
    wait = Wait(None)
    assert wait.waiting.look is Look.JOB
    wait.waiting.saw_job(EXECUTING)
    assert wait.waiting.still_running
    wait.waiting.saw_job(SUCCESS)
    assert wait.waiting.ended is not None
    assert wait.waiting.ended.operation is None


def test_a_status_of_the_future_counts_as_running() -> None:
    wait = Wait(None)
    wait.waiting.saw_job(jobs_pb2.Job(status=77))
    assert wait.waiting.still_running


def test_polls_are_quick_at_first_and_slow_down_to_the_interval() -> None:
    wait = Wait(poll_interval=10.0)
    delays = []
    for _ in range(200):
        wait.sleep()
        wait.waiting.saw_operation(RUNNING)
        delays.append(wait.waiting.delay)
    assert delays[0] < 0.06
    assert delays == sorted(delays)
    assert 10.0 <= delays[-1] <= 11.0  # the jitter is a tenth
    # An end is never noticed later than by a small share of the job's time.
    wait = Wait(poll_interval=10.0)
    while wait.now < 1060.0:
        wait.sleep()
        wait.waiting.saw_operation(RUNNING)
        assert wait.waiting.delay <= max(0.06, 0.12 * (wait.now - 1000.0))


def test_a_short_interval_is_kept() -> None:
    wait = Wait(poll_interval=0.01)
    wait.waiting.saw_operation(RUNNING)
    assert wait.waiting.delay < 0.012


def test_a_hint_makes_the_next_looks_quick() -> None:
    wait = Wait()
    for _ in range(100):
        wait.sleep()
        wait.waiting.saw_operation(RUNNING)
    assert wait.waiting.delay > 5
    assert wait.waiting.hurry()
    assert wait.waiting.delay == 0
    wait.waiting.saw_operation(RUNNING)
    assert wait.waiting.delay < 0.1


def test_hints_that_prove_false_are_heeded_less_and_less_often() -> None:
    wait = Wait()
    heeded, looks = 0, 0
    while wait.now < 1000.0 + 3600.0:  # a stream that ends cleanly every second, for an hour
        heeded += wait.waiting.hurry()
        end = wait.now + 1.0
        while wait.now + wait.waiting.delay < end:
            wait.sleep()
            wait.waiting.saw_operation(RUNNING)
            looks += 1
        wait.now = end
    assert 8 <= heeded <= 13
    assert looks < 3600 / 10 + 13 * 60


def test_a_forgotten_operation_leads_to_the_job() -> None:
    wait = Wait()
    wait.waiting.failed("NOT_FOUND")
    assert (wait.waiting.look, wait.waiting.delay) == (Look.JOB, 0)
    wait.waiting.saw_job(SUCCESS)
    assert wait.waiting.ended is not None


def test_a_job_that_is_gone_with_its_operation_is_lost_at_once() -> None:
    wait = Wait()
    wait.waiting.failed("NOT_FOUND")
    with pytest.raises(JobLostError) as lost:
        wait.waiting.failed("NOT_FOUND", "no such job")
    for part in ("bt1job", "https://ui", "no such job", "costing", "CancelJobOperator"):
        assert part in str(lost.value)


def test_a_job_deleted_after_its_end_is_told_by_its_operation() -> None:
    wait = Wait()
    wait.waiting.saw_operation(DONE)
    wait.waiting.failed("NOT_FOUND")
    assert wait.waiting.ended is not None
    assert (wait.waiting.ended.operation, wait.waiting.ended.job) == (DONE, None)


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED"])
def test_a_refusal_is_tried_for_a_minute(code: str) -> None:
    wait = Wait(poll_interval=60.0)
    wait.waiting.saw_operation(RUNNING)
    wait.fail(code, 55.0)
    wait.waiting.saw_operation(RUNNING)  # the role is back: a new minute begins with the next refusal
    wait.sleep()
    wait.waiting.failed(code)
    begin = wait.now
    with pytest.raises(JobLostError, match=code):
        wait.fail(code, 1000.0)
    assert DENIED_WINDOW <= wait.now - begin <= DENIED_WINDOW + 0.2


@pytest.mark.parametrize(
    "code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED"]
)
def test_an_outage_is_waited_out(code: str) -> None:
    wait = Wait()
    wait.waiting.saw_operation(RUNNING)
    assert wait.fail(code, 3 * 86400.0) < 3 * 86400.0 + 15.0
    assert wait.waiting.failures > 20_000
    wait.waiting.saw_operation(RUNNING)
    assert wait.waiting.still_running


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION"])
def test_any_other_answer_ends_the_wait(code: str) -> None:
    with pytest.raises(JobLostError, match=code):
        Wait().waiting.failed(code)


def test_a_job_gets_a_moment_to_show_its_end() -> None:
    wait = Wait()
    wait.waiting.saw_operation(DONE)
    begin = wait.now
    while wait.waiting.ended is None:
        wait.sleep()
        wait.waiting.saw_job(EXECUTING)
    assert SETTLE_WINDOW <= wait.now - begin <= SETTLE_WINDOW + 1.0
    assert wait.waiting.ended.operation == DONE
