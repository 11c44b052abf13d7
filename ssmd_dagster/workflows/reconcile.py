"""Reconcile: hold the days that should exist against the journal, journal what was missed, and say what to ask for.

The decisions are `day/reconcile`'s. Asking for runs is for whoever has a scheduler: this knows none.
"""

from __future__ import annotations

import contextlib
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta

from ssmd_dagster.capture.programs import day_components
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import Failed, Missed
from ssmd_dagster.day.reconcile import RECORDED_WITH, Facts, Plan, covered_by, lacks_recorder, plan
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.errors import RefusedError
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.start import create_streams

CANCELLED = "was cancelled"
FAILED = "failed"
"""How a run ended; what somebody cancelled is not asked for again."""

_FAILS_AS = {DayState.STARTING: EventName.START_FAILED, DayState.ENDING: EventName.END_FAILED}
_LIVE = (DayState.STARTING, DayState.ACTIVE, DayState.ERROR, DayState.ENDING)


async def reconcile(desk: Desk) -> Plan:
    """Look at all days, journal those that were missed or cut off for good, and return what is to be asked for.

    Raises `UnreachableError` where a server does not answer: nothing is decided on half of the facts.
    """
    book = await desk.book.refresh()
    if not book.days:
        return Plan()
    made = plan(desk.env, book, desk.calendar, desk.setting.clock(), await facts(desk))
    if made.missed or made.cut_off:
        await create_streams(desk)
    for missed in made.missed:
        await miss(desk, missed.date, missed.reason, missed.recorded_with)
    for cut_off in made.cut_off:
        data = Failed(error=cut_off.error, transient=True)
        with contextlib.suppress(RefusedError):  # somebody has taken the day in the meantime
            await desk.book.append(cut_off.date, EventName.START_FAILED, epoch=book.days[cut_off.date].epoch, data=data)
    return made


async def facts(desk: Desk) -> Facts:
    """Ask the cache which days have all their processes, at which somebody is at work, and what maintenance is announced."""
    recording, held = set(), set()
    for day in desk.book.book.days.values():
        if day.state not in _LIVE and not day.is_unsealed:
            continue
        beats = await desk.stores.cache.heartbeats(day.date)
        names = day_components(desk.setting.env, day.mode)
        if all(name in beats and beats[name].get("exit_code") is None for name in names):
            recording.add(day.date)
        if await desk.stores.cache.holder(day.date) is not None:
            held.add(day.date)
    return Facts(
        recording=frozenset(recording), held=frozenset(held), maintenance=await desk.stores.cache.maintenance()
    )


async def miss(desk: Desk, date: str, reason: str, recorded_with: str | None = None) -> None:
    """Journal a day that is over and never was ACTIVE; nothing happens where somebody has started it in the meantime."""
    day = desk.book.book.days.get(date)
    if day is None:
        day = await desk.book.append(date, EventName.DEFINED)
    if day.state is DayState.PENDING or (recorded_with is not None and lacks_recorder(day)):
        data = Missed(recorded_with=recorded_with)
        with contextlib.suppress(RefusedError):
            await desk.book.append(date, EventName.MISSED, epoch=day.epoch, reason=reason, data=data)


async def name_recorder(desk: Desk, recorder: TradingDay) -> None:
    """Journal which days a running recording has held whole, while it can be seen to run: afterwards nothing tells."""
    calendar, now_ns = desk.calendar, desk.setting.clock()
    date = Date.fromisoformat(recorder.date) + timedelta(days=1)
    known = None
    while calendar.close_ns(date) <= now_ns:
        known = known or await facts(desk)
        if covered_by(desk.book.book, calendar, date, known) == recorder.date:
            await miss(desk, date.isoformat(), f"{RECORDED_WITH} {recorder.date}", recorder.date)
        date += timedelta(days=1)


async def at_work(desk: Desk) -> list[str]:
    """Return who started or ends a day that is STARTING or ENDING."""
    return [day.actor for day in (await desk.book.refresh()).days.values() if day.state in _FAILS_AS]


async def run_ended(desk: Desk, actor: str, outcome: str) -> list[str]:
    """Tell the days' machine that the run `actor` has ended as `outcome` (failed, was cancelled) without a word of its own.

    A run that ends in order has journaled its failure. Where a day still stands in the attempt of this very run and its lease
    is gone, the failure is journaled for it; where the lease still stands, `reconcile` finds the day later. Returns what was
    journaled.
    """
    told: list[str] = []
    for day in (await desk.book.refresh()).days.values():
        event = _FAILS_AS.get(day.state)
        if day.actor != actor or event is None or await desk.stores.cache.holder(day.date) is not None:
            continue
        under_way = next((step.step for step in day.steps if step.finished_ns is None), None)
        error = f"the run {actor.partition(':')[2][:8]} {outcome} without a word"
        data = Failed(step=under_way, error=error, transient=outcome != CANCELLED)
        with contextlib.suppress(RefusedError):  # somebody has taken the day in the meantime
            await desk.book.append(day.date, event, epoch=day.epoch, data=data)
            told.append(f"{day.date}: {error}")
    return told
