"""DownloadJobResultsOperator: what it takes, what it returns, which failures Airflow retries."""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_datasphere.compat import AirflowFailException, ObjectStoragePath
from airflow_provider_datasphere.exceptions import JobRequestError, ResultsError
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from datasphere_emulator import Emulator, Script
from stored_jobs import add_output, ended_job, only_files, random_bytes

if TYPE_CHECKING:
    pass


@pytest.fixture
def emulator(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    connection = json.dumps({"conn_type": "datasphere", "extra": emulator.connection_extra()})
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", connection)
    return emulator


def download(job_id: str, destination: object, **options: Any) -> Any:
    operator = DownloadJobResultsOperator(task_id="download", job_id=job_id, destination=destination, **options)
    return operator.execute({})


@pytest.mark.parametrize("form", ["path", "str", "uri", "relative", "object"])
def test_a_folder_in_any_form(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    job_id = ended_job(emulator, {"x/model.bin": b"x", "y/model.bin": b"y"})
    destination: object = {
        "path": tmp_path / "to",
        "str": str(tmp_path / "to"),
        "uri": f"file://{tmp_path}/to",
        "relative": "to",
        "object": ObjectStoragePath(f"file://{tmp_path}/to"),
    }[form]
    manifest = download(job_id, destination)
    assert only_files(tmp_path) == {"to/x/model.bin": b"x", "to/y/model.bin": b"y"}
    assert [entry["uri"] for entry in manifest] == [f"file://{tmp_path}/to/{name}/model.bin" for name in "xy"]
    assert json.loads(json.dumps(manifest)) == manifest
    assert ObjectStoragePath(manifest[0]["uri"]).read_bytes() == b"x"


def test_files_logs_and_diagnostics_as_asked(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"a.csv": b"a", "b.bin": b"b"})
    add_output(emulator, job_id, "train.log", b"log", kind="log_files")
    add_output(emulator, job_id, "stats.tsv", b"stats", kind="diagnostic_files")
    manifest = download(job_id, tmp_path, files=["*.csv"], with_logs=True, with_diagnostics=True)
    assert {entry["path"]: entry["kind"] for entry in manifest} == {
        "a.csv": "output",
        "train.log": "log",
        "stats.tsv": "diagnostic",
    }


def test_what_a_retry_can_heal_is_retried(emulator: Emulator, tmp_path: Path) -> None:
    running = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    with pytest.raises(ResultsError, match="hasn't ended yet") as caught:
        download(running, tmp_path)
    assert not isinstance(caught.value, AirflowFailException)
    emulator.cancel_job(running)
    job_id = ended_job(emulator, {"file": b"content"})
    emulator.faults.inject("storage.get", status=404)
    with pytest.raises(ResultsError, match="- file: ") as caught:
        download(job_id, tmp_path)
    assert not isinstance(caught.value, AirflowFailException)


def test_what_no_retry_can_heal_is_not(emulator: Emulator, tmp_path: Path) -> None:
    cleared = ended_job(emulator, {"file": b"content"})
    emulator.clear_data(cleared)
    with pytest.raises(ResultsError, match="cleared") as gone:
        download(cleared, tmp_path)
    assert isinstance(gone.value, AirflowFailException)
    job_id = ended_job(emulator, {"file": b"content"})
    with pytest.raises(JobRequestError, match="matches no output") as wrong:
        download(job_id, tmp_path, files=["*.csv"])
    assert isinstance(wrong.value, AirflowFailException)
    with pytest.raises(JobRequestError, match="bt1unknown"):
        download("bt1unknown", tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"files": "*.csv"}, r"files is '\*\.csv': give a list"),
        ({"files": [1]}, "give a list"),
        ({"files": 5}, "files is 5: give a list"),
        ({"files": {"a": "b"}}, "give a list"),
        ({"files": ["None"]}, "give a list"),
        ({"files": ["a\0"]}, r"The pattern 'a\\x00' in files has a NUL character"),
        ({"max_parallel": "{{ 2 }}"}, r"max_parallel is '\{\{ 2 \}\}': .*it isn't templated"),
        ({"with_logs": "{{ false }}"}, r"with_logs is '\{\{ false \}\}': give True or False; it isn't templated"),
        ({"with_diagnostics": "False"}, "with_diagnostics is 'False'"),
        ({"job_id": "bt1…"}, "still the placeholder"),
        ({"destination": "None"}, "destination is 'None': a template renders to that"),
        ({"destination": None}, r"destination is None \(NoneType\)"),
        ({"destination": ["to"]}, r"destination is \['to'\] \(list\)"),
        ({"destination": 5}, r"destination is 5 \(int\)"),
        ({"destination": " "}, "destination is empty"),
        ({"destination": "to\0"}, "destination has a NUL character at position 2"),
        ({"destination": "file://host/to"}, "destination is 'file://host/to': a folder of this worker is file:///"),
        ({"destination": "s3:/bucket/to"}, "a URI has two slashes, 's3://bucket/to'"),
        ({"destination": "DataSphere://bt1x/a"}, "can't be changed"),
        ({"max_parallel": 0}, "max_parallel is 0"),
        ({"max_parallel": True}, "max_parallel is True"),
        ({"destination": ""}, "destination is empty"),
        ({"destination": "datasphere://bt1x/a"}, "can't be changed"),
    ],
)
def test_wrong_arguments_are_found_when_the_dag_is_parsed(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobRequestError, match=reason):
        DownloadJobResultsOperator(task_id="download", **{"job_id": "bt1x", "destination": "to", **options})


