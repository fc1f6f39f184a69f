"""A service that costs next to nothing, for ten thousand waiting clients on the same two processors.

It speaks the official protos over TLS, but parses and builds no message while it is measured: each job's answers are
bytes made in advance. The jobs were created an hour ago and compute until they are told to end.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

#: Streams on one connection, as a gateway would limit them.
MAX_CONCURRENT_STREAMS = 100
PROJECT = "bt1project00000000000"


class Service:
    """The jobs, and raw handlers of the methods that a wait calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.first_polls: dict[bytes, float] = {}
        self.ends: dict[bytes, float] = {}
        self._answers: dict[bytes, bytes] = {}
        self._jobs: list[bytes] = []
        self._lines: list[tuple[float, bytes]] = []
        self._ended = asyncio.Event()

    def make_jobs(self, count: int, lines: int, seconds: float) -> list[tuple[str, str]]:
        """Replace all jobs; return the ids of each and of its operation.

        :param lines: log lines of each job, spread over ``seconds`` after the log is opened.
        """
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2
        from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as messages

        self.__init__()  # type: ignore[misc]
        ids = [(f"bt1job{number:014}", f"bt1opr{number:014}") for number in range(count)]
        for number, (job_id, operation_id) in enumerate(ids):
            job = self._job(job_id, number, jobs_pb2.EXECUTING)
            self._answers[job_id.encode()] = job.SerializeToString()
            self._answers[operation_id.encode()] = self._operation(operation_id, job, done=False)
        self._jobs = [self._answers[job_id.encode()] for job_id, _ in ids]
        offset = 0
        for number in range(lines):
            text = f"line {number}\n".encode()
            offset += len(text)
            message = messages.LogMessage(content=text, standard_stream=1)
            response = messages.ReadProjectJobLogsResponse(logs=[message], offset=offset)
            self._lines.append((seconds / lines, response.SerializeToString()))
        return ids

    def end_jobs(self) -> None:
        """All jobs end now, well."""
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        now = time.time()
        for number, job_id in enumerate([name for name in self._answers if name.startswith(b"bt1job")]):
            job = self._job(job_id.decode(), number, jobs_pb2.SUCCESS)
            operation_id = job.id.replace("job", "opr")
            self._answers[job_id] = job.SerializeToString()
            self._answers[operation_id.encode()] = self._operation(operation_id, job, done=True)
            self.ends[job_id] = now
        self._ended.set()

    @staticmethod
    def _job(job_id: str, number: int, status: int) -> Any:
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2

        job = jobs_pb2.Job(
            id=job_id,
            name=f"train-{number}",
            desc=f"[dag.task scheduled__2026-11-22T00:00:00+00:00 airflow:{number:020x} retries:2 request:91d0d5f1]",
            project_id=PROJECT,
            status=status,
            parent_job_id="bt1source000000000000",
            created_by_id="aje1234567890abcdefg",
            config="name: train\ncmd: python train.py --rate ${RATE}\n" * 5,
        )
        job.created_at.FromSeconds(int(time.time()) - 3600)
        job.started_at.FromSeconds(int(time.time()) - 3500)
        for path in ("model.bin", "metrics.json"):
            job.output_files.add(desc=jobs_pb2.FileDesc(path=path), sha256="0" * 64, size_bytes=1000)
        if status == jobs_pb2.SUCCESS:
            job.finished_at.FromSeconds(int(time.time()))
        return job

    @staticmethod
    def _operation(operation_id: str, job: Any, *, done: bool) -> bytes:
        from yandex.cloud.datasphere.v2.jobs import jobs_pb2
        from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as messages
        from yandex.cloud.operation import operation_pb2

        operation = operation_pb2.Operation(id=operation_id, created_at=job.created_at, done=done)
        details = jobs_pb2.JobMetadata(id=job.id, status=job.status, project_id=PROJECT)
        operation.metadata.Pack(messages.ExecuteProjectJobMetadata(job=job, metadata=details))
        if done:
            operation.response.Pack(messages.ExecuteProjectJobResponse())
        return bytes(operation.SerializeToString())

    # The first field of these requests is the id: a tag, a length, and the text.

    async def get(self, request: bytes, _context: Any) -> bytes:
        name = request[2 : 2 + request[1]]
        self.calls["Get"] += 1
        if name not in self.first_polls:
            self.first_polls[name] = time.time()
        return self._answers[name]

    async def list(self, request: bytes, _context: Any) -> bytes:
        """A page of the jobs that run: all, until they end."""
        from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as messages

        self.calls["List"] += 1
        asked = messages.ListProjectJobRequest.FromString(request)
        if self._ended.is_set():
            return b""
        begin = int(asked.page_token or 0)
        end = begin + asked.page_size
        # Field 1: each job, with its length in two bytes.
        page = (b"\x0a" + bytes([len(job) & 127 | 128, len(job) >> 7]) + job for job in self._jobs[begin:end])
        token = str(end) if end < len(self._jobs) else ""
        return b"".join(page) + messages.ListProjectJobResponse(next_page_token=token).SerializeToString()

    async def read_logs(self, request: bytes, _context: Any) -> Any:
        self.calls["ReadLogs"] += 1
        if len(request) > 2 + request[1]:  # an offset: these logs have nothing behind the lines that were read
            return
        for pause, line in self._lines:
            if not self._ended.is_set():
                await asyncio.sleep(pause)
            yield line
        await self._ended.wait()

    async def cancel(self, _request: bytes, _context: Any) -> bytes:
        self.calls["Cancel"] += 1
        return b""


async def _serve(pipe: Connection) -> None:
    import grpc.aio

    from datasphere_emulator.tls import ensure_certificates

    service = Service()
    with tempfile.TemporaryDirectory(prefix="triggerer-benchmark-") as folder:
        certificates = ensure_certificates(Path(folder), [])
        server = grpc.aio.server(options=[("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS)])
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        # Bound late: make_jobs() starts afresh.
        operations = {"Get": unary(service.get)}
        jobs = {"Get": unary(service.get), "List": unary(service.list)}
        jobs |= {"ReadLogs": stream(service.read_logs), "Cancel": unary(service.cancel)}
        for name, methods in (
            ("yandex.cloud.operation.OperationService", operations),
            ("yandex.cloud.datasphere.v2.jobs.ProjectJobService", jobs),
        ):
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
        pair = (certificates.key.read_bytes(), certificates.chain.read_bytes())
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
        await server.start()
        extra = {
            "endpoint": f"localhost:{port}",
            "iam_token": "t1.benchmark",
            "root_certificates": str(certificates.authority),
            "project_id": PROJECT,
        }
        await asyncio.to_thread(pipe.send, extra)
        while True:
            order, *arguments = await asyncio.to_thread(pipe.recv)
            if order == "end":
                break
            answer: Any = None
            if order == "jobs":
                answer = service.make_jobs(*arguments)
            elif order == "finish":
                service.end_jobs()
            else:
                cpu = psutil.Process().cpu_times()
                answer = {
                    "calls": dict(service.calls),
                    "polled": len(service.first_polls),
                    "last_first_poll": max(service.first_polls.values(), default=0.0),
                    "ends": {name.decode(): end for name, end in service.ends.items()} if arguments else {},
                    "cpu": cpu.user + cpu.system,
                }
            await asyncio.to_thread(pipe.send, answer)
        await server.stop(None)


def serve(pipe: Connection) -> None:
    """Run the service; it answers the orders "jobs", "finish", "state" and "end" that come through ``pipe``."""
    asyncio.run(_serve(pipe))
