"""From chunks of bytes, cut anywhere, to lines; and when the reading of a log is over."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as service_pb2

from airflow_provider_datasphere.client.monitoring.lines import BAR_INTERVAL, MAX_LINE_CHARACTERS
from airflow_provider_datasphere.client.monitoring.logs import (
    DRAIN_WINDOW,
    LAG_WINDOW,
    REPEATED,
    SILENCE_SECONDS,
    LogDecoder,
    LogLine,
    LogTail,
)

Message = service_pb2.LogMessage
OUT, ERR = service_pb2.StandardStream.OUT, service_pb2.StandardStream.ERR


def out(content: bytes) -> Message:
    return Message(content=content, standard_stream=OUT)


def progress(percent: int, message: str = "training") -> Message:
    line = json.dumps({"progress": percent, "message": message, "create_time": "2026-11-22T10:00:00Z"}) + "\n"
    return Message(content=line.encode(), file_path="job_progress.jsonl")


def lines(messages: Iterable[Message]) -> list[LogLine]:
    decoder = LogDecoder(clock=lambda: 0.0)
    return [*decoder.feed(messages), *decoder.flush()]


def texts(messages: Iterable[Message]) -> list[str]:
    return [str(line) for line in lines(messages)]


def cut(content: bytes, borders: Sequence[int]) -> list[Message]:
    places = [0, *sorted(border % (len(content) + 1) for border in borders), len(content)]
    return [out(content[start:stop]) for start, stop in itertools.pairwise(places)]


@given(text=st.text(st.characters(exclude_characters="\r"), max_size=200), borders=st.lists(st.integers(0, 1000)))
def test_text_survives_cuts_anywhere(text: str, borders: list[int]) -> None:
    wanted = text.split("\n")
    if wanted[-1] == "":
        del wanted[-1]
    assert texts(cut(text.encode("utf-8", "replace"), borders)) == [
        line.encode("utf-8", "replace").decode() for line in wanted
    ]


@given(content=st.binary(max_size=300), borders=st.lists(st.integers(0, 1000)))
def test_any_bytes_become_the_same_lines_however_they_are_cut(content: bytes, borders: list[int]) -> None:
    assert texts(cut(content, borders)) == texts([out(content)])


@given(st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=8)), max_size=50))
def test_streams_do_not_mix(pieces: list[tuple[bool, bytes]]) -> None:
    messages = [Message(content=content, standard_stream=OUT if is_out else ERR) for is_out, content in pieces]
    mixed = lines(messages)
    for stream, number in (("stdout", OUT), ("stderr", ERR)):
        alone = lines([message for message in messages if message.standard_stream == number])
        assert [line for line in mixed if line.stream == stream] == alone


def test_a_person_can_tell_the_streams_apart() -> None:
    assert texts(
        [
            out("привет\r\n\n  indented\n".encode()),
            Message(content=b"oops\n", standard_stream=ERR),
            Message(content=b"pulling image\n", file_path=".system.log"),
            progress(37),
            Message(content=b"epoch 1\n", file_path="logs/train.log"),
            Message(content=b"1\t2\n", file_path=".docker_stats.tsv"),
            Message(content=b"1\t2\n", file_path=".gpu_stats.tsv"),
            Message(content=b"no name\n"),
        ]
    ) == [
        "привет",
        "",
        "  indented",
        "[stderr] oops",
        "[system] pulling image",
        "37 % training",
        "[logs/train.log] epoch 1",
        "no name",
    ]


def test_what_is_not_utf8_stays_readable() -> None:
    assert texts([out(b"caf\xe9 \xff\n\xd0")]) == ["caf\\xe9 \\xff", "\\xd0"]


def test_a_last_line_without_its_end_is_not_lost() -> None:
    assert texts([out(b"one\ntwo")]) == ["one", "two"]


def test_a_line_that_never_ends_is_cut_in_pieces_and_held_in_bounded_memory() -> None:
    decoder = LogDecoder()
    chunk = b"x" * 65_536
    size = 0
    tracemalloc.start()
    for _ in range(320):
        for line in decoder.feed([out(chunk)]):
            assert len(line.text) <= MAX_LINE_CHARACTERS
            size += len(line.text)
    size += sum(len(line.text) for line in decoder.flush())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 320 * 65_536
    assert peak < 2_000_000


# Progress bars ------------------------------------------------------------------------------------------------------


class Bar:
    """A decoder, its clock, and the records that it gave."""

    def __init__(self, stream: int = OUT) -> None:
        self.now = 0.0
        self.stream = stream
        self.decoder = LogDecoder(clock=lambda: self.now)
        self.records: list[tuple[float, str]] = []

    def feed(self, content: str, seconds: float = 0.0) -> None:
        """Time passes, then text arrives."""
        self.now += seconds
        message = Message(content=content.encode(), standard_stream=self.stream)
        self.records += [(self.now, line.text) for line in self.decoder.feed([message])]

    def poll(self, seconds: float) -> None:
        """Time passes, then somebody asks what stands there."""
        self.now += seconds
        self.records += [(self.now, line.text) for line in self.decoder.idle_bars()]

    def end(self) -> None:
        self.records += [(self.now, line.text) for line in self.decoder.flush()]

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.records]


@pytest.mark.parametrize("stream", [OUT, ERR])
@pytest.mark.parametrize("shape", ["\r{} %", "{} %\r"], ids=["tqdm", "return at the end"])
def test_a_progress_bar_is_shown_live_about_once_a_second(shape: str, stream: int) -> None:
    bar = Bar(stream)
    for step in range(120):
        bar.feed(shape.format(step), seconds=0.1)
    assert 11 <= len(bar.records) <= 13
    assert all(later - earlier >= BAR_INTERVAL - 0.01 for (earlier, _), (later, _) in itertools.pairwise(bar.records))
    bar.feed("\n" if shape.startswith("\r") else "done\n")
    bar.end()
    assert "119 %" in bar.texts
    assert not any("\r" in text or len(text) > 5 for text in bar.texts)
    assert len(bar.texts) == len(set(bar.texts))


def test_the_last_state_of_a_bar_that_stops_is_shown_without_waiting_for_more() -> None:
    for shape in ("\r{} %", "{} %\r"):
        bar = Bar()
        for step in range(5):
            bar.feed(shape.format(step), seconds=0.1)
        bar.poll(0.5)
        assert "4 %" not in bar.texts
        bar.poll(0.5)
        bar.poll(9.0)
        bar.feed("\n", seconds=1.0)
        bar.end()
        assert bar.texts == ["0 %", "4 %"]


def test_the_last_state_of_a_bar_at_the_end_of_the_log_is_shown() -> None:
    assert texts([out(b"\r1 %\r2 %\r3 %")])[-1] == "3 %"
    assert texts([out(b"1 %\r2 %\r3 %\r")])[-1] == "3 %"


def test_a_bar_and_the_lines_around_it_keep_their_order() -> None:
    assert texts([out(b"epoch 1\n\r1 %\r50 %\r99 %\rdone\nepoch 2\n")]) == [
        "epoch 1",
        "1 %",
        "99 %",
        "done",
        "epoch 2",
    ]


def test_what_wipes_a_bar_out_is_no_line() -> None:
    assert texts([out(b"\r1 %\r    \rdone\n\r    \n\nend\n")]) == ["1 %", "done", "", "end"]


@pytest.mark.parametrize("line_end", ["\r\n", "\r\r\n"])
@given(borders=st.lists(st.integers(0, 40)))
def test_a_return_before_a_line_feed_is_an_ordinary_line_end(line_end: str, borders: list[int]) -> None:
    """Also where it is cut in two, however often and quickly."""
    assert texts(cut("".join(f"{number}{line_end}" for number in range(8)).encode(), borders)) == list("01234567")


@given(content=st.text(st.sampled_from("ab\r\n "), max_size=40), borders=st.lists(st.integers(0, 40)))
def test_bars_become_the_same_lines_however_they_are_cut(content: str, borders: list[int]) -> None:
    whole = texts([out(content.encode())])
    assert texts(cut(content.encode(), borders)) == whole
    assert not any("\r" in text for text in whole)


def test_a_bar_of_megabytes_is_held_in_bounded_memory() -> None:
    bar = Bar()
    tracemalloc.start()
    for step in range(200):
        bar.feed("".join(f"\r{step} {state} {'x' * 200}" for state in range(300)))
    bar.feed("\r" * 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(bar.records) == 1
    assert peak < 5_000_000


def test_system_lines_are_said_once_per_change() -> None:
    system = [b"waiting\n", b"waiting\n", b"running\n", b"\n", b"running\n", b"waiting\n"]
    messages = [Message(content=content, file_path=".system.log") for content in system]
    assert texts(messages) == ["[system] waiting", "[system] running", "[system] waiting"]


def test_progress_is_said_once_per_change_in_the_log() -> None:
    messages = [progress(10), progress(10), progress(20), progress(10)]
    assert texts(messages) == ["10 % training", "20 % training", "10 % training"]


@pytest.mark.parametrize("line", ["37", "[]", '{"message": "x"}', '{"progress": null}', "half a li", "null"])
def test_progress_of_another_shape_stays_as_it_is(line: str) -> None:
    assert texts([Message(content=line.encode(), file_path="job_progress.jsonl")]) == [line]


def test_progress_that_the_operation_told_first_is_not_repeated_by_a_late_log() -> None:
    decoder = LogDecoder()
    told = [*decoder.progress(10, "training"), *decoder.progress(10, "training"), *decoder.progress(30, "training")]
    told += decoder.feed([progress(10), progress(20), progress(30), progress(40)])
    told += decoder.progress(40, "training")
    told += decoder.progress(20, "training")  # the answer of an older poll
    assert [line.text for line in told] == ["10 % training", "30 % training", "20 % training", "40 % training"]


def answer(content: bytes = b"", offset: int = 0) -> service_pb2.ReadProjectJobLogsResponse:
    return service_pb2.ReadProjectJobLogsResponse(logs=[out(content)] if content else [], offset=offset)


class Reading:
    """A log's reader, its clock, and the service with what it has written so far."""

    def __init__(self) -> None:
        self.now = 50.0
        self.tail = LogTail("bt1job", clock=lambda: self.now)
        self.written = b""
        self.seen: list[str] = []

    def stream(self, *contents: bytes, code: str | None = None, seconds: float = 0.0) -> float | None:
        """The service writes; one stream is read to its end. Returns what the tail says then."""
        self.tail.open()
        if code is None and self.tail.offset < len(self.written):
            self.take(len(self.written))
        for content in contents:
            self.written += content
            self.take(len(self.written))
        self.now += seconds
        return self.tail.closed(code)

    def take(self, stop: int) -> None:
        """The tail gets what stands between its offset and ``stop``."""
        self.seen += [str(line) for line in self.tail.received(answer(self.written[self.tail.offset : stop], stop))]

    def until_given_up(self, code: str | None = None) -> float:
        """Open the stream again as often as the tail wants; returns for how long."""
        begin = self.now
        while (delay := self.stream(code=code)) is not None:
            self.now += max(delay, 0.001)
        return self.now - begin


