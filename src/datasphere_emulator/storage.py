"""Files of projects by their sha256, and presigned URLs to put and get them."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import json
import math
import os
import random
import re
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, urlencode

from datasphere_emulator.http_calls import HttpRefusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from datasphere_emulator.faults import Faults
    from datasphere_emulator.journal import Journal

#: Bytes handled at a time: no file is ever held in memory.
CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PROJECT = re.compile(r"[A-Za-z0-9_-]+")


def generate(seed: str, size: int) -> Iterator[bytes]:
    """Reproducible bytes that don't compress, in chunks: what a generated file holds."""
    block = random.Random(seed).randbytes(CHUNK)
    for number in range(math.ceil(size / CHUNK)):
        chunk = number.to_bytes(8, "big") + block[8:]
        yield chunk[: size - number * CHUNK]


class Storage:
    """Content-addressed files, kept apart by project. Thread-safe.

    :param root: folder for the files; what lies there survives restarts, and so do the URLs.
    :param base_url: gives the address of the emulator's HTTP side, such as ``http://127.0.0.1:8080``.
    :param journal: where ``storage.put`` and ``storage.get`` are written down.
    :param faults: what spoils them.
    :param url_lifetime: gives the seconds a new URL is valid.
    """

    def __init__(
        self,
        root: Path,
        base_url: Callable[[], str],
        journal: Journal,
        faults: Faults,
        url_lifetime: Callable[[], float],
    ) -> None:
        self.root = Path(root)
        self.journal = journal
        self.faults = faults
        self._base_url = base_url
        self._url_lifetime = url_lifetime
        self._lock = threading.Lock()
        self._generated: dict[tuple[str, int], str] = {}
        self.root.mkdir(parents=True, exist_ok=True)
        secret = self.root / "url-secret"
        if not secret.exists():
            secret.write_text(secrets.token_hex(32))
        self._secret = secret.read_text().encode()

    # Files

    def _place(self, project: str, sha256: str) -> Path:
        if not _PROJECT.fullmatch(project) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"project={project!r}, sha256={sha256!r}: not an id and 64 hex digits.")
        return self.root / project / sha256[:2] / sha256

    def _recipe(self, project: str, sha256: str) -> Path:
        return self._place(project, sha256).with_suffix(".generated")

    @contextlib.contextmanager
    def incoming(self) -> Iterator[tuple[BinaryIO, Path]]:
        """An empty file on the storage's disk, to fill and give to :meth:`adopt`; gone at the end if it wasn't."""
        folder = self.root / ".incoming"
        folder.mkdir(exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            with open(descriptor, "wb") as file:
                yield file, Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def adopt(self, project: str, sha256: str, file: BinaryIO, path: Path) -> None:
        """Take a file of :meth:`incoming` in; it appears at once and whole."""
        file.close()
        place = self._place(project, sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)

    def _write(self, project: str, sha256: str, chunks: Iterable[bytes]) -> None:
        with self.incoming() as (file, path):
            for chunk in chunks:
                file.write(chunk)
            self.adopt(project, sha256, file, path)

    def put_bytes(self, project: str, data: bytes) -> tuple[str, int]:
        """Store bytes; returns their sha256 (hex) and size."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self._place(project, sha256).exists():
            self._write(project, sha256, [data])
        return sha256, len(data)

    def put_file(self, project: str, path: Path) -> tuple[str, int]:
        """Store a file that nobody writes to any more; returns its sha256 (hex) and size.

        It is linked where the disk allows that, else copied.
        """
        digest = hashlib.sha256()
        size = 0
        with path.open("rb") as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        sha256 = digest.hexdigest()
        if not self._place(project, sha256).exists():
            with self.incoming() as (file, temporary):
                temporary.unlink()
                try:
                    os.link(path.resolve(), temporary)
                except OSError:
                    shutil.copyfile(path, temporary)
                self.adopt(project, sha256, file, temporary)
        return sha256, size

    def register_generated(self, project: str, seed: str | int, size: int) -> tuple[str, int]:
        """A file of reproducible content that takes no disk before it is first read; returns sha256 (hex) and size.

        :param seed: equal seeds and sizes give equal content.
        :param size: bytes; hashing takes about a second per gigabyte.
        """
        key = (str(seed), size)
        with self._lock:
            known = self._generated.get(key)
        if known is None:
            digest = hashlib.sha256()
            for chunk in generate(*key):
                digest.update(chunk)
            known = digest.hexdigest()
            with self._lock:
                self._generated[key] = known
        recipe = self._recipe(project, known)
        if recipe.exists():
            return known, size
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(json.dumps({"seed": key[0], "size": size}))
        return known, size

    def path(self, project: str, sha256: str) -> Path:
        """The stored file, not to be changed; a generated one is written now. FileNotFoundError if there is none."""
        place = self._place(project, sha256)
        if not place.exists():
            recipe = json.loads(self._recipe(project, sha256).read_text())
            self._write(project, sha256, generate(recipe["seed"], recipe["size"]))
        return place

    def has(self, project: str, sha256: str) -> bool:
        """Whether the project has a file with this content."""
        return self._place(project, sha256).exists() or self._recipe(project, sha256).exists()

    def delete(self, project: str, sha256s: Iterable[str]) -> None:
        """Remove files; those that aren't there are passed over."""
        for sha256 in sha256s:
            for path in (self._place(project, sha256), self._recipe(project, sha256)):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    # Presigned URLs

    def _signature(self, method: str, path: str, query: Mapping[str, str]) -> str:
        signed = "\n".join([method, path, *(f"{name}={query[name]}" for name in sorted(query))])
        return hmac.new(self._secret, signed.encode(), hashlib.sha256).hexdigest()

    def _url(self, method: str, project: str, sha256: str, parameters: dict[str, str]) -> str:
        path = f"/storage/{project}/{sha256}"
        lifetime = self._url_lifetime()
        now = time.time()
        query = {
            **parameters,
            # The names of S3's presigned URLs. Their clock ticks in seconds, so the true end is in "expires".
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Date": datetime.datetime.fromtimestamp(now, datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ"),
            "X-Amz-Expires": str(math.ceil(lifetime)),
            "expires": f"{now + lifetime:.3f}",
        }
        query["X-Amz-Signature"] = self._signature(method, path, query)
        return f"{self._base_url().rstrip('/')}{path}?{urlencode(query, quote_via=quote)}"

    def put_url(self, project: str, sha256: str, size: int) -> str:
        """A URL that takes one PUT of exactly this content."""
        return self._url("PUT", project, sha256, {"size": str(size)})

    def get_url(self, project: str, sha256: str, filename: str = "") -> str:
        """A URL to GET or HEAD the content. :param filename: the name a browser saves it under."""
        return self._url("GET", project, sha256, {"filename": filename} if filename else {})

    def check_url(self, method: str, path: str, query: Mapping[str, str]) -> None:
        """Refuse with 403 what :meth:`put_url` and :meth:`get_url` didn't make, or what has expired."""
        unsigned = {name: value for name, value in query.items() if name != "X-Amz-Signature"}
        signature = self._signature("GET" if method == "HEAD" else method, path, unsigned)
        if not query.get("X-Amz-Signature"):
            raise HttpRefusal(403, "AccessDenied", "Access Denied")
        if not hmac.compare_digest(signature, query["X-Amz-Signature"]):
            raise HttpRefusal(403, "SignatureDoesNotMatch", "The request signature we calculated does not match.")
        if float(query["expires"]) <= time.time():
            raise HttpRefusal(403, "AccessDenied", "Request has expired")
