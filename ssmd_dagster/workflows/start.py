"""Start a trading day: take it, bring up what records it, and see that it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta
from typing import Any

from ssmd_dagster.capture.archiver import COMPONENT as ARCHIVER
from ssmd_dagster.capture.control import control_subject, request
from ssmd_dagster.capture.gateway import COMPONENT as GATEWAY
from ssmd_dagster.capture.programs import (
    LIVE,
    connector_names,
    day_group,
    day_programs,
    gateway_program,
    markets_subscribed,
)
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.maintenance import described, pieces, touching, window_at
from ssmd_dagster.day.payloads import GapClosed, GapOpened, Mode, Started, StartRequested
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.errors import ConfigurationError, ExitCode, RefusedError, SsmdError, UnreachableError
from ssmd_dagster.workflows import replay, secmaster
from ssmd_dagster.workflows.attempt import Attempt, Step, Verb
from ssmd_dagster.workflows.behind import refuse_journal_behind
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.lease import wait_until_gone

VERB = "start"
UP_TIMEOUT_S = 60.0
DYING_TIMEOUT_S = 10.0
"""How long a process that died is given to come up after all: its supervisor starts it again and again."""
HEALTH_TIMEOUT_S = 30.0
QUIET_AFTER_S = 10.0
"""How long the health check waits for a first data frame before it asks whether the exchange is closed."""
POLL_S = 0.1
CLOCK_POLL_S = 0.2

HAS_BEEN_UP = (DayState.ACTIVE, DayState.ERROR, DayState.ENDING, DayState.COMPLETE)


async def may_start(attempt: Attempt) -> bool:
    """See whether the day may be started now; False where it is ACTIVE already.

    For a roll, a schedule or a sensor every day that has been up is as it should be, whatever became of it: only a person opens
    one again, or has one that is over replayed and left ACTIVE. Waits for the lease of an earlier attempt to be gone where the
    journal shows one under way.

    Raises:
        NotFoundError: The calendar has no such day.
        RefusedError: The day's state or date does not allow it, or another actor is at work on it.
        SsmdError: The journal has lost days that the store holds.
    """
    desk, date = attempt.desk, attempt.date
    calendar, now_ns, parsed = desk.calendar, desk.setting.clock(), Date.fromisoformat(attempt.date)
    calendar.check(parsed, now_ns)
    await create_streams(desk)
    day = await desk.book.day(date)
    opens_again = not attempt.options.unattended and attempt.options.rolled_from is None
    if not opens_again and day is not None and (day.state in HAS_BEEN_UP or day.ended_ns is not None):
        return False
    mode = mode_of(attempt, day)
    if mode == "live" and day is not None and day.state is DayState.ACTIVE:
        return False
    await refuse_journal_behind(desk)
    if mode == "replay" and not replay.check_replay(desk, date, day):
        return False
    if mode == "live" and attempt.options.mode is None and now_ns < calendar.open_ns(parsed):
        raise RefusedError(
            f"trading day {date} has not begun",
            where=desk.env,
            do=f"It opens at {calendar.local(calendar.open_ns(parsed)).isoformat()}; today is {desk.today()}.",
        )
    if day is not None and day.state in (DayState.ENDING, DayState.ERROR):
        verb = "end" if day.state is DayState.ENDING else "recover"
        raise RefusedError(
            f"trading day {date} is {day.state}", where=desk.env, do=f"Use `ssmd day {verb} {desk.env} --date {date}`."
        )
    if day is not None and day.state is DayState.STARTING:
        await wait_until_gone(desk, date, VERB)
    if mode == "live" and desk.setting.clock() >= calendar.close_ns(parsed):
        raise RefusedError(
            f"trading day {date} is over and cannot be recorded any more",
            where=desk.env,
            do=f"Build it from the exchange's history: `ssmd day backfill {desk.env} --from {date} --to {date}`.",
        )
    desk.stores.raw_stream.check_payload()
    return True


def mode_of(attempt: Attempt, day: TradingDay | None) -> Mode:
    """Return how a day is to be started: as asked for, as it runs, else live while its window is open.

    A schedule or a sensor means live: whatever of its day is over by then is not its business.
    """
    if attempt.options.mode is not None:
        return attempt.options.mode
    if attempt.options.unattended:
        return "live"
    if day is not None and day.state is DayState.ACTIVE:
        return day.mode
    desk = attempt.desk
    return desk.calendar.default_mode(Date.fromisoformat(attempt.date), desk.setting.clock())


async def create_streams(desk: Desk) -> None:
    """Make sure that the environment's streams exist; one with other settings is refused."""
    await desk.stores.journal.create()
    await desk.stores.raw_stream.create(desk.setting.env.capture.stream_limit_mb << 20)
    await desk.stores.secmaster.create()


