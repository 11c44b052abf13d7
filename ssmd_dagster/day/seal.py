"""The seal of a day: its manifest and the root hash over its segments.

A manifest can be derived again from the files and the journal alone, so nothing in it comes from elsewhere. Writing it
to the store and recording its hash in the journal belongs to the workflows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from ssmd_dagster.day.events import BadEventError, Gap
from ssmd_dagster.day.payloads import ConditionValue


class SegmentEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One object of the raw bucket as it was read back; `sha256` in lower-case hex."""

    key: str
    size: int
    sha256: str
    batches: int
    records: int


class TableEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One object of the normalised bucket that belongs to the revision; `sha256` in lower-case hex."""

    key: str
    size: int
    sha256: str
    rows: int


class ConnectionEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One connection of the day: the epoch it was opened under and its records per channel."""

    conn: str
    epoch: int
    records: dict[str, int]


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the day: the journal's sequence and its bytes as stored."""

    seq: int
    event: msgspec.Raw


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that is claimed of a sealed revision. `created_at` is RFC 3339 UTC, `versions` of code and configuration."""

    v: int = 1
    env: str
    feed: str
    date: str
    open_ns: int
    close_ns: int
    revision: int
    epochs: tuple[int, ...]
    segments: tuple[SegmentEntry, ...]
    root_hash: str
    tables: tuple[TableEntry, ...] = ()
    connections: tuple[ConnectionEntry, ...]
    gaps: tuple[Gap, ...]
    ledger: dict[str, Any] | None
    condition: ConditionValue
    condition_reasons: tuple[str, ...]
    rules_version: int
    journal_seq: int
    events: tuple[JournalEntry, ...]
    versions: dict[str, str]
    created_at: str

    def encode(self) -> bytes:
        """Return the canonical bytes: compact JSON, fields in this order, keys of maps sorted, a final line feed."""
        return msgspec.json.encode(self, order="deterministic") + b"\n"

    @classmethod
    def decode(cls, raw: bytes) -> Manifest:
        """Read a manifest; unknown keys are ignored.

        Raises:
            BadEventError: Not such a manifest.
        """
        try:
            return msgspec.json.decode(raw, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadEventError(f"not a manifest: {error}") from error


def root_hash(segments: Iterable[SegmentEntry]) -> str:
    """Return the SHA-256 (hex) over `key size sha256\\n` of each segment, sorted by key.

    Raises:
        ValueError: Two segments of one key, or a key that would make the text ambiguous.
    """
    digest = hashlib.sha256()
    before = ""
    for segment in sorted(segments, key=lambda entry: entry.key):
        if segment.key == before or any(character.isspace() for character in segment.key):
            raise ValueError(f"not the key of one segment: {segment.key!r}")
        before = segment.key
        digest.update(f"{segment.key} {segment.size} {segment.sha256}\n".encode())
    return digest.hexdigest()


def sha256_hex(raw: bytes) -> str:
    """Return the SHA-256 of bytes as the journal and manifests write it."""
    return hashlib.sha256(raw).hexdigest()
