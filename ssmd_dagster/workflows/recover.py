"""Recover: from whatever was killed back to ACTIVE, or on to COMPLETE.

What is true is asked of the journal and of the processes' heartbeats. A day whose attempt was cut off goes on with that verb; a
day that ran and lost its processes gets them back, under a new epoch, with the gap that its connector declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from typing import Any

from ssmd_dagster.capture.programs import day_components, day_group
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import ErrorRaised, Mode
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import RefusedError
from ssmd_dagster.workflows.attempt import Attempt, Options, Verb
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.start import START, create_streams

VERB = "recover"
TRIES = 3


async def recovery_of(desk: Desk, date: str | None = None, reason: str | None = None) -> Attempt:
    """Return the attempt that brings a day back to where it should be.

    Default: the current one, or, where that has no trouble, one that was left behind by a roll that was cut off.

    Raises `RefusedError` where there is no such day, or where recovering cannot help it.
    """
    await create_streams(desk)
    book = await desk.book.refresh()
    wanted = date or book.current
    day = book.days.get(wanted) if wanted is not None else None
    if date is None and day is not None and book.left_behind is not None and not await _needs_help(desk, day):
        day = book.left_behind
        wanted = day.date
    if wanted is None or day is None:
        raise RefusedError(
            "there is no trading day to recover" if wanted is None else f"trading day {wanted} was never started",
            where=desk.env,
            do=f"Start one: `ssmd day start {desk.env}`.",
        )
    return Attempt(desk, wanted, _verb_for(desk, day), Options(mode=day.mode, reason=reason))


def _verb_for(desk: Desk, day: TradingDay) -> Verb:
    over = desk.setting.clock() >= desk.calendar.close_ns(Date.fromisoformat(day.date))
    match day.state:
        case DayState.ACTIVE | DayState.ERROR if desk.book.book.successor(day.date) is None:
            return RECOVER
        case DayState.ACTIVE | DayState.ERROR:
            return END
        case DayState.ENDING | DayState.COMPLETE:
            return END
        case DayState.FAILED if day.ever_active and over:
            return END
        case DayState.FAILED | DayState.PENDING if over:
            raise RefusedError(
                f"trading day {day.date} is {day.state} and over: nothing was recorded that could be recovered",
                where=desk.env,
                do=f"Build it from the exchange's history: `ssmd day backfill {desk.env} --from {day.date} --to {day.date}`.",
            )
        case _:
            return START


async def may_recover(attempt: Attempt) -> bool:
    """See what a day that ran needs; False where all its processes live and have no trouble."""
    day = await attempt.desk.book.day(attempt.date)
    return day is not None and await _needs_help(attempt.desk, day)


async def _needs_help(desk: Desk, day: TradingDay) -> bool:
    if day.state is DayState.ACTIVE:
        return bool(await _troubles_of(desk, day))
    return day.state is not DayState.COMPLETE


async def _troubles_of(desk: Desk, day: TradingDay) -> list[str]:
    """Return what is wrong with a day's processes, by their heartbeats and by the supervisor.

    Behind a power cut the heartbeats of processes that are gone stand for some seconds more.
    """
    beats = await desk.stores.cache.heartbeats(day.date)
    found = troubles(desk.setting.env, beats, day.mode)
    alive = {state.name for state in await desk.supervisor.states(day_group(desk.env, day.date)) if state.alive}
    dead = [name for name in day_components(desk.setting.env, day.mode) if name in beats and name not in alive]
    return found + [f"{name} does not run" for name in dead]


def troubles(env: Environment, beats: Mapping[str, Mapping[str, Any]], mode: Mode = "live") -> list[str]:
    """Return what is wrong with the processes of a running day, by their heartbeats."""
    gone = [f"{name} gives no heartbeat" for name in day_components(env, mode) if name not in beats]
    return gone + [f"{name}: {beat['error']}" for name, beat in sorted(beats.items()) if beat.get("error")]


async def take(attempt: Attempt) -> TradingDay:
    """Append ERROR with the cause, where nobody has yet."""
    desk, date = attempt.desk, attempt.date
    day = await desk.book.day(date)
    assert day is not None
    if day.state is DayState.ERROR:
        return day
    error = "; ".join(await _troubles_of(desk, day)) or "recovery was asked for"
    return await desk.book.append(
        date, EventName.ERROR_RAISED, reason=attempt.options.reason, data=ErrorRaised(error=error)
    )


async def finish(attempt: Attempt) -> TradingDay:
    """Append `recovered`: the day is ACTIVE under a new epoch."""
    return await attempt.desk.book.append(attempt.date, EventName.RECOVERED, reason=attempt.options.reason)


async def leave_running(_attempt: Attempt) -> None:
    """Stop nothing: what still records goes on recording."""


RECOVER = Verb(
    name=VERB,
    steps=tuple(step for step in START.steps if step.name != "secmaster"),
    may_begin=may_recover,
    take=take,
    finish=finish,
    clean_up=leave_running,
    failed=EventName.GAVE_UP,
    tries=TRIES,
)
