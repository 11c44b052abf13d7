"""Roll: start the next trading day beside the running one, change over at the boundary, then end the old one.

The next day's connector is subscribed and has its snapshots before the boundary, the old one stops some seconds after it: the
raw files of both hold what either socket saw, and each row belongs to the day of the exchange's own event time. A roll that is
late changes over at once; the old day has recorded on until then. A roll by hand ends one day and opens the next at one instant.
"""

from __future__ import annotations

from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta

import msgspec

from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import RefusedError
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.start import HAS_BEEN_UP, START

LEAD_S = 120
"""How long before the boundary a scheduled roll begins, so that a slow launch does no harm."""
WAITS_FOR_BOUNDARY_S = 900
"""A roll that is asked for less than this before the boundary waits for it; an earlier one changes over at once."""


class Rolled(msgspec.Struct, frozen=True):
    """The day that was ended and the one that was started. `already` says that nothing had to be done."""

    ended: TradingDay
    started: TradingDay
    already: bool = False


async def dates_to_roll(desk: Desk, date: str | None = None) -> tuple[str, str]:
    """Return the day to end and the day to start; a roll that was cut off between the two is gone on with.

    The day to end is `date`, or one that was left behind, or the current one. One that never was ACTIVE is rolled from at its
    boundary only: there is nothing to end, and the next day is recorded from its opening all the same.

    Raises `RefusedError` where there is no day to roll from.
    """
    book = await desk.book.refresh()
    left = book.left_behind
    ending = date or (book.current if left is None else left.date)
    day = book.days.get(ending or "")
    if ending is None or day is None or not (day.ever_active or _nearly_over(desk, ending)):
        raise RefusedError(
            "there is no trading day to roll from" if ending is None else f"trading day {ending} never was ACTIVE",
            where=desk.env,
            do=f"Start one: `ssmd day start {desk.env}`.",
        )
    later = [
        day.date
        for day in book.days.values()
        if day.date > ending
        and day.mode == "live"
        and day.epoch is not None
        # One that failed to start and is over by now is not gone on with: what comes now is not its own.
        and (day.state in HAS_BEEN_UP or day.date >= desk.today())
    ]
    following = (Date.fromisoformat(ending) + timedelta(days=1)).isoformat()
    return ending, min(later) if later else max(following, desk.today())


def _nearly_over(desk: Desk, date: str) -> bool:
    close_ns = desk.calendar.close_ns(Date.fromisoformat(date))
    return desk.setting.clock() >= close_ns - WAITS_FOR_BOUNDARY_S * 1_000_000_000


def starting_of(desk: Desk, ending: str, starting: str) -> Attempt:
    """Return the attempt at the roll's first half: the new day beside the running one."""
    close_ns = desk.calendar.close_ns(Date.fromisoformat(ending))
    left_s = (close_ns - desk.setting.clock()) / 1e9
    waits = 0 < left_s <= WAITS_FOR_BOUNDARY_S and desk.calendar.auto_roll
    options = Options(mode="live", rolled_from=ending, boundary_ns=close_ns if waits else None)
    return Attempt(desk, starting, START, options)


async def roll(desk: Desk, date: str | None = None) -> Rolled:
    """Start the next day, change over, and end the current one; what is so already is left as it is.

    Where the next day cannot be started, the current one records on and the failure is raised.
    """
    ending, starting = await dates_to_roll(desk, date)
    following = desk.book.book.days.get(starting)
    if (
        following is not None
        and following.state is DayState.ACTIVE
        and desk.book.book.days[ending].state is DayState.COMPLETE
    ):
        return Rolled(desk.book.book.days[ending], following, already=True)
    started = await starting_of(desk, ending, starting).go()
    ended = await Attempt(desk, ending, END, Options(in_roll=True)).go()
    return Rolled(ended, started)
