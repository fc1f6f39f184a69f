"""Downloads compared: this provider, curl, and the official SDK where it is installed, from the same server.

The server is the emulator's storage, in a process of its own. So is each measurement, that its peak memory is its own
too; the variants take turns. Prints one line per workload and variant: median seconds, ratio to curl, and how far the
process grew beyond what it had imported. Ours checks size and sha256 and syncs to the disk; the others do neither.

::

    python benchmarks/transfer.py [--rounds 5] [--large 500] [--small 200]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

MEGABYTE = 1000 * 1000

# Linux: the peak starts from what is resident then. (ru_maxrss starts from what the parent process had.)
PEAK = """
import json, sys, time
from pathlib import Path

def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

"""

OURS = (
    PEAK
    + """
plan = json.loads(Path(sys.argv[1]).read_text())
from yandex.cloud.datasphere.v2.jobs import jobs_pb2 as pb
from airflow_provider_datasphere.client.download import download_job_files
from airflow_provider_datasphere.client.http import Http

stored = [
    pb.StorageFile(
        file=pb.File(
            desc=pb.FileDesc(path=f["path"]), sha256=f["sha256"], size_bytes=f["size"], compression_type=pb.NONE
        ),
        url=f["url"],
    )
    for f in plan["files"]
]
job = pb.Job(id="bt1benchmark", status=pb.SUCCESS, output_files=[s.file for s in stored])

class Client:
    http = Http()
    def get(self, job_id): return job
    def download_urls(self, job_id, files): return stored
    def on_interrupt(self, wake): pass

before = reset_peak()
began = time.perf_counter()
download_job_files(Client(), job.id, output_dir=plan["to"])
print(json.dumps([time.perf_counter() - began, memory("VmHWM") - before]))
"""
)

SDK = (
    PEAK
    + """
plan = json.loads(Path(sys.argv[1]).read_text())
from datasphere.api import jobs_pb2 as pb
from datasphere.files import download_files
stored = [
    pb.StorageFile(
        file=pb.File(
            desc=pb.FileDesc(path=f["path"]), sha256=f["sha256"], size_bytes=f["size"], compression_type=pb.NONE
        ),
        url=f["url"],
    )
    for f in plan["files"]
]
before = reset_peak()
began = time.perf_counter()
download_files(stored, plan["to"])
print(json.dumps([time.perf_counter() - began, memory("VmHWM") - before]))
"""
)

# One curl process for all files, one after the other over one connection; the shell measures nothing.
CURL = """
import json, subprocess, sys, time
from pathlib import Path
plan = json.loads(Path(sys.argv[1]).read_text())
lines = [f'url = "{f["url"]}"\\noutput = "{plan["to"]}/{f["path"]}"' for f in plan["files"]]
config = Path(plan["to"], "config")
config.write_text("\\n".join(lines))
began = time.perf_counter()
subprocess.run(["curl", "--silent", "--show-error", "--fail", "--config", str(config)], check=True)
print(json.dumps([time.perf_counter() - began, 0]))
"""


SERVER = """
import json, sys
from datasphere_emulator import Emulator
with Emulator(tls=False) as emulator:
    storage, project = emulator.core.storage, emulator.project_id
    workloads = []
    for count, size in json.loads(sys.argv[1]):
        files = []
        for number in range(count):
            sha256, _ = storage.register_generated(project, f"{count}-{number}", size)
            storage.path(project, sha256)
            url = storage.get_url(project, sha256)
            files.append({"path": f"file-{number}", "sha256": sha256, "size": size, "url": url})
        workloads.append(files)
    print(json.dumps(workloads), flush=True)
    sys.stdin.read()
"""


def measure(program: str, files: list[dict[str, object]], work: Path) -> tuple[float, int]:
    """Run one variant in a fresh process; seconds, and growth of its resident memory in KiB."""
    to = work / "to"
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    plan = work / "plan.json"
    plan.write_text(json.dumps({"files": files, "to": str(to)}))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(plan)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"A variant failed:\n{done.stderr}")
    missing = [file for file in files if (to / str(file["path"])).stat().st_size != file["size"]]
    if missing:
        raise SystemExit(f"A variant left out {len(missing)} files.")
    seconds, growth = json.loads(done.stdout.splitlines()[-1])
    return seconds, growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=500, help="megabytes of the one large file")
    parser.add_argument("--small", type=int, default=200, help="number of files of one megabyte")
    arguments = parser.parse_args()
    variants = {"curl": CURL, "ours": OURS}
    if subprocess.run([sys.executable, "-c", "import datasphere.files"], capture_output=True).returncode == 0:
        variants["sdk"] = SDK
    sizes = [(1, arguments.large * MEGABYTE), (arguments.small, MEGABYTE)]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, json.dumps(sizes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory(prefix="transfer-benchmark-") as name, server:
        work = Path(name)
        for files in json.loads(server.stdout.readline()):
            workload = f"{len(files)} x {int(files[0]['size']) // MEGABYTE} MB"
            results: dict[str, list[tuple[float, int]]] = {variant: [] for variant in variants}
            for _ in range(arguments.rounds):
                for variant, program in variants.items():
                    results[variant].append(measure(program, files, work))
            base = statistics.median(seconds for seconds, _ in results["curl"])
            for variant, measured in results.items():
                seconds = statistics.median(seconds for seconds, _ in measured)
                growth = max(growth for _, growth in measured) / 1024
                memory = "" if variant == "curl" else f"  RSS growth {growth:6.1f} MiB"
                print(f"{workload:>12}  {variant:<5} {seconds:6.3f} s  {base / seconds:5.2f} x curl{memory}")
        server.stdin.close()


if __name__ == "__main__":
    main()
