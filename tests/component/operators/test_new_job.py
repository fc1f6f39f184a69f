"""ExecuteJobOperator in one process, against the emulator: where its configuration comes from, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_datasphere.compat import AirflowTaskTimeout, ObjectStoragePath, TaskDeferred
from airflow_provider_datasphere.exceptions import JobFailedError, JobInfrastructureError, JobRequestError
from airflow_provider_datasphere.operators.jobs import ExecuteJobOperator
from airflow_side import connect, context_of
from datasphere_emulator import Emulator, Script

CONFIG: dict[str, Any] = {
    "name": "training",
    "cmd": "cat ${DATA} > ${RESULT} && echo ${N} $COLOUR",
    "args": {"N": 1},
    "inputs": [{"data.csv": "DATA"}],
    "outputs": [{"result.csv": "RESULT"}],
    "env": {"vars": [{"COLOUR": "blue"}]},
}
CONTEXT: Any = {"day": "20260101", "nothing": None, "ds": "2026-01-01", "params": {"which": "config"}}


@pytest.fixture
def emulator(datasphere_emulator_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator: Emulator = datasphere_emulator_factory(tls=False)
    connect(emulator, monkeypatch)
    return emulator


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a DAG file, with a configuration in a folder of its own."""
    (tmp_path / "train").mkdir()
    (tmp_path / "data.csv").write_text("beside the DAG\n")
    (tmp_path / "train" / "data.csv").write_text("beside the configuration\n")
    (tmp_path / "train" / "config.yaml").write_text(
        "# {{ ds }}\ncmd: cat ${DATA} > ${RESULT} && echo ${N} $DAY\nargs: {N: 1}\n"
        "inputs:\n  - data.csv: DATA\noutputs:\n  - result.csv: RESULT\nenv:\n  vars:\n    - DAY: '{{ day }}'\n"
    )
    return tmp_path


def execute(folder: Path, config: Any, *, native: bool = False, render: bool = True, **fields: Any) -> tuple[str, Any]:
    """Run a task of a DAG whose file is in the folder; returns job id and context."""
    task = make(folder, config, native=native, **fields)
    if render:
        task.render_template_fields(dict(CONTEXT))
    context = context_of(task)
    return task.execute(context), context


def make(folder: Path, config: Any, *, native: bool = False, search: Any = None, **fields: Any) -> ExecuteJobOperator:
    with DAG("new", schedule=None, render_template_as_native_obj=native, template_searchpath=search) as dag:
        task = ExecuteJobOperator(
            **{"task_id": "train", "config": config, "poll_interval": 0.2, "deferrable": False, **fields}
        )
    dag.fileloc = str(folder / "dag.py")
    return task


def output(emulator: Emulator, job_id: str) -> str:
    job = emulator.job(job_id)
    (file,) = job.output_files
    return emulator.state.storage.path(job.project_id, file.sha256).read_text()


def printed(emulator: Emulator, job_id: str) -> str:
    return b"".join(content for source, _, content in emulator.log_text(job_id) if source == "stdout").decode()


def test_a_mapping_is_run_and_told_by_xcom(emulator: Emulator, folder: Path) -> None:
    job_id, context = execute(folder, CONFIG)
    xcoms = context["ti"].xcoms
    job = emulator.job(job_id)
    assert (job.name, job.project_id, job.parent_job_id) == ("training", emulator.project_id, "")
    assert xcoms["job_id"] == xcoms["return_value"] == job_id
    assert xcoms["operation_id"] == emulator.operation_of(job_id)
    assert xcoms["job_url"].endswith(f"/job/{job_id}")
    assert (xcoms["result"]["status"], xcoms["result"]["return_code"]) == ("SUCCESS", 0)
    assert output(emulator, job_id) == "beside the DAG\n"
    assert printed(emulator, job_id) == "1 blue\n"
    assert "airflow:" in job.desc
    assert [emulator.journal.count(method) for method in ("Create", "Clone", "Execute", "Cancel")] == [1, 0, 1, 0]


def test_a_file_is_found_beside_the_dag_and_its_text_is_a_template(emulator: Emulator, folder: Path) -> None:
    job_id, _ = execute(folder, "train/config.yaml")
    assert output(emulator, job_id) == "beside the configuration\n"
    assert printed(emulator, job_id) == "1 20260101\n"
    config = emulator.job(job_id).config
    assert config.startswith("# 2026-01-01\n")
    assert config.endswith("- DAY: '20260101'\n")