def test_a_stream_that_ended_with_its_job_is_read_once_more_and_that_is_all() -> None:
    reading = Reading()
    assert reading.stream(b"one\n", b"two\n") is not None
    reading.now += 0.2
    reading.tail.job_ended(8)
    assert reading.stream() is None
    assert reading.tail.incomplete_reason is None


def test_a_silent_job_needs_no_patience() -> None:
    reading = Reading()
    reading.stream()
    reading.tail.job_ended(0)
    assert reading.stream() is None


def test_a_stream_open_at_the_end_of_the_job_is_followed_by_one_more() -> None:
    reading = Reading()
    reading.tail.open()
    reading.tail.job_ended(4)
    reading.written = b"one\n"
    reading.take(4)
    assert reading.tail.closed(None) == 0.0
    assert reading.stream() is None


def test_lines_that_the_job_is_known_to_have_written_are_waited_for() -> None:
    reading = Reading()
    reading.stream(b"one\n")
    reading.tail.job_ended(8)
    for _ in range(6):  # logs arrive three seconds late, and the service ends its streams cleanly
        delay = reading.stream()
        assert delay is not None
        reading.now += delay
    assert reading.stream(b"two\n") is not None
    assert reading.until_given_up() <= SILENCE_SECONDS + 1.0
    assert reading.tail.incomplete_reason is None


