"""Kalshi as an `exchange.Exchange`: one REST client and as many WebSockets as are asked for.

Not for how these work: see `rest`, `socket`, `markets`, `trades`, `books`, `schedule`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from ssmd_dagster.clock import Clock
from ssmd_dagster.exchange import (
    Closed,
    Envelope,
    ExchangeSettings,
    ExchangeStatus,
    FrameSink,
    Market,
    MarketPage,
    MarketSelection,
    Place,
    Trade,
    TradePage,
    TradeQuery,
    TradesRead,
)
from ssmd_dagster.kalshi.auth import open_signer
from ssmd_dagster.kalshi.books import read_books
from ssmd_dagster.kalshi.listings import read_listings
from ssmd_dagster.kalshi.markets import SeriesLookup, historical_markets, market_pages, select_markets
from ssmd_dagster.kalshi.pacing import Sleep
from ssmd_dagster.kalshi.rest import RestClient
from ssmd_dagster.kalshi.scaled import rfc3339_ns
from ssmd_dagster.kalshi.schedule import Schedule, read_schedule
from ssmd_dagster.kalshi.socket import (
    BOOK_CHANNELS,
    MARKET_CHANNELS,
    TICKERS_PER_COMMAND,
    KalshiConnection,
    open_connection,
)
from ssmd_dagster.kalshi.tape import pages_of_tape, read_tape
from ssmd_dagster.kalshi.trades import Cutoff, read_cutoff, read_trades
from ssmd_dagster.kalshi.wire import CHANNEL_OF_TYPE, Snapshot, event_time_ns

_STATUS_COMES_WITH = frozenset({500, 503, 504})
_LONGEST_CLOSED_NS = 8 * 86_400 * 1_000_000_000


class _Status(msgspec.Struct):
    exchange_active: bool
    trading_active: bool
    exchange_estimated_resume_time: Any = None


class Kalshi:
    """Kalshi, opened for one environment. Create it inside a running event loop; `close` it."""

    channel_of_type: Mapping[str, str] = CHANNEL_OF_TYPE
    market_channels = MARKET_CHANNELS
    book_channels = BOOK_CHANNELS

    def __init__(
        self, settings: ExchangeSettings, clock: Clock, *, rng: random.Random, sleep: Sleep = asyncio.sleep
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._sleep = sleep
        self._signer = open_signer(settings)
        self.rest = RestClient(settings, self._signer, clock, rng=rng, sleep=sleep)
        self._series = SeriesLookup(self.rest)

    def event_time_ns(self, envelope: Envelope) -> int | None:
        """Return when the exchange says that the message's matter happened, or None where it does not say."""
        return event_time_ns(envelope.msg) if envelope.msg else None

    def markets(self, selection: MarketSelection) -> AsyncIterator[Market]:
        """Yield the selected markets, each ticker once; see `markets.select_markets`."""
        return select_markets(self.rest, selection)

    def listings(self, selection: MarketSelection, created_after_ns: int | None = None) -> AsyncIterator[Market]:
        """Yield the selected markets as the bare list has them; see `listings.read_listings`."""
        return read_listings(self.rest, self._series, selection, created_after_ns)

    async def closed(self, at_ns: int) -> Closed | None:
        """Ask whether the exchange says that it is closed: in maintenance, or by its weekly hours."""
        status = await self.status()
        if not status.exchange_active:
            return Closed(cause="exchange_maintenance", until_ns=status.resume_ns)
        if status.trading_active:
            return None
        closed = (await self.schedule()).closed(at_ns - _LONGEST_CLOSED_NS, at_ns + _LONGEST_CLOSED_NS)
        now = next(((start, end) for start, end in closed if start <= at_ns < end), None)
        return None if now is None else Closed(cause="closed_by_schedule", since_ns=now[0], until_ns=now[1])

    async def status(self) -> ExchangeStatus:
        """Ask the exchange whether it is open; in maintenance it says so with a 5xx, which is an answer too."""
        got = await self.rest.get("/exchange/status", answer=_Status, also_statuses=_STATUS_COMES_WITH)
        resume_ns = None
        with contextlib.suppress(ValueError):  # an estimate, left out or in words: whether it is open is what counts
            resume_ns = rfc3339_ns(got.exchange_estimated_resume_time)
        return ExchangeStatus(
            exchange_active=got.exchange_active, trading_active=got.trading_active, resume_ns=resume_ns
        )

    def trades(self, from_ns: int, to_ns: int, ticker: str | None = None) -> AsyncIterator[Trade]:
        """Yield the exchange's own list of trades in `[from_ns, to_ns]`; see `trades.read_trades`."""
        return read_trades(self.rest, self._clock, from_ns, to_ns, ticker)

    async def trade_pages(self, query: TradeQuery, take: Callable[[TradePage], Awaitable[None]]) -> TradesRead:
        """Hand the pages of the list of trades to `take`; see `tape.read_tape`."""
        return await read_tape(self.rest, query, take)

    async def pages_of_tape(self, from_ns: int, to_ns: int) -> int:
        """Estimate how many pages the list of all trades of an interval has."""
        return await pages_of_tape(self.rest, from_ns, to_ns)

    def market_pages(
        self, *, tickers: Sequence[str] | None = None, series: str | None = None, around: tuple[int, int] | None = None
    ) -> AsyncIterator[MarketPage]:
        """Yield markets, past ones too, as the lists have them; see `markets.market_pages`."""
        return market_pages(self.rest, tickers=tickers, series=series, around=around)

    async def places(self, events: Collection[str]) -> dict[str, Place]:
        """Return series and category of events, as far as Kalshi knows them; see `markets.SeriesLookup`."""
        return await self._series.places(events)

    async def cutoff(self) -> Cutoff:
        """Ask where the live part of the REST ends; it advances."""
        return await read_cutoff(self.rest)

    async def maintenance(self) -> Sequence[tuple[int, int]]:
        """Ask for the announced maintenance, in order."""
        return (await self.schedule()).maintenance()

    async def schedule(self) -> Schedule:
        """Ask for the exchange's trading hours and announced maintenance."""
        return await read_schedule(self.rest)

    def historical_markets(
        self, *, tickers: Sequence[str] | None = None, event: str | None = None, series: str | None = None
    ) -> AsyncIterator[Market]:
        """Yield markets settled before the cutoff; see `markets.historical_markets`."""
        return historical_markets(self.rest, tickers=tickers, event=event, series=series)

    def books(self, tickers: Sequence[str]) -> AsyncIterator[Snapshot]:
        """Yield whole order books over REST; see `books.read_books`."""
        return read_books(self.rest, tickers)

    async def connect(
        self, sink: FrameSink, *, use_yes_price: bool = False, tickers_per_command: int = TICKERS_PER_COMMAND
    ) -> KalshiConnection:
        """Open one socket; see `socket.open_connection`."""
        return await open_connection(
            self._settings,
            self._signer,
            sink,
            self._clock,
            self._rng,
            use_yes_price=use_yes_price,
            tickers_per_command=tickers_per_command,
            sleep=self._sleep,
        )

    async def close(self) -> None:
        """Close the REST client; sockets have their own lives."""
        await self.rest.close()
