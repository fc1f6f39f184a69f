"""What a fork may ask for, and the message it becomes."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import JobRequestError
from airflow_provider_datasphere.client.submission.fork_request import (
    ForkRequest,
    expiry_warning,
    overrides_message,
    pattern_warning,
    plan_fork,
)
from airflow_provider_datasphere.client.transfer.inputs import JobInput
from airflow_provider_datasphere.client.validation import GIB, parse_size, parse_ttl, parse_working_storage

SOURCE = jobs_pb2.Job(
    id="bt1source",
    job_parameters=jobs_pb2.JobParameters(
        arguments=[jobs_pb2.Argument(name="RANGE", value="10"), jobs_pb2.Argument(name="SEED", value="1")],
        input_files=[
            jobs_pb2.File(desc=jobs_pb2.FileDesc(path="main.py")),
            jobs_pb2.File(desc=jobs_pb2.FileDesc(path="in.csv", var="DATA")),
        ],
        output_files=[
            jobs_pb2.FileDesc(path="out.csv", var="RESULT"),
            jobs_pb2.FileDesc(path="models/a", var="MODEL"),
            jobs_pb2.FileDesc(path="unnamed.txt"),
        ],
    ),
)


def request(**fields: Any) -> ForkRequest:
    return ForkRequest(source_job_id="bt1source", **fields)


def job_input(var: str = "DATA", path: str = "new.csv", size_bytes: int = 3) -> JobInput:
    return JobInput(var, path, "ab" * 32, size_bytes, jobs_pb2.NONE, lambda _: nullcontext(Path(path)))


def refused(**fields: Any) -> str:
    """Why such a request is refused, before or when its source is known."""
    with pytest.raises(JobRequestError) as refusal:
        plan_fork(request(**fields), SOURCE)
    return str(refusal.value)


@pytest.mark.parametrize("source_job_id", ["", " ", None, 7])
def test_a_source_is_needed(source_job_id: Any) -> None:
    with pytest.raises(JobRequestError, match="source_job_id is "):
        ForkRequest(source_job_id=source_job_id)


def test_unknown_names_are_named_together_with_those_that_exist() -> None:
    message = refused(args={"RANGE": "1", "RAGNE": "2"})
    assert "'RAGNE'" in message
    assert "RANGE, SEED" in message
    assert "'RANGE'," not in message
    message = refused(vars={"DATUM": "x"})
    assert "'DATUM'" in message
    assert "DATA, RESULT, MODEL" in message


def test_values_are_strings() -> None:
    assert "args['RANGE'] is 1 (int)" in refused(args={"RANGE": 1})
    assert "write '1'" in refused(args={"RANGE": 1})
    assert "env_vars['DEBUG'] is of the type bool" in refused(env_vars={"DEBUG": True})
    assert "give a mapping" in refused(vars=["DATA"])


def test_an_output_takes_a_path_inside_the_job_and_no_uri() -> None:
    assert "path inside the job" in refused(vars={"RESULT": "s3://bucket/out.csv"})
    assert "is empty" in refused(vars={"RESULT": ""})
    plan = plan_fork(request(vars={"RESULT": "new/out.csv", "DATA": "s3://bucket/in.csv"}), SOURCE)
    assert plan.output_vars == {"RESULT": "new/out.csv"}
    assert plan.input_vars == {"DATA": "s3://bucket/in.csv"}


@pytest.mark.parametrize("path", ["", " ", "\n", "file://", "file:// "])
def test_an_input_given_nothing_is_not_the_current_folder(path: str) -> None:
    message = refused(vars={"DATA": path})
    assert f"vars['DATA'] is {path!r}" in message
    assert "leave DATA out" in message


@pytest.mark.parametrize("path", ["models/a", "models", "models/a/b", "./models/a"])
def test_an_output_may_not_overlap_one_that_the_source_keeps(path: str) -> None:
    assert "overlap" in refused(vars={"RESULT": path})


@pytest.mark.parametrize("path", ["models/*.pt", "model?.bin", "part[0].csv"])
def test_an_output_is_no_pattern(path: str) -> None:
    """Users have seen them taken, and the job fail at its end, with all its checkpoints lost."""
    with pytest.raises(JobRequestError, match=r"a pattern: .* Give the path of one file or folder"):
        plan_fork(ForkRequest("bt1", vars={"RESULT": path}), SOURCE)
    source = jobs_pb2.Job()
    source.CopyFrom(SOURCE)
    source.job_parameters.output_files.add(path=path)
    warning = pattern_warning(plan_fork(ForkRequest("bt1"), source), source)
    assert warning is not None
    assert path in warning
    assert pattern_warning(plan_fork(ForkRequest("bt1"), SOURCE), SOURCE) is None


def test_outputs_may_trade_places() -> None:
    plan = plan_fork(request(vars={"RESULT": "models/a", "MODEL": "out.csv"}), SOURCE)
    assert plan.output_vars == {"RESULT": "models/a", "MODEL": "out.csv"}


def test_inputs_may_not_overlap() -> None:
    plan = plan_fork(request(vars={"DATA": "data"}), SOURCE)
    with pytest.raises(JobRequestError, match="overlap"):
        overrides_message(plan, [job_input(path="data"), job_input("MORE", "data/x")])


def test_inputs_are_limited_in_size() -> None:
    plan = plan_fork(request(vars={"DATA": "new.csv"}), SOURCE)
    with pytest.raises(JobRequestError, match="5 GiB"):
        overrides_message(plan, [job_input(size_bytes=5 * GIB + 1)])
    with pytest.raises(JobRequestError, match="10 GiB"):
        overrides_message(plan, [job_input(path=name, size_bytes=4 * GIB) for name in "abc"])
    overrides_message(plan, [job_input(path=name, size_bytes=5 * GIB) for name in "ab"])


def test_a_source_without_data_cannot_be_forked_even_if_they_never_expire() -> None:
    source = jobs_pb2.Job(id="bt1source", data_cleared=True)
    with pytest.raises(JobRequestError, match=r"bt1source .* cleared"):
        plan_fork(request(), source)


def test_what_is_not_overridden_keeps_its_default() -> None:
    assert overrides_message(plan_fork(request(), SOURCE), []) == jobs_pb2.JobParameters(env=jobs_pb2.Environment())


def test_every_override_has_its_field() -> None:
    plan = plan_fork(
        request(
            args={"RANGE": "1"},
            vars={"DATA": "new.csv", "RESULT": "new/out.csv"},
            env_vars={"DEBUG": "1"},
            docker="system-python-3-10",
            working_storage={"type": "SSD", "size": "100GB"},
            cloud_instance_types=["g1.1", "c1.4"],
        ),
        SOURCE,
    )
    message = overrides_message(plan, [job_input()])
    assert [(a.name, a.value) for a in message.arguments] == [("RANGE", "1")]
    assert [(f.desc.path, f.desc.var, f.size_bytes) for f in message.input_files] == [("new.csv", "DATA", 3)]
    assert [(d.path, d.var) for d in message.output_files] == [("new/out.csv", "RESULT")]
    assert dict(message.env.vars) == {"DEBUG": "1"}
    assert message.env.docker_image_resource_id == "system-python-3-10"
    assert message.extended_working_storage.size_gb == 100
    assert message.extended_working_storage.type == jobs_pb2.ExtendedWorkingStorage.SSD
    assert [t.name for t in message.cloud_instance_types] == ["g1.1", "c1.4"]


def test_a_docker_image_may_be_described() -> None:
    docker = {"image": "cr.yandex/x:1", "username": "me", "password": {"secret-id": "registry"}}
    spec = overrides_message(plan_fork(request(docker=docker), SOURCE), []).env.docker_image_spec
    assert (spec.image_url, spec.username, spec.password_ds_secret_name) == ("cr.yandex/x:1", "me", "registry")


@pytest.mark.parametrize(
    ("docker", "message"),
    [
        (7, "docker is 7"),
        ({"username": "me"}, "'image' is needed"),
        ({"image": "x", "pasword": {}}, "pasword"),
        ({"image": "x", "password": "hunter2"}, "plain text"),
        ({"image": "x", "password": {"secret": "x"}}, "secret-id"),
    ],
)
def test_a_wrong_docker_image_is_refused_without_its_password(docker: Any, message: str) -> None:
    assert message in refused(docker=docker)
    assert "hunter2" not in refused(docker=docker)


@pytest.mark.parametrize("types", ["g1.1", [1], [""], 7])
def test_instance_types_are_a_list_of_names(types: Any) -> None:
    assert "cloud_instance_types" in refused(cloud_instance_types=types)


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [(5, 5), ("5", 5), ("1KB", 1024), ("2 gb", 2 * GIB), ("1TB", 1024 * GIB)],
)
def test_sizes_are_binary_multiples(size: Any, size_bytes: int) -> None:
    assert parse_size("size", size) == size_bytes


@pytest.mark.parametrize("size", ["1.5GB", "GB", "", None, True, "1 parsec"])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(JobRequestError, match="size is "):
        parse_size("size", size)


def test_working_storage_is_rounded_up_to_whole_gib() -> None:
    assert parse_working_storage(None) is None
    assert parse_working_storage({"size": "100GB"}) == 100
    assert parse_working_storage({"size": 100 * GIB + 1}) == 101
    for wrong in ({}, {"size": "99GB"}, {"type": "HDD", "size": "100GB"}, {"size": "100GB", "iops": 1}, "100GB"):
        with pytest.raises(JobRequestError, match="working_storage"):
            parse_working_storage(wrong)


def test_a_time_to_live_is_whole_days_or_infinity() -> None:
    assert parse_ttl("data_ttl", None) == timedelta(days=14)
    assert parse_ttl("data_ttl", "infinity") is None
    assert parse_ttl("data_ttl", timedelta(days=30)) == timedelta(days=30)
    assert parse_ttl("data_ttl", 30) == parse_ttl("data_ttl", " 30 ") == timedelta(days=30)
    for wrong in (timedelta(hours=36), timedelta(0), timedelta(days=-1), "two weeks", "", 0, -1, True):
        with pytest.raises(JobRequestError, match="data_ttl is "):
            parse_ttl("data_ttl", wrong)


@pytest.mark.parametrize(("days", "warned"), [(0.5, True), (2.9, True), (3.1, False), (-1, True)])
def test_a_dying_source_is_told_of(days: float, warned: bool) -> None:
    now = datetime(2026, 11, 22, tzinfo=timezone.utc)
    source = jobs_pb2.Job(id="bt1source")
    source.data_expires_at.FromDatetime(now + timedelta(days=days))
    warning = expiry_warning(source, now)
    assert (warning is not None) == warned
    assert not warned or f"in {max(0, int(days * 24))} hours" in str(warning)


def test_a_source_that_never_expires_needs_no_warning() -> None:
    assert expiry_warning(jobs_pb2.Job(id="bt1source"), datetime.now(timezone.utc)) is None


@pytest.mark.parametrize(
    ("fields", "largest"),
    [
        ({"args": {"RANGE": "x" * 5_000_000}}, r"args\['RANGE'\] with 5000000"),
        ({"env_vars": {"A": "ж" * 2_200_000, "B": "1"}}, r"env_vars\['A'\] with 4400000"),
        ({"desc": "x" * 4_200_000}, "desc with 4200000"),
    ],
)
def test_a_request_that_no_message_holds_is_refused_before_it_is_sent(fields: Any, largest: str) -> None:
    plan = plan_fork(request(**fields), SOURCE)
    with pytest.raises(JobRequestError, match=rf"would have \d+ bytes, more than the 4194304 .*{largest}"):
        overrides_message(plan, [])


def test_a_request_just_below_the_limit_is_made() -> None:
    overrides_message(plan_fork(request(args={"RANGE": "x" * 4_180_000}), SOURCE), [])