def test_templates_are_rendered(tmp_path: Path) -> None:
    operator = DownloadJobResultsOperator(
        task_id="download",
        job_id="{{ job }}",
        destination="s3://conn@bucket/{{ ds }}/",
        files=["{{ kind }}.csv"],
        datasphere_conn_id="{{ connection }}",
    )
    operator.render_template_fields({"job": "bt1x", "ds": "2026-11-22", "kind": "result", "connection": "other"})
    assert (operator.job_id, operator.destination, operator.files, operator.datasphere_conn_id) == (
        "bt1x",
        "s3://conn@bucket/2026-11-22/",
        ["result.csv"],
        "other",
    )


def test_the_output_of_another_task_is_taken() -> None:
    from airflow_provider_datasphere.compat import BaseOperator

    try:
        from airflow.sdk import DAG
    except ImportError:
        from airflow import DAG

    with DAG("results", start_date=datetime(2026, 1, 1, tzinfo=timezone.utc), schedule=None):
        fork = BaseOperator(task_id="fork")
        operator = DownloadJobResultsOperator(task_id="download", job_id=fork.output, destination="to")
    assert operator.upstream_task_ids == {"fork"}


def test_on_kill_ends_it_and_leaves_nothing(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"file": random_bytes(5_000_000)})
    emulator.faults.inject("storage.get", bytes_per_second=500_000)
    operator = DownloadJobResultsOperator(task_id="download", job_id=job_id, destination=str(tmp_path))

    def kill_the_download() -> None:
        while not emulator.journal.count("storage.get"):
            time.sleep(0.02)
        operator.on_kill()

    killer = threading.Thread(target=kill_the_download)
    killer.start()
    with pytest.raises(ResultsError, match="was stopped"):
        operator.execute({})
    killer.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["~/to", "file:{home}/to", "FILE://localhost{home}/to"])
def test_a_folder_that_is_written_in_another_way(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    job_id = ended_job(emulator, {"file": b"content"})
    download(job_id, place.format(home=tmp_path))
    assert only_files(tmp_path) == {"to/file": b"content"}


@pytest.mark.parametrize("rendered", ["None", "~nosuchuser/to", "file://host/to", ["to"], 5])
def test_a_destination_that_renders_to_no_place_makes_no_folder(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rendered: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    operator = DownloadJobResultsOperator(
        task_id="download", job_id=ended_job(emulator, {"file": b"content"}), destination="{{ x }}"
    )
    operator.destination = rendered
    with pytest.raises(JobRequestError, match=r"^destination is "):
        operator.execute({})
    assert list(tmp_path.iterdir()) == []


def test_a_store_whose_package_is_missing_is_told_with_the_command(emulator: Emulator) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    with pytest.raises(ResultsError, match=r"pip install 'apache-airflow-providers-google', then restart") as caught:
        download(job_id, "gs://bucket/key")
    assert isinstance(caught.value, AirflowFailException)


def test_an_unknown_store_is_told(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    with pytest.raises(ResultsError, match=r"The destination nosuchstore://bucket/key can't be used"):
        download(job_id, "nosuchstore://bucket/key")


def test_the_log_says_that_a_folder_is_the_workers_own(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    class Log:
        def info(self, text: str, *values: object) -> None:
            lines.append(text % values)

        warning = debug = info

    job_id = ended_job(emulator, {"file": b"content"})
    operator = DownloadJobResultsOperator(task_id="download", job_id=job_id, destination=str(tmp_path))
    monkeypatch.setattr(DownloadJobResultsOperator, "log", Log(), raising=False)
    operator.execute({})
    expected = f"Job {job_id}: its files go to {tmp_path} on the disk of this worker"
    assert any(line.startswith(expected) for line in lines)
