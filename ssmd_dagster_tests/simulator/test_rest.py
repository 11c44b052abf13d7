"""The REST side and the control surface."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ssmd_dagster.simulator import catalog
from ssmd_dagster.simulator.catalog import SECOND_NS
from ssmd_dagster_tests.simulator.conftest import Running, running, sign

THURSDAY_PAUSE = "2026-11-26T08:30:00Z"


async def _all(exchange: Running, path: str, key: str, **params: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await exchange.get(path, cursor=cursor, **params)
        rows += page[key]
        cursor = page["cursor"]
        if not cursor:
            return rows


async def test_pages_of_markets_join_without_a_hole(exchange: Running) -> None:
    """Walking with small pages gives the same markets as one large page, each once."""
    whole = [market["ticker"] for market in (await exchange.get("/markets", limit=1_000))["markets"]]
    for limit in (7, 50):
        walked = [market["ticker"] for market in await _all(exchange, "/markets", "markets", limit=limit)]
        assert walked == whole
    assert len(set(whole)) == len(whole) > 60


async def test_markets_can_be_filtered_as_on_kalshi(exchange: Running) -> None:
    """By series, event, tickers, status, combos and times; combinations that Kalshi refuses are refused."""
    rows = await _all(exchange, "/markets", "markets", limit=1_000)
    some = rows[5]
    event = await exchange.get("/markets", event_ticker=some["event_ticker"])
    assert {market["event_ticker"] for market in event["markets"]} == {some["event_ticker"]}
    named = await exchange.get("/markets", tickers=f"{rows[3]['ticker']},{some['ticker']},NOPE")
    assert {market["ticker"] for market in named["markets"]} == {rows[3]["ticker"], some["ticker"]}
    for status, shown in (("open", "active"), ("unopened", "initialized"), ("settled", "finalized")):
        found = await _all(exchange, "/markets", "markets", status=status, limit=1_000)
        assert {market["status"] for market in found} == {shown}
    plain = await _all(exchange, "/markets", "markets", mve_filter="exclude", limit=1_000)
    combos = await _all(exchange, "/markets", "markets", mve_filter="only", limit=1_000)
    assert len(plain) + len(combos) == len(rows)
    assert all(market["ticker"].startswith("KXMVE") for market in combos)
    now_s = exchange.simulator.clock() // SECOND_NS
    soon = await _all(exchange, "/markets", "markets", min_close_ts=now_s, max_close_ts=now_s + 900, limit=1_000)
    assert soon
    limits = (datetime.fromtimestamp(at_s, UTC) for at_s in (now_s, now_s + 900))
    earliest, latest = (limit.isoformat().replace("+00:00", "Z") for limit in limits)
    assert all(earliest <= market["close_time"] <= latest for market in soon)
    for wrong in (
        {"min_close_ts": 1, "max_created_ts": 2},
        {"status": "odd"},
        {"limit": 1_001},
        {"limit": "ten"},
        {"mve_filter": "maybe"},
        {"cursor": "!!"},
    ):
        await exchange.get("/markets", expect=400, **wrong)


async def test_events_and_series_belong_together(exchange: Running) -> None:
    """Each market's event is listed with its series and category, combos only under their own path."""
    events = {row["event_ticker"]: row for row in await _all(exchange, "/events", "events", limit=20)}
    combos = {row["event_ticker"] for row in await _all(exchange, "/events/multivariate", "events")}
    series = {row["ticker"]: row for row in (await exchange.get("/series"))["series"]}
    for market in await _all(exchange, "/markets", "markets", limit=1_000):
        if market["event_ticker"] in combos:
            continue
        event = events[market["event_ticker"]]
        assert series[event["series_ticker"]]["category"] == event["category"]
    crypto = (await exchange.get("/series", category="Crypto"))["series"]
    assert {row["ticker"] for row in crypto} == {name for name, row in series.items() if row["category"] == "Crypto"}
    opened = await _all(
        exchange, "/events", "events", status="open", series_ticker="KXBTCD", with_nested_markets="true"
    )
    assert opened
    assert all(market["status"] == "active" for event in opened for market in event["markets"])
    await exchange.get("/series/NOPE", expect=404)
    await exchange.get("/events/NOPE", expect=404)
    await exchange.get("/markets/NOPE", expect=404)
    await exchange.get("/nothing/here", expect=404)


