"""The security master as Kalshi's REST has it: which markets there are, of which series and category.

A market's row names its event only; the event names its series, the series its category. Tickers look as if they could
be taken apart into these, but cannot. Not for keeping the master: see `stores.secmaster`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from typing import Any

import msgspec

from ssmd_dagster.errors import NotFoundError
from ssmd_dagster.exchange import Market, MarketPage, MarketSelection, Place
from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.rest import Params, RestClient, part
from ssmd_dagster.kalshi.scaled import rfc3339_ns

_MARKETS_PER_PAGE = 1000
_EVENTS_PER_PAGE = 200
_MAX_PAGES = 2_000
_TICKERS_PER_REQUEST = 100
_SERIES_BY_THEMSELVES = 20
"""Of more series than this the whole list is asked for: one answer, of 18 MB."""
_MAX_HISTORICAL = _MAX_PAGES * _MARKETS_PER_PAGE

_VOLATILE_KEYS = frozenset(
    f"{name}{suffix}"
    for name in (
        *("yes_bid", "yes_ask", "no_bid", "no_ask", "yes_bid_size", "yes_ask_size", "last_price", "liquidity"),
        *("previous_yes_bid", "previous_yes_ask", "previous_price", "volume", "volume_24h", "open_interest"),
    )
    for suffix in ("", "_dollars", "_fp")
)
"""What trading changes from moment to moment: not in `Market.detail`, or every market would seem changed every time."""


class MarketsPage(msgspec.Struct):
    """A page of `/markets` or `/historical/markets`."""

    markets: list[dict[str, Any]] = []
    cursor: str | None = None


class EventRow(msgspec.Struct, frozen=True):
    """An event's place: its series, and the category that old rows still carry."""

    event_ticker: str
    series_ticker: str = ""
    category: str = ""


class _EventsPage(msgspec.Struct):
    events: list[EventRow] = []
    cursor: str | None = None


class _OneEvent(msgspec.Struct):
    event: EventRow


class SeriesRow(msgspec.Struct, frozen=True):
    """A series with its primary category."""

    ticker: str
    category: str = ""
    title: str = ""


class _SeriesList(msgspec.Struct):
    series: list[SeriesRow] | None = None


class _OneSeries(msgspec.Struct):
    series: SeriesRow


class SeriesLookup:
    """Finds series and category of events over REST and remembers them; one per sweep of the markets."""

    def __init__(self, rest: RestClient) -> None:
        self._rest = rest
        self._series_of_event: dict[str, str] = {}
        self._category_of_series: dict[str, str] = {}

    async def load_all(self, statuses: Sequence[str], *, multivariate: bool) -> None:
        """Read all series (one large answer) and the events that have markets of `statuses`, page by page."""
        await self._load_series()
        for status in statuses:
            await self._load_events("/events", [("status", status)])
        if multivariate:
            await self._load_events("/events/multivariate", [])

    async def load_events(self, event_tickers: Sequence[str]) -> None:
        """Read the named events."""
        await self._load_named("/events", event_tickers)

    async def places(self, event_tickers: Collection[str]) -> dict[str, Place]:
        """Return where events belong, past ones and combos too, in few requests; what Kalshi does not know is left out."""
        await self._load_named("/events", event_tickers)
        await self._load_named("/events/multivariate", event_tickers)
        known = {one: self._series_of_event[one] for one in event_tickers if one in self._series_of_event}
        unknown = set(known.values()) - self._category_of_series.keys() - {""}
        if len(unknown) > _SERIES_BY_THEMSELVES:
            await self._load_series()
        else:
            for series in unknown:
                with contextlib.suppress(NotFoundError):
                    await self.category_of(series)
        return {one: Place(series, self._category_of_series.get(series, "")) for one, series in known.items()}

    async def series_of(self, event_ticker: str) -> str:
        """Return the series of an event, asking for it where it is not known yet; `""` where Kalshi has none."""
        if event_ticker not in self._series_of_event:
            try:
                answer = await self._rest.get(f"/events/{part(event_ticker)}", answer=_OneEvent)
                self._series_of_event[event_ticker] = answer.event.series_ticker
            except NotFoundError:
                # New markets can be listed some moments before their event can be read.
                return ""
        return self._series_of_event[event_ticker]

    async def category_of(self, series_ticker: str) -> str:
        """Return the category of a series. Raises `NotFoundError` where there is no such series."""
        if not series_ticker:
            return ""
        if series_ticker not in self._category_of_series:
            answer = await self._rest.get(f"/series/{part(series_ticker)}", answer=_OneSeries)
            self._category_of_series[series_ticker] = answer.series.category
        return self._category_of_series[series_ticker]

    async def _load_series(self) -> None:
        answer = await self._rest.get("/series", answer=_SeriesList)
        self._category_of_series.update((one.ticker, one.category) for one in answer.series or ())

    async def _load_named(self, path: str, event_tickers: Iterable[str]) -> None:
        unknown = [ticker for ticker in dict.fromkeys(event_tickers) if ticker not in self._series_of_event]
        for start in range(0, len(unknown), _TICKERS_PER_REQUEST):
            chunk = unknown[start : start + _TICKERS_PER_REQUEST]
            await self._load_events(path, [("tickers", ",".join(chunk))])

    async def _load_events(self, path: str, params: Params) -> None:
        async for page in self._rest.pages(
            path, params, limit=_EVENTS_PER_PAGE, max_pages=_MAX_PAGES, page=_EventsPage
        ):
            self._series_of_event.update((one.event_ticker, one.series_ticker) for one in page.events)


