"""Play a recorded day to clients, as fast as it went or faster: starts and stops the player, a process of its own.

Neither journal nor archive nor the day's state know of it. Not here: what is played, and how (`capture/player`).
"""

from __future__ import annotations

from typing import Any

from ssmd_dagster.capture.programs import PLAYER, play_group, played, player_program
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import NotFoundError, RefusedError, SsmdError
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.start import wait_for_heartbeat


async def play(desk: Desk, date: str, speed: float) -> str:
    """Start playing a COMPLETE day, from its beginning where it is being played already; return where clients get it.

    Raises:
        NotFoundError: There is no such day.
        RefusedError: It is not COMPLETE, or was not recorded: no client ever got a message of it.
        SsmdError: The player does not come up; with its log.
    """
    day = (await desk.book.refresh()).days.get(date)
    if day is None:
        raise NotFoundError(f"there is no trading day {date}", where=desk.env, do=f"See `ssmd day history {desk.env}`.")
    if day.state is not DayState.COMPLETE:
        raise RefusedError(
            f"trading day {date} is {day.state}: only a COMPLETE day can be played",
            where=desk.env,
            do=f"End it first: `ssmd day end {desk.env} --date {date}`.",
        )
    if day.recorded_with is not None:
        raise RefusedError(
            f"trading day {date} was recorded with {day.recorded_with}",
            where=desk.env,
            do=f"Play that one: `ssmd day start {desk.env} --date {day.recorded_with} --from archive --speed 1`.",
        )
    if not day.recorded:
        raise RefusedError(
            f"trading day {date} was fetched over REST: there are no messages to play",
            where=desk.env,
            do=f"Read its trades: `ssmd data export {desk.env} {date} trade --to trades.parquet`.",
        )
    await stop_playing(desk, date)
    group = play_group(desk.env, date)
    await desk.supervisor.ensure_group(group, [player_program(desk.setting, date, speed)])
    await desk.supervisor.start(group, PLAYER)
    try:
        beat = await wait_for_heartbeat(desk, played(date), PLAYER, _serves, group=group)
    except SsmdError:
        await stop_playing(desk, date)
        raise
    return f"ws://127.0.0.1:{beat['port']}/v1/stream"


async def stop_playing(desk: Desk, date: str) -> bool:
    """Stop playing a day; tell whether it was played."""
    group = play_group(desk.env, date)
    states = await desk.supervisor.states(group)
    if states:
        await desk.supervisor.remove_group(group)
    await desk.stores.cache.remove_heartbeat(played(date), PLAYER)
    return any(state.alive for state in states)


def _serves(beat: dict[str, Any]) -> bool:
    return beat["state"] in ("serving", "playing", "played")
