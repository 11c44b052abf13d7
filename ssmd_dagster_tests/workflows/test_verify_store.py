"""Every check of a stored day: a fault put in its way turns it red and is named, and a clean day has been looked at.

No server runs: a sealed day is verified from its folder alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ssmd_dagster.archive.batch import Batch, encode_footer, read_last, scan
from ssmd_dagster.archive.batch import Footer as FooterFound
from ssmd_dagster.errors import NotFoundError, UnexplainedDifferenceError
from ssmd_dagster.stores.stream import BatchId
from ssmd_dagster.workflows.verify import published_by_channel
from ssmd_dagster.workflows.verify_sealed import Verification, verify_store
from ssmd_dagster_tests.capture.recordings import DATE
from ssmd_dagster_tests.workflows.stored_days import StoredDay, a_day, book_frame, book_frames, trade_frames

TRADES = "kalshi/2025/12/14/trades-00.jsonl.zst"
TRADES_1 = "kalshi/2025/12/14/trades-01.jsonl.zst"


async def verified(day: StoredDay) -> Verification:
    """Verify a day from its folders."""
    return await verify_store(day.environment(), day.raw, day.normalized, DATE, lambda _text: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> StoredDay:
    """A clean day of trades and a book."""
    return StoredDay(tmp_path_factory.mktemp("day"), a_day(book_frames(), trade_frames()))


@pytest.fixture
def day(template: StoredDay, tmp_path: Path) -> StoredDay:
    """A copy of the clean day for a test to spoil."""
    copy = object.__new__(StoredDay)
    copy.__dict__.update(template.__dict__)
    for name in ("raw", "normalized"):
        shutil.copytree(template.folder / name, tmp_path / name)
    copy.folder = tmp_path
    copy.raw, copy.normalized = type(template.raw)(tmp_path / "raw"), type(template.normalized)(tmp_path / "normalized")
    return copy


async def test_a_clean_day_is_green_and_every_check_had_something_to_look_at(day: StoredDay) -> None:
    """The condition is the sealed one, and no count of what was examined is 0."""
    found = await verified(day)
    assert found.faults == ()
    assert (found.condition, found.condition_reasons) == ("available", ())
    assert min(found.examined.values()) > 0
    assert set(found.examined) == {
        *("manifests", "events", "segments", "batches", "records", "intervals", "numbers", "books", "tables"),
    }


def spoil_byte(day: StoredDay) -> None:
    """One byte of a batch's compressed records."""
    data = bytearray(day.path(TRADES).read_bytes())
    batch = next(item for item in scan(bytes(data)) if isinstance(item, Batch))
    data[(batch.start + batch.data_end) // 2] ^= 1
    day.write(TRADES, bytes(data))


def swap_segments(day: StoredDay) -> None:
    """Two objects under each other's names."""
    first, second = day.path(TRADES).read_bytes(), day.path(TRADES_1).read_bytes()
    day.write(TRADES, second)
    day.write(TRADES_1, first)


def drop_channel(day: StoredDay, channel: str) -> None:
    """All segments of a channel."""
    for key, (name, _, _) in day.segments.items():
        if name == channel:
            day.path(key).unlink()


def change_footer(day: StoredDay) -> None:
    """A footer that names another predecessor."""
    data = day.path(TRADES_1).read_bytes()
    last = read_last(data)
    assert isinstance(last, FooterFound)
    day.write(TRADES_1, data[: last.start] + encode_footer(msgspec.structs.replace(last.footer, prev_sha256="00")))


def add_segment(day: StoredDay) -> None:
    """One segment more than were sealed."""
    shutil.copy(day.path(TRADES), day.path("kalshi/2025/12/14/trades-77.jsonl.zst"))


def change_manifest(day: StoredDay) -> None:
    """A claim of the manifest: another hash for a segment."""
    first, *rest = day.manifest.segments
    day.rewrite(segments=(msgspec.structs.replace(first, sha256="0" * 64), *rest))


def change_event(day: StoredDay) -> None:
    """An event of the manifest with another actor."""
    entries = list(day.manifest.events)
    entries[1] = msgspec.structs.replace(
        entries[1], event=msgspec.Raw(bytes(entries[1].event).replace(b"cli:test", b"cli:evil"))
    )
    day.rewrite(events=tuple(entries))


def drop_line(day: StoredDay) -> None:
    """The sealed ledger with one record more spooled than there are: its events say otherwise."""
    ledger = msgspec.json.decode(msgspec.json.encode(day.manifest.ledger))
    ledger["channels"][0]["archived"] += 1
    day.rewrite(ledger=ledger)


FAULTS: dict[str, tuple[Callable[[StoredDay], object], str]] = {
    "batch hash": (spoil_byte, "batch 812-a-0/trade/0-2 is damaged"),
    "segment hash": (spoil_byte, f"{TRADES}: was changed"),
    "missing segment": (lambda day: day.path(TRADES_1).unlink(), f"{TRADES_1}: is missing"),
    "missing session": (lambda day: drop_channel(day, "session"), "no interval note could be confirmed"),
    "extra segment": (add_segment, "trades-77.jsonl.zst: a segment that no manifest names"),
    "extra object": (
        lambda day: day.write("kalshi/2025/12/14/note.txt", b"x"),
        "note.txt: an object that no manifest names",
    ),
    "swapped segments": (swap_segments, f"{TRADES}: holds the bytes of {TRADES_1}"),
    "footers": (change_footer, "names another segment before it"),
    "intervals": (lambda day: day.path(TRADES_1).unlink(), "the recorder noted"),
    "ordinals": (lambda day: day.path(TRADES_1).unlink(), "ordinals are missing"),
    "wire": (lambda day: day.path(TRADES).unlink(), "of sid 1 the numbers 1-15 are missing and no gap says so"),
    "counts": (lambda day: day.path(TRADES_1).unlink(), "trade: published - archived: +5"),
    "lost batches": (spoil_byte, "812-a-0: batches 0-2 of trade, 2025-12-14T"),
    "lost segment": (lambda day: day.path(TRADES_1).unlink(), "every batch of trade from 3 on, 2025-12-14T"),
    "connections": (lambda day: day.path(TRADES_1).unlink(), "812-a-0: 35 records, not those that were sealed"),
    "manifest": (change_manifest, "manifest.json: its root hash is not that of its segments"),
    "manifest's form": (
        lambda day: day.write(day.key, day.manifest.encode().replace(b'"v":1', b'"v": 1', 1)),
        "is not written as manifests are",
    ),
    "root hash": (lambda day: day.rewrite(root_hash="0" * 64), "its root hash is not that of its segments"),
    "other environment's manifest": (lambda day: day.rewrite(env="kalshi-prod"), "manifest.json: is of kalshi-prod"),
    "events": (change_event, "does not follow on the one before it"),
    "claims": (drop_line, "its ledger is not what its events say"),
    "condition": (lambda day: day.rewrite(condition="degraded"), "its condition is not what its events say"),
    "tables": (
        lambda day: (day.folder / "normalized" / day.table).write_bytes(b"A table"),
        "data.parquet: was changed",
    ),
    "missing table": (lambda day: (day.folder / "normalized" / day.table).unlink(), "data.parquet: is missing"),
    "extra table": (
        lambda day: (day.folder / "normalized" / day.table).with_name("data.r2.parquet").write_bytes(b""),
        "data.r2.parquet: a table that no manifest names",
    ),
}


@pytest.mark.parametrize("check", FAULTS)
async def test_each_check_turns_red_for_the_fault_it_is_there_for(day: StoredDay, check: str) -> None:
    """And says where."""
    spoil, said = FAULTS[check]
    spoil(day)
    found = await verified(day)
    assert any(said in fault for fault in found.faults), found.faults
    assert found.condition == "degraded"


async def test_a_book_that_differs_is_named_with_its_level(tmp_path: Path) -> None:
    """Connection, subscription, number, market, level and both sizes."""
    frames = book_frames(3)
    frames[-1] = book_frame(len(frames), "orderbook_snapshot", yes_dollars_fp=[["0.4000", "5.00"], ["0.4100", "1.00"]])
    stored = StoredDay(tmp_path, a_day(frames, trade_frames()))
    found = await verified(stored)
    assert found.faults[0] == (
        "812-a-0: order book at sid 2 seq 7: KX-1: yes 0.4100 is 1.50 folded and 1.00 in the snapshot"
    )
    assert "books: differing: +1" in found.faults


async def test_what_was_not_looked_at_is_not_called_fine(tmp_path: Path) -> None:
    """A book without a second snapshot proves nothing: the line is not computed, and the day pending."""
    stored = StoredDay(tmp_path, a_day(book_frames(0), trade_frames()))
    found = await verified(stored)
    assert found.ledger.books.points is None
    assert (found.faults, found.condition) == ((), "pending")
    assert found.condition_reasons == ("not computed: books (no book has a second snapshot)",)


def test_what_has_left_the_stream_was_proved_before(day: StoredDay) -> None:
    """Of a connection of which the stream has nothing the archive speaks; of one that it has in part, the stream."""
    ((conn, channels),) = day.readback.by_connection.items()
    there = {BatchId("900-rest-0", "rest", 0): 3}
    assert published_by_channel(there, None) == {"rest": 3}
    assert published_by_channel(there, day.readback) == {"rest": 3, **channels}
    assert published_by_channel({BatchId(conn, "trade", 0): 1}, day.readback) == {"trade": 1}


async def test_an_empty_store_is_no_verified_day(day: StoredDay) -> None:
    """Without a manifest, and with a manifest whose files are all gone."""
    for key in day.segments:
        day.path(key).unlink()
    found = await verified(day)
    assert "there was nothing to check: no records" in found.faults
    day.path(day.key).write_bytes(day.manifest.encode()[:-9])
    with pytest.raises(UnexplainedDifferenceError, match=r"manifest\.json: not a manifest") as unreadable:
        await verified(day)
    assert unreadable.value.exit_code == 6
    day.path(day.key).unlink()
    with pytest.raises(NotFoundError, match="no manifest"):
        await verified(day)
