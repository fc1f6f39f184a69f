"""Large files over several connections at once, where one alone is slow."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import re
import signal
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yandex.cloud.datasphere.v2.jobs import jobs_pb2

from airflow_provider_datasphere.client.errors import ResultsError
from airflow_provider_datasphere.client.http.client import CHUNK_BYTES
from airflow_provider_datasphere.client.http.errors import TransientTransferError, UrlRejectedError
from airflow_provider_datasphere.client.transfer import file_download, parallel_ranges
from airflow_provider_datasphere.client.transfer.download import download_job_files
from airflow_provider_datasphere.client.transfer.file_download import download_file
from airflow_provider_datasphere.client.transfer.partial_file import LocalPartialFile
from airflow_provider_datasphere.client.transfer.presigned_url import PresignedUrl
from datasphere_emulator import Emulator, Settings
from http_server import http_client, send, served
from stored_jobs import add_output, client_of, ended_job, files_in, gets, kill_when_a_part_has, random_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEBIBYTE = 1024 * 1024
PIECE = 500_000
CONTENT = random_bytes(9 * MEBIBYTE + 12_345)
log = logging.getLogger(__name__)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes are treated like the hundreds of megabytes that nobody wants in a test."""
    monkeypatch.setattr(file_download, "LARGE_BYTES", 4 * MEBIBYTE)
    monkeypatch.setattr(parallel_ranges, "RANGE_BYTES", PIECE)


@pytest.fixture(autouse=True)
def no_lane_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("datasphere-lane")] == []


@pytest.fixture
def slow(emulator: Emulator) -> None:
    """The storage gives each connection 3 MiB a second, and all count as slow."""
    emulator.faults.inject("storage.get", bytes_per_second=3 * MEBIBYTE)


