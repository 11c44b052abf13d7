"""A segment holds what was appended, joined where it is small, and its footer says so."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive import segment as segment_module
from ssmd_dagster.archive.batch import Batch, BatchDamagedError, Footer, SegmentFooter, decode_records, read_last, scan
from ssmd_dagster.archive.segment import SegmentWriter, add_range, covered, in_ranges
from ssmd_dagster_tests.archive.batches import make_batch
from ssmd_dagster_tests.capture.recordings import Recording, header_of


def a_writer(folder: Path, number: int = 0, prev_sha256: str | None = None) -> SegmentWriter:
    """Return an empty segment of trades."""
    path = folder / f"trades-{number:02d}.jsonl.zst"
    return SegmentWriter(
        path, env="kalshi-sim", day="2025-12-14", channel="trade", number=number, prev_sha256=prev_sha256
    )


def batches_of(conn: str, sizes: list[int]) -> list[bytes]:
    """Return consecutive batches of trades, each of one record with about so many bytes."""
    recording = Recording(conn)
    for seq, size in enumerate(sizes):
        recording.frame("trade", seq=seq, pad="x" * size)
        recording.recorder.flush()
    return recording.batches()


def records_in(data: bytes) -> list[bytes]:
    """Return the records of each batch in a run of bytes."""
    return [decode_records(data, item) for item in scan(data) if isinstance(item, Batch)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_a_segment_holds_exactly_what_was_appended_in_any_order(tmp_path: Path, data: st.DataObject) -> None:
    """Joined or not, out of order or with holes: the records, ranges, counts and sequence spans are those of the batches."""
    small = data.draw(st.integers(0, 2_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_module, "JOIN_BELOW_BYTES", small)
        patch.setattr(segment_module, "JOIN_UP_TO_BYTES", 2_000)
        sizes = st.lists(st.integers(0, 1_500), min_size=1, max_size=12)
        offered = [
            (conn, number, encoded)
            for conn in ("812-a-0", "812-a-1")
            for number, encoded in enumerate(batches_of(conn, data.draw(sizes)))
        ]
        chosen = data.draw(st.permutations(offered))[: data.draw(st.integers(1, len(offered)))]
        writer = a_writer(tmp_path)
        for _, _, encoded in chosen:
            writer.append(encoded, header_of(encoded))
            assert all(waiting <= 2_000 + 1_700 for waiting in writer._waiting_bytes.values())
        footer = writer.close(epoch=7)
    content = writer.path.read_bytes()
    assert (writer.size_bytes, writer.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(b"".join(records_in(content)).splitlines()) == sorted(
        line for _, _, encoded in chosen for line in decode_records(encoded, header_of(encoded)).splitlines()
    )
    last = read_last(content)
    assert isinstance(last, Footer)
    assert last.footer == footer
    assert (footer.batches, footer.records, footer.epoch) == (len(chosen), len(chosen), 7)
    held = {(conn, n) for conn, first, end in covered([footer]) for n in range(first, end + 1)}
    assert held == {(conn, number) for conn, number, _ in chosen}
    for item in scan(content):
        if isinstance(item, Batch):
            header, records = item.header, decode_records(content, item)
            first, end = header.span
            assert end - first + 1 == header.records == records.count(b"\n")
            assert header.n_last - header.n_first + 1 == header.records
            assert header.seq == {"1": (first, end, header.records)}
            assert header.bytes == len(records) <= max(2_000, 1_700)


def test_large_batches_are_passed_on_byte_for_byte(tmp_path: Path) -> None:
    """A batch that is not joined keeps its bytes; what waited of its connection stands before it."""
    small, large, after = batches_of("812-a-0", [10, 300_000, 10])
    writer = a_writer(tmp_path)
    for encoded in (small, large, after):
        writer.append(encoded, header_of(encoded))
    writer.close(epoch=7)
    content = writer.path.read_bytes()
    assert content.startswith(small + large + after)
    headers = [item.header for item in scan(content) if isinstance(item, Batch)]
    assert [header.joined for header in headers] == [None, None, None]


def test_what_waits_in_memory_counts_towards_the_size(tmp_path: Path) -> None:
    """Small batches of many connections cannot pile up unseen."""
    writer = a_writer(tmp_path)
    assert writer.empty
    for number in range(20):
        (encoded,) = batches_of(f"812-a-{number}", [10_000])
        writer.append(encoded, header_of(encoded))
    assert writer.size_bytes == 0
    assert writer.waiting_bytes > 200_000
    assert not writer.empty
    writer.close(epoch=7)
    assert writer.waiting_bytes == 0


def test_neighbours_of_another_epoch_are_not_joined(tmp_path: Path) -> None:
    """A joined batch states one epoch."""
    parts = [Recording("812-a-0"), Recording("812-a-0")]
    parts[1].origin = parts[1].recorder.origin = type(parts[1].origin)(
        env="kalshi-sim", day="2025-12-14", epoch=900, conn="812-a-0"
    )
    writer = a_writer(tmp_path)
    for number, recording in enumerate(parts):
        for _ in range(number + 1):
            recording.frame("trade")
            recording.recorder.flush()
        encoded = recording.batches()[number]
        writer.append(encoded, header_of(encoded))
    writer.close(epoch=900)
    headers = [item.header for item in scan(writer.path.read_bytes()) if isinstance(item, Batch)]
    assert [(header.epoch, header.batch, header.joined) for header in headers] == [(812, 0, None), (900, 1, None)]


def test_a_damaged_small_batch_is_not_taken(tmp_path: Path) -> None:
    """It had to be looked into to be joined: it is named, and the segment holds nothing of it."""
    first, second = make_batch(b'{"n":0}\n'), make_batch(b'{"n":10}\n', batch=1)
    spoilt = bytearray(second)
    spoilt[10] ^= 1
    writer = a_writer(tmp_path)
    writer.append(first, header_of(first))
    with pytest.raises(BatchDamagedError, match="812-a-0/trade/1"):
        writer.append(bytes(spoilt), header_of(bytes(spoilt)))
    footer = writer.close(epoch=7)
    assert (footer.batches, footer.ranges) == (1, {"812-a-0": ((0, 0),)})


def test_segments_are_chained_by_hash(tmp_path: Path) -> None:
    """Each footer names the segment before it, the first one none."""
    first = a_writer(tmp_path)
    first.append(make_batch(b'{"n":0}\n'), header_of(make_batch(b'{"n":0}\n')))
    assert first.close(epoch=7).prev_sha256 is None
    second = a_writer(tmp_path, 1, first.sha256)
    assert second.close(epoch=8).prev_sha256 == first.sha256


def test_a_discarded_segment_leaves_no_file(tmp_path: Path) -> None:
    """Also one that was closed, and also twice."""
    writer = a_writer(tmp_path)
    writer.close(epoch=7)
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 5))))
def test_ranges_are_sets_of_numbers_per_connection(added: list[tuple[str, int, int]]) -> None:
    """Overlapping, touching or apart, in any order: what is inside is what was added, sorted and merged."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    numbers: set[tuple[str, int]] = set()
    for conn, first, more in added:
        add_range(ranges, conn, first, first + more)
        numbers |= {(conn, n) for n in range(first, first + more + 1)}
    assert {(conn, n) for conn in "abc" for n in range(60) if in_ranges(ranges, conn, n)} == numbers
    for spans in ranges.values():
        assert spans == sorted(spans)
        assert all(a[1] + 1 < b[0] for a, b in pairwise(spans))


def test_what_footers_cover_is_listed(tmp_path: Path) -> None:
    """Connection, first and last of every range."""
    footer = SegmentFooter(
        v=1,
        footer=True,
        env="e",
        day="2025-12-14",
        channel="trade",
        segment=0,
        epoch=7,
        prev_sha256=None,
        batches=4,
        records=4,
        ranges={"a": ((0, 1), (5, 5)), "b": ((2, 2),)},
    )
    assert list(covered([footer, footer])) == [("a", 0, 1), ("a", 5, 5), ("b", 2, 2)] * 2
