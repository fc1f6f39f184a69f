"""The decision table: what to do about the jobs that earlier tries left."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.fork import ForkRequest
from airflow_provider_datasphere.client.key import Key
from airflow_provider_datasphere.client.ledger import Found, Move, decide, differences

KEY = Key(("dag", "run", "task", -1, 2), "dag.task run", retries=2)
RUNNING = [jobs_pb2.PREPARING, jobs_pb2.EXECUTING, jobs_pb2.UPLOADING_OUTPUT, jobs_pb2.JOB_STATUS_UNSPECIFIED, 77]
ENDED_BADLY = [jobs_pb2.ERROR, jobs_pb2.CANCELLED]


def job(id: str, status: Any, retries: int = 2) -> jobs_pb2.Job:
    return jobs_pb2.Job(id=id, status=status, desc=Key(KEY.parts, KEY.label, retries).describe(None))


def decided(*jobs: jobs_pb2.Job, **known: Any) -> Found:
    return decide(jobs, KEY, **{"uploaded": None, "has_inputs": False, **known})


def test_nothing_found_is_a_fork() -> None:
    assert decided() == Found(None, Move.FORK, 0)


@pytest.mark.parametrize("status", RUNNING)
def test_a_running_job_is_attached_to_whatever_became_of_retries(status: Any) -> None:
    for retries in (2, 5):
        found = decided(job("a", status, retries))
        assert (found.job and found.job.id, found.move, found.ordinal) == ("a", Move.ATTACH, 0)


def test_a_success_is_adopted_unless_retries_were_edited() -> None:
    assert decided(job("a", jobs_pb2.SUCCESS)).move is Move.ADOPT
    found = decided(job("a", jobs_pb2.SUCCESS, retries=5))
    assert (found.move, found.ordinal) == (Move.FORK, 1)


def test_a_success_whose_program_is_known_to_have_failed_is_not_adopted() -> None:
    found = decided(job("a", jobs_pb2.SUCCESS), failed="a")
    assert (found.move, found.ordinal) == (Move.FORK, 1)


@pytest.mark.parametrize("status", ENDED_BADLY)
def test_a_bad_end_is_followed_by_a_new_fork_with_a_new_ordinal(status: Any) -> None:
    found = decided(job("a", status), job("b", status))
    assert (found.job and found.job.id, found.move, found.ordinal) == ("b", Move.FORK, 2)


def test_a_job_being_cancelled_is_waited_for() -> None:
    found = decided(job("a", jobs_pb2.ERROR), job("b", jobs_pb2.CANCELLING))
    assert (found.job and found.job.id, found.move, found.ordinal) == ("b", Move.WAIT_AND_FORK, 2)


@pytest.mark.parametrize(
    ("has_inputs", "uploaded", "move"),
    [
        (False, None, Move.EXECUTE),
        (True, "a", Move.EXECUTE),
        (True, None, Move.SUBMIT_AGAIN),
        (True, "another", Move.SUBMIT_AGAIN),
    ],
)
def test_a_job_that_never_ran_is_executed_once_its_inputs_are_there(
    has_inputs: bool, uploaded: str | None, move: Move
) -> None:
    found = decided(job("a", jobs_pb2.CREATING), has_inputs=has_inputs, uploaded=uploaded)
    assert (found.job and found.job.id, found.move, found.unstarted) == ("a", move, ("a",))


def test_of_several_that_never_ran_the_one_with_its_inputs_is_executed() -> None:
    found = decided(job("a", jobs_pb2.CREATING), job("b", jobs_pb2.CREATING), has_inputs=True, uploaded="b")
    assert (found.job and found.job.id, found.move, found.unstarted) == ("b", Move.EXECUTE, ("a", "b"))


def test_the_most_valuable_job_counts_in_whatever_order_they_are_listed() -> None:
    jobs = [
        job("success", jobs_pb2.SUCCESS),
        job("running", jobs_pb2.EXECUTING),
        job("unstarted", jobs_pb2.CREATING),
        job("cancelling", jobs_pb2.CANCELLING),
        job("failed", jobs_pb2.ERROR),
    ]
    moves = [Move.ADOPT, Move.ATTACH, Move.EXECUTE, Move.WAIT_AND_FORK, Move.FORK]
    for best, move in enumerate(moves):
        for order in itertools.permutations(jobs[best:]):
            found = decided(*order)
            assert (found.job, found.move) == (jobs[best], move)
            assert found.ordinal == (2 if move is Move.WAIT_AND_FORK else 1)


def test_a_job_that_was_made_with_other_arguments_is_told_of() -> None:
    made = jobs_pb2.Job(
        name="old",
        job_parameters=jobs_pb2.JobParameters(
            arguments=[jobs_pb2.Argument(name="RANGE", value="1")],
            input_files=[jobs_pb2.File(desc=jobs_pb2.FileDesc(path="in.csv", var="DATA"))],
            output_files=[jobs_pb2.FileDesc(path="out.csv", var="RESULT")],
            env=jobs_pb2.Environment(vars={"DEBUG": "0"}),
            cloud_instance_types=[jobs_pb2.CloudInstanceType(name="c1.4")],
        ),
    )
    same = {"args": {"RANGE": "1"}, "vars": {"DATA": "other.csv", "RESULT": "out.csv"}, "env_vars": {"DEBUG": "0"}}
    assert differences(ForkRequest("bt1", **same), made) == []  # type: ignore[arg-type]
    changed = ForkRequest(
        "bt1",
        args={"RANGE": "2"},
        vars={"RESULT": "new.csv"},
        env_vars={"DEBUG": "1"},
        cloud_instance_types=["g1.1"],
        name="new",
    )
    assert differences(changed, made) == [
        "args['RANGE']",
        "vars['RESULT']",
        "env_vars['DEBUG']",
        "cloud_instance_types",
        "name",
    ]
