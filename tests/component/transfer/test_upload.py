"""Inputs: what is sent about them equals the official SDK, and what is uploaded is what was hashed."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import DataSphereError, JobRequestError
from airflow_provider_datasphere.client.transfer.inputs import JobInput
from airflow_provider_datasphere.client.transfer.upload import UploadUrlExpired, local_input, upload_inputs
from datasphere_emulator import Emulator, Settings
from stored_jobs import client_of, random_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


def wanted(emulator: Emulator, *inputs: JobInput, url: str | None = None) -> list[jobs_pb2.StorageFile]:
    """What the service would ask for."""
    storage = emulator.state.storage
    return [
        jobs_pb2.StorageFile(
            file=jobs_pb2.File(
                desc=jobs_pb2.FileDesc(path=given.path, var=given.var), sha256=given.sha256, size_bytes=given.size_bytes
            ),
            url=storage.put_url(emulator.project_id, given.sha256, given.size_bytes) if url is None else url,
        )
        for given in inputs
    ]


def stored(emulator: Emulator, given: JobInput) -> bytes:
    return emulator.state.storage.path(emulator.project_id, given.sha256).read_bytes()


def puts(emulator: Emulator) -> list[Any]:
    return emulator.journal.calls("storage.put")


# What is said about an input


def test_a_file_is_described_by_the_path_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_bytes(b"a,b\n")
    given = local_input("INPUT", "./data.csv", tmp_path)
    assert (given.var, given.path, given.size_bytes) == ("INPUT", "./data.csv", 4)
    assert given.sha256 == hashlib.sha256(b"a,b\n").hexdigest()
    assert given.compression_type == jobs_pb2.NONE


@pytest.mark.parametrize("kind", ["file", "empty", "one-file directory", "nested directory"])
def test_the_description_equals_the_official_sdks(tmp_path: Path, kind: str) -> None:
    config = pytest.importorskip("datasphere.config", reason="the datasphere package isn't installed")
    files = pytest.importorskip("datasphere.files")
    path = tmp_path / "input"
    if kind == "file":
        path.write_bytes(random_bytes(300_000))
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        # One file a directory: the SDK takes those of a directory in the disk's own order.
        (path / "sub").mkdir(parents=True)
        (path / "a.bin").write_bytes(random_bytes(1000))
        if kind == "nested directory":
            (path / "sub" / "b.bin").write_bytes(random_bytes(2000))
            (path / "empty").mkdir()
    theirs_dir, ours_dir = tmp_path / "theirs", tmp_path / "ours"
    theirs_dir.mkdir()
    ours_dir.mkdir()
    (theirs,) = files.prepare_inputs([config.VariablePath(str(path), "INPUT")], str(theirs_dir))
    expected = theirs.get_file()
    ours = local_input("INPUT", str(path), ours_dir)
    assert (ours.path, ours.var, ours.sha256, ours.size_bytes, ours.compression_type) == (
        expected.desc.path,
        expected.desc.var,
        expected.sha256,
        expected.size_bytes,
        expected.compression_type,
    )


def test_a_directory_becomes_a_sorted_zip_under_its_own_name(tmp_path: Path) -> None:
    source = tmp_path / "data"
    for name in ("z", "a", "sub/m", "sub/deep/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    os.utime(source / "a", (0, 0))  # before 1980, where zip's calendar begins
    (source / "link").symlink_to(source / "a")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    given = local_input("DATA", str(source), scratch)
    with given.content(Event()) as path, zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["data/a", "data/link", "data/z", "data/sub/m", "data/sub/deep/x"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("data/link") == b"a"
    assert given.compression_type == jobs_pb2.ZIP
    assert local_input("DATA", str(source), scratch).sha256 == given.sha256


def test_the_current_folder_has_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("x")
    monkeypatch.chdir(folder)
    with local_input("DATA", ".", tmp_path).content(Event()) as path, zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["folder/file"]


def test_what_is_not_there_is_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(JobRequestError, match=r"Input DATA: nowhere/data\.csv doesn't exist.*s3://"):
        local_input("DATA", "nowhere/data.csv", tmp_path)


@pytest.mark.parametrize("path", ["", "  ", "file://"])
def test_nothing_is_not_the_current_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(JobRequestError, match=f"Input DATA: its path is {path!r}"):
        local_input("DATA", path, tmp_path)


def test_what_is_neither_file_nor_directory_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(JobRequestError, match=r"pipe is neither a file nor a directory"):
        local_input("DATA", str(tmp_path / "pipe"), tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        with pytest.raises(JobRequestError, match=r"socket in the directory .*folder is neither"):
            local_input("DATA", str(folder), tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0)
    with pytest.raises(JobRequestError, match="secret can't be read: Permission denied"):
        local_input("DATA", str(secret), tmp_path)


def test_a_broken_link_in_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken").symlink_to("nowhere")
    with pytest.raises(JobRequestError, match=r"broken in the directory .* can't be read"):
        local_input("DATA", str(tmp_path / "folder"), tmp_path)


@pytest.mark.parametrize("kind", ["file", "directory", "in a directory"])
def test_a_name_that_is_not_utf8_is_shown_and_refused(tmp_path: Path, kind: str) -> None:
    name = os.fsdecode(b"caf\xe9")
    place = tmp_path / ("folder" if kind == "in a directory" else name)
    if kind != "file":
        place.mkdir()
        (place / (name if kind == "in a directory" else "file")).write_bytes(b"x")
    else:
        place.write_bytes(b"x")
    with pytest.raises(JobRequestError, match=r"name that isn't UTF-8.*caf\\xe9.*Rename it") as caught:
        local_input("DATA", str(place), tmp_path)
    str(caught.value).encode()  # a log takes it


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 300, "can't be read: File name too long"),
        ("loop", "can't be read: Too many levels"),
        ("a\0b", "NUL|null"),
    ],
)
def test_a_path_that_cannot_be_used_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(JobRequestError, match=f"Input DATA: .*({reason})"):
        local_input("DATA", str(tmp_path / name), tmp_path)


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize(("number", "heals"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False)])
def test_only_what_may_heal_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool, number: int, heals: bool
) -> None:
    folder, real = tmp_path / "folder", Path.stat
    folder.mkdir()
    (folder / "file").write_bytes(b"x")

    def away(self: Path, **options: Any) -> os.stat_result:
        if self.name == "file":
            raise OSError(number, os.strerror(number), str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", away)
    with pytest.raises(DataSphereError, match=f"file.* can't be read: {os.strerror(number)}") as caught:
        local_input("DATA", str(folder if directory else folder / "file"), tmp_path)
    assert isinstance(caught.value, JobRequestError) is not heals


# Uploading


def make(tmp_path: Path, **contents: bytes) -> list[JobInput]:
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [local_input(name.upper(), str(tmp_path / name), tmp_path) for name in contents]


def test_each_input_arrives_with_its_length_even_empty_ones(emulator: Emulator, tmp_path: Path) -> None:
    inputs = make(tmp_path, large=random_bytes(3_000_000), small=b"x", empty=b"")
    upload_inputs(inputs, wanted(emulator, *reversed(inputs)), client_of(emulator).http, log)
    for given in inputs:
        assert stored(emulator, given) == Path(given.path).read_bytes()
    assert sorted(call.request["size"] for call in puts(emulator)) == [0, 1, 3_000_000]


def test_the_same_content_twice_is_uploaded_once(emulator: Emulator, tmp_path: Path) -> None:
    one, two = make(tmp_path, one=b"same content", two=b"same content")
    # The list is de-duplicated by content: the one entry names either path.
    upload_inputs([one, two], wanted(emulator, two), client_of(emulator).http, log)
    assert len(puts(emulator)) == 1


def test_how_the_service_writes_a_sha256_does_not_matter(emulator: Emulator, tmp_path: Path) -> None:
    (given,) = make(tmp_path, given=b"in capitals")
    (entry,) = wanted(emulator, given)
    entry.file.sha256 = entry.file.sha256.upper()
    upload_inputs([given], [entry], client_of(emulator).http, log)
    assert stored(emulator, given) == b"in capitals"


def test_what_is_stored_already_is_not_even_opened(emulator: Emulator, tmp_path: Path) -> None:
    (given,) = make(tmp_path, given=b"known")
    never = replace(given, content=lambda _: pytest.fail("nobody asked for it"))
    upload_inputs([never], [], client_of(emulator).http, log)
    upload_inputs([never], wanted(emulator, never, url=""), client_of(emulator).http, log)
    assert puts(emulator) == []


def test_a_wish_for_something_else_is_an_error(emulator: Emulator, tmp_path: Path) -> None:
    one, two = make(tmp_path, one=b"one", two=b"two")
    with pytest.raises(DataSphereError, match=r"requests the upload of '.*two'.*none of the job's inputs: .*one"):
        upload_inputs([one], wanted(emulator, two), client_of(emulator).http, log)
    assert puts(emulator) == []


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut_at": 0.5}, {"corrupt_at": 0.5}])
def test_what_stumbles_once_is_sent_again_from_its_beginning(
    emulator: Emulator, tmp_path: Path, fault: dict[str, Any]
) -> None:
    (given,) = make(tmp_path, given=random_bytes(2_000_000, 7))
    emulator.faults.inject("storage.put", times=1, **fault)
    upload_inputs([given], wanted(emulator, given), client_of(emulator).http, log)
    assert stored(emulator, given) == Path(given.path).read_bytes()
    assert len(puts(emulator)) == 2


def test_a_silent_storage_times_out(emulator: Emulator, tmp_path: Path) -> None:
    (given,) = make(tmp_path, given=b"content of the silent one")
    emulator.faults.inject("storage.put", hang=True, times=1)
    upload_inputs([given], wanted(emulator, given), client_of(emulator, read_timeout=0.3).http, log)
    assert stored(emulator, given) == b"content of the silent one"


def test_what_never_works_names_the_input_and_shows_no_link(emulator: Emulator, tmp_path: Path) -> None:
    (given,) = make(tmp_path, given=b"content")
    emulator.faults.inject("storage.put", status=503)
    with pytest.raises(DataSphereError, match=r"Upload of input GIVEN .* failed: localhost answered 503") as caught:
        upload_inputs([given], wanted(emulator, given), client_of(emulator).http, log)
    assert not isinstance(caught.value, JobRequestError)
    assert "X-Amz" not in str(caught.value)


def test_an_expired_link_is_told_apart(tmp_path: Path) -> None:
    with Emulator(Settings(url_lifetime_seconds=0.001), tls=False) as emulator:
        (given,) = make(tmp_path, given=b"content")
        with pytest.raises(UploadUrlExpired, match="403"):
            upload_inputs([given], wanted(emulator, given), client_of(emulator).http, log)


def test_a_file_that_changed_since_it_was_hashed_is_refused(emulator: Emulator, tmp_path: Path) -> None:
    (given,) = make(tmp_path, given=b"content")
    Path(given.path).write_bytes(b"another")
    with pytest.raises(JobRequestError, match="Input GIVEN changed"):
        upload_inputs([given], wanted(emulator, given), client_of(emulator).http, log)
    assert puts(emulator) == []


@pytest.mark.parametrize("now", [b"CONTENT", b"cont", b"content and more"])
def test_a_file_that_changes_under_way_is_refused(emulator: Emulator, tmp_path: Path, now: bytes) -> None:
    (given,) = make(tmp_path, given=b"content")

    @contextmanager
    def content(_: Event) -> Iterator[Path]:
        Path(given.path).write_bytes(now)
        yield Path(given.path)

    with pytest.raises(DataSphereError):
        upload_inputs([replace(given, content=content)], wanted(emulator, given), client_of(emulator).http, log)
    assert not emulator.state.storage.has(emulator.project_id, given.sha256) or stored(emulator, given) == b"content"


def test_progress_is_told(emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    inputs = make(tmp_path, a=random_bytes(100, 1), b=random_bytes(100, 2))
    upload_inputs(inputs, wanted(emulator, inputs[0]), client_of(emulator).http, log)
    assert "Uploading 1 of 2 inputs (100 bytes)." in caplog.text
