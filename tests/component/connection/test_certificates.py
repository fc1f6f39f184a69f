"""Certificates that can't be trusted are named, with why, before anything is sent."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from airflow_provider_datasphere.client.connection.certificates import read_certificates
from airflow_provider_datasphere.client.connection.errors import SettingsError
from airflow_provider_datasphere.client.http.client import HttpClient
from airflow_provider_datasphere.client.http.errors import TransferError, TransientTransferError
from datasphere_emulator import Emulator
from http_server import http_client

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime.now(timezone.utc)


def certificate(
    folder: Path, name: str, *, until: datetime, signed_by: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """Write ``<name>.pem`` and ``<name>.key``; the certificate with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, issuer_key = (signed_by[0].subject, signed_by[1]) if signed_by else (subject, key)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=30))
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=signed_by is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return made, key


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("others", [0, 1])
def test_a_certificate_that_is_cut_off_is_named(tmp_path: Path, share: float, others: int) -> None:
    certificate(tmp_path, "whole", until=NOW + timedelta(days=1))
    whole = (tmp_path / "whole.pem").read_bytes()
    cut = tmp_path / "cut.pem"
    cut.write_bytes(whole * others + whole[: int(share * len(whole))])
    with pytest.raises(SettingsError, match=rf"root_certificates='{cut}'.*truncated.*whole"):
        read_certificates(str(cut))


def test_a_certificate_with_a_wrong_middle_is_named(tmp_path: Path) -> None:
    certificate(tmp_path, "broken", until=NOW + timedelta(days=1))
    path = tmp_path / "broken.pem"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], *lines[4:]]))
    with pytest.raises(SettingsError, match=rf"root_certificates='{path}'.*invalid certificate"):
        read_certificates(str(path))


def test_an_authority_that_has_expired_is_named(tmp_path: Path) -> None:
    certificate(tmp_path, "old", until=NOW - timedelta(days=2))
    with pytest.raises(SettingsError, match=r"root_certificates=.*old\.pem'.*expired on \w+ +\d+ "):
        read_certificates(str(tmp_path / "old.pem"))
    certificate(tmp_path, "new", until=NOW + timedelta(days=2))
    both = tmp_path / "both.pem"
    both.write_bytes((tmp_path / "old.pem").read_bytes() + (tmp_path / "new.pem").read_bytes())
    assert read_certificates(str(both))


def test_a_storage_whose_certificate_has_expired_is_asked_once(tmp_path: Path) -> None:
    authority = certificate(tmp_path, "authority", until=NOW + timedelta(days=2))
    certificate(tmp_path, "storage", until=NOW - timedelta(days=2), signed_by=authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "storage.pem", tmp_path / "storage.key")
    tries = []

    def transfer() -> None:
        tries.append(1)
        with HttpClient(str(tmp_path / "authority.pem")).get(f"https://localhost:{port}/file"):
            pass

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]

    def shake_hands() -> None:
        while True:
            try:
                connection, _ = listening.accept()
                context.wrap_socket(connection, server_side=True).close()
            except ssl.SSLError:
                continue  # the client doesn't trust it
            except OSError:
                return

    threading.Thread(target=shake_hands, daemon=True).start()
    with closing(listening), pytest.raises(TransferError) as caught:
        http_client(min_backoff=0.01).retrying(threading.Event())(transfer)
    assert "localhost: TLS failed" in str(caught.value)
    assert "expired" in str(caught.value)
    assert not isinstance(caught.value, TransientTransferError)
    assert len(tries) == 1


def test_an_unknown_authority_is_asked_once_and_the_way_out_is_said() -> None:
    tries = []

    def transfer() -> None:
        tries.append(1)
        with HttpClient().get(emulator.url):
            pass

    with Emulator(tls=True) as emulator, pytest.raises(TransferError, match="root_certificates"):
        http_client(min_backoff=0.01).retrying(threading.Event())(transfer)
    assert len(tries) == 1
