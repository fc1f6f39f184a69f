"""Inputs from anywhere: local path, another job's output, what is fetched when and what never is."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
import time
import uuid
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import DataSphereError, Interrupted, JobRequestError, ResultsError
from airflow_provider_datasphere.client.http.client import Body
from airflow_provider_datasphere.client.submission.context import SubmissionCallbacks, SubmissionIdentity
from airflow_provider_datasphere.client.submission.fork import Fork
from airflow_provider_datasphere.client.submission.fork_request import ForkRequest
from airflow_provider_datasphere.client.submission.submit import submit
from airflow_provider_datasphere.client.transfer import inputs as staging
from airflow_provider_datasphere.client.transfer.partial_file import LocalPartialFile
from airflow_provider_datasphere.inputs import stage_inputs
from airflow_provider_datasphere.object_store import unknown_store
from datasphere_emulator import Emulator, Script
from staging import stage_vars
from stored_jobs import add_output, client_of, ended_job, gets, random_bytes, zipped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_provider_datasphere.client.transfer.inputs import InputSource, JobInput

NOTHING = jobs_pb2.JobParameters()


def stage(emulator: Emulator, scratch: Path, source: Any = NOTHING, **vars: str) -> list[JobInput]:
    return stage_vars(vars, source, client_of(emulator), scratch)


def content_of(given: JobInput) -> bytes:
    with given.content(Event()) as path:
        return path.read_bytes()


def test_local_paths_stay_where_they_are(emulator: Emulator, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"a")
    (plain,) = stage(emulator, tmp_path, DATA=str(tmp_path / "data.csv"))
    (uri,) = stage(emulator, tmp_path, DATA=f"file://{tmp_path}/data.csv")
    assert plain.path == uri.path == str(tmp_path / "data.csv")
    assert content_of(plain) == content_of(uri) == b"a"


@pytest.mark.parametrize("place", ["nosuch://bucket/key", "http://example.test/data.csv"])
def test_a_uri_of_no_known_store_is_refused_for_good(emulator: Emulator, tmp_path: Path, place: str) -> None:
    with pytest.raises(JobRequestError, match="knows no store for such a URI"):
        stage(emulator, tmp_path, DATA=place)


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("gs", "apache-airflow-providers-google"), ("abfs", "apache-airflow-providers-microsoft-azure")],
)
def test_a_store_whose_package_is_missing_is_told_with_the_command(
    emulator: Emulator, tmp_path: Path, scheme: str, package: str
) -> None:
    message = rf"Input DATA: .*: {scheme}:// needs a package .* lacks: pip install '{package}', then restart Airflow"
    with pytest.raises(JobRequestError, match=message):
        stage(emulator, tmp_path, DATA=f"{scheme}://conn@bucket/key")


def test_the_package_of_s3_is_told_with_its_extra() -> None:
    assert "pip install 'apache-airflow-providers-amazon[s3fs]'" in unknown_store("s3://a@b/c", ImportError("s3fs"))


def test_of_another_jobs_output_nothing_is_fetched_before_it_is_asked_for(emulator: Emulator, tmp_path: Path) -> None:
    content = random_bytes(200_000)
    job_id = ended_job(emulator, {"out/result.bin": content})
    (given,) = stage(emulator, tmp_path, DATA=f"datasphere://{job_id}/out/result.bin")
    assert (given.var, given.path, given.size_bytes) == ("DATA", "result.bin", len(content))
    assert given.sha256 == hashlib.sha256(content).hexdigest()
    assert given.compression_type == jobs_pb2.NONE
    assert gets(emulator) == []
    assert content_of(given) == content
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_var_and_a_directory_of_another_job(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "a/b.txt", b"by var", var="RESULT")
    archive = zipped({"model/w": b"w"})
    add_output(emulator, job_id, "out/model", archive, archive=True)
    by_var, directory = stage(
        emulator, tmp_path, ONE=f"datasphere://{job_id}/RESULT", TWO=f"datasphere://{job_id}/out/model"
    )
    assert (by_var.path, content_of(by_var)) == ("b.txt", b"by var")
    assert (directory.path, directory.compression_type) == ("model", jobs_pb2.ZIP)
    assert content_of(directory) == archive


def test_names_that_are_taken_give_way(emulator: Emulator, tmp_path: Path) -> None:
    one, two = (ended_job(emulator, {"result.txt": name}) for name in (b"one", b"two"))
    untouched = jobs_pb2.File(desc=jobs_pb2.FileDesc(path="other.txt", var="UNTOUCHED"))
    source = jobs_pb2.JobParameters(input_files=[untouched])
    add_output(emulator, two, "other.txt", b"three")
    staged = stage(
        emulator,
        tmp_path,
        source,
        A=f"datasphere://{one}/result.txt",
        B=f"datasphere://{two}/result.txt",
        C=f"datasphere://{two}/other.txt",
    )
    assert [given.path for given in staged] == ["result.txt", "B/result.txt", "C/other.txt"]


@pytest.mark.parametrize(
    ("kept", "output", "expected"),
    [
        ("./data.csv", "data.csv", "DATA/data.csv"),
        ("a/../data.csv", "data.csv", "DATA/data.csv"),
        ("data/in.csv", "out/data", "DATA/data"),
        ("data.csv", "data.csv", "DATA/data.csv"),
        ("DATA", "DATA", "DATA_/DATA"),
        ("data.csv2", "data.csv", "data.csv"),
    ],
)
def test_a_staged_name_gives_way_to_what_it_would_overlap(
    emulator: Emulator, tmp_path: Path, kept: str, output: str, expected: str
) -> None:
    job_id = ended_job(emulator, {output: b"x"})
    source = jobs_pb2.JobParameters(input_files=[jobs_pb2.File(desc=jobs_pb2.FileDesc(path=kept, var="KEPT"))])
    (given,) = stage(emulator, tmp_path, source, DATA=f"datasphere://{job_id}/{output}")
    assert given.path == expected


@pytest.mark.parametrize("place", ["data.csv", "./data.csv", "{here}/data.csv", "file://data.csv"])
def test_a_staged_name_gives_way_to_a_local_input(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_bytes(b"local")
    job_id = ended_job(emulator, {"data.csv": b"x"})
    far, _ = stage(emulator, tmp_path, FAR=f"datasphere://{job_id}/data.csv", NEAR=place.format(here=tmp_path))
    assert far.path == "FAR/data.csv"


@pytest.mark.parametrize(
    ("place", "error", "reason"),
    [
        ("nowhere/data", JobRequestError, "Input DATA: nowhere/data doesn't exist"),
        ("datasphere://{ended}/nothing", JobRequestError, "has no output 'nothing'. It has: result.txt"),
        ("datasphere://bt1unknown/a", JobRequestError, "bt1unknown"),
        ("datasphere://", JobRequestError, "doesn't name a job's file"),
        ("datasphere://{ended}", JobRequestError, "names a job but none of its files"),
        ("datasphere://None/result.txt", JobRequestError, "the job id is the word None"),
        ("datasphere://{running}/a", ResultsError, "hasn't ended yet"),
        ("datasphere://{cleared}/a", JobRequestError, "cleared"),
    ],
)
def test_what_cannot_be_an_input_is_named(
    emulator: Emulator, tmp_path: Path, place: str, error: type[Exception], reason: str
) -> None:
    jobs = {
        "ended": ended_job(emulator, {"result.txt": b"x"}),
        "cleared": ended_job(emulator, {"a": b"x"}),
        "running": emulator.create_scripted_job(Script(never_ends=True), execute=True),
    }
    emulator.clear_data(jobs["cleared"])
    with pytest.raises(error, match=reason):
        stage(emulator, tmp_path, DATA=place.format(**jobs))
    emulator.cancel_job(jobs["running"])


def test_what_the_service_would_refuse_is_refused_before_it_is_fetched(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "huge", b"x", size_bytes=staging.MAX_FILE_BYTES + 1)
    with pytest.raises(JobRequestError, match=r"Input DATA: .*huge has 5368709121 bytes: .*5 GiB"):
        stage(emulator, tmp_path, DATA=f"datasphere://{job_id}/huge")
    for name in ("one", "two", "three"):
        add_output(emulator, job_id, name, b"x", size_bytes=4 * 1024**3, sha256="")
    places = {name: f"datasphere://{job_id}/{name}" for name in ("one", "two", "three")}
    with pytest.raises(JobRequestError, match=r"have 12884901888 bytes together: .*10 GiB"):
        stage(emulator, tmp_path, **places)
    assert gets(emulator) == []


def test_a_directory_that_is_too_large_is_not_even_packed(emulator: Emulator, tmp_path: Path) -> None:
    data, scratch = tmp_path / "data", tmp_path / "scratch"
    for folder in (data / "sub", scratch):
        folder.mkdir(parents=True)
    for name in ("a", "sub/b"):
        (data / name).touch()
        os.truncate(data / name, 3 * 1024**3)  # takes no room on the disk
    with pytest.raises(JobRequestError, match=r"Input DATA: .*/data has 6442450944 bytes: .*5 GiB"):
        stage(emulator, scratch, DATA=str(data))
    assert list(scratch.iterdir()) == []


def little_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(free))


def test_what_has_no_room_is_not_begun(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, scratch = tmp_path / "data", tmp_path / "scratch"
    for folder in (data, scratch):
        folder.mkdir()
    (data / "a").write_bytes(bytes(600))
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "unknown", bytes(600), sha256="")
    add_output(emulator, job_id, "known", bytes(1100))
    little_room(monkeypatch, 1000)
    words = r"LOCAL: .* and Input FAR: .*: 1200 bytes have .* only 1000 free"
    with pytest.raises(DataSphereError, match=words) as caught:
        stage(emulator, scratch, LOCAL=str(data), FAR=f"datasphere://{job_id}/unknown")
    assert not isinstance(caught.value, JobRequestError)
    assert list(scratch.iterdir()) == []
    # What the service has already needs no room here; if it hasn't, that shows when it asks.
    (known,) = stage(emulator, scratch, DATA=f"datasphere://{job_id}/known")
    with pytest.raises(DataSphereError, match=r"Input DATA: .*: 1100 bytes have .* only 1000 free") as caught:
        content_of(known)
    assert not isinstance(caught.value, JobRequestError)
    assert gets(emulator) == []


def test_a_disk_that_fills_up_is_not_the_inputs_fault(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = tmp_path / "data"
    data.mkdir()
    (data / "a").write_bytes(b"a")
    job_id = ended_job(emulator, {"far": b"far"})
    monkeypatch.setattr("zipfile.ZipFile.write", full)
    monkeypatch.setattr(LocalPartialFile, "write", full)
    (far,) = stage(emulator, tmp_path, FAR=f"datasphere://{job_id}/far")
    for copying in (lambda: stage(emulator, tmp_path, LOCAL=str(data)), lambda: content_of(far)):
        with pytest.raises(DataSphereError, match=r"Input \w+: .* can't be copied .*: No space left") as caught:
            copying()
        assert not isinstance(caught.value, JobRequestError)


# Through a fork


def fork(emulator: Emulator, source: str, place: str) -> Any:
    """The job that a fork of ``source`` with ``DATA`` from ``place`` makes, ended."""
    client = client_of(emulator)

    def stager(given: Sequence[InputSource], kept: Sequence[str], scratch: Path) -> list[JobInput]:
        return stage_inputs(given, kept, client, scratch)

    request = ForkRequest(source_job_id=source, vars={"DATA": place})
    handle = submit(client, Fork(client, request, stage_inputs=stager), SubmissionIdentity(uuid.uuid4().hex))
    return emulator.wait_job(handle.job_id)


def fork_with(emulator: Emulator, place: str) -> Any:
    program = "cat ${DATA} > out.txt"
    source = emulator.create_job(program, files={"old.txt": "old"}, inputs=[("old.txt", "DATA")], outputs=["out.txt"])
    emulator.journal.clear()
    return fork(emulator, source, place)


def test_within_a_project_nothing_is_transferred_twice(emulator: Emulator) -> None:
    job_id = ended_job(emulator, {"result.txt": b"the first job's result"})
    job = fork_with(emulator, f"datasphere://{job_id}/result.txt")
    (output,) = job.output_files
    assert output.sha256 == hashlib.sha256(b"the first job's result").hexdigest()
    assert emulator.journal.calls("storage.get") == []
    assert emulator.journal.calls("storage.put") == []


def test_across_connections_the_content_travels_and_leaves_nothing_behind(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Emulator(tls=False) as elsewhere:
        connection = json.dumps({"conn_type": "datasphere", "extra": elsewhere.connection_extra()})
        monkeypatch.setenv("AIRFLOW_CONN_ELSEWHERE", connection)
        content = random_bytes(1_000_000, 4)
        job_id = ended_job(elsewhere, {"result.bin": content})
        job = fork_with(emulator, f"datasphere://elsewhere@{job_id}/result.bin")
        assert job.output_files[0].sha256 == hashlib.sha256(content).hexdigest()
        assert len(gets(elsewhere)) == 1
        assert len(emulator.journal.calls("storage.put")) == 1
        left = [path for path in tmp_path.rglob("*") if "datasphere-emulator" not in str(path) and path.is_file()]
        assert left == []


def test_a_damaged_source_never_becomes_an_input(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Emulator(tls=False) as elsewhere:
        connection = json.dumps({"conn_type": "datasphere", "extra": elsewhere.connection_extra()})
        monkeypatch.setenv("AIRFLOW_CONN_ELSEWHERE", connection)
        job_id = ended_job(elsewhere, {"result.bin": random_bytes(1000)})
        elsewhere.faults.inject("storage.get", corrupt_at=0.5)
        with pytest.raises(ResultsError, match=r"'result\.bin' of job .* is damaged: its sha256 is"):
            fork_with(emulator, f"datasphere://elsewhere@{job_id}/result.bin")
    assert emulator.journal.calls("storage.put") == []
    assert emulator.journal.calls("Execute") == []
    assert [path for path in tmp_path.rglob("*") if "datasphere-emulator" not in str(path) and path.is_file()] == []


def test_fetching_ends_with_the_task(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Emulator(tls=False) as elsewhere:
        connection = json.dumps({"conn_type": "datasphere", "extra": elsewhere.connection_extra()})
        monkeypatch.setenv("AIRFLOW_CONN_ELSEWHERE", connection)
        job_id = ended_job(elsewhere, {"result.bin": random_bytes(20_000_000)})
        elsewhere.faults.inject("storage.get", bytes_per_second=1_000_000)
        source = emulator.create_job("true", files={"old": "old"}, inputs=[("old", "DATA")])
        client = client_of(emulator)
        request = ForkRequest(source_job_id=source, vars={"DATA": f"datasphere://elsewhere@{job_id}/result.bin"})
        fetching, chunks = threading.Event(), Body.chunks
        began: list[float] = []

        def watched(body: Body) -> Iterator[bytes]:
            for chunk in chunks(body):
                fetching.set()
                yield chunk

        def interrupt() -> None:
            if fetching.wait(60):
                began.append(time.monotonic())
                client.interrupt()

        def created(*_: str) -> None:
            threading.Thread(target=interrupt).start()

        monkeypatch.setattr(Body, "chunks", watched)
        fork = Fork(client, request, stage_inputs=lambda *given: stage_inputs(given[0], given[1], client, given[2]))
        with pytest.raises(Interrupted):
            submit(client, fork, SubmissionIdentity(uuid.uuid4().hex), SubmissionCallbacks(created=created))
        assert time.monotonic() - began[0] < 10
        assert len(gets(elsewhere)) == 1


def test_fetching_ends_with_the_input_beside_it(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Emulator(tls=False) as elsewhere:
        connection = json.dumps({"conn_type": "datasphere", "extra": elsewhere.connection_extra()})
        monkeypatch.setenv("AIRFLOW_CONN_ELSEWHERE", connection)
        job_id = ended_job(elsewhere, {"result.bin": random_bytes(20_000_000)})
        elsewhere.faults.inject("storage.get", bytes_per_second=1_000_000)
        emulator.faults.inject("storage.put", status=400, delay=0.5)
        (tmp_path / "near").write_bytes(uuid.uuid4().bytes)
        source = emulator.create_job("true", files={"a": "-", "b": "-"}, inputs=[("a", "FAR"), ("b", "NEAR")])
        client = client_of(emulator)
        places = {"FAR": f"datasphere://elsewhere@{job_id}/result.bin", "NEAR": str(tmp_path / "near")}
        began: list[float] = []
        fork = Fork(
            client,
            ForkRequest(source_job_id=source, vars=places),
            stage_inputs=lambda *given: stage_inputs(given[0], given[1], client, given[2]),
        )
        callbacks = SubmissionCallbacks(created=lambda *_: began.append(time.monotonic()))
        with pytest.raises(DataSphereError, match=r"Upload of input NEAR .* answered 400"):
            submit(client, fork, SubmissionIdentity(uuid.uuid4().hex), callbacks)
        assert time.monotonic() - began[0] < 10


def test_a_directory_travels_as_its_archive(emulator: Emulator) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "out/model", zipped({"model/w": b"weights"}), archive=True)
    source = emulator.create_job(
        "cat ${DATA}/w > out.txt", files={"old/w": "old"}, inputs=[("old", "DATA")], outputs=["out.txt"]
    )
    job = fork(emulator, source, f"datasphere://{job_id}/out/model")
    stored = emulator.state.storage.path(emulator.project_id, job.output_files[0].sha256)
    assert stored.read_bytes() == b"weights"
    assert zipfile.is_zipfile(
        emulator.state.storage.path(emulator.project_id, job.job_parameters.input_files[0].sha256)
    )


@pytest.mark.parametrize("key", ["key?versionId=abc", "a/../key", "./key", "a/.."])
def test_what_a_store_would_take_for_another_key_is_refused(emulator: Emulator, tmp_path: Path, key: str) -> None:
    with pytest.raises(JobRequestError, match=r"^Input DATA is 's3://conn@bucket/.*(versions|steps)"):
        stage(emulator, tmp_path, DATA=f"s3://conn@bucket/{key}")


def test_a_jobs_file_of_unknown_size_is_described_by_what_it_is(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "file", b"content", size_bytes=0)
    (given,) = stage(emulator, tmp_path, DATA=f"datasphere://{job_id}/file")
    assert (given.size_bytes, given.sha256) == (7, hashlib.sha256(b"content").hexdigest())
    assert content_of(given) == b"content"
