"""Interval notes are borne out by the records however these are cut into batches, and by no other records."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.intervals import (
    Interval,
    IntervalCheck,
    Ordinals,
    Torn,
    ends_session,
    interval_of,
    intervals_in,
    ordinals_of,
    torn_in,
)
from ssmd_dagster.archive.records import note_line, wire_line

Line = tuple[int, bytes]


def line(n: int, text: str = "") -> Line:
    """Return a record's ordinal and bytes."""
    return n, wire_line(n, 5, b'{"x":"%s"}' % text.encode())


def interval(lines: list[Line], channel: str = "trade") -> Interval:
    """Return the interval that a recorder would note about `lines`."""
    block = b"".join(data for _, data in lines)
    return Interval(channel, lines[0][0], lines[-1][0], len(lines), hashlib.sha256(block).hexdigest())


@st.composite
def recorded(draw: st.DrawFn) -> tuple[list[Line], list[Interval], int]:
    """Records with rising ordinals, the intervals noted about them, and how many records no interval covers."""
    steps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=40))
    lines = [line(sum(steps[: i + 1]) - 1, "x" * (i % 7)) for i in range(len(steps))]
    ends = sorted(draw(st.sets(st.integers(1, len(lines)))))
    stated = [interval(lines[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return lines, stated, len(lines) - (ends[-1] if ends else 0)


def fed(lines: list[Line], stated: list[Interval], cuts: list[int]) -> IntervalCheck:
    """Feed records cut into batches at `cuts`."""
    check = IntervalCheck("trade", stated)
    for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True):
        if part := lines[start:end]:
            check.feed(b"".join(data for _, data in part), part[0][0], part[-1][0])
    return check


@settings(deadline=None)
@given(recorded(), st.data())
def test_the_cut_into_batches_does_not_matter(
    case: tuple[list[Line], list[Interval], int], data: st.DataObject
) -> None:
    """Every note is confirmed, and what no note covers is returned as the interval that is owed."""
    lines, stated, uncovered = case
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lines)))))
    check = fed(lines, data.draw(st.permutations(stated)), cuts)
    left = check.finish()
    assert check.mismatches == []
    assert check.confirmed == len(stated)
    assert left == (interval(lines[-uncovered:]) if uncovered else None)


@settings(deadline=None)
@given(recorded(), st.data())
def test_a_record_that_is_missing_or_altered_is_noticed(
    case: tuple[list[Line], list[Interval], int], data: st.DataObject
) -> None:
    """Wherever it is covered by a note, some note is not borne out, and no note of other records is affected."""
    lines, stated, uncovered = case
    if uncovered == len(lines):
        return
    hit = data.draw(st.integers(0, len(lines) - uncovered - 1))
    n, _ = lines[hit]
    spoilt = list(lines)
    if data.draw(st.booleans()):
        spoilt[hit] = line(n, "altered")
    else:
        del spoilt[hit]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(spoilt) - 1)))))
    check = fed(spoilt, stated, [cut for cut in cuts if cut < len(spoilt)])
    check.finish()
    assert len(check.mismatches) == 1
    assert check.confirmed == len(stated) - 1
    broken = next(each for each in stated if each.n_first <= n <= each.n_last)
    assert check.mismatches[0].startswith(
        f"trade {broken.n_first}-{broken.n_last}: the recorder noted {broken.records}"
    )


def test_a_noted_interval_of_which_nothing_is_there_is_a_mismatch() -> None:
    """Notes about records behind the last one that was fed are looked at in the end."""
    check = IntervalCheck("trade", [interval([line(0)]), interval([line(5), line(6)])])
    check.feed(line(0)[1], 0, 0)
    assert check.finish() is None
    assert (check.confirmed, len(check.mismatches)) == (1, 1)
    assert "there are 0 (-…)" in check.mismatches[0]


def test_notes_of_other_channels_do_not_count() -> None:
    """A check looks only at its own channel."""
    check = IntervalCheck("ticker", [interval([line(0)])])
    check.feed(line(1)[1], 1, 1)
    assert (check.mismatches, check.finish()) == ([], interval([line(1)], "ticker"))


def test_intervals_are_read_from_session_records_and_from_nothing_that_looks_like_them() -> None:
    """Only a note whose event is `interval` is one."""
    wanted = interval([line(0), line(1)])
    block = (
        note_line(2, 5, {"event": "connected"})
        + note_line(3, 5, wanted.note())
        + wire_line(4, 5, b'{"event":"interval"}')
        + note_line(5, 5, {"event": "error", "text": 'the word "interval"'})
        + note_line(6, 5, Torn(7, 9, 2).note())
    )
    assert list(intervals_in(block)) == [wanted]
    assert list(torn_in(block)) == [Torn(7, 9, 2)]
    assert interval_of(None) is None


@pytest.mark.parametrize(
    ("record", "ends"),
    [
        (note_line(0, 5, interval([line(0)], "session").note()), True),
        (note_line(0, 5, interval([line(0)], "trade").note()), False),
        (note_line(0, 5, {"event": "disconnected"}), False),
        (wire_line(0, 5, b"{}"), False),
    ],
)
def test_only_the_note_about_session_ends_a_connection(record: bytes, ends: bool) -> None:
    """It is the last record of a connection whose recorder, or the audit, came to its end."""
    assert ends_session(record) is ends


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3_000), min_size=1)))
def test_ordinals_know_what_is_missing_and_what_came_twice(blocks: list[list[int]]) -> None:
    """Whatever the order, holes and repetitions are counted exactly."""
    ordinals = Ordinals()
    for block in blocks:
        ordinals.add(block)
    every = [n for block in blocks for n in block]
    missing = sorted(set(range(max(every, default=-1) + 1)) - set(every))
    assert ordinals.highest == max(every, default=-1)
    assert ordinals.repeated == len(every) - len(set(every))
    assert ordinals.holes == len(missing)
    assert ordinals.torn() == (Torn(missing[0], missing[-1], len(missing)) if missing else None)


def test_many_ordinals_take_little_memory() -> None:
    """One byte each, twice that while they grow."""
    ordinals = Ordinals()
    for start in range(0, 1_000_000, 10_000):
        ordinals.add(range(start, start + 10_000))
    assert (ordinals.holes, ordinals.repeated) == (0, 0)
    assert ordinals._seen.nbytes < 2_200_000


def test_ordinals_are_read_from_the_beginning_of_each_line() -> None:
    """Whatever stands in the rest of it."""
    block = wire_line(7, 5, b'{"n":99}') + note_line(12, 5, {"event": "x"}) + wire_line(13, 5, b"odd")
    assert ordinals_of(block) == [7, 12, 13]


@pytest.mark.parametrize(
    "block", [b"", b'{"n":1,"recv_ns":1}', b'{"n":x,"a":1}\n', b'{"m":1,"a":1}\n', b"\n", b'{"n":1}\n']
)
def test_what_is_no_block_of_records_has_no_ordinals(block: bytes) -> None:
    """A line that does not begin with its ordinal, or is not whole, is refused."""
    with pytest.raises(ValueError, match=r"does not begin with its ordinal|invalid literal|not found"):
        ordinals_of(block)
