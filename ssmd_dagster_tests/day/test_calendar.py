"""Windows of trading days, over changes of the clock, leap days and year ends."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssmd_dagster.day.calendar import TradingCalendar, Window, parse_date, parse_time
from ssmd_dagster.errors import ExitCode, NotFoundError, UsageError

ONE_DAY = timedelta(days=1)
ZONES = [
    "UTC",
    "America/New_York",
    "Europe/Berlin",
    "Australia/Lord_Howe",  # half an hour of summer time
    "America/Santiago",  # changes at midnight
    "Asia/Kathmandu",
    "Africa/Casablanca",  # changes twice around Ramadan
    "Pacific/Apia",  # skipped 2011-12-30
    "Pacific/Kiritimati",  # UTC+14
]
times = st.times().map(lambda at: f"{at:%H:%M}") | st.sampled_from(
    ["00:00", "00:10", "01:30", "02:00", "02:30", "23:59"]
)
dates = st.dates(date(1999, 1, 1), date(2037, 12, 31)) | st.sampled_from(
    [
        date(2024, 2, 28),
        date(2024, 2, 29),
        date(2025, 12, 31),
        date(2025, 3, 8),
        date(2025, 3, 9),
        date(2025, 11, 1),
        date(2025, 11, 2),
        date(2011, 12, 29),
        date(2011, 12, 30),
    ]
)


@st.composite
def calendars(draw: st.DrawFn, auto_roll: bool | None = None) -> TradingCalendar:
    """Any calendar."""
    return TradingCalendar(
        timezone=draw(st.sampled_from(ZONES)),
        day_start=draw(times),
        day_end=draw(times),
        auto_roll=draw(st.booleans()) if auto_roll is None else auto_roll,
        first_day=date(1999, 1, 1),
    )


def calendar(
    timezone: str = "UTC", start: str = "00:10", end: str = "00:00", auto_roll: bool = True
) -> TradingCalendar:
    """The design's calendar, or a variation of it."""
    return TradingCalendar(
        timezone=timezone, day_start=start, day_end=end, auto_roll=auto_roll, first_day=date(2025, 12, 1)
    )


def ns(text: str) -> int:
    """Nanoseconds of an RFC 3339 time."""
    return int(datetime.fromisoformat(text).timestamp()) * 1_000_000_000


@given(calendars(auto_roll=True), dates)
def test_rolled_windows_tile_the_time(days: TradingCalendar, day: date) -> None:
    """With auto_roll each day opens at the instant at which the one before closes."""
    assert days.window(day).close_ns == days.window(day + ONE_DAY).open_ns
    assert days.open_ns(day) <= days.close_ns(day)


@given(calendars(auto_roll=False), dates)
def test_windows_without_roll_do_not_overlap(days: TradingCalendar, day: date) -> None:
    """Without auto_roll a day opens at or after the close of the one before, and never closes before it opens."""
    assert days.close_ns(day - ONE_DAY) <= days.open_ns(day) <= days.close_ns(day)


@given(calendars(), dates, st.floats(0, 1, exclude_max=True))
def test_the_date_of_an_instant_is_the_one_whose_window_holds_it(days: TradingCalendar, day: date, part: float) -> None:
    """date_at is the inverse of the window, at its first and last instant and between."""
    opened, closed = days.close_ns(day - ONE_DAY), days.close_ns(day)
    for at_ns in {opened, closed - 1, opened + int((closed - opened) * part)}:
        if opened <= at_ns < closed:
            assert days.date_at(at_ns) == day
    assert days.date_at(closed) > day


@given(calendars(), st.integers(ns("1999-06-01T00:00:00+00:00"), ns("2037-06-01T00:00:00+00:00")))
def test_every_instant_has_one_date(days: TradingCalendar, at_ns: int) -> None:
    """Any instant lies between the close of the day before its date and that of its date."""
    day = days.date_at(at_ns)
    assert days.close_ns(day - ONE_DAY) <= at_ns < days.close_ns(day)


@given(calendars(), dates)
@example(calendar("America/New_York", "02:30", "02:30"), date(2025, 3, 9))
def test_a_local_time_is_the_first_instant_at_which_the_clock_reads_it_or_later(
    days: TradingCalendar, day: date
) -> None:
    """A second earlier the local clock reads less; at the instant it reads that time, or more over a jump."""
    zone = ZoneInfo(days.timezone)
    wanted = datetime.combine(day, parse_time(days.day_start))
    second = days.start_due_ns(day) // 1_000_000_000
    assert datetime.fromtimestamp(second, zone).replace(tzinfo=None) >= wanted
    assert datetime.fromtimestamp(second - 1, zone).replace(tzinfo=None) < wanted


def test_the_design_day_lasts_from_midnight_to_midnight() -> None:
    """Start 00:10 and end 00:00 with roll make a whole UTC day; the start is due at 00:10."""
    days, day = calendar(), date(2025, 12, 14)
    assert days.window(day) == Window(ns("2025-12-14T00:00:00+00:00"), ns("2025-12-15T00:00:00+00:00"))
    assert days.start_due_ns(day) == ns("2025-12-14T00:10:00+00:00")
    assert days.end_due_ns(day) == ns("2025-12-15T00:00:00+00:00")
    assert days.window(day).holds(ns("2025-12-14T12:00:00+00:00"))
    assert not days.window(day).holds(ns("2025-12-15T00:00:00+00:00"))
    assert calendar(auto_roll=False).open_ns(day) == ns("2025-12-14T00:10:00+00:00")


