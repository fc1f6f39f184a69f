"""A download that fails keeps what one that is killed keeps; one that is told to stop ends, whatever it does."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from airflow_provider_datasphere.client.errors import PermanentResultsError, ResultsError
from airflow_provider_datasphere.client.transfer import parallel_ranges
from airflow_provider_datasphere.client.transfer.download import download_job_files
from airflow_provider_datasphere.client.transfer.file_download import download_file
from airflow_provider_datasphere.client.transfer.local_destination import LocalDestination
from datasphere_emulator import Emulator
from stored_jobs import add_output, client_of, ended_job, files_in, gets, only_files, random_bytes, zipped

if TYPE_CHECKING:
    from collections.abc import Iterator

MEBIBYTE = 1024 * 1024


def ranges(emulator: Emulator, content: bytes) -> list[int]:
    """Where the requests for a file began."""
    sha256 = hashlib.sha256(content).hexdigest()
    asked = [call.request["range"] for call in gets(emulator) if call.request["sha256"] == sha256]
    return [int(header.removeprefix("bytes=").partition("-")[0] or 0) for header in asked]


@pytest.mark.parametrize("size", [20, 100])
def test_an_outage_longer_than_the_attempts_loses_nothing(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(parallel_ranges, "FAST_ENOUGH_BYTES_PER_SECOND", 0)  # one connection, however slow it is here
    content = random_bytes(size * MEBIBYTE)
    job_id = ended_job(emulator, {"large": content, "small": b"small"})
    emulator.faults.inject("storage.get", cut_at=0.9, times=1, skip=0)
    emulator.faults.inject("storage.get", status=503)
    with pytest.raises(ResultsError, match="large"):
        download_job_files(client_of(emulator), job_id, files=["large"], output_dir=tmp_path)
    assert all(path.startswith(f".datasphere-{job_id}/") for path in files_in(tmp_path))
    emulator.faults.clear()
    emulator.journal.clear()
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"large": content, "small": b"small"}
    assert files_in(tmp_path).keys() == {"large", "small"}
    assert min(ranges(emulator, content)) > 0.8 * len(content)


def test_a_stopped_download_goes_on_later(emulator: Emulator, tmp_path: Path) -> None:
    content = random_bytes(30 * MEBIBYTE)
    job_id = ended_job(emulator, {"large": content})
    fault = emulator.faults.inject("storage.get", bytes_per_second=20 * MEBIBYTE)
    client = client_of(emulator)
    watched = threading.Event()

    def stop_when_enough_came() -> None:
        while not any(path.stat().st_size > 10 * MEBIBYTE for path in tmp_path.rglob("*.part")):
            if watched.wait(0.01):
                return
        client.interrupt()

    thread = threading.Thread(target=stop_when_enough_came)
    thread.start()
    with pytest.raises(ResultsError, match="was stopped"):
        download_job_files(client, job_id, output_dir=tmp_path)
    watched.set()
    thread.join()
    emulator.faults.remove(fault)
    emulator.journal.clear()
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {"large": content}
    assert ranges(emulator, content)[0] > 8 * MEBIBYTE


def test_what_came_wrongly_is_not_kept(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"large": random_bytes(20 * MEBIBYTE)})
    emulator.faults.inject("storage.get", corrupt_at=0.5)
    with pytest.raises(ResultsError, match="sha256"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}


def test_a_staged_input_that_failed_leaves_nothing(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"large": random_bytes(20 * MEBIBYTE)})
    client = client_of(emulator)
    (file,) = client.get(job_id).output_files
    emulator.faults.inject("storage.get", cut_at=0.9, times=1)
    emulator.faults.inject("storage.get", status=503)
    with pytest.raises(ResultsError, match="503"):
        download_file(client, job_id, file, tmp_path / "content", threading.Event(), logging.getLogger())
    assert files_in(tmp_path) == {}


# Stops ------------------------------------------------------------------------------------------------------------


class Endless(io.RawIOBase):
    """A file that is there and has no end, as far as a task's patience goes."""

    def __init__(self, reading: threading.Event) -> None:
        self._reading = reading

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._reading.set()
        return len(buffer)