def test_an_early_clean_end_makes_the_next_one_doubtful() -> None:
    reading = Reading()
    reading.stream(b"one\n")
    reading.now += 10.0
    reading.stream()
    reading.tail.job_ended(0)
    assert SILENCE_SECONDS <= reading.until_given_up() <= SILENCE_SECONDS + 1.0


def test_a_broken_stream_makes_a_clean_end_doubtful() -> None:
    reading = Reading()
    reading.stream(b"one\n", code="UNAVAILABLE")
    reading.tail.job_ended(0)
    assert SILENCE_SECONDS <= reading.until_given_up() <= SILENCE_SECONDS + 1.0
    assert reading.tail.incomplete_reason is None


def test_what_comes_after_the_end_of_the_job_is_read_to_its_end() -> None:
    reading = Reading()
    reading.tail.job_ended(0)
    for _ in range(100):  # streams that end after each message
        assert reading.stream(b"line\n") == 0.0
    assert reading.until_given_up() <= SILENCE_SECONDS + 1.0


def test_a_refused_stream_holds_an_ended_job_for_a_moment_only() -> None:
    reading = Reading()
    for _ in range(3):
        delay = reading.stream(code="PERMISSION_DENIED")
        assert delay is not None
        reading.now += delay
    reading.tail.job_ended(100)
    assert reading.until_given_up("PERMISSION_DENIED") == 0
    assert "PERMISSION_DENIED" in str(reading.tail.incomplete_reason)
    reading = Reading()
    reading.tail.job_ended(100)
    assert reading.until_given_up("PERMISSION_DENIED") < 2.0


