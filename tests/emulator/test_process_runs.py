"""Jobs that really run: what the program gets, what becomes of what it makes, and how it is ended."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from stub_client import metadata_of
from waits import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from datasphere_emulator import Emulator
    from stub_client import Client

Status = jobs_pb2.JobStatus

SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), sys.executable]))"


def lines(client: Client, job_id: str) -> list[str]:
    return client.logs(job_id)["stdout"].decode().splitlines()


# What the program gets


def test_a_relative_state_folder_is_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from datasphere_emulator import Emulator

    with Emulator(tls=False, state_dir="state") as emulator:
        fields: dict[str, Any] = {"files": {"a.txt": "content"}, "inputs": [("a.txt", "A")], "outputs": ["b.txt"]}
        job_id = emulator.create_job("cat ${A} > b.txt", **fields, execute=True)
        assert len(emulator.wait_job(job_id).output_files) == 1


def test_command_line_and_environment(client: Client, emulator: Emulator) -> None:
    emulator.settings.project_secrets["SECRET"] = "hush"
    emulator.settings.job_environment["EVERYWHERE"] = "1"
    os.environ["LEAK"] = "the emulator's own"
    job_id = emulator.create_job(
        "python show.py ${IN} ${OUT} ${ARG} ${DS_PROJECT_HOME} ${bt1aaaaaaaaaaaaaaaaa} $HOME plain",
        files={"show.py": SHOW, "in.txt": "x"},
        inputs=[("in.txt", "IN")],
        outputs=[("deep/out.txt", "OUT")],
        args={"ARG": "value"},
        env_vars={"MINE": "yes"},
        s3_mount_ids=["bt1aaaaaaaaaaaaaaaaa"],
        attach_project_disk=True,
        execute=True,
    )
    emulator.wait_job(job_id)
    arguments, environment, folder, executable = json.loads(lines(client, job_id)[0])
    given, output, value, home, mount, home_variable, plain = arguments
    assert given.startswith(f"{folder}/in_")
    assert not given.endswith("in.txt")
    assert (output, value, plain) == ("deep/out.txt", "value", "plain")
    assert mount == f"{folder}/s3/bt1aaaaaaaaaaaaaaaaa"
    assert (environment["DS_PROJECT_HOME"], environment["HOME"]) == (home, home_variable)
    assert (environment["SECRET"], environment["MINE"], environment["EVERYWHERE"]) == ("hush", "yes", "1")
    assert "LEAK" not in environment
    assert {"JOB_PROGRESS_FILENAME", "SA_TOKEN_FILENAME"} <= set(environment)
    import sys

    assert executable == sys.executable


def test_project_disk_and_connectors_are_shared(client: Client, emulator: Emulator) -> None:
    connector = "bt1bbbbbbbbbbbbbbbbb"
    common: dict[str, Any] = {"s3_mount_ids": [connector], "attach_project_disk": True, "execute": True}
    writer = emulator.create_job(f"echo 1 > ${{DS_PROJECT_HOME}}/a; echo 2 > ${{{connector}}}/b", **common)
    emulator.wait_job(writer)
    reader = emulator.create_job(f"cat ${{DS_PROJECT_HOME}}/a s3/{connector}/b", **common)
    emulator.wait_job(reader)
    assert lines(client, reader) == ["1", "2"]


def test_service_agents_token_works(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("cat $SA_TOKEN_FILENAME", execute=True)
    emulator.wait_job(job_id)
    account = emulator.iam.subject_of(lines(client, job_id)[0])
    assert account != emulator.service_account_id


def test_directories_and_modules_are_unpacked(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job(
        "cat data/a.txt; cat ${MORE}/sub/b.txt; python main.py",
        files={"data/a.txt": "a\n", "some/more/sub/b.txt": "b\n", "main.py": "import package.module, helper"},
        inputs=["data", ("some/more", "MORE")],
        local_modules={"package/module.py": "print('package')", "helper.py": "print('helper')"},
        python_version="3.10",
        execute=True,
    )
    emulator.wait_job(job_id)
    assert lines(client, job_id) == ["a", "b", "package", "helper"]


def test_inputs_can_be_run(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("./go.sh", files={"go.sh": "#!/bin/sh\necho went\n"}, execute=True)
    emulator.wait_job(job_id)
    assert lines(client, job_id) == ["went"]


@pytest.mark.parametrize(("quote", "words"), [(False, ["a", "b"]), (True, ["a b"])])
def test_values_may_be_quoted(client: Client, emulator: Emulator, quote: bool, words: list[str]) -> None:
    emulator.settings.quote_substitutions = quote
    job_id = emulator.create_job("printf '%s\\n' ${A}", args={"A": "a b"}, execute=True)
    emulator.wait_job(job_id)
    assert lines(client, job_id) == words


# What becomes of its outputs


def test_outputs_of_a_failed_program(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job(
        "echo made > ${A}; mkdir -p d/sub; echo 1 > d/sub/x; exit 7",
        outputs=[("a.txt", "A"), "d", ("never.txt", "N")],
    )
    result = client.run(job_id)
    assert result.result.return_code == 7
    by_path = {file.file.desc.path: file for file in result.output_files}
    assert set(by_path) == {"a.txt", "d"}
    assert client.http(by_path["a.txt"].url) == b"made\n"
    archive = by_path["d"]
    assert archive.file.compression_type == jobs_pb2.FileCompressionType.ZIP
    content = client.http(archive.url)
    assert len(content) == archive.file.size_bytes
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        assert files.read("d/sub/x") == b"1\n"
        assert {info.compress_type for info in files.infolist()} == {zipfile.ZIP_STORED}
    (error,) = result.output_files_errors
    assert (error.output_file_desc.var, error.type) == ("N", jobs_pb2.FileUploadError.ErrorType.NOT_FOUND)
    job = emulator.job(job_id)
    assert job.status == Status.ERROR
    assert job.file_errors == result.output_files_errors


def test_missing_output_of_a_successful_program(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("true", outputs=["never.txt"])
    result = client.run(job_id)
    assert result.result.return_code == 0
    assert len(result.output_files_errors) == 1
    assert emulator.job(job_id).status == Status.SUCCESS


def test_output_datasets_become_datasets(client: Client, emulator: Emulator) -> None:
    maker = emulator.create_job("echo 1 > ${SET}/x", output_datasets=[{"name": "set", "var": "SET", "size_gb": 1}])
    (dataset,) = client.run(maker).output_datasets
    assert (dataset.desc.name, len(dataset.id)) == ("set", 20)
    reader = emulator.create_job(f"cat ${{{dataset.id}}}/x", dataset_ids=[dataset.id], execute=True)
    emulator.wait_job(reader)
    assert lines(client, reader) == ["1"]


def test_logs_and_diagnostics_are_files(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("echo out; echo err >&2", execute=True)
    job = emulator.wait_job(job_id)
    assert [file.desc.path for file in job.log_files] == ["stdout.txt", "stderr.txt"]
    assert client.download(job_id, *job.log_files) == [b"out\n", b"err\n"]
    assert [file.desc.path for file in job.diagnostic_files] == ["system.log", "docker_stats.tsv"]
    system, statistics = client.download(job_id, *job.diagnostic_files)
    assert b"return code 0" in system
    assert b"user_seconds" in statistics


def test_scratch_may_be_kept(emulator: Emulator) -> None:
    emulator.settings.keep_scratch = True
    job_id = emulator.create_job("echo 1 > left", execute=True)
    emulator.wait_job(job_id)
    assert (emulator.state.scratch(job_id) / "job" / "left").exists()
    emulator.settings.keep_scratch = False
    other = emulator.create_job("echo 1 > left", execute=True)
    emulator.wait_job(other)
    wait_until(lambda: not (emulator.state.scratch(other) / "job").exists())


# Progress


def test_progress_appended_or_overwritten(client: Client, emulator: Emulator) -> None:
    program = """
