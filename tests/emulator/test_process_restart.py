"""What survives a restart of the emulator, graceful or not, in one process or between two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import Emulator, LogLine, Script
from datasphere_emulator.control_client import ControlClient
from stub_client import Client, source_of
from waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Status = jobs_pb2.JobStatus


def stop(emulator: Emulator) -> None:
    emulator.stop()


def kill(emulator: Emulator) -> None:
    emulator.kill()


@pytest.mark.parametrize("end", [stop, kill])
def test_program_keeps_running_without_the_emulator(
    client: Client, emulator: Emulator, tmp_path: Path, end: Callable[[Emulator], None]
) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    job_id = emulator.create_job(
        f"echo 1; while [ ! -e {go} ]; do sleep 0.02; done; echo 2; echo made > out.txt; touch {done}",
        outputs=["out.txt"],
    )
    operation = client.call("Execute", "key", job_id=job_id)
    stream = client.call("ReadLogs", job_id=job_id)
    offset = 0
    before = next(stream)
    while b"1\n" not in [message.content for message in before.logs]:
        offset = before.offset
        before = next(stream)
    endpoint, url, token = emulator.endpoint, emulator.url, emulator.iam_token
    end(emulator)
    with pytest.raises(grpc.RpcError):
        for _ in stream:
            pass
    go.touch()
    wait_until(done.exists)
    emulator.start()
    assert (emulator.endpoint, emulator.url, emulator.iam_token) == (endpoint, url, token)
    emulator.wait_job(job_id)
    assert client.call("Execute", "key", job_id=job_id).id == operation.id
    assert emulator.executions(job_id) == 1
    # The same offsets give the same log.
    assert client.logs(job_id, before.offset)["stdout"] == b"2\n"
    again = next(client.call("ReadLogs", job_id=job_id, offset=offset))
    assert [message.content for message in before.logs] == [
        message.content for message in again.logs[: len(before.logs)]
    ]
    assert client.download(job_id, *emulator.job(job_id).output_files) == [b"made\n"]


def test_running_program_is_watched_and_cancelled_after_a_restart(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("sleep 600; true", execute=True)
    emulator.wait_job(job_id, "EXECUTING")
    emulator.stop()
    emulator.start()
    assert emulator.job(job_id).status == Status.EXECUTING
    client.call("Cancel", job_id=job_id)
    assert client.failed(client.operation(emulator.operation_of(job_id)))[0] == 1
    assert emulator.executions(job_id) == 1


def test_cancel_is_remembered(client: Client, emulator: Emulator) -> None:
    trap = "trap 'echo got; sleep 0.5; echo over; exit 0' TERM; echo ready; while true; do sleep 0.02; done"
    job_id = emulator.create_job(trap, graceful_shutdown=("SIGTERM", 60), execute=True)
    wait_until(lambda: any(b"ready" in content for _, _, content in emulator.log_text(job_id)))
    client.call("Cancel", job_id=job_id, graceful=True, reason="enough")
    wait_until(lambda: any(b"got" in content for _, _, content in emulator.log_text(job_id)))
    emulator.kill()
    emulator.start()
    job = emulator.wait_job(job_id, "CANCELLED")
    assert "enough" in job.status_details
    # The signal was not sent a second time.
    assert client.logs(job_id)["stdout"] == b"ready\ngot\nover\n"


def test_interrupted_preparation_starts_again(client: Client, emulator: Emulator) -> None:
    emulator.settings.preparing_seconds = 600
    job_id = emulator.create_job("cat in", files={"in": "1"}, execute=True)
    wait_until(lambda: emulator.log_text(job_id))  # "Preparing the environment."
    emulator.kill()
    emulator.settings.preparing_seconds = 0
    emulator.start()
    emulator.wait_job(job_id)
    assert client.logs(job_id)["stdout"] == b"1"


def test_lost_runner(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("sleep 600; true", execute=True)
    emulator.wait_job(job_id, "EXECUTING")
    folder = emulator.state.scratch(job_id)
    wait_until((folder / "started.json").exists)
    group = json.loads((folder / "started.json").read_text())["group"]
    with open(f"/proc/{group}/stat") as stat:
        runner = int(stat.read().rpartition(")")[2].split()[1])
    os.kill(runner, signal.SIGKILL)
    os.killpg(group, signal.SIGKILL)
    code, message = client.failed(client.operation(emulator.operation_of(job_id)))
    assert code == 13
    assert "lost" in message
    assert emulator.job(job_id).status == Status.ERROR


def test_script_is_where_it_would_have_been(client: Client, emulator: Emulator) -> None:
    script = Script(
        log=["begin", LogLine(0.5, "middle\n"), LogLine(0.9, "end\n")], statuses=[(0.1, 55)], executing_seconds=1.0
    )
    series = [script, Script(return_code=4)]
    source = emulator.create_scripted_job(series, outputs=["o"])
    first = client.fork(source)
    client.call("Execute", job_id=first)
    emulator.wait_job(first, "EXECUTING")
    emulator.kill()
    time.sleep(0.6)
    emulator.start()
    result = client.run(first)
    assert client.logs(first) == {"stdout": b"begin\nmiddle\nend\n"}
    assert len(client.http(result.output_files[0].url)) == 16
    assert client.run(client.fork(source)).result.return_code == 4
    assert emulator.executions(first) == 1


def test_credentials_roles_and_keys_survive(client: Client, emulator: Emulator) -> None:
    account = emulator.iam.add_service_account("a")
    emulator.iam.set_role(account, emulator.project_id, "viewer")
    token = emulator.iam.issue_token(account)
    source = emulator.create_job("true", data_ttl=3600)
    expires = emulator.job(source).data_expires_at
    emulator.stop()
    # As a new process would: nothing but the folder.
    with Emulator(state_dir=emulator.state_dir) as successor:
        other = Client(successor, token)
        assert other.call("Get", job_id=source).data_expires_at == expires
        assert successor.project_id
    emulator.start()


# Between processes


class Process:
    """A running ``datasphere-emulator serve``."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.ready_file = folder / "ready.json"
        self.log = (folder / "emulator.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "datasphere_emulator", "serve", "--ready-file", self.ready_file, *arguments],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, (folder / "emulator.log").read_text()
        self.facts: dict[str, Any] = json.loads(self.ready_file.read_text())
        self.control = ControlClient.from_ready_file(self.ready_file)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(20)
        self.ready_file.unlink(missing_ok=True)
        self.log.close()
        return code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_takes_over(tmp_path: Path, number: int) -> None:
    state, go = tmp_path / "state", tmp_path / "go"
    first = Process(tmp_path, "--state-dir", str(state), "--port", "0", "--http-port", "0")
    job_id = first.control.create_job(
        f"echo 1; while [ ! -e {go} ]; do sleep 0.02; done; echo 2", name="kept", execute=True
    )
    scripted = first.control.create_scripted_job(Script(executing_seconds=2.0, log=["s"]), execute=True)
    first.control.wait_job(job_id, "EXECUTING")
    project, token = first.facts["project_id"], first.facts["iam_token"]
    calls = first.control.journal.count()
    code = first.end(number)
    assert code == (-9 if number == signal.SIGKILL else 0)
    go.touch()
    second = Process(tmp_path, "--state-dir", str(state), "--port", "0", "--http-port", "0")
    try:
        assert (second.facts["project_id"], second.facts["iam_token"]) == (project, token)
        assert second.facts["sample_job_id"] == first.facts["sample_job_id"]
        assert second.control.wait_job(first.facts["sample_job_id"]).name == "sample"
        assert second.control.executions(first.facts["sample_job_id"]) == 1
        assert second.control.wait_job(job_id).name == "kept"
        second.control.wait_job(scripted)
        assert second.control.executions(job_id) == second.control.executions(scripted) == 1
        assert second.control.journal.count() >= calls
        credentials = grpc.ssl_channel_credentials((state / "tls" / "ca.pem").read_bytes())
        with grpc.secure_channel(second.facts["endpoint"], credentials) as channel:
            from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service
            from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2_grpc as service_grpc

            stub = service_grpc.ProjectJobServiceStub(channel)
            metadata = [("authorization", f"Bearer {token}")]
            answers = list(stub.ReadLogs(service.ReadProjectJobLogsRequest(job_id=job_id), metadata=metadata))
        text = b"".join(
            message.content for answer in answers for message in answer.logs if source_of(message) == "stdout"
        )
        assert text == b"1\n2\n"
    finally:
        second.end(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_temporary_emulator_leaves_no_program(tmp_path: Path, number: int) -> None:
    process = Process(tmp_path, "--port", "0", "--http-port", "0")
    process.control.create_job(f"echo $$ > {tmp_path}/pid; sleep 600; true", execute=True)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    pid = int((tmp_path / "pid").read_text())
    state = process.facts["state_dir"]
    process.end(number)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}/cwd"))
    if number == signal.SIGINT:
        assert not os.path.exists(state)
        assert not process.ready_file.exists()


def test_several_emulators_in_one_process(tmp_path: Path) -> None:
    results: dict[int, str] = {}

    def use(number: int) -> None:
        with Emulator() as emulator:
            job_id = emulator.create_job(f"echo {number}", execute=True)
            emulator.wait_job(job_id)
            results[number] = Client(emulator).logs(job_id)["stdout"].decode()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {0: "0\n", 1: "1\n", 2: "2\n"}
