"""What a wait asks, when, and when it gives up; on a clock of its own."""

from __future__ import annotations

import time
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2, project_job_service_pb2
from yandex.cloud.operation import operation_pb2

from airflow_provider_datasphere.client.errors import JobLostError, JobNotStartedError, JobRequestError
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.monitoring.polling import (
    DENIED_GRACE_SECONDS,
    NOT_FOUND_GRACE_SECONDS,
    STATUS_GRACE_SECONDS,
    PollState,
    PollTarget,
)

RUNNING = operation_pb2.Operation(id="bt1op")
DONE = operation_pb2.Operation(id="bt1op", done=True)
EXECUTING = jobs_pb2.Job(id="bt1job", status=jobs_pb2.EXECUTING)
SUCCESS = jobs_pb2.Job(id="bt1job", status=jobs_pb2.SUCCESS)


class Wait:
    """A wait and its clock; the random numbers are always the worst."""

    def __init__(self, operation_id: str | None = "bt1op", **options: Any) -> None:
        self.now = 1000.0
        self.state = PollState(
            JobHandle("bt1job", operation_id), link="https://ui", clock=lambda: self.now, rng=lambda: 1.0, **options
        )

    def sleep(self) -> float:
        """Pass the time until the next look; returns it."""
        self.now += self.state.delay
        return self.state.delay

    def fail(self, code: str, seconds: float) -> float:
        """Let looks fail for so long; returns how long they really did."""
        begin = self.now
        while self.now - begin < seconds:
            self.sleep()
            self.state.failed(code, "details")
        return self.now - begin


def test_the_operation_is_asked_and_then_the_job() -> None:
    wait = Wait()
    assert wait.state.delay == 0
    assert wait.state.target is PollTarget.OPERATION
    wait.state.received(RUNNING)
    assert wait.state.still_running
    assert wait.state.target is PollTarget.OPERATION
    wait.state.received(DONE)
    assert not wait.state.still_running
    assert wait.state.ended is None
    assert (wait.state.target, wait.state.delay) == (PollTarget.JOB, 0)
    wait.state.received(SUCCESS)
    assert wait.state.ended is not None
    assert (wait.state.ended.operation, wait.state.ended.job) == (DONE, SUCCESS)


def test_without_an_operation_the_job_is_asked() -> None:
    wait = Wait(None)
    assert wait.state.target is PollTarget.JOB
    wait.state.received(EXECUTING)
    assert wait.state.still_running
    wait.state.received(SUCCESS)
    assert wait.state.ended is not None
    assert wait.state.ended.operation is None


def test_a_status_of_the_future_counts_as_running() -> None:
    wait = Wait(None)
    wait.state.received(jobs_pb2.Job(status=77))
    assert wait.state.still_running


def test_polls_are_quick_at_first_and_slow_down_to_the_interval() -> None:
    wait = Wait(poll_interval=10.0)
    delays = []
    for _ in range(200):
        wait.sleep()
        wait.state.received(RUNNING)
        delays.append(wait.state.delay)
    assert delays[0] < 0.06
    assert delays == sorted(delays)
    assert 10.0 <= delays[-1] <= 11.0  # the jitter is a tenth
    # An end is never noticed later than by a small share of the job's time.
    wait = Wait(poll_interval=10.0)
    while wait.now < 1060.0:
        wait.sleep()
        wait.state.received(RUNNING)
        assert wait.state.delay <= max(0.06, 0.12 * (wait.now - 1000.0))


def test_a_short_interval_is_kept() -> None:
    wait = Wait(poll_interval=0.01)
    wait.state.received(RUNNING)
    assert wait.state.delay < 0.012


def test_a_hint_makes_the_next_looks_quick() -> None:
    wait = Wait()
    for _ in range(100):
        wait.sleep()
        wait.state.received(RUNNING)
    assert wait.state.delay > 5
    assert wait.state.request_immediate_poll()
    assert wait.state.delay == 0
    wait.state.received(RUNNING)
    assert wait.state.delay < 0.1


