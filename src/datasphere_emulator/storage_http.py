"""PUT, GET and HEAD of stored files, as an S3 storage does them, with faults on the way."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from aiohttp import ClientPayloadError, web

from datasphere_emulator.http_calls import ConnectionCut, HttpRefusal, apply_faults, fault_refusal, journalled
from datasphere_emulator.storage import CHUNK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from datasphere_emulator.faults import Fault
    from datasphere_emulator.storage import Storage

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_READ_BYTES = 256 * 1024
_ROUTE = "/storage/{project:[A-Za-z0-9_-]+}/{sha256:[0-9a-f]{64}}"


class Body:
    """What a fault does to the bytes of one body on their way.

    :param fault: the fault, or None.
    :param size: bytes in the whole body.
    """

    def __init__(self, fault: Fault | None, size: int) -> None:
        def place(share: float | None) -> int | None:
            return None if share is None else int(share * size)

        self.size = size
        truncate_at = place(fault.truncate_at) if fault else None
        self._corrupt_at = place(fault.corrupt_at) if fault else None
        self._cut_at = place(fault.cut_at) if fault else None
        self._speed = fault.bytes_per_second if fault else None
        if truncate_at is not None:
            self.size = truncate_at
        if self._corrupt_at is not None:
            self._corrupt_at = max(0, min(self._corrupt_at, size - 1))
        self._done = 0

    @property
    def chunk(self) -> int:
        """Bytes to handle at a time: a tenth of a second's share where the speed is limited."""
        return CHUNK if self._speed is None else max(1, min(CHUNK, math.ceil(self._speed / 10)))

    async def alter(self, chunk: bytes) -> bytes:
        """The next chunk as it goes on; raises :class:`ConnectionCut` where nothing more does."""
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
        """Whether the connection closes now."""
        return self._cut_at is not None and self._done >= self._cut_at


def _range(request: web.Request, size: int, etag: str) -> slice | None:
    """The byte range asked for, None for the whole file; 416 where there is no such range."""
    if request.headers.get("If-Range", etag) != etag:
        return None  # the file has changed since: the client wants all of it
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
        raise HttpRefusal(416, "InvalidRange", message, {"Content-Range": f"bytes */{size}"})
    return slice(start, stop)


def _guarded(handle: Handler) -> Handler:
    """Turn refusals into error documents and cuts into closed connections."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            return await handle(request)
        except HttpRefusal as refusal:
            return refusal.response(request.path)
        except ConnectionCut:
            if request.transport is not None:
                # Not abort(): what was sent before the cut has to arrive.
                request.transport.close()
            return web.Response()
        except ConnectionError:
            return web.Response()  # the client is gone, nobody reads this

    return guarded


class StorageHandlers:
    """The HTTP side of a :class:`Storage`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def add_routes(self, app: web.Application) -> None:
        """Add PUT, GET and HEAD."""
        app.router.add_put(_ROUTE, _guarded(self._put))
        app.router.add_get(_ROUTE, _guarded(self._get), allow_head=True)

    async def _put(self, request: web.Request) -> web.StreamResponse:
        project, sha256 = request.match_info["project"], request.match_info["sha256"]
        storage = self._storage
        fields = {"project_id": project, "sha256": sha256, "size": request.content_length}
        async with journalled(storage.journal, "storage.put", request, fields) as call:
            fault = await apply_faults(storage.faults, call, request)
            refusal = fault_refusal(fault)
            if refusal is not None and not (fault and fault.lost_answer):
                raise refusal
            storage.check_url("PUT", request.path, request.query)
            if request.content_length is None or "chunked" in request.headers.get("Transfer-Encoding", "").lower():
                raise HttpRefusal(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
            if request.content_length != int(request.query["size"]):
                message = f"{request.query['size']} bytes expected, Content-Length is {request.content_length}."
                raise HttpRefusal(400, "BadDigest", message)
            with storage.incoming() as (file, path):
                received = await self._receive(request, file, Body(fault, request.content_length))
                if received != sha256:
                    raise HttpRefusal(400, "BadDigest", "The sha256 you specified did not match what we received.")
                storage.adopt(project, sha256, file, path)
            call.effect = True
            if refusal is not None:
                raise refusal
            return web.Response(headers={"ETag": f'"{sha256}"'})

    async def _receive(self, request: web.Request, file: BinaryIO, body: Body) -> str:
        """Stream the request's body into the file; returns the sha256 of what was written."""
        digest = hashlib.sha256()

        def keep(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        try:
            async for chunk in request.content.iter_chunked(body.chunk):
                # In a thread: hashing and writing a megabyte would hold up every other call.
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
            if (refusal := fault_refusal(fault)) is not None:
                raise refusal
            storage.check_url(request.method, request.path, request.query)
            try:
                path = await asyncio.to_thread(storage.path, project, sha256)
            except FileNotFoundError:
                raise HttpRefusal(404, "NoSuchKey", "The specified key does not exist.") from None
            size = path.stat().st_size
            etag = f'"{sha256}"'
            asked = _range(request, size, etag)
            start, stop = (0, size) if asked is None else (asked.start, asked.stop)
            body = Body(fault, stop - start)
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

    async def _send(self, response: web.StreamResponse, path: Path, start: int, body: Body) -> None:
        with path.open("rb") as file:
            file.seek(start)
            left = body.size
            while left > 0 and not body.cut:
                # Not in a thread: a piece of this size is read sooner than another thread has begun.
                chunk = file.read(min(body.chunk, _READ_BYTES, left))
                left -= len(chunk)
                await response.write(await body.alter(chunk))
        if body.cut:
            raise ConnectionCut
