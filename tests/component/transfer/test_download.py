"""Downloads to a folder: which files, in which states of the job, and what is told."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_provider_datasphere.client.errors import JobRequestError, ResultsError, ResultsGoneError
from airflow_provider_datasphere.client.transfer.download import download_job_files
from datasphere_emulator import Emulator, Script, ScriptedOutput
from stored_jobs import add_output, client_of, ended_job, files_in, only_files, random_bytes

if TYPE_CHECKING:
    pass

MEBIBYTE = 1024 * 1024


def test_files_keep_their_layout_and_the_manifest_tells_of_each(emulator: Emulator, tmp_path: Path) -> None:
    contents = {
        "result.csv": b"a,b\n1,2\n",
        "x/model.bin": random_bytes(3 * MEBIBYTE, 1),
        "y/model.bin": random_bytes(100_000, 2),
        "deep/er/and/deeper/file": b"x",
        "empty": b"",
        "foo": b"foo",
        "foo.download": b"not foo",
    }
    job_id = ended_job(emulator, contents)
    add_output(emulator, job_id, "logs/train.log", b"epoch 1", kind="log_files")
    add_output(emulator, job_id, "diagnostics.json", b"{}", kind="diagnostic_files")
    add_output(emulator, job_id, "out.txt", b"of a var", var="RESULT")

    manifest = download_job_files(
        client_of(emulator), job_id, with_logs=True, with_diagnostics=True, output_dir=tmp_path / "to"
    )

    expected = {
        **contents,
        "out.txt": b"of a var",
        "logs/train.log": b"epoch 1",
        "diagnostics.json": b"{}",
    }
    assert only_files(tmp_path / "to") == expected
    assert {entry["path"]: entry["kind"] for entry in manifest} == {
        **dict.fromkeys([*contents, "out.txt"], "output"),
        "logs/train.log": "log",
        "diagnostics.json": "diagnostic",
    }
    entry = next(entry for entry in manifest if entry["path"] == "out.txt")
    assert entry == {
        "path": "out.txt",
        "var": "RESULT",
        "kind": "output",
        "size_bytes": 8,
        "sha256": hashlib.sha256(b"of a var").hexdigest(),
        "uri": f"file://{tmp_path}/to/out.txt",
    }


def test_logs_and_diagnostics_come_only_when_asked_for(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"a": b"a"})
    add_output(emulator, job_id, "log", b"log", kind="log_files")
    add_output(emulator, job_id, "diagnostic", b"{}", kind="diagnostic_files")
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"a": b"a"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.csv"], {"a.csv", "sub/b.csv"}),
        (["sub/*"], {"sub/b.csv"}),
        (["MODEL"], {"m.bin"}),
        (["MOD*", "a.csv"], {"m.bin", "a.csv"}),
        (["odd[1].txt"], {"odd[1].txt"}),
    ],
)
def test_patterns_pick_by_path_or_var(
    emulator: Emulator, tmp_path: Path, patterns: list[str], expected: set[str]
) -> None:
    job_id = ended_job(emulator, {"a.csv": b"1", "sub/b.csv": b"2", "odd[1].txt": b"3"})
    add_output(emulator, job_id, "m.bin", b"4", var="MODEL")
    download_job_files(client_of(emulator), job_id, files=patterns, output_dir=tmp_path)
    assert set(only_files(tmp_path)) == expected


def test_a_pattern_that_fits_nothing_names_what_there_is(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"a.csv": b"1"})
    with pytest.raises(JobRequestError, match=r"files='\*\.parquet' matches no output.*a\.csv"):
        download_job_files(client_of(emulator), job_id, files=["*.parquet"], output_dir=tmp_path)


# States of the job


def test_no_outputs_is_an_empty_manifest(emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job_id = ended_job(emulator)
    assert download_job_files(client_of(emulator), job_id, output_dir=tmp_path / "to") == []
    assert "no files to download" in caplog.text
    assert not (tmp_path / "to").exists()


def test_a_running_job_has_no_results_yet(emulator: Emulator, tmp_path: Path) -> None:
    job_id = emulator.create_scripted_job(Script(never_ends=True), execute=True)
    emulator.wait_job(job_id, "EXECUTING")
    with pytest.raises(ResultsError, match=r"hasn't ended yet.*DataSphereJobSensor") as caught:
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert not isinstance(caught.value, ResultsGoneError)
    emulator.cancel_job(job_id)


def test_cleared_data_are_told_as_gone(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"a": b"a"})
    emulator.clear_data(job_id)
    with pytest.raises(ResultsGoneError, match="cleared"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)


def test_expired_data_are_told_as_gone(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"a": b"a"})
    emulator.state.registry.find(job_id).job.data_expires_at.FromSeconds(int(time.time()) - 60)
    with pytest.raises(ResultsGoneError, match=r"expired at|cleared"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)


def test_an_unknown_job_is_a_wrong_request(emulator: Emulator, tmp_path: Path) -> None:
    with pytest.raises(JobRequestError, match="bt1nosuchjob"):
        download_job_files(client_of(emulator), "bt1nosuchjob", output_dir=tmp_path)


def test_a_failed_jobs_outputs_come_with_a_warning(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = ended_job(emulator, {"partial.csv": b"1"}, return_code=3)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"partial.csv": b"1"}
    assert "ended with status ERROR" in caplog.text


def test_missing_outputs_are_told_and_the_others_come(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = emulator.create_scripted_job(
        Script(outputs={"made": ScriptedOutput(text="x")}, missing_outputs=["gone"]),
        outputs=["made", "gone"],
        execute=True,
    )
    emulator.wait_job(job_id)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"made": b"x"}
    assert "has no output gone" in caplog.text
    emulator.state.registry.find(job_id).job.file_errors[0].description = ""
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert "has no output gone: the program didn't create it." in caplog.text
    with pytest.raises(ResultsGoneError, match="'gone'"):
        download_job_files(client_of(emulator), job_id, files=["gone"], output_dir=tmp_path)


def test_progress_is_logged_now_and_then_not_per_chunk(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job_id = ended_job(emulator, {"a": random_bytes(MEBIBYTE), "b": b"b"})
    emulator.faults.inject("storage.get", bytes_per_second=2 * MEBIBYTE)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path, progress_interval=0.1)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Downloaded ")]
    assert 1 <= len(lines) <= 12
    assert " of 2 files, " in lines[0]
    assert "MB/s" in lines[0]


def test_stop_ends_a_download_and_leaves_nothing(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"a": random_bytes(8 * MEBIBYTE)})
    emulator.faults.inject("storage.get", bytes_per_second=MEBIBYTE)
    client = client_of(emulator)
    threading.Timer(0.3, client.interrupt).start()
    with pytest.raises(ResultsError, match="was stopped"):
        download_job_files(client, job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}
