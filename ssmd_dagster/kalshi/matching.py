"""What identifies a trade in frames and in pages of REST, and which markets a frame says are recorded.

Not for prices and counts: see `wire.read_trade`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from ssmd_dagster.kalshi.scaled import milliseconds_ns, rfc3339_ns, seconds_ns, sort_as_text

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


def rows_within(rows: bytes, open_ns: int, close_ns: int) -> list[bool]:
    """Return which of a JSON array of REST's rows are of `[open_ns, close_ns)`.

    Raises `msgspec.DecodeError` or `ValueError` for anything else.
    """
    times = [row.created_time for row in _decode_rows(rows)]
    if sort_as_text(times):
        first, end = _plain(open_ns), _plain(close_ns)
        return [first <= text < end for text in times]
    return [open_ns <= rfc3339_ns(text) < close_ns for text in times]


def page_ids(frame: bytes | msgspec.Raw) -> tuple[list[str], set[str]]:
    """Return ids and markets of a recorded page, `{"type":"rest_trades","msg":{"trades":[…]}}`; nothing for another frame."""
    try:
        rows = _decode_page(frame).msg.trades
    except (msgspec.DecodeError, UnicodeDecodeError):
        return [], set()
    return [row.trade_id for row in rows], {row.ticker for row in rows}


def _plain(at_ns: int) -> str:
    """Return the first microsecond that is not before `at_ns`, in the form of the list's times."""
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=-(-at_ns // 1_000))
    return f"{at:%Y-%m-%dT%H:%M:%S.%f}Z"
