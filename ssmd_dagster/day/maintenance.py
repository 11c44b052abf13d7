"""The exchange's announced maintenance: what is known of it, and which part of an interval without records it explains. Pure.

A window is what the exchange has announced, not what came of it: while the exchange says that it trades, it trades.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.causes import GapCause

REMEMBERED_NS = 2 * 86_400 * 1_000_000_000
"""How long a window that has begun is kept although the exchange lists it no more: a gap may be told of later."""


def window_at(windows: Iterable[Window], at_ns: int) -> Window | None:
    """Return the announced window that an instant is in, the one that ends last where there are several."""
    return max((window for window in windows if window.holds(at_ns)), key=lambda one: one.close_ns, default=None)


def touching(windows: Iterable[Window], day: Window) -> tuple[Window, ...]:
    """Return the announced windows that touch a day's, in order."""
    return tuple(sorted((one for one in windows if _overlap(one, day.open_ns, day.close_ns)), key=_order))


def remembered(known: Iterable[Window], read: Iterable[Window], now_ns: int) -> tuple[Window, ...]:
    """Return what is known once the exchange was asked: what it lists, and what has begun and was over not long ago.

    A window that was taken back before it began is forgotten.
    """
    begun = {one for one in known if one.open_ns <= now_ns}
    return tuple(sorted((one for one in {*read, *begun} if one.close_ns > now_ns - REMEMBERED_NS), key=_order))


def pieces(from_ns: int, to_ns: int, windows: Iterable[Window], cause: str) -> list[tuple[int, int, str]]:
    """Cut `[from_ns, to_ns)` by the announced windows: their part has their cause, the rest `cause`. In order, no overlap."""
    found: list[tuple[int, int, str]] = []
    at = from_ns
    for window in sorted(windows, key=_order):
        begins, ends = max(window.open_ns, at), min(window.close_ns, to_ns)
        if begins >= ends:
            continue
        if begins > at:
            found.append((at, begins, cause))
        found.append((begins, ends, GapCause.EXCHANGE_MAINTENANCE))
        at = ends
    if at < to_ns or not found:
        found.append((at, to_ns, cause))
    return found


def described(windows: Sequence[Window], calendar: TradingCalendar) -> str:
    """Say when the windows are, in the calendar's timezone; empty for none."""
    return ", ".join(
        f"{calendar.local(one.open_ns):%Y-%m-%d %H:%M} to {calendar.local(one.close_ns):%H:%M %Z}" for one in windows
    )


def _overlap(one: Window, from_ns: int, to_ns: int) -> bool:
    return one.open_ns < to_ns and one.close_ns > from_ns


def _order(window: Window) -> tuple[int, int]:
    return window.open_ns, window.close_ns
