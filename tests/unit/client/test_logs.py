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

from airflow_provider_datasphere.client.logs import (
    DRAIN_WINDOW,
    MAX_LINE_CHARACTERS,
    SETTLE_WINDOW,
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
    decoder = LogDecoder()
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
    """A log's reader and its clock."""

    def __init__(self, offset: int = 0) -> None:
        self.now = 50.0
        self.tail = LogTail(offset=offset, clock=lambda: self.now)

    def stream(self, *contents: bytes, code: str | None = None, seconds: float = 0.0) -> float | None:
        """Read one stream to its end; returns what the tail says then."""
        self.tail.opened()
        for content in contents:
            list(self.tail.received(answer(content, self.tail.offset + len(content))))
        self.now += seconds
        return self.tail.closed(code)

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
    assert reading.tail.trouble is None


def test_a_silent_job_needs_no_patience() -> None:
    reading = Reading()
    reading.stream()
    reading.tail.job_ended(0)
    assert reading.stream() is None


def test_a_stream_open_at_the_end_of_the_job_is_followed_by_one_more() -> None:
    reading = Reading()
    reading.tail.opened()
    reading.tail.job_ended(4)
    list(reading.tail.received(answer(b"one\n", 4)))
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
    assert reading.until_given_up() <= SETTLE_WINDOW + 1.0
    assert reading.tail.trouble is None


def test_an_early_clean_end_makes_the_next_one_doubtful() -> None:
    reading = Reading()
    reading.stream(b"one\n")
    reading.now += 10.0
    reading.stream()
    reading.tail.job_ended(0)
    assert SETTLE_WINDOW <= reading.until_given_up() <= SETTLE_WINDOW + 1.0


def test_a_broken_stream_makes_a_clean_end_doubtful() -> None:
    reading = Reading()
    reading.stream(b"one\n", code="UNAVAILABLE")
    reading.tail.job_ended(0)
    assert SETTLE_WINDOW <= reading.until_given_up() <= SETTLE_WINDOW + 1.0
    assert reading.tail.trouble is None


def test_what_comes_after_the_end_of_the_job_is_read_to_its_end() -> None:
    reading = Reading()
    reading.tail.job_ended(0)
    for _ in range(100):  # streams that end after each message
        assert reading.stream(b"line\n") == 0.0
    assert reading.until_given_up() <= SETTLE_WINDOW + 1.0


def test_a_refused_stream_holds_an_ended_job_for_a_moment_only() -> None:
    reading = Reading()
    for _ in range(3):
        delay = reading.stream(code="PERMISSION_DENIED")
        assert delay is not None
        reading.now += delay
    reading.tail.job_ended(100)
    assert reading.until_given_up("PERMISSION_DENIED") == 0
    assert "PERMISSION_DENIED" in str(reading.tail.trouble)
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
    assert reading.tail.trouble == "UNAVAILABLE"


def test_an_open_silent_stream_becomes_overdue_after_the_end_of_the_job() -> None:
    reading = Reading()
    reading.tail.opened()
    reading.now += 1000.0
    assert not reading.tail.overdue
    reading.tail.job_ended(0)
    assert not reading.tail.overdue
    reading.now += DRAIN_WINDOW + 1.0
    assert reading.tail.overdue
    assert reading.tail.closed("CANCELLED") is None


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
            reading.tail.opened()
            list(reading.tail.received(repeated))
            delay = reading.tail.closed(None)
            if delay is None:
                break
            reading.now += delay
        assert delay is None
        assert reading.tail.offset == 4
        assert reading.now <= 50.0 + SETTLE_WINDOW + 1.0


def test_a_stream_kept_open_by_empty_answers_becomes_overdue() -> None:
    reading = Reading()
    reading.tail.opened()
    reading.tail.job_ended(0)
    for _ in range(int(DRAIN_WINDOW) + 1):
        reading.now += 1.0
        list(reading.tail.received(answer()))
    assert reading.tail.overdue


def test_the_offset_is_the_services() -> None:
    reading = Reading(offset=1234)
    assert reading.tail.offset == 1234
    list(reading.tail.received(answer(b"x", 99_999)))
    assert reading.tail.offset == 99_999
