"""PUT, GET and HEAD of stored files, as in S3, with fault injection."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from aiohttp import ClientPayloadError, web

from datasphere_emulator.errors import internal_error
from datasphere_emulator.http_calls import ConnectionCut, HttpError, apply_faults, fault_error, journalled
from datasphere_emulator.storage import CHUNK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from datasphere_emulator.faults import Fault
    from datasphere_emulator.storage import Storage

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_ROUTE = "/storage/{project:[A-Za-z0-9_-]+}/{sha256:[0-9a-f]{64}}"


class FaultyBody:
    """Applies a fault to the bytes of a request or response body.

    :param fault: fault to apply, None for none.
    :param size: size of the whole body, bytes.
    """

    def __init__(self, fault: Fault | None, size: int) -> None:
        def position(share: float | None) -> int | None:
            return None if share is None else int(share * size)

        self.size = size
        truncate_at = position(fault.truncate_at) if fault else None
        self._corrupt_at = position(fault.corrupt_at) if fault else None
        self._cut_at = position(fault.cut_at) if fault else None
        self._speed = fault.bytes_per_second if fault else None
        if truncate_at is not None:
            self.size = truncate_at
        if self._corrupt_at is not None:
            self._corrupt_at = max(0, min(self._corrupt_at, size - 1))
        self._done = 0

    @property
    def chunk(self) -> int:
        """Bytes to transfer at a time: those of a tenth of a second if the speed is limited."""
        return CHUNK if self._speed is None else max(1, min(CHUNK, math.ceil(self._speed / 10)))

    async def alter(self, chunk: bytes) -> bytes:
        """Return the next chunk with the fault applied, after the delay of a limited speed."""
        start, end = self._done, self._done + len(chunk)
        self._done = end
        if self._corrupt_at is not None and start <= self._corrupt_at < end:
            place = self._corrupt_at - start
            chunk = chunk[:place] + bytes([chunk[place] ^ 0xFF]) + chunk[place + 1 :]
        if self._speed is not None:
            await asyncio.sleep(len(chunk) / self._speed)
        if self._cut_at is not None and end > self._cut_at:
            return chunk[: max(0, self._cut_at - start)]
        return chunk[: max(0, self.size - start)]

    @property
    def cut(self) -> bool:
        """Whether the fault closes the connection now."""
        return self._cut_at is not None and self._done >= self._cut_at


def _range(request: web.Request, size: int, etag: str) -> slice | None:
    """Return the requested byte range, None for the whole file.

    :raises HttpError: 416, the range is not satisfiable.
    """
    if request.headers.get("If-Range", etag) != etag:
        return None  # the file has changed: the client wants all of it
    try:
        asked = request.http_range
    except ValueError:
        return None  # malformed ranges and lists of ranges are ignored, as RFC 9110 allows
    if asked.start is None and asked.stop is None:
        return None
    # aiohttp gives "the last n bytes" as a negative start.
    start = max(0, size + asked.start) if asked.start < 0 else asked.start
    stop = size if asked.stop is None else min(asked.stop, size)
    if start >= stop:
        message = "The requested range is not satisfiable"
        raise HttpError(416, "InvalidRange", message, {"Content-Range": f"bytes */{size}"})
    return slice(start, stop)


def _guarded(handle: Handler) -> Handler:
    """Turn HttpError into error documents and ConnectionCut into closed connections."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            return await handle(request)
        except HttpError as error:
            return error.response(request.path)
        except ConnectionCut:
            if request.transport is not None:
                # Not abort(): bytes sent before the cut must arrive.
                request.transport.close()
            return web.Response()
        except ConnectionError:
            return web.Response()  # the client has disconnected
        except OSError as error:
            message = internal_error(error).message
            logger.error("%s %s: %s", request.method, request.path, message)
            return HttpError(507, "InsufficientStorage", message).response(request.path)

    return guarded


