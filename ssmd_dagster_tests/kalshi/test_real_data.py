"""Every public capture and every example of Kalshi's own AsyncAPI file, read without loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from ssmd_dagster.kalshi import wire
from ssmd_dagster.kalshi.markets import read_market
from ssmd_dagster.kalshi.scaled import count_centis, price_micros, rfc3339_ns
from ssmd_dagster.kalshi.socket import read_envelope
from ssmd_dagster_tests.kalshi.fakes import REAL_DATA, SPEC

needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real captures at {REAL_DATA}")
needs_spec = pytest.mark.skipif(not SPEC.is_file(), reason=f"no AsyncAPI file at {SPEC}")

# Which integer of a row holds which key of the wire, and how many places it is scaled by.
SCALED_KEYS = {
    **{f"{name}_dollars": (f"{name}_micros", 6) for name in ("yes_price", "no_price", "price", "yes_bid", "yes_ask")},
    **{f"{name}_fp": (f"{name}_centis", 2) for name in ("count", "delta", "volume", "open_interest")},
    **{f"{name}_size_fp": (f"{name}_size_centis", 2) for name in ("yes_bid", "yes_ask", "last_trade")},
    **{name: (f"{name}_micros", 8) for name in ("yes_price", "no_price", "price", "yes_bid", "yes_ask")},
    **{name: (f"{name}_centis", 2) for name in ("count", "delta", "volume", "open_interest")},
    "settlement_value": ("settlement_value_micros", 6),
    "dollar_volume": ("dollar_volume", 0),
    "dollar_open_interest": ("dollar_open_interest", 0),
    "clock": ("clock", 0),
    "Clock": ("clock", 0),
    "exchange_index": ("exchange_index", 0),
    "open_ts": ("open_ns", 9),
    "close_ts": ("close_ns", 9),
    "determination_ts": ("determination_ns", 9),
    "settled_ts": ("settled_ns", 9),
    "ts_ms": ("event_ns", 6),
}
CENTS = {"yes_price", "no_price", "price", "yes_bid", "yes_ask"}
SAME_KEYS = {
    *("trade_id", "taker_book_side", "is_block_trade", "market_id", "side", "event_type", "result", "is_deactivated"),
    *("price_level_structure", "event_ticker", "series_ticker", "title", "subtitle", "collateral_return_type"),
    *("strike_date", "strike_period", "fee_type_override"),
}


def assert_nothing_lost(message: dict[str, Any], row: Any) -> None:
    """Find every key of the wire's `message` in the row, with the value that it had."""
    assert row.extra is None
    for key, value in message.items():
        if key in SCALED_KEYS:
            name, places = SCALED_KEYS[key]
            finer = key in CENTS and f"{key}_dollars" in message
            if value == "" or finer:
                continue
            scale = 4 if key in CENTS else places
            assert getattr(row, name) == Decimal(value).scaleb(scale), key
        elif key in SAME_KEYS:
            assert getattr(row, key) == (value if value is not None else getattr(row, key)), key
        elif key in ("market_ticker", "ticker"):
            assert row.ticker == value
        elif key == "taker_side":
            assert row.taker_side == message.get("taker_outcome_side", value)
        elif key == "taker_outcome_side":
            assert row.taker_side == value
        elif key in ("yes_dollars_fp", "no_dollars_fp", "yes_dollars", "no_dollars"):
            levels = getattr(row, key.partition("_")[0])
            assert [(Decimal(p).scaleb(-6), Decimal(c).scaleb(-2)) for p, c in levels] == [
                (Decimal(p), Decimal(c)) for p, c in value
            ]
        elif key == "ts":
            assert_time(message, row, value)
        elif key == "time":
            assert row.ts_ns == rfc3339_ns(value)
        elif key == "additional_metadata":
            assert row.metadata == value
        elif key == "price_ranges":
            for one, its in zip(row.price_ranges, value, strict=True):
                exact = [Decimal(its[name]).scaleb(6) for name in ("start", "end", "step")]
                assert [one.start_micros, one.end_micros, one.step_micros] == exact
        elif key == "fee_multiplier_override":
            assert row.fee_multiplier_override == (None if value is None else str(value))
        else:
            assert row.metadata is not None, key
            assert row.metadata[key] == value


