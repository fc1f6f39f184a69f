"""Files of projects by their sha256, and their presigned URLs."""

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
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, urlencode

from datasphere_emulator.http_calls import HttpError
from datasphere_emulator.state_dir import write_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from datasphere_emulator.faults import Faults
    from datasphere_emulator.journal import Journal

#: Bytes read or written at a time; files are never held in memory.
CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PROJECT = re.compile(r"[A-Za-z0-9_-]+")


def generate(seed: str, size: int) -> Iterator[bytes]:
    """Generate the reproducible, incompressible content of a generated file, in chunks."""
    block = random.Random(seed).randbytes(CHUNK)
    for number in range(math.ceil(size / CHUNK)):
        chunk = number.to_bytes(8, "big") + block[8:]
        yield chunk[: size - number * CHUNK]


def _digest(path: Path, copy: BinaryIO | None = None) -> tuple[str, int]:
    """Return a file's sha256 (hex) and size. :param copy: file to copy the bytes to."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if copy is not None:
                copy.write(chunk)
    return digest.hexdigest(), size


class Storage:
    """Content-addressed files of each project. Thread-safe.

    :param root: folder of the files; they and their URLs survive restarts.
    :param base_url: returns the base URL of the emulator's HTTP side, such as ``http://127.0.0.1:8080``.
    :param journal: journal of ``storage.put`` and ``storage.get``.
    :param faults: faults to inject into them.
    :param url_lifetime: returns the lifetime of a new URL, seconds.
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
            write_private(secret, secrets.token_hex(32).encode())
        self._secret = secret.read_text().encode()

    # Files

    def _path_of(self, project: str, sha256: str) -> Path:
        if not _PROJECT.fullmatch(project) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"project={project!r}, sha256={sha256!r}: not an id and 64 hex digits.")
        return self.root / project / sha256[:2] / sha256

    def _recipe_path(self, project: str, sha256: str) -> Path:
        return self._path_of(project, sha256).with_suffix(".generated")

    @contextlib.contextmanager
    def incoming(self) -> Iterator[tuple[BinaryIO, Path]]:
        """Create a temporary file to fill and pass to :meth:`adopt`; it is removed at the end otherwise."""
        folder = self.root / ".incoming"
        folder.mkdir(exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            with open(descriptor, "wb") as file:
                yield file, Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def adopt(self, project: str, sha256: str, file: BinaryIO, path: Path) -> None:
        """Move a file of :meth:`incoming` into the storage, atomically."""
        file.close()
        place = self._path_of(project, sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)

    def _write(self, project: str, sha256: str, chunks: Iterable[bytes]) -> None:
        with self.incoming() as (file, path):
            for chunk in chunks:
                file.write(chunk)
            self.adopt(project, sha256, file, path)

    def put_bytes(self, project: str, data: bytes) -> tuple[str, int]:
        """Store bytes; return their sha256 (hex) and size."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self._path_of(project, sha256).exists():
            self._write(project, sha256, [data])
        return sha256, len(data)

    def put_file(self, project: str, path: Path) -> tuple[str, int]:
        """Store a file that is no longer written to; return its sha256 (hex) and size.

        It is hard-linked if possible, else copied. The target of a symbolic link, or a file with several hard links, is
        copied: it may change later.
        """
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            sha256, size = _digest(path)
            if self._path_of(project, sha256).exists():
                return sha256, size
            with self.incoming() as (file, temporary), contextlib.suppress(OSError):
                temporary.unlink()
                os.link(path, temporary)
                self.adopt(project, sha256, file, temporary)
                return sha256, size
        with self.incoming() as (file, temporary):
            sha256, size = _digest(path, file)
            if not self._path_of(project, sha256).exists():
                self.adopt(project, sha256, file, temporary)
        return sha256, size

    def register_generated(self, project: str, seed: str | int, size: int) -> tuple[str, int]:
        """Add a file of generated content, written to disk on its first read; return its sha256 (hex) and size.

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
        recipe = self._recipe_path(project, known)
        if recipe.exists():
            return known, size
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(json.dumps({"seed": key[0], "size": size}))
        return known, size

    def path(self, project: str, sha256: str) -> Path:
        """Return the path of a stored file, which must not be changed; a generated one is written now.

        :raises FileNotFoundError: the project has no file with this content.
        """
        place = self._path_of(project, sha256)
        if not place.exists():
            recipe = json.loads(self._recipe_path(project, sha256).read_text())
            self._write(project, sha256, generate(recipe["seed"], recipe["size"]))
        return place

    def has(self, project: str, sha256: str) -> bool:
        """Return whether the project has a file with this content."""
        return self._path_of(project, sha256).exists() or self._recipe_path(project, sha256).exists()

    def delete(self, project: str, sha256s: Iterable[str]) -> None:
        """Delete files; missing ones are ignored."""
        for sha256 in sha256s:
            for path in (self._path_of(project, sha256), self._recipe_path(project, sha256)):
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
            # Parameter names of S3's presigned URLs. Those are in whole seconds; "expires" has the exact end.
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Date": datetime.datetime.fromtimestamp(now, datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ"),
            "X-Amz-Expires": str(math.ceil(lifetime)),
            "expires": f"{now + lifetime:.3f}",
        }
        query["X-Amz-Signature"] = self._signature(method, path, query)
        return f"{self._base_url().rstrip('/')}{path}?{urlencode(query, quote_via=quote)}"

    def put_url(self, project: str, sha256: str, size: int) -> str:
        """Return a presigned URL to PUT exactly this content. :param size: bytes."""
        return self._url("PUT", project, sha256, {"size": str(size)})

    def get_url(self, project: str, sha256: str, filename: str = "") -> str:
        """Return a presigned URL to GET or HEAD the content. :param filename: name for downloads by a browser."""
        return self._url("GET", project, sha256, {"filename": filename} if filename else {})

    def check_url(self, method: str, path: str, query: Mapping[str, str]) -> None:
        """Check a presigned URL.

        :raises HttpError: 403, the signature is missing or wrong, or the URL has expired.
        """
        unsigned = {name: value for name, value in query.items() if name != "X-Amz-Signature"}
        signature = self._signature("GET" if method == "HEAD" else method, path, unsigned)
        if not query.get("X-Amz-Signature"):
            raise HttpError(403, "AccessDenied", "Access Denied")
        if not hmac.compare_digest(signature, query["X-Amz-Signature"]):
            raise HttpError(403, "SignatureDoesNotMatch", "The request signature we calculated does not match.")
        if float(query["expires"]) <= time.time():
            raise HttpError(403, "AccessDenied", "Request has expired")
