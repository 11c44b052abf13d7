"""Signing of Kalshi requests with an RSA (PSS) or Ed25519 key.

Not for finding keys: whoever opens the exchange brings the PEM. Nothing of a key is ever printed, logged or put into an
error.
"""

from __future__ import annotations

import base64

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.exchange import ExchangeSettings

_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)


def where_the_key_is(environment: str) -> str:
    """Say where a person looks when Kalshi does not take the key."""
    return (
        f"Look at keys.kalshi of environment {environment}: the variables it names for key_id and private_key_path "
        "(as shipped KALSHI_API_KEY and KALSHI_PRIVATE_KEY_PATH) must belong together and to this host, "
        "and this machine's clock must be right"
    )


class Signer:
    """Makes the three headers that Kalshi wants on REST requests and on the WebSocket's upgrade request."""

    def __init__(self, key_id: str, private_key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> None:
        self._key_id = key_id
        self._private_key = private_key

    def __repr__(self) -> str:
        return "Signer(key hidden)"

    def headers(self, method: str, path: str, now_ns: int) -> dict[str, str]:
        """Sign `{ms}{METHOD}{path}`; `path` is the URL's path without host and query. `now_ns` must be within seconds
        of Kalshi's clock, or it answers 401 `header_timestamp_expired`."""
        timestamp_ms = str(now_ns // 1_000_000)
        text = f"{timestamp_ms}{method}{path.partition('?')[0]}".encode()
        if isinstance(self._private_key, rsa.RSAPrivateKey):
            signature = self._private_key.sign(text, _PSS, hashes.SHA256())
        else:
            signature = self._private_key.sign(text)
        return {
            "KALSHI-ACCESS-KEY": self._key_id,
            "KALSHI-ACCESS-TIMESTAMP": timestamp_ms,
            "KALSHI-ACCESS-SIGNATURE": base64.b64encode(signature).decode(),
        }


def open_signer(settings: ExchangeSettings) -> Signer | None:
    """Read the key of `settings`; None without. Raises `ConfigurationError` for half a key or a bad PEM."""
    if settings.key_id is None and settings.private_key_pem is None:
        return None
    where = f"environment {settings.environment}"
    do = where_the_key_is(settings.environment)
    if not settings.key_id or not settings.private_key_pem:
        missing = "key_id" if not settings.key_id else "private key"
        raise ConfigurationError(f"the Kalshi key is incomplete: no {missing}", where=where, do=do)
    try:
        private_key = serialization.load_pem_private_key(settings.private_key_pem, password=None)
    except TypeError:
        raise ConfigurationError("the Kalshi private key is encrypted", where=where, do=do) from None
    except (ValueError, UnsupportedAlgorithm):
        # Without the cause: the parser's message may quote what it could not read.
        raise ConfigurationError("the Kalshi private key is not a readable PEM", where=where, do=do) from None
    if not isinstance(private_key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        kind = type(private_key).__name__
        raise ConfigurationError(f"the Kalshi private key is a {kind}, expected RSA or Ed25519", where=where, do=do)
    return Signer(settings.key_id, private_key)
