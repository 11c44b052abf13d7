"""What can be seen of an environment's days: status, history, one day. Reads the journal; the cache only adds live counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ssmd_dagster.capture.archiver import COMPONENT as ARCHIVER
from ssmd_dagster.capture.programs import LIVE, day_components
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Book, TradingDay
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.maintenance import touching
from ssmd_dagster.day.payloads import DriftFound
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import NotFoundError, UnreachableError
from ssmd_dagster.exchange import OTHER
from ssmd_dagster.stores.cache import DayStats
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.recover import troubles
from ssmd_dagster.workflows.retention import stream_share


class DayView(msgspec.Struct, frozen=True, kw_only=True):
    """One day as it is shown. `state` is ERROR where its processes are gone, journaled or not; `error` says why.

    `messages` is None of a running day whose counts nobody gives. `over`: its window has closed. `stream_share`: how full the
    raw stream is, while the day runs. `maintenance` is what the exchange has announced for the day; of a COMPLETE one its gaps
    tell. `behind` is, beside the current day, an earlier one that is not ended yet.
    """

    day: TradingDay
    state: DayState
    error: str | None
    messages: int | None
    gaps: int
    stats: DayStats | None
    components: dict[str, dict[str, Any]]
    at_ns: int
    over: bool = False
    stream_share: float = 0.0
    maintenance: tuple[Window, ...] = ()
    behind: TradingDay | None = None

    @property
    def drift(self) -> DriftFound | None:
        """Return what the normaliser of the newest sealed tables did not know; None where there are none."""
        return None if self.day.sealed is None else self.day.sealed.drift

    @property
    def unknown(self) -> int:
        """Return how many messages of a running day are of no known type or cannot be read."""
        return 0 if self.stats is None else self.stats.by_channel.get(OTHER, 0)

    def to_json(self, environment: str) -> dict[str, Any]:
        """Return the view under the command line's stable schema; times are nanoseconds since the epoch."""
        day = self.day
        return {
            "environment": environment,
            "date": day.date,
            "state": self.state.value,
            "error": self.error,
            "failed_step": day.failed_step,
            "mode": day.mode,
            "revision": day.revision,
            "sealed": [{"revision": revision, "sealed_ns": at_ns} for revision, at_ns in day.seals],
            "epoch": day.epoch,
            "started_ns": day.span[0],
            "ended_ns": day.span[1],
            "messages": self.messages,
            "gaps": msgspec.to_builtins(day.gaps),
            "condition": day.condition,
            "condition_reasons": list(day.condition_reasons),
            "late": None if day.late is None else msgspec.to_builtins(day.late),
            "drift": None if self.drift is None else msgspec.to_builtins(self.drift),
            "unknown": self.unknown,
            "archive": day.archive_url,
            "ledger": day.ledger,
            "steps": msgspec.to_builtins(day.steps),
            "stats": None if self.stats is None else msgspec.to_builtins(self.stats),
            "components": self.components,
            "stream_share": self.stream_share,
            "maintenance": [{"from_ns": one.open_ns, "to_ns": one.close_ns} for one in self.maintenance],
            "behind": None if self.behind is None else {"date": self.behind.date, "state": self.behind.state.value},
        }


async def status(desk: Desk, date: str | None = None) -> DayView:
    """Return the current day, or `date`, with what its processes say of themselves.

    Raises `NotFoundError` where no day was ever started.
    """
    book = await desk.book.refresh()
    if date is None and book.current is None:
        raise NotFoundError(
            "no trading day has been started yet", where=desk.env, do=f"Start today's: `ssmd day start {desk.env}`."
        )
    seen = await view(desk, _day_of(desk, book, date or str(book.current)))
    if seen.day.date != book.current:
        return seen
    gateway = await desk.stores.cache.heartbeats(LIVE) if seen.components else {}
    return msgspec.structs.replace(seen, behind=book.left_behind, components=seen.components | gateway)


async def history(desk: Desk, limit: int) -> list[DayView]:
    """Return the latest days, newest first, from the journal; only a running day's counts come from the cache."""
    book = await desk.book.refresh()
    dates = sorted(book.days, reverse=True)[:limit]
    return [await view(desk, book.days[date]) for date in dates]


async def show(desk: Desk, date: str) -> DayView:
    """Return one day; raise `NotFoundError` where the journal has nothing of it."""
    return await view(desk, _day_of(desk, await desk.book.refresh(), date))


def _day_of(desk: Desk, book: Book, date: str) -> TradingDay:
    day = book.days.get(date)
    if day is None:
        known = f"Recorded days: {min(book.days)} to {max(book.days)}." if book.days else "No day is recorded yet."
        raise NotFoundError(
            f"trading day {date} is not recorded", where=desk.env, do=f"{known} See `ssmd day history {desk.env}`."
        )
    return day


async def view(desk: Desk, day: TradingDay) -> DayView:
    """Return a day with live counts and the state that its processes' heartbeats bear out, as far as the cache answers."""
    running = day.state in (DayState.STARTING, DayState.ACTIVE, DayState.ERROR, DayState.ENDING)
    windows: tuple[Window, ...] = ()
    stats, components, cache_error = None, {}, None
    share = await stream_share(desk) if running else 0.0
    try:
        if day.state is not DayState.COMPLETE:
            windows = await desk.stores.cache.maintenance()
        if running or day.state is DayState.FAILED:  # a failed one may have been counted by nobody else
            stats = await desk.stores.cache.stats(day.date)
        if running:
            components = await desk.stores.cache.heartbeats(day.date)
    except UnreachableError as unreachable:
        cache_error = str(unreachable)
    state, error = day.state, day.error
    if cache_error is not None:
        error = error or f"how it fares is not known: {cache_error}"
    elif day.state is DayState.ACTIVE and (found := troubles(desk.setting.env, components, day.mode)):
        error = "; ".join(found)
        if any(_stands_still(components.get(name)) for name in day_components(desk.setting.env, day.mode)):
            state = DayState.ERROR
    elif day.state is DayState.ENDING and (held_up := components.get(ARCHIVER, {}).get("error")):
        error = f"{ARCHIVER}: {held_up}"  # the end waits until it can go on
    counted = stats.messages if stats is not None else 0
    now_ns = desk.setting.clock()
    return DayView(
        day=day,
        state=state,
        error=error,
        messages=None if running and cache_error is not None else max(counted, day.messages or 0),
        gaps=len(day.gaps),
        stats=stats,
        components=components,
        at_ns=now_ns,
        stream_share=round(share, 3),
        over=desk.window(day).close_ns <= now_ns,
        maintenance=touching(windows, desk.window(day)),
    )


def _stands_still(beat: Mapping[str, Any] | None) -> bool:
    """Tell whether a process is gone, or cannot go on; one that has ended for good has left its last words."""
    return beat is None or beat.get("state") == "error" or beat.get("exit_code") is not None


def ledger_of(day: TradingDay) -> Ledger | None:
    """Return the day's ledger, None where none was drawn up."""
    return None if day.ledger is None else Ledger.from_json(day.ledger)
