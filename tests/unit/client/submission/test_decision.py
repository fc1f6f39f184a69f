"""The decision table: what to do about the jobs that earlier tries left."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.submission.decision import Action, Decision, choose_action
from airflow_provider_datasphere.client.submission.fork_comparison import changed_arguments as changed_in_job
from airflow_provider_datasphere.client.submission.fork_request import ForkRequest
from airflow_provider_datasphere.client.submission.job_key import Key
from airflow_provider_datasphere.client.submission.request_digest import (
    argument_digests,
    changed_arguments,
    request_digest,
)

KEY = Key(("dag", "run", "task", -1, 2), "dag.task run", retries=2)
RUNNING = [jobs_pb2.PREPARING, jobs_pb2.EXECUTING, jobs_pb2.UPLOADING_OUTPUT, jobs_pb2.JOB_STATUS_UNSPECIFIED, 77]
ENDED_BADLY = [jobs_pb2.ERROR, jobs_pb2.CANCELLED]


def job(id: str, status: Any) -> jobs_pb2.Job:
    return jobs_pb2.Job(id=id, status=status, desc=KEY.tag_description(None, "0a1b2c3d"))


def decided(*jobs: jobs_pb2.Job, **known: Any) -> Decision:
    return choose_action(jobs, **{"adoptable": lambda job: job.status == jobs_pb2.SUCCESS, **known})


def test_nothing_found_is_a_fork() -> None:
    assert decided() == Decision(None, Action.CREATE, 0)


@pytest.mark.parametrize("status", RUNNING)
def test_a_running_job_is_attached_to(status: Any) -> None:
    found = decided(job("a", status), adoptable=lambda _: False)
    assert (found.job and found.job.id, found.action, found.ordinal) == ("a", Action.ATTACH, 0)


@pytest.mark.parametrize("status", [jobs_pb2.SUCCESS, *ENDED_BADLY])
def test_an_ended_job_is_adopted_if_the_task_would_end_with_it(status: Any) -> None:
    assert decided(job("a", status), adoptable=lambda _: True).action is Action.ADOPT
    found = decided(job("a", status), adoptable=lambda _: False)
    assert (found.action, found.ordinal) == (Action.CREATE, 1)


@pytest.mark.parametrize("status", ENDED_BADLY)
def test_a_bad_end_is_followed_by_a_new_fork_with_a_new_ordinal(status: Any) -> None:
    found = decided(job("a", status), job("b", status))
    assert (found.job and found.job.id, found.action, found.ordinal) == ("b", Action.CREATE, 2)


def test_a_job_being_cancelled_is_waited_for() -> None:
    found = decided(job("a", jobs_pb2.ERROR), job("b", jobs_pb2.CANCELLING))
    assert (found.job and found.job.id, found.action, found.ordinal) == ("b", Action.WAIT_AND_CREATE, 1)


@pytest.mark.parametrize(
    ("has_inputs", "uploaded", "move"),
    [
        (False, None, Action.EXECUTE),
        (True, "a", Action.EXECUTE),
        (True, None, Action.RESUBMIT),
        (True, "another", Action.RESUBMIT),
    ],
)
def test_a_job_that_never_ran_is_executed_once_its_inputs_are_there(
    has_inputs: bool, uploaded: str | None, move: Action
) -> None:
    found = decided(job("a", jobs_pb2.CREATING), has_inputs=has_inputs, uploaded=uploaded)
    assert (found.job and found.job.id, found.action, found.unexecuted) == ("a", move, ("a",))


def test_of_several_that_never_ran_the_one_with_its_inputs_is_executed() -> None:
    found = decided(job("a", jobs_pb2.CREATING), job("b", jobs_pb2.CREATING), has_inputs=True, uploaded="b")
    assert (found.job and found.job.id, found.action, found.unexecuted) == ("b", Action.EXECUTE, ("a", "b"))


def test_the_most_valuable_job_counts_in_whatever_order_they_are_listed() -> None:
    jobs = [
        job("success", jobs_pb2.SUCCESS),
        job("running", jobs_pb2.EXECUTING),
        job("unstarted", jobs_pb2.CREATING),
        job("cancelling", jobs_pb2.CANCELLING),
        job("failed", jobs_pb2.ERROR),
    ]
    moves = [Action.ADOPT, Action.ATTACH, Action.EXECUTE, Action.WAIT_AND_CREATE, Action.CREATE]
    for best, move in enumerate(moves):
        for order in itertools.permutations(jobs[best:]):
            found = decided(*order)
            assert (found.job, found.action) == (jobs[best], move)
            assert found.ordinal == 1


MADE = jobs_pb2.JobParameters(
    arguments=[jobs_pb2.Argument(name="RANGE", value="1"), jobs_pb2.Argument(name="KEPT", value="k")],
    input_files=[jobs_pb2.File(desc=jobs_pb2.FileDesc(path="in.csv", var="DATA"), sha256="aa")],
    output_files=[jobs_pb2.FileDesc(path="out.csv", var="RESULT")],
    env=jobs_pb2.Environment(vars={"DEBUG": "0"}, docker_image_resource_id="image"),
    cloud_instance_types=[jobs_pb2.CloudInstanceType(name="c1.4")],
    extended_working_storage=jobs_pb2.ExtendedWorkingStorage(size_gb=100),
)
SAME: dict[str, Any] = {
    "args": {"RANGE": "1"},
    "vars": {"DATA": "other.csv", "RESULT": "out.csv"},
    "env_vars": {"DEBUG": "0"},
    "name": "mine",
    "desc": "Nightly",
    "docker": "image",
    "working_storage": {"size": "100GB"},
    "cloud_instance_types": ["c1.4"],
}
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"args": {"RANGE": "2"}}, "args['RANGE']"),
    ({"args": {}}, "args['RANGE']"),
    ({"vars": {"DATA": "other.csv", "RESULT": "new.csv"}}, "vars['RESULT']"),
    ({"vars": {"DATA": "other.csv"}}, "vars['RESULT']"),
    ({"vars": {"RESULT": "out.csv"}}, "vars['DATA']"),
    ({"env_vars": {"DEBUG": "1"}}, "env_vars['DEBUG']"),
    ({"env_vars": {}}, "env_vars['DEBUG']"),
    ({"name": "another"}, "name"),
    ({"name": None}, "name"),
    ({"desc": "Daily"}, "desc"),
    ({"docker": "other"}, "docker"),
    ({"docker": None}, "docker"),
    ({"docker": {"image": "cr/x:1"}}, "docker"),
    ({"working_storage": {"size": "200GB"}}, "working_storage"),
    ({"working_storage": None}, "working_storage"),
    ({"cloud_instance_types": ["g1.1"]}, "cloud_instance_types"),
    ({"cloud_instance_types": ()}, "cloud_instance_types"),
]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_each_argument_that_differs_is_named_from_what_the_job_shows(change: dict[str, Any], name: str) -> None:
    """Removed ones included: the source job tells what the job would have without them."""
    base = jobs_pb2.JobParameters()
    base.CopyFrom(MADE)
    base.arguments[0].value, base.output_files[0].path, base.input_files[0].sha256 = "0", "old.csv", "bb"
    base.env.Clear()
    base.cloud_instance_types[0].name = "c1.8"
    base.extended_working_storage.Clear()
    source = jobs_pb2.Job(id="bt1", name="source", job_parameters=base)
    desc = KEY.tag_description("Nightly", "0a1b2c3d")
    made = jobs_pb2.Job(name="mine", desc=desc, parent_job_id="bt1", job_parameters=MADE)
    assert changed_in_job(ForkRequest("bt1", **SAME), made, source) == []
    assert changed_in_job(ForkRequest("bt1", **{**SAME, **change}), made, source) == [name]


def test_another_source_is_named() -> None:
    made = jobs_pb2.Job(name="mine", desc="Nightly", parent_job_id="bt1", job_parameters=MADE)
    assert "source_job_id" in changed_in_job(ForkRequest("bt2", **SAME), made)


@pytest.mark.parametrize(("change", "name"), [*CHANGES, ({"data_ttl": 30}, "data_ttl")])
def test_each_argument_that_differs_is_named_from_what_was_written_down(change: dict[str, Any], name: str) -> None:
    before, after = ForkRequest("bt1", **SAME), ForkRequest("bt1", **{**SAME, **change})
    assert changed_arguments(after, argument_digests(before)) == [name]
    assert request_digest(before) != request_digest(after)
    assert request_digest(before) == request_digest(ForkRequest("bt1", **SAME, data_ttl=14))


def test_the_digest_of_an_argument_is_too_short_to_tell_a_secret() -> None:
    digests = argument_digests(ForkRequest("bt1", env_vars={"PASSWORD": "hunter2"}))
    assert len(digests["env_vars['PASSWORD']"]) == 4
