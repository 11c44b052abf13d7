"""Every frame becomes one record with the next ordinal, in a batch within the limits, and in an interval that adds up."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.batch import decode_records
from ssmd_dagster.archive.intervals import IntervalCheck, ends_session, intervals_in
from ssmd_dagster.archive.records import parse_record, payload_of
from ssmd_dagster.capture import recorder as recorder_module
from ssmd_dagster.capture.recorder import MAX_BATCH_BYTES, MAX_BATCH_RECORDS, Unsealed, seal
from ssmd_dagster.exchange import OTHER, SESSION
from ssmd_dagster_tests.capture.recordings import Recording, a_recording, header_of

ACTIONS = st.lists(
    st.sampled_from(
        ["trade", "ticker", "orderbook_delta", "subscribed", "unheard_of", "junk", "note", "flush", "interval"]
    ),
    max_size=60,
)


def played(actions: list[str]) -> Recording:
    """Return a recording of `actions`, ended."""
    recording = Recording()
    for i, action in enumerate(actions):
        match action:
            case "junk":
                recording.raw(b"\xff not json %d" % i)
            case "note":
                recording.recorder.note({"event": "note"})
            case "flush":
                recording.recorder.flush()
            case "interval":
                recording.recorder.note_interval()
            case _:
                recording.frame(action, sid=1 + i % 2, seq=i)
    recording.end()
    return recording


def all_batches(recording: Recording) -> list[Unsealed]:
    """Return the recording's batches in order."""
    return [unsealed for flush in recording.flushes for unsealed in flush]


@settings(deadline=None)
@given(ACTIONS)
def test_ordinals_run_from_0_over_all_channels_and_batches_from_0_in_each(actions: list[str]) -> None:
    """No ordinal is missing or comes twice, no flush goes back, and each channel's batches are numbered without a hole."""
    recording = played(actions)
    seen: list[int] = []
    numbers: dict[str, list[int]] = {}
    for flush in recording.flushes:
        ordinals = []
        for unsealed in flush:
            records = [parse_record(line) for line in unsealed.block.splitlines()]
            own = [record.n for record in records]
            assert own == sorted(own)
            assert (own[0], own[-1], len(own)) == (unsealed.n_first, unsealed.n_last, unsealed.records)
            assert (records[0].recv_ns, records[-1].recv_ns) == (unsealed.recv_first_ns, unsealed.recv_last_ns)
            numbers.setdefault(unsealed.channel, []).append(unsealed.batch)
            ordinals += own
        seen += sorted(ordinals)
    assert seen == list(range(recording.recorder.n))
    assert all(found == list(range(len(found))) for found in numbers.values())
    assert recording.ended == ["closed by this side"]


@settings(deadline=None)
@given(ACTIONS)
def test_payloads_come_back_in_the_order_in_which_they_came(actions: list[str]) -> None:
    """By ordinal the records give back exactly the frames of the socket."""
    recording = played(actions)
    records = sorted(
        (record for batch in all_batches(recording) for record in map(parse_record, batch.block.splitlines())),
        key=lambda record: record.n,
    )
    assert [payload for record in records if (payload := payload_of(record)) is not None] == recording.payloads
    assert recording.recorder.frames == len(recording.payloads)
    assert recording.recorder.bytes == sum(map(len, recording.payloads))
    assert sum(recording.recorder.by_channel.values()) == recording.recorder.n


@settings(deadline=None)
@given(ACTIONS)
def test_intervals_are_borne_out_by_the_records_and_leave_out_only_the_last_note(actions: list[str]) -> None:
    """Recomputing every interval note from the batches confirms it; only the note about `session` itself is in none."""
    recording = played(actions)
    blocks: dict[str, list[Unsealed]] = {}
    for unsealed in all_batches(recording):
        blocks.setdefault(unsealed.channel, []).append(unsealed)
    stated = [interval for batch in blocks[SESSION] for interval in intervals_in(batch.block)]
    for channel, batches in blocks.items():
        check = IntervalCheck(channel, stated)
        for batch in batches:
            check.feed(batch.block, batch.n_first, batch.n_last)
        left = check.finish()
        assert check.mismatches == []
        assert check.confirmed == sum(interval.channel == channel for interval in stated)
        if channel == SESSION:
            assert left is not None
            assert (left.records, left.n_last) == (1, recording.recorder.n - 1)
        else:
            assert left is None
    assert ends_session(blocks[SESSION][-1].block.splitlines()[-1])


def test_a_batch_holds_at_most_1000_records() -> None:
    """The thousandth record of a channel flushes all channels together."""
    recording = Recording()
    recording.frame("ticker")
    for seq in range(2 * MAX_BATCH_RECORDS + 1):
        recording.frame("trade", seq=seq)
    recording.recorder.flush()
    assert [[(u.channel, u.batch, u.records) for u in flush] for flush in recording.flushes] == [
        [("ticker", 0, 1), ("trade", 0, 1000)],
        [("trade", 1, 1000)],
        [("trade", 2, 1)],
    ]


