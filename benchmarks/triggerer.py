"""A thousand deferred jobs in one triggerer: what they cost, by the way they speak to the service.

    python benchmarks/triggerer.py --jobs 1000

The emulator runs in a process of its own, and so does each policy, one after the other, on jobs of the same kind:

- ``shared``: ``DataSphereJobTrigger``, as the triggerer runs it, with the jobs' logs;
- ``channel per trigger``: each wait opens a channel, polls and reads the log on it, and closes it at the end;
- ``channel per poll``: each poll opens a channel and closes it; no logs;
- ``thread per call``: polls with the synchronous stub on one channel, in the loop's thread pool; no logs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import math
import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

POLICIES = ("shared", "channel per trigger", "channel per poll", "thread per call")
#: Streams that the emulator takes on one connection, as a gateway would.
MAX_CONCURRENT_STREAMS = 100

Job = tuple[str, str]  # its id, and its operation's


@dataclass
class Load:
    """What each policy gets to do."""

    jobs: int
    seconds: float
    poll_interval: float
    lines: int


@dataclass
class Figures:
    """What one policy cost."""

    policy: str
    logs: bool
    done: int = 0
    connections: int = 0
    block_seconds: float = 0.0
    block_cpu_seconds: float = 0.0
    collector_seconds: float = 0.0
    rss_growth_mb: float = 0.0
    threads: int = 0
    cpu_seconds: float = 0.0
    polls: int = 0
    poll_p50: float = 0.0
    poll_p99: float = 0.0
    poll_max: float = 0.0
    noticed_p50: float = 0.0
    noticed_p99: float = 0.0
    noticed_max: float = 0.0
    log_lines: int = 0
    cancels: int = 0


# The service -------------------------------------------------------------------------------------------------------


def serve(pipe: Connection, load: Load) -> None:
    """The emulator; ``pipe`` takes "jobs" and "calls" and gives the answers."""
    from datasphere_emulator import Emulator, Script, Settings
    from datasphere_emulator.script import LogLine

    with Emulator(Settings(max_concurrent_streams=MAX_CONCURRENT_STREAMS)) as emulator:
        pipe.send((emulator.connection_extra(), emulator.endpoint))
        started: dict[str, str] = {}
        while (order := pipe.recv()) != "end":
            if order == "jobs":
                emulator.journal.clear()
                started = {}
                for number in range(load.jobs):
                    # The ends are spread, so that what is measured is the waiting.
                    seconds = load.seconds * (0.6 + 0.4 * number / load.jobs)
                    log = [LogLine(seconds * line / load.lines, f"line {line}\n") for line in range(load.lines)]
                    job_id = emulator.create_scripted_job(Script(executing_seconds=seconds, log=log), execute=True)
                    started[job_id] = emulator.operation_of(job_id)
                pipe.send(list(started.items()))
            else:
                ends = {job.id: job.finished_at.ToNanoseconds() / 1e9 for job in emulator.jobs() if job.id in started}
                pipe.send((Counter(call.method for call in emulator.journal.calls()), ends))


# The policies ------------------------------------------------------------------------------------------------------


class Meter:
    """Measures this process while a policy runs."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process = psutil.Process()
        self.polls: list[float] = []
        self.ended: dict[str, float] = {}
        self.lines = 0
        self.block = self.block_cpu = self.collector = 0.0
        self._collecting = 0.0
        gc.callbacks.append(self._watch_collector)
        self.connections = 0
        self.threads = 0
        self.begin()

    def begin(self) -> None:
        """Count memory and processor from here on."""
        self._rss = self._process.memory_info().rss
        self._cpu = time.process_time()

    def _watch_collector(self, phase: str, _info: dict[str, int]) -> None:
        # It stops every thread, for as long as everything that this process has imported takes it.
        if phase == "start":
            self._collecting = time.perf_counter()
        else:
            self.collector = max(self.collector, time.perf_counter() - self._collecting)

    async def watch(self) -> None:
        """The longest time that the loop didn't turn, by the clock and by what its thread itself did meanwhile.

        On a busy machine the clock also shows how long the processor was given to others.
        """
        last = time.perf_counter(), time.thread_time()
        ticks = 0
        while True:
            await asyncio.sleep(0.01)
            now = time.perf_counter(), time.thread_time()
            self.block = max(self.block, now[0] - last[0] - 0.01)
            self.block_cpu = max(self.block_cpu, now[1] - last[1])
            ticks += 1
            if ticks % 100 == 0:
                count = await asyncio.to_thread(self._count)
                self.connections = max(self.connections, count)
                self.threads = max(self.threads, self._process.num_threads())
            last = time.perf_counter(), time.thread_time()

    def _count(self) -> int:
        connections = self._process.net_connections("tcp")
        return sum(
            1 for each in connections if each.raddr and each.raddr.port == self._port and each.status == "ESTABLISHED"
        )

    def figures(self, policy: str, logs: bool, ends: dict[str, float]) -> Figures:
        polls = sorted(self.polls) or [0.0]
        noticed = sorted(self.ended[job_id] - ends[job_id] for job_id in self.ended if job_id in ends) or [0.0]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Figures(
            policy=policy,
            logs=logs,
            done=len(self.ended),
            connections=self.connections,
            block_seconds=self.block,
            block_cpu_seconds=self.block_cpu,
            collector_seconds=self.collector,
            rss_growth_mb=(peak - self._rss) / 2**20,
            threads=self.threads,
            cpu_seconds=time.process_time() - self._cpu,
            polls=len(self.polls),
            poll_p50=polls[len(polls) // 2],
            poll_p99=polls[int(len(polls) * 0.99)],
            poll_max=polls[-1],
            noticed_p50=noticed[len(noticed) // 2],
            noticed_p99=noticed[int(len(noticed) * 0.99)],
            noticed_max=noticed[-1],
            log_lines=self.lines,
        )


async def _together(waits: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Start them as a triggerer does, which lets the loop turn after each."""
    tasks = []
    for wait in waits:
        tasks.append(asyncio.create_task(wait))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)


async def shared(jobs: list[Job], load: Load, meter: Meter, _extra: dict[str, Any]) -> None:
    """Our trigger, as it is."""
    from airflow_provider_datasphere.client.channels import AsyncChannels
    from airflow_provider_datasphere.triggers.jobs import DataSphereJobTrigger

    call = AsyncChannels.unary

    async def timed(self: AsyncChannels, service: Any, method: str, *arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return await call(self, service, method, *arguments, **options)
        finally:
            meter.polls.append(time.perf_counter() - begun)

    AsyncChannels.unary = timed  # type: ignore[method-assign]

    async def wait(job_id: str, operation_id: str) -> None:
        trigger = DataSphereJobTrigger(
            job_id, operation_id, "benchmark", poll_interval=load.poll_interval, stream_logs=True
        )
        async for event in trigger.run():
            assert event.payload["status"] == "ended", event.payload
            meter.ended[job_id] = time.time()

    await _together(wait(*job) for job in jobs)


async def _poll(job: Job, load: Load, meter: Meter, get: Callable[[Any], Awaitable[Any]]) -> None:
    """The naive wait: a poll, a pause, until the operation is done."""
    from yandex.cloud.operation import operation_service_pb2

    request = operation_service_pb2.GetOperationRequest(operation_id=job[1])
    while True:
        begun = time.perf_counter()
        operation = await get(request)
        meter.polls.append(time.perf_counter() - begun)
        if operation.done:
            meter.ended[job[0]] = time.time()
            return
        await asyncio.sleep(load.poll_interval)


async def channel_per_trigger(jobs: list[Job], load: Load, meter: Meter, extra: dict[str, Any]) -> None:
    from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2, project_job_service_pb2_grpc
    from yandex.cloud.operation import operation_service_pb2_grpc

    metadata = _metadata(extra)

    async def read_log(stub: Any, job_id: str) -> None:
        request = project_job_service_pb2.ReadProjectJobLogsRequest(job_id=job_id)
        async for response in stub.ReadLogs(request, metadata=metadata):
            meter.lines += sum(message.content.count(b"\n") for message in response.logs)

    async def wait(job: Job) -> None:
        async with _open_channel(extra) as channel:
            stub = operation_service_pb2_grpc.OperationServiceStub(channel)
            reader = asyncio.create_task(read_log(project_job_service_pb2_grpc.ProjectJobServiceStub(channel), job[0]))
            await _poll(job, load, meter, lambda request: stub.Get(request, metadata=metadata, timeout=30))
            await reader

    await _together(wait(job) for job in jobs)


async def channel_per_poll(jobs: list[Job], load: Load, meter: Meter, extra: dict[str, Any]) -> None:
    from yandex.cloud.operation import operation_service_pb2_grpc

    metadata = _metadata(extra)

    async def get(request: Any) -> Any:
        async with _open_channel(extra) as channel:
            stub = operation_service_pb2_grpc.OperationServiceStub(channel)
            return await stub.Get(request, metadata=metadata, timeout=60)

    await _together(_poll(job, load, meter, get) for job in jobs)


async def thread_per_call(jobs: list[Job], load: Load, meter: Meter, extra: dict[str, Any]) -> None:
    import grpc
    from yandex.cloud.operation import operation_service_pb2_grpc

    metadata = _metadata(extra)
    with grpc.secure_channel(extra["endpoint"], _credentials(extra)) as channel:
        stub = operation_service_pb2_grpc.OperationServiceStub(channel)

        async def get(request: Any) -> Any:
            return await asyncio.to_thread(stub.Get, request, metadata=metadata, timeout=60)

        await _together(_poll(job, load, meter, get) for job in jobs)


def _metadata(extra: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {extra['iam_token']}"),)


def _credentials(extra: dict[str, Any]) -> Any:
    import grpc

    with open(extra["root_certificates"], "rb") as file:
        return grpc.ssl_channel_credentials(file.read())


def _open_channel(extra: dict[str, Any]) -> Any:
    import grpc.aio

    # Without it gRPC would quietly share one connection between all channels that look alike.
    options = (("grpc.use_local_subchannel_pool", 1),)
    return grpc.aio.secure_channel(extra["endpoint"], _credentials(extra), options=options)


_RUNNERS = {
    "shared": shared,
    "channel per trigger": channel_per_trigger,
    "channel per poll": channel_per_poll,
    "thread per call": thread_per_call,
}


def _count_lines(meter: Meter) -> None:
    """Have what the triggers log counted, in place of being written: what Airflow makes of it is Airflow's cost."""

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            meter.lines += record.getMessage().startswith("line ")

    logger = logging.getLogger("airflow")
    logger.handlers, logger.propagate = [Counting()], False
    logger.setLevel(logging.INFO)
    try:
        import structlog
    except ImportError:
        return

    def count(_logger: Any, _method: str, event: Any) -> Any:
        arguments = event.get("positional_args") or ("",)
        meter.lines += str(event["event"] if "%" not in event["event"] else arguments[0]).startswith("line ")
        raise structlog.DropEvent

    structlog.configure(processors=[count], cache_logger_on_first_use=False)


def run(pipe: Connection, policy: str, load: Load, extra: dict[str, Any]) -> None:
    """One policy, in a process of its own: says that it is ready, gets the jobs, gives the figures."""
    os.environ["AIRFLOW_CONN_BENCHMARK"] = json.dumps({"conn_type": "datasphere", "extra": extra})
    # Imports are paid once in a triggerer's life; they are no part of what a wait costs.
    import grpc.aio  # noqa: F401
    from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2_grpc  # noqa: F401
    from yandex.cloud.operation import operation_service_pb2_grpc  # noqa: F401

    from airflow_provider_datasphere.client import aio, channels, credentials, watch  # noqa: F401
    from airflow_provider_datasphere.hooks.datasphere import DataSphereHook
    from airflow_provider_datasphere.triggers import jobs as triggers  # noqa: F401

    pipe.send("ready")
    jobs = pipe.recv()
    meter = Meter(int(extra["endpoint"].rpartition(":")[2]))
    _count_lines(meter)

    async def measured() -> None:
        # A triggerer has long imported what Airflow needs to look a connection up.
        await DataSphereHook("benchmark").aget_settings()
        meter.begin()
        watcher = asyncio.create_task(meter.watch())
        await _RUNNERS[policy](jobs, load, meter, extra)
        watcher.cancel()

    asyncio.run(measured())
    pipe.send("done")
    logs = policy in ("shared", "channel per trigger")
    pipe.send(meter.figures(policy, logs, pipe.recv()))


# The table ---------------------------------------------------------------------------------------------------------


def measure(policies: list[str], load: Load) -> list[Figures]:
    """The figures of each policy, on one emulator."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    emulator = context.Process(target=serve, args=(theirs, load))
    emulator.start()
    extra, _ = ours.recv()
    found = []
    for policy in policies:
        mine, its = context.Pipe()
        worker = context.Process(target=run, args=(its, policy, load, extra))
        worker.start()
        assert mine.recv() == "ready"
        ours.send("jobs")
        mine.send(ours.recv())
        assert mine.recv() == "done"
        ours.send("calls")
        calls, ends = ours.recv()
        mine.send(ends)
        figures: Figures = mine.recv()
        figures.cancels = calls["Cancel"]
        worker.join()
        found.append(figures)
    ours.send("end")
    emulator.join()
    return found


def table(found: list[Figures]) -> str:
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("reads the logs", lambda f: "yes" if f.logs else "no"),
        ("jobs seen to end", lambda f: str(f.done)),
        ("log lines", lambda f: str(f.log_lines)),
        ("TCP connections, most", lambda f: str(f.connections)),
        ("threads, most", lambda f: str(f.threads)),
        ("longest block of the event loop, s", lambda f: f"{f.block_seconds:.3f}"),
        ("of that, its own computing, s", lambda f: f"{f.block_cpu_seconds:.3f}"),
        ("longest pause of the garbage collector, s", lambda f: f"{f.collector_seconds:.3f}"),
        ("memory growth (peak RSS), MB", lambda f: f"{f.rss_growth_mb:.1f}"),
        ("polls", lambda f: str(f.polls)),
        ("CPU, s", lambda f: f"{f.cpu_seconds:.1f}"),
        ("CPU per poll, ms", lambda f: f"{1000 * f.cpu_seconds / max(1, f.polls):.2f}"),
        ("a poll takes, median, ms", lambda f: f"{1000 * f.poll_p50:.1f}"),
        ("a poll takes, 99 %, ms", lambda f: f"{1000 * f.poll_p99:.1f}"),
        ("a poll takes, longest, ms", lambda f: f"{1000 * f.poll_max:.1f}"),
        ("end noticed after, median, s", lambda f: f"{f.noticed_p50:.2f}"),
        ("end noticed after, 99 %, s", lambda f: f"{f.noticed_p99:.2f}"),
        ("end noticed after, longest, s", lambda f: f"{f.noticed_max:.2f}"),
        ("Cancel calls", lambda f: str(f.cancels)),
    ]
    cells = [["", *(figures.policy for figures in found)]]
    cells += [[name, *(show(figures) for figures in found)] for name, show in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not n else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the longest job runs")
    parser.add_argument("--poll-interval", type=float, default=10.0, help="seconds")
    parser.add_argument("--lines", type=int, default=10, help="log lines of each job")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="default: all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    load = Load(options.jobs, options.seconds, options.poll_interval, options.lines)
    found = measure(options.policy or list(POLICIES), load)
    if options.json:
        print(json.dumps([asdict(figures) for figures in found]))
        return
    streams = math.ceil(load.jobs / 50)
    print(f"{load.jobs} jobs of up to {load.seconds:.0f} s; connections allowed to `shared`: 1 + {streams}")
    print(table(found))


if __name__ == "__main__":
    main()
