"""Looking for secrets in everything that a real Airflow writes down or tells, and in what the service got to see."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote

import jwt
from cryptography.fernet import Fernet, InvalidToken

from datasphere_emulator import Emulator
from harness import ApiError, RealAirflow

#: Signed requests for tokens, as a service account key makes them; Airflow's own JWTs have other algorithms.
_JWT = re.compile(rb"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")
_ENCRYPTED = re.compile(rb"gAAAAA[\w=-]{40,}")


def writings(secret: str) -> set[bytes]:
    """The ways a secret may be written."""
    raw = secret.encode()
    return {
        raw,
        json.dumps(secret)[1:-1].encode(),
        quote(secret, safe="").encode(),
        # Without its end, which depends on what follows.
        *(base64.b64encode(raw)[:-4], base64.urlsafe_b64encode(raw)[:-4]),
    }


def leaks(places: Mapping[str, bytes], secrets: Iterable[str]) -> set[str]:
    """Where something is that must not be; secrets are named by their beginning."""
    wanted = {writing: f"{secret[:10]}…" for secret in secrets for writing in writings(secret)}
    # One pass for all of them.
    any_of_them = re.compile(b"|".join(re.escape(writing) for writing in wanted))
    found = {f"{wanted[hit]} in {name}" for name, text in places.items() for hit in any_of_them.findall(text)}
    for name, text in places.items():
        for token in _JWT.findall(text):
            if jwt.get_unverified_header(token)["alg"] == "PS256":
                found.add(f"JWT in {name}")
    return found


def files(airflow: RealAirflow) -> Iterator[tuple[str, bytes]]:
    """Logs of tasks, of DAG processing and of the components, their output, and the database's file."""
    for path in sorted(airflow.home.path.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield f"file {path.relative_to(airflow.home.path)}", path.read_bytes()


def tables(airflow: RealAirflow) -> Iterator[tuple[str, bytes]]:
    """Every cell of every table but ``connection``; what is compressed or encrypted in readable form too."""
    fernet = Fernet(airflow.home.environment()["AIRFLOW__CORE__FERNET_KEY"])
    database = sqlite3.connect(f"file:{airflow.home.database}?mode=ro", uri=True, timeout=60)
    try:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            cursor = database.execute(f'SELECT * FROM "{name}"')
            columns = [column[0] for column in cursor.description]
            for row in cursor:
                for column, cell in zip(columns, row, strict=True):
                    if isinstance(cell, (str, bytes)):
                        # The connection's own row may hold the secrets, but encrypted alone.
                        yield f"table {name}.{column}", _readable(cell, None if name == "connection" else fernet)
    finally:
        database.close()


def _readable(cell: str | bytes, fernet: Fernet | None) -> bytes:
    text = cell.encode() if isinstance(cell, str) else cell
    parts = [text]
    with contextlib.suppress(zlib.error):
        parts.append(zlib.decompress(text))
    if fernet is not None:
        for token in _ENCRYPTED.findall(text):
            with contextlib.suppress(InvalidToken):
                parts.append(fernet.decrypt(token))
    return b"\n".join(parts)


def answers(airflow: RealAirflow, runs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    """What Airflow's API tells: of these runs (DAG id, run id), and of everything around them."""
    paths = ["/connections", "/eventLogs?limit=100", "/importErrors", "/plugins", "/providers", "/dagWarnings"]
    for dag_id, run_id in runs:
        run = f"/dags/{dag_id}/dagRuns/{run_id}"
        paths += [f"/dags/{dag_id}/details", run, f"/dags/{dag_id}/tasks"]
        for instance in airflow.api.task_instances(dag_id, run_id):
            task, map_index = instance["task_id"], instance["map_index"]
            paths.append(airflow.api.task_path(dag_id, run_id, task, map_index))
            where = (dag_id, run_id, task)
            told = [airflow.xcoms(*where, map_index), airflow.links(*where, map_index)]
            # Masked in the database and on the page alike, or in neither.
            told.append(airflow.task_log(*where, max(instance["try_number"], 1), map_index))
            yield f"API {dag_id}.{task}", json.dumps(told).encode()
    for path in paths:
        try:
            yield f"API {path}", airflow.api.call("GET", path).content
        except ApiError as error:
            # Not every version has everything.
            if error.status != 404:
                raise


def service(emulator: Emulator) -> Iterator[tuple[str, bytes]]:
    """What the service was told outside of the calls that are there for credentials, and the jobs made of it."""
    for call in emulator.journal.calls():
        if not call.method.startswith("IamToken."):
            yield f"journal {call.method}", repr(call).encode()
    for job in emulator.jobs():
        yield f"job {job.id}", f"{job.name} {job.desc} {job.job_parameters}".encode()


def collect(*sources: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    """Place → everything that was found there."""
    places: dict[str, list[bytes]] = {}
    for source in sources:
        for name, text in source:
            places.setdefault(name, []).append(text)
    return {name: b"\n".join(texts) for name, texts in places.items()}
