"""The simulated exchange's clock: the host's, moved by an offset that lives in a file and outlives the process.

`ssmd_dagster.clock.ShiftedClock` reads the same file in other processes; only this module writes it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from ssmd_dagster.simulator.keys import write_file


class SimulatorClock:
    """Nanoseconds since the epoch as the exchange sees them; call it like any `Clock`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.offset_ns = int(json.loads(path.read_bytes())["offset_ns"])
        except FileNotFoundError:
            self.offset_ns = 0
            self.shift_to(0)

    def __call__(self) -> int:
        """Return the exchange's time."""
        return time.time_ns() + self.offset_ns

    def shift_to(self, offset_ns: int) -> None:
        """Set the offset and write it for every other process of the environment to see."""
        self.offset_ns = offset_ns
        write_file(self._path, json.dumps({"offset_ns": offset_ns}).encode())
