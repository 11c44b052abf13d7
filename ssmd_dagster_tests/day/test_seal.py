"""Root hashes and manifests."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.events import BadEventError
from ssmd_dagster.day.seal import ConnectionEntry, JournalEntry, Manifest, SegmentEntry, root_hash, sha256_hex
from ssmd_dagster_tests.day.builders import DATE, ENV, started


def segment(key: str, size: int = 5, sha256: str = "ab") -> SegmentEntry:
    """A segment of two records."""
    return SegmentEntry(key=key, size=size, sha256=sha256, batches=1, records=2)


SEGMENTS = [
    segment("kalshi/2025/12/14/trades-00.jsonl.zst"),
    segment("kalshi/2025/12/14/session-00.jsonl.zst", 9, "cd"),
]


def manifest() -> Manifest:
    """A small manifest."""
    return Manifest(
        env=ENV,
        feed="kalshi",
        date=DATE,
        open_ns=1,
        close_ns=2,
        revision=1,
        epochs=(2,),
        segments=tuple(SEGMENTS),
        root_hash=root_hash(SEGMENTS),
        connections=(ConnectionEntry(conn="2-a-0", epoch=2, records={"trade": 2, "session": 2}),),
        gaps=(),
        ledger=None,
        condition="pending",
        condition_reasons=("not verified",),
        rules_version=1,
        journal_seq=3,
        events=tuple(JournalEntry(seq=seq, event=msgspec.Raw(event.encode())) for seq, event in started().events),
        versions={"ssmd": "0.1.0"},
        created_at="2025-12-15T00:07:00Z",
    )


def test_the_root_hash_is_over_keys_sizes_and_hashes_in_order() -> None:
    """Anyone can compute it with sort and sha256sum."""
    text = "kalshi/2025/12/14/session-00.jsonl.zst 9 cd\nkalshi/2025/12/14/trades-00.jsonl.zst 5 ab\n"
    assert root_hash(SEGMENTS) == hashlib.sha256(text.encode()).hexdigest()
    assert root_hash([]) == sha256_hex(b"")


@given(st.permutations([segment(f"k{number}", number) for number in range(6)]))
def test_the_order_in_which_segments_are_listed_does_not_matter(segments: list[SegmentEntry]) -> None:
    """A store may list objects as it likes."""
    assert root_hash(segments) == root_hash(segment(f"k{number}", number) for number in range(6))


@pytest.mark.parametrize("keys", [("a", "a"), ("a b",), ("a\n",)])
def test_ambiguous_keys_are_refused(keys: tuple[str, ...]) -> None:
    """Twice the same key, or white space in one, would let two lists have one hash."""
    with pytest.raises(ValueError, match="not the key of one segment"):
        root_hash(segment(key) for key in keys)


def test_a_manifest_has_one_form() -> None:
    """The same content gives the same bytes, and the events keep theirs."""
    raw = manifest().encode()
    again = Manifest.decode(raw)
    assert again.encode() == raw
    assert raw.endswith(b"}\n")
    assert bytes(again.events[0].event) == started().events[0][1].encode()
    reordered = msgspec.structs.replace(
        manifest(), connections=(ConnectionEntry(conn="2-a-0", epoch=2, records={"session": 2, "trade": 2}),)
    )
    assert reordered.encode() == raw


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff\xff", b'{"v":1}'])
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    """Broken bytes raise an error of ours."""
    with pytest.raises(BadEventError):
        Manifest.decode(raw)
