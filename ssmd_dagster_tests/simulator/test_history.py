"""The simulated exchange's past: the same for the same seed, paged as Kalshi pages, behind a cutoff and under a rate."""

from __future__ import annotations

import calendar
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ssmd_dagster.simulator.catalog import DAY_S, EASTERN
from ssmd_dagster_tests.simulator.conftest import Running, running, sign
from ssmd_dagster_tests.simulator.schemas import FOLDER, check_answer

OLD = calendar.timegm((2026, 2, 3, 0, 0, 0))


def now_s(exchange: Running) -> int:
    """Return the exchange's time in seconds."""
    return exchange.simulator.clock() // 1_000_000_000


async def all_pages(exchange: Running, path: str, key: str, **params: Any) -> list[dict[str, Any]]:
    """Return every row of a list."""
    rows: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await exchange.get(path, cursor=cursor, **params)
        rows += page[key]
        cursor = page["cursor"]
        if not cursor:
            return rows


async def truth(exchange: Running, **params: Any) -> list[dict[str, Any]]:
    """Return all trades that there were, newest first."""
    url = f"http://127.0.0.1:{exchange.simulator.rest_port}/sim/truth"
    async with exchange.http.get(url, params=params) as response:
        assert response.status == 200
        return [json.loads(line) for line in (await response.read()).splitlines()]


async def test_a_past_day_is_listed_newest_first_each_trade_once_and_as_the_truth_has_it(tmp_path: Path) -> None:
    """The pages of a day before the cutoff, whatever their size, hold the trades of the truth in the same order."""
    async with running(tmp_path, trades_per_day=3_000) as exchange:
        true = await truth(exchange, date="2026-02-03")
        times = [row["created_time"] for row in true]
        assert times == sorted(times, reverse=True)
        assert all(time.startswith("2026-02-03T") for time in times)
        assert len({row["trade_id"] for row in true}) == len(true) > 2_000
        for limit in (1_000, 333):
            listed = await all_pages(
                exchange, "/historical/trades", "trades", min_ts=OLD, max_ts=OLD + DAY_S - 1, limit=limit
            )
            # `max_ts` is a second: what lies within the last one is not asked for.
            assert listed == [row for row in true if row["created_time"] <= "2026-02-03T23:59:59.000000Z"]
        assert any(row["is_block_trade"] for row in true)
        blocks = await all_pages(
            exchange, "/historical/trades", "trades", min_ts=OLD, max_ts=OLD + DAY_S, is_block_trade="true", limit=5
        )
        assert {row["trade_id"] for row in blocks} >= {row["trade_id"] for row in true if row["is_block_trade"]}
        ticker = true[0]["ticker"]
        of_one = await all_pages(
            exchange, "/historical/trades", "trades", min_ts=OLD, max_ts=OLD + DAY_S, ticker=ticker, limit=7
        )
        assert [row for row in of_one if row in true] == [row for row in listed if row["ticker"] == ticker]


async def test_the_same_seed_has_the_same_past_after_a_restart_and_in_another_home(tmp_path: Path) -> None:
    """Trades and markets of a past day do not depend on when or where the simulator runs; another seed has others."""
    found = []
    for folder, seed in (("a", 7), ("a", 7), ("b", 7), ("c", 8)):
        async with running(tmp_path / folder, seed=seed, trades_per_day=500) as exchange:
            found.append(await truth(exchange, date="2026-02-03"))
    assert found[0] == found[1] == found[2]
    assert {row["trade_id"] for row in found[0]}.isdisjoint(row["trade_id"] for row in found[3])


async def test_the_cutoff_parts_live_from_historical_and_moves_with_time(tmp_path: Path) -> None:
    """Below it the live list is empty and the historical one is not; days later both have moved; it can be set."""
    async with running(tmp_path, trades_per_day=500, cutoff_days=10) as exchange:
        cutoff = (await exchange.get("/historical/cutoff"))["trades_created_ts"]
        at = int(datetime.fromisoformat(cutoff).timestamp())
        assert at % DAY_S == 0
        assert 9 * DAY_S < now_s(exchange) - at < 12 * DAY_S
        for path, low, listed in (
            ("/markets/trades", at - DAY_S, False),
            ("/historical/trades", at - DAY_S, True),
            ("/markets/trades", at, True),
            ("/historical/trades", at, False),
        ):
            page = await exchange.get(path, min_ts=low, max_ts=low + DAY_S - 1)
            assert bool(page["trades"]) == listed, (path, low)
        await exchange.post("/sim/clock", advance_s=DAY_S)
        assert (await exchange.get("/historical/trades", min_ts=at, max_ts=at + DAY_S - 1))["trades"]
        await exchange.post("/sim/cutoff", days=40)
        assert not (await exchange.get("/historical/trades", min_ts=at, max_ts=at + DAY_S - 1))["trades"]


