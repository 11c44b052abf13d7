"""Blocks read as a whole and records read one by one give the same rows, the same rejections and the same unknown keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.columns import LOOSE, BlockRows, read_block
from ssmd_dagster.archive.drift import MAX_FINGERPRINTS, MORE, DriftLog
from ssmd_dagster.archive.records import wire_line
from ssmd_dagster.exchange import Columns, RowReader, row_reader
from ssmd_dagster.kalshi.rows import wire_table
from ssmd_dagster_tests.archive.rawdays import NS_NOON, delta, rest_page, snapshot, ticker_message, trade

CHANNELS = ("trade", "orderbook_delta", "ticker")
KALSHI = row_reader("kalshi")


class Patient:
    """Kalshi's reader without reading blocks as a whole."""

    def wire_type(self, _channel: str) -> None:
        """Offer no such way."""

    def columns(self, channel: str, messages: Any) -> Columns:
        """Is never asked."""
        raise AssertionError(channel)

    def pages(self, _messages: Any) -> None:
        """Offer no such way."""

    def rows(self, message: bytes) -> Any:
        """Read one message."""
        return KALSHI.rows(message)


def plain(block: BlockRows) -> tuple[Any, ...]:
    """Return a block's rows and accounts in a form that can be compared; rows in the order of their records."""
    tables = {
        name: sorted(table.to_pylist(), key=lambda row: (row["n"], row.get("msg", 0)))
        for name, table in block.tables.items()
        if table.num_rows
    }
    drift = {(one.kind, one.name, one.json_type): one.count for one in block.drift}
    return block.records, tables, block.control, dict(block.rejected), drift


def both_ways(channel: str, payloads: list[bytes]) -> tuple[BlockRows, BlockRows]:
    """Read a block in both ways."""
    records = b"".join(wire_line(n, NS_NOON + n, payload) for n, payload in enumerate(payloads))
    patient: RowReader = Patient()
    return read_block(KALSHI, channel, records), read_block(patient, channel, records)


GOOD = {
    "trade": trade("T.1", 7, NS_NOON),
    "orderbook_delta": delta("T.1", 3, NS_NOON, -1250, clock=9, ts="2026-05-29T23:18:53Z"),
    "ticker": ticker_message("T.1", NS_NOON, 5),
}
NUMBERS = st.one_of(
    st.decimals(-(10**7), 10**7, places=4).map(str),
    st.decimals(0, 1, places=6).map(str),
    st.integers(-(10**12), 10**12).map(lambda number: f"{number / 100:.2f}"),
    st.sampled_from(
        ["", "0", "-0", "+1.00", "1e5", ".5", "5.", "0x1.00", "0X10.0", "NaN", "1.005", "1_0.00", " 1.00", "--1.0"]
    ),
    st.sampled_from(["9" * 30 + ".00", "1.0000000", "1.000000", "00012.50", "12.5٣", "1.-5", "1.+5", "-.50", "1..0"]),
    st.text("0123456789.-+ex ", max_size=8),
)
TIMES = st.one_of(
    st.datetimes().map(lambda at: at.isoformat() + "Z"),
    st.sampled_from(
        [
            "2026-05-29T23:18:53Z", "2026-05-29T23:18:53.1Z", "2026-05-29 23:18:53.123Z", "2026-05-29T23:18:53+00:00",
            "2026-02-30T00:00:00Z", "2026-05-29T24:00:00Z", "2026-05-29T23:18:60Z", "1600-01-01T00:00:00.000000Z", "",
            "1780096733", "2026-05-29T23:18:53.123456Z", "2026-05-29T23:18:53+0000", "9999-12-31T23:59:59Z",
        ]
    ),
)  # fmt: skip
ANYTHING = st.one_of(
    NUMBERS,
    TIMES,
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["yes", "no", "bid", "T.2", "é", "a\\b", [], {}, [["0.5000", "1.00"]], {"a": 1}, {"a": None}]),
)


@st.composite
def payloads(draw: st.DrawFn, channel: str) -> bytes:
    """Return a message of a channel with some of its values and keys changed."""
    frame = json.loads(
        draw(st.sampled_from([GOOD[channel], GOOD[channel], snapshot("T.1", 4, 500), b'{"type":"ok","msg":{}}']))
    )
    message = frame["msg"]
    for key in draw(st.lists(st.sampled_from(sorted(message) or ["x"]), max_size=2)):
        kinds = NUMBERS if isinstance(message.get(key), str) and "." in message[key] else ANYTHING
        message[key] = draw(TIMES if key in ("ts", "time") else kinds)
    for key in draw(st.lists(st.sampled_from(sorted(message) or ["x"]), max_size=1)):
        message.pop(key, None)
    news = [
        "mood",
        "price",
        "yes_price",
        "count",
        "yes_bid",
        "clock",
        "Clock",
        "ticker",
        "yes_dollars_fp",
        "created_time",
    ]
    for key in draw(st.lists(st.sampled_from(news), max_size=1)):
        message[key] = draw(ANYTHING)
    for key in draw(st.lists(st.sampled_from(["sid", "seq", "id", "sending_ts_ms", "type", "mood"]), max_size=1)):
        frame[key] = draw(ANYTHING)
    return json.dumps(frame).encode()


