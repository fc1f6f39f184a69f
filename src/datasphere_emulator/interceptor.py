"""The gRPC interceptor: authenticates calls, records them and applies injected faults."""

from __future__ import annotations

import asyncio
import fnmatch
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import json_format
from yandex.cloud.datasphere.v2.jobs import project_job_service_pb2
from yandex.cloud.operation import operation_pb2

from datasphere_emulator.iam import Iam, Unauthenticated, current_subject, fingerprint
from datasphere_emulator.journal import Call

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from datasphere_emulator.faults import Fault, Faults
    from datasphere_emulator.journal import Journal

#: Request fields that are credentials; they are not recorded in the journal.
_CREDENTIAL_FIELDS = ("jwt", "yandex_passport_oauth_token", "yandex_passport_cookies", "iam_token")
#: Methods that need no IAM token.
_OPEN_METHODS = ("IamToken.Create", "Endpoint.*")
#: A call that ends with less time left (seconds) counts as DEADLINE_EXCEEDED, not CANCELLED.
_DEADLINE_TOLERANCE = 0.1

_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def short_name(full_method: str) -> str:
    """Return the journal's name of ``/package.SomeService/Method``."""
    service, _, method = full_method.lstrip("/").partition("/")
    service = service.rpartition(".")[2].removesuffix("Service")
    if service == "ProjectJob":
        return method
    return f"{'Endpoint' if service == 'ApiEndpoint' else service}.{method}"


class JournalInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Authenticates calls, records them and applies faults. For unary-unary and unary-stream methods.

    Handlers find the caller in ``current_subject``. A call without a valid token ends with UNAUTHENTICATED before its
    handler runs, except IamToken.Create and the endpoint list; faults are applied first, as a gateway would.
    """

    def __init__(self, journal: Journal, faults: Faults, iam: Iam) -> None:
        self._journal = journal
        self._faults = faults
        self._iam = iam

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Wrap the method's handler."""
        method = short_name(handler_call_details.method)
        handler = await continuation(handler_call_details)
        if handler is None:
            self._journal.finish(self._journal.record(Call(method)), "UNIMPLEMENTED")
            return None
        if handler.request_streaming:
            raise NotImplementedError(f"{handler_call_details.method}: client streams are not supported.")
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:

            async def stream(request: Any, context: Any) -> None:
                await self._journalled(method, request, context, self._stream, handler.unary_stream)

            return grpc.unary_stream_rpc_method_handler(stream, **codecs)

        async def unary(request: Any, context: Any) -> Any:
            return await self._journalled(method, request, context, self._unary, handler.unary_unary)

        return grpc.unary_unary_rpc_method_handler(unary, **codecs)

    async def _journalled(
        self, method: str, request: Any, context: Any, run: Callable[..., Awaitable[Any]], handler: Any
    ) -> Any:
        call = self._new_call(method, request, context)
        authentication = self._authenticate(call, context)
        self._journal.record(call)
        current_subject.set(call.subject)
        code = "UNKNOWN"
        try:
            fault = await self._faults.apply(call)
            if fault is not None and not fault.lost_answer and fault.after_messages is None:
                await _abort(context, fault, "RESOURCE_EXHAUSTED" if fault.rate_limit is not None else "UNAVAILABLE")
            if authentication is not None and not any(fnmatch.fnmatchcase(method, name) for name in _OPEN_METHODS):
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, authentication)
            call.effect = True
            answer = await run(request, context, handler, call, fault)
            code = _code_name(context, "OK")
            return answer
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            code = "CANCELLED" if remaining is None or remaining > _DEADLINE_TOLERANCE else "DEADLINE_EXCEEDED"
            raise
        except Exception:
            code = _code_name(context, "UNKNOWN")
            raise
        finally:
            self._journal.finish(call, code)

    def _new_call(self, method: str, request: Any, context: Any) -> Call:
        fields: dict[str, Any] = json_format.MessageToDict(request, preserving_proto_field_name=True)
        for name in _CREDENTIAL_FIELDS:
            fields.pop(name, None)
        metadata = {
            key: value if isinstance(value, str) else value.hex()
            for key, value in context.invocation_metadata() or ()
            if key != "authorization"
        }
        return Call(
            method=method,
            job_id=fields.get("job_id", ""),
            operation_id=fields.get("operation_id", ""),
            deadline=context.time_remaining(),
            metadata=metadata,
            request=fields,
            peer=context.peer(),
        )

    def _authenticate(self, call: Call, context: Any) -> str | None:
        """Set the caller; return why the call is not authenticated, None if it is."""
        header = dict(context.invocation_metadata() or ()).get("authorization", "")
        scheme, _, token = header.partition(" ")
        call.token = fingerprint(token)
        try:
            call.subject = self._iam.subject_of(token if scheme.lower() == "bearer" else "")
        except Unauthenticated as error:
            return str(error)
        return None

    async def _unary(self, request: Any, context: Any, handler: Any, call: Call, fault: Fault | None) -> Any:
        answer = await handler(request, context)
        if isinstance(answer, operation_pb2.Operation):
            call.operation_id = call.operation_id or answer.id
            call.job_id = call.job_id or _new_job_id(answer)
        if fault is not None:
            await _abort(context, fault, "UNAVAILABLE")
        return answer

    async def _stream(self, request: Any, context: Any, handler: Any, call: Call, fault: Fault | None) -> None:
        limit = None if fault is None else fault.after_messages or 0
        sent = 0
        messages = handler(request, context)
        try:
            while limit is None or sent < limit:
                try:
                    message = await messages.__anext__()
                except StopAsyncIteration:
                    break
                # Written instead of yielded, so that a client's cancel reaches this coroutine at once.
                await context.write(message)
                sent += 1
        finally:
            await messages.aclose()
        # A stream that ended before the fault's point ends normally.
        if fault is not None and sent == limit and (fault.code is not None or fault.lost_answer):
            await _abort(context, fault, "UNAVAILABLE")


async def _abort(context: Any, fault: Fault, default: str) -> None:
    code = fault.code or default
    await context.abort(grpc.StatusCode[code], fault.message or f"Injected by the emulator: {code}.")


def _code_name(context: Any, default: str) -> str:
    """Return the name of the status that a handler set or aborted with."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    name = _CODE_NAMES.get(code)
    return default if name is None or name == "OK" else name


def _new_job_id(operation: operation_pb2.Operation) -> str:
    """Return the job id in the metadata of a Create's or Clone's operation, else ""."""
    for message in (
        project_job_service_pb2.CreateProjectJobMetadata(),
        project_job_service_pb2.CloneProjectJobMetadata(),
    ):
        if operation.metadata.Is(message.DESCRIPTOR):
            operation.metadata.Unpack(message)
            return message.job_id
    return ""
