"""A day whose beginning, or all of it, was recorded with the day before: whose gaps are whose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import Payload
from ssmd_dagster.day.states import EventName
from ssmd_dagster.workflows.recorded_on import take_over_gaps
from ssmd_dagster_tests.day.builders import Log

S = 1_000_000_000
HOUR = 3_600 * S
MIDNIGHT, NEXT_MIDNIGHT = 1_000 * HOUR, 1_024 * HOUR
BEFORE, DAY = "2026-11-10", "2026-11-11"
_E = EventName


def add_gap(log: Log, date: str, name: str, from_ns: int, to_ns: int, cause: str = "connection_lost") -> None:
    """Journal a gap that stays."""
    log.add(_E.GAP_OPENED, date=date, data={"gap_id": name, "cause": cause, "from_ns": from_ns})
    log.add(_E.GAP_CLOSED, date=date, data={"gap_id": name, "to_ns": to_ns, "outcome": "stays"})


def two_days(*, started_ns: int | None, ended_ns: int) -> tuple[Any, Log]:
    """Return a desk with a day that was ended at `ended_ns`, and the next one, ACTIVE since `started_ns` or missed."""
    log = Log()
    for event in (_E.DEFINED, _E.START_REQUESTED, _E.STARTED):
        log.add(event, date=BEFORE)
    log.add(_E.END_REQUESTED, date=BEFORE, at_ns=ended_ns)
    log.add(_E.DEFINED, date=DAY)
    if started_ns is None:
        log.add(_E.MISSED, date=DAY, reason=f"recorded with {BEFORE}", data={"recorded_with": BEFORE})
    log.add(_E.START_REQUESTED, date=DAY, data={"mode": "replay" if started_ns is None else "live"})
    log.add(_E.STARTED, date=DAY, at_ns=started_ns or ended_ns)

    async def append(date: str, event: EventName, *, epoch: int | None, data: Payload) -> TradingDay:
        log.add(event, date=date, epoch=epoch, data=msgspec.to_builtins(data))
        return log.day(date)

    windows = {BEFORE: Window(open_ns=0, close_ns=MIDNIGHT), DAY: Window(open_ns=MIDNIGHT, close_ns=NEXT_MIDNIGHT)}
    desk = SimpleNamespace(book=SimpleNamespace(book=log.book, append=append), window=lambda day: windows[day.date])
    return desk, log


async def taken(desk: Any, log: Log) -> list[tuple[str, int, int | None, str]]:
    """Return the day's gaps afterwards; doing it again changes nothing."""
    desk.book.book = log.book
    day = await take_over_gaps(desk, log.day(DAY))
    desk.book.book = log.book
    assert await take_over_gaps(desk, day) == day
    return [(gap.gap_id, gap.from_ns, gap.to_ns, gap.outcome) for gap in day.gaps]


async def test_a_missed_day_has_the_gaps_of_the_recording_that_held_it() -> None:
    """They are cut to its window; those before and behind it are none of its own."""
    desk, log = two_days(started_ns=None, ended_ns=NEXT_MIDNIGHT + HOUR)
    add_gap(log, BEFORE, "early", MIDNIGHT - HOUR, MIDNIGHT - S)
    add_gap(log, BEFORE, "over", MIDNIGHT - HOUR, MIDNIGHT + HOUR)
    add_gap(log, BEFORE, "late", NEXT_MIDNIGHT - HOUR, NEXT_MIDNIGHT + HOUR)
    assert await taken(desk, log) == [
        (f"over-of-{BEFORE}", MIDNIGHT, MIDNIGHT + HOUR, "stays"),
        (f"late-of-{BEFORE}", NEXT_MIDNIGHT - HOUR, NEXT_MIDNIGHT, "stays"),
    ]


