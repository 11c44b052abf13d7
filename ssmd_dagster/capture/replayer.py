"""The replayer: fetches a day's trades, and the markets that they are of, from the exchange's REST history.

    python -m ssmd_dagster.capture.replayer ENV DATE [SHARE]

Runs under the supervisor until everything is in the spool and acknowledged by the stream, then ends with exit code 0. Every page
says which stretch of time is complete with it; a replayer that comes after a killed one reads that from the spool and goes on
there. SHARE says among how many replayers the key's rate is divided. Not for deltas and tickers, which no exchange gives out
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from ssmd_dagster.archive.batch import Batch
from ssmd_dagster.archive.records import parse_record, payload_of
from ssmd_dagster.capture.process import Heartbeat, cancel, connected, give_way, run
from ssmd_dagster.capture.programs import REPLAYER as COMPONENT
from ssmd_dagster.capture.rest_pages import RestPages
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.capture.spool import read_spool, shard_of, spool_path, spooled_connections, spooled_records
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.states import EventName
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import ExitCode, NotFoundError, RefusedError, SsmdError
from ssmd_dagster.exchange import (
    REST,
    Covered,
    Exchange,
    ExchangeSettings,
    MarketPage,
    Place,
    TradePage,
    TradeQuery,
    open_exchange,
)
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook

TRADES_PAGE, MARKETS_PAGE = "rest_trades", "rest_markets"
GIVE_UP_AFTER_S = 180.0
"""How long an exchange that cannot be reached is asked again without a single page."""
RETRY_AFTER_S = 3.0
LOOKED_UP_AT_ONCE = 2_000
MAX_TICKERS_BY_THEMSELVES = 5_000

_log = logging.getLogger(__name__)


class _Ticker(msgspec.Struct, gc=False):
    ticker: str


class _Trades(msgspec.Struct, gc=False):
    covered: Covered | None = None
    trades: list[_Ticker] = []
    asked: list[str] = []


class _Wire(msgspec.Struct, gc=False):
    type: str = ""
    msg: _Trades = msgspec.field(default_factory=_Trades)


class Fetched(msgspec.Struct):
    """What is in the spool already: stretches of time, trades, their tickers, and tickers that were looked up."""

    covered: list[Covered] = []
    trades: int = 0
    pages: int = 0
    traded: set[str] = set()
    looked_up: set[str] = set()

    def add(self, page: TradePage) -> None:
        """Take note of a page of trades."""
        self.covered.append(page.covered)
        self.trades += page.count
        self.pages += 1
        self.traded |= page.tickers


_decode_wire = msgspec.json.Decoder(_Wire).decode


def read_fetched(directory: Path, after_epoch: int) -> Fetched:
    """Read from the spool what replayers of later epochs than `after_epoch` have fetched. Memory: one batch."""
    fetched = Fetched()
    for conn in spooled_connections(directory):
        if shard_of(conn) != REST or int(conn.partition("-")[0]) <= after_epoch:
            continue
        for batch, encoded in read_spool(spool_path(directory, conn)):
            if batch.header.channel == REST:
                _read_batch(encoded, batch, fetched)
    return fetched


def _read_batch(encoded: bytes, batch: Batch, fetched: Fetched) -> None:
    for line in spooled_records(encoded, batch).splitlines():
        wire = _decode_wire(payload_of(parse_record(line)) or b"{}")
        if wire.msg.covered is not None:
            fetched.covered.append(wire.msg.covered)
            fetched.trades += len(wire.msg.trades)
            fetched.pages += 1
            fetched.traded.update(row.ticker for row in wire.msg.trades)
        fetched.looked_up.update(wire.msg.asked)


class Replayer:
    """Fetches one day of one environment."""

    def __init__(self, setting: Setting, stores: Stores, day: TradingDay, after_epoch: int, share: int) -> None:
        assert day.epoch is not None
        self._setting, self._stores, self._day, self._share = setting, stores, day, share
        self._after_epoch, self._epoch = after_epoch, day.epoch
        calendar, date = setting.env.calendar(), Date.fromisoformat(day.date)
        self._from_ns = calendar.open_ns(date) if day.open_ns is None else day.open_ns
        self._to_ns = calendar.close_ns(date) if day.close_ns is None else day.close_ns
        self._fetched = Fetched()
        self._began_with = 0
        self._markets = 0
        self._state, self._error = "starting", ""
        self._exit_code: int | None = None
        self._progress_at = self._began_at = time.monotonic()
        self._heartbeat = Heartbeat(stores.cache, day.date, COMPONENT, self._epoch, self._status)

    async def run(self) -> None:
        """Fetch everything; what an exchange in trouble refuses is asked for again for `GIVE_UP_AFTER_S`."""
        beating = asyncio.create_task(self._heartbeat.run())
        try:
            await self._fetch()
            self._state, self._error = "done", ""
        except SsmdError as error:
            self._state, self._error = "failed", str(error)
            self._exit_code = None if error.transient else int(error.exit_code)
            raise
        finally:
            await cancel(beating)
            await self._heartbeat.beat()

    async def _fetch(self) -> None:
        directory = spool_dir(self._setting.home, self._setting.env.name, self._day.date)
        self._fetched = await asyncio.to_thread(read_fetched, directory, self._after_epoch)
        self._began_with = self._fetched.trades
        async with RestPages(self._setting, self._stores, self._day.date, self._epoch) as pages:
            exchange = open_exchange(self._setting.env.feed, self._exchange_settings(), self._setting.clock)
            try:
                while True:
                    try:
                        await self._fetch_all(exchange, pages)
                        break
                    except SsmdError as error:
                        if not error.transient or time.monotonic() > self._progress_at + GIVE_UP_AFTER_S:
                            raise
                        self._error = str(error)
                        _log.warning("%s; trying again", error)
                    await asyncio.sleep(RETRY_AFTER_S)
            finally:
                await exchange.close()
            self._state = "storing"

    def _exchange_settings(self) -> ExchangeSettings:
        # The address of today: where the exchange was reached on that day says nothing of where its history is.
        today = self._setting.env.calendar().date_at(self._setting.clock()).isoformat()
        settings = self._setting.exchange_settings(today)
        return replace(settings, rate_limit_per_second=max(1, settings.rate_limit_per_second // self._share))

    async def _fetch_all(self, exchange: Exchange, pages: RestPages) -> None:
        selection = self._setting.env.capture.markets.selection()
        window = self._from_ns, self._to_ns
        tickers: set[str] | None = None
        if selection.series is not None or selection.tickers is not None:
            self._state = "markets"
            tickers = set(selection.tickers or ())
            for series in selection.series or ():
                async for page in exchange.market_pages(series=series, around=window):
                    await self._put_markets(pages, page, (), await exchange.places(page.events))
                    tickers |= page.tickers
            await self._look_up(exchange, pages, selection.tickers or ())
        query = TradeQuery(
            from_ns=self._from_ns,
            to_ns=self._to_ns,
            tickers=None if tickers is None else frozenset(tickers),
            include_multivariate=selection.include_multivariate or tickers is not None,
            known=tuple(self._fetched.covered),
        )
        if tickers is not None and len(tickers) < MAX_TICKERS_BY_THEMSELVES:
            whole = await exchange.pages_of_tape(self._from_ns, self._to_ns)
            query = replace(query, per_ticker=len(tickers) < whole)
        # What the exchange's list is held against in the end: a market of which no trade came is asked for there too.
        named = None if tickers is None else sorted(tickers)
        pages.note({"event": "asked", "channels": ["trade"], "tickers": named})
        self._state = "trades"

        async def take(page: TradePage) -> None:
            await pages.put(TRADES_PAGE, trades_message(page))
            self._fetched.add(page)
            self._progressed()

        if tickers is None or tickers:
            await exchange.trade_pages(query, take)
        if self._fetched.trades == 0:
            raise NotFoundError(
                f"the exchange lists no trade of {self._day.date}",
                where=self._setting.env.name,
                do="Is that day before the exchange's first one, or are the environment's markets younger?",
            )
        self._state = "markets"
        await self._look_up(exchange, pages, sorted(self._fetched.traded))

    async def _look_up(self, exchange: Exchange, pages: RestPages, tickers: Iterable[str]) -> None:
        """Fetch the rows of markets that were not asked for yet; those that the exchange does not know are left out."""
        left = [ticker for ticker in tickers if ticker not in self._fetched.looked_up]
        for start in range(0, len(left), LOOKED_UP_AT_ONCE):
            chunk = left[start : start + LOOKED_UP_AT_ONCE]
            found = [page async for page in exchange.market_pages(tickers=chunk)]
            places = await exchange.places(frozenset[str]().union(*(page.events for page in found)))
            unnamed = set(chunk).difference(*(page.tickers for page in found))
            for number, page in enumerate(found, start=1):
                # The last page says that all of them were asked for, found or not.
                await self._put_markets(pages, page, unnamed if number == len(found) else (), places)
            self._fetched.looked_up.update(chunk)

    async def _put_markets(
        self, pages: RestPages, page: MarketPage, unknown: Iterable[str], places: Mapping[str, Place]
    ) -> None:
        asked = sorted([*page.tickers, *unknown])
        await pages.put(MARKETS_PAGE, markets_message(page, asked, places))
        self._fetched.looked_up.update(asked)
        self._markets += len(page.tickers)
        self._progressed()

    def _progressed(self) -> None:
        self._progress_at = time.monotonic()
        self._error = ""

    def _status(self) -> dict[str, Any]:
        fetched = self._fetched
        return {
            "state": self._state,
            "error": self._error,
            "exit_code": self._exit_code,
            "at_ns": self._setting.clock(),
            "trades": fetched.trades,
            "new_trades": fetched.trades - self._began_with,
            "pages": fetched.pages,
            "markets": len(fetched.looked_up),
            "covered": round(self._part(), 4),
            "since_s": round(time.monotonic() - self._began_at, 3),
        }

    def _part(self) -> float:
        """Return how much of the window has come, from 0 to 1; where markets are read by themselves, of those begun."""
        covered_ns, tickers = 0, {one.ticker for one in self._fetched.covered}
        for one in self._fetched.covered:
            covered_ns += max(0, min(one.to_ns, self._to_ns) - max(one.from_ns, self._from_ns))
        return min(1.0, covered_ns / max(1, (self._to_ns - self._from_ns) * max(1, len(tickers))))


def trades_message(page: TradePage) -> bytes:
    """Return the `msg` of a page of trades: endpoint, parameters, what is complete with it, and the rows as they came."""
    return b'{"endpoint":%b,"params":%b,"covered":%b,"trades":%b}' % (
        msgspec.json.encode(page.endpoint),
        msgspec.json.encode(page.params),
        msgspec.json.encode(page.covered),
        page.rows,
    )


def markets_message(page: MarketPage, asked: list[str], places: Mapping[str, Place]) -> bytes:
    """Return the `msg` of a page of markets; `asked` are the tickers that need not be asked for again.

    Rows do not say which series they are of: `places` says it of their events.
    """
    return b'{"endpoint":%b,"params":%b,"asked":%b,"places":%b,"markets":%b}' % (
        msgspec.json.encode(page.endpoint),
        msgspec.json.encode(page.params),
        msgspec.json.encode(asked),
        msgspec.json.encode({event: places[event] for event in sorted(page.events) if event in places}),
        page.rows.replace(b"\n", b" ").replace(b"\r", b" "),
    )


async def last_completion(stores: Stores, day: TradingDay) -> int:
    """Return the journal's sequence at which a day was last COMPLETE; 0 where it never was."""
    events = await stores.journal.read_day(day)
    return max((stored.seq for stored in events if stored.event.event is EventName.COMPLETED), default=0)


async def main(env_name: str, date: str, share: int, stop: asyncio.Event) -> None:
    """Fetch one day in the epoch that holds it now; stops early when `stop` is set."""
    give_way()
    setting = load_setting(env_name)
    async with connected(setting, COMPONENT) as stores:
        book = DayBook(setting.env.name, stores.journal, stores.cache, setting.clock, f"capture:{COMPONENT}")
        day = await book.day(date)
        if day is None or day.epoch is None or day.mode != "replay":
            raise RefusedError(f"trading day {date} is not being replayed", where=env_name)
        replayer = Replayer(setting, stores, day, await last_completion(stores, day), share)
        working = asyncio.create_task(replayer.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopped = not working.done()
        await cancel(stopping)
        if stopped:
            await cancel(working)
            raise RefusedError(f"the replay of {date} was told to stop", where=env_name)
        with contextlib.suppress(asyncio.CancelledError):
            await working


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not all(word.isdigit() for word in sys.argv[3:]):
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], sys.argv[2], max(1, int(sys.argv[3]) if len(sys.argv) == 4 else 1), stop))