def test_hints_that_prove_false_are_heeded_less_and_less_often() -> None:
    wait = Wait()
    heeded, looks = 0, 0
    while wait.now < 1000.0 + 3600.0:  # a stream that ends cleanly every second, for an hour
        heeded += wait.state.request_immediate_poll()
        end = wait.now + 1.0
        while wait.now + wait.state.delay < end:
            wait.sleep()
            wait.state.received(RUNNING)
            looks += 1
        wait.now = end
    assert 8 <= heeded <= 13
    assert looks < 3600 / 10 + 13 * 60


def test_a_forgotten_operation_leads_to_the_job() -> None:
    wait = Wait()
    wait.state.failed("NOT_FOUND")
    assert (wait.state.target, wait.state.delay) == (PollTarget.JOB, 0)
    wait.state.received(SUCCESS)
    assert wait.state.ended is not None


@pytest.mark.parametrize("seen", [True, False])
def test_a_job_that_is_gone_with_its_operation_is_lost_after_a_moment(seen: bool) -> None:
    wait = Wait()
    if seen:
        wait.state.received(RUNNING)
    begin = wait.now
    with pytest.raises(JobLostError) as lost:
        wait.fail("NOT_FOUND", 1000.0)
    assert NOT_FOUND_GRACE_SECONDS <= wait.now - begin <= NOT_FOUND_GRACE_SECONDS + 5.0
    for part in ("bt1job", "https://ui", "details", "costing", "CancelJobOperator"):
        assert part in str(lost.value)


@pytest.mark.parametrize("operation_id", ["bt1op", None])
@pytest.mark.parametrize("seconds", [0.1, NOT_FOUND_GRACE_SECONDS - 3.0])
def test_a_job_that_is_not_known_yet_just_after_execute_is_not_lost(operation_id: str | None, seconds: float) -> None:
    wait = Wait(operation_id)
    wait.fail("NOT_FOUND", seconds)
    wait.sleep()
    assert wait.state.in_grace_period or wait.state.target is PollTarget.JOB
    while wait.state.target is PollTarget.JOB and operation_id:  # the two become known at the same time
        wait.state.failed("NOT_FOUND")
    if operation_id:
        wait.state.received(RUNNING)
    else:
        wait.state.received(EXECUTING)
    assert wait.state.still_running
    assert not wait.state.in_grace_period
    wait.now += 3600.0
    wait.state.failed("NOT_FOUND")  # once, much later: a new moment begins
    wait.state.failed("NOT_FOUND")
    wait.state.received(SUCCESS)
    assert wait.state.ended is not None


def test_a_job_deleted_after_its_end_is_told_by_its_operation() -> None:
    wait = Wait()
    wait.state.received(DONE)
    wait.state.failed("NOT_FOUND")
    assert wait.state.ended is not None
    assert (wait.state.ended.operation, wait.state.ended.job) == (DONE, None)


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED"])
def test_a_refusal_is_tried_for_a_minute(code: str) -> None:
    wait = Wait(poll_interval=60.0)
    wait.state.received(RUNNING)
    wait.fail(code, 55.0)
    wait.state.received(RUNNING)  # the role is back: a new minute begins with the next refusal
    wait.sleep()
    wait.state.failed(code)
    begin = wait.now
    with pytest.raises(JobLostError, match=code):
        wait.fail(code, 1000.0)
    assert DENIED_GRACE_SECONDS <= wait.now - begin <= DENIED_GRACE_SECONDS + 0.2


