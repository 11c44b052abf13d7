"""When the exchange is closed by its own schedule: Thursday mornings in New York, and announced maintenance."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.scaled import rfc3339_ns
from ssmd_dagster.kalshi.schedule import Maintenance, Schedule, Session, Week
from ssmd_dagster_tests.kalshi.fakes import opened, rest_server, settings

ALL_DAY = (Session("00:00", "00:00"),)
THURSDAY = (Session("00:00", "03:00"), Session("05:00", "00:00"))
KALSHI = Schedule(
    (
        Week(
            "2025-01-01T00:00:00Z",
            "2030-01-01T00:00:00Z",
            monday=ALL_DAY,
            tuesday=ALL_DAY,
            wednesday=ALL_DAY,
            thursday=THURSDAY,
            friday=ALL_DAY,
            saturday=ALL_DAY,
            sunday=ALL_DAY,
        ),
    ),
)
HOUR_NS = 3_600 * 10**9


def closed(schedule: Schedule, start: str, end: str) -> list[tuple[int, int]]:
    """Return the closed intervals between two times."""
    return schedule.closed(rfc3339_ns(start), rfc3339_ns(end))


@pytest.mark.parametrize(
    ("day", "start", "end"),
    [
        ("2026-07-16", "2026-07-16T07:00:00Z", "2026-07-16T09:00:00Z"),
        ("2026-12-10", "2026-12-10T08:00:00Z", "2026-12-10T10:00:00Z"),
    ],
)
def test_thursdays_pause_follows_new_yorks_clock(day: str, start: str, end: str) -> None:
    """Two hours, at seven UTC in summer and at eight in winter, whole within the UTC day."""
    pause = [(rfc3339_ns(start), rfc3339_ns(end))]
    assert closed(KALSHI, f"{day}T00:00:00Z", f"{day}T23:59:59Z") == pause


def test_other_days_have_no_pause_and_the_pause_is_clipped() -> None:
    """Sessions that end at midnight and begin there are one."""
    assert closed(KALSHI, "2026-07-17T00:00:00Z", "2026-07-23T04:00:00Z") == []
    half = closed(KALSHI, "2026-07-16T08:00:00Z", "2026-07-16T08:30:00Z")
    assert half == [(rfc3339_ns("2026-07-16T08:00:00Z"), rfc3339_ns("2026-07-16T08:30:00Z"))]


def test_maintenance_is_closed_and_joins_what_it_touches() -> None:
    """An announced window that begins as the pause ends is one interval with it."""
    window = Maintenance("2026-07-16T09:00:00Z", "2026-07-16T10:00:00Z")
    schedule = Schedule(KALSHI.standard_hours, (window,))
    day = closed(schedule, "2026-07-16T00:00:00Z", "2026-07-17T00:00:00Z")
    assert day == [(rfc3339_ns("2026-07-16T07:00:00Z"), rfc3339_ns("2026-07-16T10:00:00Z"))]


def test_where_no_week_is_valid_nothing_is_closed() -> None:
    """Not known is not the same as shut."""
    assert closed(KALSHI, "2031-01-01T00:00:00Z", "2031-02-01T00:00:00Z") == []
    assert closed(Schedule(), "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z") == []


@given(st.integers(0, 4 * 365 * 24), st.integers(1, 24 * 60))
def test_every_week_has_two_closed_hours_whatever_is_asked(start_h: int, hours: int) -> None:
    """The intervals are in order, apart and inside; cutting the question in two changes nothing."""
    start_ns = rfc3339_ns("2025-01-02T00:00:00Z") + start_h * HOUR_NS
    end_ns = start_ns + hours * HOUR_NS
    found = KALSHI.closed(start_ns, end_ns)
    assert all(start_ns <= one[0] < one[1] <= end_ns for one in found)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(found))
    total_ns = sum(end - start for start, end in found)
    assert abs(total_ns - hours / 168 * 2 * HOUR_NS) <= 2 * HOUR_NS
    middle_ns = start_ns + hours // 2 * HOUR_NS
    parts = KALSHI.closed(start_ns, middle_ns) + KALSHI.closed(middle_ns, end_ns)
    assert sum(end - start for start, end in parts) == total_ns


async def test_the_schedule_is_read_over_rest() -> None:
    """Unknown keys and days left out do no harm."""
    week: dict[str, Any] = {"start_time": "2025-01-01T00:00:00Z", "end_time": "2030-01-01T00:00:00Z", "new": 1}
    week["monday"] = [{"open_time": "08:00", "close_time": "20:00", "new": 2}]
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/exchange/schedule"] = {"schedule": {"standard_hours": [week], "maintenance_windows": []}}
        schedule = await exchange.schedule()
    assert schedule.standard_hours[0].monday == (Session("08:00", "20:00"),)
    day = closed(schedule, "2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z")
    assert day == [(rfc3339_ns("2026-07-13T00:00:00Z"), rfc3339_ns("2026-07-13T12:00:00Z"))]


@pytest.mark.parametrize(
    ("week", "windows"),
    [
        ({"start_time": "never", "end_time": "2030-01-01T00:00:00Z"}, []),
        ({"start_time": "2025-01-01T00:00:00Z", "end_time": "2030-01-01T00:00:00Z", "friday": [["25:00"]]}, []),
        ({}, []),
        (None, [{"start_datetime": "x", "end_datetime": "y"}]),
    ],
)
async def test_a_schedule_that_cannot_be_read_is_named(week: Any, windows: list[Any]) -> None:
    """It is the exchange's error, found when it is asked and not when the answer is used."""
    if week and "friday" in week:
        week["friday"] = [{"open_time": "25:00", "close_time": "26:00"}]
    body = {"standard_hours": [] if week is None else [week], "maintenance_windows": windows}
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/exchange/schedule"] = {"schedule": body}
        with pytest.raises(ExchangeAnswerError, match="exchange/schedule"):
            await exchange.schedule()
