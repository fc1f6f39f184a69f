"""Downloads that are repeated, killed, or happen twice at once."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sys
import threading
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.transfer.download import download_job_files
from airflow_provider_datasphere.client.transfer.file_download import FileDownloader
from airflow_provider_datasphere.client.transfer.local_destination import LocalDestination
from airflow_provider_datasphere.client.transfer.object_store_destination import ObjectStoreDestination
from airflow_provider_datasphere.client.transfer.partial_file import LocalPartialFile
from airflow_provider_datasphere.client.transfer.presigned_url import PresignedUrl
from datasphere_emulator import Emulator
from stored_jobs import (
    add_output,
    client_of,
    ended_job,
    files_in,
    gets,
    kill_when_a_part_has,
    only_files,
    random_bytes,
    zipped,
)

if TYPE_CHECKING:
    pass

MEBIBYTE = 1024 * 1024
log = logging.getLogger(__name__)


def test_a_second_run_fetches_only_what_is_not_right(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"same": b"same", "changed": b"changed", "lost": b"lost", "empty": b""})
    add_output(emulator, job_id, "d", zipped({"d/x": b"x" * 200_000}), archive=True)
    client = client_of(emulator)
    first = download_job_files(client, job_id, output_dir=tmp_path)
    (tmp_path / "changed").write_bytes(b"CHANGED")
    (tmp_path / "lost").unlink()
    kept = (tmp_path / "same").stat()
    emulator.journal.clear()

    assert download_job_files(client, job_id, output_dir=tmp_path) == first

    assert only_files(tmp_path) == {
        "same": b"same",
        "changed": b"changed",
        "lost": b"lost",
        "empty": b"",
        "d/x": b"x" * 200_000,
    }
    assert (tmp_path / "same").stat().st_mtime_ns == kept.st_mtime_ns
    by_content = {call.request["sha256"]: call.request["range"] for call in gets(emulator)}
    # Of the directory only its archive's table of contents was looked at.
    assert by_content.pop(first[-1]["sha256"]).startswith("bytes=")
    assert set(by_content) == {hashlib.sha256(content).hexdigest() for content in (b"changed", b"lost")}


class Blind(LocalFileSystem):
    """A store that may be written to, but not looked at."""

    def info(self, path: Any, **_: Any) -> Any:
        raise PermissionError("Forbidden")

    def isdir(self, path: Any) -> bool:
        raise PermissionError("Forbidden")


def test_who_may_not_look_downloads_all_the_same(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    add_output(emulator, job_id, "d", zipped({"d/x": b"x", "d/y": b"y"}), archive=True)
    for _ in range(2):
        download_job_files(
            client_of(emulator),
            job_id,
            destination=lambda name, _: ObjectStoreDestination(
                Blind(), str(tmp_path), lambda path: f"blind://{path}", name
            ),
        )
        assert only_files(tmp_path) == {"file": b"content", "d/x": b"x", "d/y": b"y"}


def test_an_old_file_that_cannot_be_read_is_replaced(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("Permission denied")

    job_id = ended_job(emulator, {"file": b"content"})
    (tmp_path / "file").write_bytes(b"CONTENT")
    monkeypatch.setattr(LocalDestination, "read", forbidden)  # as root, who may read everything, runs this
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"file": b"content"}


def test_how_a_sha256_is_written_does_not_matter(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "file", b"content")
    (tmp_path / "file").write_bytes(b"content")
    (file,) = client_of(emulator).get(job_id).output_files
    with LocalDestination(tmp_path, ".scratch") as folder:
        assert folder.has(PurePosixPath("file"), file.size_bytes, file.sha256.upper())


def test_a_directory_with_a_changed_file_is_unpacked_again(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", zipped({"d/x": b"right", "d/y": b"y"}), archive=True)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    (tmp_path / "d/x").write_bytes(b"wrong")
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"d/x": b"right", "d/y": b"y"}


def test_a_killed_download_leaves_nothing_visible_and_the_next_one_goes_on(emulator: Emulator, tmp_path: Path) -> None:
    content = random_bytes(6 * MEBIBYTE)
    job_id = ended_job(emulator, {"big": content, "dir/small": b"small"})
    client = client_of(emulator)
    fault = emulator.faults.inject("storage.get", bytes_per_second=3 * MEBIBYTE)
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2] / "support")!r})
        from airflow_provider_datasphere.client.transfer.download import download_job_files
        from airflow_provider_datasphere.client.sync_client import DataSphereClient
        from airflow_provider_datasphere.client.connection.settings import Settings
        client = DataSphereClient(Settings.from_extra({emulator.connection_extra()!r}))
        download_job_files(client, {job_id!r}, output_dir={str(tmp_path)!r})
    """
    kill_when_a_part_has(2 * MEBIBYTE, tmp_path, program)
    assert not (tmp_path / "big").exists()
    assert all(path.name.startswith(".datasphere-") for path in tmp_path.iterdir() if path.name != "dir")
    emulator.faults.remove(fault)
    emulator.journal.clear()

    download_job_files(client, job_id, output_dir=tmp_path)

    assert files_in(tmp_path) == {"big": content, "dir/": b"", "dir/small": b"small"}
    (call,) = [call for call in gets(emulator) if call.request["sha256"] == hashlib.sha256(content).hexdigest()]
    assert int(call.request["range"].removeprefix("bytes=").rstrip("-")) > 2 * MEBIBYTE


