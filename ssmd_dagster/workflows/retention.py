"""What stream and spool need not hold any more: the archive of a sealed day has been read back.

A recorded day's batches are kept for `retain_days` after its close, so that a damaged object can be built again; those of a
replayed day go at once, since the exchange still has them. What is not sealed is never touched.
"""

from __future__ import annotations

import asyncio
import shutil

from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.environments.home import spool_dir, spool_root
from ssmd_dagster.workflows.desk import Desk

_DAY_NS = 86_400_000_000_000


async def let_go_of_sealed_days(desk: Desk) -> tuple[str, ...]:
    """Empty stream and spool of the days whose time is up; return their dates.

    A spool's folder is what tells that there is something left. Raises `UnreachableError` where NATS does not answer.
    """
    keep_ns = desk.setting.env.retain_days * _DAY_NS
    folder = spool_root(desk.setting.home) / desk.env
    dates = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    days = desk.book.book.days
    over = tuple(
        date
        for date in dates
        if date in days and _proved(days[date]) and desk.window(days[date]).close_ns + keep_ns < desk.setting.clock()
    )
    for date in over:
        await let_go(desk, date)
    return over


async def let_go_of_replay(desk: Desk, day: TradingDay) -> None:
    """Empty stream and spool of a replayed day that is sealed: a month of replays would fill a stream made for days."""
    if _proved(day) and day.mode == "replay":
        await let_go(desk, day.date)


async def let_go(desk: Desk, date: str) -> None:
    """Empty stream and spool of a day."""
    await desk.stores.raw_stream.purge(date)
    await asyncio.to_thread(shutil.rmtree, spool_dir(desk.setting.home, desk.env, date), ignore_errors=True)


def _proved(day: TradingDay) -> bool:
    """Say whether all that was recorded of a day is in a sealed revision."""
    return day.state is DayState.COMPLETE and day.sealed is not None and day.sealed.revision == day.revision
