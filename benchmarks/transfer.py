"""Downloads compared: this provider, curl, and the official SDK where it is installed, from the same server.

The server is the emulator's storage, in a process of its own. So is each measurement, that its peak memory is its own
too; the variants take turns. Prints one line per workload and variant: median seconds, ratio to curl, median processor
time, its ratio to a bare client's (socket, sha256, file), and how far the process grew beyond what it had imported.
Ours checks size and sha256 and syncs to the disk; curl and the SDK do neither, the bare client checks.
Presigned URLs of the service are always https; plain http shows what encryption hides. A loopback answers at once and
knows no limit; an object storage takes some milliseconds and bounds each connection: so do the last two workloads.

::

    python benchmarks/transfer.py [--rounds 5] [--large 500] [--small 200] [--delay 0.01] [--rate 50]

The verdict after each workload says whether other processes used the machine meanwhile; then only processor times mean
something, and even those less: two busy hyperthreads share a core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import Machine, processor_seconds, save

MEGABYTE = 1000 * 1000

# Linux: the peak starts from what is resident then. (ru_maxrss starts from what the parent process had.)
MEASURING = """
import json, resource, sys, time
from pathlib import Path

def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

def processor():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)

def begin():
    global before, used, began
    before, used, began = reset_peak(), processor(), time.perf_counter()

def end():
    print(json.dumps([time.perf_counter() - began, processor() - used, memory("VmHWM") - before]))

"""

OURS = (
    MEASURING
    + """
plan = json.loads(Path(sys.argv[1]).read_text())
from yandex.cloud.datasphere.v2.jobs import jobs_pb2 as pb
from airflow_provider_datasphere.client.transfer.download import download_job_files
from airflow_provider_datasphere.client.http.client import HttpClient

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
    http = HttpClient(plan["certificates"] or None)
    def get(self, job_id): return job
    def download_urls(self, job_id, files): return stored
    def add_interrupt_callback(self, wake): pass

begin()
download_job_files(Client(), job.id, output_dir=plan["to"])
end()
"""
)

SDK = (
    MEASURING
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
begin()
download_files(stored, plan["to"])
end()
"""
)

# One curl process for all files, one after the other over one connection; the shell measures nothing.
CURL = (
    MEASURING
    + """
import subprocess
plan = json.loads(Path(sys.argv[1]).read_text())
lines = [f'url = "{f["url"]}"\\noutput = "{plan["to"]}/{f["path"]}"' for f in plan["files"]]
config = Path(plan["to"], "config")
if plan["certificates"]:
    lines.insert(0, f'cacert = "{plan["certificates"]}"')
config.write_text("\\n".join(lines))
begin()
subprocess.run(["curl", "--silent", "--show-error", "--fail", "--config", str(config)], check=True)
end()
"""
)

BARE = (
    MEASURING
    + """
import hashlib, socket, ssl
from urllib.parse import urlsplit
plan = json.loads(Path(sys.argv[1]).read_text())
url = urlsplit(plan["files"][0]["url"])
begin()
connection = socket.create_connection((url.hostname, url.port))
if url.scheme == "https":
    context = ssl.create_default_context(cafile=plan["certificates"])
    connection = context.wrap_socket(connection, server_hostname=url.hostname)
buffer = memoryview(bytearray(256 * 1024))
for file in plan["files"]:
    url = urlsplit(file["url"])
    connection.sendall(f"GET {url.path}?{url.query} HTTP/1.1\\r\\nHost: {url.netloc}\\r\\n\\r\\n".encode())
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        head += connection.recv(65536)
    body = head.partition(b"\\r\\n\\r\\n")[2]
    digest, size, filled = hashlib.sha256(), len(body), len(body)
    buffer[:filled] = body
    with open(Path(plan["to"], file["path"]), "wb", buffering=0) as output:
        while True:
            while filled < len(buffer) and size < file["size"]:
                came = connection.recv_into(buffer[filled:])
                filled, size = filled + came, size + came
            digest.update(buffer[:filled])
            output.write(buffer[:filled])
            filled = 0
            if size == file["size"]:
                break
    assert digest.hexdigest() == file["sha256"]
end()
"""
)


SERVER = """
import json, sys
from datasphere_emulator import Emulator
with Emulator(tls=sys.argv[2] == "https") as emulator:
    storage, project = emulator.state.storage, emulator.project_id
    if faults := json.loads(sys.argv[3]):
        emulator.faults.inject("storage.get", **faults)
    workloads = []
    for count, size in json.loads(sys.argv[1]):
        files = []
        for number in range(count):
            sha256, _ = storage.register_generated(project, f"{count}-{number}", size)
            storage.path(project, sha256)
            url = storage.get_url(project, sha256)
            files.append({"path": f"file-{number}", "sha256": sha256, "size": size, "url": url})
        workloads.append(files)
    print(json.dumps([str(emulator.root_certificates or ""), workloads]), flush=True)
    sys.stdin.read()
"""


