"""Text stays text, however a DAG renders its templates."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_datasphere.operators.jobs import CancelJobOperator, ForkJobOperator
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from airflow_provider_datasphere.sensors.jobs import DataSphereJobSensor

#: Python literals, and what Jinja would change though no template is in it.
LITERALS = ["1", "007", "1_000", "0x10", "1e3", "True", "None", "'a'", "[draft]", "['a']", "{'a': 1}", "(1, 2)", "a\n"]
CONTEXT: Any = {
    "n": 5,
    "f": 1e3,
    "yes": True,
    "nothing": None,
    "day": "20260101",
    "code": "0x10",
    "both": {"N": "1", "M": "2"},
    "types": ["g1.1"],
    "days": timedelta(days=3),
    "image": {"image": "cr.yandex/x"},
}


def dag(*, native: bool, **options: Any) -> DAG:
    return DAG("text", schedule=None, render_template_as_native_obj=native, **options)


def rendered(*, native: bool, context: Any = CONTEXT, **fields: Any) -> ForkJobOperator:
    with dag(native=native):
        task = ForkJobOperator(**{"task_id": "fork", "source_job_id": "bt1source", **fields})
    task.render_template_fields(dict(context))
    return task


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("text", LITERALS)
def test_a_literal_keeps_its_exact_text(native: bool, text: str) -> None:
    task = rendered(native=native, args={"N": text}, env_vars={"N": text}, desc="x" if text == "None" else text)
    assert (task.args, task.env_vars) == ({"N": text}, {"N": text})
    if text != "None":
        assert task.desc == text


@pytest.mark.parametrize("native", [True, False])
def test_a_template_inside_a_mapping_renders_to_text(native: bool) -> None:
    templates = {
        "A": "{{ n }}",
        "B": "{{ f }}",
        "C": "{{ yes }}",
        "D": "{{ day }}",
        "E": "{{ code }}",
        "F": "[{{ n }}]",
    }
    task = rendered(native=native, args=templates, vars={"X": "{{ n }}"}, cloud_instance_types=["{{ n }}"])
    assert task.args == {"A": "5", "B": "1000.0", "C": "True", "D": "20260101", "E": "0x10", "F": "[5]"}
    assert (task.vars, task.cloud_instance_types) == ({"X": "5"}, ["5"])


@pytest.mark.parametrize("native", [True, False])
def test_a_template_that_is_the_whole_of_a_text_field_renders_to_text(native: bool) -> None:
    task = rendered(
        native=native, source_job_id="{{ day }}", name="{{ day }}", desc="[{{ n }}]", datasphere_conn_id="{{ n }}"
    )
    assert (task.source_job_id, task.name, task.desc, task.datasphere_conn_id) == ("20260101", "20260101", "[5]", "5")


def test_a_template_that_is_the_whole_field_may_give_native_values() -> None:
    task = rendered(
        native=True,
        args="{{ both }}",
        cloud_instance_types="{{ types }}",
        docker="{{ image }}",
        data_ttl="{{ days }}",
        source_data_ttl="{{ nothing }}",
        name="{{ nothing }}",
    )
    assert (task.args, task.cloud_instance_types) == ({"N": "1", "M": "2"}, ["g1.1"])
    assert (task.docker, task.data_ttl) == ({"image": "cr.yandex/x"}, timedelta(days=3))
    assert (task.source_data_ttl, task.name) == (None, None)


def test_a_number_in_the_place_of_a_container_is_text() -> None:
    task = rendered(native=True, docker="{{ n }}", data_ttl="{{ n }}", args="{{ n }}")
    assert (task.docker, task.data_ttl, task.args) == ("5", "5", "5")


@pytest.mark.parametrize("native", [True, False])
def test_a_template_without_a_value_never_becomes_the_word(native: bool) -> None:
    task = rendered(native=native, args={"N": "{{ nothing }}"}, cloud_instance_types=["{{ nothing }}"])
    assert (task.args, task.cloud_instance_types) == ({"N": None}, [None])


@pytest.mark.parametrize("native", [True, False])
def test_templates_with_blocks_and_lines_of_their_own(native: bool) -> None:
    text = "{% for i in [1, 2] %}{{ i }}{% endfor %}\n  {%- if n %}\n7\n{% endif -%}\n"
    plain = rendered(native=False, args={"N": text}).args
    assert rendered(native=native, args={"N": text}).args == plain


@pytest.mark.parametrize("native", [True, False])
def test_other_delimiters_of_the_dag_are_its_templates(native: bool) -> None:
    with dag(native=native, jinja_environment_kwargs={"variable_start_string": "<<", "variable_end_string": ">>"}):
        task = ForkJobOperator(task_id="fork", source_job_id="bt1", args={"A": "<< n >>", "B": "{{ n }}"})
    task.render_template_fields(dict(CONTEXT))
    assert task.args == {"A": "5", "B": "{{ n }}"}


def test_a_mapped_task_is_rendered_in_the_same_way() -> None:
    with dag(native=True):
        whole = ForkJobOperator.partial(task_id="other", source_job_id="bt1", name="{{ day }}").expand(
            args=[{"N": "1", "D": "{{ day }}"}]
        )
    task = whole.unmap({"args": {"N": "1", "D": "{{ day }}"}})
    # As MappedOperator.render_template_fields() does it.
    task._do_render_template_fields(task, whole.template_fields, dict(CONTEXT), whole.get_template_env(), set())
    assert (task.args, task.name) == ({"N": "1", "D": "20260101"}, "20260101")


def test_the_other_operators_fields() -> None:
    with dag(native=True):
        sensor = DataSphereJobSensor(task_id="wait", job_id="{{ day }}", operation_id="{{ day }}")
        cancel = CancelJobOperator(task_id="cancel", job_id="{{ types }}")
        one = CancelJobOperator(task_id="one", job_id="{{ day }}")
        download = DownloadJobResultsOperator(
            task_id="download", job_id="{{ day }}", destination="{{ day }}", files=["{{ n }}", "1"]
        )
        patterns = DownloadJobResultsOperator(task_id="all", job_id="b", destination="[to]", files="{{ types }}")
    for task in (sensor, cancel, one, download, patterns):
        task.render_template_fields(dict(CONTEXT))
    assert (sensor.job_id, sensor.operation_id) == ("20260101", "20260101")
    assert (cancel.job_id, one.job_id) == (["g1.1"], "20260101")
    assert (download.job_id, download.destination, download.files) == ("20260101", "20260101", ["5", "1"])
    assert (patterns.destination, patterns.files) == ("[to]", ["g1.1"])


def test_fields_that_a_subclass_adds_are_airflows() -> None:
    class More(ForkJobOperator):
        template_fields = (*ForkJobOperator.template_fields, "more")

        def __init__(self, *, more: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.more = more

    with dag(native=True):
        task = More(task_id="fork", source_job_id="bt1", more=["{{ n }}", "1"])
    task.render_template_fields(dict(CONTEXT))
    assert task.more == [5, 1]