@pytest.mark.parametrize("recorded", [0, 7])
def test_a_whole_part_that_cannot_be_checked_is_fetched_anew(emulator: Emulator, tmp_path: Path, recorded: int) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "stdout.txt", b"content", sha256="", size_bytes=recorded)
    state = emulator.state
    sha256 = hashlib.sha256(b"content").hexdigest()
    url = state.storage.get_url(state.registry.find(job_id).job.project_id, sha256)
    client = client_of(emulator)
    (file,) = client.get(job_id).output_files

    class Links:
        def download_urls(self, *_: object) -> list[jobs_pb2.StorageFile]:
            return [jobs_pb2.StorageFile(file=file, url=url)]

    (tmp_path / "part").write_bytes(b"content")
    part = LocalPartialFile(tmp_path / "part", lambda: tmp_path / "file", recorded)
    FileDownloader(client.http, threading.Event(), log).fetch(PresignedUrl(Links(), job_id, file), part)
    part.commit()
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no call for it")
def test_the_disk_writes_while_the_rest_comes(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []

    def advise(handle: int, start: int, length: int, advice: int) -> None:
        assert os.fstat(handle).st_size == start + length
        ranges.append((start, length))
        raise OSError("a file system that takes no advice")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr("airflow_provider_datasphere.client.transfer.partial_file.WRITE_BEHIND_BYTES", MEBIBYTE)
    content = random_bytes(5 * MEBIBYTE + 7)
    job_id = ended_job(emulator, {"file": content})
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert ranges == [(n * MEBIBYTE, MEBIBYTE) for n in range(5)]
    assert files_in(tmp_path) == {"file": content}


def test_two_downloads_to_one_folder_do_not_disturb_each_other(emulator: Emulator, tmp_path: Path) -> None:
    contents = {f"f{n}": random_bytes(300_000, n) for n in range(4)}
    job_id = ended_job(emulator, contents)
    emulator.faults.inject("storage.get", bytes_per_second=1_000_000)
    errors: list[BaseException] = []

    def download() -> None:
        try:
            download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=download) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files_in(tmp_path) == contents


def test_the_folder_of_a_living_download_is_left_alone(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    theirs = tmp_path / f".datasphere-{job_id}"
    theirs.mkdir()
    (theirs / "x.part").write_bytes(b"x")
    handle = os.open(theirs, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    os.close(handle)
    assert only_files(tmp_path) == {"file": b"content", f".datasphere-{job_id}/x.part": b"x"}


def test_an_output_with_the_temporary_folders_name_is_safe(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    path = f".datasphere-{job_id}/mine"
    add_output(emulator, job_id, path, b"mine")
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {path: b"mine"}
