"""A connector against the simulated exchange, which breaks what it is told to: every loss is a gap, and only losses are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.capture import connector as connector_module
from ssmd_dagster.capture import follower as follower_module
from ssmd_dagster.capture import listing as listing_module
from ssmd_dagster.capture.audit import declare_gaps
from ssmd_dagster.capture.connector import Connector
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.spool import read_spool, spool_path, spooled_connections, spooled_records
from ssmd_dagster.day.events import Gap
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster.exchange import ExchangeSettings, MarketSelection
from ssmd_dagster.kalshi.client import Kalshi
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster_tests.capture.conftest import MakeSetting
from ssmd_dagster_tests.capture.recordings import DATE, eventually
from ssmd_dagster_tests.simulator.conftest import Running, running

CHANNELS = ["trade", "ticker", "orderbook_delta", "market_lifecycle_v2"]


class Capture:
    """A connector at work on a simulator, and what it has told."""

    def __init__(self, connector: Connector, sim: Running, setting: Setting, book: DayBook) -> None:
        self.connector, self.sim, self.setting, self.book = connector, sim, setting, book

    @property
    def status(self) -> dict[str, Any]:
        """The heartbeat's content."""
        return self.connector._status()

    async def fault(self, fault: str, **order: Any) -> None:
        """Break something."""
        assert (await self.sim.post("/sim/faults", fault=fault, **order))["number"] > 0

    async def up(self, connections: int = 1) -> None:
        """Wait until so many connections were made and the last one is subscribed and gets data."""
        await eventually(
            lambda: (
                self.connector._connections >= connections
                and self.status["state"] == "subscribed"
                and self.status["frames"] > 50
            )
        )

    def notes(self, *events: str) -> list[dict[str, Any]]:
        """Return what the connector has noted so far, in the spool, of some events."""
        folder = spool_dir(self.setting.home, self.setting.env.name, DATE)
        return [
            record.note
            for conn in spooled_connections(folder)
            for batch, encoded in read_spool(spool_path(folder, conn))
            if batch.header.channel == "session"
            for record in map(parse_record, spooled_records(encoded, batch).splitlines())
            if record.note is not None and record.note["event"] in events
        ]

    async def gaps(self) -> list[Gap]:
        """Return the day's gaps once the journal has been told of all."""
        await eventually(lambda: self.connector._gaps.waiting == 0)
        day = await self.book.day(DATE)
        assert day is not None
        return list(day.gaps)


@contextlib.asynccontextmanager
async def capturing(
    setting: Setting, sim: Running, book: DayBook, shard: str = "a", **selection: Any
) -> AsyncIterator[Capture]:
    """Run a connector until the end of the block."""
    setting = msgspec.structs.replace(setting, clock=sim.simulator.clock)
    settings = ExchangeSettings(
        environment=setting.env.name,
        endpoint=sim.simulator.endpoint,
        rest_endpoint=sim.simulator.rest_endpoint,
        rate_limit_per_second=500,
        max_symbols_per_connection=20_000,
        key_id=(sim.home / "key_id").read_text().strip(),
        private_key_pem=(sim.home / "private_key.pem").read_bytes(),
    )
    exchange = Kalshi(settings, sim.simulator.clock, rng=random.Random(1))
    connector = Connector(setting, exchange, DATE, 3, shard)
    stop = asyncio.Event()
    task = asyncio.create_task(connector.run(stop))
    try:
        yield Capture(connector, sim, setting, book)
        stop.set()
        await asyncio.wait_for(task, 30)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await exchange.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look and reconnect at once."""
    monkeypatch.setattr(connector_module, "RECONNECT_MIN_S", 0.05)
    monkeypatch.setattr(follower_module, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(listing_module, "LOOK_EVERY_S", 0.2)


@pytest.fixture
def setting(make_setting: MakeSetting) -> Setting:
    """The setting of this test's environment: all channels."""
    return make_setting(channels=CHANNELS)


@pytest.fixture
async def sim(tmp_path: Path) -> AsyncIterator[Running]:
    """A simulator of some sixty markets."""
    async with running(tmp_path / "sim", rate=1_000.0) as here:
        yield here


async def test_a_quiet_session_has_no_gap(setting: Setting, stores: Stores, book: DayBook, sim: Running) -> None:
    """Numbers of every kind of frame follow each other; the books are asked for now and then and at the end."""
    follower_module.PROOF_EVERY_S, before = 0.3, follower_module.PROOF_EVERY_S
    try:
        async with capturing(setting, sim, book) as capture:
            await capture.up()
            await eventually(lambda: len(capture.notes("get_snapshot")) >= 2)
            assert await capture.gaps() == []
            status = capture.status
            assert (status["missing"], status["duplicates"], status["reordered"]) == (0, 0, 0)
            assert status["markets"] >= 60
    finally:
        follower_module.PROOF_EVERY_S = before
    assert {note["why"] for note in capture.notes("get_snapshot")} == {"proof"}
    assert capture.notes("no_snapshots") == []
    day = await book.day(DATE)
    assert day is not None
    final = day.checkpoints["connector-a"]
    assert final.final
    assert final.connections["3-a-0"]["orderbook_delta"].records > 0


