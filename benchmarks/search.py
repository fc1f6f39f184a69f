"""A retry's search for the job of an earlier try, in projects with many others: time, calls and bytes.

    python benchmarks/search.py [--jobs 50000] [--page-delay 0.1]

Below Airflow 3.3 nothing names the job: the retry lists the project, whatever the order of List. The service, in a
process of its own, answers with jobs that were made in advance. They are a hundred days old at most, none of them runs,
and one is the searched one: of a run that began an hour ago, or a hundred days ago.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from typing import Any

from measuring import Machine, save, table
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as messages

from airflow_provider_datasphere.client.connection.settings import Settings
from airflow_provider_datasphere.client.submission.fork import SourceJob
from airflow_provider_datasphere.client.submission.job_key import Key
from airflow_provider_datasphere.client.submission.job_search import find_jobs
from airflow_provider_datasphere.client.sync_client import DataSphereClient

PROJECT, SOURCE = "bt1project00000000000", "bt1source000000000000"
ORDERS = ("newest", "oldest", "shuffled")
DAYS = 100
#: Of one message, which gRPC's own clients enforce, and gateways may.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024


def run_key(begun: float) -> Key:
    """The key of a task of a run that began at this time."""
    since = datetime.fromtimestamp(begun, timezone.utc)
    return Key(("dag", "run", since.isoformat(), "task", -1, 2), "dag.task run", 2, since=since)


class Service:
    """List, from bytes."""

    def __init__(self, page_delay: float) -> None:
        self.calls = self.bytes = 0
        self._page_delay = page_delay
        self._jobs: list[bytes] = []
        self._listed: list[bytes] = []

    def make(self, count: int, runs: list[float]) -> float:
        """Make jobs, with one of each of these runs; return the bytes of one."""
        now, self._jobs = time.time(), []
        mine = {int((now - begun) / (DAYS * 86400) * (count - 1)): begun for begun in runs}
        for number in range(count):
            created = mine.get(number, now - DAYS * 86400 * number / count)
            desc = run_key(created).tag_description(None, "91d0d5f1") if number in mine else f"somebody's {number}"
            job = jobs_pb2.Job(
                id=f"bt1job{number:014}",
                name="train",
                desc=desc,
                project_id=PROJECT,
                parent_job_id=SOURCE,
                status=jobs_pb2.SUCCESS if number % 3 else jobs_pb2.ERROR,
                config="name: train\ncmd: python train.py --rate ${RATE} --data ${DATA}\n" * 10,
            )
            job.created_at.FromSeconds(int(created) + (10 if number in mine else 0))
            job.job_parameters.arguments.add(name="RATE", value="0.001")
            for file in range(6):
                path = jobs_pb2.FileDesc(path=f"checkpoints/model-{file}.bin", var=f"MODEL_{file}")
                job.output_files.add(desc=path, sha256=f"{number:064x}", size_bytes=10**8)
            self._jobs.append(job.SerializeToString())
        return sum(map(len, self._jobs)) / count

    def order(self, order: str) -> None:
        self.calls = self.bytes = 0
        self._listed = list(self._jobs) if order != "oldest" else self._jobs[::-1]
        if order == "shuffled":
            random.Random(1).shuffle(self._listed)

    async def list(self, request: messages.ListProjectJobRequest, context: Any) -> bytes:
        import grpc

        self.calls += 1
        await asyncio.sleep(self._page_delay)
        if request.filter:
            return b""  # none is running
        begin = int(request.page_token or 0)
        end = min(begin + request.page_size, len(self._listed))
        # Field 1, each job with its length, and field 2.
        answer = b"".join(b"\x0a" + _varint(len(job)) + job for job in self._listed[begin:end])
        if len(answer) > MAX_MESSAGE_BYTES:
            text = f"grpc: trying to send message larger than max ({len(answer)} vs. {MAX_MESSAGE_BYTES})"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if end < len(self._listed):
            answer += messages.ListProjectJobResponse(next_page_token=str(end)).SerializeToString()
        self.bytes += len(answer)
        return answer


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


async def _serve(pipe: Connection, page_delay: float) -> None:
    import grpc.aio

    service = Service(page_delay)
    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(service.list, messages.ListProjectJobRequest.FromString)
    name = "yandex.cloud.datasphere.v2.jobs.ProjectJobService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"List": method}),))
    pipe.send(server.add_insecure_port("localhost:0"))
    await server.start()
    while (order := await asyncio.to_thread(pipe.recv))[0] != "end":
        pipe.send(getattr(service, order[0])(*order[1:]) if order[0] != "state" else (service.calls, service.bytes))
    await server.stop(None)


def serve(pipe: Connection, page_delay: float) -> None:
    asyncio.run(_serve(pipe, page_delay))


@dataclass
class Figures:
    """What one search cost."""

    jobs: int
    order: str
    run: str
    found: int
    seconds: float
    cpu_seconds: float
    calls: int
    megabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, action="append", help="default: 1000, 10000 and 50000")
    parser.add_argument("--page-delay", type=float, default=0.1, help="seconds that each page takes")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; -: to the output")
    options = parser.parse_args()
    machine = Machine()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, options.page_delay), daemon=True)
    process.start()

    def ask(*order: Any) -> Any:
        pipe.send(order)
        return pipe.recv()

    port = pipe.recv()
    settings = Settings.from_extra({"endpoint": f"localhost:{port}", "insecure": True, "iam_token": "t1.benchmark"})
    found = []
    for jobs in options.jobs or [1000, 10_000, 50_000]:
        runs = {"an hour ago": time.time() - 3600, f"{DAYS} days ago": time.time() - DAYS * 86400 + 60}
        weight = ask("make", jobs, list(runs.values()))
        for order in ORDERS:
            for name, begun in runs.items():
                client = DataSphereClient(settings)
                ask("order", order)
                clock, cpu = time.monotonic(), time.process_time()
                mine = find_jobs(client, PROJECT, run_key(begun), SourceJob(client, SOURCE))
                seconds, cpu = time.monotonic() - clock, time.process_time() - cpu
                calls, size = ask("state")
                found.append(Figures(jobs, order, name, len(mine), seconds, cpu, calls, size / 1e6))
                client.close()
    pipe.send(("end",))
    process.join(10)
    print(f"A job has {weight / 1000:.1f} KB, a page takes {1000 * options.page_delay:.0f} ms. {machine.verdict()}")
    head = ["jobs", "List begins with", "run began", "found", "time, s", "CPU, s", "calls", "MB"]
    rows = [
        [
            str(one.jobs),
            one.order,
            one.run,
            str(one.found),
            f"{one.seconds:.1f}",
            f"{one.cpu_seconds:.2f}",
            str(one.calls),
            f"{one.megabytes:.1f}",
        ]
        for one in found
    ]
    print(table([head, *rows]))
    save(options.json, {"benchmark": "search", "others": machine.others(), "figures": [asdict(one) for one in found]})


if __name__ == "__main__":
    main()
