"""Which markets are listed, as a recorder asks for it all day: few requests, no series or category of each.

Not the security master: see `markets`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from ssmd_dagster.exchange import Market, MarketSelection
from ssmd_dagster.kalshi.markets import MarketsPage, SeriesLookup, read_market
from ssmd_dagster.kalshi.rest import Params, RestClient

_PER_PAGE = 1000
_MAX_PAGES = 2_000
_TICKERS_PER_REQUEST = 100
_STATUSES = ("open", "unopened")
_NS_PER_S = 1_000_000_000


async def read_listings(
    rest: RestClient, series: SeriesLookup, selection: MarketSelection, created_after_ns: int | None
) -> AsyncIterator[Market]:
    """Yield the selected markets, open and yet to open, each ticker once, at most `selection.max_markets`.

    By tickers: whatever their status; a ticker that Kalshi does not know is left out. With `created_after_ns` only those
    created since then, with one request where nothing much is new; by series the events of new markets are looked up.
    Raises what `RestClient.get` raises.
    """
    seen: set[str] = set()
    for params, its_series in _questions(selection, created_after_ns):
        async for page in rest.pages("/markets", params, limit=_PER_PAGE, max_pages=_MAX_PAGES, page=MarketsPage):
            look_up = selection.series is not None and its_series is None
            rows = [row for row in page.markets if isinstance(row.get("ticker"), str) and row["ticker"] not in seen]
            if look_up:
                await series.load_events([str(row["event_ticker"]) for row in rows if row.get("event_ticker")])
            for row in rows:
                of_row = await series.series_of(str(row.get("event_ticker") or "")) if look_up else its_series or ""
                if look_up and selection.series is not None and of_row not in selection.series:
                    continue
                seen.add(row["ticker"])
                yield read_market(row, of_row, "")
                if len(seen) >= selection.max_markets:
                    return


def _questions(selection: MarketSelection, created_after_ns: int | None) -> list[tuple[Params, str | None]]:
    """Return the parameters of each list to read, with the series that it is of where that is asked for."""
    base: list[tuple[str, str]] = [] if selection.include_multivariate else [("mve_filter", "exclude")]
    if selection.tickers is not None:
        return [([("tickers", ",".join(chunk)), *base], None) for chunk in _chunks(selection.tickers)]
    if created_after_ns is not None:
        return [([("min_created_ts", str(created_after_ns // _NS_PER_S)), *base], None)]
    if selection.series is not None:
        return [
            ([("series_ticker", one), ("status", status), *base], one)
            for one in dict.fromkeys(selection.series)
            for status in _STATUSES
        ]
    return [([("status", status), *base], None) for status in _STATUSES]


def _chunks(tickers: Sequence[str]) -> list[list[str]]:
    unique = list(dict.fromkeys(tickers))
    return [unique[at : at + _TICKERS_PER_REQUEST] for at in range(0, len(unique), _TICKERS_PER_REQUEST)]
