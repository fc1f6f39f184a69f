"""Files to and from S3: a real S3 server over HTTP, reached through Airflow's own S3 connection."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
import zipfile
from datetime import datetime, timedelta, timezone
from threading import Event
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.compat import AirflowFailException, ObjectStoragePath
from airflow_provider_datasphere.exceptions import ResultsError
from airflow_provider_datasphere.filesystems.datasphere import DataSphereFileSystem
from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
from datasphere_emulator import Emulator
from staging import stage_vars
from stored_jobs import PEAK, add_output, client_of, ended_job, gets, random_bytes, zipped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def running() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def emulator(running: Emulator, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    datasphere = {"conn_type": "datasphere", "extra": running.connection_extra()}
    s3 = {
        "conn_type": "aws",
        "login": "key",
        "password": "secret",
        "extra": {"region_name": "us-east-1", "endpoint_url": s3_url},
    }
    # The second for paths: Airflow keeps the file system of a connection, and other tests have other emulators.
    for name in ("DATASPHERE_DEFAULT", "STORED_JOBS"):
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(datasphere))
    monkeypatch.setenv("AIRFLOW_CONN_S3", json.dumps(s3))
    DataSphereFileSystem.clear_instance_cache()  # another test's has another emulator
    running.journal.clear()
    yield running
    running.faults.clear()


@pytest.fixture
def bucket(emulator: Emulator, s3_url: str, request: pytest.FixtureRequest) -> str:
    """A bucket of this test's own, as a URI with its connection."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    s3(s3_url).create_bucket(Bucket=name)
    return f"s3://s3@{name}"


def s3(url: str) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )


def objects(url: str, bucket: str) -> dict[str, bytes]:
    """All objects of a bucket, and nothing else is there: no upload that wasn't ended either."""
    client, name = s3(url), bucket.removeprefix("s3://s3@")
    assert client.list_multipart_uploads(Bucket=name).get("Uploads", []) == []
    listed = client.list_objects_v2(Bucket=name).get("Contents", [])
    return {entry["Key"]: client.get_object(Bucket=name, Key=entry["Key"])["Body"].read() for entry in listed}


def download(job_id: str, destination: str, **options: Any) -> Any:
    operator = DownloadJobResultsOperator(task_id="download", job_id=job_id, destination=destination, **options)
    return operator.execute({})


def test_results_go_to_a_bucket_and_can_be_read_by_their_uri(emulator: Emulator, s3_url: str, bucket: str) -> None:
    contents = {
        "result.csv": b"a,b\n",
        "x/model.bin": random_bytes(12 * MEBIBYTE, 1),
        "y/model.bin": random_bytes(5 * MEBIBYTE, 2),
        "empty": b"",
        "foo": b"1",
        "foo.download": b"2",
    }
    job_id = ended_job(emulator, contents)
    add_output(emulator, job_id, "out/model", zipped({"model/w": b"w" * 1000, "model/deep/x": b"x"}), archive=True)

    manifest = download(job_id, f"{bucket}/runs/1")

    expected = {**contents, "out/model/w": b"w" * 1000, "out/model/deep/x": b"x"}
    assert objects(s3_url, bucket) == {f"runs/1/{path}": content for path, content in expected.items()}
    assert {entry["path"]: entry["uri"] for entry in manifest} == {
        **{path: f"{bucket}/runs/1/{path}" for path in contents},
        "out/model": f"{bucket}/runs/1/out/model/",
    }
    for entry in manifest[:-1]:
        assert ObjectStoragePath(entry["uri"]).read_bytes() == contents[entry["path"]]


def test_a_path_object_and_the_buckets_root_are_destinations_too(emulator: Emulator, s3_url: str, bucket: str) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    download(job_id, ObjectStoragePath(bucket))  # type: ignore[arg-type]
    assert objects(s3_url, bucket) == {"file": b"content"}


