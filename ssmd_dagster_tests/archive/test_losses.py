"""What a day's segments do not give back is named by its batches, its time and its numbers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ssmd_dagster.archive import segment as segment_module
from ssmd_dagster.archive.batch import Batch, scan
from ssmd_dagster.archive.losses import Loss
from ssmd_dagster_tests.capture.recordings import Segments, a_recording, build_segments, header_of, read_segments

RECORDING = a_recording("812-a-0", frames=200)
TRADES = [header_of(data).header for data in RECORDING.batches() if header_of(data).header.channel == "trade"]


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Segments:
    """A clean day of one connection, every batch as it was recorded, three of them in a segment."""
    monkeypatch.setattr(segment_module, "JOIN_BELOW_BYTES", 0)
    return build_segments(tmp_path, RECORDING.batches(), per_segment=3)


def spoilt(segments: Segments, key: str, *, trailer: bool) -> Segments:
    """Return the day with a byte changed in the second batch of a segment: in its data, or in its trailer."""
    channel, number, data = segments[key]
    batch = [item for item in scan(data) if isinstance(item, Batch)][1]
    changed = bytearray(data)
    changed[batch.data_end + 20 if trailer else (batch.start + batch.data_end) // 2] ^= 0x10
    return {**segments, key: (channel, number, bytes(changed))}


def key_of(segments: Segments, channel: str, number: int) -> str:
    """Return a segment's key."""
    return next(key for key, (name, at, _) in segments.items() if (name, at) == (channel, number))


def test_a_clean_day_has_lost_nothing(segments: Segments) -> None:
    """Whatever order the segments are in."""
    assert read_segments(segments).losses == ()


def test_a_spoilt_batch_is_lost_with_the_time_and_the_numbers_of_its_header(segments: Segments) -> None:
    """Exactly that batch."""
    (loss,) = read_segments(spoilt(segments, key_of(segments, "trade", 1), trailer=False)).losses
    header = TRADES[4]
    assert loss == Loss(
        conn="812-a-0",
        channel="trade",
        first=4,
        last=4,
        from_ns=header.recv_first_ns,
        to_ns=header.recv_last_ns,
        seq={sid: (low, high) for sid, (low, high, _) in header.seq.items()},
    )


def test_without_its_header_a_lost_batch_lies_between_its_neighbours(segments: Segments) -> None:
    """Between the last record before it and the first behind it; the numbers between theirs are missing."""
    (loss,) = read_segments(spoilt(segments, key_of(segments, "trade", 1), trailer=True)).losses
    assert (loss.first, loss.last) == (4, 4)
    assert (loss.from_ns, loss.to_ns) == (TRADES[3].recv_last_ns, TRADES[5].recv_first_ns)
    assert loss.seq == {"5": (TRADES[3].seq["5"][1] + 1, TRADES[5].seq["5"][0] - 1)}


def test_a_segment_that_is_gone_is_lost_wherever_it_stood(segments: Segments) -> None:
    """The first, one between others, and the last, of which the recorder's notes say that it was there."""
    last = max(number for channel, number, _ in segments.values() if channel == "trade")
    for number, lost in ((0, (0, 2)), (1, (3, 5)), (last, (last * 3, None))):
        left = {key: value for key, value in segments.items() if key != key_of(segments, "trade", number)}
        (loss,) = read_segments(left).losses
        assert (loss.channel, loss.first, loss.last) == ("trade", *lost)
        assert TRADES[0].recv_first_ns - 10**9 < loss.from_ns <= loss.to_ns
        inside = TRADES[loss.first : None if loss.last is None else loss.last + 1]
        assert loss.from_ns <= inside[0].recv_first_ns
        assert inside[-1].recv_last_ns <= loss.to_ns


def test_a_channel_or_the_notes_that_are_gone_are_lost_whole(segments: Segments) -> None:
    """All of `trade`; all of `session`; and of `session` its end, where records are there that no note covers."""
    for channel in ("trade", "session"):
        left = {key: value for key, value in segments.items() if value[0] != channel}
        (loss,) = (loss for loss in read_segments(left).losses if loss.channel == channel)
        assert (loss.first, loss.last) == (0, None)
    last = max(number for channel, number, _ in segments.values() if channel == "session")
    left = {key: value for key, value in segments.items() if key != key_of(segments, "session", last)}
    assert [loss.last for loss in read_segments(left).losses if loss.channel == "session"] == [None]


def test_batches_that_a_repair_put_elsewhere_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those that come twice."""
    monkeypatch.setattr(segment_module, "JOIN_BELOW_BYTES", 0)
    batches = RECORDING.batches()
    random.Random(1).shuffle(batches)
    assert read_segments(build_segments(tmp_path, batches, per_segment=3)).losses == ()