@pytest.mark.parametrize("native", [False, True])
def test_the_name_of_the_file_is_a_template(emulator: Emulator, folder: Path, native: bool) -> None:
    job_id, _ = execute(folder, "train/{{ params.which }}.yaml", native=native)
    assert printed(emulator, job_id) == "1 20260101\n"


def test_a_file_is_found_in_the_search_path_and_by_its_absolute_path(emulator: Emulator, folder: Path) -> None:
    elsewhere = folder / "dags" / "dag.py"
    elsewhere.parent.mkdir()
    found, _ = execute(elsewhere.parent, "config.yaml", search=[str(folder / "train")])
    absolute, _ = execute(elsewhere.parent, folder / "train" / "config.yaml")
    assert output(emulator, found) == output(emulator, absolute) == "beside the configuration\n"


def test_a_file_that_is_not_there_is_an_error_with_all_places(emulator: Emulator, folder: Path) -> None:
    with pytest.raises(JobRequestError, match=r"config is 'none.yaml': there is no such file; looked in .*train"):
        execute(folder, "none.yaml", search=[str(folder / "train")])
    assert emulator.journal.calls() == []


@pytest.mark.parametrize(("base_dir", "content"), [("{{ 'train' }}", "configuration"), (".", "DAG"), (None, "DAG")])
def test_base_dir_says_what_paths_are_relative_to(
    emulator: Emulator, folder: Path, base_dir: str | None, content: str
) -> None:
    job_id, _ = execute(folder, CONFIG, base_dir=base_dir)
    assert output(emulator, job_id) == f"beside the {content}\n"
    job_id, _ = execute(folder, "train/config.yaml", base_dir=folder)
    assert output(emulator, job_id) == "beside the DAG\n"


@pytest.mark.parametrize("native", [False, True])
def test_a_mapping_is_a_template_in_keys_and_values(emulator: Emulator, folder: Path, native: bool) -> None:
    config = {
        **CONFIG,
        "name": "training of {{ ds }}",
        "inputs": [{"{{ 'data' }}.csv": "DATA"}],
        "args": {"N": "007{{ '' }}"},
        "desc": "{{ nothing }}",
    }
    job_id, _ = execute(folder, config, native=native)
    assert emulator.job(job_id).name == "training of 2026-01-01"
    assert emulator.job(job_id).desc.startswith("[")
    assert printed(emulator, job_id) == "007 blue\n"


def test_a_template_without_a_value_is_an_error(emulator: Emulator, folder: Path) -> None:
    with pytest.raises(JobRequestError, match=r"args.N: this is None"):
        execute(folder, {**CONFIG, "args": {"N": "{{ nothing }}"}})
    assert emulator.journal.calls("Create") == []


def test_the_page_shows_the_rendered_yaml(folder: Path) -> None:
    task = make(folder, {"cmd": "echo {{ ds }}", "args": {"N": 1}})
    task.render_template_fields(dict(CONTEXT))
    assert task.config == "cmd: echo 2026-01-01\nargs:\n  N: 1\n"
    assert type(task.config) is str
    file = make(folder, "train/config.yaml")
    file.render_template_fields(dict(CONTEXT))
    assert file.config.startswith("# 2026-01-01\ncmd: cat")
    again = file.config
    file.render_template_fields(dict(CONTEXT))  # as when a task is tested in one process
    assert file.config == again


def test_arguments_are_laid_over_the_configuration(emulator: Emulator, folder: Path) -> None:
    (folder / "other.csv").write_text("given\n")
    emulator.script_new_jobs("another", Script())
    job_id, _ = execute(
        folder,
        CONFIG,
        args={"N": "{{ day }}"},
        vars={"DATA": "other.csv", "RESULT": "made/here.csv"},
        env_vars={"COLOUR": "red", "MORE": "x"},
        name="another",
        desc="of {{ ds }}",
        docker={"image": "cr.yandex/x:1"},
        working_storage={"size": "200GB"},
        cloud_instance_types=["g1.1", "c1.4"],
        data_ttl="infinity",
    )
    job = emulator.job(job_id)
    parameters = job.job_parameters
    assert [(one.name, one.value) for one in parameters.arguments] == [("N", "20260101")]
    assert [(one.desc.path, one.desc.var) for one in parameters.input_files] == [("other.csv", "DATA")]
    assert [(one.path, one.var) for one in parameters.output_files] == [("made/here.csv", "RESULT")]
    assert dict(parameters.env.vars) == {"COLOUR": "red", "MORE": "x"}
    assert parameters.env.docker_image_spec.image_url == "cr.yandex/x:1"
    assert parameters.extended_working_storage.size_gb == 200
    assert [one.name for one in parameters.cloud_instance_types] == ["g1.1", "c1.4"]
    assert job.name == "another"
    assert job.desc.startswith("of 2026-01-01 [")
    assert not job.HasField("data_expires_at")