async def test_trades_of_today_and_of_the_past_are_one_list(tmp_path: Path) -> None:
    """A page that spans the simulator's first start goes from what it lived through to what it made up, in order."""
    async with running(tmp_path, trades_per_day=50_000) as exchange:
        engine = exchange.simulator.engine
        while len(engine.trades) < 30:
            engine._burst(500)
        await exchange.simulator.stop_moving()
        start = now_s(exchange) - 600
        true = await truth(exchange, **{"from": start, "to": now_s(exchange) + 2})
        listed = await all_pages(exchange, "/markets/trades", "trades", min_ts=start, limit=10)
        assert listed == true
        born = exchange.simulator.history.spans[0][1]
        sides = {datetime.fromisoformat(row["created_time"]).timestamp() < born for row in listed}
        assert sides == {True, False}


async def test_a_leap_of_the_clock_leaves_no_time_without_trades(tmp_path: Path) -> None:
    """Days that the clock leapt over have a past like all others; days that were lived through have only what happened."""
    async with running(tmp_path, trades_per_day=500) as exchange:
        before = now_s(exchange)
        await exchange.post("/sim/clock", advance_s=10 * DAY_S)
        await exchange.post("/sim/clock", advance_s=DAY_S)
        spans = exchange.simulator.history.spans
        assert len(spans) == 2
        assert spans[1][0] - before in (0, 1)
        assert 10 * DAY_S <= spans[1][1] - spans[1][0] <= 10 * DAY_S + 1
        assert await truth(exchange, **{"from": before + 3 * DAY_S, "to": before + 4 * DAY_S})
    async with running(tmp_path, trades_per_day=500) as exchange:
        assert exchange.simulator.history.spans == spans


async def test_past_markets_are_found_by_name_by_event_and_by_series(tmp_path: Path) -> None:
    """Every market that traded is in one of the two lists, settled, with its event; filters are exclusive."""
    async with running(tmp_path, trades_per_day=800) as exchange:
        tickers = {row["ticker"] for row in await truth(exchange, date="2026-02-03")}
        assert len({ticker.partition("-")[0] for ticker in tickers}) >= 5
        named = ",".join(sorted(tickers)[:100])
        old = (await exchange.get("/historical/markets", tickers=named))["markets"]
        # Those of the year are still open, or settled since the cutoff.
        live = (await exchange.get("/markets", tickers=named))["markets"]
        assert {row["ticker"] for row in [*old, *live]} == set(named.split(","))
        assert {row["status"] for row in old} == {"finalized"}
        one = old[0]
        assert (await exchange.get(f"/historical/markets/{one['ticker']}"))["market"] == one
        await exchange.get(f"/markets/{one['ticker']}", expect=404)
        event = await exchange.get(f"/events/{one['event_ticker']}")
        assert one["ticker"] in {row["ticker"] for row in event["markets"]}
        of_event = (await exchange.get("/historical/markets", event_ticker=one["event_ticker"]))["markets"]
        assert one in of_event
        await exchange.get("/historical/markets", tickers="A", series_ticker="KXBTCD", expect=400)
        page = await exchange.get("/historical/markets", series_ticker="KXBTC15M", limit=100)
        more = await exchange.get("/historical/markets", series_ticker="KXBTC15M", limit=100, cursor=page["cursor"])
        both = [row["settlement_ts"] for row in [*page["markets"], *more["markets"]]]
        assert both == sorted(both, reverse=True)
        assert len({row["ticker"] for row in [*page["markets"], *more["markets"]]}) == 200
        settled = await exchange.get("/markets", series_ticker="KXBTC15M", status="settled", limit=1_000)
        assert len(settled["markets"]) == 1_000
        lately = settled["markets"][-1]["ticker"]
        assert (await exchange.get(f"/markets/{lately}"))["market"]["status"] == "finalized"


