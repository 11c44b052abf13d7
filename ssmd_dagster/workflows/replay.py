"""Replay: build a day that is over from the exchange's history, by the steps of a start.

A replayed day has trades and markets; its deltas and tickers cannot be had again and are gaps, `not_captured`. The same brings
what a recorded day lacks into its next revision. The live day, the gateway and the security master of today are not touched.
Not here: how pages are fetched (`capture/replayer`), the end, which is that of every day, and ranges of days (`backfill`).
"""

from __future__ import annotations

import asyncio
import time
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from typing import Any

from ssmd_dagster.capture.control import control_subject, request
from ssmd_dagster.capture.programs import ARCHIVER, REPLAYER, day_group, replay_programs
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import Completed, GapClosed, GapOpened, Started
from ssmd_dagster.day.states import RECORDING, DayState, EventName
from ssmd_dagster.errors import (
    ConfigurationError,
    ExitCode,
    NotFoundError,
    RefusedError,
    SsmdError,
    UnreachableError,
)
from ssmd_dagster.workflows.attempt import Attempt
from ssmd_dagster.workflows.desk import Desk

TRADES = "trade"
STALLED_AFTER_S = 300.0
"""How long a replayer may live without bringing anything, and without ending."""
TELL_EVERY_S = 5.0
POLL_S = 0.1

_KINDS: dict[int, type[SsmdError]] = {
    int(kind.exit_code): kind for kind in (NotFoundError, RefusedError, UnreachableError, ConfigurationError)
}


def is_replay(attempt: Attempt) -> bool:
    """Tell whether the day that an attempt has taken is replayed."""
    return attempt.day.mode == "replay"


def check_replay(desk: Desk, date: str, day: TradingDay | None) -> bool:
    """See whether a day may be replayed; False where it is ACTIVE as a replay already.

    Raises `RefusedError` where it is not over yet, is being recorded, or the environment records no trades.
    """
    calendar, now_ns, parsed = desk.calendar, desk.setting.clock(), Date.fromisoformat(date)
    if day is not None and day.state in RECORDING and day.mode == "live":
        raise RefusedError(
            f"trading day {date} is {day.state}: it is recorded, not replayed",
            where=desk.env,
            do=f"End it first (`ssmd day end {desk.env} --date {date}`); what it lacks can be replayed then.",
        )
    held_by = None if day is None or day.recorded_with is None else desk.book.book.days.get(day.recorded_with)
    if held_by is not None and held_by.state is not DayState.COMPLETE:
        raise RefusedError(
            f"trading day {date} was recorded with {held_by.date}, which is {held_by.state}",
            where=desk.env,
            do=f"Its tables are made of that day's archive once it is COMPLETE; see `ssmd day status {desk.env}`.",
        )
    if now_ns < calendar.close_ns(parsed):
        what = "has not begun" if now_ns < calendar.open_ns(parsed) else "is not over"
        raise RefusedError(
            f"trading day {date} {what}, and a replay would lack what is yet to come",
            where=desk.env,
            do=f"It can be replayed from {calendar.local(calendar.close_ns(parsed)).isoformat()} on; today is "
            f"{desk.today()}.",
        )
    if TRADES not in desk.setting.env.capture.channels:
        raise RefusedError(
            "the environment records no trades, and nothing else can be replayed",
            where=f"{desk.env}: capture.channels",
            do="Add `trade` to its channels.",
        )
    return day is None or day.state is not DayState.ACTIVE


async def sync_markets(attempt: Attempt) -> str:
    """Begin the fetching anew, whatever still runs of an earlier attempt, and wait for the markets of that day."""
    desk, date = attempt.desk, attempt.date
    group = day_group(desk.env, date)
    await desk.supervisor.stop(group)
    for name in (REPLAYER, ARCHIVER):
        await desk.stores.cache.remove_heartbeat(date, name)
    await desk.supervisor.ensure_group(group, replay_programs(desk.setting, date, attempt.options.share))
    for name in (ARCHIVER, REPLAYER):
        await desk.supervisor.start(group, name)
    beat = await _wait_for_replayer(attempt, ("trades", "storing", "done"))
    return f"{beat['markets']:,} markets" if beat["markets"] else "markets are looked up as they traded"


async def fetch(attempt: Attempt) -> str:
    """Wait until every trade of the day is in the spool and in the stream."""
    desk, date = attempt.desk, attempt.date
    group = day_group(desk.env, date)
    if not any(state.name == REPLAYER for state in await desk.supervisor.states(group)):
        await sync_markets(attempt)
    beat = await _wait_for_replayer(attempt, ("done",))
    rate = beat["new_trades"] / max(beat["since_s"], 0.001)
    return f"{beat['trades']:,} trades in {beat['pages']:,} pages, {rate:,.0f} trades/s"


async def skip_gateway(_attempt: Attempt) -> str:
    """Leave the gateway alone: a replay has no clients."""
    return "a replay has no clients"


