"""A clean day has no fault; each fault that the reading back claims to find is found where one is put."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive import segment as segment_module
from ssmd_dagster.archive.batch import (
    Batch,
    Footer,
    SegmentFooter,
    decode_records,
    encode_batch,
    encode_footer,
    read_last,
    scan,
)
from ssmd_dagster.archive.intervals import Torn
from ssmd_dagster.archive.readback import DayReadback, Readback
from ssmd_dagster.archive.segment import SegmentWriter
from ssmd_dagster.exchange import SESSION
from ssmd_dagster_tests.capture.recordings import (
    DATE,
    Recording,
    Segments,
    a_recording,
    build_segments,
    header_of,
    read_segments,
)

RECORDINGS = [a_recording(f"812-a-{i}", seed=i) for i in range(2)]
BATCHES = [data for recording in RECORDINGS for data in recording.batches()]
TRADES = "kalshi/2025/12/14/trades-00.jsonl.zst"
TRADES_1 = "kalshi/2025/12/14/trades-01.jsonl.zst"
SESSION_KEY = "kalshi/2025/12/14/session-00.jsonl.zst"


def plain(data: bytes) -> bytes:
    """Return what any reader of zstd files gets from a segment."""
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        return reader.read()


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Segments:
    """A clean day of two connections, in some segments a channel, with joined batches of moderate size."""
    monkeypatch.setattr(segment_module, "JOIN_UP_TO_BYTES", 2_000)
    return build_segments(tmp_path, BATCHES, per_segment=12)


def batches_in(data: bytes) -> list[bytes]:
    """Return the encoded batches of a segment."""
    return [data[item.start : item.end] for item in scan(data) if isinstance(item, Batch)]


def footer_in(data: bytes) -> SegmentFooter:
    """Return a segment's footer."""
    last = read_last(data)
    assert isinstance(last, Footer)
    return last.footer


def with_content(segments: Segments, key: str, data: bytes) -> Segments:
    """Return the day with other bytes in one segment."""
    channel, number, _ = segments[key]
    return {**segments, key: (channel, number, data)}


def with_footer(segments: Segments, key: str, **changes: object) -> Segments:
    """Return the day with another footer on one segment."""
    data = segments[key][2]
    footer = msgspec.structs.replace(footer_in(data), **changes)
    return with_content(segments, key, b"".join(batches_in(data)) + encode_footer(footer))


def all_faults(segments: Segments) -> str:
    """Return everything that is found, on a line each."""
    return "\n".join(read_segments(segments).faults)


def test_a_clean_day_has_no_fault(segments: Segments) -> None:
    """And its numbers are those of the recorder, by channel and by connection."""
    readback = read_segments(segments)
    assert readback.faults == ()
    totals: dict[str, int] = {}
    for recording in RECORDINGS:
        for channel, count in recording.recorder.by_channel.items():
            totals[channel] = totals.get(channel, 0) + count
    assert readback.archived == readback.received == totals
    assert readback.records == sum(totals.values()) == sum(recording.recorder.n for recording in RECORDINGS)
    assert readback.by_connection == {r.origin.conn: r.recorder.by_channel for r in RECORDINGS}
    assert readback.epochs == {"812-a-0": 812, "812-a-1": 812}
    assert readback.intervals_confirmed > 10
    assert sum(segment.records for segment in readback.segments) == readback.records
    assert {segment.key for segment in readback.segments} == set(segments)
    assert any(number > 0 for _, number, _ in segments.values())


def test_a_day_without_anything_has_no_fault_and_no_record() -> None:
    """Nothing examined is said as such."""
    readback = read_segments({})
    assert (readback.faults, readback.records, readback.segments) == ((), 0, ())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_a_flipped_bit_is_found_or_changes_nothing_for_any_reader(segments: Segments, data: st.DataObject) -> None:
    """In records, trailers or footers; what is not found is one of the bits of a zstd frame that stand for nothing."""
    key = data.draw(st.sampled_from(sorted(segments)))
    whole = segments[key][2]
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if not all_faults(with_content(segments, key, bytes(content))):
        assert plain(bytes(content)) == plain(whole)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_any_missing_batch_is_found(tmp_path: Path, data: st.DataObject) -> None:
    """Whichever batch never got into the archive, also the last one of a connection, though every footer is honest."""
    missing = data.draw(st.integers(0, len(BATCHES) - 1))
    segments = build_segments(tmp_path, BATCHES[:missing] + BATCHES[missing + 1 :])
    header = header_of(BATCHES[missing]).header
    faults = all_faults(segments)
    assert header.conn in faults


