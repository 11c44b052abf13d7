"""Who may sign in: API keys, and the check of Kalshi's signed headers. Not for the client's side of signing.

A simulator's home holds `key_id` and `private_key.pem` (0600) of the key that it made itself, and the public key of every
key that it accepts as `keys/{key_id}.pem`.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from ssmd_dagster.clock import Clock
from ssmd_dagster.errors import ConfigurationError

SKEW_MS = 30_000
"""How far a signature's time may be from the exchange's. Kalshi's own limit is not published."""

_KEY_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=hashes.SHA256.digest_size)

PublicKey = rsa.RSAPublicKey | ed25519.Ed25519PublicKey


class RefusedSignatureError(Exception):
    """A request that is not signed as it must be; `code` is Kalshi's word for it."""

    def __init__(self, code: str, details: str) -> None:
        self.code = code
        self.details = details
        super().__init__(f"{code}: {details}")


class KeyRing:
    """The keys that a simulated exchange accepts, kept in its home."""

    def __init__(self, home: Path, clock: Clock, *, kind: str = "rsa") -> None:
        self._folder = home / "keys"
        self._clock = clock
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._keys = {path.stem: _read_public(path.read_bytes(), path) for path in sorted(self._folder.glob("*.pem"))}
        if not self._keys:
            self._make(home, kind)

    def _make(self, home: Path, kind: str) -> None:
        private: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
        if kind == "rsa":
            private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        else:
            private = ed25519.Ed25519PrivateKey.generate()
        key_id = str(uuid.uuid4())
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        write_file(home / "private_key.pem", pem)
        write_file(home / "key_id", key_id.encode())
        self.register(key_id, public)

    def ids(self) -> list[str]:
        """Return the ids of the accepted keys."""
        return list(self._keys)

    def register(self, key_id: str, public_pem: bytes) -> None:
        """Accept one more key from now on, and after a restart."""
        if not _KEY_ID.fullmatch(key_id):
            raise ConfigurationError(f"key id {key_id!r} is not made of letters, digits and dashes", where="simulator")
        path = self._folder / f"{key_id}.pem"
        key = _read_public(public_pem, path)
        write_file(path, public_pem)
        self._keys[key_id] = key

    def check(self, headers: Mapping[str, str], method: str, path: str) -> None:
        """Raise `RefusedSignatureError` unless the headers sign this request with an accepted key at about this time.

        `path` is without host and query. Header names are looked up as given, so pass a case-insensitive mapping.
        """
        key_id = headers.get("KALSHI-ACCESS-KEY")
        stamp = headers.get("KALSHI-ACCESS-TIMESTAMP")
        signature = headers.get("KALSHI-ACCESS-SIGNATURE")
        if not key_id or not stamp or not signature:
            raise RefusedSignatureError("token_authentication_failure", "missing authentication headers")
        key = self._keys.get(key_id)
        if key is None:
            raise RefusedSignatureError("token_authentication_failure", "NOT_FOUND")
        if not stamp.isascii() or not stamp.isdecimal() or len(stamp) > 18:
            raise RefusedSignatureError("header_timestamp_invalid", "timestamp is not milliseconds since the epoch")
        if abs(int(stamp) - self._clock() // 1_000_000) > SKEW_MS:
            raise RefusedSignatureError("header_timestamp_expired", "timestamp is too far from the exchange's time")
        try:
            raw = base64.b64decode(signature, validate=True)
        except (binascii.Error, ValueError):
            raise RefusedSignatureError("token_authentication_failure", "signature is not base64") from None
        try:
            signed = f"{stamp}{method}{path}".encode()
            if isinstance(key, rsa.RSAPublicKey):
                key.verify(raw, signed, _PSS, hashes.SHA256())
            else:
                key.verify(raw, signed)
        except InvalidSignature:
            raise RefusedSignatureError("token_authentication_failure", "INCORRECT_API_KEY_SIGNATURE") from None


def _read_public(pem: bytes, path: Path) -> PublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise ConfigurationError("not a public key in PEM", where=str(path), do="Delete or replace it.") from error
    if not isinstance(key, rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise ConfigurationError("neither an RSA nor an Ed25519 key", where=str(path), do="Delete or replace it.")
    return key


def write_file(path: Path, content: bytes) -> None:
    """Write a private file (0600) whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    temporary.replace(path)
