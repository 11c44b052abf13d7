"""What stream and spool need not hold any more: the archive of a sealed day has been read back.

A recorded day's batches are kept for `retain_days` after its close, or until the stream wants their room (`day/retention`);
those of a replayed day go at once, since the exchange still has them. The logs of a sealed day's processes
are kept for `retain_days`. What is not sealed is never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

from ssmd_dagster.capture.programs import day_group
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.retention import Kept, dates_to_let_go
from ssmd_dagster.day.states import DayState
from ssmd_dagster.environments.home import logs_dir, spool_dir, spool_root
from ssmd_dagster.errors import NotFoundError
from ssmd_dagster.workflows.desk import Desk

_DAY_NS = 86_400_000_000_000


async def let_go_of_sealed_days(desk: Desk) -> tuple[str, ...]:
    """Empty stream and spool of the days whose time is up or whose room is wanted; return their dates. Logs go with time alone.

    A spool's folder tells that there is something left, and how much. Raises `UnreachableError` where NATS does not answer.
    """
    keep_ns = desk.setting.env.retain_days * _DAY_NS
    folder = spool_root(desk.setting.home) / desk.env
    sizes = await asyncio.to_thread(_sizes, folder)
    days = [day for date, day in desk.book.book.days.items() if date in sizes]
    kept = [Kept(day.date, sizes[day.date], desk.window(day).close_ns, _proved(day)) for day in days]
    usage = await desk.stores.raw_stream.usage()
    found = dates_to_let_go(kept, desk.setting.clock(), keep_ns, usage.free)
    for date in found:
        await let_go(desk, date)
    now_ns = desk.setting.clock()
    for day in desk.book.book.days.values():
        if _proved(day) and desk.window(day).close_ns + keep_ns < now_ns:
            logs = logs_dir(desk.setting.home) / day_group(desk.env, day.date)
            await asyncio.to_thread(shutil.rmtree, logs, ignore_errors=True)
    return found


async def stream_share(desk: Desk) -> float:
    """Return how full the raw stream is, 0 to 1; 0 where there is none, which its users tell. Raises `UnreachableError`."""
    try:
        return (await desk.stores.raw_stream.usage()).share
    except NotFoundError:
        return 0.0


async def let_go_of_replay(desk: Desk, day: TradingDay) -> None:
    """Empty stream and spool of a replayed day that is sealed: a month of replays would fill a stream made for days."""
    if _proved(day) and day.mode == "replay":
        await let_go(desk, day.date)


async def let_go(desk: Desk, date: str) -> None:
    """Empty stream and spool of a day."""
    await desk.stores.raw_stream.purge(date)
    await asyncio.to_thread(shutil.rmtree, spool_dir(desk.setting.home, desk.env, date), ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every folder in a folder, by its name."""
    found = {}
    for directory in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # a connector has just let go of a file
            found[directory.name] = sum(path.stat().st_size for path in directory.glob("*"))
    return found


def _proved(day: TradingDay) -> bool:
    """Say whether all that was recorded of a day is in a sealed revision."""
    return day.state is DayState.COMPLETE and day.sealed is not None and day.sealed.revision == day.revision