async def take(attempt: Attempt) -> TradingDay:
    """Append STARTING: from here on the day is this attempt's, under a new epoch. The caller holds the lease."""
    desk, date = attempt.desk, attempt.date
    day = await desk.book.day(date)
    if day is None:
        day = await desk.book.append(date, EventName.DEFINED)
    again = day.state is DayState.COMPLETE
    now_ns = desk.setting.clock()
    mode = mode_of(attempt, day)
    by_calendar = mode == "replay" or day.ever_active or _opens_by_calendar(attempt)
    data = StartRequested(
        mode=mode,
        open_ns=None if by_calendar else now_ns,
        revision=day.revision + 1 if again else day.revision,
    )
    ended_ns = day.ended_ns
    day = await desk.book.append(date, EventName.START_REQUESTED, reason=attempt.options.reason, data=data)
    if again and ended_ns is not None and mode == "live":
        gap_id = f"gap-{day.epoch}-operator-stop"
        await desk.book.append(
            date, EventName.GAP_OPENED, data=GapOpened(gap_id=gap_id, cause=GapCause.OPERATOR_STOP, from_ns=ended_ns)
        )
        day = await desk.book.append(
            date, EventName.GAP_CLOSED, data=GapClosed(gap_id=gap_id, to_ns=now_ns, outcome="stays")
        )
    return day


def _opens_by_calendar(attempt: Attempt) -> bool:
    """Tell whether the day's window begins where the day before it ends: in a roll, or where that day was recorded too."""
    if attempt.options.rolled_from is not None:
        return True
    before = (Date.fromisoformat(attempt.date) - timedelta(days=1)).isoformat()
    return attempt.desk.calendar.auto_roll and before in attempt.desk.book.book.days