async def test_order_books_are_ascending_and_limited(exchange: Running) -> None:
    """Best prices stand last; `depth` keeps them; both forms of the batch parameter work."""
    tickers = await exchange.open_tickers("KXBTCD", 3)
    await exchange.simulator.stop_moving()
    book = (await exchange.get(f"/markets/{tickers[0]}/orderbook"))["orderbook_fp"]
    for side in ("yes_dollars", "no_dollars"):
        assert book[side] == sorted(book[side])
    shallow = (await exchange.get(f"/markets/{tickers[0]}/orderbook", depth=2))["orderbook_fp"]
    assert shallow["yes_dollars"] == book["yes_dollars"][-2:]
    batch = await exchange.get("/markets/orderbooks", tickers=",".join(tickers))
    assert [row["ticker"] for row in batch["orderbooks"]] == tickers
    await exchange.get("/markets/orderbooks", expect=400)


async def test_signed_requests_are_checked_and_unsigned_ones_pass(exchange: Running) -> None:
    """A good signature passes, a bad one is refused with 401 and a nested body."""
    path = "/trade-api/v2/markets"
    await exchange.get("/markets", headers=sign(exchange.home, "GET", path), limit=1)
    bad = sign(exchange.home, "GET", "/trade-api/v2/events")
    assert (await exchange.get("/markets", expect=401, headers=bad))["error"]["code"] == "token_authentication_failure"
    old = sign(exchange.home, "GET", path, stamp_ms=1_000)
    assert (await exchange.get("/markets", expect=401, headers=old))["error"]["code"] == "header_timestamp_expired"


async def test_an_exchange_may_ask_for_no_keys(tmp_path: Path) -> None:
    """With `--no-auth` any handshake is taken, and no key is made."""
    async with running(tmp_path, auth=False) as exchange:
        client = await exchange.connect(headers={})
        await client.subscribe("trade")
        assert not (tmp_path / "private_key.pem").exists()


