"""Which days' batches stream and spool may let go of. Pure.

They are kept for a while after the seal, so that a damaged object can be built again; the day that is being recorded comes
first: while there is no room for another day as large as the largest, the oldest sealed ones go before their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WARN_SHARE = 0.8
"""Share of its limit from which on a stream counts as nearly full."""


class Kept(NamedTuple):
    """A day of which there are batches: their bytes, its close, and whether a sealed revision has all of them."""

    date: str
    size: int
    close_ns: int
    proved: bool


def dates_to_let_go(kept: Sequence[Kept], now_ns: int, keep_ns: int, free: int) -> tuple[str, ...]:
    """Return the dates whose batches may go, oldest first; `free` is how many bytes the stream still takes."""
    wanted = max((day.size for day in kept), default=0)
    found = []
    for day in sorted(kept):
        if day.proved and (day.close_ns + keep_ns < now_ns or free < wanted):
            found.append(day.date)
            free += day.size
    return tuple(found)


def nearly_full_words(share: float) -> str | None:
    """Say that the raw stream is nearly full, and what to do; None where it is not."""
    if share < WARN_SHARE:
        return None
    return f"the raw stream is {share:.0%} full; give it more `capture.stream_limit_mb`, then run `ssmd day recover`"
