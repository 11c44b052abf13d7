"""Where the time of day comes from: the system, or the one clock of a simulated exchange.

Below the edge every function takes a `Clock`; this module and the processes' `main` functions are the edge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

Clock = Callable[[], int]
"""Nanoseconds since the Unix epoch, UTC."""

_REFRESH_NS = 50_000_000


def system_clock() -> int:
    """Return the host's wall clock in nanoseconds since the Unix epoch."""
    return time.time_ns()


class ShiftedClock:
    """The host's clock moved by the offset that a simulated exchange keeps in a small file.

    The file holds `{"offset_ns": int}`; the simulator alone writes it (by rename). It is looked at again at most
    every 50 ms, so that all processes of one simulated environment move together; no file means no offset.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset_ns = 0
        self._next_look_ns = 0

    def __call__(self) -> int:
        """Return nanoseconds since the Unix epoch on the simulated exchange's clock."""
        now_ns = time.time_ns()
        if now_ns >= self._next_look_ns or self._next_look_ns - now_ns > _REFRESH_NS:
            self._next_look_ns = now_ns + _REFRESH_NS
            try:
                self._offset_ns = int(json.loads(self._path.read_bytes())["offset_ns"])
            except FileNotFoundError:
                self._offset_ns = 0
        return now_ns + self._offset_ns
