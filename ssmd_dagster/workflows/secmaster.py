"""The security master: bring it in from the exchange, and read it."""

from __future__ import annotations

from ssmd_dagster.exchange import Market
from ssmd_dagster.stores.secmaster import SyncResult
from ssmd_dagster.workflows.desk import Desk


async def sync(desk: Desk, date: str) -> SyncResult:
    """Read the selected markets from the exchange into the cache; changes go to their own journal."""
    exchange = desk.setting.open_exchange(date)
    try:
        markets = [market async for market in exchange.markets(desk.setting.env.capture.markets.selection())]
    finally:
        await exchange.close()
    return await desk.stores.secmaster.apply(markets, desk.setting.clock())


async def find(desk: Desk, *, category: str | None = None, series: str | None = None) -> list[Market]:
    """Return the markets of the security master, sorted by ticker, of a category or series where one is asked for."""
    markets = await desk.stores.secmaster.markets()
    return sorted(
        (m for m in markets if category in (None, m.category) and series in (None, m.series_ticker)),
        key=lambda market: market.ticker,
    )
