"""Waiting for jobs: their end, their log, and what people see of them, with threads and with asyncio."""

from __future__ import annotations

import logging
import threading
import time
import tracemalloc

import pytest

from airflow_provider_datasphere.client.errors import Interrupted, JobFailedError
from airflow_provider_datasphere.client.model import JobHandle
from airflow_provider_datasphere.client.monitoring import lines as text_lines
from airflow_provider_datasphere.client.monitoring import logs as logs_module
from airflow_provider_datasphere.client.monitoring import status_logger as status_logger_module
from airflow_provider_datasphere.client.monitoring.logs import REPEATED, LogLine
from airflow_provider_datasphere.client.monitoring.polling import TerminalState
from airflow_provider_datasphere.client.monitoring.watch import watch
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from datasphere_emulator import Emulator, Script
from datasphere_emulator.script import LogLine as Printed
from datasphere_emulator.script import Progress
from waits import wait_until
from watching import Watcher

LINES = 4000


def scripted(emulator: Emulator, **script: object) -> str:
    return emulator.create_scripted_job(Script(**script), execute=True)  # type: ignore[arg-type]


def numbered(count: int = LINES, text: str = "строка") -> list[str]:
    return [f"{text} {number}" for number in range(count)]


def printed_at(at: float, lines: list[str]) -> list[Printed]:
    """Printed at once, in pieces that end anywhere in a line."""
    text = "".join(f"{line}\n" for line in lines)
    return [Printed(at, text[start : start + 1013]) for start in range(0, len(text), 1013)]


@pytest.mark.parametrize("return_code", [0, 7])
@pytest.mark.parametrize("operation", [True, False], ids=["operation", "job alone"])
def test_the_end_is_told(emulator: Emulator, watcher: Watcher, return_code: int, operation: bool) -> None:
    job_id = scripted(emulator, executing_seconds=0.2, return_code=return_code)
    handle = JobHandle(job_id, emulator.operation_of(job_id) if operation else None)
    result = watcher.wait(handle)
    assert result.status == ("ERROR" if return_code else "SUCCESS")
    assert result.return_code == (return_code if operation else (None if return_code else 0))


def test_a_job_that_ended_long_ago_is_told_with_its_log(emulator: Emulator, watcher: Watcher) -> None:
    job_id = scripted(emulator, log=["one", "two"])
    emulator.wait_job(job_id)
    assert watcher.run(job_id) == "SUCCESS"
    assert watcher.texts == ["one", "two"]
    assert watcher.seconds < 3.0


def test_a_silent_job_is_noticed_at_once(emulator: Emulator, watcher: Watcher) -> None:
    job_id = scripted(emulator, executing_seconds=1.0)
    watcher.wait(JobHandle(job_id, emulator.operation_of(job_id)), poll_interval=10.0)
    assert watcher.seconds < 3.0


@pytest.mark.parametrize(("cut", "late"), [("whole", 0.0), ("split", 0.8), ("few bytes", 0.0)])
@pytest.mark.parametrize("stream", ["open", "early ends", "silent early ends", "breaks near the end"])
def test_no_line_is_lost(
    emulator: Emulator, watcher: Watcher, monkeypatch: pytest.MonkeyPatch, cut: str, late: float, stream: str
) -> None:
    """Everything is printed just before the end, may come late, in chunks that end inside lines and characters."""
    monkeypatch.setattr(logs_module, "SILENCE_SECONDS", late + 2.0)
    count = 400 if cut == "few bytes" else LINES
    emulator.settings.log_delay_seconds = late
    emulator.settings.log_chunk_bytes = {"whole": None, "split": 1000, "few bytes": 7}[cut]
    if stream == "early ends":
        emulator.faults.inject("ReadLogs", after_messages=23, times=20)
    elif stream == "silent early ends":
        emulator.faults.inject("ReadLogs", after_messages=1, times=1)
        emulator.faults.inject("ReadLogs", after_messages=0, times=3)
    elif stream == "breaks near the end":
        emulator.faults.inject("ReadLogs", after_messages=2, code="UNAVAILABLE", times=1)
    job_id = scripted(emulator, log=printed_at(0.4, numbered(count)))
    assert watcher.run(job_id) == "SUCCESS"
    assert watcher.of("stdout") == numbered(count)


