"""The interceptor over a real socket: journal, authentication, faults."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from yandex.cloud.datasphere.v2.jobs import jobs_pb2
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2 as messages
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2_grpc as stubs
from yandex.cloud.operation import operation_pb2

from datasphere_emulator.faults import Faults
from datasphere_emulator.iam import Iam
from datasphere_emulator.interceptor import JournalInterceptor, current_subject, short_name
from datasphere_emulator.journal import Call, Journal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROJECT = "bt1projectprojectpro"
Code = grpc.StatusCode


class Jobs(stubs.ProjectJobServiceServicer):
    """Just enough of a service to see what reaches it."""

    def __init__(self) -> None:
        self.subjects: list[str | None] = []
        self.clones = 0

    async def Get(self, request: Any, context: Any) -> jobs_pb2.Job:
        self.subjects.append(current_subject.get())
        if request.job_id == "unknown":
            await context.abort(Code.NOT_FOUND, "Job unknown is not found.")
        if request.job_id == "broken":
            raise RuntimeError("a defect in the handler")
        return jobs_pb2.Job(id=request.job_id)

    async def Clone(self, request: Any, context: Any) -> operation_pb2.Operation:
        self.clones += 1
        operation = operation_pb2.Operation(id="bt1operation", done=True)
        operation.metadata.Pack(messages.CloneProjectJobMetadata(project_id=PROJECT, job_id="bt1clone"))
        return operation

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for number in range(5):
            yield messages.ReadProjectJobLogsResponse(offset=number + 1)
        if request.offset == -1:
            await asyncio.sleep(3600)


@dataclasses.dataclass
class Service:
    channel: grpc.aio.Channel
    stub: Any
    jobs: Jobs
    journal: Journal
    faults: Faults
    iam: Iam
    subject: str
    metadata: tuple[tuple[str, str], ...]

    async def get(self, job_id: str = "bt1job", **options: Any) -> Any:
        options.setdefault("metadata", self.metadata)
        return await self.stub.Get(messages.GetProjectJobRequest(job_id=job_id), **options)

    async def refusal(self, job_id: str = "bt1job", **options: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.get(job_id, **options)
        return refused.value

    async def finished(self, method: str) -> Call:
        """The only call of a method, once it has ended on the server's side too."""
        for _ in range(500):
            (call,) = self.journal.calls(method)
            if call.finished is not None:
                return call
            await asyncio.sleep(0.01)
        raise AssertionError(f"{method} is still running")


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    journal, faults, iam, jobs = Journal(), Faults(), Iam(PROJECT), Jobs()
    server = grpc.aio.server(interceptors=[JournalInterceptor(journal, faults, iam)])
    stubs.add_ProjectJobServiceServicer_to_server(jobs, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    subject = iam.default_service_account_id
    metadata = (("authorization", f"Bearer {iam.issue_token(subject)}"), ("idempotency-key", "abc"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(channel, stubs.ProjectJobServiceStub(channel), jobs, journal, faults, iam, subject, metadata)
    await server.stop(None)


async def read_logs(service: Service, offset: int = 0) -> tuple[int, grpc.StatusCode]:
    """How many messages came, and how the stream ended."""
    stream = service.stub.ReadLogs(
        messages.ReadProjectJobLogsRequest(job_id="bt1job", offset=offset), metadata=service.metadata
    )
    received = 0
    try:
        async for _ in stream:
            received += 1
    except grpc.aio.AioRpcError as error:
        return received, error.code()
    return received, await stream.code()


def test_short_names():
    jobs = "/yandex.cloud.datasphere.v2.jobs.ProjectJobService/Execute"
    assert short_name(jobs) == "Execute"
    assert short_name("/yandex.cloud.operation.OperationService/Get") == "Operation.Get"
    assert short_name("/yandex.cloud.datasphere.v2.ProjectService/List") == "Project.List"
    assert short_name("/yandex.cloud.iam.v1.IamTokenService/Create") == "IamToken.Create"
    assert short_name("/yandex.cloud.endpoint.ApiEndpointService/List") == "Endpoint.List"


async def test_a_call_is_recorded_without_its_token(service):
    await service.get(timeout=30)
    (call,) = service.journal.calls()
    assert (call.method, call.job_id, call.code, call.effect) == ("Get", "bt1job", "OK", True)
    assert call.subject == service.subject
    assert call.request == {"job_id": "bt1job"}
    assert call.metadata["idempotency-key"] == "abc"
    assert 20 < call.deadline < 31  # on the wire it is rounded up
    assert "127.0.0.1" in call.peer
    assert call.finished >= call.time
    token = service.metadata[0][1].split()[1]
    assert token not in repr(call)
    assert len(call.token) == 16
    assert service.jobs.subjects == [service.subject]


async def test_the_answers_new_job_is_recorded_with_clone(service):
    await service.stub.Clone(messages.CloneProjectJobRequest(source_job_id="bt1source"), metadata=service.metadata)
    (call,) = service.journal.calls("Clone")
    assert (call.job_id, call.operation_id) == ("bt1clone", "bt1operation")
    assert call.request["source_job_id"] == "bt1source"


async def test_errors_of_handlers_are_recorded(service):
    assert (await service.refusal("unknown")).code() is Code.NOT_FOUND
    assert (await service.refusal("broken")).code() is Code.UNKNOWN
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Cancel(messages.CancelProjectJobRequest(job_id="bt1job"), metadata=service.metadata)
    assert refused.value.code() is Code.UNIMPLEMENTED
    assert [call.code for call in service.journal.calls()] == ["NOT_FOUND", "UNKNOWN", "UNIMPLEMENTED"]


async def test_methods_nobody_serves_are_recorded_too(service):
    call = service.channel.unary_unary("/yandex.cloud.operation.OperationService/Get")(b"")
    assert await call.code() is Code.UNIMPLEMENTED
    assert [(call.method, call.code) for call in service.journal.calls()] == [("Operation.Get", "UNIMPLEMENTED")]


async def test_a_call_without_a_valid_token_never_reaches_the_handler(service):
    expired = service.iam.issue_token(service.subject, lifetime=0)
    revoked = service.iam.issue_token(service.subject)
    service.iam.revoke(token=revoked)
    valid = service.iam.issue_token(service.subject)
    for header in ("", "Bearer t1.unknown", f"Bearer {expired}", f"Bearer {revoked}", f"Basic {valid}", valid):
        metadata = (("authorization", header),) if header else ()
        assert (await service.refusal(metadata=metadata)).code() is Code.UNAUTHENTICATED
    assert (await service.get(metadata=(("authorization", f"bearer {valid}"),))).id == "bt1job"
    assert service.jobs.subjects == [service.subject]
    calls = service.journal.calls()
    assert [call.code for call in calls] == ["UNAUTHENTICATED"] * 6 + ["OK"]
    assert [call.effect for call in calls] == [False] * 6 + [True]


async def test_a_refusal_a_number_of_times_and_after_some_calls(service):
    service.faults.inject("Get", code="INTERNAL", message="boom", times=2, skip=1)
    await service.get()
    for _ in range(2):
        refused = await service.refusal()
        assert (refused.code(), refused.details()) == (Code.INTERNAL, "boom")
    await service.get()
    assert [call.code for call in service.journal.calls()] == ["OK", "INTERNAL", "INTERNAL", "OK"]
    assert [call.effect for call in service.journal.calls()] == [True, False, False, True]
    assert service.faults.active() == []


async def test_faults_for_one_job_one_account_all_methods(service):
    service.faults.inject("Get", code="UNAVAILABLE", job_id="bt1other")
    service.faults.inject("*", code="PERMISSION_DENIED", subject="somebody else")
    await service.get()
    assert (await service.refusal("bt1other")).code() is Code.UNAVAILABLE
    service.faults.clear()
    service.faults.inject("*", code=Code.PERMISSION_DENIED, subject=service.subject)
    assert (await service.refusal()).code() is Code.PERMISSION_DENIED
    assert (await read_logs(service)) == (0, Code.PERMISSION_DENIED)


async def test_a_source_job_matches_clone(service):
    service.faults.inject("Clone", code="UNAVAILABLE", job_id="bt1source")
    for source, refused in (("bt1source", True), ("bt1other", False)):
        call = service.stub.Clone(messages.CloneProjectJobRequest(source_job_id=source), metadata=service.metadata)
        assert (await call.code() is Code.UNAVAILABLE) is refused


async def test_a_lost_answer_has_its_effect(service):
    service.faults.inject("Clone", lost_answer=True, times=1)
    call = service.stub.Clone(messages.CloneProjectJobRequest(source_job_id="bt1source"), metadata=service.metadata)
    assert await call.code() is Code.UNAVAILABLE
    assert service.jobs.clones == 1
    (call,) = service.journal.calls("Clone")
    assert (call.code, call.effect, call.job_id) == ("UNAVAILABLE", True, "bt1clone")


async def test_a_delay_comes_before_the_handler(service):
    service.faults.inject("Get", delay=0.1, times=1)
    await service.get()
    (call,) = service.journal.calls()
    assert call.finished - call.time >= 0.1
    assert call.code == "OK"


async def test_a_hanging_call_ends_with_its_deadline(service):
    service.faults.inject("Get", hang=True)
    assert (await service.refusal(timeout=0.2)).code() is Code.DEADLINE_EXCEEDED
    assert (await service.finished("Get")).code == "DEADLINE_EXCEEDED"
    assert service.jobs.subjects == []


async def test_a_hanging_call_ends_with_the_clients_cancel(service):
    service.faults.inject("Get", hang=True)
    call = service.stub.Get(messages.GetProjectJobRequest(job_id="bt1job"), metadata=service.metadata)
    while not service.journal.count("Get"):
        await asyncio.sleep(0.01)
    call.cancel()
    assert (await service.finished("Get")).code == "CANCELLED"


async def test_a_hanging_call_is_handled_when_the_fault_is_removed_from_another_thread(service):
    fault = service.faults.inject("Get", hang=True, times=1)
    call = asyncio.ensure_future(service.get())
    while not service.journal.count("Get"):
        await asyncio.sleep(0.01)
    assert [active["id"] for active in service.faults.active()] == [fault]
    await service.get()
    assert not call.done()
    thread = threading.Thread(target=service.faults.remove, args=(fault,))
    thread.start()
    assert (await asyncio.wait_for(call, 10)).id == "bt1job"
    thread.join()
    with pytest.raises(KeyError):
        service.faults.remove(fault)


async def test_clearing_lets_hanging_calls_go(service):
    service.faults.inject("*", hang=True)
    calls = [asyncio.ensure_future(service.get()) for _ in range(3)]
    while service.journal.count("Get") < 3:
        await asyncio.sleep(0.01)
    service.faults.clear()
    assert len(await asyncio.wait_for(asyncio.gather(*calls), 10)) == 3


def test_a_fault_outlives_the_loop_of_a_call_that_hung_in_it():
    faults = Faults()
    fault = faults.inject("Get", hang=True)

    async def hang() -> None:
        await faults.apply(Call("Get"))

    loop = asyncio.new_event_loop()
    task = loop.create_task(hang())
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert not task.done()
    faults.remove(fault)
    assert faults.active() == []
    task._log_destroy_pending = False


async def test_a_stream_is_cut_after_some_messages(service):
    assert await read_logs(service) == (5, Code.OK)
    service.faults.inject("ReadLogs", after_messages=2, times=1)
    assert await read_logs(service) == (2, Code.OK)
    service.faults.inject("ReadLogs", after_messages=3, code="UNAVAILABLE", times=1)
    assert await read_logs(service) == (3, Code.UNAVAILABLE)
    service.faults.inject("ReadLogs", after_messages=0, code="INTERNAL", times=1)
    assert await read_logs(service) == (0, Code.INTERNAL)
    service.faults.inject("ReadLogs", code="UNAVAILABLE", times=1)
    assert await read_logs(service) == (0, Code.UNAVAILABLE)
    service.faults.inject("ReadLogs", after_messages=100, code="UNAVAILABLE", times=1)
    assert await read_logs(service) == (5, Code.OK)
    codes = [call.code for call in service.journal.calls("ReadLogs")]
    assert codes == ["OK", "OK", "UNAVAILABLE", "INTERNAL", "UNAVAILABLE", "OK"]


async def test_a_running_stream_is_in_the_journal_and_ends_with_the_clients_cancel(service):
    stream = service.stub.ReadLogs(
        messages.ReadProjectJobLogsRequest(job_id="bt1job", offset=-1), metadata=service.metadata
    )
    for _ in range(5):
        await stream.read()
    (call,) = service.journal.calls("ReadLogs")
    assert (call.code, call.finished) == ("", None)
    stream.cancel()
    assert (await service.finished("ReadLogs")).code == "CANCELLED"


async def test_a_rate_limit_lets_some_calls_through(service):
    service.faults.inject("Get", rate_limit=2.0)
    codes = []
    for _ in range(6):
        call = service.stub.Get(messages.GetProjectJobRequest(job_id="bt1job"), metadata=service.metadata)
        codes.append(await call.code())
    assert codes[:2] == [Code.OK, Code.OK]
    assert Code.RESOURCE_EXHAUSTED in codes
    await asyncio.sleep(0.6)
    await service.get()


async def test_probability_is_reproducible(service):
    async def outcomes(faults: Faults) -> list[bool]:
        faults.inject("Get", code="UNAVAILABLE", probability=0.5)
        return [await faults.apply(Call("Get")) is not None for _ in range(50)]

    first = await outcomes(Faults(seed=7))
    assert first == await outcomes(Faults(seed=7))
    assert first != await outcomes(Faults(seed=8))
    assert 10 < sum(first) < 40


async def test_delays_add_up_and_the_first_refusal_wins(service):
    service.faults.inject("*", delay=0.05)
    service.faults.inject("Get", delay=0.05)
    service.faults.inject("Get", code="INTERNAL", times=1)
    second = service.faults.inject("Get", code="UNAVAILABLE", times=1)
    assert (await service.refusal()).code() is Code.INTERNAL
    assert [active["fired"] for active in service.faults.active() if active["id"] == second] == [0]
    assert (await service.refusal()).code() is Code.UNAVAILABLE
    (first, _) = service.journal.calls("Get")
    assert first.finished - first.time >= 0.1


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("Get", {}, "has no effect"),
        ("Get", {"code": "OK"}, "code='OK'"),
        ("Get", {"code": "NOT_A_CODE"}, "NOT_A_CODE"),
        ("Get", {"code": "INTERNAL", "probability": 1.5}, "probability"),
        ("Get", {"status": 503}, "can't have"),
        ("Get", {"cut_at": 0.5}, "can't have"),
        ("storage.get", {"after_messages": 1}, "can't have"),
        ("Get", {"after_messages": 1}, "can't have"),
        ("metadata.token", {"cut_at": 0.5}, "can't have"),
        ("storage.get", {"cut_at": 2}, "cut_at"),
        ("storage.get", {"status": 42}, "status"),
        ("Get", {"rate_limit": 0}, "rate_limit"),
    ],
)
def test_a_fault_without_effect_is_an_error(method, options, message):
    with pytest.raises(ValueError, match=message):
        Faults().inject(method, **options)


async def test_effects_of_http_leave_grpc_alone(service):
    service.faults.inject("*", status=503)
    service.faults.inject("*", cut_at=0.5)
    await service.get()


def test_the_journal_survives_a_restart(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    finished = journal.record(Call("Get", job_id="a"))
    journal.finish(finished, "OK")
    journal.record(Call("ReadLogs", job_id="a", request={"offset": "0"}))
    # The emulator is killed here, in the middle of a line.
    with path.open("a") as file:
        file.write('{"method": "Ge')
    again = Journal(path)
    assert again.calls() == journal.calls()
    third = again.record(Call("Get", job_id="b"))
    assert third.sequence == 3
    assert Journal(path).count() == 3
    again.clear()
    assert again.count() == 0
    assert Journal(path).count() == 0


def test_the_journal_filters_and_hands_out_copies():
    journal = Journal()
    start = time.time()
    old = Call("Get", job_id="a", time=start - 100)
    journal.record(old)
    journal.finish(journal.record(Call("Get", job_id="b", subject="s", operation_id="o")), "OK")
    journal.record(Call("Execute", job_id="b"))
    assert journal.count() == 3
    assert journal.count("Get") == 2
    assert journal.count("Get", job_id="b") == 1
    assert journal.count(since=start - 1) == 2
    assert journal.count(code="OK") == journal.count(subject="s") == journal.count(operation_id="o") == 1
    journal.calls()[0].job_id = "changed"
    assert journal.calls()[0].job_id == "a"


def test_the_journal_keeps_bounded_memory():
    journal = Journal(limit=10)
    for number in range(25):
        journal.record(Call("Get", job_id=str(number)))
    assert [call.job_id for call in journal.calls()] == [str(number) for number in range(15, 25)]
