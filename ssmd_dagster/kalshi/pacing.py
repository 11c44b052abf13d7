"""How fast and how patiently REST calls are made: the token bucket of the key's tier and the back-off after refusals.

Not for the WebSocket, which Kalshi does not meter.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

Sleep = Callable[[float], Awaitable[None]]
Monotonic = Callable[[], float]

_NEGLIGIBLE_S = 1e-6
_SLOWER, _SLOWEST, _EASED_A_SECOND = 1.5, 16.0, 0.95
"""By how much a refusal slows, at most altogether, and what is left of that after each second."""
_REFUSALS_ARE_ONE_S = 1.0
"""Calls that are under way together are refused together."""


class TokenBucket:
    """Lets `rate_per_second` calls a second pass, in bursts of at most one second's worth, first come first served.

    Processes that use the same key do not know of each other, and each would take the whole rate: `refused` slows this one down
    for some seconds, so that they come to share the rate.
    """

    def __init__(self, rate_per_second: float, monotonic: Monotonic, sleep: Sleep = asyncio.sleep) -> None:
        self._interval_s = 1.0 / rate_per_second
        self._burst_s = max(1.0, self._interval_s)
        self._monotonic = monotonic
        self._sleep = sleep
        self._next_free_s = monotonic() - self._burst_s
        self._slower = 1.0
        self._eased_s = monotonic()
        self._refused_s = monotonic() - _REFUSALS_ARE_ONE_S

    async def take(self) -> None:
        """Wait until one more call is within the rate."""
        now_s = self._monotonic()
        # The turn is booked before waiting, so that callers that come meanwhile queue behind this one.
        self._slower = max(1.0, self._slower * _EASED_A_SECOND ** (now_s - self._eased_s))
        self._eased_s = now_s
        turn_s = max(self._next_free_s, now_s - self._burst_s + self._interval_s)
        self._next_free_s = turn_s + self._interval_s * self._slower
        if turn_s - now_s > _NEGLIGIBLE_S:
            await self._sleep(turn_s - now_s)

    def refused(self) -> None:
        """Slow down, since the exchange said that there were too many calls."""
        now_s = self._monotonic()
        if now_s < self._refused_s + _REFUSALS_ARE_ONE_S:
            return
        self._refused_s = now_s
        self._slower = min(self._slower * _SLOWER, _SLOWEST)
        self._next_free_s = max(self._next_free_s, now_s)


class Backoff:
    """Growing pauses between attempts, each between half and the whole of `first_s * 2**n`, at most `cap_s`."""

    def __init__(self, rng: random.Random, first_s: float = 0.25, cap_s: float = 8.0) -> None:
        self._rng = rng
        self._next_s = first_s
        self._cap_s = cap_s

    def next_s(self) -> float:
        """Return the next pause in seconds."""
        whole_s = min(self._next_s, self._cap_s)
        self._next_s = whole_s * 2
        return whole_s * self._rng.uniform(0.5, 1.0)
