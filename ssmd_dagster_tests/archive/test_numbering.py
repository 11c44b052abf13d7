"""Distinct numbers, holes and repetitions are exact, however the archive holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.numbering import Numbering, WireCount
from ssmd_dagster.archive.records import sequences_in
from ssmd_dagster_tests.capture.recordings import Recording, build_segments, read_segments

numbers = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def expected(seqs: list[int], *, from_one: bool) -> tuple[int, int, int]:
    """Distinct, duplicates and missing, the slow way."""
    distinct = set(seqs)
    low = 1 if from_one else min(distinct)
    return len(distinct), len(seqs) - len(distinct), max(distinct) - low + 1 - len(distinct)


@given(st.lists(numbers, min_size=1, max_size=5), st.booleans())
def test_numbers_in_any_order_are_counted_exactly(parts: list[list[int]], from_one: bool) -> None:
    """In runs or one by one."""
    numbering = Numbering()
    for part in parts:
        if part == list(range(part[0], part[0] + len(part))):
            numbering.add_run(part[0], part[-1])
        else:
            numbering.add(part)
    count = numbering.count("c", 1, from_one=from_one)
    assert (count.distinct, count.duplicates, count.missing) == expected(
        [n for part in parts for n in part], from_one=from_one
    )


def test_a_number_that_is_none_makes_no_hole() -> None:
    """As the recorder follows none: one far above, one that no 64 bits hold; what is missing beside them is."""
    numbering = Numbering()
    numbering.add([1, 2, 5, 10**12])
    numbering.add([2**63])
    numbering.add([6, 10**30])
    assert numbering.count("c", 1, from_one=True) == WireCount("c", 1, 5, 0, ((3, 4),))


def recording_of(seqs: list[int], breaks: set[int], *, announced: bool) -> Recording:
    """A connection that received these numbers of one subscription, flushed at `breaks`."""
    recording = Recording()
    if announced:
        recording.recorder.note({"event": "subscribed", "sids": {"trade": 1}})
    for place, seq in enumerate(seqs):
        recording.frame("trade" if seq % 7 else "subscribed", seq=seq)
        if place in breaks:
            recording.recorder.flush()
    recording.end()
    return recording


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(numbers, st.sets(st.integers(0, 60)), st.booleans())
def test_the_archive_gives_them_exactly_over_all_channels_and_joins(
    tmp_path: Path, seqs: list[int], breaks: set[int], announced: bool
) -> None:
    """Answers in `session` take numbers too; a hole and a repetition in joined batches do not hide each other."""
    readback = read_segments(build_segments(tmp_path, recording_of(seqs, breaks, announced=announced).batches()))
    assert readback.faults == ()
    (count,) = readback.wire
    assert (count.conn, count.sid) == ("812-a-0", 1)
    assert (count.distinct, count.duplicates, count.missing) == expected(seqs, from_one=announced)


def test_a_hole_and_a_repetition_of_joined_batches_do_not_add_up(tmp_path: Path) -> None:
    """1, 2, 4 and 4: four numbers from 1 to 4, and yet 3 is missing."""
    readback = read_segments(build_segments(tmp_path, recording_of([1, 2, 4, 4], {2}, announced=True).batches()))
    assert readback.wire == (WireCount("812-a-0", 1, 3, 1, ((3, 3),)),)


def test_numbers_are_read_as_the_recorder_read_them() -> None:
    """Frames of other shapes have none; one that is kept as text has its own."""
    recording = Recording()
    for payload in (
        b'{"type":"trade","sid":1,\n"seq":3,"msg":{}}',
        b'{"type":"trade","sid":"one","seq":4,"msg":{}}',
        b'{"type":"trade","sid":1,"seq":5',
        b"[1]",
        b'{"type":"trade","sid":2,"seq":6,"msg":{"x":"\xff"}}',
        '{"type":"trade","sid":2,"seq":7,"msg":{"x":"ä"}}'.encode(),
    ):
        recording.raw(payload)
    recording.recorder.flush()
    found: dict[int, list[int]] = {}
    stated: dict[int, list[int]] = {}
    for flush in recording.flushes:
        for unsealed in flush:
            for sid, seqs in sequences_in(unsealed.block).items():
                found.setdefault(sid, []).extend(seqs)
            for sid, seqs in unsealed.seqs.items():
                stated.setdefault(sid, []).extend(seqs)
    assert found == stated == {1: [3], 2: [7]}


@pytest.mark.parametrize(("note", "lost"), [({"event": "oversized", "channel": "trade", "bytes": 9, "sha256": ""}, 1)])
def test_what_the_recorder_did_not_keep_is_known(tmp_path: Path, note: dict[str, object], lost: int) -> None:
    """So that a hole that it leaves can be explained."""
    recording = recording_of([1, 2], set(), announced=True)
    assert read_segments(build_segments(tmp_path, recording.batches())).unrecorded == {}
    recording = Recording("812-a-1")
    recording.recorder.note(json.loads(json.dumps(note)))
    recording.end()
    assert read_segments(build_segments(tmp_path, recording.batches())).unrecorded == {"812-a-1": lost}
