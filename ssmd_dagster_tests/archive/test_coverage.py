"""Which intervals of a day were recorded, from the lives of connections and the gaps."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.coverage import CoverageRow, Life, coverage_rows
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Gap, GapOutcome

WINDOW = Window(100, 200)
BOTH = ("trade", "ticker")


def gap(from_ns: int, to_ns: int | None, outcome: GapOutcome = "stays", gap_id: str = "g", **scope: Any) -> Gap:
    """Return a gap of cause `connection_lost`."""
    return Gap(gap_id=gap_id, cause="connection_lost", from_ns=from_ns, to_ns=to_ns, outcome=outcome, scope=scope)


def said(rows: list[CoverageRow]) -> list[tuple[Any, ...]]:
    """Return the rows without channel and gap."""
    return [(row.market, row.from_ns, row.to_ns, row.state, row.cause) for row in rows]


def test_a_day_recorded_from_end_to_end_is_present() -> None:
    """What lies outside the window is cut off; several channels get a row each."""
    rows = coverage_rows(WINDOW, [Life("1-a-1", BOTH, 90, 210)], [], BOTH)
    assert rows == [CoverageRow(channel, None, 100, 200, "present", None, None) for channel in BOTH]


def test_the_hole_between_two_connections_has_the_gaps_cause() -> None:
    """Before, missing with the cause and the gap's id, after."""
    lives = [Life("1-a-1", BOTH, 90, 140), Life("1-a-2", BOTH, 150, 200)]
    rows = coverage_rows(WINDOW, lives, [gap(140, 150, conn="1-a-1")], ("trade",))
    assert said(rows) == [
        (None, 100, 140, "present", None),
        (None, 140, 150, "missing", "connection_lost"),
        (None, 150, 200, "present", None),
    ]
    assert rows[1].gap_id == "g"


def test_a_hole_that_no_gap_explains_is_not_captured() -> None:
    """A channel that nobody recorded is missing all day, whatever the others did."""
    rows = coverage_rows(WINDOW, [Life("1-a-1", ("trade",), 100, 150)], [], BOTH)
    assert said(rows) == [
        (None, 100, 150, "present", None),
        (None, 150, 200, "missing", "not_captured"),
        (None, 100, 200, "missing", "not_captured"),
    ]


def test_a_second_socket_heals_and_another_part_of_the_markets_does_not() -> None:
    """Shard b records what a records; a2 records other markets."""
    a = [Life("1-a-1", BOTH, 100, 140), Life("1-a-2", BOTH, 150, 200)]
    lost = [gap(140, 150, conn="1-a-1")]
    healed = coverage_rows(WINDOW, [*a, Life("1-b-1", BOTH, 100, 200)], lost, ("trade",))
    assert said(healed)[1] == (None, 140, 150, "healed", "connection_lost")
    still = coverage_rows(WINDOW, [*a, Life("1-a2-1", BOTH, 100, 200)], lost, ("trade",))
    assert said(still)[1] == (None, 140, 150, "missing", "connection_lost")


def test_a_gap_within_a_connections_life_spoils_only_that_connection() -> None:
    """A jump of the sequence on one sid of a: missing alone, healed where b lives too; other channels are untouched."""
    jump = [gap(120, 125, conn="1-a-1", sid=3, channel="ticker")]
    alone = coverage_rows(WINDOW, [Life("1-a-1", BOTH, 100, 200)], jump, BOTH)
    assert [row.state for row in alone] == ["present", "present", "missing", "present"]
    both = coverage_rows(WINDOW, [Life("1-a-1", BOTH, 100, 200), Life("1-b-1", BOTH, 100, 200)], jump, ("ticker",))
    assert [row.state for row in both] == ["present", "healed", "present"]


def test_only_trades_are_repaired() -> None:
    """A repaired gap gives the trades back, and no ticker; pages fetched over REST repair a hole too."""
    lives = [Life("1-a-1", BOTH, 100, 140), Life("1-a-2", BOTH, 150, 200)]
    rows = coverage_rows(WINDOW, lives, [gap(140, 150, "repaired", conn="1-a-1")], BOTH)
    assert [row.state for row in rows] == ["present", "repaired", "present", "present", "missing", "present"]
    replayed = coverage_rows(WINDOW, [Life("1-rest-1", ("trade",), 100, 200)], [], BOTH)
    assert said(replayed) == [
        (None, 100, 200, "repaired", "not_captured"),
        (None, 100, 200, "missing", "not_captured"),
    ]


def test_gaps_of_single_markets_are_rows_of_those_markets() -> None:
    """The channel itself stays present; a gap that names too many markets to list is one of the channel."""
    lives = [Life("1-a-1", BOTH, 100, 200)]
    named = [gap(110, 120, conn="1-a-1", markets=["KX-B", "KX-A"]), gap(150, None, market="KX-A", channel="trade")]
    rows = coverage_rows(WINDOW, lives, named, BOTH)
    assert said([row for row in rows if row.channel == "trade"]) == [
        (None, 100, 200, "present", None),
        ("KX-A", 110, 120, "missing", "connection_lost"),
        ("KX-A", 150, 200, "missing", "connection_lost"),
        ("KX-B", 110, 120, "missing", "connection_lost"),
    ]
    many = coverage_rows(WINDOW, lives, [gap(110, 120, conn="1-a-1", markets_count=5_000)], ("trade",))
    assert [row.state for row in many] == ["present", "missing", "present"]


def test_a_connectors_gap_spoils_its_own_shard_and_a_days_gap_everything() -> None:
    """`component` narrows a gap as `conn` does; an empty scope is the whole capture."""
    lives = [Life("1-a-1", BOTH, 100, 200), Life("1-b-1", BOTH, 100, 200)]
    own = coverage_rows(WINDOW, lives, [gap(100, 110, component="connector-a")], ("trade",))
    assert [row.state for row in own] == ["healed", "present"]
    everything = coverage_rows(WINDOW, lives, [gap(100, 110)], ("trade",))
    assert [row.state for row in everything] == ["missing", "present"]


_instants = st.integers(80, 220)
_lives = st.builds(
    Life, st.sampled_from(["1-a-1", "1-a-2", "1-b-1", "1-a2-1", "1-rest-1"]), st.just(BOTH), _instants, _instants
)
_gaps = st.builds(
    gap,
    _instants,
    st.none() | _instants,
    st.sampled_from(["open", "healed", "repaired", "stays"]),
    conn=st.sampled_from(["1-a-1", "1-b-1", "1-a2-1"]),
)


@settings(deadline=None)
@given(st.lists(_lives, max_size=6), st.lists(_gaps, max_size=6))
def test_the_rows_of_a_channel_fill_the_window_without_overlap(lives: list[Life], gaps: list[Gap]) -> None:
    """Whatever connections and gaps there were, each instant has one answer, and only what is not present has a cause."""
    rows = coverage_rows(WINDOW, lives, gaps, ("trade",))
    assert [row.from_ns for row in rows] == [100, *(row.to_ns for row in rows[:-1])]
    assert rows[-1].to_ns == 200
    assert all((row.state == "present") == (row.cause is None) for row in rows)
    assert all(row.from_ns < row.to_ns for row in rows)
