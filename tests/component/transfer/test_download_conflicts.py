"""Downloads of several jobs into one destination, and files of one job that want the same place."""

from __future__ import annotations

import logging
import os
import threading
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from airflow_provider_datasphere.client.errors import PermanentResultsError, ResultsError
from airflow_provider_datasphere.client.transfer.download import download_job_files
from airflow_provider_datasphere.client.transfer.object_store_destination import ObjectStoreDestination
from airflow_provider_datasphere.client.transfer.overwrite_guard import OverwriteError
from airflow_provider_datasphere.compat import AirflowFailException
from airflow_provider_datasphere.exceptions import ResultsError as AirflowResultsError
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from airflow_side import connect, context_of
from datasphere_emulator import Emulator
from stored_jobs import add_output, client_of, ended_job, files_in, gets, only_files, random_bytes, zipped

if TYPE_CHECKING:
    from pathlib import Path

RUN_START = datetime.now(timezone.utc) - timedelta(minutes=5)


def age(path: Path) -> None:
    """As if it was written yesterday."""
    os.utime(path, (0, 0))


def store_at(folder: Path) -> dict[str, Any]:
    """An fsspec store as the destination."""
    return {
        "destination": lambda name, _: ObjectStoreDestination(
            LocalFileSystem(), str(folder), lambda path: f"store://{folder}/{path}", name
        )
    }


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": tmp_path} if request.param == "folder" else store_at(tmp_path)


def test_one_jobs_result_does_not_overwrite_anothers_of_the_same_run(
    emulator: Emulator, tmp_path: Path, place: dict[str, Any]
) -> None:
    first = ended_job(emulator, {"x/model.bin": b"first", "own1": b"1"})
    second = ended_job(emulator, {"x/model.bin": b"second", "own2": b"2"})
    client = client_of(emulator)
    download_job_files(client, first, since=RUN_START, **place)
    emulator.journal.clear()
    with pytest.raises(OverwriteError, match=rf"x/model.bin .*{first}.*{second}.*Nothing was downloaded"):
        download_job_files(client, second, since=RUN_START, **place)
    assert files_in(tmp_path) == {"x/": b"", "x/model.bin": b"first", "own1": b"1"}
    assert gets(emulator) == []


def test_two_at_once_do_not_overwrite_each_other(emulator: Emulator, tmp_path: Path, place: dict[str, Any]) -> None:
    contents = [random_bytes(300_000, 1), random_bytes(300_000, 2)]
    jobs = [ended_job(emulator, {"model.bin": content}) for content in contents]
    emulator.faults.inject("storage.get", bytes_per_second=400_000)
    errors: list[BaseException] = []
    begun = threading.Barrier(2)

    def download(job_id: str) -> None:
        client = client_of(emulator)
        urls = client.download_urls

        def both_have_looked(*args: Any) -> Any:
            begun.wait(20)  # both have found nothing there
            return urls(*args)

        client.download_urls = both_have_looked  # type: ignore[method-assign]
        try:
            download_job_files(client, job_id, **place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=download, args=(job_id,)) for job_id in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = errors
    assert isinstance(error, PermanentResultsError)
    assert all(job_id in str(error) for job_id in jobs)
    ((name, kept),) = files_in(tmp_path).items()
    assert name == "model.bin"
    assert kept in contents


def test_the_same_content_is_no_conflict(emulator: Emulator, tmp_path: Path, place: dict[str, Any]) -> None:
    jobs = [ended_job(emulator, {"readme": b"the same", own: b"own"}) for own in ("a", "b")]
    for job_id in jobs:
        download_job_files(client_of(emulator), job_id, since=RUN_START, **place)
    assert only_files(tmp_path) == {"readme": b"the same", "a": b"own", "b": b"own"}


def test_what_was_there_before_the_run_is_replaced(emulator: Emulator, tmp_path: Path, place: dict[str, Any]) -> None:
    yesterday, today = (ended_job(emulator, {"latest.csv": content}) for content in (b"yesterday", b"today"))
    download_job_files(client_of(emulator), yesterday, since=RUN_START, **place)
    age(tmp_path / "latest.csv")
    download_job_files(client_of(emulator), today, since=RUN_START, **place)
    assert only_files(tmp_path) == {"latest.csv": b"today"}


def test_what_is_no_jobs_result_is_replaced_with_a_warning(
    emulator: Emulator, tmp_path: Path, place: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"a person's")
    job_id = ended_job(emulator, {"file": b"content"})
    download_job_files(client_of(emulator), job_id, since=RUN_START, **place)
    assert only_files(tmp_path) == {"file": b"content"}
    (warning,) = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert "/file was written during this run with other content" in warning
    assert job_id in warning