@pytest.mark.parametrize(
    ("timezone", "day", "hours"),
    [
        ("America/New_York", date(2025, 3, 9), 23),
        ("America/New_York", date(2025, 11, 2), 25),
        ("America/New_York", date(2025, 7, 1), 24),
        ("Australia/Lord_Howe", date(2025, 10, 5), 23.5),
        ("UTC", date(2024, 2, 29), 24),
        ("UTC", date(2025, 12, 31), 24),
        ("Pacific/Apia", date(2011, 12, 30), 0),
    ],
)
def test_days_are_as_long_as_their_timezone_makes_them(timezone: str, day: date, hours: float) -> None:
    """Midnight to midnight is 23 or 25 hours where the clock changes, and nothing on a date that was skipped."""
    window = calendar(timezone).window(day)
    assert window.close_ns - window.open_ns == hours * 3_600_000_000_000


def test_times_that_do_not_exist_or_exist_twice() -> None:
    """02:30 of a spring night is the jump itself; 01:30 of an autumn night is the first of the two."""
    spring = calendar("America/New_York", "02:30", "02:00").start_due_ns(date(2025, 3, 9))
    assert spring == ns("2025-03-09T03:00:00-04:00")
    autumn = calendar("America/New_York", "01:30", "01:00").start_due_ns(date(2025, 11, 2))
    assert autumn == ns("2025-11-02T01:30:00-04:00")


def test_an_end_before_the_start_is_on_the_next_date() -> None:
    """17:00 to 16:00 is an overnight session, 09:30 to 16:00 one within its date."""
    day = date(2025, 12, 14)
    assert calendar(start="17:00", end="16:00").close_ns(day) == ns("2025-12-15T16:00:00+00:00")
    assert calendar(start="09:30", end="16:00").close_ns(day) == ns("2025-12-14T16:00:00+00:00")
    assert calendar(start="00:00", end="00:00").close_ns(day) == ns("2025-12-15T00:00:00+00:00")


def test_the_calendar_refuses_dates_outside() -> None:
    """Before the first day and after tomorrow there is no day; the text says which are the first and the last."""
    days, now_ns = calendar(), ns("2025-12-14T12:00:00+00:00")
    for fine in (date(2025, 12, 1), date(2025, 12, 14), date(2025, 12, 15)):
        days.check(fine, now_ns)
    for outside in (date(2025, 11, 30), date(2025, 12, 16), date.max, date.min):
        with pytest.raises(NotFoundError, match=r"from 2025-12-01 to 2025-12-15 \(UTC\)") as caught:
            days.check(outside, now_ns)
        assert caught.value.exit_code is ExitCode.NOT_FOUND


def test_the_mode_is_live_until_the_window_is_over() -> None:
    """A day that has ended is replayed, today and tomorrow are live."""
    days, day = calendar(), date(2025, 12, 14)
    assert days.default_mode(day, ns("2025-12-13T23:59:00+00:00")) == "live"
    assert days.default_mode(day, days.close_ns(day) - 1) == "live"
    assert days.default_mode(day, days.close_ns(day)) == "replay"


@given(st.dates())
def test_dates_are_read_as_they_are_written(day: date) -> None:
    """YYYY-MM-DD and back."""
    assert parse_date(day.isoformat()) == day


@pytest.mark.parametrize(
    "text",
    ["", "today", "20251214", "2025-W50-7", "2025-1-4", "2025-02-29", "2025-12-14 ", "2025-12-14\n", "\uff12025-12-14"],
)
def test_other_dates_are_refused(text: str) -> None:
    """Anything else is a usage error that says what was expected."""
    with pytest.raises(UsageError, match="Expected YYYY-MM-DD"):
        parse_date(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timezone", "Mars/Olympus"),
        ("timezone", ""),
        ("timezone", "America"),
        ("timezone", "../../etc/passwd"),
        ("timezone", "UTC\0"),
        ("day_start", "24:00"),
        ("day_end", "0:10"),
        ("day_end", "00:60"),
    ],
)
def test_a_calendar_is_not_made_of_wrong_parts(field: str, value: str) -> None:
    """Unknown zones and bad times raise ValueError at once."""
    parts = {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00", field: value}
    with pytest.raises(ValueError, match=r"unknown timezone|not a local time"):
        TradingCalendar(**parts, auto_roll=True, first_day=date(2025, 1, 1))


def test_local_time_is_shown_where_asked() -> None:
    """An instant as the environment's clock shows it."""
    assert (
        calendar("America/New_York").local(ns("2025-12-14T12:00:00+00:00")).isoformat() == "2025-12-14T07:00:00-05:00"
    )
    assert calendar().local(0) == datetime(1970, 1, 1, tzinfo=UTC)