async def test_a_late_roll_takes_over_what_lies_before_it_and_heals_its_own_failed_start() -> None:
    """A start that failed leaves a hole in which the old day recorded; what both lacked stays, and what came later too."""
    desk, log = two_days(started_ns=MIDNIGHT + 3 * HOUR, ended_ns=MIDNIGHT + 3 * HOUR + S)
    add_gap(log, BEFORE, "theirs", MIDNIGHT + 2 * HOUR, MIDNIGHT + 2 * HOUR + S)
    add_gap(log, BEFORE, "end", MIDNIGHT + 3 * HOUR, MIDNIGHT + 4 * HOUR)
    add_gap(log, DAY, "failed start", MIDNIGHT - S, MIDNIGHT + HOUR, "operator_stop")
    add_gap(log, DAY, "both", MIDNIGHT + 2 * HOUR, MIDNIGHT + 3 * HOUR, "operator_stop")
    add_gap(log, DAY, "later", MIDNIGHT + 5 * HOUR, MIDNIGHT + 6 * HOUR)
    assert await taken(desk, log) == [
        ("failed start", MIDNIGHT - S, MIDNIGHT + HOUR, "healed"),
        ("both", MIDNIGHT + 2 * HOUR, MIDNIGHT + 3 * HOUR, "stays"),
        ("later", MIDNIGHT + 5 * HOUR, MIDNIGHT + 6 * HOUR, "stays"),
        (f"theirs-of-{BEFORE}", MIDNIGHT + 2 * HOUR, MIDNIGHT + 2 * HOUR + S, "stays"),
    ]


async def test_a_roll_of_some_seconds_late_takes_over_what_lies_before_it() -> None:
    """Its connector has no snapshots yet when the day opens: the books are those of the old day's."""
    desk, log = two_days(started_ns=MIDNIGHT + 17 * S, ended_ns=MIDNIGHT + 18 * S)
    add_gap(log, BEFORE, "theirs", MIDNIGHT + 2 * S, MIDNIGHT + 3 * S)
    assert await taken(desk, log) == [(f"theirs-of-{BEFORE}", MIDNIGHT + 2 * S, MIDNIGHT + 3 * S, "stays")]


async def test_a_day_before_that_was_replayed_later_recorded_nothing_more() -> None:
    """Both days are repaired by a replay hours after: that says nothing of how long either was recorded."""
    desk, log = two_days(started_ns=MIDNIGHT, ended_ns=MIDNIGHT + S)
    log.add(_E.END_REQUESTED, date=DAY, at_ns=NEXT_MIDNIGHT)
    for date in (BEFORE, DAY):
        log.add(_E.COMPLETED, date=date)
        log.add(_E.START_REQUESTED, date=date, data={"mode": "replay", "revision": 2})
        log.add(_E.STARTED, date=date, at_ns=NEXT_MIDNIGHT + HOUR)
        log.add(_E.END_REQUESTED, date=date, at_ns=NEXT_MIDNIGHT + HOUR)
    add_gap(log, DAY, "stop", MIDNIGHT + HOUR, MIDNIGHT + 2 * HOUR, "operator_stop")
    assert await taken(desk, log) == [("stop", MIDNIGHT + HOUR, MIDNIGHT + 2 * HOUR, "stays")]


@pytest.mark.parametrize("late_start", [True, False])
async def test_a_day_before_that_was_dead_or_ended_in_time_heals_nothing(late_start: bool) -> None:
    """A late start says that nobody recorded; an old day that ended seconds after midnight recorded nothing of it."""
    ended_ns = MIDNIGHT + 2 * HOUR if late_start else MIDNIGHT + 3 * S
    desk, log = two_days(started_ns=MIDNIGHT + HOUR, ended_ns=ended_ns)
    add_gap(log, DAY, "stop", MIDNIGHT + S, MIDNIGHT + HOUR, "operator_stop")
    if late_start:
        add_gap(log, DAY, "late", MIDNIGHT, MIDNIGHT + HOUR, "late_start")
    assert all(outcome == "stays" for *_, outcome in await taken(desk, log))
