"""Prices that crypto and commodity markets settle on: `cfbenchmarks_value`, its 5 Hz sibling, and `pyth_value`.

Every value is a pure function of its name and the time. Not for markets.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

SLOW = "cfbenchmarks_value"
FAST = "cfbenchmarks_value_5hz"
PYTH = "pyth_value"
CHANNELS = (SLOW, FAST, PYTH)

_COINS = {"BRTI": 98_000.0, "ETHUSD_RTI": 3_700.0, "SOLUSD_RTI": 180.0, "XRPUSD_RTI": 2.4, "DOGEUSD_RTI": 0.21}
_OTHER_COINS = {"ADAUSD_RTI": 0.7, "BNBUSD_RTI": 900.0, "LINKUSD_RTI": 17.0, "LTCUSD_RTI": 95.0, "XLMUSD_RTI": 0.3}
_PYTH = {
    "Metal.XAU/USD": 4_100.0,
    "Metal.XAG/USD": 51.0,
    "Commodities.Index.PYTHOIL/USD": 62.0,
    "Commodities.Index.NATGAS/USD": 4.4,
    "InterestRate.US10Y": 4.1,
}
NAMES: dict[str, dict[str, float]] = {SLOW: _COINS | _OTHER_COINS, FAST: _COINS, PYTH: _PYTH}
"""What each channel offers, with the value around which it moves."""

PARAMETER = {SLOW: "index_ids", FAST: "index_ids", PYTH: "underlying_tickers"}
ADD = {SLOW: "subscribe_indices", FAST: "subscribe_indices", PYTH: "subscribe_underlyings"}
REMOVE = {SLOW: "unsubscribe_indices", FAST: "unsubscribe_indices", PYTH: "unsubscribe_underlyings"}
LIST = {SLOW: "indexlist", FAST: "indexlist", PYTH: "underlying_list"}
LIST_TYPE = {SLOW: f"{SLOW}_indexlist", FAST: f"{FAST}_indexlist", PYTH: f"{PYTH}_underlying_list"}
MISSING = {SLOW: 24, FAST: 24, PYTH: 28}
"""Code of the error for an update that names nothing."""
EVERY_MS = {SLOW: 1_000, FAST: 200, PYTH: 400}
_MINUTE_MS = 60_000
_QUARTER_MS = 900_000


def value(channel: str, name: str, at_ms: int) -> str:
    """Return an index' value at an instant, with eight decimals."""
    phase = zlib.crc32(name.encode()) % 1_000
    seconds = at_ms / 1_000
    moved = 1 + 0.004 * math.sin(seconds / 971 + phase) + 0.0006 * math.sin(seconds / 7.3 + phase)
    return f"{NAMES[channel][name] * moved:.8f}"


def message(channel: str, name: str, at_ms: int) -> dict[str, Any]:
    """Return the `msg` of one tick."""
    now = value(channel, name, at_ms)
    if channel == PYTH:
        return {"underlying_ticker": name, "value_usd": now, "source_ts_ms": at_ms - 20, "received_at": at_ms}
    source_ms = at_ms - 15
    upstream = json.dumps({"type": "value", "id": name, "time": source_ms, "value": now[:-6]}, separators=(",", ":"))
    if channel == FAST:
        return {"index_id": name, "value_usd": now, "source_ts_ms": source_ms, "received_at": at_ms, "data": upstream}
    msg = {
        "index_id": name,
        "received_at": at_ms,
        "data": upstream,
        "avg_60s_data": _average(channel, name, source_ms - _MINUTE_MS, source_ms),
    }
    close_ms = at_ms - at_ms % _QUARTER_MS + _QUARTER_MS
    if at_ms > close_ms - _MINUTE_MS:
        msg["last_60s_windowed_average_15min"] = _average(channel, name, close_ms - _MINUTE_MS, at_ms)
    return msg


def _average(channel: str, name: str, start_ms: int, end_ms: int) -> dict[str, Any]:
    seconds = range(start_ms, end_ms, 1_000)
    mean = sum(float(value(channel, name, at_ms)) for at_ms in seconds) / max(1, len(seconds))
    return {
        "value": f"{mean:.8f}",
        "window_size": len(seconds),
        "window_start_ts_ms": start_ms,
        "window_end_ts_exclusive": end_ms,
    }