def test_inputs_come_from_anywhere(emulator: Emulator, folder: Path) -> None:
    first, _ = execute(folder, CONFIG)
    places = {
        "URI of a job's file": f"datasphere://{first}/RESULT",
        "URI": f"file://{folder}/train/data.csv",
        "path object": folder / "train" / "data.csv",
        "stored path": ObjectStoragePath(f"file://{folder}/train/data.csv"),
    }
    contents = [output(emulator, execute(folder, CONFIG, vars={"DATA": place})[0]) for place in places.values()]
    assert contents == ["beside the DAG\n", *["beside the configuration\n"] * 3]
    # In the configuration itself, too.
    config = {**CONFIG, "inputs": [{f"datasphere://{first}/result.csv": "DATA"}]}
    assert output(emulator, execute(folder, config)[0]) == "beside the DAG\n"


def test_local_modules_are_shipped_without_what_tools_leave(
    emulator: Emulator, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = folder / "package"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__pycache__" / "x.pyc").write_bytes(b"-")
    (package / ".git").mkdir()
    (package / ".git" / "HEAD").write_text("-")
    (package / "__main__.py").write_text("import os; print(sorted({*os.listdir('package')} - {'__pycache__'}))")
    (folder / "requirements.txt").write_text("")
    python = {"type": "manual", "version": "3.11", "requirements-file": "requirements.txt", "local-paths": ["package"]}
    job_id, _ = execute(folder, {"cmd": "python -m package", "env": {"python": python}})
    assert printed(emulator, job_id) == "['__main__.py']\n"
    assert "Local module package is shipped without .git, __pycache__." in capsys.readouterr().out


def test_the_project_is_the_operators_or_the_connections(
    emulator: Emulator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = emulator.add_project("other")
    emulator.iam.set_role(emulator.service_account_id, other, "developer")
    job_id, _ = execute(folder, CONFIG, project_id="{{ '" + other + "' }}")
    assert emulator.job(job_id).project_id == other
    extra = emulator.connection_extra(project_id=None)
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", json.dumps({"conn_type": "datasphere", "extra": extra}))
    with pytest.raises(JobRequestError, match="give project_id, or fill in the project ID of the connection"):
        execute(folder, CONFIG)


def test_a_failed_program_and_a_service_without_capacity(emulator: Emulator, folder: Path) -> None:
    emulator.script_new_jobs("fails", Script(return_code=3))
    emulator.script_new_jobs("no capacity", Script(error=("INTERNAL", "none"), error_in="PREPARING"))
    with pytest.raises(JobFailedError, match="return code 3"):
        execute(folder, CONFIG, name="fails")
    with pytest.raises(JobInfrastructureError):
        execute(folder, CONFIG, name="no capacity")


def test_it_defers_and_resumes(emulator: Emulator, folder: Path) -> None:
    emulator.script_new_jobs("training", Script(never_ends=True))
    task = make(folder, CONFIG, deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context_of(task))
    (job,) = emulator.jobs()
    assert deferred.value.trigger.serialize()[1]["job_id"] == job.id


def test_a_start_timeout_leaves_no_job(emulator: Emulator, folder: Path) -> None:
    emulator.settings.max_running_jobs = 0
    with pytest.raises(JobInfrastructureError, match="start_timeout"):
        execute(folder, CONFIG, start_timeout=timedelta(seconds=1.5))
    assert emulator.jobs() == []


def test_a_timeout_cancels_the_job(emulator: Emulator, folder: Path) -> None:
    emulator.script_new_jobs("training", Script(never_ends=True))
    task = make(folder, CONFIG)
    context = context_of(task)

    def timeout(*_: Any) -> None:
        raise AirflowTaskTimeout

    context["ti"].xcom_push, push = (
        lambda key, value: (push(key, value), key == "operation_id" and timeout()),
        (context["ti"].xcom_push),
    )
    with pytest.raises(AirflowTaskTimeout):
        task.execute(context)
    task.on_kill()
    (job,) = emulator.jobs()
    emulator.wait_job(job.id, "CANCELLED")


# When the DAG is parsed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "config.json"}, r"config is 'config.json': give a mapping, or the path of a .yaml or .yml file"),
        ({"config": "cmd: x\nname: y.yaml"}, r"give a mapping, or the path of"),
        ({"config": None}, r"config is None: give a mapping"),
        ({"config": ["a"]}, r"config is \['a'\]: give a mapping"),
        ({"config": {}}, r"the configuration is empty"),
        ({"config": {"name": "x"}}, r"cmd is missing"),
        ({"config": {"cmd": "x", "ouputs": []}}, r"unknown key 'ouputs'; did you mean 'outputs'\?"),
        ({"config": {"cmd": "echo ${X}", "outputs": ["*.pt"], "foo": 1}}, r"has 3 faults"),
        ({"config": {"cmd": "x", "env": {"python": "auto"}}}, r"write python: {type: manual"),
        ({"config": {"cmd": "x", "env": {"python": {"version": 3.10}}}}, r"3.1 is a number with a point"),
        ({"config": {"cmd": "x", "name": object()}}, r"a object is none of text"),
        ({"args": {"N": 1}}, r"args\['N'\] is 1 \(int\): DataSphere takes strings; write '1'"),
        ({"project_id": 7}, r"project_id is 7"),
        ({"start_timeout": 0}, r"start_timeout is 0"),
        ({"on_kill_action": "stop"}, r"on_kill_action is 'stop'"),
    ],
)
def test_what_is_known_at_parse_time_is_an_import_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(JobRequestError, match=message):
        ExecuteJobOperator(**{"task_id": "train", "config": CONFIG, **arguments})
    with pytest.raises(JobRequestError, match=message):
        ExecuteJobOperator.partial(**{"task_id": "train", "config": CONFIG, **arguments})