def test_a_refused_stream_is_asked_for_less_and_less_often() -> None:
    reading = Reading()
    delays = [reading.stream(code="PERMISSION_DENIED") for _ in range(20)]
    assert delays[0] == 0.2
    assert delays[-1] == 15.0


def test_an_outage_after_the_end_of_the_job_is_waited_out_for_a_while() -> None:
    reading = Reading()
    reading.tail.job_ended(100)
    assert DRAIN_WINDOW <= reading.until_given_up("UNAVAILABLE") <= DRAIN_WINDOW + 5.0
    assert reading.tail.incomplete_reason == "UNAVAILABLE"


def test_an_open_silent_stream_becomes_overdue_after_the_end_of_the_job() -> None:
    reading = Reading()
    reading.tail.open()
    reading.now += 1000.0
    assert not reading.tail.overdue
    reading.tail.job_ended(0)
    assert not reading.tail.overdue
    reading.now += LAG_WINDOW - 1.0  # there may be more to come
    assert not reading.tail.overdue
    reading.now += 2.0
    assert reading.tail.overdue
    assert reading.tail.closed("CANCELLED") is None


def test_an_open_stream_is_not_waited_for_when_everything_has_come() -> None:
    reading = Reading()
    reading.stream(b"one\n")
    reading.tail.open()
    reading.tail.job_ended(4)
    reading.now += DRAIN_WINDOW + 1.0
    assert reading.tail.overdue


def test_a_stream_that_ends_all_the_time_is_not_opened_all_the_time() -> None:
    reading = Reading()
    delays = [reading.stream() or 0.0 for _ in range(20)]
    assert delays[-1] == 5.0
    assert delays == sorted(delays)
    assert reading.stream(b"news\n") == 0.1


