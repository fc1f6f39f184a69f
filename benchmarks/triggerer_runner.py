"""Airflow's own trigger runner in a process of its own, without a database behind it, and what it costs.

The supervisor's part is played here: it hands over all triggers at once, as after a restart, and answers the requests
for a connection. All else, from the decryption of a trigger's arguments to the event, is Airflow's code.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from typing import Any
from uuid import uuid4

import psutil

CONNECTION = "benchmark"
#: Lines of jobs' logs that came, in a list so that everybody counts in the same place.
LINES = [0]
OURS = "airflow_provider_datasphere.triggers.jobs.DataSphereJobTrigger"


class Meter:
    """Measures this process, from one :meth:`mark` to the next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process = psutil.Process()
        self._collecting = 0.0
        self.connection_reads = 0
        self.ended: dict[str, float] = {}
        self.failed = 0
        self._begin()
        gc.callbacks.append(self._watch_collector)

    def _begin(self) -> None:
        self.block = self.block_cpu = self.collector = 0.0
        self._cpu, self._since = time.process_time(), time.time()

    def mark(self) -> dict[str, Any]:
        """Return the figures since the last mark."""
        figures = {
            "seconds": time.time() - self._since,
            "cpu_seconds": time.process_time() - self._cpu,
            "block_seconds": self.block,
            "block_cpu_seconds": self.block_cpu,
            "collector_seconds": self.collector,
            "rss": self._process.memory_info().rss,
            "threads": self._process.num_threads(),
            "connections": self._connections(),
            "connection_reads": self.connection_reads,
            "log_lines": LINES[0],
            "ended": dict(self.ended),
            "failed": self.failed,
        }
        self._begin()
        return figures

    def _connections(self) -> int:
        found = self._process.net_connections("tcp")
        return sum(1 for one in found if one.raddr and one.raddr.port == self._port and one.status == "ESTABLISHED")

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
        while True:
            await asyncio.sleep(0.02)
            now = time.perf_counter(), time.thread_time()
            self.block = max(self.block, now[0] - last[0] - 0.02)
            self.block_cpu = max(self.block_cpu, now[1] - last[1])
            last = time.perf_counter(), time.thread_time()


def run(pipe: Connection, policy: str, extra: dict[str, Any], poll_interval: float, stream_logs: bool) -> None:
    """Say that the process is ready, get the jobs, then answer "mark" with figures until "end"."""
    with tempfile.TemporaryDirectory(prefix="triggerer-benchmark-") as home:
        from cryptography.fernet import Fernet

        os.environ |= {
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__FERNET_KEY": Fernet.generate_key().decode(),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "_AIRFLOW_PROCESS_CONTEXT": "client",
            "TRIGGERER_BENCHMARK_EXTRA": json.dumps(extra),
        }
        _run(pipe, policy, extra, poll_interval, stream_logs)


