"""Maintenance of the simulated exchange: nothing trades, sockets are closed, every request is answered by 503."""

from __future__ import annotations

from typing import Any

import msgspec

from ssmd_dagster.simulator.world import rfc3339


class MaintenanceOrder(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """As it is asked for: `POST /sim/maintenance`. It begins `in_s` seconds from now and lasts `for_s`.

    One that is not `announced` is not in `/exchange/schedule`.
    """

    in_s: int = 0
    for_s: int
    announced: bool = True


class Window(msgspec.Struct, frozen=True):
    """One maintenance, `[from_s, to_s)` in seconds since the epoch."""

    from_s: int
    to_s: int
    announced: bool


class Maintenance:
    """The exchange's maintenance, past, present and to come."""

    def __init__(self) -> None:
        self.windows: list[Window] = []

    def order(self, order: MaintenanceOrder, now_s: int) -> Window:
        """Put one more into the list."""
        from_s = now_s + order.in_s
        self.windows.append(Window(from_s, from_s + order.for_s, order.announced))
        return self.windows[-1]

    def at(self, now_s: int) -> Window | None:
        """Return the one that is on."""
        return next((window for window in self.windows if window.from_s <= now_s < window.to_s), None)

    def announced(self) -> list[dict[str, Any]]:
        """Return `maintenance_windows` as `/exchange/schedule` has them."""
        return [
            {"start_datetime": rfc3339(window.from_s), "end_datetime": rfc3339(window.to_s)}
            for window in self.windows
            if window.announced
        ]
