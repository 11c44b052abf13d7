"""What Kalshi's market-data messages mean: every message of both eras, read into exact integers.

Two eras: integer cents and whole contracts until 2026-03-12, dollar and count strings since (and both side by side from
September 2025 on, where the strings win: they are finer). Prices are micro-dollars, counts hundredths of a contract,
times nanoseconds (see `scaled`). Unknown keys are kept in `extra`; what cannot be read is a `WireError` with a reason.
Not for filing or storing, and never on the capture path: bytes first, meaning later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from ssmd_dagster.kalshi.scaled import (
    cents_micros,
    count_centis,
    milliseconds_ns,
    price_micros,
    rfc3339_ns,
    seconds_ns,
    whole,
)

CHANNEL_OF_TYPE: Mapping[str, str] = MappingProxyType(
    {
        "trade": "trade",
        "orderbook_snapshot": "orderbook_delta",
        "orderbook_delta": "orderbook_delta",
        "ticker": "ticker",
        "market_lifecycle_v2": "market_lifecycle_v2",
        "multivariate_market_lifecycle": "market_lifecycle_v2",
        "event_lifecycle": "market_lifecycle_v2",
        "event_fee_update": "market_lifecycle_v2",
        "subscribed": "session",
        "unsubscribed": "session",
        "ok": "session",
        "error": "session",
        "cfbenchmarks_value_indexlist": "session",
        "cfbenchmarks_value_5hz_indexlist": "session",
        "pyth_value_underlying_list": "session",
    }
)
"""The recorder's channel of every message type that has one; all others are `other`."""

Level = tuple[int, int]
"""Price in micro-dollars and count in hundredths of a contract."""


class WireError(ValueError):
    """A message that cannot be read; the text is the reason, short enough to count by."""


