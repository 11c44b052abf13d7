"""Every message and every REST answer against Kalshi's own schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import ValidationError  # type: ignore[import-untyped]

from ssmd_dagster.simulator.catalog import SECOND_NS
from ssmd_dagster.simulator.engine import Engine
from ssmd_dagster_tests.simulator.conftest import Client, Running, running
from ssmd_dagster_tests.simulator.schemas import DATA, FOLDER, check_answer, check_frame

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="Kalshi's schema files are not beside this checkout")

MARKET_DATA = ("orderbook_delta", "trade", "ticker")
LIFECYCLE = ("market_lifecycle_v2", "multivariate_market_lifecycle")


async def _half_a_day(exchange: Running, client: Client) -> None:
    """Let twelve hours pass in steps, so that markets of every kind are made, open, close and settle."""
    engine: Engine = exchange.simulator.engine
    for _ in range(48):
        engine.shift(engine.clock.offset_ns + 900 * SECOND_NS)
    await client.wait(lambda: any(frame["msg"].get("event_type") == "settled" for frame in client.of(*LIFECYCLE)))


async def test_every_message_of_a_busy_day_fits_the_asyncapi_file(exchange: Running) -> None:
    """Answers, books, trades, tickers and all kinds of lifecycle messages hold what the file asks for, and no more."""
    client = await exchange.connect()
    names = ("KXBTC15M", "KXBTCD", "INXD", "KXNBAGAME")
    tickers = [ticker for series in names for ticker in await exchange.open_tickers(series, 10)]
    await client.subscribe(*MARKET_DATA, market_tickers=tickers)
    await client.subscribe(*LIFECYCLE)
    await client.wait(lambda: len(client.of("trade")) > 30 and len(client.of("ticker")) > 30)
    await client.send("update_subscription", sid=1, action="get_snapshot", market_tickers=tickers[:3])
    await client.send("update_subscription", sid=1, action="delete_markets", market_tickers=tickers[:1])
    await client.send("update_subscription", sid=2, action="get_snapshot", market_tickers=tickers[:1])
    await client.send("list_subscriptions")
    await client.send("unsubscribe", sids=[2])
    await client.send("dance")
    await client.until(lambda frame: frame["type"] == "unsubscribed")
    await _half_a_day(exchange, client)
    for frame in client.frames:
        check_frame(frame)
    seen = {frame["msg"]["event_type"] for frame in client.of(*LIFECYCLE)}
    assert seen >= {"created", "determined", "settled", "metadata_updated"}
    assert {frame["type"] for frame in client.frames} >= {*LIFECYCLE, "event_lifecycle", "orderbook_snapshot"}


async def test_a_game_day_has_the_rare_messages(tmp_path: Path) -> None:
    """Games are interrupted, end early and have their own fees, and each of these messages fits the file."""
    async with running(tmp_path, series=("KXNBAGAME",), markets=40) as exchange:
        client = await exchange.connect()
        await client.subscribe("market_lifecycle_v2")
        engine = exchange.simulator.engine
        for _ in range(30):
            engine.shift(engine.clock.offset_ns + 3_600 * SECOND_NS)
        wanted = {"deactivated", "activated", "close_date_updated", "determined"}
        await client.wait(
            lambda: wanted <= {frame["msg"].get("event_type") for frame in client.of("market_lifecycle_v2")}
        )
        await client.until(lambda frame: frame["type"] == "event_fee_update")
        for frame in client.frames:
            check_frame(frame)


async def test_every_answer_fits_the_openapi_file(exchange: Running) -> None:
    """Lists and single objects of markets, events, series, books, trades and the exchange's state."""
    engine = exchange.simulator.engine
    engine.shift(12 * 3_600 * SECOND_NS)
    while len(engine.trades) < 50:
        engine._burst(500)
    markets = await exchange.get("/markets", limit=1_000)
    check_answer("GetMarketsResponse", markets)
    statuses = {market["status"] for market in markets["markets"]}
    assert statuses >= {"active", "initialized", "finalized"}
    ticker, event = markets["markets"][-1]["ticker"], markets["markets"][-1]["event_ticker"]
    check_answer("GetMarketResponse", await exchange.get(f"/markets/{ticker}"))
    check_answer("GetMarketOrderbookResponse", await exchange.get(f"/markets/{ticker}/orderbook"))
    check_answer("GetMarketOrderbooksResponse", await exchange.get("/markets/orderbooks", tickers=ticker))
    check_answer("GetEventsResponse", await exchange.get("/events"))
    check_answer("GetEventsResponse", await exchange.get("/events", with_nested_markets="true", limit=20))
    check_answer("GetMultivariateEventsResponse", await exchange.get("/events/multivariate"))
    check_answer("GetEventResponse", await exchange.get(f"/events/{event}"))
    check_answer("GetEventResponse", await exchange.get(f"/events/{event}", with_nested_markets="true"))
    check_answer("GetSeriesListResponse", await exchange.get("/series", include_volume="true"))
    check_answer("GetSeriesResponse", await exchange.get("/series/KXBTCD"))
    check_answer("GetTradesResponse", await exchange.get("/markets/trades", limit=50))
    check_answer("ExchangeStatus", await exchange.get("/exchange/status"))
    check_answer("GetExchangeScheduleResponse", await exchange.get("/exchange/schedule"))
    check_answer("GetHistoricalCutoffResponse", await exchange.get("/historical/cutoff"))
    check_answer("GetTradesResponse", await exchange.get("/historical/trades"))
    check_answer("GetMarketsResponse", await exchange.get("/historical/markets"))
    check_answer("GetUserDataTimestampResponse", await exchange.get("/exchange/user_data_timestamp"))


