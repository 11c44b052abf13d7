"""How sensors and schedules look at environments: desks kept open in one background loop for all of a process's ticks.

A code server evaluates every tick in its own process, so an environment's connections and the fold of its journal are kept
between ticks: a tick then costs one request and not a reading of the journal. One environment in trouble never delays or
silences another: each has its own desk, deadline and pause before it is tried again. Rules do not belong here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.workflows.desk import Desk, open_desk

LOOK_TIMEOUT_S = 20.0
"""How long a look at one environment may take, and wait for its turn before. Dagster gives a tick 60 s in all."""
CLOSE_TIMEOUT_S = 5.0
TRY_AGAIN_S = (0.0, 5.0, 15.0, 60.0)
"""Pauses before an environment that could not be reached is tried again: more than one failing tick in a row is told."""

ACTOR = "sensor:dagster"
"""Who the servers list as the client."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass
class _Place:
    """One environment: its desk where one is open, and who uses it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    stack: contextlib.AsyncExitStack | None = None
    desk: Desk | None = None
    failures: int = 0
    closed_until: float = 0.0
    error: SsmdError | None = None


@dataclass(frozen=True)
class Found(Generic[_T]):
    """What a look at one environment came to: its value, or the error."""

    value: _T | None
    error: SsmdError | None


class Watch:
    """The open desks of one process; what is journaled at one names the `actor` of that look, such as `sensor:health`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places: dict[str, _Place] = {}
        self._latest: dict[tuple[str, str], SsmdError | None] = {}

    def look(
        self,
        names: Iterable[str],
        work: Callable[[Desk], Awaitable[_T]],
        *,
        actor: str,
        timeout_s: float = LOOK_TIMEOUT_S,
    ) -> Mapping[str, Found[_T]]:
        """Do `work` at the desks of several environments side by side; never raises theirs.

        Each is given `timeout_s`, and waits as long for its turn: somebody else's look says nothing against an environment.
        """

        async def all_of_them() -> dict[str, Found[_T]]:
            wanted = list(names)
            answers = await asyncio.gather(*(self._one(name, work, actor, timeout_s) for name in wanted))
            self._latest |= {(name, actor): answer.error for name, answer in zip(wanted, answers, strict=True)}
            return dict(zip(wanted, answers, strict=True))

        # The deadline of each look is inside; the second one only guards against a loop that is stuck.
        return asyncio.run_coroutine_threadsafe(all_of_them(), self._running()).result(
            2 * (timeout_s + CLOSE_TIMEOUT_S)
        )

    def latest_error(self, name: str, actor: str) -> SsmdError | None:
        """Return what an actor's latest look at an environment failed of, None where it did not fail."""
        return self._latest.get((name, actor))

    def close(self) -> None:
        """Close all desks and end the loop; the next look begins anew."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        asyncio.run_coroutine_threadsafe(self._close_all(), loop).result(LOOK_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(LOOK_TIMEOUT_S)
        if not self._thread.is_alive():
            loop.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="watch", daemon=True)
                self._thread.start()
            return self._loop

    async def _one(self, name: str, work: Callable[[Desk], Awaitable[_T]], actor: str, timeout_s: float) -> Found[_T]:
        place = self._places.setdefault(name, _Place())
        if place.error is not None and time.monotonic() < place.closed_until:
            return Found(None, place.error)
        try:
            async with asyncio.timeout(timeout_s):
                await place.lock.acquire()
        except TimeoutError:
            return Found(
                None, UnreachableError(f"busy: another look at it takes longer than {timeout_s:g} s", where=name)
            )
        try:
            async with asyncio.timeout(timeout_s):
                value = await self._at_desk(name, place, work, actor)
        except SsmdError as error:
            return self._failed(place, error)
        except TimeoutError:
            return self._failed(place, UnreachableError(f"no answer within {timeout_s:g} s", where=name))
        except Exception as error:  # noqa: BLE001 - a fault of ours in one environment may not silence the others
            _log.exception("looking at %s failed", name)
            return self._failed(place, SsmdError(f"unexpected {type(error).__name__}: {error}", where=name))
        finally:
            place.lock.release()
        place.failures, place.error = 0, None
        return Found(value, None)

    async def _at_desk(self, name: str, place: _Place, work: Callable[[Desk], Awaitable[_T]], actor: str) -> _T:
        """Do the work; whatever goes wrong, the desk is given up, so that the next look connects again."""
        done = False
        try:
            if place.desk is None:
                async with contextlib.AsyncExitStack() as stack:
                    place.desk = await stack.enter_async_context(open_desk(load_setting(name), ACTOR))
                    place.stack = stack.pop_all()
            place.desk.book.actor = actor
            value = await work(place.desk)
            done = True
        finally:
            if not done:
                await self._let_go(place)
        return value

    @staticmethod
    def _failed(place: _Place, error: SsmdError) -> Found[Any]:
        """Keep off for a while."""
        place.error = error
        place.closed_until = time.monotonic() + TRY_AGAIN_S[min(place.failures, len(TRY_AGAIN_S) - 1)]
        place.failures += 1
        return Found(None, error)

    @staticmethod
    async def _let_go(place: _Place) -> None:
        stack, place.stack, place.desk = place.stack, None, None
        if stack is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await stack.aclose()
        except (TimeoutError, OSError, SsmdError) as error:
            _log.warning("a connection did not close in order: %s", error)

    async def _close_all(self) -> None:
        for place in self._places.values():
            await self._let_go(place)
        self._places.clear()
