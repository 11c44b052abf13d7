"""Which schedules are due on an exchange's clock that is moved."""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from ssmd_dagster.day.calendar import TradingCalendar
from ssmd_dagster.defs.moved import passed
from ssmd_dagster.workflows.roll import LEAD_S

DAY = date(2026, 11, 10)
MINUTE_NS = 60_000_000_000


def calendar(*, auto_roll: bool = True) -> TradingCalendar:
    """Return the calendar of the shipped simulated environment."""
    return TradingCalendar(timezone="UTC", day_start="00:10", day_end="00:00", auto_roll=auto_roll, first_day=DAY)


def due(after: int, now: int, *, auto_roll: bool = True) -> list[tuple[str, int]]:
    """Return verbs and days (the first one being 0) that are due between two minutes of the first day."""
    days = calendar(auto_roll=auto_roll)
    open_ns = days.close_ns(DAY - timedelta(days=1))
    found = passed(days, open_ns + after * MINUTE_NS, open_ns + now * MINUTE_NS)
    return [(one.verb, (one.date - DAY).days) for one in found]


@pytest.mark.parametrize(
    ("after", "now", "expected"),
    [
        (9, 10, [("start", 0)]),
        (10, 11, []),
        (11, 1438 - 1, []),
        (1437, 1438, [("roll", 0)]),
        (1438, 1449, []),
        (11, 1450, [("roll", 0), ("start", 1)]),
        (9, 5 * 1440, [("roll", 4), ("start", 4)]),
        (-60, 5, []),  # the roll of the day before the first one
        (2000, 1500, []),  # the clock was put back
    ],
)
def test_each_time_that_the_clock_passes_is_due_once(after: int, now: int, expected: list[tuple[str, int]]) -> None:
    """Of several days that a leap passes over only the latest is asked for, a roll before a start."""
    assert LEAD_S == 120
    assert due(after, now) == expected


def test_without_rolls_a_day_is_ended_at_its_close() -> None:
    """`auto_roll: false`: the end is due at `day_end`."""
    assert due(1438, 1439, auto_roll=False) == []
    assert due(1439, 1440, auto_roll=False) == [("end", 0)]