async def select_markets(rest: RestClient, selection: MarketSelection) -> AsyncIterator[Market]:
    """Yield the selected markets, each ticker once, at most `selection.max_markets`.

    By series or all: those that are open, and those yet to open where the selection says so. By tickers: whatever their
    status; a ticker that Kalshi does not know is left out. Raises what `RestClient.get` raises; an unknown series is a
    `NotFoundError`.
    """
    statuses = ("open", "unopened") if selection.include_unopened else ("open",)
    sweep = _Sweep(rest, selection)
    if selection.tickers is not None:
        tickers = list(dict.fromkeys(selection.tickers))
        for start in range(0, len(tickers), _TICKERS_PER_REQUEST):
            chunk = tickers[start : start + _TICKERS_PER_REQUEST]
            async for market in sweep.read([("tickers", ",".join(chunk))]):
                yield market
    if selection.series is not None:
        for series in dict.fromkeys(selection.series):
            for status in statuses:
                async for market in sweep.read([("series_ticker", series), ("status", status)], series=series):
                    yield market
    if selection.tickers is None and selection.series is None:
        await sweep.lookup.load_all(statuses, multivariate=selection.include_multivariate)
        for status in statuses:
            async for market in sweep.read([("status", status)]):
                yield market


class _Sweep:
    """One pass over the selected markets: drops repeated rows, stops at the most that are wanted."""

    def __init__(self, rest: RestClient, selection: MarketSelection, path: str = "/markets") -> None:
        self._rest = rest
        self._path = path
        self._most = selection.max_markets
        self._filter = [] if selection.include_multivariate else [("mve_filter", "exclude")]
        self._seen: set[str] = set()
        self.lookup = SeriesLookup(rest)

    async def read(self, params: Params, *, series: str | None = None) -> AsyncIterator[Market]:
        """Page through the list with `params`; `series` is the rows' series where the question names it."""
        if len(self._seen) >= self._most:
            return
        category = await self.lookup.category_of(series) if series is not None else ""
        pages = self._rest.pages(
            self._path, [*params, *self._filter], limit=_MARKETS_PER_PAGE, max_pages=_MAX_PAGES, page=MarketsPage
        )
        async for page in pages:
            if series is None:
                await self.lookup.load_events([event for row in page.markets if (event := row.get("event_ticker"))])
            for row in page.markets:
                ticker = row.get("ticker")
                if not isinstance(ticker, str) or ticker in self._seen:
                    continue
                self._seen.add(ticker)
                if series is not None:
                    yield read_market(row, series, category)
                else:
                    its_series = await self.lookup.series_of(row.get("event_ticker", ""))
                    yield read_market(row, its_series, await self.lookup.category_of(its_series))
                if len(self._seen) >= self._most:
                    return


