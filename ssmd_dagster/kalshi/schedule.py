"""When Kalshi says that it does not trade: its weekly hours in Eastern time and its announced maintenance.

Pure but for `read_schedule`. Not for unannounced pauses: those only `/exchange/status` knows.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from zoneinfo import ZoneInfo

import msgspec

from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.rest import RestClient
from ssmd_dagster.kalshi.scaled import rfc3339_ns

EASTERN = ZoneInfo("America/New_York")
_NS_PER_S = 1_000_000_000
_DAY = datetime.timedelta(days=1)
_MAX_DAYS = 4_000

Interval = tuple[int, int]
"""From and to, in nanoseconds since the epoch; the end is not part of it."""


class Session(msgspec.Struct, frozen=True):
    """A stretch of trading within a day, HH:MM Eastern; a close at or before the open is on the next day."""

    open_time: str
    close_time: str


class Week(msgspec.Struct, frozen=True):
    """The sessions of each weekday, valid from `start_time` to `end_time` (RFC 3339)."""

    start_time: str
    end_time: str
    monday: tuple[Session, ...] = ()
    tuesday: tuple[Session, ...] = ()
    wednesday: tuple[Session, ...] = ()
    thursday: tuple[Session, ...] = ()
    friday: tuple[Session, ...] = ()
    saturday: tuple[Session, ...] = ()
    sunday: tuple[Session, ...] = ()

    def sessions(self, date: datetime.date) -> tuple[Session, ...]:
        """Return the sessions that begin on `date`."""
        days = (self.monday, self.tuesday, self.wednesday, self.thursday, self.friday, self.saturday, self.sunday)
        return days[date.weekday()]


class Maintenance(msgspec.Struct, frozen=True):
    """An announced maintenance (RFC 3339 times)."""

    start_datetime: str
    end_datetime: str


class Schedule(msgspec.Struct, frozen=True):
    """Kalshi's own schedule, as `/exchange/schedule` has it."""

    standard_hours: tuple[Week, ...] = ()
    maintenance_windows: tuple[Maintenance, ...] = ()

    def maintenance(self) -> list[Interval]:
        """Return the announced maintenance, in order and apart from each other."""
        announced = ((rfc3339_ns(one.start_datetime), rfc3339_ns(one.end_datetime)) for one in self.maintenance_windows)
        return _joined(one for one in announced if one[0] < one[1])

    def closed(self, from_ns: int, to_ns: int) -> list[Interval]:
        """Return the intervals of `[from_ns, to_ns)` without trading, in order and apart from each other.

        Weekly hours count while they are valid; where no week is valid nothing is known, and nothing closed.
        """
        closed = self.maintenance()
        for week in self.standard_hours:
            valid = _clip((rfc3339_ns(week.start_time), rfc3339_ns(week.end_time)), (from_ns, to_ns))
            if valid is not None:
                closed.extend(_without(valid, _open(week, valid)))
        clipped = (_clip(one, (from_ns, to_ns)) for one in closed)
        return _joined(one for one in clipped if one is not None)


class _Answer(msgspec.Struct):
    schedule: Schedule


async def read_schedule(rest: RestClient) -> Schedule:
    """Ask Kalshi for its schedule. Raises what `RestClient.get` raises, also where a time in it cannot be read."""
    schedule = (await rest.get("/exchange/schedule", answer=_Answer)).schedule
    try:
        schedule.closed(0, _NS_PER_S)
        for week in schedule.standard_hours:
            for day in range(7):
                for session in week.sessions(datetime.date(2026, 1, 5) + day * _DAY):
                    datetime.time.fromisoformat(session.open_time)
                    datetime.time.fromisoformat(session.close_time)
    except ValueError as error:
        raise ExchangeAnswerError(f"a time cannot be read: {error}", where="/exchange/schedule") from error
    return schedule


def _open(week: Week, within: Interval) -> list[Interval]:
    """Return the sessions that touch `within`, joined where one ends as the next begins."""
    date = _eastern_date(within[0]) - _DAY
    last = _eastern_date(within[1])
    if (last - date).days > _MAX_DAYS:
        raise ValueError(f"the schedule is asked about more than {_MAX_DAYS} days")
    found: list[Interval] = []
    while date <= last:
        for session in week.sessions(date):
            opens = datetime.time.fromisoformat(session.open_time)
            closes = datetime.time.fromisoformat(session.close_time)
            closing_date = date + _DAY if closes <= opens else date
            found.append((_instant_ns(date, opens), _instant_ns(closing_date, closes)))
        date += _DAY
    return _joined(found)


def _eastern_date(at_ns: int) -> datetime.date:
    return datetime.datetime.fromtimestamp(at_ns // _NS_PER_S, EASTERN).date()


def _instant_ns(date: datetime.date, time: datetime.time) -> int:
    return int(datetime.datetime.combine(date, time, EASTERN).timestamp()) * _NS_PER_S


def _clip(one: Interval, bounds: Interval) -> Interval | None:
    start, end = max(one[0], bounds[0]), min(one[1], bounds[1])
    return (start, end) if start < end else None


def _joined(intervals: Iterable[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _without(whole: Interval, parts: list[Interval]) -> list[Interval]:
    """Return what is left of `whole` without `parts`, which are in order and apart."""
    left: list[Interval] = []
    at = whole[0]
    for start, end in parts:
        if start > at:
            left.append((at, min(start, whole[1])))
        at = max(at, end)
        if at >= whole[1]:
            return left
    left.append((at, whole[1]))
    return left