def test_the_last_batch_of_a_connection_that_noted_little_is_missed(tmp_path: Path) -> None:
    """A connection whose only other record is `disconnected`: its one session record is not taken for the last note."""
    recording = Recording("812-a-7")
    recording.end(told=False)
    assert len(recording.batches()) == 2
    assert read_segments(build_segments(tmp_path, recording.batches())).faults == ()
    faults = all_faults(build_segments(tmp_path, recording.batches()[:1]))
    assert "no interval note covers 1 records of session" in faults


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.permutations(range(len(BATCHES))))
def test_batches_that_a_repair_put_out_of_order_verify(tmp_path: Path, order: list[int]) -> None:
    """In any order, `session` and its notes included, the day is as clean as in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_module, "JOIN_UP_TO_BYTES", 2_000)
        segments = build_segments(tmp_path, [BATCHES[i] for i in order], per_segment=20)
    readback = read_segments(segments)
    assert readback.faults == ()
    assert readback.records == sum(recording.recorder.n for recording in RECORDINGS)
    assert readback.received == readback.archived


def test_a_batch_that_was_archived_twice_is_found(tmp_path: Path) -> None:
    """Its ordinals come twice, and the notes do not add up."""
    twice = next(data for data in BATCHES if header_of(data).header.channel == "trade")
    faults = all_faults(build_segments(tmp_path, [*BATCHES, twice]))
    count = header_of(twice).header.records
    assert f"812-a-0: 0 ordinals are missing, {count} come twice" in faults


def rewritten(
    folder: Path, change: Callable[[bytes, list[bytes]], list[bytes]], channel: str = "trade", *, last: bool = False
) -> Segments:
    """Return the day with one batch's lines changed and a header that tells the truth about the result."""
    batches = list(BATCHES)
    places = [i for i, data in enumerate(batches) if header_of(data).header.channel == channel]
    place = next(i for i in (reversed(places) if last else places[2:]) if header_of(batches[i]).header.records > 1)
    batch = header_of(batches[place])
    block = decode_records(batches[place], batch)
    lines = change(block, block.splitlines(keepends=True))
    records = b"".join(lines)
    header = msgspec.structs.replace(
        batch.header, records=len(lines), bytes=len(records), sha256=hashlib.sha256(records).hexdigest()
    )
    batches[place] = encode_batch(header, records)
    return build_segments(folder, batches)


def test_a_record_that_is_left_out_of_an_honest_batch_is_found(tmp_path: Path) -> None:
    """Hash and count of the batch fit, but its ordinal is missing and the recorder's note does not."""
    faults = all_faults(rewritten(tmp_path, lambda _block, lines: [lines[0], *lines[2:]] if lines[2:] else lines[:1]))
    assert "1 ordinals are missing, 0 come twice" in faults
    assert "the recorder noted" in faults


def test_a_record_with_another_text_is_found_by_the_recorders_note(tmp_path: Path) -> None:
    """Everything else about the batch is right."""
    faults = all_faults(rewritten(tmp_path, lambda _b, lines: [*lines[:-1], lines[-1].replace(b"KX-", b"KY-")]))
    assert "the recorder noted" in faults
    assert "ordinals are missing" not in faults


def test_an_ordinal_that_comes_twice_is_found(tmp_path: Path) -> None:
    """A line that stands twice in a batch."""
    faults = all_faults(rewritten(tmp_path, lambda _b, lines: [lines[0], *lines]))
    assert "0 ordinals are missing, 1 come twice" in faults


