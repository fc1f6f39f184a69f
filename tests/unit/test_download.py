"""Downloads to a folder: what comes is what the job recorded, or the error says which file isn't and why."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_datasphere.client.download import download_job_files
from airflow_provider_datasphere.client.errors import JobRequestError, ResultsError
from airflow_provider_datasphere.client.results import ResultsGoneError
from datasphere_emulator import Emulator, Script, ScriptedOutput, Settings
from stored_jobs import add_output, client_of, ended_job, zipped

if TYPE_CHECKING:
    from collections.abc import Iterator

MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def running() -> Iterator[Emulator]:
    with Emulator(tls=False) as emulator:
        yield emulator


@pytest.fixture
def emulator(running: Emulator) -> Iterator[Emulator]:
    running.journal.clear()
    yield running
    running.faults.clear()


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden or not; directories end with a slash."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": b"" if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def only_files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_in(folder).items() if not name.endswith("/")}


def gets(emulator: Emulator) -> list[Any]:
    return [call for call in emulator.journal.calls("storage.get") if call.effect]


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
    with pytest.raises(JobRequestError, match=r"files='\*\.parquet' fits no output.*a\.csv"):
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
    with pytest.raises(ResultsError, match="hasn't ended yet.*DataSphereJobSensor") as caught:
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
    emulator.core.registry.find(job_id).job.data_expires_at.FromSeconds(int(time.time()) - 60)
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
    assert "ended as ERROR" in caplog.text


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
    with pytest.raises(ResultsGoneError, match="'gone'"):
        download_job_files(client_of(emulator), job_id, files=["gone"], output_dir=tmp_path)


# What goes wrong on the way


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
    assert "fetching it anew" in caplog.text


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"corrupt_at": 0.5}, "its sha256 is .*, the job records"),
        ({"truncate_at": 0.5}, "the job records 100000"),
        ({"status": 500}, "answered 500"),
        ({"status": 503}, "answered 503"),
        ({"status": 403}, "refuses new links too"),
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
    download_job_files(client_of(emulator, slow_after=0.5), job_id, output_dir=tmp_path)
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
    core = emulator.core
    record = core.registry.find(job_id)
    wrong, _ = core.storage.put_bytes(record.job.project_id, b"x")
    stored = core.storage.path(record.job.project_id, wrong)
    stored.write_bytes(b"y")  # the storage serves something else under this sha256
    add_output(emulator, job_id, "bad", b"x")
    with pytest.raises(ResultsError, match="1 of 3 files(.|\n)*- bad: its sha256 is"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"good": b"good", "other": b"something else"}


# Paths


@pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "a/../../../evil", "..//evil", "/../evil"])
def test_what_would_leave_the_destination_stays_inside(emulator: Emulator, tmp_path: Path, path: str) -> None:
    inside = tmp_path / "in" / "side"
    job_id = ended_job(emulator, {path: b"evil"})
    manifest = download_job_files(client_of(emulator), job_id, output_dir=inside)
    (written,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written.is_relative_to(inside)
    assert manifest[0]["uri"] == f"file://{written}"


def test_two_files_for_one_place_are_refused(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"tmp/x": b"1", "/tmp/x": b"2"})
    with pytest.raises(ResultsError, match=r"'tmp/x' and '/tmp/x'.*files=\["):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {}


def test_a_link_in_the_destination_that_leads_out_is_not_followed(emulator: Emulator, tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "sub").symlink_to(outside)
    job_id = ended_job(emulator, {"sub/file": b"content", "ok": b"ok"})
    with pytest.raises(ResultsError, match="leads outside"):
        download_job_files(client_of(emulator), job_id, output_dir=inside)
    assert files_in(outside) == {}
    assert (inside / "ok").read_bytes() == b"ok"


_names = st.lists(
    st.one_of(
        st.sampled_from(
            ["..", ".", "", "/", "a", "b", "foo", "foo.part", ".datasphere", "~", "CON", "\n", "é", "a" * 300]
        ),
        st.text(st.characters(blacklist_categories=["Cs"]), max_size=8),
    ),
    min_size=1,
    max_size=5,
).map("/".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(_names, min_size=1, max_size=4, unique=True))
def test_whatever_the_names_nothing_is_written_outside(
    running: Emulator, tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    root = tmp_path_factory.mktemp("root")
    inside = root / "a" / "b" / "c" / "d" / "e" / "f"
    contents = {name: f"{number}".encode() for number, name in enumerate(names)}
    job_id = ended_job(running)
    for name, content in contents.items():
        add_output(running, job_id, name, content)
    try:
        manifest = download_job_files(client_of(running), job_id, output_dir=inside)
    except ResultsError:
        manifest = []
    for path in root.rglob("*"):
        assert path.is_relative_to(inside) or inside.is_relative_to(path)
    for entry in manifest:
        assert Path(entry["uri"].removeprefix("file://")).read_bytes() == contents[entry["path"]]


def test_a_read_only_destination_says_so(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(ResultsError, match=r"can't be written|could"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path / "file" / "below")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ResultsError, match="can't be written: Permission denied"):
            download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        tmp_path.chmod(0o700)


def test_a_directory_in_the_place_of_a_file_is_told(emulator: Emulator, tmp_path: Path) -> None:
    (tmp_path / "file" / "sub").mkdir(parents=True)
    job_id = ended_job(emulator, {"file": b"content"})
    with pytest.raises(ResultsError, match="- file: Is a directory"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)


# Directories


def test_directories_are_unpacked_where_they_belong(emulator: Emulator, tmp_path: Path) -> None:
    job_id = emulator.create_job(
        "mkdir -p out/model/deep out/model/empty && echo weights > out/model/deep/w.bin && echo hi > out/model/readme",
        outputs=["out/model"],
        execute=True,
    )
    emulator.wait_job(job_id)
    (entry,) = download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert files_in(tmp_path) == {
        "out/": b"",
        "out/model/": b"",
        "out/model/deep/": b"",
        "out/model/deep/w.bin": b"weights\n",
        "out/model/empty/": b"",
        "out/model/readme": b"hi\n",
    }
    assert entry["uri"] == f"file://{tmp_path}/out/model/"


def test_an_archive_without_the_directorys_name_is_unpacked_at_the_same_place(
    emulator: Emulator, tmp_path: Path
) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "out/model", zipped({"w.bin": b"w", "sub/x": b"x"}), archive=True)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"out/model/w.bin": b"w", "out/model/sub/x": b"x"}


def symlink_archive() -> bytes:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("d/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
        archive.writestr("d/link/passwd", b"evil")
    return buffer.getvalue()


def lying_archive() -> bytes:
    """Declares ten bytes for an entry that has a million."""
    import zipfile

    content = bytearray(zipped({"d/bomb": bytes(1_000_000)}, zipfile.ZIP_DEFLATED))
    size = (1_000_000).to_bytes(4, "little")
    small = (10).to_bytes(4, "little")
    return bytes(content.replace(size, small))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped({"d/ok": b"1", "../evil": b"2"}), r"'\.\./evil' would be written outside"),
        (zipped({"d/../../evil": b"2"}), "would be written outside"),
        (zipped({"/etc/evil": b"2"}), "would be written outside"),
        (zipped({"d/x": b"1", "d/x/y": b"2"}), "is a file and a directory"),
        (symlink_archive(), "is a link or a device"),
        (lying_archive(), "damaged"),
        (zipped({"d/zeros": bytes(100 * MEBIBYTE)}, 8), "zip bomb"),
        (b"no zip at all", "no readable zip"),
    ],
    ids=["dotdot", "dotdot-inside", "absolute", "file-and-directory", "symlink", "lie", "bomb", "no-zip"],
)
def test_bad_archives_write_nothing(emulator: Emulator, tmp_path: Path, content: bytes, reason: str) -> None:
    inside = tmp_path / "inside"
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", content, archive=True)
    with pytest.raises(ResultsError, match=f"- d: .*{reason}"):
        download_job_files(client_of(emulator), job_id, output_dir=inside)
    assert only_files(tmp_path) == {}


def test_an_existing_directory_is_completed_and_other_files_in_it_stay(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", zipped({"d/a": b"new", "d/sub/b": b"b"}), archive=True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"old")
    (tmp_path / "d" / "mine").write_bytes(b"mine")
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"d/a": b"new", "d/sub/b": b"b", "d/mine": b"mine"}


# Again


def test_a_second_run_fetches_only_what_is_not_right(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"same": b"same", "changed": b"changed", "lost": b"lost", "empty": b""})
    add_output(emulator, job_id, "d", zipped({"d/x": b"x" * 200_000}), archive=True)
    client = client_of(emulator)
    first = download_job_files(client, job_id, output_dir=tmp_path)
    (tmp_path / "changed").write_bytes(b"CHANGED")
    (tmp_path / "lost").unlink()
    kept = (tmp_path / "same").stat()
    emulator.journal.clear()

    assert download_job_files(client, job_id, output_dir=tmp_path) == first

    assert only_files(tmp_path) == {
        "same": b"same",
        "changed": b"changed",
        "lost": b"lost",
        "empty": b"",
        "d/x": b"x" * 200_000,
    }
    assert (tmp_path / "same").stat().st_mtime_ns == kept.st_mtime_ns
    by_content = {call.request["sha256"]: call.request["range"] for call in gets(emulator)}
    # Of the directory only its archive's table of contents was looked at.
    assert by_content.pop(first[-1]["sha256"]).startswith("bytes=")
    assert set(by_content) == {hashlib.sha256(content).hexdigest() for content in (b"changed", b"lost")}


def test_a_directory_with_a_changed_file_is_unpacked_again(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, "d", zipped({"d/x": b"right", "d/y": b"y"}), archive=True)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    (tmp_path / "d/x").write_bytes(b"wrong")
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"d/x": b"right", "d/y": b"y"}


def test_a_killed_download_leaves_nothing_visible_and_the_next_one_goes_on(emulator: Emulator, tmp_path: Path) -> None:
    content = random_bytes(6 * MEBIBYTE)
    job_id = ended_job(emulator, {"big": content, "dir/small": b"small"})
    client = client_of(emulator)
    fault = emulator.faults.inject("storage.get", bytes_per_second=3 * MEBIBYTE)
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from airflow_provider_datasphere.client.download import download_job_files
        from airflow_provider_datasphere.client.jobs import DataSphereClient
        from airflow_provider_datasphere.client.settings import Settings
        client = DataSphereClient(Settings.from_extra({emulator.connection_extra()!r}))
        download_job_files(client, {job_id!r}, output_dir={str(tmp_path)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 2 * MEBIBYTE for path in tmp_path.rglob("*.part")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "big").exists()
    assert all(path.name.startswith(".datasphere-") for path in tmp_path.iterdir() if path.name != "dir")
    emulator.faults.remove(fault)
    emulator.journal.clear()

    download_job_files(client, job_id, output_dir=tmp_path)

    assert files_in(tmp_path) == {"big": content, "dir/": b"", "dir/small": b"small"}
    (call,) = [call for call in gets(emulator) if call.request["sha256"] == hashlib.sha256(content).hexdigest()]
    assert int(call.request["range"].removeprefix("bytes=").rstrip("-")) > 2 * MEBIBYTE


def test_two_downloads_to_one_folder_do_not_disturb_each_other(emulator: Emulator, tmp_path: Path) -> None:
    contents = {f"f{n}": random_bytes(300_000, n) for n in range(4)}
    job_id = ended_job(emulator, contents)
    emulator.faults.inject("storage.get", bytes_per_second=1_000_000)
    errors: list[BaseException] = []

    def download() -> None:
        try:
            download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=download) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files_in(tmp_path) == contents


def test_the_folder_of_a_living_download_is_left_alone(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"file": b"content"})
    theirs = tmp_path / f".datasphere-{job_id}"
    theirs.mkdir()
    (theirs / "x.part").write_bytes(b"x")
    handle = os.open(theirs, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    os.close(handle)
    assert only_files(tmp_path) == {"file": b"content", f".datasphere-{job_id}/x.part": b"x"}


def test_an_output_with_the_temporary_folders_name_is_safe(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    path = f".datasphere-{job_id}/mine"
    add_output(emulator, job_id, path, b"mine")
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {path: b"mine"}


# Being told


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


def test_a_private_certificate_authority_is_trusted_beside_the_systems(tmp_path: Path) -> None:
    with Emulator(tls=True) as emulator:
        job_id = ended_job(emulator, {"file": b"content"})
        assert emulator.url.startswith("https://")
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        assert only_files(tmp_path) == {"file": b"content"}
        # Without it the storage isn't trusted, and the error says so without the signed part of the link.
        client = client_of(emulator)
        from airflow_provider_datasphere.client.http import Http

        client.http = Http(attempts=1)
        with pytest.raises(ResultsError, match="TLS failed") as caught:
            download_job_files(client, job_id, output_dir=tmp_path / "other")
        assert "X-Amz" not in str(caught.value)


@pytest.mark.skipif("DATASPHERE_TEST_LARGE" not in os.environ, reason="DATASPHERE_TEST_LARGE=1: needs 11 GB of disk")
def test_five_gigabytes_in_bounded_memory(tmp_path: Path) -> None:
    import resource

    with Emulator(tls=False) as emulator:
        job_id = emulator.create_scripted_job(
            Script(outputs={"huge": ScriptedOutput(size=5 * 1024**3)}), outputs=["huge"], execute=True
        )
        emulator.wait_job(job_id, timeout=120)
        program = f"""
            import resource
            from airflow_provider_datasphere.client.download import download_job_files
            from airflow_provider_datasphere.client.jobs import DataSphereClient
            from airflow_provider_datasphere.client.settings import Settings
            client = DataSphereClient(Settings.from_extra({emulator.connection_extra()!r}))
            client.get({job_id!r})
            client.http
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            download_job_files(client, {job_id!r}, output_dir={str(tmp_path)!r})
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True, text=True
        )
        assert (tmp_path / "huge").stat().st_size == 5 * 1024**3
        assert int(done.stdout) * 1024 <= 64 * MEBIBYTE
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


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
