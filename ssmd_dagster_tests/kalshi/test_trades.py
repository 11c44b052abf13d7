"""The exchange's own list of trades: each once, within the interval, across the historical cutoff."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from aiohttp import web

from ssmd_dagster.exchange import Trade
from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster_tests.kalshi.fakes import NOW_NS, Handler, RestServer, opened, rest_server, settings

DAY_S = 86_400
NOW_S = NOW_NS // 1_000_000_000


def row(number: int, at_s: float) -> dict[str, Any]:
    """Return a trade's row at `at_s` seconds before now."""
    at = datetime.datetime.fromtimestamp(NOW_S - at_s, datetime.UTC)
    return {"trade_id": f"id-{number}", "ticker": "KXA-1", "created_time": at.isoformat().replace("+00:00", "Z")}


def listing(rows: list[dict[str, Any]], *, per_page: int = 2, overlap: int = 0) -> Handler:
    """Serve `rows` in pages that repeat the last `overlap` rows of the page before."""

    async def handler(request: web.Request) -> web.StreamResponse:
        start = int(request.query.get("cursor", "0"))
        end = start + per_page
        cursor = str(end) if end < len(rows) else ""
        return web.json_response({"trades": rows[max(0, start - overlap) : end], "cursor": cursor})

    return handler


async def trades_of(server: RestServer, from_s: float, to_s: float, ticker: str | None = None) -> list[Trade]:
    """Read the trades from `from_s` to `to_s` seconds before now."""
    async with opened(settings(rest_endpoint=server.endpoint)) as exchange:
        bounds = (NOW_NS - int(from_s * 1e9), NOW_NS - int(to_s * 1e9))
        return [one async for one in exchange.trades(*bounds, ticker)]


async def test_each_trade_comes_once_although_rows_move() -> None:
    """New trades push rows onto the next page; the ids tell."""
    async with rest_server() as server:
        server.routes["/markets/trades"] = listing([row(number, number) for number in range(9)], overlap=1)
        found = await trades_of(server, 3600, 0, ticker="KXA-1")
        assert [one.trade_id for one in found] == [f"id-{number}" for number in range(9)]
        assert {one.query["ticker"] for one in server.requests} == {"KXA-1"}
        assert bytes(found[0].row).startswith(b'{"trade_id"')


async def test_only_trades_of_the_interval_come() -> None:
    """Kalshi is asked in whole seconds, wide enough; the bounds are kept here to the nanosecond."""
    async with rest_server() as server:
        server.routes["/markets/trades"] = listing([row(1, 9.5), row(2, 10.0), row(3, 20.0), row(4, 20.5)])
        found = await trades_of(server, 20, 10)
        assert [one.trade_id for one in found] == ["id-2", "id-3"]
        assert server.requests[0].query["min_ts"] == str(NOW_S - 20)
        assert server.requests[0].query["max_ts"] == str(NOW_S - 10 + 1)
        assert "ticker" not in server.requests[0].query


async def test_an_old_interval_is_read_on_both_sides_of_the_cutoff() -> None:
    """Live down to the cutoff, historical below, the seam read twice and its trades once."""
    cutoff = datetime.datetime.fromtimestamp(NOW_S - 60 * DAY_S, datetime.UTC).isoformat()
    async with rest_server() as server:
        server.routes["/historical/cutoff"] = {"market_settled_ts": cutoff, "trades_created_ts": cutoff}
        server.routes["/markets/trades"] = listing([row(1, 59 * DAY_S), row(2, 60 * DAY_S - 5)])
        server.routes["/historical/trades"] = listing([row(2, 60 * DAY_S - 5), row(3, 60 * DAY_S + 5)])
        found = await trades_of(server, 61 * DAY_S, 58 * DAY_S)
        assert [one.trade_id for one in found] == ["id-1", "id-2", "id-3"]
        paths = [one.path.removeprefix("/trade-api/v2") for one in server.requests]
        assert paths == ["/historical/cutoff", "/markets/trades", "/historical/cutoff", "/historical/trades"]
        live, historical = server.requests[1].query, server.requests[3].query
        assert int(live["min_ts"]) < NOW_S - 60 * DAY_S < int(historical["max_ts"])


async def test_a_cutoff_that_moves_meanwhile_loses_nothing() -> None:
    """The cutoff is read again after the live part, and the historical part reaches up to the new one."""
    moves = iter([60, 59])

    async def cutoff(_: web.Request) -> web.StreamResponse:
        at = datetime.datetime.fromtimestamp(NOW_S - next(moves) * DAY_S, datetime.UTC).isoformat()
        return web.json_response({"market_settled_ts": at, "trades_created_ts": at})

    async with rest_server() as server:
        server.routes["/historical/cutoff"] = cutoff
        server.routes["/markets/trades"] = listing([row(1, 58.5 * DAY_S)])
        server.routes["/historical/trades"] = listing([row(2, 59.5 * DAY_S), row(3, 60.5 * DAY_S)])
        found = await trades_of(server, 61 * DAY_S, 58 * DAY_S)
        assert [one.trade_id for one in found] == ["id-1", "id-2", "id-3"]
        assert int(server.requests[-1].query["max_ts"]) > NOW_S - 59 * DAY_S


async def test_a_row_without_an_id_is_an_error() -> None:
    """Rows that cannot be matched are not passed over in silence."""
    async with rest_server() as server:
        server.routes["/markets/trades"] = {"trades": [{"ticker": "KXA-1"}], "cursor": ""}
        with pytest.raises(ExchangeAnswerError, match="trade_id"):
            await trades_of(server, 10, 0)