@pytest.mark.parametrize(
    "code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN", "ABORTED"]
)
def test_an_outage_is_waited_out(code: str) -> None:
    wait = Wait()
    wait.state.received(RUNNING)
    assert wait.fail(code, 3 * 86400.0) < 3 * 86400.0 + 15.0
    assert wait.state.failures > 20_000
    wait.state.received(RUNNING)
    assert wait.state.still_running


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION"])
def test_any_other_answer_ends_the_wait(code: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(JobLostError, match=code):
        Wait().state.failed(code)
    assert caplog.text == "", "no promise to retry"


def test_a_job_gets_a_moment_to_show_its_end() -> None:
    wait = Wait()
    wait.state.received(DONE)
    begin = wait.now
    while wait.state.ended is None:
        wait.sleep()
        wait.state.received(EXECUTING)
    assert STATUS_GRACE_SECONDS <= wait.now - begin <= STATUS_GRACE_SECONDS + 1.0
    assert wait.state.ended.operation == DONE


def test_an_id_that_nobody_has_seen_is_a_mistake_and_no_loss() -> None:
    forgotten = Wait(known_job=False)
    forgotten.state.failed("NOT_FOUND", "Operation is not found")
    for wait in (Wait(None, known_job=False), forgotten):
        with pytest.raises(JobRequestError, match=r"There is no job bt1job, or .* can't see it .*Check the id"):
            wait.fail("NOT_FOUND", 1000.0)


def test_a_job_that_was_seen_may_be_lost() -> None:
    wait = Wait(None, known_job=False)
    wait.state.received(EXECUTING)
    with pytest.raises(JobLostError):
        wait.fail("NOT_FOUND", 1000.0)
    with pytest.raises(JobLostError):
        Wait(None).fail("NOT_FOUND", 1000.0)


@pytest.mark.parametrize(("code", "error"), [("PERMISSION_DENIED", JobRequestError), ("UNAUTHENTICATED", JobLostError)])
def test_a_refusal_to_show_a_job_that_nobody_has_seen(code: str, error: type[Exception]) -> None:
    wait = Wait(None, known_job=False)
    with pytest.raises(error, match="bt1job"):
        wait.fail(code, DENIED_GRACE_SECONDS + 10)
    assert wait.now - 1000.0 >= DENIED_GRACE_SECONDS


# A job must compute in time ------------------------------------------------------------------------------------------


def operation_in(status: int) -> operation_pb2.Operation:
    operation = operation_pb2.Operation(id="bt1op")
    metadata = project_job_service_pb2.ExecuteProjectJobMetadata()
    metadata.metadata.status = status  # type: ignore[assignment]
    operation.metadata.Pack(metadata)
    return operation


def job_in(status: int) -> jobs_pb2.Job:
    return jobs_pb2.Job(id="bt1job", status=status)  # type: ignore[arg-type]


def passed(**options: Any) -> PollState:
    """A wait whose deadline for the start has passed."""
    return Wait(start_deadline=time.time() - 1, **options).state


@pytest.mark.parametrize("status", [jobs_pb2.JOB_STATUS_UNSPECIFIED, jobs_pb2.CREATING, jobs_pb2.PREPARING])
def test_the_job_itself_is_read_before_it_counts_as_not_started(status: int) -> None:
    state = passed()
    state.received(operation_in(status))
    assert (state.target, state.delay) == (PollTarget.JOB, 0)
    with pytest.raises(JobNotStartedError, match=r"Job bt1job \(https://ui\) .*start_timeout.*PREPARING"):
        state.received(job_in(jobs_pb2.PREPARING))


@pytest.mark.parametrize("status", [jobs_pb2.EXECUTING, jobs_pb2.UPLOADING_OUTPUT, jobs_pb2.CANCELLING, 99])
def test_a_job_that_the_operation_shows_too_late_goes_on(status: int) -> None:
    state = passed()
    state.received(operation_in(jobs_pb2.PREPARING))
    state.received(job_in(status))
    assert state.target is PollTarget.OPERATION
    # It has been seen: what an old replica says later changes nothing.
    state.received(operation_in(jobs_pb2.PREPARING))
    assert state.target is PollTarget.OPERATION


def test_a_job_that_computes_has_no_deadline_any_more() -> None:
    state = passed()
    state.received(operation_in(jobs_pb2.EXECUTING))
    assert state.target is PollTarget.OPERATION


def test_without_an_operation_the_job_is_all_that_is_known() -> None:
    with pytest.raises(JobNotStartedError):
        passed(operation_id=None).received(job_in(jobs_pb2.CREATING))


def test_an_operation_that_is_forgotten_is_not_asked_again() -> None:
    state = Wait(start_deadline=time.time() + 3600).state
    state.failed("NOT_FOUND")
    state.received(job_in(jobs_pb2.PREPARING))
    assert state.target is PollTarget.JOB


def test_an_outage_at_the_deadline_ends_nothing() -> None:
    state = passed()
    state.failed("UNAVAILABLE")
    assert state.ended is None


def test_a_poll_falls_on_the_deadline() -> None:
    wait = Wait(start_deadline=time.time() + 2.0, poll_interval=3600.0, min_poll_interval=3600.0)
    wait.state.received(operation_in(jobs_pb2.PREPARING))
    assert 0 < wait.state.delay <= 2.0
