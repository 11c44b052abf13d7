"""The client against the simulated exchange: a signed session from the list of markets to a rebuilt book."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import aiohttp
import pytest

from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.exchange import Connection, Exchange, ExchangeSettings, Market, MarketSelection, open_exchange
from ssmd_dagster.kalshi import wire
from ssmd_dagster.kalshi.client import Kalshi
from ssmd_dagster.kalshi.errors import ExchangeRefusedError
from ssmd_dagster.kalshi.markets import SeriesLookup
from ssmd_dagster.simulator.main import Settings, Simulator
from ssmd_dagster_tests.kalshi.fakes import ED25519_KEY, Sink, eventually, pem


@asynccontextmanager
async def session(home: Path, *, private_key_pem: bytes | None = None) -> AsyncIterator[tuple[Simulator, Kalshi]]:
    """Run a simulator and open the exchange that it is."""
    simulator = Simulator(Settings(home=home, seed=7, markets=150, rate=2_000.0))
    await simulator.start()
    settings = ExchangeSettings(
        environment="kalshi-sim",
        endpoint=simulator.endpoint,
        rest_endpoint=simulator.rest_endpoint,
        rate_limit_per_second=1_000,
        max_symbols_per_connection=20_000,
        key_id=(home / "key_id").read_text().strip(),
        private_key_pem=private_key_pem or (home / "private_key.pem").read_bytes(),
    )
    exchange = Kalshi(settings, simulator.clock, rng=random.Random(1))
    try:
        yield simulator, exchange
    finally:
        await exchange.close()
        await simulator.stop()


async def open_markets(exchange: Kalshi) -> list[Market]:
    """Read all markets."""
    return [one async for one in exchange.markets(MarketSelection())]


async def test_the_security_master_is_read_whole(tmp_path: Path) -> None:
    """Every open market once, with series and category from events and series; by series and ticker the same rows."""
    async with session(tmp_path) as (_, exchange):
        markets = await open_markets(exchange)
        assert len({one.ticker for one in markets}) == len(markets) >= 100
        assert all(one.series_ticker and one.category and one.status == "active" for one in markets)
        assert all(0 < one.open_ns < one.close_ns for one in markets)
        series = markets[0].series_ticker
        by_series = {one.ticker: one async for one in exchange.markets(MarketSelection(series=(series,)))}
        assert {one.ticker for one in markets if one.series_ticker == series} <= set(by_series)
        named = [one async for one in exchange.markets(MarketSelection(tickers=(markets[0].ticker,)))]
        assert [(one.ticker, one.series_ticker, one.category) for one in named] == [
            (markets[0].ticker, series, markets[0].category)
        ]
        assert await SeriesLookup(exchange.rest).series_of(markets[0].event_ticker) == series
        assert (await exchange.status()).exchange_active
        assert (await exchange.schedule()).standard_hours
        assert (await exchange.cutoff()).trades_ns < exchange._clock()


async def test_a_session_follows_the_books(tmp_path: Path) -> None:
    """Subscribe, add and drop markets, ask for snapshots: seq has no hole, the rebuilt books are the exchange's."""
    async with session(tmp_path) as (simulator, exchange):
        tickers = [one.ticker for one in await open_markets(exchange)][:60]
        sink = Sink()
        connection = await exchange.connect(sink, tickers_per_command=20)
        channels = ["orderbook_delta", "trade", "ticker", "market_lifecycle_v2"]
        subscriptions = await connection.subscribe(channels, tickers[:40])
        assert [one.channel for one in subscriptions] == channels
        book_sid = subscriptions[0].sid
        await connection.add_markets(book_sid, tickers[40:])
        await connection.delete_markets(book_sid, tickers[:10])
        followed = tickers[10:]
        assert sorted(await connection.list_subscriptions(), key=lambda one: one.sid) == subscriptions
        await eventually(lambda: len(sink.frames) > 3_000, timeout_s=10)
        await simulator.stop_moving()
        await connection.request_snapshots(book_sid, followed)
        books, last_seen = rebuild(sink)
        assert set(followed) <= set(last_seen)
        for ticker in followed:
            assert books[ticker] == last_seen[ticker]
        over_rest = {one.ticker: {"yes": dict(one.yes), "no": dict(one.no)} async for one in exchange.books(followed)}
        assert over_rest == {ticker: books[ticker] for ticker in followed}
        for subscription in subscriptions:
            seqs = [one.seq for _, _, one in sink.frames if one and one.sid == subscription.sid and one.seq is not None]
            assert seqs == list(range(1, len(seqs) + 1))
        with pytest.raises(ExchangeRefusedError) as caught:
            await connection.unsubscribe([99])
        assert caught.value.code == 7
        await connection.close()
        assert sink.closed[0][1] == "closed by this side"


Book = dict[str, dict[int, int]]


def rebuild(sink: Sink) -> tuple[dict[str, Book], dict[str, Book]]:
    """Fold the frames into books up to the snapshots asked for last, and return these beside them."""
    books: dict[str, Book] = {}
    asked: dict[str, Book] = {}
    for _, _, envelope in sink.frames:
        assert envelope is not None
        row = wire.read(envelope.type, envelope.msg)
        if isinstance(row, wire.Snapshot):
            book = {"yes": dict(row.yes), "no": dict(row.no)}
            if envelope.id is not None:
                asked[row.ticker] = book
            else:
                books[row.ticker] = book
        elif isinstance(row, wire.Delta):
            level = books[row.ticker][row.side]
            level[row.price_micros] = level.get(row.price_micros, 0) + row.delta_centis
            assert level[row.price_micros] >= 0
            if level[row.price_micros] == 0:
                del level[row.price_micros]
    return books, asked


