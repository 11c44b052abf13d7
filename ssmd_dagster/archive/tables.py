"""The tables of a day: names, columns, types, units. No data is read or written here.

Prices are micro-dollars, counts hundredths of a contract, times nanoseconds since the Unix epoch: integers, never floats.
Every column says in its metadata what it is (`description`), in which unit (`unit`) and where it comes from (`source`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import pyarrow as pa

SCHEMA_VERSION = 1
"""Goes up when a column changes its meaning or goes away; readers refuse a higher one than they know."""

WORD = pa.dictionary(pa.int32(), pa.string())
"""Type of columns with few distinct values."""

DOLLARS, CONTRACTS, WHOLE_DOLLARS, NANOSECONDS = "1e-6 USD", "1e-2 contracts", "USD", "ns since 1970-01-01 UTC"

_EXCHANGE, _RECORDER, _NORMALISER = "exchange", "recorder", "normaliser"


def _column(
    name: str, kind: pa.DataType, description: str, *, unit: str = "", source: str = _EXCHANGE, null: bool = True
) -> pa.Field:
    """Return a field with its metadata; `null` says that rows may lack it."""
    return pa.field(name, kind, null, {"description": description, "unit": unit, "source": source})


COMMON = (
    _column(
        "ticker", pa.string(), "Market ticker as the exchange writes it (of an event: its event ticker)", null=False
    ),
    _column(
        "event_ns",
        pa.int64(),
        "When the exchange says that it happened; the receive time where it gives none. It decides the trading day. "
        "An order book snapshot has its receive time, but none later than the connection's next change of that book; it is "
        "in the day of its connection, which may last some seconds longer than the day",
        unit=NANOSECONDS,
        null=False,
    ),
    _column("recv_ns", pa.int64(), "When the recorder received it", unit=NANOSECONDS, source=_RECORDER, null=False),
    _column("conn", WORD, "Connection that received it: epoch-shard-number", source=_RECORDER, null=False),
    _column("n", pa.int64(), "Ordinal of the raw record on that connection", source=_RECORDER, null=False),
    _column("sid", pa.int64(), "The exchange's subscription on that connection"),
    _column("seq", pa.int64(), "The exchange's sequence number on that subscription"),
    _column(
        "source",
        WORD,
        "live: off the socket; rest: the exchange's REST list; archive: a replayed archive; "
        "opening_fold: the book as it stood when the day opened",
        source=_NORMALISER,
        null=False,
    ),
)
"""The first columns of every table of things that happened."""

_SENT = _column("sent_ns", pa.int64(), "When the exchange queued the message for sending", unit=NANOSECONDS)
_MARKET_ID = _column("market_id", WORD, "The exchange's own id of the market")

TRADE = pa.schema(
    [
        *COMMON,
        _column("trade_id", pa.string(), "The exchange's id of the trade; one row for each", null=False),
        _column("yes_price", pa.int64(), "Price of a YES contract", unit=DOLLARS, null=False),
        _column("no_price", pa.int64(), "Price of a NO contract", unit=DOLLARS, null=False),
        _column("count", pa.int64(), "Contracts traded", unit=CONTRACTS, null=False),
        _column("taker_side", WORD, "The outcome that the taker bought: yes or no"),
        _column("taker_book_side", WORD, "The taker's side of the book: bid or ask"),
        _column("is_block_trade", pa.bool_(), "Negotiated off the book"),
        _SENT,
    ]
)

TICKER = pa.schema(
    [
        *COMMON,
        _column("price", pa.int64(), "Price of the last trade of YES; null before the first", unit=DOLLARS),
        _column("yes_bid", pa.int64(), "Best bid for YES", unit=DOLLARS),
        _column("yes_ask", pa.int64(), "Best ask for YES", unit=DOLLARS),
        _column("yes_bid_size", pa.int64(), "Contracts at the best bid", unit=CONTRACTS),
        _column("yes_ask_size", pa.int64(), "Contracts at the best ask", unit=CONTRACTS),
        _column("last_trade_size", pa.int64(), "Contracts of the last trade", unit=CONTRACTS),
        _column("volume", pa.int64(), "Contracts traded since the market opened", unit=CONTRACTS),
        _column("open_interest", pa.int64(), "Contracts held", unit=CONTRACTS),
        _column("dollar_volume", pa.int64(), "Notional traded, signed", unit=WHOLE_DOLLARS),
        _column("dollar_open_interest", pa.int64(), "Notional held, signed", unit=WHOLE_DOLLARS),
        _column("clock", pa.int64(), "The exchange's clock of the market, where the message has one"),
        _column("ts_ns", pa.int64(), "The finer of the exchange's two times, where it gives it", unit=NANOSECONDS),
        _MARKET_ID,
        _SENT,
    ]
)

ORDERBOOK = pa.schema(
    [
        *COMMON,
        _column("kind", WORD, "snapshot: a level of a whole book; delta: a change of one level", null=False),
        _column("clock", pa.int64(), "The exchange's clock of the market; a snapshot holds all changes up to its own"),
        _column("side", WORD, "yes or no; null in the one row of an empty snapshot"),
        _column("price", pa.int64(), "The level's price, on its own side's scale; null with `side`", unit=DOLLARS),
        _column("size", pa.int64(), "snapshot: contracts at the level; delta: their change, signed", unit=CONTRACTS),
        _column(
            "last",
            pa.bool_(),
            "The last row of its record: a snapshot is whole with it",
            source=_NORMALISER,
            null=False,
        ),
        _column("msg", pa.int32(), "Position of the row in its record, from 0", source=_NORMALISER, null=False),
        _column("ts_ns", pa.int64(), "The finer of the exchange's two times, where it gives it", unit=NANOSECONDS),
        _MARKET_ID,
        _SENT,
    ]
)

LIFECYCLE = pa.schema(
    [
        *COMMON,
        _column("message_type", WORD, "The message's type on the wire", null=False),
        _column("event_type", WORD, "created, activated, deactivated, close_date_updated, determined, settled, …"),
        _column("event_ticker", pa.string(), "The event that the market belongs to"),
        _column("series_ticker", pa.string(), "The series that the event belongs to"),
        _column("title", pa.string(), "Title of the market or event"),
        _column("open_ns", pa.int64(), "When the market opens", unit=NANOSECONDS),
        _column("close_ns", pa.int64(), "When the market closes", unit=NANOSECONDS),
        _column("determination_ns", pa.int64(), "When the result was determined", unit=NANOSECONDS),
        _column("settled_ns", pa.int64(), "When the market was settled", unit=NANOSECONDS),
        _column("result", WORD, "yes, no or scalar"),
        _column("settlement_value", pa.int64(), "What a YES contract paid", unit=DOLLARS),
        _column("is_deactivated", pa.bool_(), "Whether trading is paused"),
        _column("exchange_index", pa.int64(), "The exchange's shard that the market lives on"),
        _column("price_level_structure", WORD, "Name of the price grid"),
        _column("detail", pa.string(), "Everything else that the message says, as JSON"),
        _SENT,
    ]
)

COVERAGE = pa.schema(
    [
        _column("channel", WORD, "The recorder's channel", source=_RECORDER, null=False),
        _column("market", pa.string(), "Market ticker; null: every market of the channel", source=_RECORDER),
        _column("from_ns", pa.int64(), "Beginning, inclusive", unit=NANOSECONDS, source=_RECORDER, null=False),
        _column("to_ns", pa.int64(), "End, exclusive", unit=NANOSECONDS, source=_RECORDER, null=False),
        _column(
            "state",
            WORD,
            "present; missing: lost or suspected lost; healed: filled from the second connection; "
            "repaired: filled from the exchange's REST list",
            source=_NORMALISER,
            null=False,
        ),
        _column("cause", WORD, "Why it is not present", source=_RECORDER),
        _column("gap_id", pa.string(), "The gap in the day's journal", source=_RECORDER),
    ]
)

SECURITY_MASTER = pa.schema(
    [
        _column("ticker", pa.string(), "Market ticker", null=False),
        _column("event_ticker", pa.string(), "The event that the market belongs to"),
        _column("series_ticker", pa.string(), "The series that the event belongs to"),
        _column("category", WORD, "The exchange's category of the series"),
        _column("title", pa.string(), "What the market asks"),
        _column("status", WORD, "The exchange's status, as last known on the day; source rest: when it was fetched"),
        _column("open_ns", pa.int64(), "When the market opens or opened", unit=NANOSECONDS),
        _column("close_ns", pa.int64(), "When the market closes or closed", unit=NANOSECONDS),
        _column("result", WORD, "yes, no or scalar, once determined; source rest: when it was fetched"),
        _column("settlement_value", pa.int64(), "What a YES contract paid", unit=DOLLARS),
        _column(
            "source", WORD, "secmaster, lifecycle or rest: where the row comes from", source=_NORMALISER, null=False
        ),
        _column("detail", pa.string(), "Everything else that is known, as JSON"),
    ]
)

LATE = pa.schema(
    [
        *COMMON,
        _column("table", WORD, "The table that the row belongs to", source=_NORMALISER, null=False),
        _column("row", pa.string(), "The whole row, as JSON", source=_NORMALISER, null=False),
    ]
)

SCHEMAS: Mapping[str, pa.Schema] = MappingProxyType(
    {
        "trade": TRADE,
        "ticker": TICKER,
        "orderbook": ORDERBOOK,
        "lifecycle": LIFECYCLE,
        "coverage": COVERAGE,
        "security_master": SECURITY_MASTER,
        "late": LATE,
    }
)
"""Every table by name, without the metadata of one day."""

TABLE_OF_CHANNEL: Mapping[str, str] = MappingProxyType(
    {"trade": "trade", "orderbook_delta": "orderbook", "ticker": "ticker", "market_lifecycle_v2": "lifecycle"}
)
"""The table that a raw channel's records become rows of; `rest` becomes trades and security master."""


def day_schema(table: str, *, env: str, date: str, revision: int, open_ns: int, close_ns: int) -> pa.Schema:
    """Return a table's schema with the metadata of one day's file."""
    stated = {
        "schema_version": SCHEMA_VERSION,
        "table": table,
        "env": env,
        "date": date,
        "revision": revision,
        "open_ns": open_ns,
        "close_ns": close_ns,
    }
    return SCHEMAS[table].with_metadata({f"ssmd.{key}": str(value) for key, value in stated.items()})


def table_from_rows(table: str, rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """Return a small table of plain rows; keys that a row lacks are null."""
    schema = SCHEMAS[table]
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