async def finish(attempt: Attempt) -> TradingDay:
    """Append ACTIVE: at the boundary where a roll comes before it, else now.

    A day that opens by the calendar and that nobody recorded from then on has a gap, `late_start`, up to here; what of it the
    exchange was in announced maintenance is a gap of that cause.
    """
    if replay.is_replay(attempt):
        return await replay.finish(attempt)
    desk, date, options = attempt.desk, attempt.date, attempt.options
    boundary_ns = options.boundary_ns or 0
    left_ns = boundary_ns - desk.setting.clock()
    in_time = left_ns > 0
    if in_time:
        attempt.tell("note", "boundary", f"Ready; the day begins in {left_ns / 1e9:.0f} s")
        await wait_until(desk, boundary_ns)
    beats = await desk.stores.cache.heartbeats(date)
    connectors = connector_names(desk.setting.env)
    markets = markets_subscribed(desk.setting.env, beats)
    day = attempt.day
    now_ns = desk.setting.clock()
    at_once = options.rolled_from is not None and now_ns < desk.calendar.open_ns(Date.fromisoformat(date))
    first_time = not day.ever_active
    opened_ns = now_ns if at_once else None
    if first_time and day.open_ns is not None and opened_ns is None:
        # Opened by hand: the window begins where the recording does, not some seconds before it.
        up_ns = [beats[name].get("up_ns") for name in connectors if name in beats]
        opened_ns = max((ns for ns in up_ns if ns is not None), default=None)
    if opened_ns is None:  # journaled, so that no later edit of the schedule moves the window of a recorded day
        opened_ns = desk.window(day).open_ns
    started = await attempt.journal(
        EventName.STARTED, Started(open_ns=opened_ns, markets=markets, connections=len(connectors))
    )
    if not markets:
        attempt.tell(
            "note", "markets", f"No market is what {desk.env} selects: nothing is recorded until one is listed"
        )
    open_ns = desk.window(started).open_ns
    if first_time and not in_time and open_ns < now_ns and day.open_ns is None:
        until_ns = min(now_ns, await _recorded_since(desk, date) or now_ns)
        windows = await desk.stores.cache.maintenance()
        late = pieces(open_ns, until_ns, windows, GapCause.LATE_START) if open_ns < until_ns else []
        for number, (from_ns, to_ns, cause) in enumerate(late, start=1):
            gap_id = f"gap-{day.epoch}-late-start" + (f"-{number}" if number > 1 else "")
            await attempt.journal(EventName.GAP_OPENED, GapOpened(gap_id=gap_id, cause=cause, from_ns=from_ns))
            started = await attempt.journal(
                EventName.GAP_CLOSED, GapClosed(gap_id=gap_id, to_ns=to_ns, outcome="stays")
            )
        if options.rolled_from is not None and not in_time:
            held = "what nobody recorded since is a gap" if late else f"{options.rolled_from} recorded on for both"
            late_s = (now_ns - open_ns) / 1e9
            late_by = f"{late_s:.0f} s" if late_s < 600 else f"{late_s / 60:.0f} min"
            attempt.tell("note", "boundary", f"The boundary was {late_by} ago, so the days do not overlap: {held}")
    return started


async def _recorded_since(desk: Desk, date: str) -> int | None:
    """Return since when an earlier day's connectors, which record on until its end, are up; None where there are none.

    The journal says ACTIVE also of a day whose machine was switched off, and for some seconds its heartbeats stand: the
    supervisor must have its connectors.
    """
    for before in desk.book.book.days.values():
        if before.date < date and before.mode == "live" and before.state is DayState.ACTIVE:
            beats = await desk.stores.cache.heartbeats(before.date)
            group = await desk.supervisor.states(day_group(desk.env, before.date))
            alive = {state.name for state in group if state.alive}
            own = [beats.get(name, {}) for name in connector_names(desk.setting.env) if name in alive]
            up_ns = [beat["up_ns"] for beat in own if beat.get("exit_code") is None and beat.get("up_ns") is not None]
            if len(up_ns) == len(connector_names(desk.setting.env)):
                return int(max(up_ns))
    return None


async def wait_until(desk: Desk, at_ns: int) -> None:
    """Wait until the environment's clock has reached `at_ns`; looked at often, since a simulated clock may be moved."""
    while (left_ns := at_ns - desk.setting.clock()) > 0:
        await asyncio.sleep(min(left_ns / 1e9, CLOCK_POLL_S))


async def sync_security_master(attempt: Attempt) -> str:
    """Bring in the markets to record."""
    if replay.is_replay(attempt):
        return await replay.sync_markets(attempt)
    desk = attempt.desk
    result = await secmaster.sync(desk, attempt.date)
    day = desk.calendar.window(Date.fromisoformat(attempt.date))
    announced = described(touching(await desk.stores.cache.maintenance(), day), desk.calendar)
    return (
        f"{result.total} markets ({result.added} new, {result.updated} changed, {result.settled} settled)"
        f"{f'; maintenance announced: {announced}' if announced else ''}"
    )