async def test_a_jump_is_a_gap_of_its_subscription_and_asks_for_the_books(
    setting: Setting, stores: Stores, book: DayBook, sim: Running
) -> None:
    """From the frame before to the frame after, once; another subscription's books are left alone."""
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        await capture.fault("sequence_jump", channel="orderbook_delta", count=3)
        await eventually(lambda: capture.status["missing"] == 3)
        await capture.fault("sequence_jump", channel="trade", count=1)
        await eventually(lambda: capture.status["missing"] == 4)
        await eventually(lambda: capture.status["snapshots_due"] == 0)
        books, trades = await capture.gaps()
        assert (books.cause, books.outcome, books.scope["channel"]) == ("sequence_jump", "stays", "orderbook_delta")
        assert (trades.scope["channel"], trades.scope["conn"]) == ("trade", "3-a-0")
        assert books.to_ns is not None
        assert 0 <= books.to_ns - books.from_ns < 2 * 10**9
    asked = [note for note in capture.notes("get_snapshot") if note["why"] == "sequence_jump"]
    assert [(note["sid"], note["markets"]) for note in asked] == [(books.scope["sid"], capture.status["markets"])]
    assert [note["channel"] for note in capture.notes("sequence_jump")] == ["orderbook_delta", "trade"]


async def test_frames_that_come_twice_late_or_in_disorder_are_counted(
    setting: Setting, stores: Stores, book: DayBook, sim: Running
) -> None:
    """None of them is a gap that stays."""
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        await capture.fault("duplicate", channel="trade", count=4)
        await eventually(lambda: capture.status["duplicates"] == 4)
        await capture.fault("reorder", channel="orderbook_delta", count=3)
        await eventually(lambda: capture.status["reordered"] == 3)
        await capture.fault("late", channel="orderbook_delta", count=2, delay_s=1.0)
        await eventually(lambda: capture.status["healed"] == 2)
        gaps = await capture.gaps()
        assert {(gap.cause, gap.outcome) for gap in gaps} == {("sequence_jump", "healed")}