def test_lines_in_another_order_are_found(tmp_path: Path) -> None:
    """A batch whose ordinals do not rise, or are not those that it states."""
    faults = all_faults(rewritten(tmp_path, lambda _b, lines: lines[::-1]))
    assert "does not hold the ordinals that it states" in faults


@pytest.mark.parametrize("junk", [b"no record\n", b'{"n":x,"recv_ns":1}\n', b'{"n":5}\n'])
def test_a_batch_of_something_else_is_found(tmp_path: Path, junk: bytes) -> None:
    """Lines that are no records are a fault and no crash."""
    faults = all_faults(rewritten(tmp_path, lambda _b, _l: [junk]))
    assert "holds no records" in faults


def test_a_header_with_other_ordinals_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it claims more than the notes know."""
    monkeypatch.setattr(segment_module, "JOIN_BELOW_BYTES", 0)
    batches = list(BATCHES)
    place = next(i for i, data in enumerate(batches) if header_of(data).header.channel == "trade")
    batch = header_of(batches[place])
    lie = msgspec.structs.replace(batch.header, n_last=batch.header.n_last + 1_000)
    batches[place] = encode_batch(lie, decode_records(batches[place], batch))
    assert "does not hold the ordinals that it states" in all_faults(build_segments(tmp_path, batches))


def test_an_interval_note_that_is_missing_is_found(tmp_path: Path) -> None:
    """Records that no note covers are named with their channel."""

    def without_interval(_block: bytes, lines: list[bytes]) -> list[bytes]:
        return [line for line in lines if b'"channel":"trade"' not in line] or lines[:1]

    faults = all_faults(rewritten(tmp_path, without_interval, SESSION, last=True))
    assert "no interval note covers" in faults
    assert "of trade behind" in faults


def test_a_noted_channel_of_which_nothing_is_there_is_found(segments: Segments) -> None:
    """All of a channel's segments are gone."""
    faults = all_faults({key: entry for key, entry in segments.items() if entry[0] != "ticker"})
    assert "records of ticker were noted and none is there" in faults
    readback = read_segments({key: entry for key, entry in segments.items() if entry[0] != "ticker"})
    assert readback.received["ticker"] > 0
    assert "ticker" not in readback.archived


def test_a_day_without_its_session_is_found(segments: Segments) -> None:
    """Without notes nothing proves the records, and every connection is named."""
    faults = all_faults({key: entry for key, entry in segments.items() if entry[0] != SESSION})
    assert all(f"812-a-{i}: no interval note covers" in faults for i in range(2))


def test_swapped_segments_are_found(segments: Segments) -> None:
    """Each footer says which number it is and what stands before it."""
    swapped = with_content(segments, TRADES, segments[TRADES_1][2])
    swapped = with_content(swapped, TRADES_1, segments[TRADES][2])
    faults = all_faults(swapped)
    assert f"{TRADES}: its footer says kalshi-sim 2025-12-14 trade-1" in faults
    assert f"{TRADES_1}: its footer names another segment before it" in faults


def test_a_segment_that_was_replaced_is_found_by_the_next_ones_footer(segments: Segments) -> None:
    """Also where the new one is whole in itself."""
    replaced = with_footer(segments, TRADES, epoch=900)
    assert all_faults(replaced) == (
        f"{TRADES_1}: its footer names another segment before it than the one that is there"
    )


def test_a_missing_segment_is_found(segments: Segments) -> None:
    """In the middle by the chain, at the end by the notes."""
    numbers = sorted(number for channel, number, _ in segments.values() if channel == "trade")
    for number, said in ((0, "names another segment before it"), (numbers[-1], "the recorder noted")):
        left = {key: entry for key, entry in segments.items() if entry[:2] != ("trade", number)}
        assert said in all_faults(left)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"env": "kalshi-prod"}, "its footer says kalshi-prod 2025-12-14 trade-0"),
        ({"day": "2025-12-15"}, "its footer says kalshi-sim 2025-12-15 trade-0"),
        ({"channel": "ticker"}, "its footer says kalshi-sim 2025-12-14 ticker-0"),
        ({"segment": 5}, "its footer says kalshi-sim 2025-12-14 trade-5"),
        ({"records": 7}, "its footer says 7"),
        ({"ranges": {"812-a-0": ((0, 2),)}}, "its footer names other batches than are there"),
        ({"prev_sha256": "00"}, "its footer names another segment before it"),
    ],
)
def test_a_wrong_footer_is_found(segments: Segments, changes: dict[str, object], said: str) -> None:
    """Whatever it lies about."""
    assert said in all_faults(with_footer(segments, TRADES, **changes))


