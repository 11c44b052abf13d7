"""What identifies a trade in frames and in pages of REST, and which markets a frame says are recorded.

Not for prices and counts: see `wire.read_trade`.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ssmd_dagster.kalshi.scaled import milliseconds_ns, rfc3339_ns, seconds_ns

_TRADE = "trade"


class TradeKey(msgspec.Struct, frozen=True, gc=False):
    """Which trade it is: its id, its market, and the exchange's time in nanoseconds since the epoch."""

    trade_id: str
    ticker: str
    event_ns: int


class _Message(msgspec.Struct, gc=False):
    trade_id: str
    market_ticker: str
    ts_ms: int | None = None
    ts: int | None = None


class _Frame(msgspec.Struct, gc=False):
    type: str
    msg: _Message


class _Row(msgspec.Struct, gc=False):
    trade_id: str
    ticker: str
    created_time: str


class _PageMessage(msgspec.Struct, gc=False):
    trades: list[_Row] = []


class _Page(msgspec.Struct, gc=False):
    msg: _PageMessage


_decode_frame = msgspec.json.Decoder(_Frame).decode
_decode_rows = msgspec.json.Decoder(list[_Row]).decode
_decode_page = msgspec.json.Decoder(_Page).decode


def trade_key(frame: bytes | msgspec.Raw, recv_ns: int) -> TradeKey | None:
    """Return which trade a frame tells of, None for any other frame. Without a time of its own it has the receive time."""
    try:
        read = _decode_frame(frame)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if read.type != _TRADE:
        return None
    message = read.msg
    event_ns = recv_ns
    if message.ts_ms is not None:
        event_ns = milliseconds_ns(message.ts_ms)
    elif message.ts is not None:
        event_ns = seconds_ns(message.ts)
    return TradeKey(message.trade_id, message.market_ticker, event_ns)


def row_keys(rows: bytes) -> list[TradeKey]:
    """Return the trades of a JSON array of REST's rows. Raises `msgspec.DecodeError` or `ValueError` for anything else."""
    return [TradeKey(row.trade_id, row.ticker, rfc3339_ns(row.created_time)) for row in _decode_rows(rows)]


def page_keys(frame: bytes | msgspec.Raw) -> Iterator[TradeKey]:
    """Yield the trades of a recorded page, `{"type":"rest_trades","msg":{"trades":[…]}}`; nothing for any other frame."""
    try:
        page = _decode_page(frame)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    for row in page.msg.trades:
        yield TradeKey(row.trade_id, row.ticker, rfc3339_ns(row.created_time))
