"""Journal and fault injection for HTTP requests to storage and the metadata service."""

from __future__ import annotations

import asyncio
import contextlib
import html
import uuid
from typing import TYPE_CHECKING, Any

from aiohttp import web

from datasphere_emulator.iam import fingerprint
from datasphere_emulator.journal import Call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from datasphere_emulator.faults import Fault, Faults
    from datasphere_emulator.journal import Journal

#: HTTP status of each gRPC status, as in Yandex Cloud's error model.
HTTP_STATUS = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 416,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_GRPC_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    411: "INVALID_ARGUMENT",
    416: "OUT_OF_RANGE",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
#: How often a request that hangs in a fault checks that its client is connected, seconds.
_DISCONNECT_INTERVAL = 0.05


class HttpError(Exception):
    """An error that ends a request with an S3-like error document."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}

    def response(self, path: str) -> web.Response:
        """Return the error document; it closes the connection, since the request body may be unread."""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{self.code}</Code><Message>{html.escape(self.message)}</Message>"
            f"<Resource>{html.escape(path)}</Resource><RequestId>{uuid.uuid4().hex[:16]}</RequestId></Error>"
        )
        response = web.Response(status=self.status, text=body, content_type="application/xml", headers=self.headers)
        response.force_close()
        return response


class ConnectionCut(Exception):
    """A fault closes the connection."""


def grpc_code(status: int) -> str:
    """Return the name of the gRPC status that is nearest to an HTTP status."""
    return "OK" if status < 400 else _GRPC_STATUS.get(status, "UNAVAILABLE" if status > 500 else "UNKNOWN")


def fault_error(fault: Fault | None) -> HttpError | None:
    """Return the error that a fault ends the request with, None if it has none."""
    if fault is None:
        return None
    if fault.status is not None:
        return HttpError(fault.status, "InjectedFault", fault.message or f"Injected by the emulator: {fault.status}.")
    code = fault.code or ("RESOURCE_EXHAUSTED" if fault.rate_limit is not None else None)
    if code is None and fault.lost_answer:
        code = "UNAVAILABLE"
    if code is None:
        return None
    status = HTTP_STATUS.get(code, 500)
    return HttpError(status, "InjectedFault", fault.message or f"Injected by the emulator: {code}.")


async def apply_faults(faults: Faults, call: Call, request: web.Request) -> Fault | None:
    """Apply faults to a request.

    :raises ConnectionResetError: the client has disconnected meanwhile.
    """
    applying = asyncio.ensure_future(faults.apply(call))
    try:
        while not (await asyncio.wait({applying}, timeout=_DISCONNECT_INTERVAL))[0]:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("The client has disconnected.")
        return applying.result()
    finally:
        applying.cancel()


@contextlib.asynccontextmanager
async def journalled(
    journal: Journal, method: str, request: web.Request, fields: dict[str, Any] | None = None
) -> AsyncIterator[Call]:
    """Record a request in the journal, with the code set on the call or that of the exception."""
    call = Call(
        method=method,
        token=fingerprint(request.headers.get("Authorization", "").removeprefix("Bearer ")),
        metadata={key.lower(): value for key, value in request.headers.items() if key.lower() != "authorization"},
        request=fields,
        peer=request.remote or "",
    )
    journal.record(call)
    code = "UNKNOWN"
    try:
        yield call
        code = call.code or "OK"
    except HttpError as error:
        code = grpc_code(error.status)
        raise
    except ConnectionCut:
        code = "UNAVAILABLE"
        raise
    except (ConnectionError, asyncio.CancelledError):
        code = "CANCELLED"
        raise
    finally:
        journal.finish(call, code)
