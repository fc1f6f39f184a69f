"""Stored files, and their presigned URLs over a real socket."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from datasphere_emulator.faults import Faults
from datasphere_emulator.journal import Call, Journal
from datasphere_emulator.storage import CHUNK, Storage, generate
from datasphere_emulator.storage_api import StorageHandlers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PROJECT = "bt1projectprojectpro"
DATA = bytes(range(256)) * 40  # 10240 bytes


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclasses.dataclass
class Service:
    storage: Storage
    journal: Journal
    faults: Faults
    http: aiohttp.ClientSession
    lifetime: float = 3600.0

    async def put(self, data: Any = DATA, *, of: bytes = DATA, **options: Any) -> tuple[int, str]:
        """PUT ``data`` to a URL made for ``of``; returns status and body."""
        url = self.storage.put_url(PROJECT, sha256(of), len(of))
        async with self.http.put(url, data=data, **options) as response:
            return response.status, await response.text()

    async def get(self, data: bytes = DATA, headers: dict[str, str] | None = None) -> tuple[Any, bytes]:
        async with self.http.get(self.storage.get_url(PROJECT, sha256(data)), headers=headers) as response:
            return response, await response.read()

    async def finished(self, method: str) -> Call:
        for _ in range(500):
            (call,) = self.journal.calls(method)
            if call.finished is not None:
                return call
            await asyncio.sleep(0.01)
        raise AssertionError(f"{method} is still running")


@asynccontextmanager
async def served(root: Path) -> AsyncIterator[Service]:
    journal, faults, app, base = Journal(), Faults(), web.Application(), ""
    service: Service
    storage = Storage(root, lambda: base, journal, faults, lambda: service.lifetime)
    StorageHandlers(storage).add_routes(app)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as http:
        service = Service(storage, journal, faults, http)
        yield service
    await runner.cleanup()


@pytest_asyncio.fixture
async def service(tmp_path) -> AsyncIterator[Service]:
    async with served(tmp_path / "storage") as service:
        yield service


def incoming(service: Service) -> list[Path]:
    return list((service.storage.root / ".incoming").glob("*"))


async def test_put_then_get(service):
    assert not service.storage.has(PROJECT, sha256(DATA))
    assert (await service.put())[0] == 200
    assert service.storage.has(PROJECT, sha256(DATA))
    assert service.storage.path(PROJECT, sha256(DATA)).read_bytes() == DATA
    assert not service.storage.has("bt1anotherproject000", sha256(DATA))
    response, body = await service.get()
    assert (response.status, body) == (200, DATA)
    assert response.headers["ETag"] == f'"{sha256(DATA)}"'
    assert response.headers["Content-Length"] == "10240"
    assert response.headers["Accept-Ranges"] == "bytes"
    put, get = service.journal.calls()
    assert (put.method, put.code, put.effect, put.request["sha256"]) == ("storage.put", "OK", True, sha256(DATA))
    assert (get.method, get.code, get.effect, get.request["project_id"]) == ("storage.get", "OK", True, PROJECT)


async def test_head_and_file_name(service):
    service.storage.put_bytes(PROJECT, DATA)
    url = service.storage.get_url(PROJECT, sha256(DATA), "модель 1.bin")
    async with service.http.head(url) as response:
        assert response.status == 200
        assert response.headers["Content-Length"] == "10240"
        assert "%D0%BC" in response.headers["Content-Disposition"]
    async with service.http.get(url) as response:
        assert response.content_disposition.filename == "модель 1.bin"


async def test_an_empty_file(service):
    assert (await service.put(b"", of=b"", headers={"Content-Length": "0"}))[0] == 200
    response, body = await service.get(b"")
    assert (response.status, body, response.headers["Content-Length"]) == (200, b"", "0")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, 10240),
        ("bytes=-10", 10230, 10240),
        ("bytes=10000-99999", 10000, 10240),
    ],
)
async def test_ranges(service, asked, start, stop):
    service.storage.put_bytes(PROJECT, DATA)
    response, body = await service.get(headers={"Range": asked})
    assert (response.status, body) == (206, DATA[start:stop])
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/10240"


async def test_ranges_that_do_not_fit(service):
    service.storage.put_bytes(PROJECT, DATA)
    response, body = await service.get(headers={"Range": "bytes=10240-"})
    assert (response.status, response.headers["Content-Range"]) == (416, "bytes */10240")
    assert b"InvalidRange" in body
    response, body = await service.get(headers={"Range": "bytes=0-1,5-6"})
    assert (response.status, body) == (200, DATA)
    service.storage.put_bytes(PROJECT, b"")
    assert (await service.get(b"", headers={"Range": "bytes=0-"}))[0].status == 416


async def test_if_range(service):
    service.storage.put_bytes(PROJECT, DATA)
    same = {"Range": "bytes=5-", "If-Range": f'"{sha256(DATA)}"'}
    assert (await service.get(headers=same))[0].status == 206
    response, body = await service.get(headers={"Range": "bytes=5-", "If-Range": '"another"'})
    assert (response.status, body) == (200, DATA)


async def test_urls_expire(service):
    service.storage.put_bytes(PROJECT, DATA)
    service.lifetime = 0.0
    response, body = await service.get()
    assert response.status == 403
    assert b"<Code>AccessDenied</Code><Message>Request has expired</Message>" in body
    assert (await service.put())[0] == 403
    assert [call.code for call in service.journal.calls()] == ["PERMISSION_DENIED"] * 2


async def test_altered_urls_are_refused(service):
    service.storage.put_bytes(PROJECT, DATA)
    other = service.storage.put_bytes(PROJECT, b"secret")[0]
    url = service.storage.get_url(PROJECT, sha256(DATA))
    later = f"expires={time.time() + 9999:.3f}"
    altered = [
        url.replace(sha256(DATA), other),
        url.replace("X-Amz-Signature=", "X-Amz-Signature=0"),
        url[: url.index("&expires=") + 1] + later + url[url.index("&X-Amz-Signature") :],
        url.partition("?")[0],
    ]
    for address in altered:
        async with service.http.get(address) as response:
            assert response.status == 403
            assert response.content_type == "application/xml"
    async with service.http.put(url, data=DATA) as response:
        assert response.status == 403
    async with service.http.get(service.storage.put_url(PROJECT, sha256(DATA), len(DATA))) as response:
        assert response.status == 403


async def test_put_needs_a_content_length(service):
    async def chunks() -> AsyncIterator[bytes]:
        yield DATA

    status, body = await service.put(chunks())
    assert status == 411
    assert "<Code>MissingContentLength</Code>" in body
    assert not service.storage.has(PROJECT, sha256(DATA))


async def test_put_checks_length_and_content(service):
    for wrong in (DATA[:-1], DATA + b"x", b"x" + DATA[1:]):
        status, body = await service.put(wrong)
        assert status == 400
        assert "<Code>BadDigest</Code>" in body
    assert not service.storage.has(PROJECT, sha256(DATA))
    assert incoming(service) == []
    assert service.journal.count(code="INVALID_ARGUMENT") == 3


async def test_what_was_deleted_is_gone(service):
    service.storage.put_bytes(PROJECT, DATA)
    service.storage.delete(PROJECT, [sha256(DATA), sha256(b"never there")])
    response, body = await service.get()
    assert response.status == 404
    assert b"NoSuchKey" in body
    assert service.journal.calls()[0].code == "NOT_FOUND"


async def test_a_client_that_goes_away_during_put_leaves_nothing(service):
    address = service.storage.put_url(PROJECT, sha256(DATA), len(DATA))
    host, _, path = address.removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    _, writer = await asyncio.open_connection(name, int(port))
    head = f"PUT /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(DATA)}\r\n\r\n"
    writer.write(head.encode() + DATA[:1000])
    await writer.drain()
    writer.close()
    while not service.journal.count("storage.put"):
        await asyncio.sleep(0.01)
    assert (await service.finished("storage.put")).code == "CANCELLED"
    assert incoming(service) == []
    assert not service.storage.has(PROJECT, sha256(DATA))


async def test_refusals_by_status_and_by_code(service):
    service.storage.put_bytes(PROJECT, DATA)
    service.faults.inject("storage.get", status=503, times=1)
    assert (await service.get())[0].status == 503
    service.faults.inject("storage.*", code="RESOURCE_EXHAUSTED", message="SlowDown", times=1)
    response, body = await service.get()
    assert response.status == 429
    assert b"SlowDown" in body
    assert (await service.get())[1] == DATA
    assert [call.code for call in service.journal.calls()] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "OK"]


async def test_a_lost_answer_stores_the_file(service):
    service.faults.inject("storage.put", lost_answer=True, times=1)
    assert (await service.put())[0] == 503
    assert service.storage.has(PROJECT, sha256(DATA))
    assert service.journal.calls()[0].effect


async def test_a_shortened_answer_looks_complete(service):
    service.storage.put_bytes(PROJECT, DATA)
    service.faults.inject("storage.get", truncate_at=0.5, times=1)
    response, body = await service.get()
    assert (response.status, body) == (200, DATA[:5120])
    assert response.headers["Content-Length"] == "5120"


@pytest.mark.parametrize(("share", "place"), [(0.0, 0), (0.5, 5120), (1.0, 10239)])
async def test_one_byte_is_changed(service, share, place):
    service.storage.put_bytes(PROJECT, DATA)
    service.faults.inject("storage.get", corrupt_at=share, times=1)
    _, body = await service.get()
    assert [number for number in range(len(DATA)) if body[number] != DATA[number]] == [place]
    assert len(body) == len(DATA)
    assert (await service.get())[1] == DATA


async def test_a_cut_download_can_be_resumed(service):
    service.storage.put_bytes(PROJECT, DATA)
    service.faults.inject("storage.get", cut_at=0.25, times=1)
    received = b""
    async with service.http.get(service.storage.get_url(PROJECT, sha256(DATA))) as response:
        try:
            async for chunk in response.content.iter_any():
                received += chunk
        except aiohttp.ClientPayloadError:
            pass
        else:
            raise AssertionError("the download looks complete")
    assert received == DATA[:2560]
    _, rest = await service.get(headers={"Range": f"bytes={len(received)}-"})
    assert received + rest == DATA
    assert [call.code for call in service.journal.calls()] == ["UNAVAILABLE", "OK"]


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_cuts_at_the_ends(service, share):
    service.storage.put_bytes(PROJECT, DATA)
    service.faults.inject("storage.get", cut_at=share, times=1)
    try:
        _, body = await service.get()
    except aiohttp.ClientError:
        body = b""
    assert body == DATA[: int(share * len(DATA))]


@pytest.mark.parametrize("effect", [{"truncate_at": 0.5}, {"corrupt_at": 0.5}])
async def test_uploads_altered_in_transit_are_rejected(service, effect):
    service.faults.inject("storage.put", times=1, **effect)
    status, body = await service.put()
    assert status == 400
    assert "BadDigest" in body
    assert not service.storage.has(PROJECT, sha256(DATA))
    assert (await service.put())[0] == 200


async def test_an_upload_is_cut(service):
    service.faults.inject("storage.put", cut_at=0.5)
    with pytest.raises(aiohttp.ClientError):
        await service.put()
    assert not service.storage.has(PROJECT, sha256(DATA))
    assert incoming(service) == []
    assert {call.code for call in service.journal.calls()} == {"UNAVAILABLE"}
    service.faults.clear()
    assert (await service.put())[0] == 200


async def test_the_speed_is_limited(service):
    service.storage.put_bytes(PROJECT, DATA)
    service.faults.inject("storage.*", bytes_per_second=50_000)
    started = time.monotonic()
    assert (await service.get())[1] == DATA
    assert time.monotonic() - started >= 0.15
    started = time.monotonic()
    assert (await service.put())[0] == 200
    assert time.monotonic() - started >= 0.15


async def test_a_hanging_answer_ends_when_the_client_gives_up(service):
    service.storage.put_bytes(PROJECT, DATA)
    service.faults.inject("storage.get", hang=True)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(service.get(), 0.2)
    assert (await service.finished("storage.get")).code == "CANCELLED"


async def test_generated_content(service):
    size = 2 * CHUNK + 77
    name, size_again = service.storage.register_generated(PROJECT, "seed", size)
    assert size_again == size
    assert service.storage.register_generated(PROJECT, "seed", size) == (name, size)
    assert service.storage.register_generated(PROJECT, "other", size)[0] != name
    assert service.storage.has(PROJECT, name)
    assert sum(path.stat().st_size for path in service.storage.root.rglob("*") if path.is_file()) < 1000
    async with service.http.get(service.storage.get_url(PROJECT, name)) as response:
        body = await response.read()
    assert len(body) == size
    assert sha256(body) == name
    assert body == b"".join(generate("seed", size))
    service.storage.delete(PROJECT, [name])
    assert not service.storage.has(PROJECT, name)
    empty, _ = service.storage.register_generated(PROJECT, 1, 0)
    assert empty == sha256(b"")


def test_a_file_is_taken_in_without_its_place(service_storage, tmp_path):
    source = tmp_path / "model.bin"
    source.write_bytes(DATA)
    assert service_storage.put_file(PROJECT, source) == (sha256(DATA), len(DATA))
    source.unlink()
    assert service_storage.path(PROJECT, sha256(DATA)).read_bytes() == DATA
    source.write_bytes(DATA)
    assert service_storage.put_file(PROJECT, source) == (sha256(DATA), len(DATA))
    link = tmp_path / "link"
    link.symlink_to(source)
    service_storage.delete(PROJECT, [sha256(DATA)])
    service_storage.put_file(PROJECT, link)
    assert not service_storage.path(PROJECT, sha256(DATA)).is_symlink()


@pytest.fixture
def service_storage(tmp_path) -> Storage:
    return Storage(tmp_path / "storage", lambda: "http://127.0.0.1:1", Journal(), Faults(), lambda: 60.0)


def test_names_cannot_leave_the_folder(service_storage):
    for project, name in (("..", sha256(b"")), (PROJECT, "../../etc/passwd"), (PROJECT, sha256(b"").upper())):
        with pytest.raises(ValueError, match="not an id"):
            service_storage.path(project, name)
    with pytest.raises(FileNotFoundError):
        service_storage.path(PROJECT, sha256(DATA))


async def test_files_and_urls_survive_a_restart(tmp_path):
    async with served(tmp_path) as service:
        service.storage.put_bytes(PROJECT, DATA)
        generated, _ = service.storage.register_generated(PROJECT, "seed", 100)
        url = service.storage.get_url(PROJECT, sha256(DATA))
    async with served(tmp_path) as service:
        moved = service.storage.get_url(PROJECT, sha256(DATA)).partition("/storage/")[0]
        async with service.http.get(moved + "/storage/" + url.partition("/storage/")[2]) as response:
            assert await response.read() == DATA
        async with service.http.get(service.storage.get_url(PROJECT, generated)) as response:
            assert sha256(await response.read()) == generated
