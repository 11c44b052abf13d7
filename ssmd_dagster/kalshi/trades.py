"""Kalshi's own list of trades over an interval, from the live and the historical part of its REST.

Not for what a trade's row means beyond its id, market and time: see `wire.read_trade`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator

import msgspec

from ssmd_dagster.clock import Clock
from ssmd_dagster.exchange import Trade
from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.rest import RestClient
from ssmd_dagster.kalshi.scaled import rfc3339_ns

_TRADES_PER_PAGE = 1000
_MAX_PAGES = 50_000
_REMEMBERED_IDS = 200_000
_NS_PER_S = 1_000_000_000
_DAY_NS = 86_400 * _NS_PER_S
_SURELY_LIVE_NS = 7 * _DAY_NS
_SEAM_NS = 600 * _NS_PER_S


class _TradesPage(msgspec.Struct):
    trades: list[msgspec.Raw] = []
    cursor: str | None = None


class _TradeRow(msgspec.Struct):
    trade_id: str
    ticker: str
    created_time: str


class Cutoff(msgspec.Struct, frozen=True):
    """Where the live part of the REST ends: older markets and trades are only in `/historical/…`. It advances."""

    market_settled_ts: str
    trades_created_ts: str

    @property
    def trades_ns(self) -> int:
        """Trades before this are historical, in nanoseconds."""
        return rfc3339_ns(self.trades_created_ts)


async def read_cutoff(rest: RestClient) -> Cutoff:
    """Ask where the live part ends at this moment."""
    return await rest.get("/historical/cutoff", answer=Cutoff)


async def read_trades(
    rest: RestClient, clock: Clock, from_ns: int, to_ns: int, ticker: str | None
) -> AsyncIterator[Trade]:
    """Yield the trades of `[from_ns, to_ns]`, newest first, each id once; of all markets where `ticker` is None.

    An interval that reaches back a week or more is read from the live part down to the cutoff and from the historical
    part below it, with ten minutes of overlap, and once more where the cutoff moved meanwhile: what the live part
    no longer has it leaves out without a word. Raises what `RestClient.get` raises.
    """
    seen = _RecentIds()
    if from_ns >= clock() - _SURELY_LIVE_NS:
        async for trade in _read_list(rest, "/markets/trades", from_ns, to_ns, ticker, seen):
            yield trade
        return
    cutoff_ns = (await read_cutoff(rest)).trades_ns
    if to_ns >= cutoff_ns - _SEAM_NS:
        live_from_ns = max(from_ns, cutoff_ns - _SEAM_NS)
        async for trade in _read_list(rest, "/markets/trades", live_from_ns, to_ns, ticker, seen):
            yield trade
        cutoff_ns = (await read_cutoff(rest)).trades_ns
    if from_ns <= cutoff_ns + _SEAM_NS:
        historical_to_ns = min(to_ns, cutoff_ns + _SEAM_NS)
        async for trade in _read_list(rest, "/historical/trades", from_ns, historical_to_ns, ticker, seen):
            yield trade


async def _read_list(
    rest: RestClient, path: str, from_ns: int, to_ns: int, ticker: str | None, seen: _RecentIds
) -> AsyncIterator[Trade]:
    params = [("min_ts", str(from_ns // _NS_PER_S)), ("max_ts", str(to_ns // _NS_PER_S + 1))]
    if ticker is not None:
        params.append(("ticker", ticker))
    pages = rest.pages(path, params, limit=_TRADES_PER_PAGE, max_pages=_MAX_PAGES, page=_TradesPage)
    async for page in pages:
        for raw in page.trades:
            trade = _read_row(raw, path)
            if from_ns <= trade.event_ns <= to_ns and seen.add(trade.trade_id):
                yield trade


def _read_row(raw: msgspec.Raw, path: str) -> Trade:
    try:
        row = msgspec.json.decode(raw, type=_TradeRow)
        return Trade(trade_id=row.trade_id, ticker=row.ticker, event_ns=rfc3339_ns(row.created_time), row=raw)
    except (msgspec.DecodeError, ValueError) as error:
        raise ExchangeAnswerError(f"a trade's row cannot be read: {error}", where=path) from error


class _RecentIds:
    """Knows the last 200,000 trade ids: enough, since rows only move between neighbouring pages."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, trade_id: str) -> bool:
        """Return whether the id is new."""
        if trade_id in self._ids:
            return False
        self._ids[trade_id] = None
        if len(self._ids) > _REMEMBERED_IDS:
            self._ids.popitem(last=False)
        return True