def test_a_log_that_is_cut_all_the_time_is_complete(emulator: Emulator, watcher: Watcher) -> None:
    emulator.settings.log_chunk_bytes = 4000
    emulator.faults.inject("ReadLogs", after_messages=2, code="UNAVAILABLE", probability=0.3)
    emulator.faults.inject("ReadLogs", after_messages=3)
    job_id = scripted(emulator, log=printed_at(0.2, numbered(500)))
    watcher.run(job_id)
    assert watcher.of("stdout") == numbered(500)


def test_all_streams_are_shown(emulator: Emulator, watcher: Watcher) -> None:
    log = [
        Printed(0.0, "pulling image\n", ".system.log"),
        Printed(0.0, "pulling image\n", ".system.log"),
        Printed(0.1, "hello\n"),
        Printed(0.1, "careful\n", "stderr"),
        Printed(0.1, "epoch 1\n", "logs/train.log"),
        Printed(0.1, "cpu\t7\n", ".docker_stats.tsv"),
        Printed(0.3, "no end"),
    ]
    progress = [Progress(0.1, 10, "training"), Progress(0.2, 10, "training"), Progress(0.3, 90, "training")]
    job_id = scripted(emulator, log=log, progress=progress)
    watcher.run(job_id)
    assert watcher.of("system") == ["pulling image"]
    assert watcher.of("progress") == ["10 % training", "90 % training"]
    assert watcher.of("stderr") == ["careful"]
    assert watcher.of("stdout") == ["hello", "no end"]
    assert "[logs/train.log] epoch 1" in watcher.texts
    assert not any("cpu" in text for text in watcher.texts)


def test_progress_comes_once_when_the_log_is_late(emulator: Emulator, watcher: Watcher) -> None:
    emulator.settings.log_delay_seconds = 0.7
    points = [Progress(0.1 * number, 10 * number) for number in range(1, 10)]
    watcher.wait(JobHandle(job := scripted(emulator, progress=points), emulator.operation_of(job)))
    assert sorted(watcher.of("progress")) == [f"{10 * number} %" for number in range(1, 10)]


def test_what_is_not_utf8_does_not_stop_the_log(emulator: Emulator, watcher: Watcher) -> None:
    job_id = scripted(emulator, log=[Printed(0.0, b"caf\xe9\n"), Printed(0.1, "конец\n")])  # type: ignore[arg-type]
    watcher.run(job_id)
    assert watcher.of("stdout") == ["caf\\xe9", "конец"]