@pytest.mark.parametrize(
    "config",
    [
        "{{ params.which }}",
        {"cmd": "{{ params.cmd }}", "inputs": [{"{{ x }}": "A"}], "working-storage": {"size": "{{ y }}"}},
        {"cmd": "echo", "env": {"vars": ["NOT_HERE"], "python": {"type": "manual", "version": "{{ v }}"}}}
        | {"env": {"python": {"type": "manual", "version": "3.11", "requirements-file": "later", "local-paths": []}}},
        {"cmd": "cat ${A}", "inputs": [{"not/yet/there.csv": "A"}]},
    ],
)
def test_what_is_not_known_yet_is_none(config: Any) -> None:
    ExecuteJobOperator(task_id="train", config=config)


def test_default_arguments_and_mapping(folder: Path) -> None:
    defaults = {"project_id": "bt1default", "poll_interval": 3.0, "start_timeout": 60, "on_kill_action": "keep"}
    with DAG("defaults", schedule=None, default_args=defaults):
        task = ExecuteJobOperator(task_id="train", config=CONFIG)
        mapped = ExecuteJobOperator.partial(task_id="mapped", config=CONFIG).expand(args=[{"N": "1"}, {"N": "2"}])
    assert (task.project_id, task.poll_interval, task.start_timeout, task.on_kill_action) == (
        "bt1default",
        3.0,
        60,
        "keep",
    )
    assert mapped.partial_kwargs["config"] is CONFIG
    with pytest.raises(JobRequestError, match=r"args\['N'\] is 2 \(int\)"):
        ExecuteJobOperator.partial(task_id="mapped", config=CONFIG).expand(args=[{"N": "1"}, {"N": 2}])


def test_parsing_imports_neither_the_client_nor_yaml(folder: Path) -> None:
    program = (
        "import sys\nfrom datetime import timedelta\n"
        "from airflow.sdk import DAG\nbefore = set(sys.modules)\n"
        "from airflow_provider_datasphere.operators.jobs import ExecuteJobOperator\n"
        f"config = {CONFIG!r}\n"
        "with DAG('x', schedule=None):\n"
        "    ExecuteJobOperator(task_id='a', config=config)\n"
        "    ExecuteJobOperator(task_id='b', config='train/config.yaml')\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'grpc', 'yandex', 'yandexcloud', 'requests', 'yaml'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_warnings_of_a_configuration_are_in_the_log(
    emulator: Emulator, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "folded.yaml").write_text("cmd: >\n  echo\n    --x\ncloud-instance-types: [c9.1]\n")
    execute(folder, "folded.yaml", wait_for_completion=False)
    shown = capsys.readouterr().out
    assert "folded.yaml:1: warning: cmd: lines of this folded text (>) are indented unequally" in shown
    assert (
        "folded.yaml:4: warning: cloud-instance-types[0]: 'c9.1' is no instance type that this version knows" in shown
    )