@pytest.mark.parametrize("channel", CHANNELS)
def test_todays_messages_are_read_as_a_whole(channel: str) -> None:
    """What the exchange sends today never takes the slow way."""
    records = b"".join(wire_line(n, NS_NOON, GOOD[channel]) for n in range(5))
    wire_type = KALSHI.wire_type(channel)
    assert wire_type is not None

    class Quick(Patient):
        def wire_type(self, channel: str) -> Any:
            return KALSHI.wire_type(channel)

        def columns(self, channel: str, messages: Any) -> Columns:
            return KALSHI.columns(channel, messages)

        def rows(self, message: bytes) -> Any:
            raise AssertionError(message)

    table = read_block(Quick(), channel, records).tables[wire_table(channel)]
    assert table.schema == LOOSE[wire_table(channel)]
    assert table.num_rows == 5


@pytest.mark.parametrize("channel", CHANNELS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_ways_of_reading_agree(channel: str, data: st.DataObject) -> None:
    """Whatever the messages hold, the rows are the same, and so is what is said of the others."""
    block, patient = both_ways(channel, data.draw(st.lists(payloads(channel), min_size=1, max_size=4)))
    assert plain(block) == plain(patient)


@st.composite
def rest_payloads(draw: st.DrawFn) -> bytes:
    """Return a recorded page of up to three trades; of some a value or a key is changed."""
    messages = [json.loads(trade("T.1", n, NS_NOON))["msg"] for n in range(draw(st.integers(0, 3)))]
    page = json.loads(rest_page(messages))
    for row in page["msg"]["trades"]:
        for key in draw(st.lists(st.sampled_from([*sorted(row), "ts_ms", "mood"]), max_size=1)):
            row[key] = draw(TIMES if key == "created_time" else st.one_of(NUMBERS, ANYTHING))
        for key in draw(st.lists(st.sampled_from(sorted(row)), max_size=1)):
            row.pop(key)
    page["type"] = draw(st.sampled_from(["rest_trades"] * 6 + ["rest_markets", "ok"]))
    return json.dumps(page).encode()


@settings(max_examples=80, deadline=None)
@given(pages=st.lists(rest_payloads(), min_size=1, max_size=3))
def test_pages_are_the_same_read_as_a_whole_and_row_by_row(pages: list[bytes]) -> None:
    """Whatever a page of REST holds, its rows are the same, and so is what is said of those that cannot be read."""
    block, patient = both_ways("rest", pages)
    assert plain(block) == plain(patient)
    assert block.rejected_pages == patient.rejected_pages


def test_pages_of_today_are_read_as_a_whole() -> None:
    """Pages of trades never take the slow way, those without a trade neither, however many there are."""
    messages = [json.loads(trade("T.1", n, NS_NOON))["msg"] for n in range(1_500)]
    pages = [rest_page(messages), rest_page([]), rest_page(messages[:1])]
    found = KALSHI.pages(pages)
    assert found is not None
    assert found[1] == [1_500, 0, 1]
    block, patient = both_ways("rest", pages * 2)
    assert plain(block) == plain(patient)
    assert (block.control, block.tables["trade"].num_rows) == (2, 3_002)


@pytest.mark.parametrize("channel", CHANNELS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(NUMBERS, min_size=1, max_size=6))
def test_numbers_are_exact_in_both_ways(channel: str, texts: list[str]) -> None:
    """Every text of a price or count is the same integer, or is refused, in both ways."""
    key = {"trade": "yes_price_dollars", "orderbook_delta": "delta_fp", "ticker": "volume_fp"}[channel]
    changed = []
    for text in texts:
        frame = json.loads(GOOD[channel])
        frame["msg"][key] = text
        changed.append(json.dumps(frame).encode())
    block, patient = both_ways(channel, changed)
    assert plain(block) == plain(patient)


def test_unknown_keys_are_counted_with_an_example() -> None:
    """A key that the exchange added is drift, not an error; null is no value."""
    frames = [json.loads(GOOD["trade"]) for _ in range(4)]
    frames[1]["msg"]["mood"] = {"a": 1}
    frames[2]["msg"]["mood"] = {"a": 2}
    frames[3]["msg"]["mood"] = None
    frames[3]["shard"] = 4
    block, patient = both_ways("trade", [json.dumps(frame).encode() for frame in frames])
    assert plain(block) == plain(patient)
    found = {one.name: one for one in block.drift}
    assert (found["trade.msg.mood"].count, found["trade.msg.mood"].json_type) == (2, "object")
    assert '"n":1,' in found["trade.msg.mood"].example
    assert found["trade.shard"].json_type == "number"


def test_a_flood_of_fingerprints_is_bounded() -> None:
    """An exchange that sends random keys fills neither memory nor the report."""
    log = DriftLog()
    for n in range(MAX_FINGERPRINTS + 50):
        log.add("key", f"trade.msg.k{n}", "string", 1, b"x" * 5_000)
    found = log.found()
    assert len(found) == MAX_FINGERPRINTS + 1
    assert next(one for one in found if one.name == MORE).count == 50
    assert max(len(one.example) for one in found) <= 500