def test_a_second_run_reads_what_is_there_and_fetches_the_rest(emulator: Emulator, s3_url: str, bucket: str) -> None:
    job_id = ended_job(emulator, {"same": b"same", "changed": b"changed", "lost": b"lost"})
    add_output(emulator, job_id, "d", zipped({"d/x": b"x" * 100_000, "d/y": b"y"}), archive=True)
    first = download(job_id, f"{bucket}/to")
    client, name = s3(s3_url), bucket.removeprefix("s3://s3@")
    client.put_object(Bucket=name, Key="to/changed", Body=b"CHANGED")
    client.delete_object(Bucket=name, Key="to/lost")
    before = client.head_object(Bucket=name, Key="to/same")["LastModified"]
    emulator.journal.clear()

    assert download(job_id, f"{bucket}/to") == first

    assert objects(s3_url, bucket) == {
        "to/same": b"same",
        "to/changed": b"changed",
        "to/lost": b"lost",
        "to/d/x": b"x" * 100_000,
        "to/d/y": b"y",
    }
    assert client.head_object(Bucket=name, Key="to/same")["LastModified"] == before
    whole = {call.request["sha256"] for call in gets(emulator) if not call.request["range"]}
    assert whole == {hashlib.sha256(content).hexdigest() for content in (b"changed", b"lost")}


@pytest.mark.parametrize("size", [1000, 8 * MEBIBYTE])
def test_nothing_wrong_becomes_visible(emulator: Emulator, s3_url: str, bucket: str, size: int) -> None:
    job_id = ended_job(emulator, {"file": random_bytes(size)})
    emulator.faults.inject("storage.get", corrupt_at=0.99)
    with pytest.raises(ResultsError, match="- file: its sha256 is"):
        download(job_id, f"{bucket}/to")
    assert objects(s3_url, bucket) == {}


def test_a_cut_connection_goes_on_within_the_same_upload(emulator: Emulator, s3_url: str, bucket: str) -> None:
    content = random_bytes(8 * MEBIBYTE)
    job_id = ended_job(emulator, {"file": content})
    emulator.faults.inject("storage.get", cut_at=0.9, times=1)
    download(job_id, bucket)
    assert objects(s3_url, bucket) == {"file": content}
    assert int(gets(emulator)[-1].request["range"].removeprefix("bytes=").rstrip("-")) > 0.8 * len(content)


def test_a_flipped_byte_is_fetched_anew(emulator: Emulator, s3_url: str, bucket: str) -> None:
    content = random_bytes(8 * MEBIBYTE)
    job_id = ended_job(emulator, {"file": content})
    emulator.faults.inject("storage.get", corrupt_at=0.9, times=1)
    download(job_id, bucket)
    assert objects(s3_url, bucket) == {"file": content}


def test_a_bucket_that_is_not_there_is_named_once(emulator: Emulator, s3_url: str) -> None:
    job_id = ended_job(emulator, {"one": b"1", "two": b"2"})
    with pytest.raises(ResultsError) as caught:
        download(job_id, "s3://s3@no-such-bucket/to")
    assert str(caught.value) == (
        "Bucket 'no-such-bucket' doesn't exist (s3://s3@no-such-bucket/to). Nothing was downloaded."
    )
    assert isinstance(caught.value, AirflowFailException)


@pytest.mark.parametrize("key", ["to?versionId=abc", "a/../to"])
def test_a_destination_that_would_be_another_key_is_refused(emulator: Emulator, bucket: str, key: str) -> None:
    with pytest.raises(JobRequestError, match=r"^destination is 's3://.*(versions|steps)"):
        download(ended_job(emulator, {"file": b"content"}), f"{bucket}/{key}")


def test_one_jobs_object_does_not_overwrite_anothers_of_the_same_run(
    emulator: Emulator, s3_url: str, bucket: str
) -> None:
    first, second = (ended_job(emulator, {"model": content, "same": b"same"}) for content in (b"1", b"2"))
    since = datetime.now(timezone.utc) - timedelta(minutes=1)

    def download_in_run(job_id: str) -> None:
        task = DownloadJobResultsOperator(task_id="download", job_id=job_id, destination=f"{bucket}/to")
        ti = SimpleNamespace(max_tries=0)
        task.execute({"ti": ti, "task": task, "dag_run": SimpleNamespace(start_date=since)})  # type: ignore[typeddict-item]

    download_in_run(first)
    with pytest.raises(ResultsError, match=rf"{bucket}/to/model is a result of job {first}.*{second}"):
        download_in_run(second)
    assert objects(s3_url, bucket) == {"to/model": b"1", "to/same": b"same"}


def test_bad_archives_write_nothing(emulator: Emulator, s3_url: str, bucket: str) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", zipped({"d/ok": b"1", "../evil": b"2"}), archive=True)
    with pytest.raises(ResultsError, match="would be written outside"):
        download(job_id, f"{bucket}/to")
    assert objects(s3_url, bucket) == {}


