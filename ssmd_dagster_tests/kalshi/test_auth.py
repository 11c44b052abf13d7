"""Signing: what Kalshi verifies, by both kinds of key, and what becomes of bad ones."""

from __future__ import annotations

import base64
import traceback

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding

from ssmd_dagster.errors import ConfigurationError, ExitCode
from ssmd_dagster.kalshi.auth import open_signer
from ssmd_dagster_tests.kalshi.fakes import ED25519_KEY, NOW_NS, RSA_KEY, pem, settings

SIGNED = f"{NOW_NS // 1_000_000}GET/trade-api/v2/markets".encode()
PSS_32 = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)


def test_an_rsa_key_signs_with_pss_and_a_salt_of_32_bytes() -> None:
    """The signature verifies with exactly the parameters that Kalshi documents."""
    signer = open_signer(settings(key_id="id-1", private_key_pem=pem(RSA_KEY)))
    assert signer is not None
    headers = signer.headers("GET", "/trade-api/v2/markets", NOW_NS)
    assert headers["KALSHI-ACCESS-KEY"] == "id-1"
    assert headers["KALSHI-ACCESS-TIMESTAMP"] == str(NOW_NS // 1_000_000)
    signature = base64.b64decode(headers["KALSHI-ACCESS-SIGNATURE"], validate=True)
    RSA_KEY.public_key().verify(signature, SIGNED, PSS_32, hashes.SHA256())
    with pytest.raises(InvalidSignature):
        RSA_KEY.public_key().verify(signature, SIGNED + b"x", PSS_32, hashes.SHA256())


def test_an_ed25519_key_signs_the_bytes_directly() -> None:
    """The kind of key alone decides how it is signed."""
    signer = open_signer(settings(key_id="id-2", private_key_pem=pem(ED25519_KEY)))
    assert signer is not None
    headers = signer.headers("GET", "/trade-api/v2/markets", NOW_NS)
    ED25519_KEY.public_key().verify(base64.b64decode(headers["KALSHI-ACCESS-SIGNATURE"]), SIGNED)


def test_the_query_is_not_signed() -> None:
    """The path ends at the question mark, as Kalshi wants it."""
    signer = open_signer(settings(key_id="id-2", private_key_pem=pem(ED25519_KEY)))
    assert signer is not None
    headers = signer.headers("GET", "/trade-api/v2/markets?limit=3", NOW_NS)
    ED25519_KEY.public_key().verify(base64.b64decode(headers["KALSHI-ACCESS-SIGNATURE"]), SIGNED)


def test_without_a_key_nothing_is_signed() -> None:
    """An environment with `auth_method: none` has no signer."""
    assert open_signer(settings()) is None


@pytest.mark.parametrize(
    ("key_id", "content", "expected"),
    [
        ("id", b"not a key: s3cret", "not a readable PEM"),
        ("id", b"-----BEGIN PRIVATE KEY-----\ns3cret\n-----END PRIVATE KEY-----\n", "not a readable PEM"),
        ("id", None, "no private key"),
        (None, b"s3cret", "no key_id"),
        ("", b"s3cret", "no key_id"),
        ("id", pem(ec.generate_private_key(ec.SECP256R1())), "expected RSA or Ed25519"),
    ],
)
def test_a_bad_key_is_a_configuration_error_that_says_nothing_of_it(
    key_id: str | None, content: bytes | None, expected: str
) -> None:
    """Exit 8, where to look, and no byte of the key in the message or the traceback."""
    with pytest.raises(ConfigurationError, match=expected) as caught:
        open_signer(settings(key_id=key_id, private_key_pem=content))
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert "KALSHI_PRIVATE_KEY_PATH" in str(caught.value)
    assert "kalshi-test" in str(caught.value)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_an_encrypted_key_is_named_as_such() -> None:
    """A pass phrase is asked of nobody."""
    content = RSA_KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
    )
    with pytest.raises(ConfigurationError, match="encrypted"):
        open_signer(settings(key_id="id", private_key_pem=content))


def test_keys_do_not_show() -> None:
    """Neither the settings nor the signer print what they hold."""
    config = settings(key_id="hidden-id", private_key_pem=pem(ED25519_KEY))
    for text in (repr(config), str(config), repr(open_signer(config))):
        assert "hidden-id" not in text
        assert "PRIVATE" not in text
