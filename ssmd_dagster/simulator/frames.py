"""The bytes of the messages that markets make, without the parts that differ between clients.

Key order and number formats follow real captures. Not for answers to commands (`session`).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from ssmd_dagster.simulator.world import Change, Event, Happening, Market

_QUICK_SIZES = 4_096


def frame_head(size: int) -> bytes:
    """Return the head of an unmasked, final WebSocket text frame."""
    if size < 126:
        return bytes((0x81, size))
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big")
    return b"\x81\x7f" + size.to_bytes(8, "big")


_HEADS = [frame_head(size) for size in range(_QUICK_SIZES)]


def wire(payloads: list[bytes]) -> bytes:
    """Return text frames end to end, ready for one write."""
    heads = _HEADS
    try:
        return b"".join([part for payload in payloads for part in (heads[len(payload)], payload)])
    except IndexError:
        return b"".join([part for payload in payloads for part in (frame_head(len(payload)), payload)])


def rfc3339_ms(at_ms: int) -> str:
    """Write milliseconds since the epoch as Kalshi does since October 2026."""
    seconds, millis = divmod(at_ms, 1_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{millis:03d}Z"


def delta_tail(event_ms: int, send_ms: int) -> bytes:
    """Return what follows the side in a delta."""
    return b',"ts":"%b","ts_ms":%d},"sending_ts_ms":%d}' % (rfc3339_ms(event_ms).encode(), event_ms, send_ms)


def ticker_tail(event_ms: int, send_ms: int) -> bytes:
    """Return what follows the sizes in a ticker message."""
    return b',"ts":%d,"ts_ms":%d,"time":"%b"},"sending_ts_ms":%d}' % (
        event_ms // 1_000, event_ms, rfc3339_ms(event_ms).encode(), send_ms)  # fmt: skip


class TradeStamp:
    """Writes the trades of one instant: what they share is written once."""

    def __init__(self, event_ms: int, send_ms: int) -> None:
        self.event_us = event_ms * 1_000 - 1
        self._last_us = event_ms * 1_000 + 999
        seconds, millis = divmod(event_ms, 1_000)
        self._until_micros = (
            f',"created_time":"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{millis:03d}'.encode()
        )
        self._tail = b',"ts":%d,"ts_ms":%d},"sending_ts_ms":%d}' % (seconds, event_ms, send_ms)

    def row(self, identity: bytes, ticker: bytes, fields: bytes) -> bytes:
        """Return the next trade as REST lists it, and let `event_us` be its time."""
        if self.event_us < self._last_us:
            self.event_us += 1
        return b'{"trade_id":"%b","ticker":"%b",%b%b%03dZ"}' % (
            identity, ticker, fields, self._until_micros, self.event_us % 1_000)  # fmt: skip

    def told(self, identity: bytes, ticker: bytes, fields: bytes) -> bytes:
        """Return a trade as the WebSocket tells it, from behind its seq to its end."""
        return b',"msg":{"trade_id":"%b","market_ticker":"%b",%b%b' % (identity, ticker, fields, self._tail)


def lifecycle_created(market: Market) -> dict[str, Any]:
    """Return the `msg` of a created market."""
    plan = market.event.plan
    return {
        "market_ticker": market.ticker,
        "exchange_index": plan.series.shard,
        "open_ts": plan.open_s,
        "close_ts": plan.close_s,
        "additional_metadata": {
            "name": market.plan.sub_title,
            "title": market.plan.title,
            "yes_sub_title": market.plan.sub_title,
            "no_sub_title": market.plan.sub_title,
            "rules_primary": market.rules(),
            "rules_secondary": "",
            "can_close_early": True,
            "event_ticker": plan.ticker,
            "expected_expiration_ts": plan.ends_s,
            **market.strike(),
        },
        "event_type": "created",
        "price_level_structure": market.tape.grid.name,
    }


def event_created(event: Event) -> dict[str, Any]:
    """Return the `msg` of `event_lifecycle`."""
    plan = event.plan
    return {
        "event_ticker": plan.ticker,
        "exchange_index": plan.series.shard,
        "title": plan.title,
        "subtitle": plan.sub_title,
        "collateral_return_type": "MECNET" if plan.series.strike == "between" else "",
        "series_ticker": plan.series.ticker,
        "strike_date": plan.close_s,
    }


def fee_update(change: Change) -> dict[str, Any]:
    """Return the `msg` of `event_fee_update`."""
    override = change.what is Happening.FEE_SET
    return {
        "event_ticker": change.event.ticker,
        "fee_type_override": "quadratic" if override else None,
        "fee_multiplier_override": 0.5 if override else None,
    }


def compact(message: Any) -> bytes:
    """Write JSON without blanks."""
    return json.dumps(message, separators=(",", ":")).encode()