def asked(emulator: Emulator) -> list[tuple[int, int]]:
    """The ranges that were asked for: first and last byte."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", call.request["range"]) for call in gets(emulator)]
    return [(int(match[1]), int(match[2])) for match in ranges if match]


def most_at_once(emulator: Emulator) -> int:
    calls = gets(emulator)
    return max(sum(other.time <= call.time < other.finished for other in calls) for call in calls)


@pytest.mark.usefixtures("slow")
def test_a_slow_connection_gets_company(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"big": CONTENT})
    client = client_of(emulator)
    download_job_files(client, job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {"big": CONTENT}
    first, *others = asked(emulator)
    assert first == (0, len(CONTENT) - 1)  # nobody knew yet that it would be slow
    assert most_at_once(emulator) == parallel_ranges.MAX_CONNECTIONS_PER_FILE
    # Nothing was asked for twice, and nothing left out.
    others.sort()
    assert PIECE <= others[0][0] <= 3 * PIECE
    assert all(one[1] + 1 == two[0] for one, two in itertools.pairwise(others))
    assert others[-1][1] == len(CONTENT) - 1


def test_a_fast_one_stays_alone(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_ranges, "FAST_ENOUGH_BYTES_PER_SECOND", 1.0)
    job_id = ended_job(emulator, {"big": CONTENT})
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {"big": CONTENT}
    assert asked(emulator) == [(0, len(CONTENT) - 1)]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("parallel", [1, 2])
def test_all_files_together_have_so_many_connections(emulator: Emulator, tmp_path: Path, parallel: int) -> None:
    contents = {f"{n}": random_bytes(5 * MEBIBYTE, n) for n in range(2)}
    job_id = ended_job(emulator, contents)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path, max_parallel=parallel)
    assert files_in(tmp_path) == contents
    assert most_at_once(emulator) == parallel


@pytest.mark.usefixtures("slow")
def test_a_lane_makes_way_for_other_files(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"big": CONTENT, "small": b"small"})
    client = client_of(emulator)
    files = {file.desc.path: file for file in client.get(job_id).output_files}
    fetcher = file_download.FileDownloader(client.http, threading.Event(), log, connections=2)
    connections = fetcher._connections
    part = LocalPartialFile(tmp_path / "part", lambda: tmp_path / "big", len(CONTENT))
    thread = threading.Thread(target=fetcher.fetch, args=(PresignedUrl(client, job_id, files["big"]), part))
    thread.start()
    while connections._used < 2:
        assert thread.is_alive()
        time.sleep(0.01)
    with connections:
        while connections._used > 2:  # the second lane ends with its piece
            assert part.size < len(CONTENT) // 2
            time.sleep(0.01)
    thread.join()
    part.commit()
    assert files_in(tmp_path) == {"big": CONTENT}


@pytest.mark.parametrize(
    ("fault", "requests"),
    [({"cut_at": 0.5}, 6), ({"status": 503}, 6), ({"truncate_at": 0.3}, 3), ({"corrupt_at": 0.5}, 1)],
)
def test_lanes_go_on_where_they_broke(emulator: Emulator, tmp_path: Path, fault: dict[str, Any], requests: int) -> None:
    job_id = ended_job(emulator, {"big": CONTENT})
    emulator.faults.inject("storage.get", skip=1, times=requests, bytes_per_second=3 * MEBIBYTE, **fault)
    emulator.faults.inject("storage.get", bytes_per_second=3 * MEBIBYTE)
    download_job_files(client_of(emulator, max_attempts=8), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {"big": CONTENT}


def test_links_that_expire_are_renewed_once_for_all_lanes(tmp_path: Path) -> None:
    with Emulator(Settings(url_lifetime_seconds=1.0), tls=False) as emulator:
        job_id = ended_job(emulator, {"big": CONTENT})
        emulator.faults.inject("storage.get", bytes_per_second=1.5 * MEBIBYTE)
        began = time.monotonic()
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        seconds = time.monotonic() - began
        assert files_in(tmp_path) == {"big": CONTENT}
        refused = [call for call in emulator.journal.calls("storage.get") if not call.effect]
        links = emulator.journal.calls("DownloadJobFiles")
        assert 2 <= len(links) <= 2 + seconds  # more than one lane may meet a link that has expired
        assert len(refused) >= len(links) - 1


def test_a_link_that_expired_counts_once_however_many_lanes_meet_that() -> None:
    file = jobs_pb2.File(sha256="1")

    class Links:
        renewed = 0

        def download_urls(self, *_: object) -> list[jobs_pb2.StorageFile]:
            self.renewed += 1
            return [jobs_pb2.StorageFile(file=file, url=f"https://new-{self.renewed}")]

    links = Links()
    link = PresignedUrl(links, "bt1", file, "https://old")
    for _ in range(parallel_ranges.MAX_CONNECTIONS_PER_FILE):
        with pytest.raises(TransientTransferError, match="the URL was rejected or has expired"):
            link.mark_rejected("https://old", UrlRejectedError("403"))
        assert link.url == "https://new-1"
    assert links.renewed == 1


def test_a_lane_that_fails_for_good_ends_all(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"big": CONTENT})
    emulator.faults.inject("storage.get", skip=2, status=404)
    emulator.faults.inject("storage.get", bytes_per_second=3 * MEBIBYTE)
    with pytest.raises(ResultsError, match="big: localhost answered 404"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("recorded", [len(CONTENT) - 5, len(CONTENT) + 5])
def test_another_size_than_recorded_is_told(emulator: Emulator, tmp_path: Path, recorded: int) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "big", CONTENT, size_bytes=recorded)
    with pytest.raises(ResultsError, match=f"big: .* bytes received, the job records {recorded}"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}


def whole(handler: Any, start: int, end: int) -> None:
    send(handler, CONTENT)


def less(handler: Any, start: int, end: int) -> None:
    end = min(end, start + PIECE - 1000)
    send(handler, CONTENT[start:end], 206, Content_Range=f"bytes {start}-{end - 1}/{len(CONTENT)}")


def more(handler: Any, start: int, end: int) -> None:
    send(handler, CONTENT[start:], 206, Content_Range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")


def another_total_once(handler: Any, start: int, end: int) -> None:
    wrong = 0 < start < 4 * PIECE and end < len(CONTENT)
    if wrong:
        time.sleep(0.3)  # pieces behind it come meanwhile
    total = 17 if wrong else len(CONTENT)
    send(handler, CONTENT[start:end], 206, Content_Range=f"bytes {start}-{end - 1}/{total}")


def without_total(handler: Any, start: int, end: int) -> None:
    send(handler, CONTENT[start:end], 206, Content_Range=f"bytes {start}-{end - 1}/*")


@pytest.mark.parametrize("piece", [PIECE, 2 * CHUNK_BYTES])
@pytest.mark.parametrize("answer", [whole, less, more, another_total_once, without_total])
def test_storages_that_take_ranges_in_their_own_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: Callable[[Any, int, int], None],
    piece: int,
) -> None:
    monkeypatch.setattr(parallel_ranges, "RANGE_BYTES", piece)

    def answer_range(handler: Any) -> None:
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", "bytes=0-")).groups()
        time.sleep(0.05)
        answer(handler, int(first), int(last or len(CONTENT) - 1) + 1)

    class Links:
        def download_urls(self, *_: object) -> list[Any]:
            raise AssertionError

    file = jobs_pb2.File(size_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    part = LocalPartialFile(tmp_path / "part", lambda: tmp_path / "file", len(CONTENT))
    with served(answer_range) as (url, asked), closing(http_client(min_backoff=0.01)) as http:
        file_download.FileDownloader(http, threading.Event(), log).fetch(PresignedUrl(Links(), "bt1", file, url), part)
    part.commit()
    assert files_in(tmp_path) == {"file": CONTENT}
    assert len(asked) > 1
    assert "re-downloading it" not in caplog.text


class TaskTimeout(BaseException):
    pass


@contextmanager
def times_out(seconds: float) -> Iterator[None]:
    """Airflow's way: an exception in the main thread, wherever that is."""

    def ring(*_: object) -> None:
        raise TaskTimeout

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(TaskTimeout):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("size", [len(CONTENT), 4 * PIECE])
def test_a_timeout_of_the_task_ends_all_lanes(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(file_download, "LARGE_BYTES", 4 * PIECE)
    job_id = ended_job(emulator, {"big": CONTENT[:size]})
    # Of the small file, the first lane has nothing left to do then, but to wait for the others.
    emulator.faults.inject("storage.get", bytes_per_second=PIECE // 3, skip=1)
    emulator.faults.inject("storage.get", bytes_per_second=3 * MEBIBYTE)
    client = client_of(emulator)
    (file,) = client.get(job_id).output_files
    with times_out(1.5):
        download_file(client, job_id, file, tmp_path / "big", threading.Event(), log)
    assert len(gets(emulator)) > 2
    assert files_in(tmp_path) == {}


def test_killed_lanes_leave_a_part_that_the_next_download_goes_on_with(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = ended_job(emulator, {"big": CONTENT})
    fault = emulator.faults.inject("storage.get", bytes_per_second=MEBIBYTE)
    program = f"""
        from airflow_provider_datasphere.client.transfer import file_download
        from airflow_provider_datasphere.client.transfer import parallel_ranges
        from airflow_provider_datasphere.client.transfer.download import download_job_files
        from airflow_provider_datasphere.client.sync_client import DataSphereClient
        from airflow_provider_datasphere.client.connection.settings import Settings
        file_download.LARGE_BYTES, parallel_ranges.RANGE_BYTES = {4 * MEBIBYTE}, {PIECE}
        client = DataSphereClient(Settings.from_extra({emulator.connection_extra()!r}))
        download_job_files(client, {job_id!r}, output_dir={str(tmp_path)!r})
    """
    kill_when_a_part_has(4 * MEBIBYTE, tmp_path, program)
    assert not (tmp_path / "big").exists()
    emulator.faults.remove(fault)
    emulator.journal.clear()
    monkeypatch.setattr(parallel_ranges, "FAST_ENOUGH_BYTES_PER_SECOND", 1.0)

    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)

    assert files_in(tmp_path) == {"big": CONTENT}
    # All but what came behind a gap is used, and nothing had to be fetched anew: no gap was taken for content.
    (call,) = gets(emulator)
    assert (
        int(re.findall(r"\d+", call.request["range"])[0])
        >= 4 * MEBIBYTE - parallel_ranges.MAX_CONNECTIONS_PER_FILE * PIECE - CHUNK_BYTES
    )


def test_a_disk_that_is_full_ends_all_lanes(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def full(handle: int, data: bytes, offset: int) -> int:
        if offset > 4 * MEBIBYTE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    job_id = ended_job(emulator, {"big": CONTENT})
    with pytest.raises(ResultsError, match="big: No space left on device"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}


@settings(deadline=None)
@given(st.data())
def test_pieces_may_come_in_any_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = CONTENT[: data.draw(st.integers(1, 3 * CHUNK_BYTES))]
    cuts = sorted({0, len(content), *data.draw(st.lists(st.integers(0, len(content)), max_size=12))})
    pieces = list(itertools.pairwise(cuts))
    folder = tmp_path_factory.mktemp("parts")
    part = LocalPartialFile(
        folder / "part", lambda: folder / "file", data.draw(st.sampled_from([len(content), 1 << 30]))
    )
    came: set[tuple[int, int]] = set()
    for piece in data.draw(st.permutations(pieces)):
        assert part.write_at(content[slice(*piece)], piece[0]) == piece[1] - piece[0]
        came.add(piece)
        assert part.size == next((begin for begin, end in pieces if (begin, end) not in came), len(content))
        assert part.sha256(lambda: None) == hashlib.sha256(content[: part.size]).hexdigest()
    part.commit()
    assert (folder / "file").read_bytes() == content


def test_what_is_behind_a_gap_is_forgotten(tmp_path: Path) -> None:
    part = LocalPartialFile(tmp_path / "part", lambda: tmp_path / "file", 1 << 30)
    part.write(CONTENT[:100])
    part.write_at(CONTENT[200:300], 200)
    part.close_gaps()
    part.write(CONTENT[100:200])
    assert part.size == 200
    part.commit()
    assert (tmp_path / "file").read_bytes() == CONTENT[:200]


@pytest.mark.parametrize("end", [1, CHUNK_BYTES - 5000, CHUNK_BYTES, 3 * CHUNK_BYTES + 1, 8 * CHUNK_BYTES])
def test_a_part_with_gaps_is_used_up_to_the_first(tmp_path: Path, end: int) -> None:
    killed = tmp_path / "part"
    with killed.open("wb") as file:
        file.write(CONTENT[:end])
        file.seek(9 * CHUNK_BYTES)
        file.write(CONTENT[:1000])
    part = LocalPartialFile(killed, lambda: tmp_path / "file", len(CONTENT))
    assert end - CHUNK_BYTES - os.statvfs(tmp_path).f_bsize <= part.size <= end
    assert part.sha256(lambda: None) == hashlib.sha256(CONTENT[: part.size]).hexdigest()
    part.discard()
    assert files_in(tmp_path) == {}


def test_hashing_what_was_left_can_be_stopped(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    (tmp_path / "part").write_bytes(CONTENT)
    part = LocalPartialFile(tmp_path / "part", lambda: tmp_path / "file", len(CONTENT[:1000]))
    with pytest.raises(Stopped):
        part.sha256(stop)
    part.discard()


@pytest.mark.parametrize("expected", [1000, 1 << 30])
def test_a_part_that_somebody_shortens_is_an_error(tmp_path: Path, expected: int) -> None:
    (tmp_path / "part").write_bytes(CONTENT[:1000])
    part = LocalPartialFile(tmp_path / "part", lambda: tmp_path / "file", expected)
    os.truncate(tmp_path / "part", 500)
    with pytest.raises(OSError, match="truncated by another process"):
        part.sha256(lambda: None)
    part.discard()
