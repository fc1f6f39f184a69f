"""``datasphere://`` as a file system: by fsspec, by Airflow's path objects, by libraries that know nothing of us."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

from airflow_provider_datasphere import exceptions
from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.transfer.download import download_job_files
from airflow_provider_datasphere.client.uri import JobFileUri, find_file, parse_job_file_uri, plain_path
from airflow_provider_datasphere.compat import ObjectStoragePath
from airflow_provider_datasphere.filesystems.datasphere import DataSphereFileSystem
from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
from datasphere_emulator import Emulator, Script
from stored_jobs import add_output, ended_job, gets, random_bytes, zipped

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = random_bytes(9_000_000)


@pytest.fixture(scope="module")
def running() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


@pytest.fixture
def emulator(running: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    connection = json.dumps({"conn_type": "datasphere", "extra": running.connection_extra()})
    monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", connection)
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", connection)
    DataSphereFileSystem.clear_instance_cache()
    running.journal.clear()
    yield running
    running.faults.clear()


@pytest.fixture(scope="module")
def job_id(running: Emulator) -> str:
    job_id = ended_job(running, {"result.csv": b"a,b\n1,2\n", "sub/large.bin": LARGE, "sub/empty": b""})
    add_output(running, job_id, "out.txt", b"by var", var="RESULT")
    add_output(running, job_id, "/tmp/absolute.txt", b"absolute", var="ABSOLUTE")
    archive = zipped({"model/w.bin": b"weights", "model/deep/x": random_bytes(400_000, 3)})
    add_output(running, job_id, "out/model", archive, var="MODEL", archive=True)
    return job_id


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("datasphere://bt1x/result.csv", JobFileUri(None, "bt1x", "result.csv")),
        ("datasphere://conn@bt1x/a/b c%20#?.csv", JobFileUri("conn", "bt1x", "a/b c%20#?.csv")),
        ("datasphere://@bt1x/VAR", JobFileUri(None, "bt1x", "VAR")),
        ("datasphere://conn@/bt1x/a", JobFileUri("conn", "bt1x", "a")),
        ("datasphere:///bt1x/a", JobFileUri(None, "bt1x", "a")),
        ("datasphere://bt1x//tmp/a", JobFileUri(None, "bt1x", "/tmp/a")),
        ("datasphere://bt1x", JobFileUri(None, "bt1x", "")),
    ],
)
def test_uris_are_taken_apart(uri: str, expected: JobFileUri) -> None:
    assert parse_job_file_uri(uri) == expected


@pytest.mark.parametrize("uri", ["datasphere://", "datasphere:///", "s3://bucket/key", "datasphere:bt1x/a", ""])
def test_what_is_no_uri_of_a_job_says_how_one_looks(uri: str) -> None:
    with pytest.raises(JobRequestError, match=r"datasphere://\[<connection id>@\]<job id>/<output path or var>"):
        parse_job_file_uri(uri)


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("a", "a"),
        ("./a", "a"),
        ("a/", "a"),
        ("/a//b", "a/b"),
        ("a/./b/../c", "a/c"),
        ("../../a", "a"),
        ("..", ""),
        (".", ""),
        ("", ""),
        ("a b/.c/..d", "a b/.c/..d"),
    ],
)
def test_a_path_has_one_plain_form(path: str, plain: str) -> None:
    assert plain_path(path) == plain
    assert plain_path(plain) == plain


def test_fsspec_finds_it_and_lists_everything(emulator: Emulator, job_id: str) -> None:
    fs = fsspec.filesystem("datasphere", conn_id="other")
    assert isinstance(fs, DataSphereFileSystem)
    assert fs.ls(job_id, detail=False) == [
        f"{job_id}/{name}" for name in ("out", "out.txt", "result.csv", "sub", "tmp")
    ]
    assert fs.find(job_id) == [
        f"{job_id}/{name}"
        for name in (
            "out.txt",
            "out/model/deep/x",
            "out/model/w.bin",
            "result.csv",
            "sub/empty",
            "sub/large.bin",
            "tmp/absolute.txt",
        )
    ]
    assert fs.glob(f"{job_id}/sub/*") == [f"{job_id}/sub/empty", f"{job_id}/sub/large.bin"]
    assert fs.du(f"{job_id}/sub") == len(LARGE)


def test_exact_path_first_then_var(emulator: Emulator, job_id: str) -> None:
    fs = fsspec.filesystem("datasphere")
    for name, content in {
        "out.txt": b"by var",
        "RESULT": b"by var",
        "tmp/absolute.txt": b"absolute",
        "ABSOLUTE": b"absolute",
        "sub/empty": b"",
        "out/model/w.bin": b"weights",
        "MODEL/w.bin": b"weights",
    }.items():
        assert fs.cat_file(f"{job_id}/{name}") == content, name
        assert fs.info(f"{job_id}/{name}")["size"] == len(content), name
    assert sorted(fs.ls(f"{job_id}/MODEL", detail=False)) == [f"{job_id}/MODEL/deep", f"{job_id}/MODEL/w.bin"]
    both = ended_job(emulator, {"NAME": b"the path"})
    add_output(emulator, both, "other", b"the var", var="NAME")
    assert fs.cat_file(f"{both}/NAME") == b"the path"


def test_stat_tells_what_the_job_recorded(emulator: Emulator, job_id: str) -> None:
    fs = fsspec.filesystem("datasphere")
    entry = fs.info(f"{job_id}/sub/large.bin")
    assert (entry["type"], entry["size"]) == ("file", len(LARGE))
    assert fs.ukey(f"{job_id}/sub/large.bin") == entry["sha256"]
    assert fs.info(f"{job_id}/sub")["type"] == "directory"
    assert fs.info(f"{job_id}/out/model")["type"] == "directory"
    assert fs.modified(f"{job_id}/sub/large.bin").timestamp() == pytest.approx(
        emulator.job(job_id).finished_at.ToNanoseconds() / 1e9, abs=1
    )


def test_reading_here_and_there_fetches_ranges(emulator: Emulator, job_id: str) -> None:
    fs = fsspec.filesystem("datasphere")
    chance = random.Random(1)
    with fs.open(f"{job_id}/sub/large.bin", block_size=100_000) as file:
        for _ in range(20):
            start, size = chance.randrange(len(LARGE)), chance.randrange(200_000)
            file.seek(start)
            assert file.read(size) == LARGE[start : start + size]
    assert all(call.request["range"] for call in gets(emulator))


def test_a_whole_read_is_checked_against_the_sha256(emulator: Emulator, tmp_path: Path) -> None:
    content = random_bytes(500_000, 9)
    bad = ended_job(emulator, {"file": content})
    emulator.faults.inject("storage.get", corrupt_at=0.5)
    with pytest.raises(OSError, match="sha256"), fsspec.open(f"datasphere://other@{bad}/file") as file:
        file.read()
    with pytest.raises(OSError, match="sha256"):
        fsspec.filesystem("datasphere").get_file(f"{bad}/file", str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 500}, {"cut_at": 0.5}, {"truncate_at": 0.5}])
def test_a_stumbling_storage_is_asked_again(emulator: Emulator, job_id: str, fault: dict[str, float]) -> None:
    emulator.faults.inject("storage.get", times=1, **fault)
    with fsspec.open(f"datasphere://{job_id}/sub/large.bin") as file:
        assert file.read() == LARGE


def test_what_is_not_there_says_what_is(emulator: Emulator, job_id: str) -> None:
    fs = fsspec.filesystem("datasphere")
    with pytest.raises(FileNotFoundError, match=r"has no output 'nothing'; it has: result\.csv"):
        fs.open(f"{job_id}/nothing")
    with pytest.raises(FileNotFoundError, match="bt1unknown"):
        fs.ls("bt1unknown")
    with pytest.raises(FileNotFoundError, match="name a job"):
        fs.ls("")
    cleared = ended_job(emulator, {"a": b"a"})
    emulator.clear_data(cleared)
    with pytest.raises(FileNotFoundError, match="cleared"):
        fs.cat_file(f"{cleared}/a")
    running = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    with pytest.raises(FileNotFoundError, match="hasn't ended yet"):
        fs.ls(running)
    assert not fs.exists(f"{job_id}/nothing")
    assert not fs.exists(f"{running}/a")
    emulator.cancel_job(running)


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "INVALID_ARGUMENT"])
def test_what_may_not_be_seen_is_not_said_to_be_missing(emulator: Emulator, job_id: str, code: str) -> None:
    fs = fsspec.filesystem("datasphere")
    emulator.faults.inject("Get", code=code)
    for look in (fs.ls, fs.info, fs.find, fs.exists, fs.isfile, fs.open):
        with pytest.raises(DataSphereError, match=code):
            look(job_id)
    with pytest.raises(DataSphereError, match=code):
        fs.glob(f"{job_id}/*")


def test_a_connection_that_is_wrong_says_so(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_WRONG", json.dumps({"conn_type": "datasphere", "extra": {"endpoint": "a/b"}}))
    with pytest.raises(exceptions.JobRequestError, match="endpoint='a/b'"):
        fsspec.filesystem("datasphere", conn_id="wrong").find("bt1x")
    extra = {**emulator.connection_extra(), "iam_token": "expired"}
    monkeypatch.setenv("AIRFLOW_CONN_EXPIRED", json.dumps({"conn_type": "datasphere", "extra": extra}))
    with pytest.raises(exceptions.JobRequestError, match="refuses the IAM token"):
        fsspec.filesystem("datasphere", conn_id="expired").find("bt1x")


def test_one_output_is_found_however_its_path_is_written(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(
        emulator, {"./result.txt": b"1", "a//b.txt": b"2", "x/../up.txt": b"3", "/tmp/root.txt": b"4", "both": b"5"}
    )
    add_output(emulator, job_id, "./both", b"6")
    add_output(emulator, job_id, "out/", zipped({"out/w": b"7"}), archive=True)
    fs = fsspec.filesystem("datasphere")
    assert fs.find(job_id) == [
        f"{job_id}/{name}" for name in ("a/b.txt", "both", "out/w", "result.txt", "tmp/root.txt", "up.txt")
    ]
    job = fs.client.get(job_id)
    for written, content in {
        "./result.txt": b"1",
        "result.txt": b"1",
        "a/b.txt": b"2",
        "a//b.txt": b"2",
        "up.txt": b"3",
        "x/../up.txt": b"3",
        "tmp/root.txt": b"4",
        "/tmp/root.txt": b"4",
        "both": b"5",
        "./both": b"6",
    }.items():
        assert fs.cat_file(f"datasphere://{job_id}/{written}") == content, written
        assert find_file(job, written).sha256 == hashlib.sha256(content).hexdigest(), written
    for written in ("out", "out/", "./out", "/out/."):
        assert fs.ls(f"{job_id}/{written}", detail=False) == [f"{job_id}/out/w"]
        assert find_file(job, written).desc.path == "out/"
    assert fs.cat_file(f"{job_id}/./out//w") == b"7"
    (entry,) = download_job_files(fs.client, job_id, files=["tmp/*"], output_dir=tmp_path)
    assert entry["uri"] == f"file://{tmp_path}/tmp/root.txt"


def test_the_working_folder_as_an_output_is_the_jobs_root(emulator: Emulator) -> None:
    job_id = ended_job(emulator, {"/tmp/log": b"log"})
    add_output(emulator, job_id, ".", zipped({"a": b"a", "sub/b": b"b"}), archive=True)
    fs = fsspec.filesystem("datasphere")
    assert fs.find(job_id) == [f"{job_id}/{name}" for name in ("a", "sub/b", "tmp/log")]
    assert fs.cat_file(f"{job_id}/sub/b") == b"b"
    assert fs.info(f"{job_id}/.")["type"] == "directory"
    assert fs.ls(f"{job_id}/sub", detail=False) == [f"{job_id}/sub/b"]


def test_an_open_file_travels_by_pickle(emulator: Emulator, job_id: str) -> None:
    with fsspec.filesystem("datasphere", conn_id="other").open(f"{job_id}/sub/large.bin") as file:
        file.seek(1000)
        with pickle.loads(pickle.dumps(file)) as again:
            assert again.read(500) == file.read(500) == LARGE[1000:1500]


def test_a_file_is_fetched_into_an_open_file(emulator: Emulator, job_id: str) -> None:
    target = io.BytesIO()
    fsspec.filesystem("datasphere").get_file(f"{job_id}/sub/large.bin", target)
    assert target.getvalue() == LARGE


def test_nothing_can_be_changed(emulator: Emulator, job_id: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("datasphere")
    (tmp_path / "x").write_text("x")
    for change in (
        lambda: fs.open(f"{job_id}/new", "wb"),
        lambda: fs.pipe_file(f"{job_id}/new", b"x"),
        lambda: fs.rm(f"{job_id}/result.csv"),
        lambda: fs.mkdir(f"{job_id}/new"),
        lambda: fs.put_file(str(tmp_path / "x"), f"{job_id}/new"),
        lambda: fs.mv(f"{job_id}/result.csv", f"{job_id}/new"),
        lambda: fs.copy(f"{job_id}/result.csv", f"{job_id}/new"),
        lambda: fs.touch(f"{job_id}/new"),
    ):
        with pytest.raises(OSError, match="are read-only"):
            change()


@pytest.mark.parametrize("connection", ["other@", ""])
def test_airflows_paths_round_trip_and_read(emulator: Emulator, job_id: str, tmp_path: Path, connection: str) -> None:
    base = f"datasphere://{connection}{job_id}"
    path = ObjectStoragePath(f"{base}/sub/large.bin")
    assert str(path) == f"{base}/sub/large.bin"
    assert ObjectStoragePath(str(path)) == path
    assert str(ObjectStoragePath.deserialize(path.serialize(), 1)) == str(path)
    with path.open("rb") as file:
        assert file.read() == LARGE
    assert path.stat().st_size == len(LARGE)
    root = ObjectStoragePath(base)
    assert sorted(str(child) for child in root.iterdir()) == [
        f"{base}/{name}" for name in ("out", "out.txt", "result.csv", "sub", "tmp")
    ]
    assert (root / "sub").is_dir()
    assert not (root / "nothing").exists()
    assert (root / "RESULT").read_text() == "by var"
    path.copy(f"file://{tmp_path}/copied.bin")
    assert (tmp_path / "copied.bin").read_bytes() == LARGE
    assert [p.name for p in tmp_path.iterdir()] == ["copied.bin"]


def test_pandas_and_duckdb_read_it(emulator: Emulator, job_id: str) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(f"datasphere://other@{job_id}/result.csv")
    assert frame.to_dict("list") == {"a": [1], "b": [2]}
    duckdb = pytest.importorskip("duckdb")
    duckdb.register_filesystem(fsspec.filesystem("datasphere", conn_id="other"))
    assert duckdb.sql(f"select a, b from read_csv('datasphere://{job_id}/result.csv')").fetchall() == [(1, 2)]


def test_nothing_is_connected_to_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataSphereHook, "get_conn", lambda _: pytest.fail("connected"))
    DataSphereFileSystem.clear_instance_cache()
    path = ObjectStoragePath("datasphere://nowhere@bt1x/a/b")
    assert (path.name, str(path.parent)) == ("b", "datasphere://nowhere@bt1x/a")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_an_oserror(emulator: Emulator, compression: int) -> None:
    content = random_bytes(5000, 1).hex().encode()
    archive = zipped({"d/x": content}, compression)
    start = archive.index(b"d/x") + 3
    broken = archive[: start + 40] + bytes(20) + archive[start + 60 :]
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", broken, archive=True)
    fs = fsspec.filesystem("datasphere")
    with pytest.raises(OSError, match=r"damaged"), fs.open(f"{job_id}/d/x") as file:
        file.read()


@pytest.mark.parametrize("content", [b"no archive", b"PK\x05\x06" + bytes(10), b""])
def test_what_is_no_archive_is_an_oserror(emulator: Emulator, content: bytes) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", content, archive=True)
    with pytest.raises(OSError, match=r"(damaged|can't be used)"):
        fsspec.filesystem("datasphere").ls(f"{job_id}/d")


def test_a_member_can_be_read_here_and_there(emulator: Emulator, job_id: str) -> None:
    with fsspec.filesystem("datasphere").open(f"{job_id}/out/model/w.bin") as file:
        assert file.read(3) == b"wei"
        file.seek(4)
        assert file.tell() == 4
        assert file.readlines() == [b"hts"]
        assert file.seekable()


def test_a_file_may_have_the_longest_name(emulator: Emulator, job_id: str, tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    fsspec.filesystem("datasphere").get_file(f"{job_id}/result.csv", str(target))
    assert target.read_bytes() == b"a,b\n1,2\n"
    assert list(tmp_path.iterdir()) == [target]


def test_a_size_that_the_job_does_not_record_is_asked_of_the_storage(emulator: Emulator) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "file", b"content", size_bytes=0)
    add_output(emulator, job_id, "d", zipped({"d/x": b"x"}), archive=True, size_bytes=0)
    fs = fsspec.filesystem("datasphere")
    assert fs.info(f"{job_id}/file")["size"] == 7
    assert fs.cat_file(f"{job_id}/file") == b"content"
    assert fs.cat_file(f"{job_id}/d/x") == b"x"


def test_a_file_system_that_was_kept_takes_the_connections_new_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Emulator(tls=False) as emulator:
        extra = emulator.connection_extra()
        job_id = ended_job(emulator, {"file": b"content"})

        def connect(token: str) -> None:
            connection = {"conn_type": "datasphere", "extra": {**extra, "iam_token": token}}
            monkeypatch.setenv("AIRFLOW_CONN_DATASPHERE_DEFAULT", json.dumps(connection))

        connect(extra["iam_token"])
        fs = fsspec.filesystem("datasphere")
        assert fs.cat_file(f"{job_id}/file") == b"content"
        emulator.iam.revoke(token=extra["iam_token"])
        account = emulator.iam.add_service_account("new")
        emulator.iam.set_role(account, emulator.project_id, "developer")
        connect(emulator.iam.issue_token(account))
        fs.invalidate_cache()
        assert fsspec.filesystem("datasphere") is fs
        assert fs.cat_file(f"{job_id}/file") == b"content"
