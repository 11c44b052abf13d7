"""Kalshi's messages as rows of the tables: whole blocks at once where they are of today's shape, one by one otherwise.

`columns` works on Arrow arrays and vouches for a row only where it is certain to be what `rows`, the patient reader on top
of `wire`, would say; everything else goes through `rows`. Numbers are read by the functions of `scaled` either way. Not for
records, connections or files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from ssmd_dagster.exchange import Columns, Place, ReadMessage, Row, UnknownKey
from ssmd_dagster.kalshi import wire
from ssmd_dagster.kalshi.scaled import COUNT_PLACES, PRICE_PLACES, count_centis, price_micros, rfc3339_ns

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

_NS_PER_MS = 1_000_000
_MAX_MS = (2**63 - 1) // _NS_PER_MS

_ENVELOPE_KEYS = frozenset({"type", "sid", "seq", "id", "msg", "sending_ts_ms"})
_CENTS_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "trade": frozenset({"ticker", "yes_price", "no_price", "count", "created_time"}),
        "orderbook_delta": frozenset({"price", "delta", "created_time"}),
        "ticker": frozenset(
            {
                "price", "yes_bid", "yes_ask", "volume", "open_interest", "yes_bid_size", "yes_ask_size",
                "last_trade_size", "created_time",
            }
        ),
    }
)  # fmt: skip
"""Keys that the patient reader takes and `columns` does not: of the cents era, and of REST."""
_SNAPSHOT_KEYS = frozenset({"yes", "no", "yes_dollars", "no_dollars", "yes_dollars_fp", "no_dollars_fp"})


def _struct(**fields: pa.DataType) -> pa.StructType:
    return pa.struct([pa.field(name, kind) for name, kind in fields.items()])


_TEXT, _INT, _BOOL = pa.string(), pa.int64(), pa.bool_()
_MESSAGES: Mapping[str, pa.StructType] = MappingProxyType(
    {
        "trade": _struct(
            trade_id=_TEXT, market_ticker=_TEXT, yes_price_dollars=_TEXT, no_price_dollars=_TEXT, count_fp=_TEXT,
            taker_side=_TEXT, taker_outcome_side=_TEXT, taker_book_side=_TEXT, is_block_trade=_BOOL, ts=_INT, ts_ms=_INT,
        ),
        "orderbook_delta": _struct(
            market_ticker=_TEXT, market_id=_TEXT, clock=_INT, price_dollars=_TEXT, delta_fp=_TEXT, side=_TEXT, ts=_TEXT,
            ts_ms=_INT,
        ),
        "ticker": _struct(
            market_id=_TEXT, market_ticker=_TEXT, price_dollars=_TEXT, yes_bid_dollars=_TEXT, yes_ask_dollars=_TEXT,
            volume_fp=_TEXT, open_interest_fp=_TEXT, dollar_volume=_INT, dollar_open_interest=_INT, yes_bid_size_fp=_TEXT,
            yes_ask_size_fp=_TEXT, last_trade_size_fp=_TEXT, clock=_INT, Clock=_INT, ts=_INT, ts_ms=_INT, time=_TEXT,
        ),
    }
)  # fmt: skip

_TRADE_ROW = pa.schema(
    dict.fromkeys(
        (
            "trade_id", "ticker", "yes_price_dollars", "no_price_dollars", "count_fp", "taker_side", "taker_outcome_side",
            "taker_book_side", "created_time",
        ),
        _TEXT,
    ) | {"is_block_trade": _BOOL}
)  # fmt: skip
"""A row of REST's list of trades, of today's shape."""


class _Page(msgspec.Struct, gc=False):
    trades: list[msgspec.Raw] = []
    markets: list[msgspec.Raw] = []
    places: dict[str, Place] = {}


class _Paged(msgspec.Struct, gc=False):
    type: str
    msg: _Page


_decode_page = msgspec.json.Decoder(_Page).decode
_decode_paged = msgspec.json.Decoder(_Paged).decode


class KalshiRows:
    """The `RowReader` of Kalshi."""

    def wire_type(self, channel: str) -> pa.StructType | None:
        """Return the types of a message of today's shape, by its type's channel; None where `rows` is quick enough."""
        message = _MESSAGES.get(channel)
        if message is None:
            return None
        return _struct(type=_TEXT, sid=_INT, seq=_INT, sending_ts_ms=_INT, msg=message)

    def columns(self, channel: str, messages: pa.StructArray) -> Columns:
        """Read messages that have at least the fields of `wire_type(channel)`; see `exchange.RowReader`."""
        outer, inner = _fields(messages), _fields(messages.field("msg"))
        kinds = outer["type"]
        ok = _true(pc.equal(kinds, channel)) & _filled(inner["market_ticker"])
        columns, fine = _COLUMNS[channel](inner)
        ok &= fine
        for name in inner.keys() & _CENTS_KEYS[channel]:
            ok &= ~_present(inner[name])
        for name, field in (("sid", "sid"), ("seq", "seq")):
            columns[name] = outer[field]
        columns["event_ns"], fine = _milliseconds(inner["ts_ms"], needed=True)
        ok &= fine
        columns["sent_ns"], fine = _milliseconds(outer["sending_ts_ms"], needed=False)
        ok &= fine
        columns["ticker"] = inner["market_ticker"]
        return Columns(wire_table(channel), columns, ok, tuple(_unknown(channel, kinds, outer, inner)))

    def pages(self, messages: Sequence[bytes]) -> tuple[Columns, list[int]] | None:
        """Read pages of trades as a whole; see `exchange.RowReader`."""
        try:
            pages = [_decode_paged(message) for message in messages]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if any(page.type != "rest_trades" or page.msg.markets for page in pages):
            return None
        rows = b"\n".join([row for page in pages for row in page.msg.trades]) + b"\n"
        counts = [len(page.msg.trades) for page in pages]
        if not rows.isascii():
            return None
        try:
            parsed = pyarrow.json.read_json(
                pa.BufferReader(rows),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(rows) + 1),
                parse_options=pyarrow.json.ParseOptions(
                    explicit_schema=_TRADE_ROW, newlines_in_values=False, unexpected_field_behavior="error"
                ),
            )
        except pa.ArrowException:
            return None
        if not parsed.num_rows or parsed.num_rows != sum(counts):
            return None
        batch = parsed.combine_chunks().to_batches()[0]
        row = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns, ok = _trade_columns(row)
        columns["event_ns"], fine = _times(row["created_time"])
        columns["ticker"] = row["ticker"]
        columns |= {name: pa.nulls(sum(counts), pa.int64()) for name in ("sid", "seq", "sent_ns")}
        if not (ok & fine & _filled(row["ticker"]) & _filled(row["created_time"])).all():
            return None
        return Columns("trade", columns, ok, ()), counts

    def rows(self, message: bytes) -> ReadMessage:
        """Read one message, of whatever era; see `exchange.RowReader`."""
        try:
            outer = _decode_outer(message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return ReadMessage("", "rejected", reason="not a message with a type")
        kind = outer.type
        unknown = tuple(_unknown_outer(kind, message))
        if kind.startswith("rest_"):
            return _rest(kind, outer.msg)
        if wire.CHANNEL_OF_TYPE.get(kind) == "session":
            return ReadMessage(kind, "control", unknown=unknown)
        try:
            read = wire.read(kind, outer.msg)
            if read is None:
                return ReadMessage(kind, "rejected", reason="unknown type", unknown=(UnknownKey(kind, "type"),))
            common = {"sid": outer.sid, "seq": outer.seq, "sent_ns": _ms(outer.sending_ts_ms)}
            rows = [common | row for row in _rows_of(kind, read)]
            _check_sizes(rows)
        except wire.WireError as error:
            return ReadMessage(kind, "rejected", reason=_countable(error), unknown=unknown)
        extra = _extra_keys(kind, read.extra)
        return ReadMessage(
            kind, "rows", table=wire_table(wire.CHANNEL_OF_TYPE[kind]), rows=rows, unknown=(*unknown, *extra)
        )


def reader() -> KalshiRows:
    """Return Kalshi's reader of rows."""
    return KalshiRows()


