"""Rows that came after a day was sealed: it is judged anew when another day has received them, and when its tables have them.

Not here: which rows those are (`archive.normalize`), and what they do to a verdict (`day.condition`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ssmd_dagster.day.condition import with_late_rows
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import ConditionChanged, LateRows
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.workflows.desk import Desk

if TYPE_CHECKING:  # loads pyarrow, which most commands have no use for
    from ssmd_dagster.archive.normalize_job import LateElsewhere


def late_of(day: TradingDay, rows: int) -> LateRows | None:
    """Return what is known of a day's late rows once its tables have `rows` of them; None where there never were any."""
    if not rows and day.late is None:
        return None
    return LateRows(rows=rows, until_ns=None if day.late is None else day.late.until_ns, filed=True)


async def tell_the_neighbours(desk: Desk, found: Mapping[str, LateElsewhere]) -> None:
    """Journal for each sealed day of which rows came after its seal that it is judged anew; no table has them yet."""
    for date, late in found.items():
        day = await desk.book.day(date)
        if day is None or day.state is not DayState.COMPLETE or day.sealed is None:
            continue
        if day.late is not None and day.late.filed and late.until_ns <= (day.late.until_ns or 0):
            continue
        await judge_late_rows(desk, day, LateRows(rows=late.rows, until_ns=late.until_ns))


async def judge_late_rows(desk: Desk, day: TradingDay, late: LateRows) -> TradingDay:
    """Append `condition_changed` where that is not known of the day; return the day."""
    assert day.condition is not None
    if late == day.late:
        return day
    judged = with_late_rows(day.condition, day.condition_reasons, late)
    data = ConditionChanged(
        condition=judged.value, condition_reasons=judged.reasons, rules_version=judged.rules_version, late=late
    )
    return await desk.book.append(day.date, EventName.CONDITION_CHANGED, epoch=day.epoch, data=data)
