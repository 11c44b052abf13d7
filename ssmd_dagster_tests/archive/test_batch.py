"""Batches are read back whole or not at all, and damage costs only the batch that it hit."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import duckdb
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.archive.batch import (
    Batch,
    BatchDamagedError,
    Damage,
    Footer,
    decode_records,
    encode_batch,
    read_last,
    scan,
    scan_back,
)
from ssmd_dagster.archive.segment import SegmentWriter, add_range, in_ranges
from ssmd_dagster_tests.archive.batches import make_batch

RECORDS = st.lists(st.integers(0, 10**9), min_size=1, max_size=50).map(
    lambda numbers: b"".join(b'{"n":%d,"recv_ns":1,"wire":{}}\n' % n for n in numbers)
)


@given(st.lists(RECORDS, min_size=1, max_size=6))
def test_batches_are_found_from_the_front_and_from_the_back(parts: list[bytes]) -> None:
    """Scanning forward and walking back list the same batches with the same records."""
    buffer = b"".join(make_batch(part, batch=i) for i, part in enumerate(parts))
    found = [item for item in scan(buffer) if isinstance(item, Batch)]
    assert [decode_records(buffer, batch) for batch in found] == parts
    end, backwards = len(buffer), []
    while end:
        last = read_last(buffer, end)
        assert isinstance(last, Batch)
        backwards.append(last.header.batch)
        end = last.start
    assert backwards == list(range(len(parts)))[::-1]


@given(st.lists(RECORDS, min_size=2, max_size=4), st.data())
def test_one_flipped_bit_costs_one_batch(parts: list[bytes], data: st.DataObject) -> None:
    """Whatever bit flips, every other batch is still read, and the spoilt one never gives wrong records."""
    batches = [make_batch(part, batch=i) for i, part in enumerate(parts)]
    buffer = bytearray(b"".join(batches))
    position = data.draw(st.integers(0, len(buffer) - 1))
    buffer[position] ^= 1 << data.draw(st.integers(0, 7))
    starts = [sum(map(len, batches[:i])) for i in range(len(batches))]
    hit = max(i for i, start in enumerate(starts) if start <= position)
    read = {}
    for item in scan(bytes(buffer)):
        if isinstance(item, Batch):
            try:
                read[item.header.batch] = decode_records(bytes(buffer), item)
            except BatchDamagedError:
                assert item.header.batch == hit
    assert {i: part for i, part in enumerate(parts) if i != hit} == {i: read[i] for i in read if i != hit}
    assert read.get(hit, parts[hit]) == parts[hit]


@given(st.lists(RECORDS, min_size=1, max_size=5), st.data())
def test_scanning_back_finds_the_whole_batches_of_a_damaged_run(parts: list[bytes], data: st.DataObject) -> None:
    """With junk between them, in front and behind, every batch is found from the back, last first."""
    junk = st.binary(max_size=40)
    buffer, starts = data.draw(junk), []
    for i, part in enumerate(parts):
        starts.append(len(buffer))
        buffer += make_batch(part, batch=i) + data.draw(junk)
    found = list(scan_back(buffer))
    assert [(item.start, decode_records(buffer, item)) for item in found if isinstance(item, Batch)] == list(
        zip(starts, parts, strict=True)
    )[::-1]


@given(st.binary(max_size=400))
def test_any_bytes_are_scanned_back_without_an_exception(junk: bytes) -> None:
    """Random bytes hold no batch."""
    assert list(scan_back(junk)) == []


@given(RECORDS, RECORDS, st.data())
def test_a_torn_tail_costs_only_the_torn_batch(first: bytes, second: bytes, data: st.DataObject) -> None:
    """A file cut anywhere in its last batch keeps what came before and names the torn bytes."""
    whole, torn = make_batch(first), make_batch(second, batch=1)
    cut = data.draw(st.integers(1, len(torn) - 1))
    items = list(scan(whole + torn[:cut]))
    assert isinstance(items[0], Batch)
    assert items[1:] == [Damage(len(whole), len(whole) + cut)]


@given(st.binary(max_size=400))
def test_any_bytes_are_scanned_without_an_exception(junk: bytes) -> None:
    """Random bytes are damage and never an exception or an endless loop."""
    assert sum(item.end - item.start for item in scan(junk) if isinstance(item, Damage)) == len(junk)


@pytest.mark.parametrize("lie", [5, 1 << 40])
def test_a_header_that_lies_about_its_size_is_refused_before_memory_is_taken(lie: int) -> None:
    """A stated size that differs from the frame's, or is beyond the limit, names the batch and allocates nothing."""
    records = b'{"n":0}\n'
    honest = next(iter(scan(make_batch(records))))
    assert isinstance(honest, Batch)
    buffer = encode_batch(msgspec.structs.replace(honest.header, bytes=lie), records)
    batch = next(iter(scan(buffer)))
    assert isinstance(batch, Batch)
    with pytest.raises(BatchDamagedError, match="812-a-0/trade/0"):
        decode_records(buffer, batch)


