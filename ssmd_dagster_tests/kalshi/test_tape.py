"""The list of trades read side by side: every trade once, whatever the exchange does meanwhile, and goes on where it was."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.errors import ConfigurationError, SsmdError, UnreachableError
from ssmd_dagster.exchange import Covered, ExchangeSettings, TradePage, TradeQuery, TradesRead
from ssmd_dagster.kalshi.client import Kalshi
from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.tape import READERS, without
from ssmd_dagster_tests.kalshi.fakes import NOW_NS, opened, rest_server, settings
from ssmd_dagster_tests.simulator.conftest import Running, running

DAY_S = 86_400
OLD_S = int(datetime(2026, 2, 3, tzinfo=UTC).timestamp())


class Taker:
    """Keeps pages; `stop_after` of them it fails."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.pages: list[TradePage] = []
        self.ids: Counter[str] = Counter()
        self.stop_after = stop_after

    async def __call__(self, page: TradePage) -> None:
        """Keep one page."""
        if self.stop_after is not None and len(self.pages) >= self.stop_after:
            raise UnreachableError("the disk is gone")
        self.pages.append(page)
        rows = json.loads(page.rows)
        assert len(rows) == page.count
        assert {row["ticker"] for row in rows} == page.tickers
        self.ids.update(row["trade_id"] for row in rows)


@asynccontextmanager
async def client(exchange: Running, rate: int = 100_000) -> AsyncIterator[Kalshi]:
    """Open a client of a running simulator."""
    how = ExchangeSettings(
        environment="test",
        endpoint=exchange.simulator.endpoint,
        rest_endpoint=exchange.simulator.rest_endpoint,
        rate_limit_per_second=rate,
        max_symbols_per_connection=100,
    )
    kalshi = Kalshi(how, exchange.simulator.clock, rng=random.Random(1))
    try:
        yield kalshi
    finally:
        await kalshi.close()


async def true_ids(exchange: Running, from_s: int, to_s: int) -> set[str]:
    """Return the ids of all trades of an interval, by the simulator's truth."""
    url = f"http://127.0.0.1:{exchange.simulator.rest_port}/sim/truth"
    async with exchange.http.get(url, params={"from": from_s, "to": to_s}) as response:
        return {json.loads(line)["trade_id"] for line in (await response.read()).splitlines()}


def query(from_s: int = OLD_S, to_s: int = OLD_S + DAY_S, **more: Any) -> TradeQuery:
    """Return a query of whole seconds for all markets, combos too."""
    return TradeQuery(from_ns=from_s * 10**9, to_ns=to_s * 10**9, **{"include_multivariate": True, **more})


async def read(exchange: Running, asked: TradeQuery, taker: Taker) -> TradesRead:
    """Read with a client of its own."""
    async with client(exchange) as kalshi:
        return await kalshi.trade_pages(asked, taker)


async def test_a_day_comes_whole_and_each_trade_once(tmp_path: Path) -> None:
    """A historical day read side by side has the truth's ids, its pages say that all of the day came, and are full."""
    async with running(tmp_path, trades_per_day=60_000, rate=1) as exchange:
        taker = Taker()
        done = await read(exchange, query(), taker)
        assert set(taker.ids) == await true_ids(exchange, OLD_S, OLD_S + DAY_S)
        assert set(taker.ids.values()) == {1}
        assert done.trades == len(taker.ids)
        covered = [(page.covered.from_ns, page.covered.to_ns) for page in taker.pages]
        assert without((OLD_S * 10**9, (OLD_S + DAY_S) * 10**9), covered) == []
        assert done.requests < done.trades / 1_000 + READERS + 4


async def test_what_the_exchange_does_meanwhile_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Rows that move on, refusals in both bodies, broken answers and errors while a day is read."""
    async with running(tmp_path, trades_per_day=20_000, rate=1) as exchange:
        faults: tuple[dict[str, Any], ...] = (
            {"fault": "http_shift", "count": 6, "size": 30},
            {"fault": "http_429", "count": 3, "body": "flat"},
            {"fault": "http_429", "count": 3, "body": "nested"},
            {"fault": "http_cut", "count": 2},
            {"fault": "http_5xx", "count": 2, "status": 502},
        )
        for fault in faults:
            await exchange.post("/sim/faults", path="/historical/trades", **fault)
        taker = Taker()
        await read(exchange, query(), taker)
        assert set(taker.ids) == await true_ids(exchange, OLD_S, OLD_S + DAY_S)
        assert set(taker.ids.values()) == {1}
        assert not exchange.simulator.engine.faults.http


async def test_a_reading_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """With what came before it as known, the second reading asks for the rest only and doubles at most a second's trades."""
    async with running(tmp_path, trades_per_day=40_000, rate=1) as exchange:
        first = Taker(stop_after=20)
        with pytest.raises(UnreachableError, match="the disk is gone"):
            await read(exchange, query(), first)
        known = tuple(page.covered for page in first.pages)
        second = Taker()
        done = await read(exchange, query(known=known), second)
        assert set(first.ids) | set(second.ids) == await true_ids(exchange, OLD_S, OLD_S + DAY_S)
        assert len(set(first.ids) & set(second.ids)) < 200
        assert done.trades < 30_000
        third = Taker()
        everything = (*known, *(page.covered for page in second.pages))
        assert (await read(exchange, query(known=everything), third)).requests == 0
        others = tuple(Covered(**{**_fields(one), "selection": "other"}) for one in everything)
        assert (await read(exchange, query(known=others), Taker())).trades > 35_000