async def test_trades_over_rest_are_the_trades_of_the_socket(tmp_path: Path) -> None:
    """The same ids with the same prices, and each once."""
    async with session(tmp_path) as (simulator, exchange):
        sink = Sink()
        connection = await exchange.connect(sink)
        from_ns = simulator.clock()
        (tape,) = await connection.subscribe(["trade"], None)
        await eventually(lambda: len(sink.frames) > 200, timeout_s=10)
        await simulator.stop_moving()
        await connection.list_subscriptions()
        over_socket = {}
        for _, _, envelope in sink.frames:
            if envelope is not None and envelope.sid == tape.sid and envelope.type == "trade":
                row = wire.read("trade", envelope.msg)
                assert isinstance(row, wire.Trade)
                over_socket[row.trade_id] = row
        listed = [one async for one in exchange.trades(from_ns - 10**9, simulator.clock() + 10**9)]
        assert len({one.trade_id for one in listed}) == len(listed)
        over_rest = {one.trade_id: wire.read_trade(one.row) for one in listed}
        assert set(over_socket) <= set(over_rest)
        for trade_id, row in over_socket.items():
            other = over_rest[trade_id]
            assert (row.ticker, row.yes_price_micros, row.count_centis, row.taker_side) == (
                other.ticker,
                other.yes_price_micros,
                other.count_centis,
                other.taker_side,
            )
            assert other.event_ns is not None
            assert other.event_ns // 10**6 * 10**6 == row.event_ns
        await connection.close()


async def test_a_foreign_key_is_refused_in_the_handshake(tmp_path: Path) -> None:
    """The simulator says 401 as Kalshi does; it is a configuration error, not a reason to try again."""
    async with session(tmp_path, private_key_pem=pem(ED25519_KEY)) as (_, exchange):
        with pytest.raises(ConfigurationError, match="HTTP 401"):
            await exchange.connect(Sink())
        with pytest.raises(ConfigurationError, match="HTTP 401"):
            await exchange.status()


async def test_the_room_is_an_exchange_as_the_rest_of_the_house_knows_it(tmp_path: Path) -> None:
    """Opened by the feed's name, it fulfils the protocols; mypy checks the assignments."""
    async with session(tmp_path) as (simulator, kalshi):
        exchange: Exchange = open_exchange("kalshi", kalshi._settings, simulator.clock)
        assert isinstance(exchange, Kalshi)
        as_protocol: Exchange = kalshi
        connection: Connection = await kalshi.connect(Sink())
        await connection.close()
        assert as_protocol.channel_of_type["trade"] == "trade"
        await exchange.close()


async def test_listings_are_the_open_and_the_coming_markets(tmp_path: Path) -> None:
    """In few requests; later only what is new since, by series too, and by ticker whatever became of a market."""
    async with session(tmp_path) as (simulator, exchange):
        listed = {one.ticker: one async for one in exchange.listings(MarketSelection())}
        opened = {one.ticker for one in await open_markets(exchange)}
        assert opened < set(listed)
        assert {listed[ticker].status for ticker in set(listed) - opened} == {"initialized"}
        series = "KXBTC15M"
        of_series = [one async for one in exchange.listings(MarketSelection(series=(series,)))]
        assert {one.series_ticker for one in of_series} == {series}
        assert {one.ticker for one in of_series} < set(listed)
        since_ns = simulator.clock()
        async with aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{simulator.rest_port}/sim/clock"
            async with http.post(url, json={"advance_s": 1_800}) as answer:
                assert answer.status == 200
        for selection in (MarketSelection(), MarketSelection(series=(series,))):
            new = {one.ticker async for one in exchange.listings(selection, created_after_ns=since_ns)}
            assert new
            assert not new & set(listed)
        one, *_ = listed
        assert [m.ticker async for m in exchange.listings(MarketSelection(tickers=(one, "KX-NONE")))] == [one]
        limited = [m async for m in exchange.listings(MarketSelection(max_markets=3))]
        assert len(limited) == 3


async def test_an_exchange_that_rests_says_so_and_until_when(tmp_path: Path) -> None:
    """By its weekly hours, in Eastern time: a Thursday at four in the morning, and an hour later no more."""
    thursday = datetime(2026, 11, 26, 4, 0, tzinfo=ZoneInfo("America/New_York"))
    async with session(tmp_path) as (simulator, exchange):
        assert await exchange.closed(simulator.clock()) is None or simulator.engine.paused
        async with aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{simulator.rest_port}/sim/clock"
            for hour, closed in ((4, True), (5, False)):
                at = thursday.replace(hour=hour, minute=1)
                async with http.post(url, json={"set": at.astimezone(UTC).isoformat()}) as answer:
                    assert answer.status == 200
                said = await exchange.closed(simulator.clock())
                assert (said is not None) is closed
                if said is not None:
                    assert said.cause == "closed_by_schedule"
                    assert said.until_ns == int(thursday.replace(hour=5).timestamp()) * 10**9
                    assert said.since_ns == int(thursday.replace(hour=3).timestamp()) * 10**9