def test_a_batch_holds_at_most_4_mib_and_a_larger_frame_is_a_batch_of_its_own() -> None:
    """Records are flushed before they are too much together; a frame beyond the limit has no company."""
    recording = Recording()
    for size in (3 << 20, 2 << 20, 5 << 20, 1):
        recording.frame("orderbook_delta", pad="x" * size)
    recording.recorder.flush()
    batches = all_batches(recording)
    assert [(batch.records, batch.n_first) for batch in batches] == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert [len(batch.block) > MAX_BATCH_BYTES for batch in batches] == [False, False, True, False]


def test_many_small_frames_fill_a_batch_up_to_the_limit_in_bytes() -> None:
    """No batch of several records is larger than 4 MiB."""
    recording = Recording()
    for seq in range(90):
        recording.frame("trade", seq=seq, pad="x" * 100_000)
    recording.recorder.flush()
    batches = all_batches(recording)
    assert [batch.records for batch in batches] == [41, 41, 8]
    assert all(len(batch.block) <= MAX_BATCH_BYTES for batch in batches)


def test_a_frame_beyond_the_limit_is_refused_by_a_note_with_its_size_and_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large for any batch is not kept, and the record in its place says so."""
    monkeypatch.setattr(recorder_module, "MAX_FRAME_BYTES", 1_000)
    recording = Recording()
    payload = recording.frame("trade", pad="x" * 1_000)
    recording.frame("trade")
    recording.recorder.flush()
    (note, trade) = sorted((parse_record(batch.block) for batch in all_batches(recording)), key=lambda record: record.n)
    assert note.note == {
        "event": "oversized",
        "channel": "trade",
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    assert payload_of(trade) == recording.payloads[1]


def test_frames_are_filed_by_type_and_what_nobody_knows_is_other() -> None:
    """Known types go to their channel, answers to `session`, unknown types and odd bytes to `other`, counted."""
    recording = Recording()
    for kind in ("trade", "ticker", "orderbook_delta", "subscribed", "unheard_of"):
        recording.frame(kind)
    recording.raw(b"{'no': json}")
    recording.raw(b"")
    recording.recorder.flush()
    assert recording.recorder.by_channel == {"trade": 1, "ticker": 1, "orderbook_delta": 1, SESSION: 1, OTHER: 3}
    assert recording.recorder.odd_frames == 2


def test_a_sealed_batch_says_what_is_in_it() -> None:
    """The header of an encoded batch states origin, ordinals, times, hash, and per sid lowest, highest and distinct."""
    recording = Recording()
    for sid, seq in ((1, 7), (1, 9), (1, 9), (2, 5), (1, 8)):
        recording.frame("trade", sid=sid, seq=seq)
    recording.frame("trade", sid=3)
    recording.recorder.flush()
    ((unsealed,),) = recording.flushes
    encoded = seal(recording.origin, unsealed)
    batch = header_of(encoded)
    header = batch.header
    assert (header.env, header.day, header.epoch, header.conn) == ("kalshi-sim", "2025-12-14", 812, "812-a-0")
    assert (header.channel, header.batch, header.records, header.n_first, header.n_last) == ("trade", 0, 6, 0, 5)
    assert header.seq == {"1": (7, 9, 3), "2": (5, 5, 1)}
    assert decode_records(encoded, batch) == unsealed.block


def test_nothing_is_flushed_where_there_is_nothing() -> None:
    """An idle connection makes no empty batches and no empty intervals."""
    recording = Recording()
    recording.recorder.flush()
    recording.recorder.note_interval()
    assert recording.flushes == []
    recording.frame("trade")
    recording.recorder.note_interval()
    flushed = len(recording.flushes)
    recording.recorder.flush()
    assert len(recording.flushes) == flushed


def test_the_recorder_says_nothing_more_once_its_connection_has_ended() -> None:
    """The connection's last record is the note about `session`, and a note behind it would be in no interval."""
    recording = a_recording()
    with pytest.raises(AssertionError, match="has ended"):
        recording.recorder.note({"event": "late"})
    recording.recorder.note_interval()  # the minute may be over just then


def test_a_forgotten_subscription_was_heard_with_its_last_frame_whether_it_had_a_number_or_not() -> None:
    """Frames of `ticker` have none; one of another channel says nothing about it."""
    recording = Recording()
    recording.recorder.expect(1, recording.clock())
    for _ in range(3):
        recording.frame("ticker", sid=1)
        recording.recorder.flush()
    heard_ns = recording.recorder.last_frame_ns
    recording.frame("trade", sid=2, seq=1)
    assert recording.recorder.forget(1, "ticker") == heard_ns
    assert recording.recorder.forget(1, "ticker") is None


def test_pings_are_signs_of_life_and_no_records() -> None:
    """A ping is counted and takes no ordinal."""
    recording = Recording()
    recording.recorder.on_ping(5)
    assert (recording.recorder.signs_of_life, recording.recorder.n) == (1, 0)
