"""What a day has of the one before it whose recording went on: the roll was late, or the day was missed altogether.

The raw files of the day before hold those messages, and its journal the gaps among them. The tables of each day are made of
both (`normalize`); the gaps are taken over here, so that each day says itself what it lacks.
"""

from __future__ import annotations

from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import GapClosed, GapOpened
from ssmd_dagster.day.reconcile import RECORDED_WITH
from ssmd_dagster.day.states import EventName
from ssmd_dagster.workflows.desk import Desk

FAR_NS = 5_000_000_000
"""A roll in time ends the old day within this; one that is later leaves the new day without books of its own at its opening."""


def recorded_into(desk: Desk, earlier: TradingDay, day: TradingDay) -> bool:
    """Tell whether an earlier day was ended so late that its recording may reach far into this one."""
    until_ns = earlier.recorded_until_ns
    return earlier.recorded and until_ns is not None and until_ns > desk.window(day).open_ns + FAR_NS


def recorded_before(desk: Desk, day: TradingDay) -> TradingDay | None:
    """Return the last day before this one that was recorded, None where there is none."""
    earlier = (one for one in desk.book.book.days.values() if one.date < day.date and one.recorded)
    return max(earlier, key=lambda one: one.date, default=None)


async def take_over_gaps(desk: Desk, day: TradingDay) -> TradingDay:
    """Journal what the recording that held this day's beginning, or all of it, means for its gaps; return the day.

    That recording's gaps are this day's too. What this day's own connectors lacked before it was ACTIVE (a start that failed) is
    healed where that recording has no gap.
    """
    window = desk.window(day)
    until_ns = window.close_ns if day.recorded_from_ns is None else day.recorded_from_ns
    recorder = recorded_before(desk, day)
    if recorder is None or not recorded_into(desk, recorder, day):
        return day
    before, own, theirs = recorder.date, day.gaps, recorder.gaps
    for gap in theirs:
        from_ns, to_ns = max(gap.from_ns, window.open_ns), min(gap.to_ns or until_ns, until_ns)
        gap_id = f"{gap.gap_id}-of-{before}"
        if from_ns >= to_ns or gap_id in day.gap_by_id:
            continue
        opened = GapOpened(gap_id=gap_id, cause=gap.cause, from_ns=from_ns, scope=gap.scope)
        await desk.book.append(day.date, EventName.GAP_OPENED, epoch=day.epoch, data=opened)
        outcome = "stays" if gap.outcome == "open" else gap.outcome
        closed = GapClosed(gap_id=gap_id, to_ns=to_ns, outcome=outcome, detail=gap.detail)
        day = await desk.book.append(day.date, EventName.GAP_CLOSED, epoch=day.epoch, data=closed)
    if any(gap.cause == GapCause.LATE_START for gap in own):
        return day  # nothing was recorded when this day was started
    for gap in own:
        if gap.outcome != "stays" or gap.to_ns is None or gap.to_ns > until_ns or gap.gap_id.endswith(f"-of-{before}"):
            continue
        if not any(one.from_ns < gap.to_ns and (one.to_ns or until_ns) > gap.from_ns for one in theirs):
            healed = GapClosed(gap_id=gap.gap_id, to_ns=gap.to_ns, outcome="healed", detail=f"{RECORDED_WITH} {before}")
            day = await desk.book.append(day.date, EventName.GAP_CLOSED, epoch=day.epoch, data=healed)
    return day
