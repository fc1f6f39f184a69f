"""Where downloaded files go: never outside the destination, directories unpacked, whatever they are called."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_datasphere.client.errors import ResultsError
from airflow_provider_datasphere.client.transfer.download import download_job_files
from datasphere_emulator import Emulator
from stored_jobs import PEAK, add_output, client_of, ended_job, files_in, only_files, zipped

if TYPE_CHECKING:
    pass

MEBIBYTE = 1024 * 1024


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
    with pytest.raises(ResultsError, match="points outside"):
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    with pytest.raises(ResultsError, match=r"not writable|failed"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path / "file" / "below")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ResultsError, match="is not writable: Permission denied"):
            download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
        tmp_path.chmod(0o700)


def test_a_directory_in_the_place_of_a_file_is_told(emulator: Emulator, tmp_path: Path) -> None:
    (tmp_path / "file" / "sub").mkdir(parents=True)
    job_id = ended_job(emulator, {"file": b"content"})
    with pytest.raises(ResultsError, match="- file: Is a directory"):
        download_job_files(client_of(emulator), job_id, output_dir=tmp_path)


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
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("d/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
        archive.writestr("d/link/passwd", b"evil")
    return buffer.getvalue()


def lying_archive() -> bytes:
    """Declares ten bytes for an entry that has a million."""
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
        (b"no zip at all", "not a readable zip"),
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


def test_the_working_folder_itself_can_be_an_output(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator)
    add_output(emulator, job_id, ".", zipped({"a": b"a", "sub/b": b"b"}), archive=True)
    download_job_files(client_of(emulator), job_id, output_dir=tmp_path)
    assert only_files(tmp_path) == {"a": b"a", "sub/b": b"b"}


def test_a_log_with_the_path_of_an_output_gives_way(emulator: Emulator, tmp_path: Path) -> None:
    job_id = ended_job(emulator, {"stdout.txt": b"the output"})
    add_output(emulator, job_id, "stdout.txt", b"the log", kind="log_files")
    download_job_files(client_of(emulator), job_id, with_logs=True, output_dir=tmp_path)
    assert only_files(tmp_path) == {"stdout.txt": b"the output", "logs/stdout.txt": b"the log"}


@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
def test_a_directory_of_many_files_costs_little_more_than_zipfile_itself(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(50_000):
            archive.writestr(f"directory/sub{number // 500}/file_{number:06}.txt", b"")
    program = f"""
        import zipfile
        from airflow_provider_datasphere.client.transfer.archive import list_archive
        start = reset_peak()
        archive = zipfile.ZipFile({str(tmp_path / "many.zip")!r})
        opened = memory("VmHWM") - start
        listing = list_archive(archive, "directory", 1 << 30)
        assert len(listing.files) == 50_000
        print((memory("VmHWM") - start) / opened)
    """
    program = PEAK + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 1.8