async def test_moving_the_clock_moves_everything(exchange: Running) -> None:
    """A day later there are open markets of the new day, messages and trades carry its time, and old days have settled."""
    before = set(await exchange.open_tickers("KXBTC15M", 50))
    client = await exchange.connect()
    await client.subscribe("trade", "market_lifecycle_v2")
    await exchange.post("/sim/clock", advance_s=86_400)
    now_ms = time.time_ns() // 1_000_000 + 86_400_000
    late = await client.until(lambda frame: frame["type"] == "trade" and frame["msg"]["ts_ms"] > now_ms - 60_000)
    assert abs(late["msg"]["ts_ms"] - now_ms) < 60_000
    after = set(await exchange.open_tickers("KXBTC15M", 50))
    assert after
    assert not after & before
    page = await exchange.get("/markets/trades", min_ts=now_ms // 1_000 - 60, limit=10)
    assert page["trades"]
    settled = await client.until(lambda frame: frame["msg"].get("event_type") == "settled")
    assert settled["msg"]["settled_ts"] > now_ms // 1_000 - 2 * 86_400
    set_to = await exchange.post("/sim/clock", set="2027-03-01T00:00:00Z")
    assert abs(set_to["now_ns"] - 1_803_859_200 * SECOND_NS) < 5 * SECOND_NS
    assert await exchange.open_tickers("KXBTCD")
    await exchange.post("/sim/clock", offset_ns=0)
    assert set(await exchange.open_tickers("KXBTC15M", 50)) & before or time.time() % 900 < 30
    for wrong in ({}, {"set": "tomorrow"}, {"advance_s": "one"}):
        await exchange.post("/sim/clock", expect=400, **wrong)


async def test_on_thursday_night_nothing_trades(tmp_path: Path) -> None:
    """In the pause books stand still and the status says until when; afterwards trading goes on."""
    async with running(tmp_path, pauses=True) as exchange:
        await exchange.post("/sim/clock", set=THURSDAY_PAUSE)
        status = await exchange.get("/exchange/status")
        assert status["exchange_active"] is True
        assert status["trading_active"] is False
        assert status["exchange_estimated_resume_time"] == "2026-11-26T10:00:00Z"
        made = (await exchange.get("/sim/status"))["messages"]
        client = await exchange.connect()
        await client.subscribe("orderbook_delta", market_tickers=await exchange.open_tickers("KXBTCD"))
        await client.until(lambda frame: frame["type"] == "orderbook_snapshot")
        assert (await exchange.get("/sim/status"))["messages"] == made
        await exchange.post("/sim/clock", set="2026-11-26T10:00:01Z")
        await client.until(lambda frame: frame["type"] == "orderbook_delta")
        assert (await exchange.get("/exchange/status"))["trading_active"] is True


async def test_a_close_empties_the_book_and_shows_it_empty(exchange: Running) -> None:
    """Deletes first, then, with the next numbers, a snapshot without sides; markets of the next quarter are announced."""
    tickers = await exchange.open_tickers("KXBTC15M", 1)
    client = await exchange.connect()
    await client.subscribe("orderbook_delta", market_tickers=tickers)
    await client.subscribe("market_lifecycle_v2")
    await client.until(lambda frame: frame["type"] == "orderbook_delta")
    for _ in range(3):
        await exchange.post("/sim/clock", advance_s=450)
    await client.until(lambda frame: frame["type"] == "orderbook_snapshot" and len(frame["msg"]) == 3)
    empty = [frame for frame in client.frames if frame["type"] == "orderbook_snapshot"][-1]
    deletes = [frame for frame in client.of("orderbook_delta") if frame["msg"]["clock"] == empty["msg"]["clock"]]
    assert deletes
    assert all(frame["msg"]["delta_fp"].startswith("-") for frame in deletes)
    created = client.of("market_lifecycle_v2")
    assert any(frame["msg"]["event_type"] == "created" for frame in created)
    book = await exchange.get(f"/sim/book/{tickers[0]}")
    assert (book["yes_dollars"], book["no_dollars"]) == ([], [])


async def test_a_filter_may_name_a_market_that_is_not_listed_yet(exchange: Running) -> None:
    """When the market is listed its snapshot comes, and then its deltas."""
    client = await exchange.connect()
    opened = set(await exchange.open_tickers("KXBTC15M", 10))
    world = exchange.simulator.world
    now_s = exchange.simulator.clock() // SECOND_NS
    series = next(each for each in world.allotted if each.ticker == "KXBTC15M")
    (event,) = catalog.plan_events(series, now_s // 900 + 3, 1, world.seed)
    (market,) = catalog.plan_markets(event, 1, world.seed)
    assert market.ticker not in opened
    await client.subscribe("orderbook_delta", market_ticker=market.ticker)
    for _ in range(3):
        await exchange.post("/sim/clock", advance_s=900)
    await client.until(lambda frame: frame["type"] == "orderbook_snapshot")
    await client.until(lambda frame: frame["type"] == "orderbook_delta")


async def test_a_leap_in_time_shows_all_books_again(exchange: Running) -> None:
    """A client's books are right again after the clock was set back by days: every subscribed book is shown."""
    client = await exchange.connect()
    tickers = [*await exchange.open_tickers("KXBTCD", 3), *await exchange.open_tickers("KXBTC15M", 1)]
    await client.subscribe("orderbook_delta", market_tickers=tickers)
    await client.wait(lambda: len(client.of("orderbook_delta")) > 50)
    await exchange.post("/sim/clock", advance_s=-5 * 86_400)
    await client.wait(lambda: len(client.of("orderbook_snapshot")) >= 2 * len(tickers))
    shown = client.of("orderbook_snapshot")[len(tickers) :]
    assert [frame["msg"]["market_ticker"] for frame in shown] == tickers
    assert all(set(frame["msg"]) == {"market_ticker", "market_id", "clock"} for frame in shown[:3])


@pytest.mark.parametrize("path", ["/sim/status", "/sim/truth"])
async def test_the_control_surface_says_what_goes_on(exchange: Running, path: str) -> None:
    """Counts and places can be asked for."""
    client = await exchange.connect()
    await client.subscribe("trade")
    await client.wait(lambda: len(client.frames) > 5)
    answer = await exchange.get(path)
    assert answer["frames"] >= 5
    assert (await exchange.post("/sim/rate", rate=5)) == {"rate": 5.0}
