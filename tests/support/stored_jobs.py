"""Ended jobs with any files, even such as no honest service would have, in a running emulator."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import textwrap
import time
import zipfile
from typing import TYPE_CHECKING

from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.sync_client import DataSphereClient
from http_server import http_client

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from datasphere_emulator import Emulator

#: For a program in a process of its own: ``before = reset_peak()`` … ``memory("VmHWM") - before`` is what it grew by
#: at most in between, in KiB. (``ru_maxrss`` begins with what the parent process had.) Linux only.
PEAK = """
from pathlib import Path

def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
"""


def client_of(emulator: Emulator, **http: float) -> DataSphereClient:
    """A client that gives up soon; ``http`` changes the limits of its HTTP client further."""
    client = DataSphereClient(Settings.from_extra(emulator.connection_extra()))
    quick = {"max_attempts": 3, "min_backoff": 0.01, "max_backoff": 0.02, "read_timeout": 30.0}
    client.http = http_client(client.settings.root_certificates, **{**quick, **http})
    return client


def ended_job(emulator: Emulator, files: Mapping[str, bytes] | None = None, **fields: Any) -> str:
    """A job that has ended, with these outputs."""
    from datasphere_emulator import Script

    job_id = emulator.create_scripted_job(Script(**fields), execute=True)
    emulator.wait_job(job_id, None)
    for path, content in (files or {}).items():
        add_output(emulator, job_id, path, content)
    return job_id


def add_output(
    emulator: Emulator,
    job_id: str,
    path: str,
    content: bytes,
    *,
    var: str = "",
    archive: bool = False,
    kind: str = "output_files",
    **recorded: Any,
) -> None:
    """Give an ended job one more file.

    :param recorded: fields of ``File`` that don't tell the truth.
    """
    from yandex.cloud.datasphere.v2.jobs import jobs_pb2

    state = emulator.state
    record = state.registry.find(job_id)
    sha256, size = state.storage.put_bytes(record.job.project_id, content)
    fields = {"sha256": sha256, "size_bytes": size, **recorded}
    compression = jobs_pb2.ZIP if archive else jobs_pb2.NONE
    desc = jobs_pb2.FileDesc(path=path, var=var)
    getattr(record.job, kind).append(jobs_pb2.File(desc=desc, compression_type=compression, **fields))


def kill_when_a_part_has(size: int, folder: Path, program: str) -> None:
    """Run a program that downloads to a folder, and kill it once more than so many bytes of a file have come."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > size for path in folder.rglob("*.part")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file with these entries, under exactly these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is, even if zipfile would tidy it
            info.external_attr = 0o644 << 16
            archive.writestr(info, content, compress_type=compression)
    return buffer.getvalue()


def random_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that don't compress, the same each time."""
    return random.Random(seed).randbytes(size)


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden or not; directories end with a slash."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": b"" if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def only_files(folder: Path) -> dict[str, bytes]:
    """The same without the directories."""
    return {name: content for name, content in files_in(folder).items() if not name.endswith("/")}


def gets(emulator: Emulator) -> list[Any]:
    """The calls in which the storage gave out a file."""
    return [call for call in emulator.journal.calls("storage.get") if call.effect]
