"""Downloads while the storage misbehaves: what comes is right, or the error says what isn't and why."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_datasphere.client.errors import ResultsError
from airflow_provider_datasphere.client.transfer.download import download_job_files
from datasphere_emulator import Emulator, Script, ScriptedOutput, Settings
from http_server import http_client
from stored_jobs import PEAK, add_output, client_of, ended_job, files_in, only_files, random_bytes

MEBIBYTE = 1024 * 1024


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_cut_connection_goes_on_where_it_broke(emulator: Emulator, tmp_path: Path, share: float) -> None:
    content = random_bytes(4 * MEBIBYTE)
    job_id = ended_job(emulator, {"big": content})
    emulator.faults.inject("storage.get", cut_at=share, times=1)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"big": content}
    first, second = [call.request["range"] for call in emulator.journal.calls("storage.get")]
    assert first == ""
    # What had arrived isn't asked for again, but for what was still in the chunk being read.
    assert int(second.removeprefix("bytes=").rstrip("-")) > share * len(content) - 300_000


def test_a_connection_that_always_breaks_fails_and_leaves_nothing(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"small": random_bytes(1000), "good": b"good"})
    client = client_of(emulator)
    emulator.faults.inject("storage.get", cut_at=0.5)
    with pytest.raises(ResultsError, match=r"small: localhost: the connection broke"):
        download_job_files(client, job_id, files=["small"], output_dir=tmp_path)
    assert files_in(tmp_path) == {}


def test_a_flipped_byte_is_found_and_fetched_anew(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = random_bytes(MEBIBYTE)
    job_id = ended_job(emulator, {"file": content})
    emulator.faults.inject("storage.get", corrupt_at=0.7, times=1)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"file": content}
    assert "re-downloading it" in caplog.text


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"corrupt_at": 0.5}, "its sha256 is .*, the job records"),
        ({"truncate_at": 0.5}, "the job records 100000"),
        ({"status": 500}, "answered 500"),
        ({"status": 503}, "answered 503"),
        ({"status": 403}, "rejects new URLs too"),
        ({"status": 404}, "answered 404"),
        ({"cut_at": 0.0}, "connection broke"),
    ],
)
def test_what_stays_wrong_names_the_file_and_the_others_arrive(
    emulator: Emulator, tmp_path: Path, fault: dict[str, Any], reason: str
) -> None:
    job_id = ended_job(emulator, {"bad": random_bytes(100_000)})
    client = client_of(emulator)
    emulator.faults.inject("storage.get", **fault)
    with pytest.raises(ResultsError, match=f"1 of 1 files of job {job_id}(.|\n)*- bad: (.|\n)*{reason}") as caught:
        download_job_files(client, job_id, output_dir=tmp_path)
    assert "X-Amz" not in str(caught.value)
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("status", [500, 503, 403, 429])
def test_a_status_that_passes_costs_one_more_request(emulator: Emulator, tmp_path: Path, status: int) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    emulator.faults.inject("storage.get", status=status, times=1)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"file": b"content"}
    assert len(emulator.journal.calls("storage.get")) == 2


def test_short_body_with_consistent_headers_is_completed(emulator: Emulator, tmp_path: Path) -> None:
    content = random_bytes(50_000)
    job_id = ended_job(emulator, {"file": content})
    emulator.faults.inject("storage.get", truncate_at=0.4, times=1)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"file": content}


def test_links_that_expire_are_fetched_anew(tmp_path: Path) -> None:
    with Emulator(Settings(url_lifetime_seconds=1.0), tls=False) as emulator:
        contents = {f"{n}": random_bytes(400_000, n) for n in range(6)}
        job_id = ended_job(emulator, contents)
        # Two files at once, each for about 0.8 s: the links of the later ones have expired when their turn comes.
        emulator.faults.inject("storage.get", bytes_per_second=500_000)
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path, max_parallel=2)
        assert only_files(tmp_path) == contents
        assert len(emulator.journal.calls("DownloadJobFiles")) > 1


def test_a_dripping_connection_counts_as_broken(emulator: Emulator, tmp_path: Path) -> None:
    content = random_bytes(300_000)
    job_id = ended_job(emulator, {"file": content})
    emulator.faults.inject("storage.get", bytes_per_second=200, times=1)
    download_job_files(client_of(emulator, step_timeout=0.5), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"file": content}


def test_a_silent_connection_times_out(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    emulator.faults.inject("storage.get", hang=True, times=1)
    download_job_files(client_of(emulator, read_timeout=0.3), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"file": b"content"}


@pytest.mark.parametrize("recorded", [{"size_bytes": 5}, {"size_bytes": 500}])
def test_a_wrong_size_in_the_jobs_metadata_fails(emulator: Emulator, tmp_path: Path, recorded: dict[str, Any]) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "file", b"content", **recorded)
    with pytest.raises(ResultsError, match="file: "):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}


def test_a_wrong_sha256_in_the_jobs_metadata_fails(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"good": b"good"})
    add_output(emulator, job_id, "other", b"something else")
    state = emulator.state
    record = state.registry.find(job_id)
    wrong, _ = state.storage.put_bytes(record.job.project_id, b"x")
    stored = state.storage.path(record.job.project_id, wrong)
    stored.write_bytes(b"y")  # the storage serves something else under this sha256
    add_output(emulator, job_id, "bad", b"x")
    with pytest.raises(ResultsError, match=r"1 of 3 files(.|\n)*- bad: its sha256 is"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"good": b"good", "other": b"something else"}


def test_a_private_certificate_authority_is_trusted_beside_the_systems(tmp_path: Path) -> None:
    with Emulator(tls=True) as emulator:
        job_id = ended_job(emulator, {"file": b"content"})
        assert emulator.url.startswith("https://")
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        assert only_files(tmp_path) == {"file": b"content"}
        # Without it the storage isn't trusted, and the error says so without the signed part of the link.
        client = client_of(emulator)
        client.http = http_client(max_attempts=1)
        with pytest.raises(ResultsError, match="TLS failed") as caught:
            download_job_files(client, job_id, output_dir=tmp_path / "other")
        assert "X-Amz" not in str(caught.value)


@pytest.mark.skipif("DATASPHERE_TEST_LARGE" not in os.environ, reason="DATASPHERE_TEST_LARGE=1: needs 11 GB of disk")
def test_five_gigabytes_in_bounded_memory(tmp_path: Path) -> None:
    with Emulator(tls=False) as emulator:
        job_id = emulator.create_scripted_job(
            Script(outputs={"huge": ScriptedOutput(size=5 * 1024**3)}), outputs=["huge"], execute=True
        )
        emulator.wait_job(job_id, timeout=120)
        program = f"""
            from airflow_provider_datasphere.client.transfer.download import download_job_files
            from airflow_provider_datasphere.client.sync_client import DataSphereClient
            from airflow_provider_datasphere.client.connection.settings import Settings
            client = DataSphereClient(Settings.from_extra({emulator.connection_extra()!r}))
            client.get({job_id!r})
            client.http
            before = reset_peak()
            download_job_files(client, {job_id!r}, output_dir={str(tmp_path)!r})
            print(memory("VmHWM") - before)
        """
        program = PEAK + textwrap.dedent(program)
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        assert (tmp_path / "huge").stat().st_size == 5 * 1024**3
        assert int(done.stdout) * 1024 <= 64 * MEBIBYTE


@pytest.mark.skipif(
    "DATASPHERE_TEST_SMALL_DISK" not in os.environ,
    reason="DATASPHERE_TEST_SMALL_DISK=<folder on a file system with less than 64 MiB free>",
)
def test_a_full_disk_says_so_and_leaves_nothing(emulator: Emulator) -> None:
    folder = Path(os.environ["DATASPHERE_TEST_SMALL_DISK"]) / "results"
    job_id = ended_job(emulator, {"large": random_bytes(64 * MEBIBYTE), "small": b"small"})
    with pytest.raises(ResultsError, match="- large: No space left on device"):
        download_job_files(client_of(emulator), job_id, output_dir=folder)
    assert files_in(folder) == {"small": b"small"}


def test_a_storage_that_is_down_is_not_asked_for_each_of_many_files(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {f"{number:02}": b"%d" % number for number in range(40)})
    emulator.faults.inject("storage.get", status=503)
    with pytest.raises(ResultsError, match=r"40 of 40 files(.|\n)*answered 503(.|\n)*skipped, because.* 39"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path, max_parallel=2)
    assert len(emulator.journal.calls("storage.get")) <= 3 * 6