def test_a_cut_or_prolonged_segment_is_found(segments: Segments) -> None:
    """Without its footer, with something behind it, or with something in front."""
    data = segments[TRADES][2]
    assert f"{TRADES}: no footer" in all_faults(with_content(segments, TRADES, data[:-1]))
    assert f"{TRADES}: no footer" in all_faults(with_content(segments, TRADES, b""))
    batch = batches_in(data)[0]
    assert f"{TRADES}: a batch behind the footer" in all_faults(with_content(segments, TRADES, data + batch))
    assert "belong to no whole batch" in all_faults(with_content(segments, TRADES, b"junk" + data))


def test_batches_of_another_environment_day_or_channel_are_found(tmp_path: Path) -> None:
    """A segment in the wrong place, or a batch in the wrong segment."""
    segments = build_segments(tmp_path, BATCHES)
    assert "is of kalshi-sim 2025-12-14 trade" in "\n".join(read_segments(segments, env="kalshi-prod").faults)
    assert "is of kalshi-sim 2025-12-14 trade" in "\n".join(read_segments(segments, date="2025-12-15").faults)
    writer = SegmentWriter(tmp_path / "x", env="kalshi-sim", day=DATE, channel="trade", number=0, prev_sha256=None)
    for data in BATCHES:
        if header_of(data).header.channel in ("trade", "ticker"):
            writer.append(data, header_of(data))
    writer.close(epoch=812)
    assert f"{TRADES}: batch 812-a-0/" in all_faults(with_content(segments, TRADES, writer.path.read_bytes()))


def torn_day(folder: Path, *notes: Torn) -> Readback:
    """Return the reading of a connection whose records 3 and 4 were never written, with these notes."""
    recording = Recording("812-a-0")
    recording.begin()
    recording.frame("trade")
    recording.recorder.flush()
    recording.recorder.n += 2
    for note in notes:
        recording.recorder.note(note.note())
    recording.end(told=False)
    return read_segments(build_segments(folder, recording.batches()))


def test_what_a_torn_flush_lost_is_no_fault_where_it_is_declared_and_as_it_is_declared(tmp_path: Path) -> None:
    """Other ordinals, another number, or no note at all: a fault."""
    assert torn_day(tmp_path, Torn(3, 4, 2)).faults == ()
    for notes in ((), (Torn(3, 4, 1),), (Torn(3, 5, 2),), (Torn(2, 4, 2),)):
        assert torn_day(tmp_path, *notes).faults == ("812-a-0: 2 ordinals are missing, 0 come twice",)


def test_a_declaration_of_what_is_not_missing_is_a_fault(tmp_path: Path) -> None:
    """The note and the records must agree both ways."""
    recording = Recording("812-a-0")
    recording.recorder.note(Torn(0, 1, 1).note())
    recording.end()
    faults = read_segments(build_segments(tmp_path, recording.batches())).faults
    assert faults == ("812-a-0: 0 ordinals are missing, 0 come twice",)


def test_bytes_that_change_while_they_are_read_are_found(segments: Segments) -> None:
    """The second look at `session` gives something else than the first."""
    readback = DayReadback("kalshi-sim", DATE)
    for key, (channel, number, data) in sorted(segments.items(), key=lambda entry: (entry[1][0] != SESSION, entry)):
        readback.feed(key, channel, number, data)
    rng = random.Random(3)
    faults = readback.finish(lambda _key, _start, length: rng.randbytes(length)).faults
    assert any("changed while it was read" in fault for fault in faults)
    assert any(fault.startswith("kalshi/2025/12/14/session-00") for fault in faults)
    assert SESSION_KEY in segments
