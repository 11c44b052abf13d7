"""Order books, historical markets and the cutoff over REST."""

from __future__ import annotations

import pytest
from aiohttp import web

from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster_tests.kalshi.fakes import in_turn, opened, rest_server, settings


async def test_books_come_a_hundred_a_request() -> None:
    """Tickers are repeated parameters; dots and odd characters survive the way there and back."""
    tickers = [f"KX D-{number}.99/%" for number in range(130)]

    async def handler(request: web.Request) -> web.StreamResponse:
        asked = request.query.getall("tickers")
        books = [{"ticker": one, "orderbook_fp": {"yes_dollars": [["0.5", "1"]], "no_dollars": []}} for one in asked]
        return web.json_response({"orderbooks": books})

    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/markets/orderbooks"] = handler
        found = [one async for one in exchange.books([*tickers, tickers[0]])]
        assert [one.ticker for one in found] == tickers
        assert found[0].yes == ((500_000, 100),)
        assert [len(one.query.getall("tickers")) for one in server.requests] == [100, 30]


async def test_a_book_that_cannot_be_read_names_its_market() -> None:
    """A broken level is not passed over."""
    book = {"ticker": "KXA", "orderbook_fp": {"yes_dollars": [["?", "1"]]}}
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/markets/orderbooks"] = in_turn((200, {"orderbooks": [book]}))
        with pytest.raises(ExchangeAnswerError, match="the book of KXA: yes_dollars"):
            [one async for one in exchange.books(["KXA"])]


async def test_historical_markets_are_asked_by_one_filter() -> None:
    """Kalshi takes tickers, event, series or the combo filter, never two."""
    row = {"ticker": "KXA-1", "event_ticker": "KXA-E", "status": "finalized", "open_time": "2026-01-01T00:00:00Z"}
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/historical/markets"] = {"markets": [row], "cursor": None}
        server.routes["/events"] = {"events": [{"event_ticker": "KXA-E", "series_ticker": "KXS"}], "cursor": ""}
        server.routes["/series/KXS"] = {"series": {"ticker": "KXS", "category": "Sports"}}
        for asked in ({"tickers": ["KXA-1"]}, {"event": "KXA-E"}, {"series": "KXS"}, {}):
            (found,) = [one async for one in exchange.historical_markets(**asked)]
            assert (found.series_ticker, found.category, found.close_ns) == ("KXS", "Sports", 0)
        queries = [set(one.query) for one in server.requests if one.path.endswith("historical/markets")]
        assert queries == [
            {"tickers", "limit"},
            {"event_ticker", "limit"},
            {"series_ticker", "limit"},
            {"mve_filter", "limit"},
        ]


async def test_the_cutoff_is_a_time() -> None:
    """Trades before it are historical."""
    answer = {"market_settled_ts": "2026-07-28T00:00:00Z", "trades_created_ts": "2026-07-28T00:00:00.5Z", "new": 1}
    async with rest_server() as server, opened(settings(rest_endpoint=server.endpoint)) as exchange:
        server.routes["/historical/cutoff"] = answer
        assert (await exchange.cutoff()).trades_ns == 1_785_196_800_500_000_000