@pytest.mark.skipif(not FOLDER.exists(), reason="Kalshi's schema files are not beside this checkout")
async def test_answers_about_the_past_fit_the_openapi_file(tmp_path: Path) -> None:
    """Trades, block trades, markets and the cutoff hold what the file asks for, and no more."""
    async with running(tmp_path, trades_per_day=2_000) as exchange:
        check_answer("GetTradesResponse", await exchange.get("/historical/trades", limit=1_000))
        check_answer("GetTradesResponse", await exchange.get("/historical/trades", is_block_trade="true"))
        check_answer("GetMarketsResponse", await exchange.get("/historical/markets", limit=300))
        check_answer("GetMarketsResponse", await exchange.get("/historical/markets", mve_filter="only", limit=50))
        row = (await exchange.get("/historical/markets", series_ticker="KXNBAGAME"))["markets"][0]
        check_answer("GetMarketResponse", await exchange.get(f"/historical/markets/{row['ticker']}"))
        check_answer("GetEventResponse", await exchange.get(f"/events/{row['event_ticker']}"))


async def test_the_documented_rate_is_kept_with_both_bodies(tmp_path: Path) -> None:
    """Two seconds' worth at once, then 429 without a word on when to come back, flat and nested; an account has its own."""
    async with running(tmp_path, reads_per_second=20, trades_per_day=100) as exchange:
        url = f"http://127.0.0.1:{exchange.simulator.rest_port}/trade-api/v2/exchange/status"
        statuses, bodies = [], []
        for _ in range(60):
            async with exchange.http.get(url) as response:
                statuses.append(response.status)
                if response.status == 429:
                    bodies.append(await response.json())
                    assert "Retry-After" not in response.headers
        assert statuses[:40] == [200] * 40
        assert 8 <= len(bodies) <= 20
        assert bodies[0] == {"error": "too many requests"}
        assert bodies[1]["error"]["code"] == "too_many_requests"
        signed = sign(exchange.home, "GET", "/trade-api/v2/exchange/status")
        async with exchange.http.get(url, headers=signed) as response:
            assert response.status == 200
        await exchange.post("/sim/limits", reads_per_second=0)
        for _ in range(60):
            await exchange.get("/exchange/status")


async def test_rows_move_on_while_one_pages(tmp_path: Path) -> None:
    """On request a later page begins with rows of the one before; on request rows are left out."""
    async with running(tmp_path, trades_per_day=2_000) as exchange:
        query: dict[str, Any] = {"min_ts": OLD, "max_ts": OLD + DAY_S, "limit": 100}
        first = await exchange.get("/historical/trades", **query)
        await exchange.post("/sim/faults", fault="http_shift", size=7)
        shifted = await exchange.get("/historical/trades", cursor=first["cursor"], **query)
        plain = await exchange.get("/historical/trades", cursor=first["cursor"], **query)
        assert shifted["trades"] == [*first["trades"][-7:], *plain["trades"]]
        await exchange.post("/sim/faults", fault="http_short", size=3)
        short = await exchange.get("/historical/trades", **query)
        assert short["trades"] == first["trades"][:-3]


async def test_thursdays_pause_drops_some_sessions(tmp_path: Path) -> None:
    """When the pause begins about half of the connections are closed; the others stay and hear no trade."""
    async with running(tmp_path, pauses=True, rate=100) as exchange:
        thursday = next(
            day for day in range(1, 9) if datetime.fromtimestamp(now_s(exchange) + day * DAY_S, EASTERN).weekday() == 3
        )
        at = datetime.fromtimestamp(now_s(exchange) + thursday * DAY_S, EASTERN).replace(hour=2, minute=59)
        await exchange.post("/sim/clock", set=at.isoformat())
        clients = [await exchange.connect() for _ in range(12)]
        await exchange.post("/sim/clock", advance_s=120)
        await clients[0].wait(lambda: 2 <= sum(client.ended for client in clients) <= 10)
        assert (await exchange.get("/exchange/status"))["trading_active"] is False