def test_a_burst_goes_through_in_bounded_memory(emulator: Emulator, watcher: Watcher) -> None:
    size = 10_000_000
    job_id = scripted(emulator, burst_bytes=size, burst_at=0.1)
    seen = [0, 0]

    def count(line: LogLine) -> None:
        seen[0] += 1
        seen[1] += len(line.text) + 1

    tracemalloc.start()
    watcher.wait(JobHandle(job_id, emulator.operation_of(job_id)), emit=count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == [size // 100, size]
    assert peak < 8_000_000  # the emulator's share is in there


def test_lines_come_while_the_job_runs(emulator: Emulator, watcher: Watcher) -> None:
    job_id = scripted(emulator, log=[Printed(0.1, "begin\n")], never_ends=True)

    def cancel(line: LogLine) -> None:
        watcher.lines.append(line)
        emulator.cancel_job(job_id)

    assert watcher.wait(JobHandle(job_id, emulator.operation_of(job_id)), emit=cancel).status == "CANCELLED"
    assert watcher.texts == ["begin"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("shape", ["\r{:3} %", "{:3} %\r"], ids=["tqdm", "return at the end"])
def test_a_progress_bar_is_shown_while_it_moves(
    emulator: Emulator, watcher: Watcher, monkeypatch: pytest.MonkeyPatch, stream: str, shape: str
) -> None:
    monkeypatch.setattr(text_lines, "BAR_INTERVAL", 0.2)
    bar = [Printed(0.02 * step, shape.format(step), stream) for step in range(50)]
    # The bar stops, and the program goes on without a word.
    job_id = scripted(emulator, log=[Printed(0.0, "begin\r\n", stream), *bar], never_ends=True)

    def cancel(line: LogLine) -> None:
        watcher.lines.append(line)
        if line.text == " 49 %":
            emulator.cancel_job(job_id)

    watcher.wait(JobHandle(job_id, emulator.operation_of(job_id)), emit=cancel)
    begin, *states = watcher.of(stream)
    assert begin == "begin"
    assert states == sorted(set(states))
    assert 2 <= len(states) < 50
    assert states[-1] == " 49 %"


@pytest.fixture(params=["sizes", "no sizes"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the service tells how large an ended job's log files are."""
    if request.param == "no sizes":
        monkeypatch.setattr(TerminalState, "logged_bytes", 0)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("keepalive", [None, 0.2])
def test_a_log_with_a_hole_at_its_head_is_completed_and_said(
    emulator: Emulator, watcher: Watcher, keepalive: float | None
) -> None:
    """A wait that begins in the middle of a job whose service shows live lines only."""
    emulator.settings.read_logs_of_running_job = "live"
    emulator.settings.log_keepalive_seconds = keepalive
    early, late = numbered(300, "early"), numbered(300, "late")
    log = [*printed_at(0.0, early), Printed(0.0, "oops\n", "stderr"), *printed_at(1.5, late), Printed(1.5, "no end")]
    job_id = scripted(emulator, log=log, executing_seconds=2.0)
    operation_id = emulator.operation_of(job_id)
    # Until the head of the log is written, and gone for whoever reads from now on.
    wait_until(lambda: b"oops" in b"".join(content for _, _, content in emulator.log_text(job_id)))
    watcher.wait(JobHandle(job_id, operation_id))
    texts = watcher.texts
    begin = texts.index(REPEATED)
    assert texts[:begin] == [*late, "no end"]
    assert [text for text in texts[begin + 1 :] if text != "[stderr] oops"] == [*early, *late, "no end"]
    assert texts.count("[stderr] oops") == 1


@pytest.mark.usefixtures("sizes")
def test_a_log_that_is_silent_until_the_end_is_shown_once(emulator: Emulator, watcher: Watcher) -> None:
    emulator.settings.read_logs_of_running_job = "at_end"
    job_id = scripted(emulator, log=printed_at(0.2, numbered(500)), executing_seconds=0.8)
    watcher.wait(JobHandle(job_id, emulator.operation_of(job_id)))
    assert watcher.texts == numbered(500)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("shown", ["all", "live"])
def test_a_log_that_is_read_from_the_start_is_not_repeated(emulator: Emulator, watcher: Watcher, shown: str) -> None:
    emulator.settings.read_logs_of_running_job = shown
    emulator.faults.inject("ReadLogs", after_messages=5, code="UNAVAILABLE", times=2)
    job_id = scripted(emulator, log=printed_at(1.0, numbered(500)), executing_seconds=1.5)
    watcher.wait(JobHandle(job_id, emulator.operation_of(job_id)))
    assert watcher.texts == numbered(500)


def test_a_log_that_is_behind_is_waited_for_and_said(
    emulator: Emulator,
    watcher: Watcher,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Longer than silence is trusted, on streams that end all the time."""
    monkeypatch.setattr(logs_module, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(status_logger_module, "DRAIN_NOTICE_SECONDS", 0.5)
    emulator.settings.log_delay_seconds = 1.5
    emulator.settings.log_stream_seconds = 0.1
    job_id = scripted(emulator, log=["one", "two"])
    with caplog.at_level(logging.INFO, "watcher"):
        assert watcher.run(job_id) == "SUCCESS"
    assert watcher.texts == ["one", "two"]
    assert "waiting for the rest of its log, up to 3 minutes without a new line (0 of 8 bytes received)" in caplog.text


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNIMPLEMENTED", "FAILED_PRECONDITION"])
def test_a_refused_log_neither_fails_nor_holds_the_job(
    emulator: Emulator, watcher: Watcher, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    emulator.faults.inject("ReadLogs", code=code, message="no logs for you")
    job_id = scripted(emulator, log=["unseen"], executing_seconds=0.5)
    assert watcher.run(job_id) == "SUCCESS"
    assert watcher.lines == []
    assert watcher.seconds < 6.0
    assert "no logs for you" in caplog.text
    assert "may be incomplete" in caplog.text
    assert emulator.journal.count("ReadLogs") < 12


def test_a_log_that_hangs_after_the_end_of_the_job_is_given_up(
    emulator: Emulator, watcher: Watcher, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "LAG_WINDOW", 0.5)
    emulator.faults.inject("ReadLogs", hang=True)
    assert watcher.run(scripted(emulator, log=["unseen"])) == "SUCCESS"
    assert watcher.seconds < 6.0
    assert "may be incomplete" in caplog.text


def test_a_line_that_can_not_be_written_does_not_stop_the_rest(
    emulator: Emulator, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = scripted(emulator, log=["one", "two", "three"], progress=[Progress(0.1, 50)])

    def emit(line: LogLine) -> None:
        if line.text != "three":
            raise OSError("disk full")
        watcher.lines.append(line)

    assert watcher.wait(JobHandle(job_id, emulator.operation_of(job_id)), emit=emit).status == "SUCCESS"
    assert watcher.texts == ["three"]
    assert [r.getMessage() for r in caplog.records if "disk full" in r.getMessage()] == [
        "Failed to write lines of the job's log: OSError: disk full"
    ]


def test_statuses_are_told_once_per_change(
    emulator: Emulator, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = scripted(emulator, preparing_seconds=0.3, executing_seconds=0.6, statuses=[(0.3, 77)])
    with caplog.at_level(logging.INFO, "watcher"):
        watcher.run(job_id, logs=False)
    told = [record.getMessage() for record in caplog.records if record.name == "watcher"]
    assert told == [
        "Job status: PREPARING",
        "Job status: EXECUTING",
        "Job status: JOB_STATUS_77",
        "Job status: SUCCESS",
    ]


def test_an_interrupted_wait_ends_at_once(emulator: Emulator, client: DataSphereClient) -> None:
    job_id = scripted(emulator, never_ends=True)
    for emit in (None, print):
        other = DataSphereClient(client.settings)
        threading.Timer(0.3, other.interrupt).start()
        begin = time.monotonic()
        with pytest.raises(Interrupted):
            watch(other, JobHandle(job_id, emulator.operation_of(job_id)), poll_interval=60.0, emit=emit)
        assert time.monotonic() - begin < 3.0
        other.close()


def test_many_waits_leave_nothing_behind_in_their_client(emulator: Emulator, client: DataSphereClient) -> None:
    threads = threading.active_count()
    for _ in range(5):
        job_id = scripted(emulator, log=["one"])
        watch(client, JobHandle(job_id, emulator.operation_of(job_id)), emit=lambda line: None)
    assert len(client._wakes) <= 1
    assert threading.active_count() <= threads + 1


def test_a_log_without_a_thread_fails_no_job(
    emulator: Emulator, client: DataSphereClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is at its limit of threads, for a moment or to the end."""
    start = threading.Thread.start
    left = [0]

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("datasphere-log") and left[0] > 0:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    for failures, seen in ((1, ["one"]), (2, [])):
        left[0], lines = failures, []
        job_id = scripted(emulator, log=["one"])
        handle = JobHandle(job_id, emulator.operation_of(job_id))
        assert watch(client, handle, emit=lambda line, lines=lines: lines.append(line.text)).job is not None
        assert lines == seen
    assert "can't be shown while it runs: this process can't start another thread." in caplog.text
    assert "may be incomplete" in caplog.text


def test_a_persons_wait_shows_the_program(
    emulator: Emulator, client: DataSphereClient, caplog: pytest.LogCaptureFixture
) -> None:
    log = [Printed(0.0, "hello\n"), Printed(0.1, "oops\n", "stderr")]
    source = emulator.create_scripted_job(Script(log=log, progress=[Progress(0.05, 37, "training")], return_code=3))
    job = client.fork_job(source)
    with caplog.at_level(logging.INFO), pytest.raises(JobFailedError) as failure:
        job.wait()
    lines = [r.getMessage() for r in caplog.records if r.name == "airflow_provider_datasphere.client.sync_client"]
    assert [line for line in lines if line in ("hello", "37 % training", "[stderr] oops")] == [
        "hello",
        "37 % training",
        "[stderr] oops",
    ]
    for part in (job.id, f"{emulator.url}/communities/", "return code 3"):
        assert part in str(failure.value)
