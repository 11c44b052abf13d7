"""Look after the running day: ask its processes, the cache and the exchange, and journal ERROR with the cause."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form

import msgspec
from msgspec.structs import replace

from ssmd_dagster.capture.programs import connector_names, day_components
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.health import Look, is_doubtful, judge
from ssmd_dagster.day.maintenance import window_at
from ssmd_dagster.day.payloads import ErrorRaised
from ssmd_dagster.day.retention import WARN_SHARE
from ssmd_dagster.day.states import DayState, EventName, IllegalTransitionError
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import OTHER
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.drift import newest_drift
from ssmd_dagster.workflows.retention import let_go_of_sealed_days, stream_share


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: per live day its error, the warnings, and what to keep for the next look.

    `recover` are the days that stand in ERROR, each with its cause.
    """

    recover: dict[str, str] = {}
    warnings: tuple[str, ...] = ()
    seen: dict[str, int] = {}


async def look_after(desk: Desk, seen: Mapping[str, int]) -> Health:
    """Look at every live day that is ACTIVE, journal ERROR where it is one, and return what was found.

    `seen` is what the look before this one kept. Raises `UnreachableError` where a server does not answer.
    """
    book = await desk.book.refresh()
    now_ns = desk.setting.clock()
    recover: dict[str, str] = {}
    warnings: list[str] = []
    kept: dict[str, int] = {}
    for day in book.days.values():
        if day.mode != "live" or now_ns >= desk.calendar.close_ns(Date.fromisoformat(day.date)):
            continue  # a day that is over is to be ended, not brought back
        if day.state is DayState.ERROR:
            recover[day.date] = day.error or "it is in ERROR"
        if day.state is not DayState.ACTIVE:
            continue
        mark = f"{day.date} "
        known = {text.removeprefix(mark): at for text, at in seen.items() if text.startswith(mark)}
        verdict = judge(await _look(desk, day), known)
        kept |= {f"{mark}{text}": at for text, at in verdict.seen.items()}
        warnings += [f"{mark}{text}" for text in verdict.warnings]
        if verdict.error is None or await desk.stores.cache.holder(day.date) is not None:
            continue  # who holds the lease is at work on it: a recovery, or an end that is about to be journaled
        try:
            data = ErrorRaised(error=verdict.error, component=verdict.component)
            await desk.book.append(day.date, EventName.ERROR_RAISED, epoch=day.epoch, data=data)
        except IllegalTransitionError:
            continue  # the day has ended in the meantime
        recover[day.date] = verdict.error
    return Health(recover=recover, warnings=tuple(warnings), seen=kept)


async def _look(desk: Desk, day: TradingDay) -> Look:
    stats = await desk.stores.cache.stats(day.date)
    share = await stream_share(desk)
    if share >= WARN_SHARE and await let_go_of_sealed_days(desk):
        share = await stream_share(desk)
    look = Look(
        at_ns=desk.setting.clock(),
        components=day_components(desk.setting.env),
        recorders=connector_names(desk.setting.env),
        beats=await desk.stores.cache.heartbeats(day.date),
        maintenance=window_at(await desk.stores.cache.maintenance(), desk.setting.clock()) is not None,
        stream_share=share,
        lag_ms=stats.lag_ms if stats is not None else 0.0,
        unknown=stats.by_channel.get(OTHER, 0) if stats is not None else 0,
        drift=await newest_drift(desk, day.date),
    )
    if not is_doubtful(look):
        return look
    return replace(look, open=await _is_open(desk, day.date))


async def _is_open(desk: Desk, date: str) -> bool | None:
    """Ask the exchange whether it is open; None where it does not say."""
    try:
        exchange = desk.setting.open_exchange(date)
    except SsmdError:
        return None
    try:
        status = await exchange.status()
    except SsmdError:
        return None
    finally:
        await exchange.close()
    return status.exchange_active and status.trading_active
