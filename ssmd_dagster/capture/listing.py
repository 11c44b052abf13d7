"""Keeps a connector's roster in step with the exchange's list of markets, all day.

Four sources, any of which may be away: the security master in the cache, a short question to the exchange every few seconds
(what was listed since?), the whole list now and then, and the exchange's own messages about markets. Not here: what is
subscribed of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from ssmd_dagster.capture.subscriptions import Roster
from ssmd_dagster.clock import Clock
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import Exchange, Market, MarketNews, MarketSelection
from ssmd_dagster.stores.connect import Stores

LOOK_EVERY_S = 5.0
WHOLE_EVERY_S = 1_800.0
LOOK_BACK_NS = 120_000_000_000
"""How far a look overlaps the one before: the exchange's list may be seconds old, and its clock may differ."""
LOOK_SLOWEST_S = 60.0
TICKERS_PER_LOOK = 100

_log = logging.getLogger(__name__)


class Listing:
    """Fills a roster; `changed` is set whenever it has a new version."""

    def __init__(
        self,
        exchange: Exchange,
        selection: MarketSelection,
        roster: Roster,
        clock: Clock,
        stores: Callable[[], Stores | None],
    ) -> None:
        self.changed = asyncio.Event()
        self._exchange, self._roster, self._clock, self._stores = exchange, roster, clock, stores
        self._selection = msgspec.structs.replace(selection, include_unopened=True)
        self._last_sync: str | None = None
        self._complained: str | None = None
        self._unlisted_at = 0

    async def first(self) -> None:
        """Fill the roster once: from the security master, else from the exchange. Raises what the exchange's room raises."""
        await self._take_security_master()
        if not self._roster.tickers():
            await self._take(self._exchange.listings(self._selection))

    async def keep(self) -> None:
        """Follow the list until cancelled. What cannot be had is asked for again, more slowly where it is refused."""
        pause_s, whole_at = LOOK_EVERY_S, 0.0
        look_from_ns = self._clock()
        while True:
            began_ns = self._clock()
            whole = time.monotonic() >= whole_at
            await self._take_security_master()
            try:
                if whole:
                    await self._take(self._exchange.listings(self._selection))
                    whole_at = time.monotonic() + WHOLE_EVERY_S
                else:
                    await self._look(look_from_ns - LOOK_BACK_NS)
                await self._ask_for_closed()
            except SsmdError as error:
                pause_s = min(pause_s * 2, LOOK_SLOWEST_S)
                self._complain(str(error))
            else:
                pause_s, look_from_ns = LOOK_EVERY_S, began_ns
                self._complained = None
            if self._roster.let_go(self._clock()):
                self.changed.set()
            await asyncio.sleep(pause_s)

    def hear(self, recv_ns: int, news: MarketNews) -> None:
        """Take a message of the exchange about a market."""
        selection = self._selection
        if news.event == "listed" and (
            selection.series is not None or (selection.tickers is not None and news.ticker not in selection.tickers)
        ):
            return  # whose series it is the next look tells
        before = self._roster.version
        self._roster.hear(news, recv_ns)
        if self._roster.version != before:
            self.changed.set()

    async def _look(self, since_ns: int) -> None:
        """Ask for what is new: what was listed since, or the selected tickers that were not there yet, some at a time."""
        tickers = self._selection.tickers
        if tickers is None:
            await self._take(self._exchange.listings(self._selection, created_after_ns=since_ns))
            return
        unlisted = [ticker for ticker in tickers if ticker not in self._roster]
        if unlisted:
            at = self._unlisted_at % len(unlisted)
            self._unlisted_at = at + TICKERS_PER_LOOK
            await self._take_tickers(unlisted[at : at + TICKERS_PER_LOOK])

    async def _ask_for_closed(self) -> None:
        closed = self._roster.to_ask(self._clock(), TICKERS_PER_LOOK)
        if closed:
            await self._take_tickers(closed)

    async def _take_tickers(self, tickers: list[str]) -> None:
        named = MarketSelection(tickers=tuple(tickers), include_multivariate=True, max_markets=len(tickers))
        await self._take(self._exchange.listings(named))

    async def _take_security_master(self) -> None:
        stores = self._stores()
        if stores is None:
            return
        try:
            last_sync = await stores.secmaster.last_sync()
            if last_sync != self._last_sync:
                await self._take(stores.secmaster.each())
                self._last_sync = last_sync
        except SsmdError as error:  # whatever is wrong with the cache: the exchange has the list too
            _log.warning("security master not read from the cache: %s", error)

    async def _take(self, markets: AsyncIterator[Market]) -> None:
        before, left_out = self._roster.version, self._roster.left_out
        # One by one: rows are large, and there may be a hundred thousand.
        async for market in markets:
            self._roster.take((market,), self._clock())
        if self._roster.left_out > left_out:
            _log.warning("%d listed markets are not recorded: there is no room for more", self._roster.left_out)
        if self._roster.version != before:
            self.changed.set()

    def _complain(self, text: str) -> None:
        if text != self._complained:
            _log.warning("the list of markets is not up to date: %s", text)
        self._complained = text
