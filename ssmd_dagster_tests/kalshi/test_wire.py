"""What messages mean, in both eras, and what becomes of those that cannot be read."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.kalshi import wire
from ssmd_dagster.kalshi.wire import WireError, event_time_ns, read, read_book, read_trade

MS = 1_669_149_841_000
NS = MS * 1_000_000
TRADE = {
    "trade_id": "t-1",
    "market_ticker": "HIGHNY-22DEC23-B53.5",
    "yes_price_dollars": "0.3605",
    "no_price_dollars": "0.6395",
    "count_fp": "136.25",
    "taker_side": "no",
    "taker_outcome_side": "no",
    "taker_book_side": "ask",
    "is_block_trade": False,
    "ts": 1_669_149_841,
    "ts_ms": MS,
}
DELTA = {
    "market_ticker": "A",
    "market_id": "id",
    "clock": 7,
    "price_dollars": "0.9605",
    "delta_fp": "-54.01",
    "side": "yes",
    "ts": "2022-11-22T20:44:01.000123Z",
    "ts_ms": MS,
}


def raw(message: Any) -> bytes:
    """Encode a message's `msg`."""
    return msgspec.json.encode(message)


def test_a_trade_of_today_is_read() -> None:
    """Every key has its place, exactly."""
    assert read("trade", raw(TRADE)) == wire.Trade(
        trade_id="t-1",
        ticker="HIGHNY-22DEC23-B53.5",
        yes_price_micros=360_500,
        no_price_micros=639_500,
        count_centis=13_625,
        taker_side="no",
        taker_book_side="ask",
        is_block_trade=False,
        event_ns=NS,
    )


def test_a_trade_is_the_same_over_rest() -> None:
    """REST names the market and the time otherwise."""
    row = {key: value for key, value in TRADE.items() if key not in ("market_ticker", "ts", "ts_ms")}
    rest = read_trade(raw(row | {"ticker": "HIGHNY-22DEC23-B53.5", "created_time": "2022-11-22T20:44:01Z"}))
    assert rest == read("trade", raw(TRADE))


def test_a_trade_of_the_cents_era_is_read() -> None:
    """Integer cents and whole contracts; where dollars stand beside them, these count."""
    old = {"trade_id": "t", "market_ticker": "A", "yes_price": 27, "no_price": 73, "count": 7, "taker_side": "yes"}
    trade = read("trade", raw(old | {"ts": 1_759_350_609}))
    assert isinstance(trade, wire.Trade)
    assert (trade.yes_price_micros, trade.no_price_micros, trade.count_centis) == (270_000, 730_000, 700)
    assert (trade.taker_side, trade.event_ns, trade.extra) == ("yes", 1_759_350_609 * 10**9, None)
    both = read("trade", raw(old | {"yes_price_dollars": "0.2750", "no_price_dollars": "0.7250", "count_fp": "7.50"}))
    assert isinstance(both, wire.Trade)
    assert (both.yes_price_micros, both.count_centis, both.event_ns, both.extra) == (275_000, 750, None, None)


def test_a_delta_keeps_both_its_times() -> None:
    """`ts_ms` is the event time as on the other channels; the finer `ts` is kept beside it."""
    delta = read("orderbook_delta", raw(DELTA))
    assert delta == wire.Delta(
        ticker="A",
        market_id="id",
        side="yes",
        price_micros=960_500,
        delta_centis=-5_401,
        clock=7,
        event_ns=NS,
        ts_ns=NS + 123_000,
    )
    old = read("orderbook_delta", raw({"market_ticker": "A", "price": 96, "delta": -54, "side": "no"}))
    assert isinstance(old, wire.Delta)
    assert (old.price_micros, old.delta_centis, old.event_ns, old.clock) == (960_000, -5_400, None, None)


@pytest.mark.parametrize(
    ("keys", "yes", "no"),
    [
        ({"yes_dollars_fp": [["0.0800", "300.00"], ["0.2205", "0.01"]]}, ((80_000, 30_000), (220_500, 1)), ()),
        ({"yes_dollars": [["0.08", 300]], "no_dollars": []}, ((80_000, 30_000),), ()),
        ({"yes": [[8, 300]], "no": [[54, 20], [56, 146]]}, ((80_000, 30_000),), ((540_000, 2_000), (560_000, 14_600))),
        ({"yes": None}, (), ()),
        ({}, (), ()),
    ],
)
def test_snapshots_of_every_era_are_read(keys: dict[str, Any], yes: Any, no: Any) -> None:
    """An empty side is absent, empty or null."""
    snapshot = read("orderbook_snapshot", raw({"market_ticker": "A", "market_id": "i", "clock": 3} | keys))
    assert snapshot == wire.Snapshot(ticker="A", market_id="i", clock=3, yes=yes, no=no)


