"""Pause and resume an environment: schedules and reconcile leave a paused one alone; verbs by hand still work."""

from __future__ import annotations

from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta

import msgspec

from ssmd_dagster.day.events import Paused
from ssmd_dagster.day.reconcile import LOOK_BACK_DAYS, PAUSED_BY, RECORDED_WITH, covered_by
from ssmd_dagster.day.states import EventName
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.reconcile import facts, miss
from ssmd_dagster.workflows.start import create_streams

_ONE_DAY = timedelta(days=1)


class PauseResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `already`: nothing had to be done; `paused` is who paused it, before a resume too."""

    paused: Paused | None
    already: bool


async def pause(desk: Desk, reason: str | None) -> PauseResult:
    """Journal `paused`; an environment that is paused already stays so under who paused it first."""
    await create_streams(desk)
    book = await desk.book.refresh()
    if book.paused is not None:
        return PauseResult(paused=book.paused, already=True)
    book = await desk.book.append_for_environment(desk.today(), EventName.PAUSED, reason=reason)
    return PauseResult(paused=book.paused, already=False)


async def resume(desk: Desk, reason: str | None) -> PauseResult:
    """Journal `resumed`, and every day that was wholly paused as missed because of it: nobody replays it by itself.

    Where a day recorded on through it, it is that day's, as without a pause.
    """
    await create_streams(desk)
    book = await desk.book.refresh()
    paused = book.paused
    if paused is None:
        return PauseResult(paused=None, already=True)
    calendar, now_ns = desk.calendar, desk.setting.clock()
    today = calendar.date_at(now_ns)
    date = max(calendar.date_at(paused.since_ns) + _ONE_DAY, today - LOOK_BACK_DAYS * _ONE_DAY)
    because = f": {paused.reason}" if paused.reason else ""
    known = await facts(desk)
    while date < today and book.days:
        if date.isoformat() not in book.days and date >= Date.fromisoformat(min(book.days)):
            cover = covered_by(book, calendar, date, known)
            why = f"{PAUSED_BY} {paused.actor}{because}" if cover is None else f"{RECORDED_WITH} {cover}"
            await miss(desk, date.isoformat(), why, cover)
        date += _ONE_DAY
    await desk.book.append_for_environment(desk.today(), EventName.RESUMED, reason=reason)
    return PauseResult(paused=paused, already=False)