def wire_table(channel: str) -> str:
    """Return the table of a channel's messages."""
    return {"orderbook_delta": "orderbook", "market_lifecycle_v2": "lifecycle"}.get(channel, channel)


# Whole blocks.


def _fields(array: pa.StructArray) -> dict[str, pa.Array]:
    # `flatten` and not `field`: a null struct has null fields
    return dict(zip((field.name for field in array.type), array.flatten(), strict=True))


def _true(array: pa.BooleanArray) -> Mask:
    mask: Mask = pc.fill_null(array, False).to_numpy(zero_copy_only=False)
    return mask


def _present(array: pa.Array) -> Mask:
    mask: Mask = pc.is_valid(array).to_numpy(zero_copy_only=False)
    return mask


def _filled(text: pa.StringArray) -> Mask:
    """Tell where there is a text that is not empty."""
    return _true(pc.not_equal(text, ""))


def _empty(text: pa.StringArray) -> Mask:
    return _true(pc.equal(text, ""))


def _exact(text: pa.StringArray, read: Callable[[str], int], places: int, *, needed: bool) -> tuple[pa.Array, Mask]:
    """Read numbers, each distinct text once; empty texts are no values. False in the mask: a text that `read` refuses."""
    encoded = text.dictionary_encode()
    distinct = encoded.dictionary
    values, known = _plain_numbers(distinct, places)
    fine = np.ones(len(values), np.bool_)
    for code in np.flatnonzero(~known[:-1]).tolist():
        one = distinct[code].as_py()
        if one != "":
            try:
                values[code] = read(one)
                known[code] = True
            except (ValueError, OverflowError):
                fine[code] = False
    codes = encoded.indices.fill_null(len(distinct)).to_numpy()
    has = known[codes]
    return pa.array(values[codes], mask=~has), fine[codes] & (has if needed else True)