def test_a_trailer_that_claims_more_data_than_there_is_is_damage() -> None:
    """Lengths that point before the beginning of the file are not followed."""
    batch = bytearray(make_batch(b'{"n":0}\n'))
    struct.pack_into("<I", batch, len(batch) - 12, 1 << 31)
    assert read_last(bytes(batch)) is None
    assert list(scan(bytes(batch))) == [Damage(0, len(batch))]


def test_a_segment_joins_small_neighbours_and_reads_as_plain_zstd(tmp_path: Path) -> None:
    """Small batches of one connection become one; `zstd -dc` semantics and DuckDB read the file; the footer is last."""
    parts = [b"".join(b'{"n":%d,"recv_ns":1,"wire":{"x":1}}\n' % (i * 10 + j) for j in range(10)) for i in range(20)]
    writer = SegmentWriter(
        tmp_path / "trades-00.jsonl.zst", env="e", day="2025-12-14", channel="trade", number=0, prev_sha256=None
    )
    for i, part in enumerate(parts):
        encoded = make_batch(part, batch=i, conn=f"1-a-{i % 2}")
        batch = read_last(encoded)
        assert isinstance(batch, Batch)
        writer.append(
            encoded, msgspec.structs.replace(batch, header=msgspec.structs.replace(batch.header, batch=i // 2))
        )
    footer = writer.close(epoch=7)
    buffer = writer.path.read_bytes()
    items = list(scan(buffer))
    assert [type(item) for item in items] == [Batch, Batch, Footer]
    assert isinstance(items[0], Batch)
    assert items[0].header.joined == (0, 9)
    assert decode_records(buffer, items[0]) == b"".join(parts[0::2])
    assert footer.ranges == {"1-a-0": ((0, 9),), "1-a-1": ((0, 9),)}
    assert (footer.records, footer.batches) == (200, 20)
    with zstandard.ZstdDecompressor().stream_reader(buffer, read_across_frames=True) as reader:
        assert reader.read() == b"".join(parts[0::2]) + b"".join(parts[1::2])
    query = f"select count(*), sum(n) from read_json('{writer.path}', format='newline_delimited')"
    assert duckdb.connect().execute(query).fetchall() == [(200, sum(range(200)))]


@given(st.lists(st.integers(0, 30)))
def test_ranges_hold_exactly_the_numbers_put_in(numbers: list[int]) -> None:
    """Ranges of batches are a set of numbers, whatever the order in which they come."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for number in numbers:
        add_range(ranges, "c", number, number)
    assert {n for n in range(32) if in_ranges(ranges, "c", n)} == set(numbers)
    assert all(a[1] + 1 < b[0] for a, b in zip(ranges.get("c", []), ranges.get("c", [])[1:], strict=False))


def test_the_zstd_tool_reads_a_batch(tmp_path: Path, zstd_tool: str) -> None:
    """The command-line tool skips the trailer and gives the records."""
    path = tmp_path / "x.zst"
    path.write_bytes(make_batch(b'{"n":0}\n'))
    assert subprocess.run([zstd_tool, "-dc", path], capture_output=True, check=True).stdout == b'{"n":0}\n'