#: What "with checking on" costs at least, on one core.
SHA256 = """
import hashlib, json, sys, time
chunk, size = bytes(1 << 20), int(sys.argv[1])
digest, began = hashlib.sha256(), time.perf_counter()
for _ in range(size >> 20):
    digest.update(chunk)
print(time.perf_counter() - began)
"""


@dataclass
class Measured:
    seconds: float
    processor: float
    growth: int
    server: float


def measure(program: str, files: list[dict[str, object]], certificates: str, work: Path, server: int) -> Measured:
    """Run one variant in a fresh process.

    :param server: the server's process id.
    """
    to = work / "to"
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    plan = work / "plan.json"
    plan.write_text(json.dumps({"files": files, "to": str(to), "certificates": certificates}))
    # requests, which the SDK uses, takes certificates from the environment alone.
    environment = os.environ | ({"REQUESTS_CA_BUNDLE": certificates} if certificates else {})
    before = processor_seconds(server)
    done = subprocess.run([sys.executable, "-c", program, str(plan)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"A variant failed:\n{done.stderr}")
    missing = [file for file in files if (to / str(file["path"])).stat().st_size != file["size"]]
    if missing:
        raise SystemExit(f"A variant left out {len(missing)} files.")
    return Measured(*json.loads(done.stdout.splitlines()[-1]), processor_seconds(server) - before)


@dataclass
class Figures:
    """Medians of one variant. Times in seconds.

    :param curls: how many times as fast as curl.
    :param bares: processor time as a multiple of the bare client's.
    :param growth: most memory beyond what was imported, bytes.
    :param others: share of the machine that other processes used meanwhile, from 0 to 1.
    """

    workload: str
    variant: str
    seconds: float
    processor: float
    server: float
    curls: float
    bares: float
    growth: int
    others: float


def compare(
    label: str, sizes: list[tuple[int, int]], variants: dict[str, str], rounds: int, **faults: float
) -> list[Figures]:
    """Serve the files by the scheme that begins the label, with these faults, and print each variant's line."""
    found = []
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, json.dumps(sizes), label.split()[0], json.dumps(faults)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory(prefix="transfer-benchmark-") as name, server:
        certificates, workloads = json.loads(server.stdout.readline())
        for files in workloads:
            workload, machine = f"{label}, {len(files)} x {int(files[0]['size']) // MEGABYTE} MB", Machine()
            print(f"\n{workload}")
            results: dict[str, list[Measured]] = {variant: [] for variant in variants}
            for _ in range(rounds):
                for variant, program in variants.items():
                    results[variant].append(measure(program, files, certificates, Path(name), server.pid))
            base = statistics.median(run.seconds for run in results["curl"])
            bare = statistics.median(run.processor for run in results["bare"])
            for variant, runs in results.items():
                seconds, used, served = (
                    statistics.median(getattr(run, field) for run in runs)
                    for field in ("seconds", "processor", "server")
                )
                growth = max(run.growth for run in runs) * 1024
                if variant == "bare":
                    bound = base / ((used + served) / (os.cpu_count() or 1))
                    last = f"  bound {bound:.2f} x curl" if not faults else ""
                else:
                    last = f"  grew {growth / 2**20:6.1f} MiB" if variant != "curl" else ""
                figures = (seconds, used, served, base / seconds, used / bare, growth, machine.others())
                found.append(Figures(workload, variant, *figures))
                print(
                    f"  {variant:<5} {seconds:6.3f} s  {base / seconds:5.2f} x curl"
                    f"  processor {used:5.2f} s = {used / bare:4.2f} x bare  + server {served:5.2f} s{last}",
                    flush=True,
                )
            print(f"  {machine.verdict()}", flush=True)
        server.stdin.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=500, help="megabytes of the one large file")
    parser.add_argument("--small", type=int, default=200, help="number of files of one megabyte")
    parser.add_argument(
        "--delay", type=float, default=0.01, help="seconds to the first byte in the last but one workload"
    )
    parser.add_argument("--rate", type=int, default=50, help="megabytes per second and connection in the last workload")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; -: to the output")
    arguments = parser.parse_args()
    variants = {"curl": CURL, "ours": OURS, "bare": BARE}
    if subprocess.run([sys.executable, "-c", "import datasphere.files"], capture_output=True).returncode == 0:
        variants["sdk"] = SDK
    large = arguments.large * MEGABYTE
    hashing = subprocess.run([sys.executable, "-c", SHA256, str(large)], capture_output=True, text=True, check=True)
    print(
        f"sha256 of {arguments.large} MB alone, in memory: {float(hashing.stdout):.3f} s; {os.cpu_count()} processors"
    )
    small = (arguments.small, MEGABYTE)
    rounds, found = arguments.rounds, []
    for scheme in ("https", "http"):
        found += compare(scheme, [(1, large), small], variants, rounds)
    found += compare(f"https {arguments.delay * 1000:.0f} ms late", [small], variants, rounds, delay=arguments.delay)
    rate = arguments.rate * MEGABYTE
    found += compare(f"https {arguments.rate} MB/s", [(1, large)], variants, rounds, bytes_per_second=rate)
    save(arguments.json, {"benchmark": "transfer", "figures": [asdict(one) for one in found]})


if __name__ == "__main__":
    main()
