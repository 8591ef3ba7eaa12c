"""Keys and certificates of a trial: a CA, the server's certificate, one key a client, and the folder of those known."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsim.errors import ConfigError, DataError

PEM = serialization.Encoding.PEM
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Key = ec.EllipticCurvePrivateKey


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as Flower's node authentication compares it."""
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write_private(path: Path, data: bytes) -> None:
    """Readable by its owner alone from the first byte on; an existing key is never overwritten."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise DataError(f"{path}: exists already; move it away to make a new one") from None
    with os.fdopen(file, "wb") as out:
        out.write(data)


def _pem(key: Key) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def read_private(path: Path) -> bytes:
    """The bytes of a private key's file.

    Raises:
        DataError: it is missing, or others than its owner may read it.
    """
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the key cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise DataError(f"{path}: others can read this private key (mode {mode & 0o777:o}); run: chmod 600 {path}")
    return data


def read_key(path: Path) -> Key:
    """A client's private key.

    Raises:
        DataError: see ``read_private``, or the file holds no elliptic-curve key.
    """
    data = read_private(path)
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{path}: not an unencrypted elliptic-curve private key in PEM; 'fedsim keys node' makes one")
    return key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(subject: str, key: Key, issuer: str, signer: Key, days: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - datetime.timedelta(days=1))
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    )


def make_ca(folder: Path, days: float = 3650) -> None:
    """``ca.key`` (stays where it is) and ``ca.crt`` (what clients trust)."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / "ca.key", _pem(key))
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _certificate("fedsim CA", key, "fedsim CA", key, days)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True)
    (folder / "ca.crt").write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(PEM))


def make_server(folder: Path, hosts: list[str], days: float = 365) -> None:
    """``server.key`` and ``server.crt`` for the host names or addresses by which clients reach the server."""
    signer = serialization.load_pem_private_key(read_private(folder / "ca.key"), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey), "make_ca makes no other"
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / "server.key", _pem(key))
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    builder = _certificate(hosts[0], key, "fedsim CA", signer, days)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    builder = builder.add_extension(x509.BasicConstraints(False, None), True)
    (folder / "server.crt").write_bytes(builder.sign(signer, hashes.SHA384()).public_bytes(PEM))


def make_node(folder: Path, name: str) -> Path:
    """``NAME.key`` for a client and ``NAME.pub`` to register with the server; returns the latter."""
    _check(name)
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())  # signs every call: a tenth of P-384's time
    _write_private(folder / f"{name}.key", _pem(key))
    public = folder / f"{name}.pub"
    public.write_bytes(public_bytes(key.public_key()))
    return public


def _check(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"client name '{name}': expected letters, digits, '.', '_' and '-', at most 64")


def register(public: Path, clients: Path, name: str = "") -> Path:
    """Copy a public key into the folder of known clients, as NAME.pub.

    Raises:
        DataError: the file is no public key, or the name or the key is registered already.
    """
    name = name or public.stem
    _check(name)
    data = _read_public(public)
    clients.mkdir(parents=True, exist_ok=True)
    for other, known in registered(clients).items():
        if known == data or other == name:
            raise DataError(f"{clients / other}.pub: this {'key' if known == data else 'name'} is registered already")
    target = clients / f"{name}.pub"
    target.write_bytes(data)
    return target


def revoke(name: str, clients: Path) -> None:
    """Forget a client; a running server refuses it from the next second on."""
    _check(name)
    try:
        (clients / f"{name}.pub").unlink()
    except FileNotFoundError:
        known = ", ".join(registered(clients)) or "nobody"
        raise DataError(f"{clients}: no client '{name}' is registered; known: {known}") from None


def _read_public(path: Path) -> bytes:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a public key in PEM ({type(error).__name__}); expected a NAME.pub") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DataError(f"{path}: not an elliptic-curve public key")
    return public_bytes(key)


def registered(clients: Path) -> dict[str, bytes]:
    """Public key of every known client, by name.

    Raises:
        DataError: the folder is missing, or a file in it is no public key.
    """
    if not clients.is_dir():
        raise DataError(f"{clients}: no such folder of client keys; 'fedsim keys register' makes it")
    return {path.stem: _read_public(path) for path in sorted(clients.glob("*.pub"))}