def _run(pipe: Connection, policy: str, extra: dict[str, Any], poll_interval: float, stream_logs: bool) -> None:
    # Imports are paid once in a triggerer's life; they are no part of what a wait costs.
    import triggerer_policies
    from airflow.executors import workloads
    from airflow.executors.workloads.task import TaskInstanceDTO
    from airflow.jobs.triggerer_job_runner import TriggerRunner
    from airflow.models.trigger import Trigger
    from airflow.sdk.execution_time import comms, task_runner

    from airflow_provider_datasphere.client import async_client  # noqa: F401
    from airflow_provider_datasphere.client.connection import grpc_channel, reloading_channels  # noqa: F401
    from airflow_provider_datasphere.client.monitoring import watch  # noqa: F401
    from airflow_provider_datasphere.triggers import jobs as triggers  # noqa: F401

    grpc_channel.load_stubs()
    meter = Meter(int(extra["endpoint"].rpartition(":")[2]))
    _count_lines()

    unset: dict[str, Any] = dict.fromkeys(("host", "schema", "login", "password", "port"))
    connection = comms.ConnectionResult(conn_id=CONNECTION, conn_type="datasphere", extra=json.dumps(extra), **unset)

    class Supervisor:
        """Answers a trigger's requests, at once."""

        _reader_task: Any = None

        async def asend(self, message: Any) -> Any:
            if isinstance(message, comms.GetConnection):
                meter.connection_reads += 1
                return connection
            return None

        def send(self, message: Any) -> Any:
            if isinstance(message, comms.GetConnection):
                return asyncio.run(self.asend(message))
            return None  # such as a secret to mask

    class Runner(TriggerRunner):
        async def init_comms(self) -> None:
            self.comms_decoder = Supervisor()
            self.comms_decoder._reader_task = asyncio.create_task(asyncio.Event().wait())
            task_runner.SUPERVISOR_COMMS = self.comms_decoder
            self.watching = asyncio.create_task(meter.watch())

        async def sync_state_to_supervisor(self, finished_ids: list[int]) -> None:
            while self.events:
                entry = self.events.popleft()
                payload = entry.event.payload
                if payload["status"] == "ended":
                    meter.ended[payload["job_id"]] = time.time()
                else:
                    meter.failed += 1
            meter.failed += len(self.failed_triggers)
            self.failed_triggers.clear()

    def workload(number: int, job_id: str, operation_id: str) -> Any:
        arguments: dict[str, Any] = {
            "job_id": job_id,
            "operation_id": operation_id,
            "poll_interval": poll_interval,
            "stream_logs": stream_logs,
        }
        if policy == OURS:
            link = f"https://datasphere.yandex.cloud/communities/bt1community000000000/projects/x/job/{job_id}"
            arguments |= {"datasphere_conn_id": CONNECTION, "link": link, "on_kill_action": "cancel", "deadline": None}
        return workloads.RunTrigger(
            id=number,
            classpath=policy,
            encrypted_kwargs=Trigger.encrypt_kwargs(arguments),
            ti=TaskInstanceDTO(
                id=uuid4(),
                dag_version_id=uuid4(),
                task_id="train",
                dag_id="dag",
                run_id="scheduled__2026-11-22T00:00:00+00:00",
                try_number=1,
                map_index=number,
                pool_slots=1,
                queue="default",
                priority_weight=1,
            ),
        )

    if policy not in (OURS, *(f"triggerer_policies.{name}" for name in vars(triggerer_policies))):
        raise ValueError(policy)
    pipe.send("ready")
    prepared = [workload(number, *job) for number, job in enumerate(pipe.recv())]
    runner = Runner()

    def listen() -> None:
        meter.mark()
        pipe.send(meter.mark())
        while (order := pipe.recv()) != "end":
            if order == "start":
                runner.to_create.extend(prepared)
                prepared.clear()
            pipe.send(meter.mark())
        # Not by ending each wait: that takes longer than all else.
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    gc.collect()
    asyncio.run(runner.arun())


def _count_lines() -> None:
    """Count what the triggers log, in place of writing it: what Airflow makes of it is Airflow's cost."""
    import logging

    import structlog

    complaints: list[str] = []

    def complain(text: str) -> None:
        complaints.append(text)
        if len(complaints) <= 5:
            sys.stderr.write(f"{text}\n")

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            LINES[0] += text.startswith("line ")
            if record.levelno >= logging.WARNING:
                complain(text)

    logger = logging.getLogger("airflow")
    logger.handlers, logger.propagate = [Counting()], False
    logger.setLevel(logging.INFO)

    def count(_logger: Any, _method: str, event: Any) -> Any:
        arguments = event.get("positional_args") or ("",)
        text = str(event["event"])
        LINES[0] += (str(arguments[0]) if "%" in text else text).startswith("line ")
        if _method in ("warning", "error", "exception"):
            complain(f"{text} {arguments}")
        raise structlog.DropEvent

    structlog.configure(processors=[count], cache_logger_on_first_use=False)