def _plain_numbers(texts: pa.StringArray, places: int) -> tuple[Integers, Mask]:
    """Read texts such as `-12.50` as integers of `10 ** -places`; one place more than there are texts, for null.

    False in the mask: not such a text, or with more decimal places or digits than can be taken here.
    """
    values, known = np.zeros(len(texts) + 1, np.int64), np.zeros(len(texts) + 1, np.bool_)
    point = pc.find_substring(texts, ".").to_numpy()
    decimals = pc.binary_length(texts).to_numpy() - 1 - point
    # Without an x no text of digits, with at most a sign before them, is anything but a decimal number to Arrow.
    plain = (point > 0) & (decimals > 0) & (decimals <= places) & (point < _MAX_UNITS)
    plain &= ~_true(pc.match_substring(texts, "x", ignore_case=True)) & ~_true(pc.starts_with(texts, "+"))
    digits = pc.replace_substring(pc.if_else(pa.array(plain), texts, None), ".", "", max_replacements=1)
    try:
        units = pc.fill_null(digits.cast(pa.int64()), 0).to_numpy()
    except pa.ArrowInvalid:
        return values, known
    values[:-1] = units * _POWERS[np.where(plain, places - decimals, 0)]
    known[:-1] = plain
    return values, known


_MAX_UNITS = 11
_POWERS = 10 ** np.arange(PRICE_PLACES + 1, dtype=np.int64)


def _milliseconds(column: pa.Array, *, needed: bool) -> tuple[pa.Array, Mask]:
    sane = _true(pc.less_equal(column, _MAX_MS)) & _true(pc.greater_equal(column, -_MAX_MS))
    ms = pc.if_else(pa.array(sane), column, None)
    return pc.multiply(ms, _NS_PER_MS), sane if needed else sane | ~_present(column)


def _times(text: pa.StringArray) -> tuple[pa.Array, Mask]:
    """Read the three forms of RFC 3339 that Kalshi's messages have; any other is left to the patient reader."""
    filled = _filled(text)
    lengths = pc.binary_length(text)
    plain = filled & _true(pc.is_in(lengths, pa.array([20, 24, 27], pa.int32()))) & _true(pc.ends_with(text, "Z"))
    try:
        moments = pc.if_else(pa.array(plain), text, None).cast(pa.timestamp("ns", "UTC")).cast(pa.int64())
    except pa.ArrowInvalid:
        return pa.nulls(len(text), pa.int64()), ~filled
    return moments, plain | ~filled


def _text_or_null(text: pa.StringArray) -> pa.StringArray:
    return pc.if_else(pc.equal(text, ""), None, text)


def _sides(text: pa.StringArray) -> Mask:
    return _true(pc.is_in(text, pa.array(["yes", "no"])))


