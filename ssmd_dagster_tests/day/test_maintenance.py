"""Announced maintenance: which instants it holds, what is remembered of it, and which part of a gap it explains."""

from __future__ import annotations

from datetime import date
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.maintenance import REMEMBERED_NS, described, pieces, remembered, touching, window_at

WINDOWS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 30)).map(lambda pair: Window(pair[0], pair[0] + pair[1])), max_size=5
)


def test_the_window_of_an_instant_is_the_one_that_ends_last() -> None:
    """A window holds its first instant and not its last; of two that overlap the exchange comes back after the later."""
    windows = (Window(10, 20), Window(15, 30))
    found = [window_at(windows, at) for at in (9, 10, 15, 29, 30)]
    assert found == [None, Window(10, 20), Window(15, 30), Window(15, 30), None]


@given(WINDOWS, st.integers(0, 60), st.integers(0, 30))
def test_the_pieces_of_a_gap_are_the_gap(windows: list[Window], from_ns: int, lasts_ns: int) -> None:
    """In order and without overlap they fill it, each instant named by whether a window holds it."""
    to_ns = from_ns + lasts_ns
    found = pieces(from_ns, to_ns, windows, "late_start")
    assert found[0][0] == from_ns
    assert found[-1][1] == to_ns
    assert all(one[1] == other[0] for one, other in pairwise(found))
    for begins, ends, cause in found:
        for at in range(begins, ends):
            assert (cause == GapCause.EXCHANGE_MAINTENANCE) == (window_at(windows, at) is not None)


def test_what_has_begun_is_remembered_and_what_was_taken_back_is_not() -> None:
    """The exchange lists a window no more once it is over; one that it moves or calls off has not begun."""
    now_ns = 10 * REMEMBERED_NS
    over, long_over = Window(now_ns - 9, now_ns - 1), Window(0, now_ns - REMEMBERED_NS)
    called_off, new = Window(now_ns + 1, now_ns + 2), Window(now_ns + 5, now_ns + 6)
    assert remembered((long_over, over, called_off), (new, over), now_ns) == (over, new)
    assert remembered((), (), now_ns) == ()


def test_a_day_shows_the_windows_that_touch_it_in_its_own_time() -> None:
    """In order, in the calendar's timezone."""
    calendar = TradingCalendar(
        timezone="America/New_York", day_start="00:10", day_end="00:00", auto_roll=True, first_day=date(2025, 1, 1)
    )
    day = calendar.window(date(2026, 11, 26))
    hour_ns = 3_600_000_000_000
    thursday = Window(day.open_ns + 3 * hour_ns, day.open_ns + 5 * hour_ns)
    found = touching((Window(day.close_ns, day.close_ns + 1), thursday, Window(0, day.open_ns)), day)
    assert found == (thursday,)
    assert described(found, calendar) == "2026-11-26 03:00 to 05:00 EST"
    assert described((), calendar) == ""