def test_an_output_is_copied_to_a_bucket_by_airflows_paths(emulator: Emulator, s3_url: str, bucket: str) -> None:
    content = random_bytes(7 * MEBIBYTE)
    job_id = ended_job(emulator, {"x.bin": content})
    with ObjectStoragePath(f"datasphere://stored_jobs@{job_id}/x.bin").open("rb") as source:
        ObjectStoragePath(f"{bucket}/copied").write_bytes(source.read())
    assert objects(s3_url, bucket) == {"copied": content}


def test_memory_stays_bounded(emulator: Emulator, s3_url: str, bucket: str) -> None:
    content = random_bytes(30 * MEBIBYTE)
    job_id = ended_job(emulator, {f"{number}": content for number in range(6)})
    program = f"""
        from airflow_provider_datasphere.operators.results import DownloadJobResultsOperator
        from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
        from airflow_provider_datasphere.compat import ObjectStoragePath
        DataSphereHook().get_conn().get({job_id!r})
        ObjectStoragePath({bucket!r} + "/warm-up").write_bytes(b"x")
        operator = DownloadJobResultsOperator(task_id="d", job_id={job_id!r}, destination={bucket!r})
        before = reset_peak()
        operator.execute({{}})
        print("grew", memory("VmHWM") - before)
    """
    program = PEAK + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    grown = int(done.stdout.split("grew ")[1]) * 1024
    assert grown <= 64 * MEBIBYTE


# The other way


def test_an_object_becomes_an_input(emulator: Emulator, s3_url: str, bucket: str, tmp_path: Path) -> None:
    content = random_bytes(7 * MEBIBYTE)
    s3(s3_url).put_object(Bucket=bucket.removeprefix("s3://s3@"), Key="in/data.bin", Body=content)
    (given,) = stage_vars({"DATA": f"{bucket}/in/data.bin"}, jobs_pb2.JobParameters(), client_of(emulator), tmp_path)
    assert (given.path, given.size_bytes, given.compression_type) == ("data.bin", len(content), jobs_pb2.NONE)
    assert given.sha256 == hashlib.sha256(content).hexdigest()
    with given.content(Event()) as path:
        assert path.is_relative_to(tmp_path)
        assert path.read_bytes() == content


def test_a_prefix_becomes_a_directory(emulator: Emulator, s3_url: str, bucket: str, tmp_path: Path) -> None:
    for key in ("in/data/b", "in/data/a", "in/data/sub/c", "in/database/no"):
        s3(s3_url).put_object(Bucket=bucket.removeprefix("s3://s3@"), Key=key, Body=key.encode())
    staged = [
        stage_vars({"DATA": f"{bucket}/in/data{slash}"}, jobs_pb2.JobParameters(), client_of(emulator), tmp_path)[0]
        for slash in ("", "/")
    ]
    for given in staged:
        assert (given.path, given.compression_type) == ("data", jobs_pb2.ZIP)
        with given.content(Event()) as path, zipfile.ZipFile(path) as archive:
            assert archive.namelist() == ["data/a", "data/b", "data/sub/c"]
            assert archive.read("data/sub/c") == b"in/data/sub/c"
    # The same content makes the same archive: the service keeps it once.
    assert staged[0].sha256 == staged[1].sha256


def test_what_is_not_in_the_bucket_is_named(emulator: Emulator, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(JobRequestError, match=r"Input DATA: s3://.*/nothing doesn't exist"):
        stage_vars({"DATA": f"{bucket}/nothing"}, jobs_pb2.JobParameters(), client_of(emulator), tmp_path)


@pytest.mark.parametrize("key", ["none.csv", "folder/none.csv", ""])
def test_a_missing_bucket_is_told_from_a_missing_key(emulator: Emulator, tmp_path: Path, key: str) -> None:
    with pytest.raises(JobRequestError, match=r"Input DATA: s3://.*: there is no bucket 'no-bucket'\.$"):
        stage_vars({"DATA": f"s3://s3@no-bucket/{key}"}, jobs_pb2.JobParameters(), client_of(emulator), tmp_path)


def test_a_store_that_cannot_be_reached_can_be_tried_again(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {
        "region_name": "us-east-1",
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 1}},
    }
    away = {"conn_type": "aws", "login": "key", "password": "secret", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_AWAY", json.dumps(away))
    with pytest.raises(DataSphereError, match="Input DATA: s3://away@bucket/key can't be read") as caught:
        stage_vars({"DATA": "s3://away@bucket/key"}, jobs_pb2.JobParameters(), client_of(emulator), tmp_path)
    assert not isinstance(caught.value, JobRequestError)