def _trade_columns(message: dict[str, pa.Array]) -> tuple[dict[str, pa.Array], Mask]:
    yes, ok = _exact(message["yes_price_dollars"], price_micros, PRICE_PLACES, needed=True)
    no, ok_no = _exact(message["no_price_dollars"], price_micros, PRICE_PLACES, needed=True)
    count, ok_count = _exact(message["count_fp"], count_centis, COUNT_PLACES, needed=True)
    taker = pc.coalesce(_text_or_null(message["taker_outcome_side"]), _text_or_null(message["taker_side"]))
    columns = {
        "trade_id": message["trade_id"],
        "yes_price": yes,
        "no_price": no,
        "count": count,
        "taker_side": taker.dictionary_encode(),
        "taker_book_side": _text_or_null(message["taker_book_side"]).dictionary_encode(),
        "is_block_trade": message["is_block_trade"],
    }
    return columns, ok & ok_no & ok_count & _filled(message["trade_id"])


def _delta_columns(message: dict[str, pa.Array]) -> tuple[dict[str, pa.Array], Mask]:
    rows = len(message["side"])
    price, ok = _exact(message["price_dollars"], price_micros, PRICE_PLACES, needed=True)
    size, ok_size = _exact(message["delta_fp"], count_centis, COUNT_PLACES, needed=True)
    ts_ns, ok_time = _times(message["ts"])
    columns = {
        "kind": pa.array(["delta"]).dictionary_encode().take(pa.array(np.zeros(rows, np.int8))),
        "clock": message["clock"],
        "side": message["side"].dictionary_encode(),
        "price": price,
        "size": size,
        "last": pa.array(np.ones(rows, np.bool_)),
        "msg": pa.array(np.zeros(rows, np.int32)),
        "ts_ns": ts_ns,
        "market_id": _text_or_null(message["market_id"]).dictionary_encode(),
    }
    return columns, ok & ok_size & ok_time & _sides(message["side"])


_TICKER_NUMBERS: tuple[tuple[str, str, Callable[[Any], int], int], ...] = (
    *((name, f"{name}_dollars", price_micros, PRICE_PLACES) for name in ("price", "yes_bid", "yes_ask")),
    *(
        (name, f"{name}_fp", count_centis, COUNT_PLACES)
        for name in ("yes_bid_size", "yes_ask_size", "last_trade_size", "volume", "open_interest")
    ),
)


def _ticker_columns(message: dict[str, pa.Array]) -> tuple[dict[str, pa.Array], Mask]:
    columns: dict[str, pa.Array] = {}
    columns["ts_ns"], ok = _times(message["time"])
    for name, key, read, places in _TICKER_NUMBERS:
        columns[name], fine = _exact(message[key], read, places, needed=False)
        ok &= fine
    columns |= {
        "dollar_volume": message["dollar_volume"],
        "dollar_open_interest": message["dollar_open_interest"],
        "clock": pc.coalesce(message["clock"], message["Clock"]),
        "market_id": _text_or_null(message["market_id"]).dictionary_encode(),
    }
    return columns, ok


_COLUMNS: Mapping[str, Callable[[dict[str, pa.Array]], tuple[dict[str, pa.Array], Mask]]] = MappingProxyType(
    {"trade": _trade_columns, "orderbook_delta": _delta_columns, "ticker": _ticker_columns}
)


def _unknown(
    channel: str, kinds: pa.StringArray, outer: dict[str, pa.Array], inner: dict[str, pa.Array]
) -> Iterator[tuple[UnknownKey, Mask]]:
    """Yield every key that no reader knows, with the rows that have it."""
    for name in outer.keys() - _ENVELOPE_KEYS:
        for kind, mask in _by_type(kinds, _present(outer[name])):
            yield UnknownKey(f"{kind}.{name}", _json_name(outer[name].type)), mask
    for name in inner.keys() - {field.name for field in _MESSAGES[channel]} - _CENTS_KEYS[channel]:
        for kind, mask in _by_type(kinds, _present(inner[name])):
            if not (kind == "orderbook_snapshot" and name in _SNAPSHOT_KEYS):
                yield UnknownKey(f"{kind}.msg.{name}", _json_name(inner[name].type)), mask


def _by_type(kinds: pa.StringArray, mask: Mask) -> Iterator[tuple[str, Mask]]:
    for kind in pc.unique(kinds.filter(pa.array(mask))).to_pylist():
        yield str(kind), mask & _true(pc.equal(kinds, kind))


