"""The clock outside the read loop: is the connection silent, did the host sleep, was the wall clock set?

A thread looks at three clocks and at what the loop has seen. It measures silence only while both it and the loop ran: a
process that was stopped, a loop that was blocked and a host that slept have not listened, which is not the same as hearing
nothing. What it finds is handed to the loop. `Watcher` is the judgement, pure; `Watch` the thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ssmd_dagster.clock import Clock

LOOK_EVERY_S = 0.5
SILENCE_S = 20.0
"""No frame and no ping for this long: the connection is dead, whatever TCP says. The exchange pings every 10 s."""
SUSPENDED_S = 2.0
"""A host that slept for less has lost nothing that TCP does not bring again."""
STALLED_S = 2.0
CLOCK_STEP_S = 0.1
_NS_PER_S = 1_000_000_000
_MOST_PER_LOOK_NS = 1_000_000_000
_READINGS = 10
_TOGETHER_NS = 5_000_000


class Clocks(NamedTuple):
    """One reading: `boot_ns` counts sleep, `awake_ns` does not, `wall_ns` is the environment's clock."""

    boot_ns: int
    awake_ns: int
    wall_ns: int


def read_clocks(wall: Clock) -> Clocks:
    """Read all clocks. Where a system has no clock that counts sleep, sleep looks like a step of the wall clock."""
    if sys.platform == "darwin":
        boot, awake = time.CLOCK_MONOTONIC, time.CLOCK_UPTIME_RAW
    else:
        boot, awake = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC), time.CLOCK_MONOTONIC
    for _ in range(_READINGS):
        before_ns = time.clock_gettime_ns(boot)
        clocks = Clocks(before_ns, time.clock_gettime_ns(awake), wall())
        if time.clock_gettime_ns(boot) - before_ns < _TOGETHER_NS:
            break  # else this thread was interrupted in between
    return clocks


class Silent(NamedTuple):
    """Neither frame nor ping came for `for_s`, though this process listened."""

    for_s: float


class Suspended(NamedTuple):
    """The host slept for `for_s`."""

    for_s: float


class Stalled(NamedTuple):
    """This process, or its loop, stood still for `for_s`: stopped, starved or blocked."""

    for_s: float


class ClockStep(NamedTuple):
    """The wall clock moved by `by_ns` against the others."""

    by_ns: int


Finding = Silent | Suspended | Stalled | ClockStep


class Watcher:
    """Judges readings that come about every `LOOK_EVERY_S`.

    `signs` changes with every sign of life of the exchange, `turns` with every turn of the loop.
    """

    def __init__(self, first: Clocks, silence_s: float = SILENCE_S) -> None:
        self._last = first
        self._silence_ns = int(silence_s * _NS_PER_S)
        self._signs = self._turns = -1
        self._silent_ns = 0
        self._blocked_ns = 0

    def look(self, now: Clocks, signs: int, turns: int) -> list[Finding]:
        """Return what the readings since the last look say."""
        last, self._last = self._last, now
        found: list[Finding] = []
        boot_ns, awake_ns = max(0, now.boot_ns - last.boot_ns), max(0, now.awake_ns - last.awake_ns)
        suspended_ns = boot_ns - awake_ns
        if suspended_ns > SUSPENDED_S * _NS_PER_S:
            found.append(Suspended(suspended_ns / _NS_PER_S))
        step_ns = now.wall_ns - last.wall_ns - boot_ns
        if abs(step_ns) > CLOCK_STEP_S * _NS_PER_S:
            found.append(ClockStep(step_ns))
        if turns == self._turns:
            self._blocked_ns += awake_ns
            return found
        stalled_ns, self._blocked_ns, self._turns = self._blocked_ns + awake_ns, 0, turns
        if stalled_ns > STALLED_S * _NS_PER_S:
            found.append(Stalled(stalled_ns / _NS_PER_S))
        if signs != self._signs:
            self._signs, self._silent_ns = signs, 0
            return found
        # After a standstill the loop first has to read what came meanwhile.
        self._silent_ns += min(stalled_ns, _MOST_PER_LOOK_NS)
        if self._silent_ns >= self._silence_ns:
            found.append(Silent(self._silent_ns / _NS_PER_S))
            self._silent_ns = 0
        return found


class Watch:
    """The thread. `signs` is read in it; `on_finding` is called on the loop."""

    def __init__(
        self,
        clocks: Callable[[], Clocks],
        signs: Callable[[], int],
        on_finding: Callable[[Finding], None],
        silence_s: float = SILENCE_S,
    ) -> None:
        self._clocks, self._signs, self._on_finding = clocks, signs, on_finding
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._turns = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; it does not wait for the loop, so this is quick."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        watcher = Watcher(self._clocks(), self._silence_s)
        while not self._over.wait(min(LOOK_EVERY_S, self._silence_s / 4)):
            findings = watcher.look(self._clocks(), self._signs(), self._turns)
            try:
                self._loop.call_soon_threadsafe(self._turn, findings)
            except RuntimeError:  # the loop is closed: the process ends
                return

    def _turn(self, findings: list[Finding]) -> None:
        self._turns += 1
        if not self._over.is_set():
            for finding in findings:
                self._on_finding(finding)