def stopped_while(emulator: Emulator, reached: threading.Event, job_id: str, tmp_path: Path) -> None:
    """Stop a download when ``reached`` is set; it must end then."""
    client, errors = client_of(emulator), []

    def run() -> None:
        try:
            download_job_files(client, job_id, output_dir=tmp_path)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert reached.wait(20)
    client.interrupt()
    thread.join(20)
    assert not thread.is_alive()
    (error,) = errors
    assert "was stopped" in str(error)


def test_comparing_a_large_file_that_is_there_can_be_stopped(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = threading.Event()

    def read(*_: object) -> BinaryIO:
        return io.BufferedReader(Endless(reading))  # type: ignore[return-value]

    monkeypatch.setattr(LocalDestination, "read", read)
    job_id = ended_job(emulator, {"file": b"content"})
    (tmp_path / "file").write_bytes(b"CONTENT")
    stopped_while(emulator, reading, job_id, tmp_path)


def test_unpacking_can_be_stopped(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = threading.Event()

    def read(self: zipfile.ZipExtFile, size: int = -1) -> bytes:
        reading.set()
        return bytes(1000)

    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", zipped({"d/x": b"x"}), archive=True)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    stopped_while(emulator, reading, job_id, tmp_path / "to")
    assert only_files(tmp_path) == {}


def test_what_cannot_be_ended_is_left_alone(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, over = threading.Event(), threading.Event()

    def look(*_: object) -> None:
        reading.set()
        over.wait(60)  # as a name server, or a disk that is away

    monkeypatch.setattr(LocalDestination, "find", look)
    job_id = ended_job(emulator, {"file": b"content"})
    try:
        stopped_while(emulator, reading, job_id, tmp_path)
    finally:
        over.set()


@pytest.mark.parametrize("how", ["hang", "dripping"])
def test_a_stop_reaches_a_silent_storage(emulator: Emulator, tmp_path: Path, how: str) -> None:
    job_id = ended_job(emulator, {"file": random_bytes(2 * MEBIBYTE)})
    fault: dict[str, Any] = {"hang": True} if how == "hang" else {"bytes_per_second": 1}
    emulator.faults.inject("storage.get", **fault)
    asked = threading.Event()

    def watch() -> None:
        while not emulator.journal.calls("storage.get") and not asked.wait(0.05):
            pass
        asked.set()

    threading.Thread(target=watch, daemon=True).start()
    stopped_while(emulator, asked, job_id, tmp_path)
    emulator.faults.clear()


# What can be in the way --------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the destination that is another file system."""
    inside = tmp_path / "mounted"
    inside.mkdir()
    real = Path.stat

    def other_device(self: Path, **options: Any) -> os.stat_result:
        found = real(self, **options)
        if self == inside or inside in self.parents:
            return os.stat_result((*found[:2], found.st_dev + 1, *found[3:10]))
        return found

    monkeypatch.setattr(Path, "stat", other_device)
    yield inside
    monkeypatch.undo()


def test_another_file_system_inside_the_destination_is_named_before_anything_is_fetched(
    emulator: Emulator, tmp_path: Path, mounted: Path
) -> None:
    job_id = ended_job(emulator, {"mounted/deep/file": b"content"})
    with pytest.raises(PermanentResultsError, match=f"{mounted} is on another file system .*{tmp_path}"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert gets(emulator) == []


def test_a_member_with_the_hidden_folders_name_is_refused(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    name = f".datasphere-{job_id}"
    add_output(emulator, job_id, ".", zipped({f"{name}/mine": b"mine", "other": b"other"}), archive=True)
    with pytest.raises(PermanentResultsError, match=f"an entry '{name}'"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}


def test_a_directory_hands_its_group_on(emulator: Emulator, tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    job_id = ended_job(emulator, {"plain/file": b"x"})
    add_output(emulator, job_id, "d", zipped({"d/sub/x": b"x"}), archive=True)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    for folder in ("plain", "d", "d/sub"):
        assert (tmp_path / folder).stat().st_mode & stat.S_ISGID, folder


def test_a_place_is_looked_at_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with LocalDestination(tmp_path, ".scratch") as folder:
        assert folder.find(PurePosixPath("link")) is None
        assert folder.find(PurePosixPath("file/below")) is None
        found = folder.find(PurePosixPath("file"))
        assert found is not None
        assert found.size_bytes == 1