def _json_name(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_list(kind):
        return "array"
    return "object" if pa.types.is_struct(kind) else "string"


# One message at a time.


class _Outer(msgspec.Struct, gc=False):
    type: str
    msg: msgspec.Raw = msgspec.Raw(b"{}")
    sid: int | None = None
    seq: int | None = None
    sending_ts_ms: int | None = None


_decode_outer = msgspec.json.Decoder(_Outer).decode
_decode_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _unknown_outer(kind: str, message: bytes) -> Iterator[UnknownKey]:
    keys = _decode_keys(message)
    if not _ENVELOPE_KEYS.issuperset(keys):
        for name in keys.keys() - _ENVELOPE_KEYS:
            value = msgspec.json.decode(keys[name])
            if value is not None:
                yield UnknownKey(f"{kind}.{name}", _json_name_of(value))


def _extra_keys(kind: str, extra: dict[str, Any] | None) -> list[UnknownKey]:
    return [
        UnknownKey(f"{kind}.msg.{name}", _json_name_of(value))
        for name, value in (extra or {}).items()
        if value is not None
    ]


def _json_name_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float, Decimal)):
        return "number"
    if isinstance(value, list):
        return "array"
    return "object" if isinstance(value, dict) else "string"


def _ms(value: int | None) -> int | None:
    return None if value is None else value * _NS_PER_MS


def _check_sizes(rows: list[Row]) -> None:
    for row in rows:
        for name, value in row.items():
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise wire.WireError(f"{name}: too large a number")


def _countable(error: wire.WireError) -> str:
    """Return a reason without the value that caused it."""
    return ": ".join(str(error).split(": ")[:2])


def _rows_of(kind: str, read: wire.Message) -> list[Row]:
    if isinstance(read, wire.Delta):
        return [
            {
                "ticker": read.ticker, "event_ns": read.event_ns, "kind": "delta", "clock": read.clock, "side": read.side,
                "price": read.price_micros, "size": read.delta_centis, "last": True, "msg": 0, "ts_ns": read.ts_ns,
                "market_id": read.market_id,
            }
        ]  # fmt: skip
    if isinstance(read, wire.Snapshot):
        return _snapshot_rows(read)
    if isinstance(read, wire.Trade):
        return [_trade_row(read)]
    if isinstance(read, wire.Ticker):
        return [
            {
                "ticker": read.ticker, "event_ns": read.event_ns, "price": read.price_micros, "yes_bid": read.yes_bid_micros,
                "yes_ask": read.yes_ask_micros, "yes_bid_size": read.yes_bid_size_centis,
                "yes_ask_size": read.yes_ask_size_centis, "last_trade_size": read.last_trade_size_centis,
                "volume": read.volume_centis, "open_interest": read.open_interest_centis,
                "dollar_volume": read.dollar_volume, "dollar_open_interest": read.dollar_open_interest, "clock": read.clock,
                "ts_ns": read.ts_ns, "market_id": read.market_id,
            }
        ]  # fmt: skip
    if isinstance(read, wire.Lifecycle):
        return [_lifecycle_row(kind, read)]
    if isinstance(read, wire.EventLifecycle):
        detail = _detail(
            subtitle=read.subtitle or None, collateral_return_type=read.collateral_return_type or None,
            strike_date=read.strike_date, strike_period=read.strike_period, **(read.extra or {}),
        )  # fmt: skip
        return [
            {
                "ticker": read.event_ticker, "message_type": kind, "event_ticker": read.event_ticker,
                "series_ticker": read.series_ticker or None, "title": read.title or None,
                "exchange_index": read.exchange_index, "detail": detail,
            }
        ]  # fmt: skip
    detail = _detail(
        fee_type_override=read.fee_type_override,
        fee_multiplier_override=read.fee_multiplier_override,
        **(read.extra or {}),
    )
    return [{"ticker": read.event_ticker, "message_type": kind, "event_ticker": read.event_ticker, "detail": detail}]


def _snapshot_rows(read: wire.Snapshot) -> list[Row]:
    levels: list[tuple[str | None, int | None, int | None]] = [("yes", *level) for level in read.yes]
    levels += [("no", *level) for level in read.no]
    last = max(len(levels) - 1, 0)
    return [
        {
            "ticker": read.ticker, "event_ns": None, "kind": "snapshot", "clock": read.clock, "side": side, "price": price,
            "size": size, "last": at == last, "msg": at, "ts_ns": None, "market_id": read.market_id,
        }
        for at, (side, price, size) in enumerate(levels or [(None, None, None)])
    ]  # fmt: skip


