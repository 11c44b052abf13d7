"""Sequence numbers: every number that did not come is in a hole, and only those."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.capture import sequence
from ssmd_dagster.capture.sequence import NEW_NUMBERS, Arrival, Hole, Sequences, gap_id_of


def fed(*seqs: int, sid: int = 1) -> Sequences:
    """Return a tracker that was given numbers one after another, received at ten times their place."""
    tracker = Sequences()
    tracker.expect(sid, 0)
    tracker.feed(sid, [Arrival(seq, 10 * (place + 1)) for place, seq in enumerate(seqs)])
    return tracker


def spans(holes: list[Hole]) -> list[tuple[int, int, int, int]]:
    """Return first, last, from and to of holes."""
    return [(hole.first, hole.last, hole.from_ns, hole.to_ns) for hole in holes]


def test_a_jump_is_a_hole_between_its_neighbours() -> None:
    """From the frame before to the frame after, and only after a second look."""
    tracker = fed(1, 2, 5, 6)
    assert tracker.due() == []
    assert spans(tracker.due()) == [(3, 4, 20, 30)]
    assert tracker.due() == []
    assert tracker.missing == 2


def test_a_subscription_begins_with_one() -> None:
    """What is missing at its beginning is missing since it was acknowledged; a sid nobody announced begins as it comes."""
    assert spans(fed(3, 4).due(at_once=True)) == [(1, 2, 0, 10)]
    tracker = Sequences()
    tracker.feed(9, [Arrival(700, 5), Arrival(701, 6)])
    assert tracker.due(at_once=True) == []
    assert tracker.in_order(8, [50, 51], 7)
    tracker.expect(9, 4)
    tracker.expect(9, 8)
    assert spans(tracker.due(at_once=True)) == [(1, 699, 4, 5)]


def test_neighbours_in_the_wrong_order_are_counted_and_no_hole() -> None:
    """Within one flush or over two."""
    tracker = fed(1, 3, 2, 4)
    assert tracker.due(at_once=True) == []
    tracker.feed(1, [Arrival(6, 1)])
    assert tracker.due() == []
    tracker.feed(1, [Arrival(5, 2)])
    assert tracker.due() == []
    assert (tracker.reordered, tracker.duplicates, tracker.missing) == (2, 0, 0)


def test_a_late_frame_heals_its_hole() -> None:
    """Once all of a declared hole has come it is named, once; the same number again is a duplicate."""
    tracker = fed(1, 4)
    (hole,) = tracker.due(at_once=True)
    tracker.feed(1, [Arrival(3, 1)])
    assert tracker.healed_holes() == []
    tracker.feed(1, [Arrival(3, 2), Arrival(2, 3), Arrival(2, 4)])
    assert tracker.healed_holes() == [hole]
    assert tracker.healed_holes() == []
    assert (tracker.healed, tracker.duplicates) == (2, 2)


def test_sids_do_not_touch_each_other_and_may_begin_anew() -> None:
    """A sid that is forgotten begins with 1 again where it is announced again."""
    tracker = fed(1, 2, 9)
    tracker.expect(2, 0)
    assert tracker.in_order(2, [1, 2, 3], 5)
    tracker.forget(1)
    tracker.expect(1, 50)
    assert tracker.in_order(1, [1, 2], 60)
    assert tracker.due(at_once=True) == []


@pytest.mark.parametrize("odd", [10**12, 2**63, 10**30, 0])
def test_a_number_that_is_none_hides_nothing(odd: int) -> None:
    """It is not followed: what is missing behind it is a hole as ever."""
    tracker = fed(*range(1, 11), odd, 11, 12, 15)
    assert [(hole.first, hole.last) for hole in tracker.due(at_once=True)] == [(13, 14)]
    tracker = Sequences()
    tracker.feed(1, [Arrival(odd, 1)])
    tracker.expect(1, 2)
    tracker.feed(1, [Arrival(1, 3), Arrival(3, 4)])
    assert [(hole.first, hole.last) for hole in tracker.due(at_once=True)] == [(2, 2)]


@pytest.mark.parametrize("start", [1, 10**12])
def test_a_subscription_that_is_numbered_anew_is_a_hole_and_is_followed_from_there(start: int) -> None:
    """Whether it begins with 1 again or far above: some hundred frames say so, and what is missing later is missing."""
    tracker = fed(*range(1, 1_001))
    assert not tracker.in_order(1, list(range(start, start + 60)), 20_000)
    tracker.feed(1, [Arrival(seq, 20_000) for seq in range(start, start + 60)])
    assert tracker.due(at_once=True) == []
    tracker.feed(1, [Arrival(seq, 30_000) for seq in range(start + 61, start + 200)])
    assert spans(tracker.due(at_once=True)) == [(start, start + NEW_NUMBERS, 10_000, 30_000)]
    assert tracker.in_order(1, [start + 200], 40_000)
    tracker.feed(1, [Arrival(start + 203, 50_000)])
    assert spans(tracker.due(at_once=True)) == [(start + 201, start + 202, 40_000, 50_000)]


def test_what_is_missing_far_above_is_a_hole_once_the_connection_ends() -> None:
    """However few frames came there; where none is missing among them, or they came again, there is none."""
    far = range(50_000_000, 50_000_040)
    tracker = fed(*range(1, 11), *(seq for seq in far if seq % 20 != 11))
    assert (tracker.due(), tracker.due()) == ([], [])
    assert spans(tracker.due(at_once=True)) == [(far[0], far[-1], 100, 480)]
    assert fed(*range(1, 11), *far).due(at_once=True) == []
    assert fed(*range(1, 11), 2, 5, 7).due(at_once=True) == []


def test_a_sid_that_begins_anew_again_and_again_has_a_gap_for_each() -> None:
    """The same numbers name different holes."""
    tracker = fed(*range(1, 1_001))
    names: list[str] = []
    for _ in range(2):
        tracker.feed(1, [Arrival(seq, 20_000) for seq in range(1, 301)])
        tracker.feed(1, [Arrival(303, 30_000)])
        names += [gap_id_of("3-a-0", hole.sid, hole.first, hole.numbering) for hole in tracker.due(at_once=True)]
    tracker.forget(1)
    tracker.expect(1, 40_000)
    tracker.feed(1, [Arrival(2, 50_000)])
    names += [gap_id_of("3-a-0", hole.sid, hole.first, hole.numbering) for hole in tracker.due(at_once=True)]
    numbers = ["0-1", "300-1", "0-2", "300-2", "0-3"]
    assert names == [f"gap-3-a-0-1-{name}" for name in numbers]


def test_old_holes_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: what fills a hole that was let go counts as a duplicate."""
    monkeypatch.setattr(sequence, "MAX_HOLES", 2)
    tracker = fed(1, 3, 5, 7)
    assert len(tracker.due(at_once=True)) == 3
    tracker.feed(1, [Arrival(2, 1), Arrival(4, 1)])
    assert (tracker.duplicates, tracker.healed) == (1, 1)


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Numbers 1 to n with some missing, doubled and moved, cut into flushes."""
    n = draw(st.integers(1, 40))
    order = draw(st.permutations(range(1, n + 1))) if draw(st.booleans()) else list(range(1, n + 1))
    gone = draw(st.sets(st.integers(1, n)))
    seqs = [seq for seq in order if seq not in gone]
    for again in draw(st.lists(st.sampled_from(seqs), max_size=5)) if seqs else []:
        seqs.insert(draw(st.integers(seqs.index(again) + 1, len(seqs))), again)
    flushes = []
    while seqs:
        size = draw(st.integers(1, len(seqs)))
        flushes.append(seqs[:size])
        seqs = seqs[size:]
    return n, flushes


@given(arrivals())
def test_the_holes_are_what_did_not_come(given: tuple[int, list[list[int]]]) -> None:
    """By the quick way or the slow one: missing numbers up to the highest that came, duplicates exactly counted."""
    _, flushes = given
    tracker = Sequences()
    tracker.expect(1, 0)
    declared: list[Hole] = []
    healed: list[Hole] = []
    place = 0
    for seqs in flushes:
        place += len(seqs)
        if not tracker.in_order(1, seqs, place):
            tracker.feed(1, [Arrival(seq, place - len(seqs) + at + 1) for at, seq in enumerate(seqs)])
        declared += tracker.due()
        healed += tracker.healed_holes()
    declared += tracker.due(at_once=True)
    came = [seq for seqs in flushes for seq in seqs]
    lacking = {seq for hole in declared for seq in range(hole.first, hole.last + 1) if seq not in hole.filled}
    assert lacking == set(range(1, max(came, default=0) + 1)) - set(came)
    assert tracker.duplicates == len(came) - len(set(came))
    assert all(hole.from_ns <= hole.to_ns for hole in declared)
    assert all(len(hole.filled) == hole.size for hole in healed)
