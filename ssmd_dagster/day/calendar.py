"""The calendar of an environment: which instants belong to which trading day.

A trading day is a date in the environment's timezone. A local time stands for the first instant at which the local
clock reads that or later: the earlier of two where clocks go back, the jump itself where they go forward. So windows of
consecutive days neither overlap nor, with `auto_roll`, leave a hole. Whether a day was recorded is not known here.
"""

from __future__ import annotations

import bisect
import re
from datetime import date, datetime, time, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

import msgspec

from ssmd_dagster.errors import NotFoundError, UsageError

_ONE_DAY = timedelta(days=1)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")
_TIME = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]\Z")


class Window(msgspec.Struct, frozen=True):
    """The half-open interval `[open_ns, close_ns)` of a trading day."""

    open_ns: int
    close_ns: int

    def holds(self, at_ns: int) -> bool:
        """Say whether the instant is inside."""
        return self.open_ns <= at_ns < self.close_ns


class TradingCalendar(msgspec.Struct, frozen=True, kw_only=True):
    """Windows of an environment's days. `day_start` and `day_end` are local times, `HH:MM`.

    Raises:
        ValueError: A time is not `HH:MM`, or the timezone is unknown.
    """

    timezone: str
    day_start: str
    day_end: str
    auto_roll: bool
    first_day: date

    def __post_init__(self) -> None:
        parse_time(self.day_start)
        parse_time(self.day_end)
        parse_timezone(self.timezone)

    def close_ns(self, day: date) -> int:
        """Return the local `day_end` of the date, or of the next date where `day_end` is at or before `day_start`."""
        end = parse_time(self.day_end)
        return _instant_ns(
            parse_timezone(self.timezone), day if end > parse_time(self.day_start) else day + _ONE_DAY, end
        )

    def open_ns(self, day: date) -> int:
        """Return the previous day's close with `auto_roll`, else the local `day_start` of the date."""
        return self.close_ns(day - _ONE_DAY) if self.auto_roll else self.start_due_ns(day)

    def start_due_ns(self, day: date) -> int:
        """Return the instant by which the day is to be ACTIVE: the local `day_start` of the date."""
        return _instant_ns(parse_timezone(self.timezone), day, parse_time(self.day_start))

    def end_due_ns(self, day: date) -> int:
        """Return the instant at which the day is to be ended or rolled: its close."""
        return self.close_ns(day)

    def window(self, day: date) -> Window:
        """Return the day's window; it is empty on a date that the timezone skipped."""
        return Window(open_ns=self.open_ns(day), close_ns=self.close_ns(day))

    def date_at(self, now_ns: int) -> date:
        """Return the day D with `close(D-1) <= now_ns < close(D)`."""
        # A close lies at most one date and one change of the zone's offset (at most a day) from the local date.
        day = self.local(now_ns).date() - 3 * _ONE_DAY
        for _ in range(7):
            if now_ns < self.close_ns(day):
                return day
            day += _ONE_DAY
        raise AssertionError(f"no trading day holds {now_ns}")

    def check(self, day: date, now_ns: int) -> None:
        """Refuse a date outside the calendar, which goes from `first_day` to the day after today's.

        Raises:
            NotFoundError: Names the first and the last date.
        """
        last = self.date_at(now_ns) + _ONE_DAY
        if not self.first_day <= day <= last:
            raise NotFoundError(
                f"there is no trading day {day.isoformat()}",
                do=f"The calendar goes from {self.first_day.isoformat()} to {last.isoformat()} ({self.timezone})",
            )

    def default_mode(self, day: date, now_ns: int) -> Literal["live", "replay"]:
        """Return `replay` for a day whose window is over, else `live`."""
        return "live" if now_ns < self.close_ns(day) else "replay"

    def local(self, at_ns: int) -> datetime:
        """Return the instant as local date and time, cut to the second."""
        return datetime.fromtimestamp(at_ns // 1_000_000_000, tz=parse_timezone(self.timezone))


def parse_date(text: str) -> date:
    """Read a date as operators write it.

    Raises:
        UsageError: Not `YYYY-MM-DD`, or no such date.
    """
    try:
        if _DATE.match(text):
            return date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"there is no date {text!r}: {error}", do="Expected YYYY-MM-DD") from error
    raise UsageError(f"not a date: {text!r}", do="Expected YYYY-MM-DD, such as 2025-12-14")


def parse_time(text: str) -> time:
    """Read a local time as the YAML writes it.

    Raises:
        ValueError: Not `HH:MM`.
    """
    if not _TIME.match(text):
        raise ValueError(f"not a local time HH:MM: {text!r}")
    return time(int(text[:2]), int(text[3:]))


def parse_timezone(name: str) -> ZoneInfo:
    """Look an IANA timezone up.

    Raises:
        ValueError: There is none of that name.
    """
    try:
        return ZoneInfo(name)
    except (OSError, KeyError, ValueError) as error:  # an empty name or a folder of zones is an OSError
        raise ValueError(f"unknown timezone: {name!r}") from error


def _instant_ns(zone: ZoneInfo, day: date, at: time) -> int:
    """Return the first instant at which the zone's clock reads `day at` or later."""
    local = datetime.combine(day, at, tzinfo=zone)
    second = int(local.timestamp())
    if datetime.fromtimestamp(second, tz=zone).replace(tzinfo=None) != local.replace(tzinfo=None):
        # The clock jumps over that time. Both readings of it lie around the jump, which is where the offset changes.
        before = int(local.replace(fold=1).timestamp())
        after_jump = datetime.fromtimestamp(second, tz=zone).utcoffset()
        moments = range(before, second + 1)
        jump = bisect.bisect_left(
            moments, True, key=lambda moment: datetime.fromtimestamp(moment, tz=zone).utcoffset() == after_jump
        )
        second = moments[jump]
    return second * 1_000_000_000
