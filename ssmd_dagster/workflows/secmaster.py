"""The security master: bring it in from the exchange, and read it."""

from __future__ import annotations

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.maintenance import remembered
from ssmd_dagster.errors import ConfigurationError, NotFoundError, SsmdError
from ssmd_dagster.exchange import Exchange, Market, unlisted_market
from ssmd_dagster.stores.secmaster import SyncResult, pack
from ssmd_dagster.workflows.desk import Desk, Progress


async def sync(desk: Desk, date: str) -> SyncResult:
    """Read the selected markets from the exchange into the cache; changes go to their own journal. And what it has announced of
    its maintenance, for when it cannot be asked any more.

    Where the tickers are listed in the environment, they can be recorded without the exchange's list: if its REST service is
    away or is none, what is known of them stays as it is.
    """
    await desk.stores.secmaster.create()
    selection = desk.setting.env.capture.markets.selection()
    exchange = desk.setting.open_exchange(date)
    try:
        rows = {market.ticker: pack(market) async for market in exchange.markets(selection)}
        await _note_maintenance(desk, exchange, date)
    except SsmdError as error:
        if selection.tickers is None and isinstance(error, NotFoundError):
            raise ConfigurationError(
                f"the exchange does not know all that is selected: {error.what}",
                where=error.where,
                do=f"Correct `capture.markets` of {desk.env}: `ssmd env show {desk.env}`",
            ) from error
        if selection.tickers is None or isinstance(error, ConfigurationError):
            raise
        desk.report(
            Progress("note", "secmaster", date, "secmaster", f"Going on without the exchange's list: {error.what}")
        )
        known = {market.ticker: market for market in await desk.stores.secmaster.markets()}
        rows = {ticker: pack(known.get(ticker) or unlisted_market(ticker)) for ticker in selection.tickers}
    finally:
        await exchange.close()
    return await desk.stores.secmaster.apply_rows(rows, desk.setting.clock())


async def _note_maintenance(desk: Desk, exchange: Exchange, date: str) -> None:
    try:
        read = [Window(open_ns=from_ns, close_ns=to_ns) for from_ns, to_ns in await exchange.maintenance()]
    except SsmdError as error:
        desk.report(Progress("note", "secmaster", date, "secmaster", f"Its maintenance is not known: {error.what}"))
        return
    cache = desk.stores.cache
    await cache.put_maintenance(remembered(await cache.maintenance(), read, desk.setting.clock()))


async def find(desk: Desk, *, category: str | None = None, series: str | None = None) -> list[Market]:
    """Return the markets of the security master, sorted by ticker, of a category or series where one is asked for."""
    markets = await desk.stores.secmaster.markets()
    return sorted(
        (m for m in markets if category in (None, m.category) and series in (None, m.series_ticker)),
        key=lambda market: market.ticker,
    )