class StorageHandlers:
    """HTTP handlers of a :class:`Storage`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def add_routes(self, app: web.Application) -> None:
        """Add all routes to the application."""
        app.router.add_put(_ROUTE, _guarded(self._put))
        app.router.add_get(_ROUTE, _guarded(self._get), allow_head=True)

    async def _put(self, request: web.Request) -> web.StreamResponse:
        project, sha256 = request.match_info["project"], request.match_info["sha256"]
        storage = self._storage
        fields = {"project_id": project, "sha256": sha256, "size": request.content_length}
        async with journalled(storage.journal, "storage.put", request, fields) as call:
            fault = await apply_faults(storage.faults, call, request)
            injected = fault_error(fault)
            if injected is not None and not (fault and fault.lost_answer):
                raise injected
            storage.check_url("PUT", request.path, request.query)
            if request.content_length is None or "chunked" in request.headers.get("Transfer-Encoding", "").lower():
                raise HttpError(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
            if request.content_length != int(request.query["size"]):
                message = f"{request.query['size']} bytes expected, Content-Length is {request.content_length}."
                raise HttpError(400, "BadDigest", message)
            with storage.incoming() as (file, path):
                received = await self._receive(request, file, FaultyBody(fault, request.content_length))
                if received != sha256:
                    raise HttpError(400, "BadDigest", "The sha256 you specified did not match what we received.")
                storage.adopt(project, sha256, file, path)
            call.effect = True
            if injected is not None:
                raise injected
            return web.Response(headers={"ETag": f'"{sha256}"'})

    async def _receive(self, request: web.Request, file: BinaryIO, body: FaultyBody) -> str:
        """Stream the request's body into a file; return the sha256 (hex) of the written bytes."""
        digest = hashlib.sha256()

        def keep(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        try:
            async for chunk in request.content.iter_chunked(body.chunk):
                # In a thread: hashing and writing a megabyte would delay all other calls.
                await asyncio.to_thread(keep, await body.alter(chunk))
                if body.cut:
                    raise ConnectionCut
        except ClientPayloadError as error:
            raise ConnectionResetError(str(error)) from error
        if body.cut:
            raise ConnectionCut
        return digest.hexdigest()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        project, sha256 = request.match_info["project"], request.match_info["sha256"]
        storage = self._storage
        fields = {
            "project_id": project,
            "sha256": sha256,
            "http_method": request.method,
            "range": request.headers.get("Range", ""),
            "filename": request.query.get("filename", ""),
        }
        async with journalled(storage.journal, "storage.get", request, fields) as call:
            fault = await apply_faults(storage.faults, call, request)
            if (injected := fault_error(fault)) is not None:
                raise injected
            storage.check_url(request.method, request.path, request.query)
            try:
                path = await asyncio.to_thread(storage.path, project, sha256)
            except FileNotFoundError:
                raise HttpError(404, "NoSuchKey", "The specified key does not exist.") from None
            size = path.stat().st_size
            etag = f'"{sha256}"'
            asked = _range(request, size, etag)
            start, stop = (0, size) if asked is None else (asked.start, asked.stop)
            body = FaultyBody(fault, stop - start)
            response = web.StreamResponse(
                status=200 if asked is None else 206,
                headers={"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"},
            )
            if asked is not None:
                response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            if filename := request.query.get("filename"):
                response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(filename)}"
            response.content_length = body.size
            call.effect = True
            await response.prepare(request)
            if request.method != "HEAD":
                await self._send(response, path, start, body)
            with contextlib.suppress(ConnectionResetError):
                await response.write_eof()
            return response

    async def _send(self, response: web.StreamResponse, path: Path, start: int, body: FaultyBody) -> None:
        with path.open("rb") as file:
            file.seek(start)
            left = body.size
            while left > 0 and not body.cut:
                # Not in a thread: reading a chunk of this size is faster than starting a thread.
                chunk = file.read(min(body.chunk, _READ_BYTES, left))
                left -= len(chunk)
                await response.write(await body.alter(chunk))
        if body.cut:
            raise ConnectionCut