import json, os, sys, time
name = os.environ["JOB_PROGRESS_FILENAME"]
for progress, mode in ((10, "a"), (20, "a"), (30, "w")):
    with open(name, mode) as file:
        line = {"progress": progress, "message": f"step {progress}", "create_time": "2026-11-22T10:00:00Z"}
        file.write(json.dumps(line) + ("\\n" if mode == "a" else ""))
    while not os.path.exists(f"go{progress}"):
        time.sleep(0.01)
"""
    job_id = emulator.create_job("python main.py", files={"main.py": program})
    operation = client.call("Execute", job_id=job_id)
    for progress in (10, 20, 30):
        wait_until(lambda progress=progress: progress_of(client, operation.id) == progress)
        (emulator.state.scratch(job_id) / "job" / f"go{progress}").touch()
    message = metadata_of(client.done(operation)).progress
    assert (message.message, message.create_time.ToJsonString()) == ("step 30", "2026-11-22T10:00:00Z")
    written = client.logs(job_id)["job_progress.jsonl"].decode().replace("}{", "}\n{").splitlines()
    assert [json.loads(line)["progress"] for line in written] == [10, 20, 30]


def progress_of(client: Client, operation_id: str) -> int:
    return metadata_of(client.operation(operation_id)).progress.progress


# How it is ended

TRAP = """
import os, signal, sys, time
def end(number, frame):
    print("signal", number, flush=True)
    open("saved.txt", "w").write("state")
    if os.environ.get("STUBBORN") != "1":
        sys.exit(0)
signal.signal(signal.{name}, end)
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


