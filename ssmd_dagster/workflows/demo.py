"""A whole trading day on this machine in about a minute, in a home of its own; nothing is left running.

The simulated exchange's clock is put shortly before last midnight; yesterday is started through Dagster, recorded, and
rolled into today through Dagster, over midnight; today is ended with the command line's verb. Real servers, real
processes, real files.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec

from ssmd_dagster.capture import stack
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.clock import Clock
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.stores.connect import read_stack
from ssmd_dagster.workflows.attempt import Attempt
from ssmd_dagster.workflows.dagster_runs import DagsterRuns
from ssmd_dagster.workflows.desk import open_desk
from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.views import DayView, history, show

ENVIRONMENT = "kalshi-sim"
BEFORE_MIDNIGHT = timedelta(seconds=40)
ROLL_BEFORE_MIDNIGHT = timedelta(seconds=12)
FIRST_DAY_MESSAGES, SECOND_DAY_MESSAGES = 5_000, 2_000
RECORD_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 120.0
POLL_S = 0.25

Tell = Callable[[str], None]


class Result(NamedTuple):
    """What the demo leaves behind: the days, newest first, and their files."""

    days: list[DayView]
    raw_files: list[Path]
    as_they_should: bool


def fresh_home(home: Path) -> None:
    """Empty the demo's own home; the one of the last demo is in it."""
    if home.exists():
        shutil.rmtree(home)
    home.mkdir(mode=0o700, parents=True)


async def run(home: Path, exchanges: Path, actor: str, clock: Clock, tell: Tell) -> Result:
    """Run the demo in `home`, which `SSMD_HOME` names, and take everything down again whatever happens."""
    await stack.down(home)  # of a demo that was cut off
    fresh_home(home)
    setting = load_setting(ENVIRONMENT)
    try:
        tell("Starting NATS, Redis, a simulated exchange and Dagster...")
        await stack.up(
            [setting.env], home, exchanges, report=lambda p: tell(f"  {p.part}: {p.state} {p.detail}".rstrip())
        )
        setting = load_setting(ENVIRONMENT)  # with the credentials that came into being
        return await _two_days(setting, actor, clock, tell)
    finally:
        await stack.down(home)
        tell("Everything is stopped.")


async def _two_days(setting: Setting, actor: str, clock: Clock, tell: Tell) -> Result:
    dagster = read_stack(setting.home).dagster
    assert dagster is not None, "Dagster came up with the stack"
    runs, slug = DagsterRuns(dagster), setting.env.slug
    midnight = datetime.fromtimestamp(clock() / 1e9, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    first, second = ((midnight - timedelta(days=1)).date().isoformat(), midnight.date().isoformat())
    await _set_clock(setting, midnight - BEFORE_MIDNIGHT)
    tell(f"The exchange's clock says {midnight - BEFORE_MIDNIGHT:%Y-%m-%d %H:%M:%S} UTC.")

    tell(f"Dagster ({dagster}) runs {slug}_start_day for {first}...")
    await _dagster_run(runs, f"{slug}_start_day", first, tell)
    await _record(setting, actor, first, FIRST_DAY_MESSAGES, tell)
    if setting.clock() < (midnight - ROLL_BEFORE_MIDNIGHT).timestamp() * 1e9:
        await _set_clock(setting, midnight - ROLL_BEFORE_MIDNIGHT)
        tell(f"The exchange's clock goes on to {midnight - ROLL_BEFORE_MIDNIGHT:%H:%M:%S}.")
    tell(
        f"Dagster runs {slug}_roll_day for {first}: {second} starts beside it and takes over at midnight, {first} ends..."
    )
    await _dagster_run(runs, f"{slug}_roll_day", first, tell)
    await _record(setting, actor, second, SECOND_DAY_MESSAGES, tell)
    tell(f"Ending {second}...")
    async with open_desk(setting, actor, lambda p: tell(f"  {p.title}") if p.kind == "done" else None) as desk:
        await Attempt(desk, second, END).go()
        days = await history(desk, 2)
        as_they_should = [day.day.date for day in days] == [second, first] and all(
            view.state is DayState.COMPLETE and view.day.sealed is not None and view.day.condition != "degraded"
            for view in days
        )
        folder = Path((await show(desk, first)).day.archive_url or "")
    return Result(days, sorted(folder.iterdir()), as_they_should)


async def _dagster_run(runs: DagsterRuns, job: str, partition: str, tell: Tell) -> None:
    run_id = await runs.launch(job, partition)
    began = time.monotonic()

    def on_step(step: str, status: str) -> None:
        if status != "IN_PROGRESS":
            tell(f"  {step}: {status.lower()}")

    await runs.wait(run_id, RUN_TIMEOUT_S, on_step)
    tell(f"  run {run_id[:8]} succeeded in {time.monotonic() - began:.0f} s")


async def _record(setting: Setting, actor: str, date: str, messages: int, tell: Tell) -> None:
    """Wait until the day holds enough to look at."""
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    async with open_desk(setting, actor) as desk:
        while True:
            view = await show(desk, date)
            if (view.messages or 0) >= messages:
                tell(f"  {view.messages:,} messages recorded")
                return
            if view.error or time.monotonic() > deadline:
                raise SsmdError(
                    f"recording is stuck at {view.messages} messages: {view.error or 'too slow'}", where=date
                )
            await asyncio.sleep(POLL_S)


async def _set_clock(setting: Setting, to: datetime) -> None:
    """Move the simulated exchange's clock, and with it that of all its environment's processes."""
    address = read_stack(setting.home).simulators[setting.env.name].rest_endpoint
    url = f"{address.partition('/trade-api')[0]}/sim/clock"
    try:
        async with aiohttp.ClientSession() as session, session.post(url, json={"set": to.isoformat()}) as response:
            told = msgspec.json.decode(await response.read(), type=dict[str, int])
    except (aiohttp.ClientError, msgspec.DecodeError) as error:
        raise UnreachableError("the simulated exchange does not move its clock", where=url) from error
    while abs(setting.clock() - told["now_ns"]) > 60_000_000_000:  # other processes look at it within 50 ms
        await asyncio.sleep(0.01)