async def historical_markets(
    rest: RestClient,
    *,
    tickers: Sequence[str] | None = None,
    event: str | None = None,
    series: str | None = None,
) -> AsyncIterator[Market]:
    """Yield markets settled before the cutoff, each ticker once, newest first as Kalshi has them.

    At most one of `tickers`, `event` and `series` may be given; without any, all but combos. Raises what
    `RestClient.get` raises.
    """
    if tickers is not None:
        unique = list(dict.fromkeys(tickers))
        size = _TICKERS_PER_REQUEST
        asked = [[("tickers", ",".join(unique[at : at + size]))] for at in range(0, len(unique), size)]
    elif event is not None:
        asked = [[("event_ticker", event)]]
    else:
        asked = [[("series_ticker", series)] if series is not None else [("mve_filter", "exclude")]]
    sweep = _Sweep(rest, MarketSelection(include_multivariate=True, max_markets=_MAX_HISTORICAL), "/historical/markets")
    for params in asked:
        async for market in sweep.read(params, series=series):
            yield market


class _RawPage(msgspec.Struct):
    markets: msgspec.Raw = msgspec.Raw(b"[]")
    cursor: str | None = None


class _Listed(msgspec.Struct, gc=False):
    ticker: str
    event_ticker: str = ""
    open_time: str = ""
    close_time: str = ""


async def market_pages(
    rest: RestClient,
    *,
    tickers: Sequence[str] | None = None,
    series: str | None = None,
    around: tuple[int, int] | None = None,
) -> AsyncIterator[MarketPage]:
    """Yield markets as the live and the historical list have them: those named, or all of one series, past ones too.

    With `around` (nanoseconds, half-open) only those that were open at some time in it. A ticker that neither list knows is
    left out. Raises what `RestClient.get` raises.
    """
    paths = ["/markets", "/historical/markets"]
    if series is not None:
        for path in paths:
            async for page in _raw_pages(rest, path, [("series_ticker", series)], around):
                yield page
        return
    wanted = list(dict.fromkeys(tickers or ()))
    for start in range(0, len(wanted), _TICKERS_PER_REQUEST):
        left = wanted[start : start + _TICKERS_PER_REQUEST]
        found = dict.fromkeys(paths, 0)
        for path in tuple(paths):
            if left:
                async for page in _raw_pages(rest, path, [("tickers", ",".join(left))], around):
                    found[path] += len(page.tickers)
                    left = [ticker for ticker in left if ticker not in page.tickers]
                    yield page
        # Most of an old day's markets are in the historical list: that is then asked first.
        paths.sort(key=lambda path: -found[path])


async def _raw_pages(
    rest: RestClient, path: str, params: Params, around: tuple[int, int] | None
) -> AsyncIterator[MarketPage]:
    async for page in rest.pages(path, params, limit=_MARKETS_PER_PAGE, max_pages=_MAX_PAGES, page=_RawPage):
        try:
            rows = msgspec.json.decode(page.markets, type=list[_Listed])
            raw = msgspec.json.decode(page.markets, type=list[msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ExchangeAnswerError(f"a market's row cannot be read: {error}", where=path) from error
        kept = [
            index
            for index, row in enumerate(rows)
            if around is None or (_time_ns(row.open_time) < around[1] and _time_ns(row.close_time) >= around[0])
        ]
        if kept:
            yield MarketPage(
                endpoint=path,
                params=dict(params),
                rows=b"[" + b",".join(bytes(raw[index]) for index in kept) + b"]",
                tickers=frozenset([rows[index].ticker for index in kept]),
                events=frozenset([rows[index].event_ticker for index in kept]) - {""},
            )


def read_market(row: dict[str, Any], series_ticker: str, category: str) -> Market:
    """Make a row of the security master from a REST market object, whose `ticker` it must have.

    `detail` keeps the object's keys but for the prices and volumes of the moment. `open_ns` or `close_ns` is 0 where
    the row has no readable time.
    """
    return Market(
        ticker=row["ticker"],
        event_ticker=str(row.get("event_ticker") or ""),
        series_ticker=series_ticker,
        category=category,
        title=str(row.get("title") or row.get("yes_sub_title") or ""),
        status=str(row.get("status") or ""),
        open_ns=_time_ns(row.get("open_time")),
        close_ns=_time_ns(row.get("close_time")),
        detail={key: value for key, value in row.items() if key not in _VOLATILE_KEYS},
    )


def _time_ns(text: Any) -> int:
    try:
        return rfc3339_ns(text)
    except ValueError:
        return 0