async def check_counts(attempt: Attempt) -> str:
    """See that the archiver takes what was fetched; one that died is given time to be restarted."""
    desk, date = attempt.desk, attempt.date
    deadline = time.monotonic() + STALLED_AFTER_S
    trouble = "no answer"
    while time.monotonic() < deadline:
        try:
            status = await request(desk.stores.nc, control_subject(desk.env, ARCHIVER, date), "status")
        except UnreachableError as error:
            trouble = error.what
        else:
            if status["backlog"] == 0:
                return f"{status['messages']:,} pages archived"
            trouble = status["error"] or f"{status['backlog']} batches to go"
        await asyncio.sleep(POLL_S)
    raise UnreachableError(
        f"the archiver does not take what was fetched: {trouble}",
        where=desk.where(date),
        do=f"See {desk.setting.home / 'logs' / day_group(desk.env, date) / 'archiver.log'}.",
    )


async def finish(attempt: Attempt) -> TradingDay:
    """Append ACTIVE, and a gap for every channel that was never recorded and cannot be fetched.

    What was recorded with another day comes into the tables from that day's archive.
    """
    desk = attempt.desk
    beat = await desk.stores.cache.heartbeat(attempt.date, REPLAYER) or {}
    window = desk.window(attempt.day)
    started = Started(open_ns=window.open_ns, markets=beat.get("markets"), connections=0)
    day = await attempt.journal(EventName.STARTED, started)
    for channel in () if day.source == "live" else desk.setting.env.capture.channels:
        gap_id = f"gap-replay-{channel}"
        if channel == TRADES or gap_id in day.gap_by_id:
            continue
        opened = GapOpened(
            gap_id=gap_id, cause=GapCause.NOT_CAPTURED, from_ns=window.open_ns, scope={"channel": channel}
        )
        await attempt.journal(EventName.GAP_OPENED, opened)
        closed = GapClosed(gap_id=gap_id, to_ns=window.close_ns, outcome="stays")
        day = await attempt.journal(EventName.GAP_CLOSED, closed)
    return day


def revision_note(before: Completed, after: TradingDay) -> str:
    """Return what a new revision of a day changed against the one before, in words: records, trades, condition."""
    done = after.completed
    assert done is not None
    parts = [f"{done.messages - before.messages:+,} records"]
    old, new = _trades_line(before), _trades_line(done)
    for name in ("captured", "repaired", "missing"):
        if old.get(name) is not None and new.get(name) is not None and old[name] != new[name]:
            parts.append(f"{new[name] - old[name]:+,} trades {name}")
    closed = sum(gap.outcome in ("healed", "repaired") for gap in after.gaps)
    parts.append(f"{closed} of {len(after.gaps)} gaps healed or repaired")
    moved = (
        f"{before.condition} → {done.condition}" if before.condition != done.condition else f"still {done.condition}"
    )
    return f"Revision {after.revision}: {', '.join(parts)}; {moved}"


def _trades_line(done: Completed) -> dict[str, Any]:
    found: dict[str, Any] = (done.ledger or {}).get("trades") or {}
    return found


async def _wait_for_replayer(attempt: Attempt, states: tuple[str, ...]) -> dict[str, Any]:
    """Return the replayer's heartbeat once it is in one of `states`, telling the operator how far it is.

    Raises what the replayer says that ended it, `UnreachableError` where it keeps dying or brings nothing any more.
    """
    desk, date = attempt.desk, attempt.date
    group = day_group(desk.env, date)
    log = desk.setting.home / "logs" / group / f"{REPLAYER}.log"
    moved_at = tell_at = time.monotonic()
    moved: tuple[Any, ...] = ()
    while True:
        beat = await desk.stores.cache.heartbeat(date, REPLAYER)
        if beat is not None and beat["epoch"] == attempt.day.epoch:
            if beat["state"] in states:
                return beat
            if beat["exit_code"] is not None:
                raise _KINDS.get(beat["exit_code"], SsmdError)(beat["error"])
            if (at := (beat["trades"], beat["pages"], beat["markets"], beat["state"])) != moved:
                moved, moved_at = at, time.monotonic()
            if time.monotonic() > tell_at + TELL_EVERY_S:
                tell_at = time.monotonic()
                attempt.tell("note", "connector", progress_of(beat))
        state = next((state for state in await desk.supervisor.states(group) if state.name == REPLAYER), None)
        ended = state is not None and state.state == "EXITED" and state.exit_code == ExitCode.CONFIGURATION
        fatal = state is None or state.state == "FATAL" or ended
        if fatal or time.monotonic() > moved_at + STALLED_AFTER_S:
            words = f": {beat['error']}" if beat is not None and beat["error"] else ""
            kind = ConfigurationError if ended else UnreachableError
            raise kind(
                f"the replay does not get on{words}",
                where=desk.where(date),
                do=f"See {log}; the same command goes on where it was.",
            )
        await asyncio.sleep(POLL_S)


def progress_of(beat: dict[str, Any]) -> str:
    """Return how far a replayer is, in words: trades, rate, share of the day, time left."""
    since_s, part, new = max(beat["since_s"], 0.001), beat["covered"], beat["new_trades"]
    left = f", about {since_s * (1 - part) / part:,.0f} s left" if 0 < part < 1 and new else ""
    trouble = f" ({beat['error']})" if beat["error"] else ""
    if not beat["trades"]:
        return f"no trade has come yet{trouble}"
    return f"{beat['trades']:,} trades, {part:.0%} of the day, {new / since_s:,.0f} trades/s{left}{trouble}"