async def test_keys_come_in_the_order_of_real_captures(exchange: Running) -> None:
    """Snapshots, deltas and trades begin as recorded ones do; what is newer than the captures follows."""
    client = await exchange.connect()
    await client.subscribe("orderbook_delta", "trade", market_tickers=await exchange.open_tickers("KXBTCD"))
    await client.wait(lambda: bool(client.of("trade")))
    orders = {frame["type"]: (list(frame), list(frame["msg"])) for frame in client.frames}
    newer = {"clock", "sending_ts_ms", "is_block_trade", "ts_ms"}
    lines = (DATA / "ws-kxbtc-2026-04.frames.jsonl").read_text().splitlines()
    lines += (DATA / "ws-single-frames.jsonl").read_text().splitlines()
    compared = set()
    for line in lines:
        real = json.loads(json.loads(line)["raw"])
        if real["type"] in orders and real["type"] != "ticker" and "yes_price" not in real["msg"]:
            envelope, msg = orders[real["type"]]
            assert [key for key in envelope if key in real] == [key for key in real if key in envelope]
            assert [key for key in msg if key in real["msg"]] == [key for key in real["msg"] if key in msg]
            assert set(envelope) - set(real) <= newer
            compared.add(real["type"])
    assert compared >= {"orderbook_snapshot", "orderbook_delta", "trade", "subscribed"}


async def test_index_channels_fit_the_asyncapi_file(exchange: Running) -> None:
    """Indices are listed, added, taken away, and their ticks hold what the file asks for."""
    client = await exchange.connect()
    slow, fast = await client.subscribe("cfbenchmarks_value", "cfbenchmarks_value_5hz", index_ids=["BRTI"])
    (pyth,) = await client.subscribe("pyth_value", underlying_tickers=["all"])
    for sid, action in ((slow, "indexlist"), (fast, "indexlist"), (pyth, "underlying_list")):
        assert "sid" in await client.answer(await client.send("update_subscription", sid=sid, action=action))
    added = await client.send("update_subscription", sid=slow, action="subscribe_indices", index_ids=["ETHUSD_RTI"])
    assert (await client.answer(added))["msg"]["index_ids"] == ["BRTI", "ETHUSD_RTI"]
    taken = await client.send("update_subscription", sid=slow, action="unsubscribe_indices", index_ids=["BRTI"])
    assert (await client.answer(taken))["msg"]["index_ids"] == ["ETHUSD_RTI"]
    empty = await client.send("update_subscription", sid=slow, action="subscribe_indices")
    assert (await client.answer(empty))["msg"]["code"] == 24
    for kind in ("cfbenchmarks_value", "cfbenchmarks_value_5hz", "pyth_value"):
        await client.until(lambda frame, kind=kind: frame["type"] == kind)  # type: ignore[misc]
    for frame in client.frames:
        check_frame(frame)


def test_the_schemas_are_really_asked() -> None:
    """A message that lacks a key, or has one too many, is refused."""
    good = {"type": "subscribed", "id": 1, "msg": {"channel": "trade", "sid": 1}, "sending_ts_ms": 5}
    check_frame(good)
    for bad in ({**good, "more": 1}, {**good, "msg": {"sid": 1}}, {**good, "id": "one"}):
        with pytest.raises(ValidationError):
            check_frame(bad)
    with pytest.raises(ValidationError):
        check_answer("GetMarketsResponse", {"markets": [{"ticker": "A"}], "cursor": ""})