def test_a_book_over_rest_is_a_snapshot() -> None:
    """`orderbook_fp` has other key names, and no ticker of its own."""
    book = read_book("A", raw({"yes_dollars": [["0.812000", "3.00"]], "no_dollars": []}))
    assert book == wire.Snapshot(ticker="A", market_id=None, clock=None, yes=((812_000, 300),), no=())


def test_a_market_never_traded_has_no_price() -> None:
    """Its price was an empty string, beside a zero of cents that means nothing."""
    old = {"market_ticker": "A", "price": 0, "yes_bid": 0, "yes_ask": 3, "price_dollars": "", "yes_ask_dollars": "0.03"}
    ticker = read("ticker", raw(old | {"dollar_volume": -1, "Clock": 5, "ts": 1_759_351_915}))
    assert isinstance(ticker, wire.Ticker)
    assert (ticker.price_micros, ticker.yes_bid_micros, ticker.yes_ask_micros) == (None, 0, 30_000)
    assert (ticker.dollar_volume, ticker.clock, ticker.volume_centis, ticker.extra) == (-1, 5, None, None)
    zero = read("ticker", raw({"market_ticker": "A", "price_dollars": "0.0000"}))
    assert isinstance(zero, wire.Ticker)
    assert zero.price_micros == 0


def test_unknown_keys_are_kept() -> None:
    """The wire grows without notice; what is new is not lost on the way into a table."""
    trade = read("trade", raw(TRADE | {"brand_new": {"a": [1, 0.25]}}))
    assert isinstance(trade, wire.Trade)
    assert str(trade.extra) == "{'brand_new': {'a': [1, Decimal('0.25')]}}"


def test_numbers_may_become_json_numbers() -> None:
    """A string that turns into a number, or the other way round, is still exact."""
    prices = b'"yes_price_dollars":0.3605,"no_price_dollars":0.6395,"count_fp":136.25'
    trade = read_trade(b'{"trade_id":"t","ticker":"A",%b,"ts_ms":"%d"}' % (prices, MS))
    assert (trade.yes_price_micros, trade.no_price_micros, trade.count_centis) == (360_500, 639_500, 13_625)
    assert trade.event_ns == NS


@pytest.mark.parametrize(
    ("message_type", "message", "reason"),
    [
        ("trade", {key: value for key, value in TRADE.items() if key != "count_fp"}, "count_fp is missing"),
        ("trade", TRADE | {"yes_price_dollars": "a lot"}, "yes_price_dollars: not a decimal number"),
        ("trade", TRADE | {"trade_id": 5}, "trade_id: expected a string"),
        ("trade", TRADE | {"is_block_trade": "no"}, "is_block_trade: expected true or false"),
        ("trade", TRADE | {"count_fp": "0.001"}, "count_fp: more than 2 decimal places"),
        ("orderbook_delta", DELTA | {"side": "maybe"}, "side: expected yes or no"),
        ("orderbook_delta", DELTA | {"ts_ms": "soon"}, "ts_ms: not a decimal number"),
        ("orderbook_snapshot", {"market_ticker": "A", "yes_dollars_fp": [["0.1"]]}, "yes_dollars_fp: "),
        ("orderbook_snapshot", {"market_ticker": "A", "yes_dollars_fp": 5}, "yes_dollars_fp: "),
        ("orderbook_snapshot", {}, "market_ticker is missing"),
        ("market_lifecycle_v2", {"market_ticker": "A"}, "event_type is missing"),
        (
            "market_lifecycle_v2",
            {"market_ticker": "A", "event_type": "x", "additional_metadata": 1},
            "expected an object",
        ),
        ("ticker", [1], "not a JSON object"),
        ("ticker", None, "not a JSON object"),
    ],
)
def test_what_cannot_be_read_has_a_reason(message_type: str, message: Any, reason: str) -> None:
    """The reason names the key and is short enough to be counted by."""
    with pytest.raises(WireError, match=reason) as caught:
        read(message_type, raw(message))
    assert len(str(caught.value)) < 150


