"""A gap is healed only where the other socket of the same markets recorded throughout."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.capture.gaps import Life
from ssmd_dagster.capture.healing import MARGIN_NS, healed
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.payloads import GapClosed

S = 1_000_000_000


def gap(conn: str, from_s: int, to_s: int | None, cause: str = "connection_lost", **scope: object) -> Gap:
    """Return a gap of a connection, in seconds."""
    return Gap(
        gap_id=f"gap-{conn}-{from_s}",
        cause=cause,
        from_ns=from_s * S,
        to_ns=None if to_s is None else to_s * S,
        scope={"conn": conn, **scope},
        outcome="open" if to_s is None else "stays",
    )


def life(conn: str, up_s: int, last_s: int, stopped_s: int | None = None) -> Life:
    """Return a connection's life, in seconds."""
    stopped_ns = None if stopped_s is None else stopped_s * S
    return Life(conn, up_s * S, last_s * S, "operator_stop" if stopped_s else "connection_lost", stopped_ns)


DAY = [life("3-a-0", 0, 100), life("3-a-1", 110, 500, 500), life("3-b-0", 0, 490, 500)]


def test_the_other_socket_heals() -> None:
    """Also up to its stop where the gap never ended; the other shard's socket heals nothing."""
    assert healed([gap("3-a-0", 100, 110)], DAY) == [GapClosed(gap_id="gap-3-a-0-100", to_ns=110 * S, outcome="healed")]
    assert healed([gap("3-a-1", 480, None)], DAY)[0].to_ns == 500 * S
    assert healed([gap("3-a2-0", 100, 110)], DAY) == []


def test_who_was_not_there_heals_nothing() -> None:
    """Up too late, gone too early, or two lives with a hole between."""
    lost = [gap("3-a-0", 100, 110)]
    assert healed(lost, [life("3-b-0", 101, 200)]) == []
    assert healed(lost, [life("3-b-0", 0, 109)]) == []
    assert healed(lost, [life("3-b-0", 0, 105), life("3-b-1", 105, 200)]) == []


def test_a_gap_of_the_other_at_the_same_time_heals_nothing() -> None:
    """On the same channel or on all; a moment apart counts as the same time; another channel's does not."""
    jump = gap("3-a-0", 50, 51, "sequence_jump", channel="trade")
    assert healed([jump, gap("3-b-0", 51, 52, "sequence_jump", channel="trade")], DAY) == []
    assert healed([jump, gap("3-b-0", 20, None, "not_subscribed")], DAY) == []
    assert [one.gap_id for one in healed([jump, gap("3-b-0", 50, 52, "x", channel="ticker")], DAY)] == [
        "gap-3-a-0-50",
        "gap-3-b-0-50",
    ]


def test_what_meets_every_socket_alike_and_what_is_no_sockets_stays() -> None:
    """A frame that is too large; an operator's stop; a gap that is healed or repaired already."""
    late = Gap(gap_id="late", cause="late_start", from_ns=0, to_ns=S, outcome="stays")
    repaired = Gap(gap_id="r", cause="x", from_ns=0, to_ns=S, scope={"conn": "3-a-0"}, outcome="repaired")
    assert healed([gap("3-a-0", 50, 50, "oversized"), late, repaired], DAY) == []


_INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=5)


@given(_INTERVALS, _INTERVALS, _INTERVALS)
def test_healed_is_only_what_the_other_covers(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]], lives: list[tuple[int, int]]
) -> None:
    """Every healed gap lies in one life of the other, further than the margin from all its gaps."""
    gaps = [gap("3-a-0", at, at + long) for at, long in ours] + [gap("3-b-0", at, at + long) for at, long in theirs]
    known = [life(f"3-b-{number}", at, at + long) for number, (at, long) in enumerate(lives)]
    for end in healed(gaps, known):
        (one, *_) = [each for each in gaps if each.gap_id == end.gap_id]
        assert one.scope["conn"] == "3-a-0"
        assert any(each.up_ns <= one.from_ns and end.to_ns <= each.end_ns for each in known)
        for other in gaps:
            if other.scope["conn"] == "3-b-0" and other.to_ns is not None:
                assert other.to_ns + MARGIN_NS < one.from_ns or end.to_ns + MARGIN_NS < other.from_ns