def _trade_row(read: wire.Trade) -> Row:
    return {
        "ticker": read.ticker, "event_ns": read.event_ns, "trade_id": read.trade_id, "yes_price": read.yes_price_micros,
        "no_price": read.no_price_micros, "count": read.count_centis, "taker_side": read.taker_side,
        "taker_book_side": read.taker_book_side, "is_block_trade": read.is_block_trade,
    }  # fmt: skip


def _lifecycle_row(kind: str, read: wire.Lifecycle) -> Row:
    metadata = dict(read.metadata or {})
    ranges = read.price_ranges and [(one.start_micros, one.end_micros, one.step_micros) for one in read.price_ranges]
    event_ticker, title = (_popped_text(metadata, key) for key in ("event_ticker", "title"))
    return {
        "ticker": read.ticker, "event_ns": None, "message_type": kind, "event_type": read.event_type,
        "event_ticker": event_ticker, "title": title, "open_ns": read.open_ns, "close_ns": read.close_ns,
        "determination_ns": read.determination_ns, "settled_ns": read.settled_ns, "result": read.result,
        "settlement_value": read.settlement_value_micros, "is_deactivated": read.is_deactivated,
        "exchange_index": read.exchange_index, "price_level_structure": read.price_level_structure,
        "detail": _detail(**metadata, price_ranges_micros=ranges, **(read.extra or {})),
    }  # fmt: skip


def _popped_text(metadata: dict[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if not isinstance(value, str):
        return None
    del metadata[key]
    return value


def _detail(**values: Any) -> str | None:
    stated = {key: value for key, value in values.items() if value is not None}
    # Numbers as their JSON had them: a Decimal becomes text, never a float.
    return (
        json.dumps(stated, separators=(",", ":"), sort_keys=True, ensure_ascii=False, default=str) if stated else None
    )


def _rest(kind: str, msg: msgspec.Raw) -> ReadMessage:
    """Read a page of REST; a row that cannot be read makes the page count as rejected, its other rows are kept."""
    try:
        page = _decode_page(msg)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ReadMessage(kind, "rejected", reason="not a page")
    if kind not in ("rest_trades", "rest_markets"):
        return ReadMessage(kind, "rejected", reason="unknown type", unknown=(UnknownKey(kind, "type"),))
    rows: list[Row] = []
    unknown: list[UnknownKey] = []
    reason = ""
    for raw in page.trades or page.markets:
        try:
            if kind == "rest_trades":
                trade = wire.read_trade(raw)
                unknown += _extra_keys(kind, trade.extra)
                row = _trade_row(trade)
            else:
                row = _market_row(raw, page.places)
            _check_sizes([row])
        except wire.WireError as error:
            reason = _countable(error)
            continue
        rows.append(row)
    table = "trade" if kind == "rest_trades" else "security_master"
    return ReadMessage(kind, "rejected" if reason else "rows", table, rows, reason, tuple(unknown))


class _Market(msgspec.Struct):
    ticker: str
    event_ticker: str | None = None
    title: str | None = None
    status: str | None = None
    open_time: str | None = None
    close_time: str | None = None
    result: str | None = None
    settlement_value_dollars: str | None = None


_NO_PLACE = Place("", "")
_decode_market = msgspec.json.Decoder(_Market).decode


def _market_row(raw: msgspec.Raw, places: Mapping[str, Place]) -> Row:
    """Read a row of REST `/markets`; raises `WireError`."""
    try:
        market = _decode_market(raw)
        settled = market.settlement_value_dollars
        place = places.get(market.event_ticker or "", _NO_PLACE)
        return {
            "ticker": market.ticker, "event_ticker": market.event_ticker, "title": market.title, "status": market.status,
            "series_ticker": place.series_ticker or None, "category": place.category or None,
            "open_ns": market.open_time and rfc3339_ns(market.open_time),
            "close_ns": market.close_time and rfc3339_ns(market.close_time), "result": market.result or None,
            "settlement_value": settled and price_micros(settled), "detail": bytes(raw).decode(),
        }  # fmt: skip
    except (msgspec.DecodeError, ValueError) as error:
        raise wire.WireError("a market cannot be read") from error