@given(st.sampled_from(sorted(wire._READERS)), st.binary(max_size=40) | st.dictionaries(st.text(), st.text()).map(raw))
def test_rubbish_is_a_wire_error_and_nothing_else(message_type: str, content: bytes) -> None:
    """Whatever comes, the reader answers with a row or a reason."""
    with contextlib.suppress(WireError):
        read(message_type, content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
)


@given(st.sampled_from(sorted(wire._READERS)), st.data())
def test_known_keys_with_odd_values_are_a_wire_error_or_a_row(message_type: str, data: st.DataObject) -> None:
    """Right keys with wrong types neither crash nor pass for numbers."""
    keys = st.sampled_from(
        [*TRADE, *DELTA, "yes_dollars_fp", "additional_metadata", "price_ranges", "event_type", "event_ticker"]
    )
    message = data.draw(st.dictionaries(keys, JSON, max_size=12))
    with contextlib.suppress(WireError):
        read(message_type, raw(message))


def test_types_that_are_no_market_data_have_no_meaning_here() -> None:
    """They are archived all the same."""
    assert read("subscribed", b"{}") is None
    assert read("never_seen", b"rubbish") is None


@pytest.mark.parametrize(
    ("message", "expected_ns"),
    [
        ({"ts_ms": MS, "ts": 5, "created_time": "x"}, NS),
        ({"ts": 1_669_149_841}, NS),
        ({"ts": "2022-11-22T20:44:01Z"}, NS),
        ({"created_time": "2022-11-22T20:44:01.5Z"}, NS + 500_000_000),
        ({"ts_ms": "soon"}, None),
        ({"ts_ms": None, "ts": None}, None),
        ({}, None),
        ([], None),
    ],
)
def test_the_event_time_is_ts_ms_or_ts_or_created_time(message: Any, expected_ns: int | None) -> None:
    """Nothing else of the message matters, and an unreadable time is none."""
    assert event_time_ns(raw(message)) == expected_ns


def test_the_event_time_of_a_message_equals_the_rows() -> None:
    """One rule for filing and for reading."""
    for message_type, message in (("trade", TRADE), ("orderbook_delta", DELTA)):
        row = read(message_type, raw(message))
        assert isinstance(row, wire.Trade | wire.Delta)
        assert row.event_ns == event_time_ns(raw(message))


TICKER = {
    "market_ticker": "A",
    "market_id": "id",
    "price_dollars": "0.4800",
    "yes_bid_dollars": "0.4500",
    "yes_ask_dollars": "0.5300",
    "volume_fp": "33896.00",
    "open_interest_fp": "20422.00",
    "dollar_volume": 16948,
    "dollar_open_interest": -10211,
    "yes_bid_size_fp": "300.00",
    "yes_ask_size_fp": "150.25",
    "last_trade_size_fp": "25.00",
    "ts": 1_669_149_841,
    "ts_ms": MS,
    "time": "2022-11-22T20:44:01.123Z",
}
TODAY = {"trade": TRADE, "orderbook_delta": DELTA, "ticker": TICKER}


def slowly(message_type: str, content: bytes) -> Any:
    """Read by key; the reason where that is not possible."""
    try:
        return wire._READERS[message_type](wire._object(content))
    except WireError as error:
        return str(error)


@given(st.sampled_from(sorted(TODAY)), st.data())
def test_the_quick_reader_and_the_patient_one_agree(message_type: str, data: st.DataObject) -> None:
    """Whatever is changed in or left out of a message of today, both read the same or refuse it for the same reason."""
    today = TODAY[message_type]
    message = dict(today)
    for key in data.draw(st.lists(st.sampled_from([*today, "brand_new"]), max_size=2)):
        message.pop(key, None)
        if data.draw(st.booleans()):
            message[key] = data.draw(JSON | st.sampled_from(["", "0.5", "yes", "2022-11-22T20:44:01Z", 5, True]))
    content = raw(message)
    try:
        row: Any = read(message_type, content)
    except WireError as error:
        row = str(error)
    assert row == slowly(message_type, content)


def test_messages_of_today_take_the_quick_way() -> None:
    """The examples of each are read by it, so that the property above is about both ways."""
    for message_type, message in TODAY.items():
        assert wire._QUICK[message_type](raw(message)) == slowly(message_type, raw(message))
