"""Backfill: replay a range of days, one after the other or several side by side, each started and ended like any day.

It keeps no state: what the journal has COMPLETE, and not empty, is skipped, what was cut off goes on where it was. One day that
fails does not stop the others; one that failed for a passing cause, such as a server that is restarted or the lease of a backfill
that was killed, is tried again first. Not here: how one day is fetched (`replay`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta
from typing import Literal

import msgspec

from ssmd_dagster.capture.process import give_way
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.day.condition import beyond_replay
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import SsmdError, UsageError
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.desk import Desk, Progress, Report, open_desk
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.replay import check_replay
from ssmd_dagster.workflows.retention import let_go_of_replay
from ssmd_dagster.workflows.start import START, create_streams

MAX_PARALLEL = 8
MAX_DAYS = 4_000
TRY_AGAIN_S = (5.0, 30.0)
"""Pauses before a day that failed for a passing cause is tried again; together more than a lease lasts."""

Outcome = Literal["replayed", "complete already", "failed"]


class DayResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one day of a range. `against` is what stands against it beyond what no replay brings back."""

    date: str
    outcome: Outcome
    condition: str | None = None
    against: tuple[str, ...] = ()
    trades: int | None = None
    seconds: float = 0.0
    error: str | None = None
    exit_code: int = 0


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """How far a range is: days done of all, trades fetched by this run, and how long it has taken."""

    done: int
    days: int
    failed: int
    trades: int
    since_s: float
    replayed: int

    @property
    def left_s(self) -> float | None:
        """Return about how long the rest will take, None before the first day is replayed."""
        return None if not self.replayed else self.since_s / self.replayed * (self.days - self.done)


OnDay = Callable[[DayResult, Tally], None]


async def replay_day(
    desk: Desk, date: str, *, share: int = 1, reason: str | None = None, limit_s: float = math.inf
) -> TradingDay:
    """Start a day in replay mode and end it; one that is done already (`is_done`) is returned as it is.

    An attempt that was cut off goes on where it was. Progress goes to the desk's report. From here on the calling thread, and
    what it starts, gives way to whatever else wants the CPU. Raises what a start or an end raises.
    """
    give_way()
    await create_streams(desk)
    day = await desk.book.day(date)
    if day is not None and is_done(day):
        desk.report(Progress("note", "replay", date, "replay", f"Trading day {date} is COMPLETE already"))
        return day
    its_end_is_left = day is not None and (day.state is DayState.ENDING or day.is_unsealed)
    if not its_end_is_left:
        await Attempt(desk, date, START, Options(mode="replay", reason=reason, share=share), limit_s).go()
    day = await Attempt(desk, date, END, Options(reason=reason), limit_s).go()
    await let_go_of_replay(desk, day)
    return day


def days_of(desk: Desk, first: str, last: str) -> list[str]:
    """Return the dates from `first` to `last`, both included.

    Raises:
        UsageError: The range runs backwards or is endless.
        NotFoundError: The calendar does not reach that far back.
        RefusedError: It holds a day that is not over, or the environment records no trades.
    """
    from_, to = Date.fromisoformat(first), Date.fromisoformat(last)
    if from_ > to:
        raise UsageError(f"the range runs backwards: {first} to {last}", do="--from is the earlier date.")
    if (to - from_).days >= MAX_DAYS:
        raise UsageError(f"a range of more than {MAX_DAYS} days: {first} to {last}", do="Give it in parts.")
    desk.calendar.check(from_, desk.setting.clock())
    dates = [(from_ + timedelta(days=number)).isoformat() for number in range((to - from_).days + 1)]
    check_replay(desk, dates[-1], None)
    return dates


async def backfill(
    setting: Setting,
    actor: str,
    dates: Sequence[str],
    *,
    parallel: int,
    reason: str | None,
    report: Report,
    on_day: OnDay,
) -> list[DayResult]:
    """Replay the days in order, `parallel` side by side, each with its part of the exchange's rate; return all results.

    `on_day` is told of every day as it is done, of those that are COMPLETE already first.
    """
    results: dict[str, DayResult] = {}
    began = time.monotonic()

    def done(result: DayResult) -> None:
        results[result.date] = result
        known = list(results.values())
        on_day(
            result,
            Tally(
                done=len(known),
                days=len(dates),
                failed=sum(one.outcome == "failed" for one in known),
                trades=sum(one.trades or 0 for one in known if one.outcome == "replayed"),
                since_s=time.monotonic() - began,
                replayed=sum(one.outcome == "replayed" for one in known),
            ),
        )

    async with open_desk(setting, actor, report) as desk:
        book = await desk.book.refresh()
    for date in dates:
        day = book.days.get(date)
        if day is not None and is_done(day):
            done(_result(day, "complete already"))
    waiting = [date for date in reversed(dates) if date not in results]

    async def work() -> None:
        while waiting:
            done(await _one(setting, actor, waiting.pop(), share=parallel, reason=reason, report=report))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(parallel, len(waiting))):
            group.create_task(work())
    return [results[date] for date in dates]


async def _one(setting: Setting, actor: str, date: str, *, share: int, reason: str | None, report: Report) -> DayResult:
    """Replay one day at a desk of its own, so that a server that was away is connected to anew."""
    began = time.monotonic()
    pauses_s = list(TRY_AGAIN_S)
    while True:
        try:
            async with open_desk(setting, actor, report) as desk:
                before = await desk.book.day(date)
                already = before is not None and is_done(before)
                day = await replay_day(desk, date, share=share, reason=reason)
            break
        except SsmdError as error:
            if error.transient and pauses_s:
                pause_s = pauses_s.pop(0)
                report(Progress("note", "replay", date, "replay", f"{error}; trying again in {pause_s:g} s"))
                await asyncio.sleep(pause_s)
                continue
            return DayResult(
                date=date,
                outcome="failed",
                seconds=time.monotonic() - began,
                error=str(error),
                exit_code=int(error.exit_code),
            )
    return _result(day, "complete already" if already else "replayed", time.monotonic() - began)


def is_done(day: TradingDay) -> bool:
    """Tell whether nothing is left to do for a day: it is COMPLETE, sealed or forced, and has something."""
    return day.state is DayState.COMPLETE and not day.is_unsealed and day.condition != "missing"


def _result(day: TradingDay, outcome: Outcome, seconds: float = 0.0) -> DayResult:
    return DayResult(
        date=day.date,
        outcome=outcome,
        condition=day.condition,
        against=beyond_replay(day.condition_reasons, day.gaps),
        trades=trades_of(day),
        seconds=seconds,
    )


def trades_of(day: TradingDay) -> int | None:
    """Return how many trades the day's ledger has, by the exchange's own list where that was asked."""
    trades = (day.ledger or {}).get("trades") or {}
    found = trades.get("exchange")
    return int(found) if found is not None else None
