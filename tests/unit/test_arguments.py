"""What is said about wrong arguments when the DAG is parsed: the field, the value and the way out."""

from __future__ import annotations

import gc
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_datasphere.arguments import is_literal
from airflow_provider_datasphere.compat import AirflowFailException, ObjectStoragePath
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

WRONG: list[tuple[str, Any, str]] = [
    ("source_job_id", "", r"source_job_id is '': give the id of the DataSphere job to fork"),
    ("source_job_id", None, r"source_job_id is None"),
    ("args", {"RANGE": 1}, r"args\['RANGE'\] is 1 \(int\): DataSphere takes strings; write '1'"),
    ("args", ["RANGE=1"], r"args is \['RANGE=1'\]: give a mapping of names to strings"),
    ("args", {"": "1"}, r"args has the name ''"),
    ("args", {"RANGE": None}, r"args\['RANGE'\] is None: leave it out to keep the source job's value"),
    ("args", {"RANGE": [1]}, r"args\['RANGE'\] is \[1\] \(list\): DataSphere takes strings\.$"),
    ("args", {"RANGE": 1, "DAY": "{{ ds }}"}, r"args\['RANGE'\] is 1 \(int\)"),
    ("args", {"RANGE": "a\0b"}, r"args\['RANGE'\] has a NUL character at position 1"),
    ("args", {"RANGE": "\udc80"}, r"args\['RANGE'\] has '\\udc80' at position 0, a byte that isn't UTF-8"),
    ("args", {"R\0": "1"}, r"The name 'R\\x00' in args has a NUL character"),
    ("vars", {"DATA": None}, r"vars\['DATA'\] is None: leave it out to keep the source job's value"),
    ("vars", {"DATA": "None"}, r"vars\['DATA'\] is 'None': a template renders to that"),
    ("vars", {"DATA": "data\ud800.csv"}, r"vars\['DATA'\] has '\\ud800' at position 4"),
    ("vars", {"DATA": "datasphere://bt1job"}, r"names a job but none of its files: write datasphere://bt1job/<output"),
    ("vars", {"DATA": "datasphere://bt1job/"}, r"names a job but none of its files"),
    ("vars", {"DATA": "datasphere://bt1…/a"}, r"'bt1…' can't be a job's id"),
    ("vars", {"DATA": "datasphere://None/a"}, r"the job id is the word None, .*add `first >> second`"),
    ("env_vars", "A=1", r"env_vars is str: give a mapping"),
    ("env_vars", {"A": "\0"}, r"env_vars\['A'\] has a NUL character at position 0"),
    ("env_vars", {"A": None}, r"env_vars\['A'\] is None: leave it out"),
    ("env_vars", {"A=B": "1"}, r"env_vars has the name 'A=B': no environment variable"),
    ("source_job_id", "bt1source\n", r"source_job_id is 'bt1source\\n', with blanks, .* around it: write 'bt1source'"),
    ("source_job_id", " bt1source", r"source_job_id is ' bt1source', with blanks, .* around it: write 'bt1source'"),
    ("source_job_id", "'bt1source'", r"write 'bt1source'\.$"),
    ("source_job_id", "bt1…", r"source_job_id is still the placeholder 'bt1…': put the id of a job that has run"),
    ("source_job_id", "bt1...", r"source_job_id is still the placeholder"),
    ("source_job_id", "https://datasphere.yandex.cloud/communities/c/projects/p/job/bt1z", r"page: write 'bt1z'\.$"),
    ("source_job_id", "https://datasphere.yandex.cloud/communities/c/projects/p/job/bt1z?tab=x", r"write 'bt1z'\.$"),
    ("source_job_id", "datasphere://conn@bt1z/out.csv", r"the URI of a job's file: write 'bt1z'"),
    ("source_job_id", "None", r"The task that should give it hasn't run, or returned nothing"),
    ("source_job_id", "['bt1a', 'bt1b']", r"a list as text: give the output of the mapped task itself"),
    ("source_job_id", ["bt1a", "bt1b"], r"A mapped task returns a list of ids: map over it with \.expand"),
    ("docker", {"username": "me"}, r"docker has the keys \['username'\]: 'image' is needed"),
    ("docker", {"image": "cr.yandex/x", "password": "hunter2"}, r"docker\['password'\] is plain text"),
    ("docker", 7, r"docker is 7: give an image id or name"),
    ("docker", {1: "x", "image": "y", None: 2}, r"docker has the keys \[1, 'image', None\]"),
    ("docker", {"image": "x", "username": 5}, r"docker\['username'\] is 5 \(int\): give a string"),
    ("docker", {"image": "x", "password": {"secret-id": ""}}, r"docker\['password'\] must be"),
    ("docker", {"image": "x\0"}, r"docker\['image'\] has a NUL character"),
    ("docker", "None", r"docker is 'None': a template renders to that"),
    ("working_storage", {"size": "50GB"}, r"working_storage\['size'\] is '50GB': at least 100GB"),
    ("working_storage", {"size": "100 gigs"}, r"working_storage\['size'\] is '100 gigs': give bytes"),
    ("working_storage", {"size": "100GB", "type": "HDD"}, r"working_storage\['type'\] is 'HDD'"),
    ("working_storage", {"size": "999999999999999999PB"}, r"working_storage\['size'\] is .*: that is more than"),
    ("working_storage", {"size": "9" * 5000}, r"working_storage\['size'\] is '9+': give bytes"),
    ("working_storage", "100GB", r"working_storage is '100GB': give \{'size': '100GB'\}"),
    ("cloud_instance_types", "g1.1", r"cloud_instance_types is 'g1.1': give a list, such as \['g1.1'\]"),
    ("cloud_instance_types", [""], r"cloud_instance_types is \[''\]"),
    ("cloud_instance_types", ["g1.1", "None"], r"cloud_instance_types is \['g1.1', 'None'\]"),
    ("cloud_instance_types", ["g1.1", "g\0"], r"cloud_instance_types\[1\] has a NUL character"),
    ("data_ttl", 0, r"data_ttl is 0: give a timedelta of one or more whole days"),
    ("data_ttl", 1.5, r"data_ttl is 1.5: .*a number of days"),
    ("data_ttl", timedelta(hours=36), r"data_ttl is .*whole days"),
    ("data_ttl", timedelta(days=3_652_501), r"data_ttl is longer than the API can express: give at most 3652500 days"),
    ("data_ttl", 3_652_501, r"data_ttl is longer than the API can express"),
    ("data_ttl", "9" * 5000, r"data_ttl is longer than the API can express"),
    ("data_ttl", "None", r"data_ttl is 'None': give a timedelta"),
    ("source_data_ttl", timedelta.max, r"source_data_ttl is "),
    ("source_data_ttl", "for ever", r"source_data_ttl is 'for ever': .*'infinity'"),
    ("on_kill_action", "stop", r"on_kill_action is 'stop': give one of 'cancel', 'graceful', 'keep'"),
    ("poll_interval", 0, r"poll_interval is 0: give a positive number of seconds"),
    ("poll_interval", timedelta(seconds=5), r"poll_interval is .*positive number of seconds"),
    ("poll_interval", float("nan"), r"poll_interval is nan"),
    ("poll_interval", "{{ 5 }}", r"poll_interval is '{{ 5 }}': .*it isn't templated"),
    ("poll_interval", 1e12, r"poll_interval is 1000000000000\.0"),
    ("wait_for_completion", "False", r"wait_for_completion is 'False': give True or False; it isn't templated"),
    ("deferrable", "{{ true }}", r"deferrable is '{{ true }}': give True or False"),
    ("stream_logs", 0, r"stream_logs is 0: give True or False"),
    ("reattach", None, r"reattach is None: give True or False"),
    ("fail_on_missing_outputs", "no", r"fail_on_missing_outputs is 'no'"),
    ("datasphere_conn_id", "", r"datasphere_conn_id is '': give the id of an Airflow connection"),
    ("datasphere_conn_id", None, r"datasphere_conn_id is None: give the id"),
    ("datasphere_conn_id", "None", r"datasphere_conn_id is 'None'"),
    ("skip_on_exit_code", 0, r"skip_on_exit_code is 0: give a return code other than 0"),
    ("skip_on_exit_code", "99", r"skip_on_exit_code is '99'"),
    ("skip_on_exit_code", [99, True], r"skip_on_exit_code is \[99, True\]"),
    ("skip_on_exit_code", 1.5, r"skip_on_exit_code is 1.5"),
    ("name", 5, r"name is 5 \(int\): give a string"),
    ("desc", ["a"], r"desc is \['a'\] \(list\): give a string"),
    ("desc", "a\0", r"desc has a NUL character at position 1"),
    ("name", "None", r"name is 'None': a template renders to that .*or leave name out"),
    ("name", "\ud83d", r"name has '\\ud83d' at position 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_literal_is_refused_when_the_dag_is_parsed(name: str, value: Any, message: str) -> None:
    with pytest.raises(JobRequestError, match=message) as caught:
        ForkJobOperator(**{"task_id": "fork", "source_job_id": "bt1source", name: value})
    assert isinstance(caught.value, AirflowFailException)


def test_a_plain_text_password_is_not_repeated_in_the_message() -> None:
    with pytest.raises(JobRequestError) as caught:
        ForkJobOperator(task_id="fork", source_job_id="bt1", docker={"image": "x", "password": "hunter2"})
    assert "hunter2" not in str(caught.value)


RIGHT: list[dict[str, Any]] = [
    {},
    {"args": {"MODE": "None"}, "env_vars": {"MODE": "None"}},
    {"name": "{# a comment #}"},
    {"vars": {"DATA": "datasphere://{{ x }}"}},
    {"data_ttl": timedelta(days=3_652_500), "source_data_ttl": "0030"},
    {"args": {}, "vars": {}, "env_vars": {}},
    {"args": {"RANGE": "{{ ds }}"}},
    {"vars": {"DATA": Path("data.csv"), "MORE": ObjectStoragePath("file:///data.csv")}},
    {"args": "{{ params.args }}"},
    {"cloud_instance_types": "{{ params.types }}"},
    {"docker": "system-python-3-10"},
    {"docker": {"image": "cr.yandex/x", "username": "json_key", "password": {"secret-id": "KEY"}}},
    {"working_storage": {"size": "100GB"}},
    {"working_storage": {"size": 200 << 30, "type": "SSD"}},
    {"data_ttl": timedelta(days=30), "source_data_ttl": "infinity"},
    {"data_ttl": 30, "source_data_ttl": "30"},
    {"data_ttl": "{{ var.value.ttl }}"},
    {"skip_on_exit_code": 99},
    {"skip_on_exit_code": {98, 99}},
    {"skip_on_exit_code": range(90, 100)},
    {"poll_interval": 0.5, "on_kill_action": "keep"},
]


@pytest.mark.parametrize("arguments", RIGHT)
def test_what_is_right_or_not_known_yet_passes(arguments: dict[str, Any]) -> None:
    ForkJobOperator(task_id="fork", source_job_id="bt1source", **arguments)


def test_what_airflow_resolves_later_is_no_literal() -> None:
    with DAG("arguments", schedule=None):
        fork = ForkJobOperator(task_id="first", source_job_id="bt1source")
        # Neither value is known yet.
        ForkJobOperator(task_id="second", source_job_id=fork.output, args=fork.output, vars={"DATA": fork.output})
    assert not is_literal(fork.output)
    assert not is_literal({"DATA": fork.output})
    assert not is_literal(["{% if x %}a{% endif %}"])
    assert is_literal({"DATA": ["a", 1, None, ("b",)]})


def test_what_mapped_tasks_have_in_common_is_checked_before_they_are_made() -> None:
    with DAG("partial", schedule=None, default_args={"retries": 2}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a task that was never mapped
        for name, value, message in WRONG:
            with pytest.raises(JobRequestError, match=message):
                ForkJobOperator.partial(**{"task_id": "fork", "source_job_id": "bt1source", name: value})
        gc.collect()


def test_what_mapped_tasks_differ_in_is_checked_before_they_are_made() -> None:
    with DAG("expand", schedule=None), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, value, message in WRONG:
            if name != "source_job_id":
                with pytest.raises(JobRequestError, match=message):
                    ForkJobOperator.partial(task_id="fork", source_job_id="bt1source").expand(**{name: [value]})
            with pytest.raises(JobRequestError, match=message):
                ForkJobOperator.partial(task_id="fork").expand_kwargs([{"source_job_id": "bt1", name: value}])
        gc.collect()


def test_mapping_stays_airflows_own() -> None:
    with DAG("mapping", schedule=None) as dag:
        first = ForkJobOperator(task_id="first", source_job_id="bt1source")
        partial = ForkJobOperator.partial(task_id="second", source_job_id="{{ x }}", deferrable=True)
        assert partial.kwargs["deferrable"] is True
        partial.expand(args=[{"A": "{{ x }}"}, {"A": "1"}], vars=first.output)
        ForkJobOperator.partial(task_id="third").expand_kwargs(first.output)
        with pytest.raises(TypeError, match="instance_type"):
            ForkJobOperator.partial(task_id="fourth", instance_type="g1.1")
    assert [type(dag.get_task(name)).__name__ for name in ("second", "third")] == ["MappedOperator"] * 2


def test_a_dag_with_other_delimiters_has_other_templates() -> None:
    options = {"variable_start_string": "<<", "variable_end_string": ">>", "line_statement_prefix": "%%"}
    with DAG("delimiters", schedule=None, jinja_environment_kwargs=options):
        ForkJobOperator(task_id="fork", source_job_id="<< x >>", working_storage={"size": "<< x >>GB"})
        ForkJobOperator.partial(task_id="mapped", source_job_id="<< x >>").expand(docker=["<< x >>"])
        DataSphereJobSensor(task_id="wait", job_id="<< x >>", operation_id="<< x >>")
        CancelJobOperator(task_id="cancel", job_id="<< x >>")
        DownloadJobResultsOperator(task_id="download", job_id="%% x", destination="to")
        with pytest.raises(JobRequestError, match="source_job_id is "):
            ForkJobOperator(task_id="wrong", source_job_id="{{ x }}")


def test_no_value_of_an_environment_variable_is_repeated() -> None:
    wrongs: list[Any] = [
        "PASSWORD=hunter2",
        {"PASSWORD": b"hunter2"},
        {"PASSWORD": ["hunter2"]},
        {"PASSWORD": "hunter2\0"},
    ]
    for wrong in wrongs:
        with pytest.raises(JobRequestError) as caught:
            ForkJobOperator(task_id="fork", source_job_id="bt1", env_vars=wrong)
        assert "hunter2" not in str(caught.value)


def test_a_task_given_in_place_of_its_output_is_named() -> None:
    with DAG("tasks", schedule=None):
        fork = ForkJobOperator(task_id="train", source_job_id="bt1source")
        mapped = ForkJobOperator.partial(task_id="all", source_job_id="bt1source").expand(args=[{"A": "1"}])
    makers: list[tuple[str, Any]] = [
        ("source_job_id", lambda task: ForkJobOperator(task_id="a", source_job_id=task)),
        (r"args\['A'\]", lambda task: ForkJobOperator(task_id="a", source_job_id="b", args={"A": task})),
        ("vars", lambda task: ForkJobOperator(task_id="a", source_job_id="b", vars=task)),
        ("docker", lambda task: ForkJobOperator(task_id="a", source_job_id="b", docker=task)),
        ("data_ttl", lambda task: ForkJobOperator(task_id="a", source_job_id="b", data_ttl=task)),
        ("job_id", lambda task: DataSphereJobSensor(task_id="a", job_id=task)),
        ("job_id", lambda task: CancelJobOperator(task_id="a", job_id=task)),
        ("job_id", lambda task: CancelJobOperator(task_id="a", job_id=[task])),
        ("job_id", lambda task: DownloadJobResultsOperator(task_id="a", job_id=task, destination="to")),
        ("destination", lambda task: DownloadJobResultsOperator(task_id="a", job_id="b", destination=task)),
        ("files", lambda task: DownloadJobResultsOperator(task_id="a", job_id="b", destination="to", files=task)),
    ]
    for field, make in makers:
        for task, name in ((fork, "train"), (mapped, "all")):
            with pytest.raises(JobRequestError, match=rf"^{field} is the task '{name}' itself: .*{name}\.output"):
                make(task)
    with pytest.raises(JobRequestError, match=r"operation_id is the task 'train' itself: .*output\['operation_id'\]"):
        DataSphereJobSensor(task_id="a", job_id="bt1", operation_id=fork)


@pytest.mark.parametrize("operation_id", [5, ["a"], "bt1 op", "op\n", b"op"])
def test_what_can_be_no_operations_id_is_refused(operation_id: Any) -> None:
    with pytest.raises(JobRequestError, match=r"operation_id is .*: give the XCom operation_id"):
        DataSphereJobSensor(task_id="wait", job_id="bt1", operation_id=operation_id)


@pytest.mark.parametrize("name", ["deferrable", "fail_on_missing_outputs"])
def test_the_sensors_flags(name: str) -> None:
    with pytest.raises(JobRequestError, match=f"{name} is 'False': give True or False"):
        DataSphereJobSensor(**{"task_id": "wait", "job_id": "bt1", name: "False"})
    with pytest.raises(JobRequestError, match=r"graceful is '\{\{ x \}\}': give True or False"):
        CancelJobOperator(task_id="cancel", job_id="bt1", graceful="{{ x }}")


def test_the_sensors_and_the_cancels_arguments() -> None:
    with pytest.raises(JobRequestError, match="skip_on_exit_code is 0"):
        DataSphereJobSensor(task_id="wait", job_id="bt1", skip_on_exit_code=0)
    with pytest.raises(ValueError, match="mode must be one of"):
        DataSphereJobSensor(task_id="wait", job_id="bt1", mode="deferrable")
    with pytest.raises(ValueError, match="mutually exclusive"):
        DataSphereJobSensor(task_id="wait", job_id="bt1", soft_fail=True, never_fail=True)
    nothings: list[Any] = ["", None, "None", [], [None, ""]]
    for nothing in nothings:
        CancelJobOperator(task_id="cancel", job_id=nothing)
    with pytest.raises(JobRequestError, match="job_id is 'a b'"):
        CancelJobOperator(task_id="cancel", job_id=["bt1", "a b"])


def test_unknown_arguments_are_refused_by_airflow() -> None:
    with pytest.raises(TypeError, match="instance_type"):
        ForkJobOperator(task_id="fork", source_job_id="bt1", instance_type="g1.1")
