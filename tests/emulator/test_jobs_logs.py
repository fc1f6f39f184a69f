"""ReadLogs: what arrives, when, in what pieces, and where it resumes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from datasphere_emulator import LogLine, Progress, Script
from stub_client import raises_status, source_of
from waits import wait_until

if TYPE_CHECKING:
    from datasphere_emulator import Emulator
    from stub_client import Client


def test_lines_arrive_while_the_program_runs(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job(
        "echo first; while [ ! -e go ]; do sleep 0.02; done; echo second; echo third >&2", execute=True
    )
    found: list[tuple[str, bytes]] = []
    for answer in client.call("ReadLogs", job_id=job_id):
        for message in answer.logs:
            assert message.HasField("created_at")
            found.append((source_of(message), message.content))
            if message.content == b"first\n":
                assert emulator.job(job_id).status == 2  # EXECUTING
                (emulator.state.scratch(job_id) / "job" / "go").touch()
    assert ("stdout", b"second\n") in found
    assert ("stderr", b"third\n") in found
    assert found[0] == (".system.log", b"Preparing the environment.\n")


@pytest.mark.parametrize("chunk", [None, 7, 1])
def test_every_offset_resumes_exactly_there(client: Client, emulator: Emulator, chunk: int | None) -> None:
    text = "Ⅰ привет, мир\n" * 3
    script = Script(log=[LogLine(0, text), LogLine(0, "err\n", "stderr"), LogLine(0, "log\n", "logs/my.log")])
    job_id = emulator.create_scripted_job(script, execute=True)
    emulator.wait_job(job_id)
    emulator.settings.log_chunk_bytes = chunk
    whole: list[tuple[str, bytes]] = []
    offsets: list[int] = []
    for answer in client.call("ReadLogs", job_id=job_id):
        whole += [(source_of(message), message.content) for message in answer.logs]
        offsets.append(answer.offset)
    assert b"".join(content for source, content in whole if source == "stdout").decode() == text
    assert offsets == sorted(set(offsets))
    if chunk is not None:
        assert max(len(content) for _, content in whole) <= chunk
        for count, offset in enumerate(offsets, 1):
            rest = [
                (source_of(message), message.content)
                for answer in client.call("ReadLogs", job_id=job_id, offset=offset)
                for message in answer.logs
            ]
            assert rest == whole[count:]
    # An offset is no byte count, and lies behind the end of what it followed.
    assert offsets[-1] > sum(len(content) for _, content in whole)


def test_offset_survives_a_change_of_the_chunk_size(client: Client, emulator: Emulator) -> None:
    emulator.settings.log_chunk_bytes = 5
    job_id = emulator.create_scripted_job(Script(log=["0123456789abcdef"]), execute=True)
    emulator.wait_job(job_id)
    stream = client.call("ReadLogs", job_id=job_id)
    first = next(stream)
    stream.cancel()
    emulator.settings.log_chunk_bytes = None
    assert first.logs[0].content == b"01234"
    assert client.logs(job_id, first.offset) == {"stdout": b"56789abcdef\n"}


def test_from_now_and_from_the_end(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(log=["old", LogLine(0.6, "new\n")]), execute=True)
    wait_until(lambda: emulator.log_text(job_id))
    assert client.logs(job_id, -1) == {"stdout": b"new\n"}
    assert client.logs(job_id, -1) == {}
    assert client.logs(job_id, 10**9) == {}
    with raises_status("INVALID_ARGUMENT", "offset"):
        client.logs(job_id, -2)


def test_late_lines_arrive_after_the_operation_is_done(client: Client, emulator: Emulator) -> None:
    emulator.settings.log_delay_seconds = 0.6
    job_id = emulator.create_scripted_job(Script(log=["late"]))
    operation = client.call("Execute", job_id=job_id)
    stream = client.call("ReadLogs", job_id=job_id)
    client.done(operation)
    ended = time.monotonic()
    assert [message.content for answer in stream for message in answer.logs] == [b"late\n"]
    assert time.monotonic() - ended > 0.2


def test_stream_opened_before_execute(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_scripted_job(Script(log=["x"]))
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(client.logs(job_id)))
    reader.start()
    wait_until(lambda: emulator.journal.calls("ReadLogs") and emulator.journal.calls("ReadLogs")[0].effect)
    assert not found
    client.call("Execute", job_id=job_id)
    reader.join(20)
    assert found == [{"stdout": b"x\n"}]


def test_keepalive(client: Client, emulator: Emulator) -> None:
    emulator.settings.log_keepalive_seconds = 0.05
    job_id = emulator.create_scripted_job(Script(executing_seconds=0.4, log=["x"]), execute=True)
    answers = list(client.call("ReadLogs", job_id=job_id))
    empty = [answer for answer in answers if not answer.logs]
    assert len(empty) >= 2
    assert all(answer.offset == answers[-1].offset for answer in empty[1:])


def test_burst_is_complete_and_takes_no_space(client: Client, emulator: Emulator) -> None:
    size = 30_000_000
    job_id = emulator.create_scripted_job(Script(burst_bytes=size, log=["before"]), execute=True)
    job = emulator.wait_job(job_id)
    received, lines = 0, 0
    for answer in client.call("ReadLogs", job_id=job_id):
        assert answer.ByteSize() < 100_000
        for message in answer.logs:
            received += len(message.content)
            lines += message.content.count(b"\n")
    assert received == size + len(b"before\n")
    assert lines == size / 100 + 1
    assert sum(file.size_bytes for file in job.log_files) < 1000


def test_output_of_a_noisy_program_is_complete(client: Client, emulator: Emulator) -> None:
    job_id = emulator.create_job("seq 1 200000; seq 1 1000 >&2", execute=True)
    logs = client.logs(job_id)
    assert logs["stdout"] == b"".join(b"%d\n" % number for number in range(1, 200001))
    assert logs["stderr"].count(b"\n") == 1000


def test_sources_of_a_script(client: Client, emulator: Emulator) -> None:
    script = Script(log=[LogLine(0, b"\xff\xfe\n", ".system.log")], progress=[Progress(0, 50, "half")])
    job_id = emulator.create_scripted_job(script, execute=True)
    logs = client.logs(job_id)
    assert logs[".system.log"] == b"\xff\xfe\n"
    assert b'"progress": 50' in logs["job_progress.jsonl"]


def test_many_streams_on_one_loop(client: Client, emulator: Emulator) -> None:
    source = emulator.create_scripted_job(Script(executing_seconds=1.0, log=["x", LogLine(0.9, "y\n")]))
    forks = [client.fork(source) for _ in range(50)]
    for fork in forks:
        client.call("Execute", job_id=fork)
    streams = [client.call("ReadLogs", job_id=fork) for fork in forks]
    for stream in streams:
        assert [message.content for answer in stream for message in answer.logs] == [b"x\n", b"y\n"]
    assert emulator.journal.count("ReadLogs", code="OK") == 50


def test_streams_may_end_at_any_time(client: Client, emulator: Emulator) -> None:
    emulator.settings.log_stream_seconds = 0.2
    script = Script(log=[LogLine(at / 10, f"{at}\n") for at in range(8)])
    job_id = emulator.create_scripted_job(script, execute=True)
    offset, content, streams = 0, b"", 0
    while content.count(b"\n") < 8:
        streams += 1
        for answer in client.call("ReadLogs", job_id=job_id, offset=offset):
            offset = answer.offset
            content += b"".join(message.content for message in answer.logs)
    assert content == b"0\n1\n2\n3\n4\n5\n6\n7\n"
    assert streams > 1


# Logs of running jobs


def chatty(emulator: Emulator) -> str:
    """A running job that has printed ``early`` and prints ``late`` before its end."""
    script = Script(log=["early", LogLine(1.0, "late\n")], executing_seconds=2.0)
    job_id = emulator.create_scripted_job(script, execute=True)
    wait_until(lambda: emulator.log_text(job_id))
    return job_id


@pytest.mark.parametrize(
    ("rule", "silent", "whole"),
    [("all", False, "early\nlate\n"), ("live", False, "late\n"), ("at_end", True, "early\nlate\n")],
)
def test_the_log_of_a_running_job(client: Client, emulator: Emulator, rule: str, silent: bool, whole: str) -> None:
    emulator.settings.read_logs_of_running_job = rule
    job_id = chatty(emulator)
    statuses, text = [], b""
    for answer in client.call("ReadLogs", job_id=job_id):
        statuses.append(emulator.job(job_id).status)
        text += b"".join(message.content for message in answer.logs)
    assert text.decode() == whole
    if silent:
        assert set(statuses) == {jobs_pb2.SUCCESS}, "something came before the end"
    else:
        assert statuses[0] == jobs_pb2.EXECUTING
    # Of an ended job it is the whole log, always.
    assert client.logs(job_id)["stdout"] == b"early\nlate\n"


def test_a_live_log_resumes_at_an_offset(client: Client, emulator: Emulator) -> None:
    job_id = chatty(emulator)
    stream = client.call("ReadLogs", job_id=job_id)
    answer = next(iter(stream))
    stream.cancel()
    emulator.settings.read_logs_of_running_job = "live"
    assert client.logs(job_id, answer.offset)["stdout"] == b"late\n"
