"""The emulator's certificate authority and server certificate."""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from datasphere_emulator.state_dir import StateError, write_private

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: Names in every server certificate.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_LIFETIME = datetime.timedelta(days=3650)
#: Some clients reject server certificates with a longer lifetime.
_SERVER_LIFETIME = datetime.timedelta(days=397)


@dataclasses.dataclass(frozen=True)
class Certificates:
    """PEM files: the authority's certificate for clients, chain and key for servers."""

    authority: Path
    chain: Path
    key: Path


def ensure_certificates(folder: Path, hosts: Iterable[str]) -> Certificates:
    """Return the certificates in a folder; create a missing authority.

    The authority is kept, so that clients keep trusting it; the server's certificate is created at each start.

    :param hosts: host names and addresses for the certificate, besides those of loopback.
    :raises StateError: the folder has an unreadable authority.
    """
    folder.mkdir(parents=True, exist_ok=True)
    certificates = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    authority_key_file = folder / "ca.key"
    if certificates.authority.exists() and authority_key_file.exists():
        try:
            authority = x509.load_pem_x509_certificate(certificates.authority.read_bytes())
            loaded = serialization.load_pem_private_key(authority_key_file.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise StateError(
                f"Failed to read the certificate authority in {folder}: {error}. Remove that folder."
            ) from error
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        authority_key = loaded
    else:
        authority_key = ec.generate_private_key(ec.SECP256R1())
        authority = _authority(authority_key)
        _write_key(authority_key_file, authority_key)
        certificates.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    key = ec.generate_private_key(ec.SECP256R1())
    names = dict.fromkeys((*LOCAL_NAMES, *hosts))
    certificate = _server(key, list(names), authority, authority_key)
    _write_key(certificates.key, key)
    chain = [certificate, authority]
    certificates.chain.write_bytes(b"".join(item.public_bytes(serialization.Encoding.PEM) for item in chain))
    return certificates


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    write_private(
        path,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _builder(subject: str, issuer: x509.Name | None, lifetime: datetime.timedelta) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer or name)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + lifetime)
    )


def _usage(**granted: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: granted.get(name, False) for name in names})


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return (
        _builder("DataSphere emulator CA", None, _LIFETIME)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    names: list[str],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    return (
        _builder("DataSphere emulator", authority.subject, _SERVER_LIFETIME)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