def test_directories_do_not_overwrite_each_others_files(
    emulator: Emulator, tmp_path: Path, place: dict[str, Any]
) -> None:
    jobs = []
    for content in (b"first", b"second"):
        jobs.append(ended_job(emulator))
        files = {"model/weights": content, "model/readme": b"the same"}
        add_output(emulator, jobs[-1], "model", zipped(files), archive=True)
    download_job_files(client_of(emulator), jobs[0], since=RUN_START, **place)
    with pytest.raises(OverwriteError, match=rf"model/weights .*{jobs[0]}.*{jobs[1]}"):
        download_job_files(client_of(emulator), jobs[1], since=RUN_START, **place)
    assert only_files(tmp_path) == {"model/weights": b"first", "model/readme": b"the same"}
    age(tmp_path / "model/weights")
    download_job_files(client_of(emulator), jobs[1], since=RUN_START, **place)
    assert only_files(tmp_path) == {"model/weights": b"second", "model/readme": b"the same"}


def test_mapped_downloads_are_told_and_not_retried_and_a_cleared_one_may_replace(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(emulator, monkeypatch)
    first, second = (ended_job(emulator, {"model": content}) for content in (b"1", b"2"))

    def download(job_id: str, max_tries: int) -> None:
        task = DownloadJobResultsOperator(task_id="d", job_id=job_id, destination=str(tmp_path), retries=2)
        context = context_of(task, max_tries=max_tries)
        task.execute({**context, "dag_run": SimpleNamespace(start_date=RUN_START)})

    download(first, 2)
    with pytest.raises(AirflowResultsError, match=rf"{first}.*{second}.*ti\.map_index") as caught:
        download(second, 2)
    assert isinstance(caught.value, AirflowFailException)
    assert only_files(tmp_path) == {"model": b"1"}
    download(second, 5)  # after a clear: its own earlier job may have left the file
    assert only_files(tmp_path) == {"model": b"2"}


# Files of one job -----------------------------------------------------------------------------------------------


def test_one_file_under_two_vars_is_fetched_once_and_listed_twice(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    for var in ("A", "B"):
        add_output(emulator, job_id, "file", b"content", var=var)
    manifest = download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert [(entry["var"], entry["path"]) for entry in manifest] == [("A", "file"), ("B", "file")]
    assert len(gets(emulator)) == 1
    assert files_in(tmp_path) == {"file": b"content"}


def test_two_files_that_cannot_be_told_apart_are_named(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"good": b"good"})
    for content in (b"one", b"other"):
        add_output(emulator, job_id, "stdout.txt", content, kind="log_files", sha256="")
    with pytest.raises(PermanentResultsError, match=r"two files 'stdout.txt' \(log and log\) without a sha256"):
        download_job_files(client_of(emulator), job_id, with_logs=True, output_dir=tmp_path)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {"good": b"good"}


def test_a_file_without_a_sha256_is_not_taken_for_another(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "a", b"one", sha256="")
    add_output(emulator, job_id, "./a", b"other", sha256="")
    with pytest.raises(PermanentResultsError, match=r"'a' and './a' .* would both become 'a'"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)


def test_a_file_where_another_needs_a_directory_is_told_before_anything_is_fetched(
    emulator: Emulator, tmp_path: Path
) -> None:
    job_id = ended_job(emulator, {"a": b"1", "a/b": b"2"})
    with pytest.raises(PermanentResultsError, match=r"'a' and 'a/b' .* make 'a' a file and a directory"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert gets(emulator) == []


def test_an_output_that_fails_does_not_hide_the_log_of_its_name(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "train.log", b"output", size_bytes=500)
    add_output(emulator, job_id, "train.log", b"log", kind="log_files")
    with pytest.raises(ResultsError, match=r"1 of 2 files(.|\n)*- train.log: (.|\n)*The other 1 "):
        download_job_files(client_of(emulator), job_id, with_logs=True, output_dir=tmp_path)
    assert only_files(tmp_path) == {"logs/train.log": b"log"}


def test_one_reason_is_said_once_for_all_files(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"a": b"a", "b": b"b", "c": b"c"})
    emulator.faults.inject("storage.get", status=404)
    with pytest.raises(ResultsError) as caught:
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    text = str(caught.value)
    assert "3 of 3 files" in text
    assert "- a, b, c: localhost answered 404" in text
    assert text.count("answered 404") == 1
    assert text.endswith("Nothing was downloaded.")
    assert "others" not in text


def test_a_size_that_the_job_does_not_record_is_found_out(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    content = random_bytes(700_000)
    add_output(emulator, job_id, "file", content, size_bytes=0)
    add_output(emulator, job_id, "d", zipped({"d/x": b"x"}), archive=True, size_bytes=0)
    add_output(emulator, job_id, "empty", b"")
    for _ in range(2):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        assert only_files(tmp_path) == {"file": content, "d/x": b"x", "empty": b""}