def _names_maintenance(run: Callable[[Attempt], Awaitable[str]]) -> Callable[[Attempt], Awaitable[str]]:
    """Let a step that fails for want of the exchange, while that has announced maintenance, say so and until when."""

    async def guarded(attempt: Attempt) -> str:
        try:
            return await run(attempt)
        except UnreachableError as error:
            desk = attempt.desk
            window = window_at(await desk.stores.cache.maintenance(), desk.setting.clock())
            if window is None:
                raise
            until = desk.calendar.local(window.close_ns).isoformat()
            raise UnreachableError(
                f"the exchange is in announced maintenance until {until}: {error.what}",
                where=error.where,
                do=f"Dagster starts the day after it; by hand: `ssmd day start {desk.env} --date {attempt.date}`.",
            ) from error

    return guarded


async def start_connector(attempt: Attempt) -> str:
    """Bring the connectors up and wait until the exchange has acknowledged all subscriptions."""
    if replay.is_replay(attempt):
        return await replay.fetch(attempt)
    desk, date = attempt.desk, attempt.date
    group = day_group(desk.env, date)
    await desk.supervisor.ensure_group(group, day_programs(desk.setting, date))
    names = connector_names(desk.setting.env)
    await desk.supervisor.ensure_group(desk.env, [gateway_program(desk.setting)])
    for name in (*names, ARCHIVER):
        await desk.stores.cache.remove_heartbeat(date, name)
        await desk.supervisor.start(group, name)
    # All come up side by side; each step waits for its own.
    await desk.supervisor.start(desk.env, GATEWAY)
    beats = {
        name: await wait_for_heartbeat(desk, date, name, lambda beat: beat["state"] == "subscribed") for name in names
    }
    markets = markets_subscribed(desk.setting.env, beats)
    return f"{markets} markets subscribed over {len(names)} connection{'s' if len(names) > 1 else ''}"


async def start_archiver(attempt: Attempt) -> str:
    """Bring the archiver up; the stream holds what came before it."""
    desk, date = attempt.desk, attempt.date
    group = day_group(desk.env, date)
    if not replay.is_replay(attempt):
        await desk.supervisor.ensure_group(group, day_programs(desk.setting, date))
    await desk.supervisor.start(group, ARCHIVER)
    await wait_for_heartbeat(desk, date, ARCHIVER, lambda beat: beat["state"] == "archiving")
    return ""


async def start_gateway(attempt: Attempt) -> str:
    """Bring the environment's gateway up; one that runs already is left alone, with its clients."""
    if replay.is_replay(attempt):
        return await replay.skip_gateway(attempt)
    desk = attempt.desk
    await desk.supervisor.ensure_group(desk.env, [gateway_program(desk.setting)])
    await desk.supervisor.start(desk.env, GATEWAY)
    beat = await wait_for_heartbeat(desk, LIVE, GATEWAY, lambda beat: beat["state"] == "serving")
    return f"ws://127.0.0.1:{beat['port']}/v1/stream"


async def health_check(attempt: Attempt) -> str:
    """See that frames flow into the archive's way, or that the exchange says that it is closed."""
    if replay.is_replay(attempt):
        return await replay.check_counts(attempt)
    desk, date = attempt.desk, attempt.date
    connectors = connector_names(desk.setting.env)
    await request(desk.stores.nc, control_subject(desk.env, ARCHIVER, date), "status")
    await request(desk.stores.nc, control_subject(desk.env, GATEWAY), "status")
    began = time.monotonic()
    while True:
        beats = await desk.stores.cache.heartbeats(date)
        missing = [name for name in (*connectors, ARCHIVER) if name not in beats]
        troubled = [f"{name}: {beat['error']}" for name, beat in beats.items() if beat.get("error")]
        data = sum(count for name in connectors for count in _data_counts(beats.get(name, {})))
        alive = all(beats[name]["frames"] or beats[name]["signs_of_life"] for name in connectors if name in beats)
        waited_s = time.monotonic() - began
        if not missing and not troubled and data:
            return f"{data} messages so far"
        if not missing and not troubled and waited_s > QUIET_AFTER_S:
            if (closed := await _closed(desk, date)) is not None:
                return closed
            if alive:
                return "connected; no data yet"
        if waited_s > HEALTH_TIMEOUT_S:
            what = [*(f"{name} gives no heartbeat" for name in missing), *troubled] or ["no frame and no sign of life"]
            raise SsmdError(
                f"the capture is not healthy: {'; '.join(what)}",
                where=desk.where(date),
                do=f"See the logs under {desk.setting.home / 'logs' / day_group(desk.env, date)}.",
            )
        await asyncio.sleep(POLL_S)


