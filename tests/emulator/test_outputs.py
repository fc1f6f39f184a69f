"""Outputs that can't be stored: patterns, special files, links, a full disk. Others are stored all the same."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Script
from stub_client import Client

if TYPE_CHECKING:
    from pathlib import Path

    from datasphere_emulator import Emulator

Errors = jobs_pb2.FileUploadError.ErrorType
WORDS = "Some output files were not uploaded due to errors: "


def run(client: Client, job_id: str) -> tuple[jobs_pb2.Job, dict[str, bytes], dict[str, tuple[int, str]]]:
    """Run a job; its outputs' contents and its errors by path."""
    result = client.run(job_id)
    stored = {item.file.desc.path: client.http(item.url) for item in result.output_files}
    errors = {error.output_file_desc.path: (error.type, error.description) for error in result.output_files_errors}
    job = client.call("Get", job_id=job_id)
    assert job.file_errors == result.output_files_errors
    return job, stored, errors


@pytest.mark.parametrize("scripted", [False, True], ids=["program", "script"])
def test_a_pattern_is_accepted_and_fails_at_the_end(client: Client, emulator: Emulator, scripted: bool) -> None:
    outputs = ["*_last.pt", "model.pt"]
    if scripted:
        job_id = emulator.create_scripted_job(Script(outputs={"model.pt": "x"}), outputs=outputs)
    else:
        job_id = emulator.create_job("printf x > model.pt; cp model.pt epoch_last.pt", outputs=outputs)
    job, stored, errors = run(client, job_id)
    assert job.status == jobs_pb2.ERROR
    assert job.status_details == f"{WORDS}*_last.pt (Error while processing file)"
    assert errors == {"*_last.pt": (Errors.UPLOAD_FAILED, "Error while processing file")}
    assert stored == {"model.pt": b"x"}


def test_the_status_after_a_failed_upload_is_a_setting(client: Client, emulator: Emulator) -> None:
    emulator.settings.status_after_failed_upload = "SUCCESS"
    job_id = emulator.create_scripted_job(Script(failed_uploads=["o"]), outputs=["o"])
    job, _, errors = run(client, job_id)
    assert (job.status, job.status_details) == (jobs_pb2.SUCCESS, "")
    assert errors == {"o": (Errors.UPLOAD_FAILED, "Error while processing file")}
    missing = emulator.create_scripted_job(Script(missing_outputs=["o"]), outputs=["o"])
    assert run(client, missing)[0].status == jobs_pb2.SUCCESS


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(client: Client, emulator: Emulator) -> None:
    _, stored, errors = run(client, emulator.create_job("printf 1 > 'a[1].txt'", outputs=["a[1].txt"]))
    assert (stored, errors) == ({"a[1].txt": b"1"}, {})


SOCKET = "import socket; socket.socket(socket.AF_UNIX).bind('{0}')"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("mkfifo {0}", "{0} is a named pipe"),
        (f'python -c "{SOCKET}"', "{0} is a socket"),
        ("ln -s /nowhere {0}", "{0} is a broken link"),
        ("ln -s loop loop; ln -s loop {0}", "{0} is a broken link"),
    ],
    ids=["fifo", "socket", "broken link", "link to itself"],
)
@pytest.mark.parametrize("path", ["bad", "folder/bad"])
def test_an_output_that_is_no_file_is_named(
    client: Client, emulator: Emulator, make: str, reason: str, path: str
) -> None:
    output = path.partition("/")[0]
    command = f"printf 1 > good; mkdir folder; {make.format(path)}"
    job, stored, errors = run(client, emulator.create_job(command, outputs=[output, "good"]))
    assert stored == {"good": b"1"}
    assert job.status == jobs_pb2.ERROR
    kind, description = errors[output]
    assert kind == Errors.UPLOAD_FAILED
    assert reason.format(path) in description
    assert reason.format(path) in job.status_details


def test_an_entry_whose_name_is_no_text_is_named(client: Client, emulator: Emulator) -> None:
    command = "printf 1 > good; mkdir folder; touch $(printf 'folder/\\377')"
    _, stored, errors = run(client, emulator.create_job(command, outputs=["folder", "good"]))
    assert stored == {"good": b"1"}
    assert r"folder/\xff" in errors["folder"][1]


def test_links_are_copies(client: Client, emulator: Emulator, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    command = (
        f"ln -s {tmp_path}/elsewhere link; ln {tmp_path}/elsewhere hard || cp -l {tmp_path}/elsewhere hard;"
        f" mkdir d; ln -s {tmp_path}/elsewhere d/link; ln -s . d/again"
    )
    emulator.settings.keep_scratch = True
    job_id = emulator.create_job(command, outputs=["link", "hard", "d"])
    _, stored, errors = run(client, job_id)
    assert errors == {}
    (tmp_path / "elsewhere").write_text("changed")
    job = client.call("Get", job_id=job_id)
    files = {file.desc.path: file for file in job.output_files}
    assert client.download(job_id, files["link"], files["hard"]) == [b"mine", b"mine"]
    with zipfile.ZipFile(io.BytesIO(stored["d"])) as archive:
        assert archive.read("d/link") == b"mine"


def test_a_full_disk_is_the_outputs_error(client: Client, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    really = tempfile.mkstemp

    def full(*arguments: Any, **options: Any) -> tuple[int, str]:
        descriptor, name = really(*arguments, **options)
        os.close(descriptor)
        return os.open("/dev/full", os.O_WRONLY), name

    # What is stored in one piece is linked; a link's target is copied.
    job_id = emulator.create_job("printf 1 > good; ln -s good copied", outputs=["copied", "good"])
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        job, stored, errors = run(client, job_id)
    assert "No space left on device" in errors["copied"][1]
    assert job.status == jobs_pb2.ERROR
    assert stored == {"good": b"1"}


def test_a_cancelled_script_has_the_outputs_it_names(client: Client, emulator: Emulator) -> None:
    script = Script(never_ends=True, outputs={"saved": "x"})
    for rule, paths in (("computing", ["saved"]), ("never", [])):
        emulator.settings.outputs_after_cancel = rule
        job_id = emulator.create_scripted_job(script, outputs=["saved", "other"], execute=True)
        emulator.wait_job(job_id, "EXECUTING")
        client.call("Cancel", job_id=job_id)
        job = emulator.wait_job(job_id, "CANCELLED")
        assert [file.desc.path for file in job.output_files] == paths
    job_id = emulator.create_scripted_job(Script(preparing_seconds=60), outputs=["saved"], execute=True)
    client.call("Cancel", job_id=job_id)
    assert not emulator.wait_job(job_id, "CANCELLED").output_files
