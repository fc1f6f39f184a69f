"""Who may use the emulator's web side, and its state."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from datasphere_emulator import Emulator
from datasphere_emulator.control_client import ControlClient
from datasphere_emulator.http_app import TOKEN_PATH

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def plain() -> Iterator[Emulator]:
    with Emulator(tls=False, certificate_hosts=["*.cloud.example"], public_host="emulator.example") as emulator:
        yield emulator


def ask(address: str, path: str, headers: dict[str, str], method: str = "GET", body: str | None = None) -> Any:
    """Status and body of an answer. :param address: ``host:port``."""
    port = address.rpartition(":")[2]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
    headers = {"Host": address, **headers}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def web_address(emulator: Emulator, host: str = "localhost") -> str:
    return f"{host}:{urlsplit(emulator.url).port}"


# The control API


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Basic SECRET"}],
    ids=["none", "wrong", "empty", "another scheme"],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "jobs"), ("GET", "info"), ("GET", "journal"), ("PATCH", "settings")]
)
def test_the_control_api_needs_its_secret(plain: Emulator, headers: dict[str, str], method: str, path: str) -> None:
    headers = {name: value.replace("SECRET", plain.control_secret) for name, value in headers.items()}
    status, body = ask(web_address(plain), f"/_control/{path}", headers, method, '{"cmd": "true", "execute": true}')
    assert status == 401
    assert "needs its secret" in json.loads(body)["error"]["message"]
    assert plain.iam_token not in body
    assert plain.jobs() == []


def test_a_page_in_a_browser_may_not_even_with_the_secret(plain: Emulator) -> None:
    headers = {"Authorization": f"Bearer {plain.control_secret}", "Origin": plain.url}
    assert ask(web_address(plain), "/_control/info", headers)[0] == 403


def test_the_control_client_knows_the_secret(tmp_path: Path) -> None:
    with Emulator() as emulator:
        assert emulator.control_client().info()["url"] == emulator.url
        for secret in ("", "wrong"):
            with pytest.raises(PermissionError, match="secret"):
                ControlClient(emulator.url, emulator.root_certificates, secret).info()
        ready = tmp_path / "ready.json"
        authority = str(emulator.root_certificates)
        facts = {"url": emulator.url, "root_certificates": authority, "control_secret": emulator.control_secret}
        ready.write_text(json.dumps(facts))
        assert ControlClient.from_ready_file(ready).info()["url"] == emulator.url


def test_each_emulator_has_its_own_secret_and_keeps_it(tmp_path: Path) -> None:
    secrets = {Emulator(tls=False).control_secret for _ in range(2)}
    assert len(secrets) == 2
    first, again = (Emulator(tls=False, state_dir=tmp_path / "state").control_secret for _ in range(2))
    assert first == again
    assert len(first) >= 24


# Host names


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "cloud.example", "x", "[::1", "e:v:i"])
def test_another_host_name_is_refused(plain: Emulator, host: str) -> None:
    """A page whose name was made to point here (DNS rebinding) sends its own name."""
    port = urlsplit(plain.url).port
    good = {"Authorization": f"Bearer {plain.control_secret}", "Metadata-Flavor": "Google"}
    for path in ("/projects", "/_control/info", "/storage/x/" + "0" * 64):
        status, body = ask(web_address(plain), path, {**good, "Host": f"{host}:{port}"})
        assert status == 421
        assert "--public-host" in body
    status, body = ask(plain.metadata_address, TOKEN_PATH, {**good, "Host": f"{host}:{port}"})
    assert status == 421
    assert "access_token" not in body


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost.", "127.0.0.1", "[::1]", "192.0.2.7", "emulator.example", "ui.cloud.example"]
)
def test_its_own_names_and_addresses_are_known(plain: Emulator, host: str) -> None:
    assert ask(web_address(plain), "/projects", {"Host": f"{host}:1234"})[0] == 200
    assert ask(web_address(plain), "/projects", {"Host": host})[0] == 200
    status, body = ask(plain.metadata_address, TOKEN_PATH, {"Host": host, "Metadata-Flavor": "Google"})
    assert status == 200
    assert json.loads(body)["access_token"].startswith("t1.")


def test_pages_work_in_a_browser(plain: Emulator) -> None:
    job_id = plain.create_job("echo hello > out", outputs=["out"], execute=True)
    plain.wait_job(job_id)
    path = f"/communities/{plain.community_id}/projects/{plain.project_id}/job/{job_id}"
    status, body = ask(web_address(plain), path, {"Sec-Fetch-Site": "none"})
    assert status == 200
    assert "SUCCESS" in body
    assert plain.control_secret not in body


# The metadata service


def socket_of(user: int, address: str) -> socket.socket:
    """A connection that belongs to a user, as far as this process may be somebody else."""
    effective = os.geteuid()
    if effective == 0:
        os.seteuid(user)
    try:
        connection = socket.socket()
    finally:
        os.seteuid(effective)
    connection.settimeout(20)
    host, _, port = address.rpartition(":")
    connection.connect((host, int(port)))
    return connection


@pytest.mark.parametrize("own", [True, False], ids=["own", "another user"])
def test_a_token_is_for_the_emulators_user_alone(plain: Emulator, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    """Whoever has it can run a job, that is any command."""
    user = os.geteuid() if own else 65534
    if not own and os.geteuid() != 0:
        monkeypatch.setattr("datasphere_emulator.access.os.geteuid", lambda: 65534)
    address = f"127.0.0.1:{plain.metadata_address.rpartition(':')[2]}"
    with socket_of(user, address) as connection:
        connection.sendall(f"GET {TOKEN_PATH} HTTP/1.0\r\nHost: {address}\r\nMetadata-Flavor: Google\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert answer.split()[1] == ("200" if own else "403")
    assert ("access_token" in answer) == own


def test_other_machines_reach_the_metadata_service_only_if_asked(tmp_path: Path) -> None:
    with Emulator(tls=False, host="0.0.0.0", public_host="emulator.example") as emulator:
        assert emulator.metadata_address.startswith("127.0.0.1:")
        listening = Path("/proc/net/tcp").read_text()
        port = f":{int(emulator.metadata_address.rpartition(':')[2]):04X} "
        assert f"0100007F{port}" in listening
        assert f"00000000{port}00000000:0000" not in listening


# The state


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*") if path.is_file()}


PRIVATE = ("state.db", "state.db-wal", "journal.jsonl", "control-secret", "url-secret", "ca.key", "server.key")


def test_new_state_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        with Emulator(state_dir=tmp_path / "state") as emulator:
            emulator.create_job("true")
            found = modes(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert {name: oct(found[name]) for name in PRIVATE} == dict.fromkeys(PRIVATE, oct(0o600))


def test_old_state_is_made_private(tmp_path: Path) -> None:
    state = tmp_path / "state"
    Emulator(state_dir=state).start().close()
    for path in (state, *state.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    with Emulator(state_dir=state) as emulator:
        emulator.create_job("true")
        found = modes(state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {name: oct(found[name]) for name in PRIVATE} == dict.fromkeys(PRIVATE, oct(0o600))


def test_a_public_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(OSError, match=r"other files.*0755.*new folder"):
        Emulator(state_dir=tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_state_folder(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(OSError, match=f"State folder {tmp_path}/state"):
        Emulator(state_dir=tmp_path / "state")


def test_one_emulator_at_a_time_has_a_state(tmp_path: Path) -> None:
    with Emulator(tls=False, state_dir=tmp_path / "state") as first:
        job_id = first.create_job("true")
        with pytest.raises(OSError, match=rf"in use by another emulator \(process {os.getpid()}\)"):
            Emulator(tls=False, state_dir=tmp_path / "state")
        assert first.job(job_id).id == job_id
        first.stop()
        second = Emulator(tls=False, state_dir=tmp_path / "state")
        first.start()
        with pytest.raises(OSError, match="in use"):
            second.start()
        first.kill()
        with second:
            assert second.job(job_id).id == job_id
            with pytest.raises(OSError, match="in use"):
                first.start()


def test_a_failed_start_lets_go_of_the_state(tmp_path: Path) -> None:
    with Emulator(tls=False) as other:
        taken = urlsplit(other.url).port or 0
        emulator = Emulator(tls=False, state_dir=tmp_path / "state", http_port=taken)
        with pytest.raises(OSError, match=rf"Port {taken} on 127.0.0.1 is already in use.*--http-port"):
            emulator.start()
    with emulator:
        assert urllib.request.urlopen(f"{emulator.url}/projects", timeout=20).status == 200


@pytest.mark.parametrize("file", ["state.db", "tls/ca.pem", "tls/ca.key"])
def test_damaged_state_is_an_error(tmp_path: Path, file: str) -> None:
    state = tmp_path / "state"
    Emulator(state_dir=state).start().close()
    for extra in ("state.db-wal", "state.db-shm"):
        (state / extra).unlink(missing_ok=True)
    (state / file).write_bytes(b"no such thing" * 1000)
    with pytest.raises(OSError, match=str(state)):
        Emulator(state_dir=state).start()


def test_a_journal_with_foreign_lines_is_read(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with Emulator(tls=False, state_dir=state) as emulator:
        urllib.request.urlopen(
            urllib.request.Request(
                f"http://{emulator.metadata_address}{TOKEN_PATH}", headers={"Metadata-Flavor": "Google"}
            ),
            timeout=20,
        ).close()
    with (state / "journal.jsonl").open("a") as journal:
        journal.write('[1, 2]\n{"sequence": 9}\n"text"\n{"method": "x", "colour": 1}\n{"method')
    with Emulator(tls=False, state_dir=state) as emulator:
        assert emulator.journal.count("metadata.token") == 1
