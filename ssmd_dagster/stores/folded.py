"""The fold of a journal as bytes that the cache keeps, so that a reader need not fold years of events again.

A copy, never the truth: it names the event up to which it goes by that event's hash, and who reads it asks the journal for
just that. What was folded by other rules than this code's, or cannot be read, is no copy at all.
"""

from __future__ import annotations

import functools
from hashlib import sha256
from pathlib import Path

import msgspec
import zstandard

from ssmd_dagster.day import events, folding, payloads, states
from ssmd_dagster.day.events import Book

_LEVEL = 1


class Folded(msgspec.Struct, frozen=True, kw_only=True):
    """A fold up to `book.tip_seq`, whose event has the SHA-256 (hex) `tip_sha256`; `rules`: `folding_rules`."""

    rules: str
    tip_sha256: str
    book: Book


@functools.cache
def folding_rules() -> str:
    """Return the SHA-256 (hex) of the code that folds: after a change of it nothing folded before is of use."""
    sources = (module.__file__ for module in (events, folding, payloads, states))
    return sha256(b"".join(Path(source).read_bytes() for source in sources if source is not None)).hexdigest()


def pack(book: Book, tip_sha256: str) -> bytes:
    """Return the bytes of a fold: MessagePack, compressed with a checksum."""
    folded = Folded(rules=folding_rules(), tip_sha256=tip_sha256, book=book)
    return zstandard.ZstdCompressor(_LEVEL, write_checksum=True).compress(msgspec.msgpack.encode(folded))


def unpack(raw: bytes) -> Folded | None:
    """Return what `pack` made, None where it is damaged or made by other rules."""
    try:
        folded = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(raw), type=Folded)
    except (zstandard.ZstdError, msgspec.DecodeError):
        return None
    return folded if folded.rules == folding_rules() else None