def test_answers_that_say_nothing_new_are_no_sign_of_more() -> None:
    """Empty ones, with an offset or without, and the last piece over and over again."""
    for repeated in (answer(), answer(offset=4), answer(b"one\n", offset=4)):
        reading = Reading()
        reading.stream(b"one\n")
        reading.tail.job_ended(4)
        for _ in range(20):
            reading.tail.open()
            list(reading.tail.received(repeated))
            delay = reading.tail.closed(None)
            if delay is None:
                break
            reading.now += delay
        assert delay is None
        assert reading.tail.offset == 4
        assert reading.now <= 50.0 + SILENCE_SECONDS + 1.0


def test_a_stream_kept_open_by_empty_answers_becomes_overdue() -> None:
    reading = Reading()
    reading.tail.open()
    reading.tail.job_ended(0)
    for _ in range(int(LAG_WINDOW) + 1):
        reading.now += 1.0
        list(reading.tail.received(answer()))
    assert reading.tail.overdue


def test_the_offset_is_the_services() -> None:
    reading = Reading()
    assert reading.tail.open().request.offset == 0
    list(reading.tail.received(answer(b"x", 99_999)))
    assert reading.tail.open().request.offset == 99_999


# What a service shows of a running job's log -------------------------------------------------------------------------


class Service:
    """ReadLogs of one job, by a clock: what is shown while the job runs, and how late.

    :param shown: ``all``, ``live`` (only what is written after the stream was opened) or ``at_end``.
    :param lag: seconds until what was written can be read.
    :param sizes: whether the ended job tells the sizes of its log files.
    :param clean: a stream that has nothing more to show ends at once, also after the job's end.
    """

    def __init__(self, shown: str = "all", *, lag: float = 0.0, sizes: bool = True, clean: bool = True) -> None:
        self.shown, self.lag, self.sizes, self.clean = shown, lag, sizes, clean
        self.now = 100.0
        self.tail = LogTail("bt1job", clock=lambda: self.now)
        self.pieces: list[tuple[float, bytes]] = []
        self.ended_at: float | None = None
        self.seen: list[str] = []
        self.streams = 0

    def write(self, *lines: str) -> None:
        self.pieces += [(self.now, f"{line}\n".encode()) for line in lines]

    def end(self) -> None:
        self.ended_at = self.now

    def read(self, seconds: float = 0.0) -> float | None:
        """One stream that stays open for so long (or until the log's end); returns what the tail says at its end."""
        self.streams += 1
        self.tail.open()
        opened_at, until = self.now, self.now + seconds
        while True:
            self._answer(opened_at)
            if self.now >= until:
                return self.tail.closed(None)
            self.now += 1.0

    def drain(self, *, hangs: bool = False) -> None:
        """The reader learns of the end, and reads until the tail has enough."""
        self.tail.job_ended(sum(len(content) for _, content in self.pieces) if self.sizes else 0)
        begin = self.now
        while (delay := self.read()) is not None:
            self.now += max(delay, 0.001)
            assert self.now - begin < 1000
        self.seen += [str(line) for line in self.tail.decoder.flush()]

    def _answer(self, opened_at: float) -> None:
        running = self.ended_at is None
        if running and self.shown == "at_end":
            return
        end = 0
        for time, content in self.pieces:
            end += len(content)
            if self.now < time + self.lag or end <= self.tail.offset:
                continue
            if running and self.shown == "live" and time < opened_at:
                continue
            response = answer(content, end)
            self.seen += [str(line) for line in self.tail.received(response)]


@pytest.mark.parametrize("sizes", [True, False], ids=["sizes", "no sizes"])
@pytest.mark.parametrize("shown", ["all", "live", "at_end"])
def test_a_log_that_is_read_from_the_start_of_its_job_is_shown_once(shown: str, sizes: bool) -> None:
    service = Service(shown, sizes=sizes)
    service.read()
    service.write("one")
    service.read()
    if shown == "live":  # it was missed between two streams; what follows isn't
        service = Service(shown, sizes=sizes)
        service.tail.open()
        service.write("one")
        service._answer(service.now)
    service.write("two")
    service._answer(service.now)
    service.end()
    service.drain()
    assert service.seen == ["one", "two"]
    assert service.tail.incomplete_reason is None


