"""Which day a tick is for: over changes of the clocks, with a day's end before and after its start, in any timezone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import dagster as dg
import pytest
from dagster._core.definitions.schedule_definition import ScheduleExecutionData
from dagster._utils.schedules import schedule_execution_time_iterator
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.events import EMPTY_BOOK
from ssmd_dagster.defs.build import build_definitions
from ssmd_dagster.defs.held import Seen
from ssmd_dagster.defs.schedules import before, closed_at, rolled_at, started_at
from ssmd_dagster.defs.watch import Found, Watch
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.errors import UnreachableError
from ssmd_dagster.workflows.roll import LEAD_S
from ssmd_dagster_tests.environments.folders import changed, copied

NEW_YORK = "America/New_York"
SPRING, AUTUMN = date(2026, 3, 8), date(2026, 11, 1)
"""Dates on which New York's clocks go forward (02:00 to 03:00) and back (02:00 to 01:00)."""


NOON_NS = int(datetime(2026, 3, 2, 12, tzinfo=UTC).timestamp()) * 1_000_000_000


class Away(Watch):
    """Servers that do not answer: a tick does not depend on them."""

    def look(
        self, names: Iterable[str], work: object, *, actor: str, timeout_s: float = 1.0
    ) -> Mapping[str, Found[Any]]:
        """Find nothing."""
        return {name: Found(None, UnreachableError("nobody is there")) for name in names}


class Ticking(NamedTuple):
    """A schedule and the code location that it is in."""

    schedule: dg.ScheduleDefinition
    repository: dg.RepositoryDefinition

    def tick(self, at: datetime) -> ScheduleExecutionData:
        """Return what the schedule answers to a tick."""
        context = dg.build_schedule_context(scheduled_execution_time=at, repository_def=self.repository)
        return self.schedule.evaluate_tick(context)


class Maintained(Away):
    """An exchange that has announced maintenance for now."""

    def look(
        self, names: Iterable[str], work: object, *, actor: str, timeout_s: float = 1.0
    ) -> Mapping[str, Found[Any]]:
        """Find an empty journal and a window."""
        window = Window(NOON_NS - 3_600_000_000_000, NOON_NS)
        seen = Seen(now_ns=NOON_NS - 1, moved=False, book=EMPTY_BOOK, maintenance=window)
        return {name: Found(seen, None) for name in names}


def schedule_of(
    tmp_path: Path, verb: str, *, start: str, end: str, zone: str, roll: bool, watch: Watch | None = None
) -> Ticking:
    """Return a schedule of an environment with these times."""
    tmp_path.mkdir(exist_ok=True)
    folder = copied(tmp_path)
    changes = {"schedule": {"timezone": zone, "day_start": start, "day_end": end, "auto_roll": roll}}
    changed(folder / "environments" / "kalshi-sim.yaml", changes)
    defs = build_definitions(load_registry(folder), watch=watch or Away())
    repository = defs.get_repository_def()
    return Ticking(repository.get_schedule_def(f"kalshi_sim_{verb}_day_schedule"), repository)


def ticks_of(cron: str, zone: str, after: float) -> Iterator[datetime]:
    """Return the instants at which Dagster's daemon lets a schedule tick."""
    return schedule_execution_time_iterator(after, cron, zone, ascending=True)


def days_of(ticking: Ticking, around: date) -> list[tuple[str, str]]:
    """Return the local time and the partition of the ticks that Dagster makes of three dates around one."""
    schedule = ticking.schedule
    zone = ZoneInfo(str(schedule.execution_timezone))
    first = datetime.combine(around - timedelta(days=1), datetime.min.time(), tzinfo=zone)
    last = datetime.combine(around + timedelta(days=2), datetime.min.time(), tzinfo=zone)
    ticks = ticks_of(str(schedule.cron_schedule), str(schedule.execution_timezone), first.timestamp() - 1)
    found = []
    for tick in islice(ticks, 10):
        if tick.timestamp() >= last.timestamp():
            break
        answer = ticking.tick(tick)
        assert answer.run_requests is not None
        (request,) = answer.run_requests
        found.append((f"{tick.astimezone(zone):%d %H:%M}", str(request.partition_key)))
    return found


@pytest.mark.parametrize("around", [SPRING, AUTUMN])
def test_a_day_is_rolled_before_midnight_under_the_date_that_ends(tmp_path: Path, around: date) -> None:
    """With `day_end` 00:00 a tick two minutes before it rolls that very date, also over both changes of the clocks."""
    rolling = schedule_of(tmp_path / "roll", "roll", start="00:10", end="00:00", zone=NEW_YORK, roll=True)
    starting = schedule_of(tmp_path / "start", "start", start="00:10", end="00:00", zone=NEW_YORK, roll=True)
    dates = [around + timedelta(days=offset) for offset in (-1, 0, 1)]
    assert days_of(rolling, around) == [(f"{day:%d} 23:58", f"{day}") for day in dates]
    assert days_of(starting, around) == [(f"{day:%d} 00:10", f"{day}") for day in dates]


