"""How many requests an account may make of the simulated exchange's REST."""

from __future__ import annotations

_READ_BURST_S = 2.0


class ReadLimit:
    """Kalshi's bucket for reads: ten tokens a request, two seconds' worth of them at most, one bucket an account.

    Who does not sign shares the bucket of his address. `per_second` is in requests; 0 is no limit.
    """

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self.refused = 0
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, account: str, now_s: float) -> bool:
        """Take one request's tokens; False where there are none."""
        if not self.per_second:
            return True
        full = self.per_second * _READ_BURST_S
        left, at_s = self._buckets.get(account, (full, now_s))
        left = min(full, left + (now_s - at_s) * self.per_second)
        taken = left >= 1
        self._buckets[account] = left - taken, now_s
        self.refused += not taken
        return taken
