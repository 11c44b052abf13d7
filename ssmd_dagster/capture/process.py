"""What every capture process does alike: arguments, logging, signals, heartbeat, and the exit code of its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.errors import RefusedError, SsmdError, UnreachableError
from ssmd_dagster.leaving import leave
from ssmd_dagster.stores.cache import DayCache
from ssmd_dagster.stores.connect import Stores, connect
from ssmd_dagster.stores.daybook import DayBook

HEARTBEAT_EVERY_S = 1.0
CANCEL_AGAIN_AFTER_S = 0.5
NICENESS_OF_REPLAYS = 10

_log = logging.getLogger(__name__)
T = TypeVar("T")


@contextlib.asynccontextmanager
async def connected(setting: Setting, name: str) -> AsyncIterator[Stores]:
    """Connect to the environment's servers, trying again for as long as the supervisor would restart this process."""
    async with contextlib.AsyncExitStack() as stack:
        delay_s = 0.2
        while True:
            try:
                stores = await stack.enter_async_context(connect(setting.env, setting.home, setting.secrets, name=name))
                break
            except UnreachableError as error:
                if delay_s > 30:
                    raise
                _log.warning("%s; trying again in %.1f s", error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s *= 2
        yield stores


async def current_epoch(setting: Setting, stores: Stores, date: str, component: str) -> int:
    """Return the epoch that holds a day now, from the journal.

    Raises `RefusedError` where no attempt was ever made at the day: nothing runs for a day that nobody started.
    """
    book = DayBook(setting.env.name, stores.journal, stores.cache, setting.clock, f"capture:{component}")
    day = await book.day(date)
    if day is None or day.epoch is None:
        raise RefusedError(
            f"trading day {date} was never started",
            where=setting.env.name,
            do=f"Run `ssmd day start {setting.env.name}`.",
        )
    return day.epoch


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run a process's `main` until it returns or SIGTERM or SIGINT sets the event given to it; exit with its code.

    Exit codes 0 (done) and 8 (a person has to change something) tell the supervisor not to restart.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    try:
        uvloop.run(body())
    except SsmdError as error:
        _log.error("%s", error)
        leave(int(error.exit_code))
    leave(0)


def give_way() -> None:
    """Let other processes have the CPU first, from here on: a live day does not wait for a replay."""
    os.nice(max(0, NICENESS_OF_REPLAYS - os.nice(0)))


class Heartbeat:
    """Tells the cache every few seconds that a component lives and how it fares."""

    def __init__(
        self, cache: DayCache, date: str, component: str, epoch: int, status: Callable[[], dict[str, Any]]
    ) -> None:
        self._cache, self._date, self._component, self._status = cache, date, component, status
        self._who = {"component": component, "pid": os.getpid(), "host": socket.gethostname(), "epoch": epoch}

    async def beat(self) -> None:
        """Write the heartbeat now; a cache that does not take it is only logged, since capture goes on without it."""
        try:
            await self._cache.put_heartbeat(self._date, self._component, {**self._who, **self._status()})
        except SsmdError as error:
            _log.warning("heartbeat not written: %s", error)

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await self.beat()
            await asyncio.sleep(HEARTBEAT_EVERY_S)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and return when they have ended, however they did.

    A cancellation can be lost: in Python 3.11 `asyncio.wait_for`, which redis-py writes with, drops one that meets its end.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_AFTER_S)
    await asyncio.gather(*tasks, return_exceptions=True)


async def wait_any(*waits: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> None:
    """Return when the first of `waits` is done or the time is up; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel(*tasks)


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns, or None, with `work` cancelled, once `stop` is set."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await cancel(task, stopped)