def _fields(covered: Covered) -> dict[str, Any]:
    return {name: getattr(covered, name) for name in covered.__struct_fields__}


async def test_the_seam_is_read_from_both_sides_and_its_trades_come_once(tmp_path: Path) -> None:
    """A day in whose middle the cutoff lies comes from both lists."""
    async with running(tmp_path, trades_per_day=20_000, rate=1, cutoff_days=60) as exchange:
        cutoff = (await exchange.get("/historical/cutoff"))["trades_created_ts"]
        at = int(datetime.fromisoformat(cutoff).timestamp())
        taker = Taker()
        await read(exchange, query(at - DAY_S // 2, at + DAY_S // 2), taker)
        assert set(taker.ids) == await true_ids(exchange, at - DAY_S // 2, at + DAY_S // 2)
        assert set(taker.ids.values()) == {1}
        assert {page.endpoint for page in taker.pages} == {"/markets/trades", "/historical/trades"}


async def test_a_cutoff_that_passes_over_the_day_meanwhile_loses_nothing(tmp_path: Path) -> None:
    """The live list loses the day while it is read; what is gone is read from the historical list."""
    async with running(tmp_path, trades_per_day=20_000, rate=1, cutoff_days=60) as exchange:
        cutoff = (await exchange.get("/historical/cutoff"))["trades_created_ts"]
        at = int(datetime.fromisoformat(cutoff).timestamp())
        rest = exchange.simulator.engine
        taker = Taker()
        assert rest is not None

        async def take(page: TradePage) -> None:
            if len(taker.pages) == 4:
                await exchange.post("/sim/cutoff", days=58)
            await taker(page)

        async with client(exchange) as kalshi:
            await kalshi.trade_pages(query(at, at + DAY_S), take)
        assert set(taker.ids) == await true_ids(exchange, at, at + DAY_S)
        assert {page.endpoint for page in taker.pages} == {"/markets/trades", "/historical/trades"}


async def test_markets_can_be_chosen_by_ticker_and_combos_left_out(tmp_path: Path) -> None:
    """By the whole tape or by each market's own list, the same trades come; combos only when they are asked for."""
    async with running(tmp_path, trades_per_day=5_000, rate=1) as exchange:
        everything = Taker()
        await read(exchange, query(), everything)
        tickers = frozenset([max(page.tickers) for page in everything.pages][:1]) | frozenset(["KXNOSUCH-1"])
        found = []
        for per_ticker in (False, True):
            taker = Taker()
            await read(exchange, query(tickers=tickers, per_ticker=per_ticker), taker)
            assert set().union(*(page.tickers for page in taker.pages)) < tickers
            found.append(taker.ids)
        assert found[0] == found[1]
        assert found[0]
        single = Taker()
        await read(exchange, query(include_multivariate=False), single)
        assert not any(ticker.startswith("KXMVE") for page in single.pages for ticker in page.tickers)
        assert len(single.ids) < len(everything.ids)
        async with client(exchange) as kalshi:
            pages = await kalshi.pages_of_tape(OLD_S * 10**9, (OLD_S + DAY_S) * 10**9)
        assert 2 <= pages <= 12


async def test_past_markets_come_as_their_rows(tmp_path: Path) -> None:
    """By ticker from whichever list has them, by series those of the day."""
    how: dict[str, Any] = {"trades_per_day": 2_000, "rate": 1, "history_from": date(2026, 1, 20), "cutoff_days": 280}
    async with running(tmp_path, **how) as exchange, client(exchange) as kalshi:
        taker = Taker()
        await kalshi.trade_pages(query(), taker)
        traded = sorted(set().union(*(page.tickers for page in taker.pages)))
        pages = [page async for page in kalshi.market_pages(tickers=[*traded, "KXNOSUCH-1"])]
        assert set().union(*(page.tickers for page in pages)) == set(traded)
        assert {page.endpoint for page in pages} == {"/markets", "/historical/markets"}
        events = frozenset[str]().union(*(page.events for page in pages))
        before = (await exchange.get("/sim/status"))["rest_requests"]
        places = await kalshi.places([*events, "KXNOSUCH"])
        assert places.keys() == events
        assert any(event.startswith("KXMVE") for event in events)
        assert all(place.category and event.startswith(place.series_ticker) for event, place in places.items())
        assert await kalshi.places(events) == places
        # Three answers with up to a hundred events each, of both lists, and one for each series.
        series = {place.series_ticker for place in places.values()}
        most = 2 * (len(events) // 100 + 1) + len(series)
        assert (await exchange.get("/sim/status"))["rest_requests"] - before <= most
        window = (OLD_S * 10**9, (OLD_S + DAY_S) * 10**9)
        quarters = [page async for page in kalshi.market_pages(series="KXBTC15M", around=window)]
        names = set().union(*(page.tickers for page in quarters))
        assert {name for name in traded if name.startswith("KXBTC15M-")} <= names
        assert 96 <= len(names) <= 98


async def test_rows_that_nobody_can_read_are_an_error_not_a_gap() -> None:
    """A row without an id, a time of no known form and a list without end are said so."""
    cutoff = {"market_settled_ts": "2026-01-01T00:00:00Z", "trades_created_ts": "2026-01-01T00:00:00Z"}
    row = {"trade_id": "a", "ticker": "A", "created_time": "2026-02-03T10:00:00Z"}
    asked = TradeQuery(from_ns=NOW_NS - 10**12, to_ns=NOW_NS)
    for answer, words in (
        ({"trades": [{"ticker": "A"}], "cursor": ""}, "trade_id"),
        ({"trades": [{**row, "created_time": "yesterday"}], "cursor": ""}, "RFC 3339"),
        ({"trades": [], "cursor": "again"}, "never end"),
    ):
        async with rest_server() as server:
            server.routes["/historical/cutoff"] = cutoff
            server.routes["/markets/trades"] = answer
            async with opened(settings(rest_endpoint=server.endpoint)) as exchange:
                with pytest.raises(ExchangeAnswerError, match=words):
                    await exchange.trade_pages(asked, Taker())


async def test_a_key_without_rights_is_told_at_once() -> None:
    """A refusal is no trouble that passes: it is raised as one error, not as a group of them."""

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"code": "forbidden", "message": "no rights"}}, status=403)

    async with rest_server() as server:
        server.routes["/historical/cutoff"] = {
            "market_settled_ts": "2026-01-01T00:00:00Z",
            "trades_created_ts": "2026-01-01T00:00:00Z",
        }
        server.routes["/markets/trades"] = refuse
        async with opened(settings(rest_endpoint=server.endpoint)) as exchange:
            with pytest.raises(ConfigurationError, match="no rights"):
                await exchange.trade_pages(TradeQuery(from_ns=NOW_NS - 10**12, to_ns=NOW_NS), Taker())


async def test_the_rate_is_used_and_kept(tmp_path: Path) -> None:
    """Under the exchange's limit all readers together are hardly ever refused, and leave little of it unused."""
    async with running(tmp_path, trades_per_day=60_000, rate=1, reads_per_second=40) as exchange:
        taker = Taker()
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with client(exchange, rate=40) as kalshi:
            done = await kalshi.trade_pages(query(), taker)
        took = loop.time() - began
        assert exchange.simulator.engine is not None
        # A second's worth may pass at once.
        assert done.requests <= 40 * (took + 2)
        assert set(taker.ids.values()) == {1}


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8), st.integers(0, 20), st.integers(20, 40))
def test_what_is_left_of_an_interval_is_exactly_what_no_part_holds(
    parts: list[tuple[int, int]], low: int, high: int
) -> None:
    """Every instant is in the parts or in what is left, never in both."""
    left = without((low, high), parts)
    for at in range(low, high):
        assert any(a <= at < b for a, b in left) != any(a <= at < b for a, b in parts)
    assert all(low <= a < b <= high for a, b in left)


async def test_a_failing_taker_stops_all_readers(tmp_path: Path) -> None:
    """Nothing is asked for any more once a page could not be kept."""
    async with running(tmp_path, trades_per_day=40_000, rate=1) as exchange:
        with pytest.raises(SsmdError):
            await read(exchange, query(), Taker(stop_after=0))
        before = (await exchange.get("/sim/status"))["rest_requests"]
        await asyncio.sleep(0)
        assert (await exchange.get("/sim/status"))["rest_requests"] == before
