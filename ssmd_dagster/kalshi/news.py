"""What a frame tells a recorder about its own subscriptions: a book's snapshot came, a market was listed, moved or settled.

Reads the few keys that this takes and nothing else of the message: see `wire` for what messages mean.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ssmd_dagster.exchange import Envelope, MarketNews, SnapshotCame

_SNAPSHOT = "orderbook_snapshot"
_LIFECYCLES = frozenset({"market_lifecycle_v2", "multivariate_market_lifecycle"})
NEWS_TYPES = _LIFECYCLES | {_SNAPSHOT}
"""Message types that may be news."""
_EVENTS: dict[str, Literal["listed", "moved", "settled"]] = {
    "created": "listed",
    "close_date_updated": "moved",
    "settled": "settled",
}
_NS_PER_S = 1_000_000_000


class _Body(msgspec.Struct, gc=False):
    market_ticker: str
    event_type: str = ""
    open_ts: int | None = None
    close_ts: int | None = None


_decode_body = msgspec.json.Decoder(_Body).decode


def read_news(envelope: Envelope) -> SnapshotCame | MarketNews | None:
    """Return what a frame tells; None for every other frame, and for one that cannot be read."""
    if envelope.type not in NEWS_TYPES:
        return None
    try:
        body = _decode_body(envelope.msg)
    except (msgspec.DecodeError, UnicodeDecodeError):  # recorded all the same
        return None
    if envelope.type == _SNAPSHOT:
        return SnapshotCame(sid=envelope.sid, ticker=body.market_ticker)
    event = _EVENTS.get(body.event_type)
    if event is None:
        return None
    return MarketNews(
        ticker=body.market_ticker, event=event, open_ns=_nanoseconds(body.open_ts), close_ns=_nanoseconds(body.close_ts)
    )


def _nanoseconds(seconds: int | None) -> int | None:
    return None if seconds is None else seconds * _NS_PER_S
