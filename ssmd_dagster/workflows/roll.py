"""Roll: end the current trading day and start the next one."""

from __future__ import annotations

from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta

import msgspec

from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import RefusedError, SsmdError
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.start import START


class Rolled(msgspec.Struct, frozen=True):
    """The day that was ended and the one that was started. `already` says that nothing had to be done."""

    ended: TradingDay
    started: TradingDay
    already: bool = False


def next_date(desk: Desk, date: str) -> str:
    """Return the day that follows `date` in a roll: the next date, or today's where days in between were missed."""
    return max((Date.fromisoformat(date) + timedelta(days=1)).isoformat(), desk.today())


async def dates_to_roll(desk: Desk, date: str | None = None) -> tuple[str, str]:
    """Return the day to end (the current one, or `date`) and the day to start.

    Raises `RefusedError` where no day runs.
    """
    book = await desk.book.refresh()
    ending = date or book.current
    if ending is None or ending not in book.days:
        raise RefusedError(
            "there is no trading day to roll from" if date is None else f"trading day {date} was never started",
            where=desk.env,
            do=f"Start one: `ssmd day start {desk.env}`.",
        )
    later = [day.date for day in book.days.values() if day.date > ending and day.ever_active]
    return ending, min(later) if later else next_date(desk, ending)


def ending_of(desk: Desk, date: str) -> Attempt:
    """Return the attempt at the roll's first half."""
    return Attempt(desk, date, END, Options(rolling=True))


def starting_of(desk: Desk, date: str) -> Attempt:
    """Return the attempt at the roll's second half: the new day opens now, whatever the calendar says."""
    return Attempt(desk, date, START, Options(mode="live"))


async def roll(desk: Desk, date: str | None = None) -> Rolled:
    """End the current day and start the next; a next day that runs already is a success that says so.

    A day that cannot be ended does not keep the next one from being recorded: that one is started, then the failure is raised.
    """
    ending, starting = await dates_to_roll(desk, date)
    following = desk.book.book.days.get(starting)
    if following is not None and following.state is DayState.ACTIVE:
        ended = desk.book.book.days[ending]
        if ended.state is DayState.COMPLETE:
            return Rolled(ended, following, already=True)
    failure: SsmdError | None = None
    try:
        await ending_of(desk, ending).go()
    except SsmdError as error:
        failure = error
    started = await starting_of(desk, starting).go()
    if failure is not None:
        raise failure
    return Rolled(desk.book.book.days[ending], started)