@pytest.mark.parametrize(
    ("code", "channel"), [(10, "orderbook_delta"), (25, "market_lifecycle_v2"), (7, "orderbook_delta")]
)
async def test_a_subscription_that_the_exchange_ends_is_made_again(
    setting: Setting,
    stores: Stores,
    book: DayBook,
    sim: Running,
    code: int,
    channel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the same socket, with a gap of that subscription alone; one that was forgotten is found with the next proof."""
    if code == 7:
        monkeypatch.setattr(follower_module, "PROOF_EVERY_S", 0.2)
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        sid = capture.connector._follower.sids[channel]  # type: ignore[union-attr]
        await capture.fault("channel_error", channel=channel, code=code)
        await eventually(lambda: capture.notes("subscription_lost") != [])
        await eventually(lambda: len(capture.connector._follower.sids) == len(CHANNELS))  # type: ignore[union-attr]
        (gap,) = await capture.gaps()
        assert (gap.cause, gap.outcome, gap.scope["sid"]) == ("not_subscribed", "stays", sid)
        assert capture.connector._connections == 1
        if channel == "orderbook_delta":
            await eventually(lambda: capture.status["snapshots_due"] == 0)
        assert capture.status["missing"] == 0


async def test_books_that_stay_away_are_asked_for_on_the_next_connection(
    setting: Setting, stores: Stores, book: DayBook, sim: Running
) -> None:
    """The exchange closes amid its snapshots: a gap between, and every book in the end."""
    await sim.post("/sim/faults", fault="half_snapshot", connection="next")
    async with capturing(setting, sim, book) as capture:
        await capture.up(2)
        await eventually(lambda: capture.status["snapshots_due"] == 0)
        assert all(gap.cause in ("connection_lost", "sequence_jump") for gap in await capture.gaps())


async def test_snapshots_that_were_lost_are_asked_for_again(
    setting: Setting, stores: Stores, book: DayBook, sim: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first numbers of a sequence never came: that is a gap from the subscription on, and the books come all the same."""
    await sim.post("/sim/faults", fault="sequence_jump", connection="next", channel="orderbook_delta", count=10)
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        await eventually(lambda: capture.status["missing"] == 10)
        await eventually(lambda: capture.status["snapshots_due"] == 0)
        (gap,) = await capture.gaps()
        assert gap.gap_id == f"gap-3-a-0-{gap.scope['sid']}-0"


async def test_an_exchange_that_wants_rest_gets_it(
    setting: Setting, stores: Stores, book: DayBook, sim: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """429 on the handshake: slower, and the gap says so from the first refusal on."""
    monkeypatch.setattr(connector_module, "RATE_LIMITED_MIN_S", 0.2)
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        await capture.fault("refuse_handshake", status=429, count=2)
        await capture.fault("disconnect")
        await capture.up(2)
        lost, limited = await capture.gaps()
        assert (lost.cause, limited.cause) == ("connection_lost", "rate_limited")
        assert lost.to_ns == limited.from_ns
        assert limited.outcome == "stays"
    assert await declare_gaps(spool_dir(setting.home, setting.env.name, DATE), book, DATE) == 0


async def test_a_key_whose_file_is_away_costs_no_connection(
    setting: Setting, stores: Stores, book: DayBook, sim: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the connector was started with is in memory: a reconnect reads no credentials, whose lack would end it for good."""

    def gone(self: Setting, date: str) -> ExchangeSettings:
        raise ConfigurationError("the exchange's private key cannot be read")

    async with capturing(setting, sim, book) as capture:
        await capture.up()
        monkeypatch.setattr(Setting, "exchange_settings", gone)
        await capture.fault("disconnect")
        await capture.up(2)


async def test_markets_that_are_listed_are_subscribed_before_they_open(
    setting: Setting, stores: Stores, book: DayBook, sim: Running
) -> None:
    """Fifteen-minute series list new markets all day; what has settled is let go after a while; no gap, no hole."""
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        roster = capture.connector._roster
        for _ in range(3):
            before = set(roster.tickers())
            await sim.post("/sim/clock", advance_s=900)
            await eventually(lambda before=before: set(roster.tickers()) - before)  # type: ignore[misc]
            await eventually(lambda: capture.status["markets"] == len(roster.tickers()))
        await eventually(lambda: capture.notes("deleted") != [] and capture.notes("clock_step") != [])
        late = [gap for gap in await capture.gaps() if gap.cause == "not_subscribed"]
        assert all(gap.outcome == "stays" and gap.scope["markets"] for gap in late)
        assert capture.status["missing"] == 0
    assert capture.notes("added") != []


async def test_no_markets_at_all_is_no_trouble(
    make_setting: MakeSetting, stores: Stores, book: DayBook, sim: Running
) -> None:
    """What needs no market is subscribed, and a market that appears is taken up."""
    setting = make_setting(channels=CHANNELS, markets={"tickers": ["KX-NONE"]})
    async with capturing(setting, sim, book) as capture:
        await eventually(lambda: capture.status["state"] == "subscribed")
        assert capture.status["markets"] == 0
        assert capture.connector._follower.sids.keys() == {"market_lifecycle_v2"}  # type: ignore[union-attr]
        (row,) = [one async for one in capture.connector._exchange.markets(MarketSelection(max_markets=1))]
        capture.connector._roster.take([row], sim.simulator.clock())
        await eventually(lambda: capture.status["markets"] == 1 and capture.status["snapshots_due"] == 0)


async def test_a_disk_that_hangs_for_a_while_costs_nothing(
    setting: Setting, stores: Stores, book: DayBook, sim: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes meanwhile waits in memory; a socket that is not read would be taken for a dead one."""
    monkeypatch.setattr(connector_module, "PAUSE_AT_BYTES", 50_000)
    monkeypatch.setattr(connector_module, "READ_ON_AT_BYTES", 10_000)
    monkeypatch.setattr(connector_module, "DISK_HANGS_S", 0.2)
    monkeypatch.setattr(connector_module, "SILENCE_S", 1.5)
    fsync, moves = os.fsync, threading.Event()
    moves.set()

    def hanging(fd: int) -> None:
        moves.wait(10)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", hanging)
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        frames = capture.status["frames"]
        moves.clear()
        try:
            await eventually(lambda: capture.status["frames"] > frames + 3_000)
        finally:
            moves.set()
        assert capture.connector._connections == 1
        assert await capture.gaps() == []


async def test_silence_of_a_black_hole_is_a_lost_connection(
    setting: Setting, stores: Stores, book: DayBook, sim: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reset, no ping, nothing: after the time of silence another socket is opened, the gap begins with the last frame."""
    monkeypatch.setattr(connector_module, "SILENCE_S", 1.0)
    async with capturing(setting, sim, book) as capture:
        await capture.up()
        await capture.fault("black_hole", connection=next(iter(sim.simulator.engine.connections)), for_s=60)
        await capture.up(2)
        (gap,) = await capture.gaps()
        assert (gap.cause, gap.gap_id) == ("connection_lost", "gap-3-a-0")
        assert gap.to_ns is not None
        assert gap.to_ns - gap.from_ns > 0.9e9
    assert len(capture.notes("silent")) == 1
