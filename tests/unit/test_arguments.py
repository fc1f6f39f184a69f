"""What is said about wrong arguments when the DAG is parsed: the field, the value and the way out."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_datasphere.arguments import is_literal
from airflow_provider_datasphere.compat import AirflowFailException, ObjectStoragePath
from airflow_provider_datasphere.exceptions import JobRequestError
from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

WRONG: list[tuple[str, Any, str]] = [
    ("source_job_id", "", r"source_job_id is '': give the id of the DataSphere job to fork"),
    ("source_job_id", None, r"source_job_id is None"),
    ("args", {"RANGE": 1}, r"args\['RANGE'\] is 1 \(int\): DataSphere takes strings; write '1'"),
    ("args", ["RANGE=1"], r"args is \['RANGE=1'\]: give a mapping of names to strings"),
    ("args", {"": "1"}, r"args has the name ''"),
    ("vars", {"DATA": None}, r"vars\['DATA'\] is None \(NoneType\)"),
    ("env_vars", "A=1", r"env_vars is 'A=1': give a mapping"),
    ("env_vars", {"A=B": "1"}, r"env_vars has the name 'A=B': no environment variable"),
    ("source_job_id", "bt1source\n", r"source_job_id is 'bt1source\\n'"),
    ("docker", {"username": "me"}, r"docker has the keys \['username'\]: 'image' is needed"),
    ("docker", {"image": "cr.yandex/x", "password": "hunter2"}, r"docker\['password'\] is plain text"),
    ("docker", 7, r"docker is 7: give an image id or name"),
    ("working_storage", {"size": "50GB"}, r"working_storage\['size'\] is '50GB': at least 100GB"),
    ("working_storage", {"size": "100 gigs"}, r"working_storage\['size'\] is '100 gigs': give bytes"),
    ("working_storage", {"size": "100GB", "type": "HDD"}, r"working_storage\['type'\] is 'HDD'"),
    ("working_storage", "100GB", r"working_storage is '100GB': give \{'size': '100GB'\}"),
    ("cloud_instance_types", "g1.1", r"cloud_instance_types is 'g1.1': give a list, such as \['g1.1'\]"),
    ("cloud_instance_types", [""], r"cloud_instance_types is \[''\]"),
    ("data_ttl", 0, r"data_ttl is 0: give a timedelta of one or more whole days"),
    ("data_ttl", 1.5, r"data_ttl is 1.5: .*a number of days"),
    ("data_ttl", timedelta(hours=36), r"data_ttl is .*whole days"),
    ("source_data_ttl", "for ever", r"source_data_ttl is 'for ever': .*'infinity'"),
    ("on_kill_action", "stop", r"on_kill_action is 'stop': give one of 'cancel', 'graceful', 'keep'"),
    ("poll_interval", 0, r"poll_interval is 0: give a positive number of seconds"),
    ("poll_interval", timedelta(seconds=5), r"poll_interval is .*positive number of seconds"),
    ("poll_interval", float("nan"), r"poll_interval is nan"),
    ("skip_on_exit_code", 0, r"skip_on_exit_code is 0: give a return code other than 0"),
    ("skip_on_exit_code", "99", r"skip_on_exit_code is '99'"),
    ("skip_on_exit_code", [99, True], r"skip_on_exit_code is \[99, True\]"),
    ("skip_on_exit_code", 1.5, r"skip_on_exit_code is 1.5"),
    ("name", 5, r"name is 5 \(int\): give a string"),
    ("desc", ["a"], r"desc is \['a'\] \(list\): give a string"),
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


def test_the_sensors_and_the_cancels_arguments() -> None:
    with pytest.raises(JobRequestError, match="skip_on_exit_code is 0"):
        DataSphereJobSensor(task_id="wait", job_id="bt1", skip_on_exit_code=0)
    with pytest.raises(ValueError, match="mode must be one of"):
        DataSphereJobSensor(task_id="wait", job_id="bt1", mode="deferrable")
    with pytest.raises(ValueError, match="mutually exclusive"):
        DataSphereJobSensor(task_id="wait", job_id="bt1", soft_fail=True, never_fail=True)
    CancelJobOperator(task_id="cancel", job_id="")


def test_unknown_arguments_are_refused_by_airflow() -> None:
    with pytest.raises(TypeError, match="instance_type"):
        ForkJobOperator(task_id="fork", source_job_id="bt1", instance_type="g1.1")