def assert_time(message: dict[str, Any], row: Any, value: Any) -> None:
    """The deprecated `ts` is kept where it says more than `ts_ms`, and agrees with it where not."""
    if isinstance(row, wire.Delta):
        assert row.ts_ns == rfc3339_ns(value)
    elif "ts_ms" in message:
        assert row.event_ns // 10**9 == value
    else:
        assert row.event_ns == value * 10**9


def read_frame(text: str) -> tuple[Any, dict[str, Any], Any]:
    """Read a frame's text; return its envelope, its `msg` as plain JSON and the row."""
    envelope = read_envelope(text.encode())
    assert envelope is not None
    plain = json.loads(text, parse_float=Decimal)
    for key in ("type", "sid", "seq", "id"):
        assert getattr(envelope, key) == plain.get(key, getattr(envelope, key))
    row = wire.read(envelope.type, envelope.msg)
    if row is not None:
        assert_nothing_lost(plain["msg"], row)
        if "ts_ms" in plain["msg"] or "ts" in plain["msg"]:
            assert wire.event_time_ns(envelope.msg) == row.event_ns  # type: ignore[union-attr]
    return envelope, plain, row


def frames_of(path: Path) -> list[str]:
    """Return the text frames of a capture."""
    return [json.loads(line)["raw"] for line in path.read_text().splitlines()]


@needs_data
@pytest.mark.parametrize("name", ["ws-kxbtc-2026-04", "ws-kxbtc15m-2026-05", "ws-sports-2026-08", "ws-single-frames"])
def test_real_frames_are_read_without_loss(name: str) -> None:
    """Every frame of every capture, of the cents era and of today."""
    suffix = ".jsonl" if name == "ws-single-frames" else ".frames.jsonl"
    frames = frames_of(REAL_DATA / f"{name}{suffix}")
    assert len(frames) >= 16
    rows = 0
    for text in frames:
        envelope, _, row = read_frame(text)
        rows += row is not None
        expected = "session" if row is None else None
        assert wire.CHANNEL_OF_TYPE.get(envelope.type) != "other"
        assert expected is None or wire.CHANNEL_OF_TYPE[envelope.type] == expected
    assert rows >= 15


@needs_data
def test_the_sports_capture_is_contiguous_over_all_that_carries_seq() -> None:
    """One sid, seq 1 to 268, the `ok` frames counted, and no book level below zero."""
    seqs: list[int] = []
    levels: dict[tuple[str, str, int], int] = {}
    for text in frames_of(REAL_DATA / "ws-sports-2026-08.frames.jsonl"):
        envelope, _, row = read_frame(text)
        if envelope.seq is not None:
            seqs.append(envelope.seq)
        if isinstance(row, wire.Snapshot):
            for side, book in (("yes", row.yes), ("no", row.no)):
                levels.update({(row.ticker, side, price): count for price, count in book})
        elif isinstance(row, wire.Delta):
            key = (row.ticker, row.side, row.price_micros)
            levels[key] = levels.get(key, 0) + row.delta_centis
            assert levels[key] >= 0
    assert seqs == list(range(1, 269))