class Trade(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One trade, from the WebSocket or from a REST row. `taker_side` is the outcome the taker bought: yes or no."""

    trade_id: str
    ticker: str
    yes_price_micros: int
    no_price_micros: int
    count_centis: int
    taker_side: str | None
    taker_book_side: str | None
    is_block_trade: bool | None
    event_ns: int | None
    extra: dict[str, Any] | None = None


class Delta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One change of one price level. `ts_ns` is the finer of the exchange's two times where it gives both."""

    ticker: str
    market_id: str | None
    side: str
    price_micros: int
    delta_centis: int
    clock: int | None
    event_ns: int | None
    ts_ns: int | None
    extra: dict[str, Any] | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A whole book, best price last on each side; an empty side is an empty tuple. It has no event time."""

    ticker: str
    market_id: str | None
    clock: int | None
    yes: tuple[Level, ...]
    no: tuple[Level, ...]
    extra: dict[str, Any] | None = None


class Ticker(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Best prices and totals of one market. `price_micros` is None for a market never traded.

    The two dollar totals are whole dollars. Sizes and `last_trade_size_centis` are None before they existed; `ts_ns` is
    the finer of the exchange's times where it gives several.
    """

    ticker: str
    market_id: str | None
    price_micros: int | None
    yes_bid_micros: int | None
    yes_ask_micros: int | None
    volume_centis: int | None
    open_interest_centis: int | None
    dollar_volume: int | None
    dollar_open_interest: int | None
    yes_bid_size_centis: int | None
    yes_ask_size_centis: int | None
    last_trade_size_centis: int | None
    clock: int | None
    event_ns: int | None
    ts_ns: int | None
    extra: dict[str, Any] | None = None


class PriceRange(msgspec.Struct, frozen=True, gc=False):
    """A stretch of the price grid with its tick size, in micro-dollars."""

    start_micros: int
    end_micros: int
    step_micros: int


class Lifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """A market's change of state or description; what does not belong to `event_type` is None.

    `metadata` holds the describing keys as they came: those of `additional_metadata`, or of a `metadata_updated`.
    """

    ticker: str
    event_type: str
    multivariate: bool
    exchange_index: int | None
    open_ns: int | None
    close_ns: int | None
    determination_ns: int | None
    settled_ns: int | None
    result: str | None
    settlement_value_micros: int | None
    is_deactivated: bool | None
    price_level_structure: str | None
    price_ranges: tuple[PriceRange, ...] | None
    metadata: dict[str, Any] | None
    extra: dict[str, Any] | None = None


class EventLifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """An event that came into being. `series_ticker` is empty where the exchange says nothing; `strike_date` in seconds, UTC."""

    event_ticker: str
    series_ticker: str
    title: str
    subtitle: str
    collateral_return_type: str
    exchange_index: int | None
    strike_date: int | None
    strike_period: str | None
    extra: dict[str, Any] | None = None


class EventFee(msgspec.Struct, frozen=True, kw_only=True):
    """An override of an event's fees; both None where it was taken back. The multiplier is the JSON number's text."""

    event_ticker: str
    fee_type_override: str | None
    fee_multiplier_override: str | None
    extra: dict[str, Any] | None = None


Message = Trade | Delta | Snapshot | Ticker | Lifecycle | EventLifecycle | EventFee


class _Times(msgspec.Struct, gc=False):
    ts_ms: Any = None
    ts: Any = None
    created_time: Any = None


_decode_object = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode
_decode_times = msgspec.json.Decoder(_Times, float_hook=Decimal).decode
_BROKEN_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read(message_type: str, msg: msgspec.Raw | bytes) -> Message | None:
    """Read the `msg` of a message of `message_type`; None for types that are not market data.

    Raises `WireError` where a needed key is missing or a value is not what it should be.
    """
    quick = _QUICK.get(message_type)
    if quick is not None:
        try:
            return quick(msg)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
            # Not of today's exact shape: the patient reader takes it, or says what is wrong.
            pass
    reader = _READERS.get(message_type)
    return None if reader is None else reader(_object(msg))


def read_trade(row: msgspec.Raw | bytes) -> Trade:
    """Read a trade, be it a WebSocket `msg` or a row of REST `/markets/trades`. Raises `WireError`."""
    return _trade(_object(row))


def read_book(ticker: str, orderbook: msgspec.Raw | bytes) -> Snapshot:
    """Read the `orderbook_fp` (before 2026-03-12 `orderbook`) object of a REST order book. Raises `WireError`."""
    return _snapshot({"market_ticker": ticker} | _object(orderbook))


def event_time_ns(msg: msgspec.Raw | bytes) -> int | None:
    """Return when the exchange says that it happened: `ts_ms`, else `ts`, else `created_time`, else None.

    A time that cannot be read counts as none. Nothing else of the message is looked at.
    """
    try:
        return _event_ns_of(_decode_times(msg))
    except (*_BROKEN_JSON, ValueError):
        return None


def _event_ns_of(times: _Times) -> int | None:
    if times.ts_ms is not None:
        return milliseconds_ns(times.ts_ms)
    if times.ts is not None:
        return _ts_ns(times.ts)
    return None if times.created_time is None else rfc3339_ns(times.created_time)


def _object(raw: msgspec.Raw | bytes) -> dict[str, Any]:
    try:
        return _decode_object(raw)
    except _BROKEN_JSON as error:
        raise WireError("msg is not a JSON object") from error


Reader = Callable[[Any], Any]


class _Keys:
    """Takes values out of one message and knows which keys nobody asked for."""

    __slots__ = ("_message", "_taken")

    def __init__(self, message: dict[str, Any]) -> None:
        self._message = message
        self._taken: set[str] = set()

    def maybe(self, *choices: tuple[str, Reader]) -> Any:
        """Read the first of `choices` (key and how to read it) that has a value; None where none has.

        Null and the empty string are no values: Kalshi sent `""` as the price of a market never traded.
        """
        found: Any = None
        for key, reader in choices:
            self._taken.add(key)
            value = self._message.get(key)
            if found is None and value is not None and value != "":
                try:
                    found = reader(value)
                except (ValueError, TypeError) as error:
                    raise WireError(f"{key}: {error}") from error
        return found

    def need(self, *choices: tuple[str, Reader]) -> Any:
        """Like `maybe`, but a message without it cannot be read."""
        value = self.maybe(*choices)
        if value is None:
            raise WireError(f"{choices[0][0]} is missing")
        return value

    def several(self, names: tuple[str, ...]) -> dict[str, Any] | None:
        """Take those of `names` that are there, as they are; None where none is."""
        self._taken.update(names)
        return {key: self._message[key] for key in names if key in self._message} or None

    def extra(self) -> dict[str, Any] | None:
        """Return what nobody asked for."""
        if self._taken.issuperset(self._message):
            return None
        return {key: value for key, value in self._message.items() if key not in self._taken}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {type(value).__name__}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {type(value).__name__}")
    return value


def _number_text(value: Any) -> str:
    return value if isinstance(value, str) else f"{Decimal(value):f}"


def _side(value: Any) -> str:
    if value not in ("yes", "no"):
        raise ValueError(f"expected yes or no, got {str(value)[:20]!r}")
    return str(value)


def _levels(read_price: Reader) -> Reader:
    def read_levels(value: Any) -> tuple[Level, ...]:
        return tuple((read_price(price), count_centis(count)) for price, count in value)

    return read_levels


_dollar_levels = _levels(price_micros)
_cent_levels = _levels(cents_micros)


def _ts_ns(value: Any) -> int:
    """Read `ts`: seconds on most channels, RFC 3339 text on the order book."""
    return rfc3339_ns(value) if isinstance(value, str) and not value.isdigit() else seconds_ns(value)


def _event_ns(keys: _Keys) -> int | None:
    event_ns: int | None = keys.maybe(("ts_ms", milliseconds_ns), ("ts", _ts_ns), ("created_time", rfc3339_ns))
    return event_ns


def _trade(message: dict[str, Any]) -> Trade:
    keys = _Keys(message)
    return Trade(
        trade_id=keys.need(("trade_id", _text)),
        ticker=keys.need(("market_ticker", _text), ("ticker", _text)),
        yes_price_micros=keys.need(("yes_price_dollars", price_micros), ("yes_price", cents_micros)),
        no_price_micros=keys.need(("no_price_dollars", price_micros), ("no_price", cents_micros)),
        count_centis=keys.need(("count_fp", count_centis), ("count", count_centis)),
        taker_side=keys.maybe(("taker_outcome_side", _text), ("taker_side", _text)),
        taker_book_side=keys.maybe(("taker_book_side", _text)),
        is_block_trade=keys.maybe(("is_block_trade", _flag)),
        event_ns=_event_ns(keys),
        extra=keys.extra(),
    )


def _delta(message: dict[str, Any]) -> Delta:
    keys = _Keys(message)
    return Delta(
        ticker=keys.need(("market_ticker", _text)),
        market_id=keys.maybe(("market_id", _text)),
        side=keys.need(("side", _side)),
        price_micros=keys.need(("price_dollars", price_micros), ("price", cents_micros)),
        delta_centis=keys.need(("delta_fp", count_centis), ("delta", count_centis)),
        clock=keys.maybe(("clock", whole)),
        event_ns=_event_ns(keys),
        ts_ns=keys.maybe(("ts", _ts_ns)),
        extra=keys.extra(),
    )


def _snapshot(message: dict[str, Any]) -> Snapshot:
    keys = _Keys(message)
    sides = [
        keys.maybe((f"{side}_dollars_fp", _dollar_levels), (f"{side}_dollars", _dollar_levels), (side, _cent_levels))
        for side in ("yes", "no")
    ]
    return Snapshot(
        ticker=keys.need(("market_ticker", _text)),
        market_id=keys.maybe(("market_id", _text)),
        clock=keys.maybe(("clock", whole)),
        yes=sides[0] or (),
        no=sides[1] or (),
        extra=keys.extra(),
    )


def _ticker(message: dict[str, Any]) -> Ticker:
    keys = _Keys(message)
    return Ticker(
        ticker=keys.need(("market_ticker", _text)),
        market_id=keys.maybe(("market_id", _text)),
        price_micros=_last_price(keys, message),
        yes_bid_micros=keys.maybe(("yes_bid_dollars", price_micros), ("yes_bid", cents_micros)),
        yes_ask_micros=keys.maybe(("yes_ask_dollars", price_micros), ("yes_ask", cents_micros)),
        volume_centis=keys.maybe(("volume_fp", count_centis), ("volume", count_centis)),
        open_interest_centis=keys.maybe(("open_interest_fp", count_centis), ("open_interest", count_centis)),
        dollar_volume=keys.maybe(("dollar_volume", whole)),
        dollar_open_interest=keys.maybe(("dollar_open_interest", whole)),
        yes_bid_size_centis=keys.maybe(("yes_bid_size_fp", count_centis), ("yes_bid_size", count_centis)),
        yes_ask_size_centis=keys.maybe(("yes_ask_size_fp", count_centis), ("yes_ask_size", count_centis)),
        last_trade_size_centis=keys.maybe(("last_trade_size_fp", count_centis), ("last_trade_size", count_centis)),
        clock=keys.maybe(("clock", whole), ("Clock", whole)),
        event_ns=_event_ns(keys),
        ts_ns=keys.maybe(("time", rfc3339_ns)),
        extra=keys.extra(),
    )


def _last_price(keys: _Keys, message: dict[str, Any]) -> int | None:
    """Read the last price; a `price` of 0 beside an empty `price_dollars` means that there was no trade yet."""
    price: int | None = keys.maybe(("price_dollars", price_micros), ("price", cents_micros))
    return None if message.get("price_dollars") == "" and not price else price


def _price_ranges(value: Any) -> tuple[PriceRange, ...]:
    return tuple(PriceRange(*(price_micros(one[key]) for key in ("start", "end", "step"))) for one in value)


_METADATA_KEYS = ("strike_type", "floor_strike", "cap_strike", "custom_strike", "yes_sub_title")


def _lifecycle(message: dict[str, Any], *, multivariate: bool = False) -> Lifecycle:
    keys = _Keys(message)
    return Lifecycle(
        ticker=keys.need(("market_ticker", _text)),
        event_type=keys.need(("event_type", _text)),
        multivariate=multivariate,
        exchange_index=keys.maybe(("exchange_index", whole)),
        open_ns=keys.maybe(("open_ts", seconds_ns)),
        close_ns=keys.maybe(("close_ts", seconds_ns)),
        determination_ns=keys.maybe(("determination_ts", seconds_ns)),
        settled_ns=keys.maybe(("settled_ts", seconds_ns)),
        result=keys.maybe(("result", _text)),
        settlement_value_micros=keys.maybe(("settlement_value", price_micros)),
        is_deactivated=keys.maybe(("is_deactivated", _flag)),
        price_level_structure=keys.maybe(("price_level_structure", _text)),
        price_ranges=keys.maybe(("price_ranges", _price_ranges)),
        metadata=keys.maybe(("additional_metadata", _mapping)) or keys.several(_METADATA_KEYS),
        extra=keys.extra(),
    )


def _multivariate_lifecycle(message: dict[str, Any]) -> Lifecycle:
    return _lifecycle(message, multivariate=True)


def _event_lifecycle(message: dict[str, Any]) -> EventLifecycle:
    keys = _Keys(message)
    return EventLifecycle(
        event_ticker=keys.need(("event_ticker", _text)),
        series_ticker=keys.maybe(("series_ticker", _text)) or "",
        title=keys.maybe(("title", _text)) or "",
        subtitle=keys.maybe(("subtitle", _text)) or "",
        collateral_return_type=keys.maybe(("collateral_return_type", _text)) or "",
        exchange_index=keys.maybe(("exchange_index", whole)),
        strike_date=keys.maybe(("strike_date", whole)),
        strike_period=keys.maybe(("strike_period", _text)),
        extra=keys.extra(),
    )


def _event_fee(message: dict[str, Any]) -> EventFee:
    keys = _Keys(message)
    return EventFee(
        event_ticker=keys.need(("event_ticker", _text)),
        fee_type_override=keys.maybe(("fee_type_override", _text)),
        fee_multiplier_override=keys.maybe(("fee_multiplier_override", _number_text)),
        extra=keys.extra(),
    )


_READERS: dict[str, Callable[[dict[str, Any]], Message]] = {
    "trade": _trade,
    "orderbook_delta": _delta,
    "orderbook_snapshot": _snapshot,
    "ticker": _ticker,
    "market_lifecycle_v2": _lifecycle,
    "multivariate_market_lifecycle": _multivariate_lifecycle,
    "event_lifecycle": _event_lifecycle,
    "event_fee_update": _event_fee,
}


# Messages of exactly today's shape, which is nearly all of them, are read several times as fast as by key.


_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _DeltaToday(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    market_ticker: _Text
    market_id: _Text
    price_dollars: _Text
    delta_fp: _Text
    side: Literal["yes", "no"]
    ts_ms: int
    ts: _Text
    clock: int | None = None


class _TradeToday(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    trade_id: _Text
    market_ticker: _Text
    yes_price_dollars: _Text
    no_price_dollars: _Text
    count_fp: _Text
    taker_outcome_side: _Text
    taker_book_side: _Text
    ts_ms: int
    ts: int
    taker_side: _Text | None = None
    is_block_trade: bool | None = None


class _TickerToday(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    market_ticker: _Text
    market_id: _Text
    price_dollars: _Text
    yes_bid_dollars: _Text
    yes_ask_dollars: _Text
    volume_fp: _Text
    open_interest_fp: _Text
    dollar_volume: int
    dollar_open_interest: int
    yes_bid_size_fp: _Text
    yes_ask_size_fp: _Text
    last_trade_size_fp: _Text
    ts_ms: int
    ts: int
    time: _Text


_decode_delta = msgspec.json.Decoder(_DeltaToday).decode
_decode_trade = msgspec.json.Decoder(_TradeToday).decode
_decode_ticker = msgspec.json.Decoder(_TickerToday).decode
_NS_PER_MS = 1_000_000


def _quick_delta(msg: msgspec.Raw | bytes) -> Delta:
    today = _decode_delta(msg)
    return Delta(
        ticker=today.market_ticker,
        market_id=today.market_id,
        side=today.side,
        price_micros=price_micros(today.price_dollars),
        delta_centis=count_centis(today.delta_fp),
        clock=today.clock,
        event_ns=today.ts_ms * _NS_PER_MS,
        ts_ns=rfc3339_ns(today.ts),
    )


def _quick_trade(msg: msgspec.Raw | bytes) -> Trade:
    today = _decode_trade(msg)
    return Trade(
        trade_id=today.trade_id,
        ticker=today.market_ticker,
        yes_price_micros=price_micros(today.yes_price_dollars),
        no_price_micros=price_micros(today.no_price_dollars),
        count_centis=count_centis(today.count_fp),
        taker_side=today.taker_outcome_side,
        taker_book_side=today.taker_book_side,
        is_block_trade=today.is_block_trade,
        event_ns=today.ts_ms * _NS_PER_MS,
    )


def _quick_ticker(msg: msgspec.Raw | bytes) -> Ticker:
    today = _decode_ticker(msg)
    return Ticker(
        ticker=today.market_ticker,
        market_id=today.market_id,
        price_micros=price_micros(today.price_dollars),
        yes_bid_micros=price_micros(today.yes_bid_dollars),
        yes_ask_micros=price_micros(today.yes_ask_dollars),
        volume_centis=count_centis(today.volume_fp),
        open_interest_centis=count_centis(today.open_interest_fp),
        dollar_volume=today.dollar_volume,
        dollar_open_interest=today.dollar_open_interest,
        yes_bid_size_centis=count_centis(today.yes_bid_size_fp),
        yes_ask_size_centis=count_centis(today.yes_ask_size_fp),
        last_trade_size_centis=count_centis(today.last_trade_size_fp),
        clock=None,
        event_ns=today.ts_ms * _NS_PER_MS,
        ts_ns=rfc3339_ns(today.time),
    )


_QUICK: dict[str, Callable[[msgspec.Raw | bytes], Message]] = {
    "orderbook_delta": _quick_delta,
    "trade": _quick_trade,
    "ticker": _quick_ticker,
}