def _data_counts(beat: dict[str, Any]) -> list[int]:
    return [count for channel, count in beat.get("by_channel", {}).items() if channel != "session"]


async def _closed(desk: Desk, date: str) -> str | None:
    exchange = desk.setting.open_exchange(date)
    try:
        status = await exchange.status()
    except UnreachableError:
        return None
    finally:
        await exchange.close()
    if status.exchange_active and status.trading_active:
        return None
    return "the exchange says that it is closed"


async def wait_for_heartbeat(
    desk: Desk,
    date: str,
    name: str,
    ready: Callable[[dict[str, Any]], bool],
    timeout_s: float = UP_TIMEOUT_S,
    *,
    group: str | None = None,
) -> dict[str, Any]:
    """Return a component's heartbeat once it is `ready`.

    Raises `ConfigurationError` or `SsmdError` where the component says that it cannot go on, `UnreachableError` with its last
    words and its log where it is not ready in time or keeps dying.
    """
    group = group or (desk.env if date == LIVE else day_group(desk.env, date))
    deadline = time.monotonic() + timeout_s
    beat: dict[str, Any] | None = None
    died_at: float | None = None
    while True:
        beat = await desk.stores.cache.heartbeat(date, name)
        if beat is not None and ready(beat):
            return beat
        if beat is not None and beat.get("exit_code") is not None:
            kind = ConfigurationError if beat["exit_code"] == ExitCode.CONFIGURATION else SsmdError
            raise kind(f"{name}: {beat['error']}", where=desk.where(date))
        state = next((state for state in await desk.supervisor.states(group) if state.name == name), None)
        log = desk.setting.home / "logs" / group / f"{name}.log"
        if state is not None and state.state == "EXITED" and state.exit_code == ExitCode.CONFIGURATION:
            raise ConfigurationError(f"{name} refuses to run", where=desk.where(date), do=f"See {log}.")
        if state is not None and state.state in ("BACKOFF", "EXITED", "FATAL"):
            died_at = died_at or time.monotonic()
        keeps_dying = died_at is not None and time.monotonic() > died_at + DYING_TIMEOUT_S
        if keeps_dying or time.monotonic() > deadline:
            words = f": {beat['error']}" if beat and beat.get("error") else ""
            raise UnreachableError(
                f"{name} is not ready{words}", where=desk.where(date), do=f"See {log}, then start the day again."
            )
        await asyncio.sleep(POLL_S)


async def stop_capture(attempt: Attempt) -> None:
    """Stop everything that runs for a day; the environment's gateway stays with its clients."""
    await attempt.desk.supervisor.remove_group(day_group(attempt.desk.env, attempt.date))


START = Verb(
    name=VERB,
    steps=(
        Step("secmaster", "Syncing security master", _names_maintenance(sync_security_master)),
        Step("connector", "Starting connector", _names_maintenance(start_connector)),
        Step("archiver", "Starting archiver", start_archiver),
        Step("gateway", "Starting gateway", start_gateway),
        Step("health", "Health check passed", health_check),
    ),
    may_begin=may_start,
    take=take,
    finish=finish,
    clean_up=stop_capture,
    failed=EventName.START_FAILED,
)