def trapping(emulator: Emulator, name: str, timeout: float | None, stubborn: bool = False) -> str:
    job_id = emulator.create_job(
        # A shell in between, as users have it: the signal reaches the whole group.
        "echo before; python main.py; echo after",
        files={"main.py": TRAP.replace("{name}", name)},
        outputs=["saved.txt"],
        env_vars={"STUBBORN": str(int(stubborn))},
        graceful_shutdown=(name, timeout),
        execute=True,
    )
    wait_until(lambda: b"ready" in b"".join(content for _, _, content in emulator.log_text(job_id)))
    return job_id


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_graceful_cancel_sends_the_signal(client: Client, emulator: Emulator, name: str) -> None:
    job_id = trapping(emulator, name, 60)
    client.call("Cancel", job_id=job_id, graceful=True)
    job = emulator.wait_job(job_id, "CANCELLED")
    assert b"signal" in client.logs(job_id)["stdout"]
    assert [file.desc.path for file in job.output_files] == ["saved.txt"]


def test_graceful_cancel_loses_patience(client: Client, emulator: Emulator) -> None:
    job_id = trapping(emulator, "SIGTERM", 0.4, stubborn=True)
    begin = time.monotonic()
    client.call("Cancel", job_id=job_id, graceful=True)
    emulator.wait_job(job_id, "CANCELLED")
    assert time.monotonic() - begin >= 0.4


@pytest.mark.parametrize(
    ("rule", "graceful", "collected"),
    [
        (None, False, True),
        ("computing", True, True),
        ("graceful", True, True),
        ("graceful", False, False),
        ("never", True, False),
    ],
)
def test_outputs_of_a_cancelled_program(
    client: Client, emulator: Emulator, rule: str | None, graceful: bool, collected: bool
) -> None:
    if rule is not None:
        emulator.settings.outputs_after_cancel = rule
    command = "trap 'exit 1' TERM; echo early > out; echo written; while true; do sleep 0.05; done"
    job_id = emulator.create_job(command, outputs=["out"], graceful_shutdown=("SIGTERM", 60), execute=True)
    wait_until(lambda: b"written" in b"".join(content for _, _, content in emulator.log_text(job_id)))
    client.call("Cancel", job_id=job_id, graceful=graceful)
    job = emulator.wait_job(job_id, "CANCELLED")
    assert [file.desc.path for file in job.output_files] == ["out"] * collected
    assert not job.file_errors


def test_a_program_cancelled_in_setup_has_no_outputs(client: Client, emulator: Emulator) -> None:
    emulator.settings.preparing_seconds = 60
    job_id = emulator.create_job("echo 1 > out", outputs=["out"], execute=True)
    client.call("Cancel", job_id=job_id)
    job = emulator.wait_job(job_id, "CANCELLED")
    assert (list(job.output_files), list(job.file_errors)) == ([], [])


@pytest.mark.parametrize(("rule", "paths"), [("collected", ["out"]), ("never", [])])
def test_outputs_after_an_error_are_a_setting(client: Client, emulator: Emulator, rule: str, paths: list[str]) -> None:
    emulator.settings.outputs_after_error = rule
    job_id = emulator.create_job("echo 1 > out; exit 3", outputs=["out"])
    result = client.run(job_id)
    assert [stored.file.desc.path for stored in result.output_files] == paths
    assert result.result.return_code == 3


def test_plain_cancel_kills_all_processes_at_once(client: Client, emulator: Emulator, tmp_path: Path) -> None:
    # The child of a child that ignores what can be ignored.
    command = f"(trap '' TERM INT HUP; echo $BASHPID > {tmp_path}/pid; while true; do sleep 0.1; done) & wait"
    job_id = emulator.create_job(command, graceful_shutdown=("SIGTERM", 60), execute=True)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    pid = int((tmp_path / "pid").read_text())
    operation = emulator.operation_of(job_id)
    client.call("Cancel", job_id=job_id)
    assert client.failed(client.operation(operation))[0] == 1
    wait_until(lambda: not alive(pid))
    assert "signal" not in emulator.job(job_id).status_details


def test_programs_left_behind_end_with_their_job(emulator: Emulator, tmp_path: Path) -> None:
    job_id = emulator.create_job(f"sleep 600 & echo $! > {tmp_path}/pid", execute=True)
    emulator.wait_job(job_id)
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie nobody reaps is dead all the same.
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_killed_program_has_the_shells_code(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("kill -9 $$")
    assert client.run(job_id).result.return_code == 137


def test_closing_the_emulator_kills_programs(tmp_path: Path) -> None:
    from datasphere_emulator import Emulator

    with Emulator() as emulator:
        emulator.create_job(f"echo $$ > {tmp_path}/pid; sleep 600; true", execute=True)
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        state = emulator.state_dir
    assert not alive(int((tmp_path / "pid").read_text()))
    assert not state.exists()
