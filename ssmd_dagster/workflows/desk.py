"""What a verb works with: one environment's stores, its journal, the supervisor and the exchange, for one actor."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from typing import Literal
from uuid import uuid4

from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.supervisor import Supervisor
from ssmd_dagster.capture.supervisord import connect_supervisor
from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.stores.connect import Stores, connect
from ssmd_dagster.stores.daybook import DayBook

_log = logging.getLogger(__name__)


Kind = Literal["started", "done", "skipped", "failed", "note"]


@dataclass(frozen=True)
class Progress:
    """Something that an operator wants to see while a verb works. `title` is the step's line, `detail` its result."""

    kind: Kind
    verb: str
    date: str
    step: str
    title: str
    detail: str = ""


Report = Callable[[Progress], None]


def report_nothing(_progress: Progress) -> None:
    """Show progress to nobody."""


@dataclass(frozen=True)
class Desk:
    """One actor at work on one environment's days.

    `actor` is who is journaled; `owner` is this very process at work, who holds the lease.
    """

    setting: Setting
    stores: Stores
    supervisor: Supervisor
    book: DayBook
    actor: str
    report: Report = report_nothing
    owner: str = field(default="")

    @property
    def env(self) -> str:
        """Return the environment's name."""
        return self.setting.env.name

    @property
    def calendar(self) -> TradingCalendar:
        """Return the environment's calendar."""
        return self.setting.env.calendar()

    def today(self) -> str:
        """Return the trading day that the environment's clock is in."""
        return self.calendar.date_at(self.setting.clock()).isoformat()

    def window(self, day: TradingDay) -> Window:
        """Return a day's window: as it is journaled, and by the calendar what is not yet."""
        planned = self.calendar.window(Date.fromisoformat(day.date))
        return Window(
            open_ns=planned.open_ns if day.open_ns is None else day.open_ns,
            close_ns=planned.close_ns if day.close_ns is None else day.close_ns,
        )

    def where(self, date: str) -> str:
        """Return environment and date for an error's text."""
        return f"{self.env} {date}"


@contextlib.asynccontextmanager
async def open_desk(
    setting: Setting, actor: str, report: Report = report_nothing, *, needs_cache: bool = True
) -> AsyncIterator[Desk]:
    """Connect to everything that a verb needs, the cache excepted where it only looks; close it again at exit.

    Raises `UnreachableError` or `ConfigurationError`, naming the server, where one cannot be used.
    """
    async with connect(setting.env, setting.home, setting.secrets, name=actor, needs_cache=needs_cache) as stores:
        yield Desk(
            setting=setting,
            stores=stores,
            supervisor=connect_supervisor(setting.home),
            book=DayBook(setting.env.name, stores.journal, stores.cache, setting.clock, actor),
            actor=actor,
            report=report,
            owner=f"{actor}#{uuid4().hex[:8]}",
        )


def actor_of(owner: str) -> str:
    """Return who holds a lease, without the mark of the single process."""
    return owner.partition("#")[0]
