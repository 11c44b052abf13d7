"""What holds an environment's schedules back: somebody's pause, or its exchange's announced maintenance.

One rule for Dagster's own schedules and for the sensor that takes their place where an exchange's clock is moved. What is due
when is not decided here.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from ssmd_dagster.clock import Clock
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Book
from ssmd_dagster.day.maintenance import window_at
from ssmd_dagster.day.reconcile import paused_words
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.workflows.desk import Desk

MOVED_S = 60
"""How far apart the exchange's clock and the host's are where the exchange's counts as moved."""


class Seen(NamedTuple):
    """An environment's clock in nanoseconds, whether it is not the host's, its days, and the maintenance that is on."""

    now_ns: int
    moved: bool
    book: Book
    maintenance: Window | None


async def look(desk: Desk) -> Seen:
    """Look at an environment; raises `UnreachableError`."""
    book = await desk.book.refresh()
    windows = await desk.stores.cache.maintenance()
    now_ns = desk.setting.clock()
    return Seen(now_ns, _is_moved(desk.setting.clock), book, window_at(windows, now_ns))


def held_back(environment: Environment, seen: Seen, *, connects: bool) -> str | None:
    """Say why nothing may be asked for now, None where it may; `connects`: what is asked for needs the exchange."""
    name, calendar = environment.name, environment.calendar()
    if seen.book.paused is not None:
        return f"{name} is {paused_words(name, seen.book.paused, calendar)}"
    if connects and seen.maintenance is not None:
        until = calendar.local(seen.maintenance.close_ns).isoformat()
        return f"the exchange of {name} is in announced maintenance until {until}"
    return None


def _is_moved(clock: Clock) -> bool:
    return abs(clock() - time.time_ns()) > MOVED_S * 1_000_000_000
