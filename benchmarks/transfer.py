"""Downloads compared: this provider, curl, and the official SDK where it is installed, from the same server.

Each measurement is a process of its own, so that peak memory is its own too; the variants take turns. Prints one line
per workload and variant: median seconds, ratio to curl, and how far the process grew beyond what it had imported.

::

    python benchmarks/transfer.py [--rounds 5] [--large 500] [--small 200]
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import shutil
import socketserver
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

MEGABYTE = 1000 * 1000

OURS = """
import json, sys, time, resource
from pathlib import Path
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

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
download_job_files(Client(), job.id, output_dir=plan["to"])
print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""

SDK = """
import json, os, sys, time, resource
from pathlib import Path
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
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
download_files(stored, plan["to"])
print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""

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


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def copyfile(self, source, outputfile):  # type: ignore[no-untyped-def]
        self.wfile.flush()
        self.connection.sendfile(source)

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> tuple[Server, str]:
    """A server in a process of its own thread; sendfile keeps it out of the way."""
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def make_files(folder: Path, count: int, size: int) -> list[dict[str, object]]:
    """Files of random bytes with their sha256."""
    import hashlib
    import random

    files: list[dict[str, object]] = []
    for number in range(count):
        digest = hashlib.sha256()
        generator = random.Random(number)
        with (folder / f"{count}-{number}").open("wb") as stream:
            left = size
            while left:
                chunk = generator.randbytes(min(left, MEGABYTE))
                digest.update(chunk)
                stream.write(chunk)
                left -= len(chunk)
        files.append({"path": f"{count}-{number}", "sha256": digest.hexdigest(), "size": size})
    return files


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
    with tempfile.TemporaryDirectory(prefix="transfer-benchmark-") as name:
        work = Path(name)
        (work / "served").mkdir()
        server, url = serve(work / "served")
        workloads = {
            f"1 x {arguments.large} MB": make_files(work / "served", 1, arguments.large * MEGABYTE),
            f"{arguments.small} x 1 MB": make_files(work / "served", arguments.small, MEGABYTE),
        }
        for workload, files in workloads.items():
            for file in files:
                file["url"] = f"{url}/{file['path']}"
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
        server.shutdown()


if __name__ == "__main__":
    main()