@pytest.mark.parametrize("sizes", [True, False], ids=["sizes", "no sizes"])
@pytest.mark.parametrize("count", [1, 500])
def test_a_hole_at_the_head_is_completed_after_the_end_and_said(sizes: bool, count: int) -> None:
    """A try that attaches to a running job sees live lines only."""
    service = Service("live", sizes=sizes)
    early = [f"early {number}" for number in range(count)]
    service.write(*early)
    service.now += 60.0
    service.read()
    service.tail.open()
    service.write("live 1", "live 2")
    service._answer(service.now)
    service.now += 30.0
    service.end()
    service.drain()
    assert service.seen == ["live 1", "live 2", REPEATED, *early, "live 1", "live 2"]
    assert service.tail.incomplete_reason is None


def test_a_hole_in_the_middle_is_completed_too() -> None:
    service = Service("live")
    service.tail.open()
    service.write("one")
    service._answer(service.now)
    service.tail.closed("UNAVAILABLE")
    service.now += 5.0
    service.write("two")
    service.now += 5.0
    service.tail.open()
    service.write("three")
    service._answer(service.now)
    service.end()
    service.drain()
    assert service.seen == ["one", "three", REPEATED, "one", "two", "three"]


def test_a_rest_of_a_line_before_the_repetition_is_not_lost() -> None:
    service = Service("live")
    service.write("early")
    service.now += 9.0
    service.tail.open()
    service.pieces.append((service.now, b"no end"))
    service._answer(service.now)
    service.end()
    service.drain()
    assert service.seen == ["no end", REPEATED, "early", "no end"]


@pytest.mark.parametrize("lag", [65.0, 150.0])
def test_a_log_that_is_minutes_behind_is_not_lost(lag: float) -> None:
    for shown in ("all", "live"):
        service = Service(shown, lag=lag)
        service.read()
        service.write(*(f"line {number}" for number in range(5)))
        service.read(seconds=3.0)
        service.end()
        service.drain()
        assert service.seen == [f"line {number}" for number in range(5)]
        assert service.tail.incomplete_reason is None


def test_lines_that_never_come_are_given_up_and_said() -> None:
    service = Service(lag=10_000.0)
    service.read()
    service.write("unseen")
    service.end()
    begin = service.now
    service.drain()
    assert LAG_WINDOW <= service.now - begin <= LAG_WINDOW + 10.0
    assert service.tail.incomplete_reason == "0 of 7 bytes received"
    assert service.streams < 60


def test_a_complete_log_costs_no_reading_from_the_beginning() -> None:
    service = Service()
    service.write("one")
    service.read()
    service.end()
    service.drain()
    assert service.streams == 2
    assert service.seen == ["one"]


def test_a_count_that_ends_early_is_no_proof() -> None:
    """Streams that end before the end of the log, in the lines and in the counting of them."""
    reading = Reading()
    reading.tail.open()
    reading.written = b"0\n1\n2\n3\n"
    list(reading.tail.received(answer(b"", 4)))  # an empty answer takes the reader to what is live
    reading.take(8)
    reading.tail.closed(None)
    reading.tail.job_ended(0)
    for _ in range(100):
        reading.tail.open()
        if reading.tail.offset < 8:
            reading.take(reading.tail.offset + 2)
        if (delay := reading.tail.closed(None)) is None:
            break
        reading.now += delay
    assert delay is None
    assert reading.seen == ["2", "3", REPEATED, "0", "1", "2", "3"]


def test_a_gateway_that_cuts_silent_streams_does_not_end_the_wait_for_a_late_log() -> None:
    reading = Reading()
    reading.tail.job_ended(8)
    for _ in range(2):
        assert reading.stream(code="UNAVAILABLE", seconds=70.0) is not None
    assert reading.stream(b"one\n", b"two\n") is not None
    assert reading.until_given_up() <= SILENCE_SECONDS
    assert reading.tail.incomplete_reason is None