def examples() -> Iterator[tuple[str, Any]]:
    """Yield name and payload of every server message in the AsyncAPI file's examples."""
    spec = yaml.load(SPEC.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for name, message in spec["components"]["messages"].items():
        for example in message.get("examples", ()):
            payload = example["payload"]
            if isinstance(payload, dict) and "cmd" not in payload:
                yield f"{name}/{example['name']}", payload


MARKET_DATA = {
    *("orderbookSnapshot", "orderbookDelta", "ticker", "trade", "marketLifecycleV2", "marketMetadataUpdated"),
    *("multivariateMarketLifecycle", "eventLifecycle", "eventFeeUpdate"),
}
ANSWERS = {"subscribedResponse", "unsubscribedResponse", "okResponse", "listSubscriptionsResponse", "errorResponse"}


@needs_spec
def test_every_example_of_the_asyncapi_file_is_read_without_loss() -> None:
    """Market data has a meaning, answers belong to the session, the rest is known as other."""
    seen: dict[str, int] = {}
    for name, payload in examples():
        kind = name.partition("/")[0]
        envelope, _, row = read_frame(json.dumps(payload))
        seen[kind] = seen.get(kind, 0) + 1
        channel = wire.CHANNEL_OF_TYPE.get(envelope.type, "other")
        assert (row is not None) == (kind in MARKET_DATA), name
        if kind in ANSWERS or kind.endswith("List"):
            assert channel == "session", name
        elif kind not in MARKET_DATA:
            assert channel == "other", name
        else:
            assert channel in ("trade", "ticker", "orderbook_delta", "market_lifecycle_v2"), name
    assert set(seen) >= MARKET_DATA | ANSWERS
    assert sum(seen.values()) >= 45


def numbers_of(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every `…_dollars` and `…_fp` value below `node`, with its key."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from numbers_of(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from numbers_of(value, key)
    elif key.endswith(("_dollars", "_fp")) and isinstance(node, str):
        yield key, node


def rows_with(node: Any, *keys: str) -> Iterator[dict[str, Any]]:
    """Yield every object below `node` that has all of `keys`."""
    if isinstance(node, dict):
        if all(key in node for key in keys):
            yield node
        for value in node.values():
            yield from rows_with(value, *keys)
    elif isinstance(node, list):
        for value in node:
            yield from rows_with(value, *keys)


def rest_answers() -> list[tuple[str, Any]]:
    """Return name and content of every REST answer."""
    return [(path.stem, json.loads(path.read_bytes())) for path in sorted((REAL_DATA / "rest-2026-08").glob("*.json"))]


@needs_data
def test_every_number_of_every_rest_answer_is_exact() -> None:
    """Prices fit micro-dollars and counts hundredths, whatever the answer."""
    count = 0
    for name, content in rest_answers():
        for key, text in numbers_of(content):
            if text == "":
                continue
            read = price_micros if key.endswith("_dollars") and "." in text and len(text) < 12 else count_centis
            scaled, places = (read(text), 6 if read is price_micros else 2)
            assert Decimal(scaled).scaleb(-places) == Decimal(text), (name, key)
            count += 1
    assert count > 3000


@needs_data
def test_every_market_of_every_rest_answer_becomes_a_row() -> None:
    """Times are read, what trading changes is left out, every other key is kept as it came."""
    count = 0
    for _, content in rest_answers():
        for row in rows_with(content, "ticker", "event_ticker", "open_time", "close_time", "status"):
            market = read_market(row, "SERIES", "Category")
            assert (market.ticker, market.event_ticker, market.status) == (
                row["ticker"],
                row["event_ticker"],
                row["status"],
            )
            assert 0 < market.open_ns == rfc3339_ns(row["open_time"])
            assert market.open_ns < market.close_ns == rfc3339_ns(row["close_time"])
            lost = {key for key in row if key not in market.detail}
            assert all(key.startswith(("yes_", "no_", "last_", "previous_", "volume", "open_", "liqu")) for key in lost)
            assert all(market.detail[key] == row[key] for key in market.detail)
            assert {"rules_primary", "settlement_timer_seconds", "price_ranges", "result"} <= set(market.detail)
            count += 1
    assert count > 100


@needs_data
def test_every_book_of_every_rest_answer_is_read() -> None:
    """Whole books, some with an empty side."""
    count = 0
    for _, content in rest_answers():
        for row in rows_with(content, "orderbook_fp"):
            book = wire.read_book("T", msgspec.json.encode(row["orderbook_fp"]))
            assert_nothing_lost(row["orderbook_fp"], book)
            count += 1
    assert count >= 5