@pytest.mark.parametrize("around", [SPRING, AUTUMN])
def test_a_day_that_ends_on_its_own_date_is_ended_under_that_date(tmp_path: Path, around: date) -> None:
    """With `day_end` after `day_start` the tick of a date ends that very date."""
    ending = schedule_of(tmp_path, "end", start="09:30", end="16:00", zone=NEW_YORK, roll=False)
    dates = [around + timedelta(days=offset) for offset in (-1, 0, 1)]
    assert days_of(ending, around) == [(f"{day:%d} 16:00", f"{day}") for day in dates]


def test_times_that_the_clock_skips_or_repeats_make_one_tick_for_the_right_day(tmp_path: Path) -> None:
    """The tick before a `day_end` of 02:30 fires at the jump in spring, one of 01:30 once in autumn; each date ends once."""
    skipped = schedule_of(tmp_path / "skipped", "roll", start="02:45", end="02:30", zone=NEW_YORK, roll=True)
    assert days_of(skipped, SPRING) == [
        ("07 02:28", "2026-03-06"),
        ("08 03:00", "2026-03-07"),
        ("09 02:28", "2026-03-08"),
    ]
    repeated = schedule_of(tmp_path / "repeated", "end", start="00:30", end="01:30", zone=NEW_YORK, roll=False)
    assert days_of(repeated, AUTUMN) == [
        *(("31 01:30", "2026-10-31"), ("01 01:30", "2026-11-01"), ("02 01:30", "2026-11-02"))
    ]


@pytest.mark.parametrize("verb", ["start", "roll", "end"])
def test_in_announced_maintenance_nothing_is_started_and_a_day_is_ended_all_the_same(tmp_path: Path, verb: str) -> None:
    """A tick is skipped with the end of the window; an end needs no connection."""
    roll = verb == "roll"
    ticking = schedule_of(tmp_path, verb, start="09:30", end="16:00", zone="UTC", roll=roll, watch=Maintained())
    answer = ticking.tick(datetime(2026, 3, 2, 11, 30, tzinfo=UTC))
    if verb == "end":
        assert answer.run_requests
    else:
        assert answer.skip_message == (
            "the exchange of kalshi-sim is in announced maintenance until 2026-03-02T12:00:00+00:00; "
            "reconcile asks for the run after it"
        )


def test_nothing_is_asked_for_before_the_first_day(tmp_path: Path) -> None:
    """The tick before the first day's midnight is skipped, with the reason; the next one is not."""
    rolling = schedule_of(tmp_path, "roll", start="00:10", end="00:00", zone="UTC", roll=True)
    skipped = rolling.tick(datetime(2025, 11, 30, 23, 58, tzinfo=UTC))
    assert skipped.skip_message == "2025-11-30 is before the first day of kalshi-sim, 2025-12-01"
    (request,) = rolling.tick(datetime(2025, 12, 1, 23, 58, tzinfo=UTC)).run_requests or []
    assert (request.partition_key, request.run_key) == ("2025-12-01", "kalshi_sim_roll_day:2025-12-01")


TIMES = st.builds(lambda hour, minute: f"{hour:02}:{minute:02}", st.integers(0, 23), st.sampled_from([0, 10, 30, 59]))
ZONES = st.sampled_from(
    ["UTC", NEW_YORK, "Europe/Berlin", "America/Santiago", "Africa/Cairo", "Pacific/Apia", "Australia/Lord_Howe"]
)


@settings(max_examples=150, deadline=None)
@given(start=TIMES, end=TIMES, zone=ZONES, first=st.dates(date(2020, 1, 1), date(2035, 1, 1)))
def test_consecutive_ticks_are_for_consecutive_days(start: str, end: str, zone: str, first: date) -> None:
    """Whatever the times and the zone: Dagster's ticks of `day_end` close each date once, never before its close."""
    calendar = TradingCalendar(timezone=zone, day_start=start, day_end=end, auto_roll=True, first_day=date(2000, 1, 1))
    for at, day_of in ((end, closed_at), (before(end, LEAD_S), rolled_at), (start, started_at)):
        cron = f"{int(at[3:])} {int(at[:2])} * * *"
        after = datetime.combine(first, datetime.min.time(), tzinfo=ZoneInfo(zone)).timestamp()
        ticks = list(islice(ticks_of(cron, zone, after), 4))
        days = [day_of(calendar, tick) for tick in ticks]
        assert [later - earlier for earlier, later in pairwise(days)] == [timedelta(days=1)] * 3
        if day_of is closed_at:
            for tick, day in zip(ticks, days, strict=True):
                assert calendar.close_ns(day) <= tick.timestamp() * 1e9 < calendar.close_ns(day + timedelta(days=1))
