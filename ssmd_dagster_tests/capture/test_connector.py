"""A connector records whatever its exchange and its servers do, and says what it could not record."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.capture import connector as connector_module
from ssmd_dagster.capture import pipeline as pipeline_module
from ssmd_dagster.capture import recorder as recorder_module
from ssmd_dagster.capture.connector import Connector, begin_from
from ssmd_dagster.capture.gaps import gaps_between
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.spool import (
    SpoolWriter,
    next_connection,
    read_spool,
    spool_path,
    spooled_connections,
    spooled_records,
)
from ssmd_dagster.capture.watch import ClockStep, Stalled, Suspended, read_clocks
from ssmd_dagster.clock import system_clock
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import ConfigurationError, UnreachableError
from ssmd_dagster.exchange import (
    Closed,
    Envelope,
    FrameSink,
    Market,
    MarketLimitError,
    MarketNews,
    MarketSelection,
    Subscription,
    unlisted_market,
)
from ssmd_dagster.stores import stream as stream_module
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster_tests import servers
from ssmd_dagster_tests.capture.conftest import MakeSetting
from ssmd_dagster_tests.capture.recordings import (
    CHANNEL_OF_TYPE,
    DATE,
    build_segments,
    eventually,
    header_of,
    read_segments,
    spooled_batches,
)

EPOCH = 3


class FakeConnection:
    """One connection of the exchange that a test plays."""

    def __init__(self, exchange: FakeExchange, sink: FrameSink) -> None:
        self.exchange, self.sink = exchange, sink
        self.seq = 0
        self.closed = False

    def send(self, count: int = 1, pad: str = "") -> None:
        """Let frames come off the socket."""
        for _ in range(count):
            self.seq += 1
            payload = json.dumps({"type": "trade", "sid": 1, "seq": self.seq, "msg": {"pad": pad}}).encode()
            self.sink.on_frame(self.exchange.clock(), payload, msgspec.json.decode(payload, type=Envelope))

    def drop(self, reason: str = "lost") -> None:
        """Lose the connection."""
        if not self.closed:
            self.closed = True
            self.sink.on_closed(self.exchange.clock(), reason)

    async def subscribe(self, channels: Sequence[str], tickers: Sequence[str] | None) -> list[Subscription]:
        """Acknowledge, or fail as the exchange was told to."""
        if self.exchange.subscribe_errors:
            raise self.exchange.subscribe_errors.pop(0)
        return [Subscription(channel=channel, sid=1 + (channel != "trade")) for channel in channels]

    def pause_reading(self, *, paused: bool) -> None:
        """Keep what was asked for."""
        self.exchange.paused.append(paused)

    async def close(self) -> None:
        """Close the socket."""
        self.drop("closed by this side")

    async def unsubscribe(self, sids: Sequence[int]) -> None:
        """Do nothing."""

    async def add_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Take them, or fail as the exchange was told to."""
        if self.exchange.add_errors:
            raise self.exchange.add_errors.pop(0)
        self.exchange.batches.append(len(tickers))

    async def delete_markets(self, sid: int, tickers: Sequence[str]) -> None:
        """Do nothing."""

    async def request_snapshots(self, sid: int, tickers: Sequence[str]) -> None:
        """Do nothing."""


class FakeExchange:
    """An exchange whose connections are in the test's hands."""

    channel_of_type: Mapping[str, str] = CHANNEL_OF_TYPE
    market_channels = frozenset({"trade", "orderbook_delta"})
    book_channels = frozenset({"orderbook_delta"})

    def __init__(self, setting: Setting) -> None:
        self.clock = setting.clock
        self.listed = [unlisted_market("KX-1")]
        self.closed_now: Closed | None = None
        self.connections: list[FakeConnection] = []
        self.connect_errors: list[Exception] = []
        self.subscribe_errors: list[Exception] = []
        self.add_errors: list[Exception] = []
        self.batches: list[int] = []
        self.paused: list[bool] = []
        self.sinks: list[FrameSink] = []

    async def listings(self, selection: MarketSelection, created_after_ns: int | None = None) -> AsyncIterator[Market]:
        """Yield what is listed."""
        for market in self.listed:
            if selection.tickers is None or market.ticker in selection.tickers:
                yield market

    async def closed(self, at_ns: int) -> Closed | None:
        """Say what the test says."""
        return self.closed_now

    async def connect(self, sink: FrameSink, *, use_yes_price: bool = False) -> FakeConnection:
        """Open a connection, or fail as told to."""
        self.sinks.append(sink)
        if self.connect_errors:
            raise self.connect_errors.pop(0)
        self.connections.append(FakeConnection(self, sink))
        return self.connections[-1]


@contextlib.asynccontextmanager
async def recording(setting: Setting, exchange: FakeExchange, shard: str = "a") -> AsyncIterator[Connector]:
    """Run a connector until the end of the block; what it raises is raised there."""
    connector = Connector(setting, exchange, DATE, EPOCH, shard)  # type: ignore[arg-type]
    stop = asyncio.Event()
    task = asyncio.create_task(connector.run(stop))
    try:
        yield connector
        stop.set()
        await asyncio.wait_for(task, 30)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect and try again at once."""
    monkeypatch.setattr(connector_module, "RECONNECT_MIN_S", 0.02)
    monkeypatch.setattr(connector_module, "SERVERS_RETRY_AFTER_S", 0.05)
    monkeypatch.setattr(pipeline_module, "RETRY_AFTER_S", 0.02)
    # The tests' clock ticks by being read: against the host's it would seem to be set all the time.
    monkeypatch.setattr(connector_module, "read_clocks", lambda _: read_clocks(system_clock))


@pytest.fixture
def exchange(setting: Setting) -> FakeExchange:
    """An exchange that takes every connection."""
    return FakeExchange(setting)


def spool_of(setting: Setting) -> Path:
    """Return the folder of the day's spool."""
    return spool_dir(setting.home, setting.env.name, DATE)


def whole_spool(setting: Setting) -> list[bytes]:
    """Return every batch in the day's spool."""
    folder = spool_of(setting)
    return spooled_batches(*(spool_path(folder, conn) for conn in spooled_connections(folder)))


def notes_of(setting: Setting, conn: str) -> list[str]:
    """Return the events that a connection noted."""
    return [
        record.note["event"]
        for batch, encoded in read_spool(spool_path(spool_of(setting), conn))
        if batch.header.channel == "session"
        for record in map(parse_record, spooled_records(encoded, batch).splitlines())
        if record.note is not None
    ]


async def assert_whole(setting: Setting, stores: Stores, folder: Path, trades: dict[str, int]) -> None:
    """Check that spool and stream hold the same, that it verifies, and that it has so many trades per connection."""
    batches = whole_spool(setting)
    readback = read_segments(build_segments(folder, batches, env=setting.env.name), env=setting.env.name)
    assert readback.faults == ()
    counted = {conn: counts.get("trade", 0) for conn, counts in readback.by_connection.items()}
    assert {conn: count for conn, count in counted.items() if count} == trades
    in_stream = await stores.raw_stream.batches(DATE)
    assert {(b.conn, b.channel, b.batch) for b in in_stream} == {
        (h.conn, h.channel, h.batch) for h in (header_of(data).header for data in batches)
    }


async def test_batches_that_nats_does_not_take_are_counted(
    setting: Setting, exchange: FakeExchange, monkeypatch: pytest.MonkeyPatch, stores: Stores
) -> None:
    """The heartbeat says how many stay in the spool, which a line in a log would not."""
    monkeypatch.setattr(stream_module, "_HEADERS_BYTES", 9 << 20)
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["refused_batches"] > 0)


async def test_what_comes_is_spooled_published_and_ends_with_its_notes(
    tmp_path: Path, setting: Setting, stores: Stores, exchange: FakeExchange
) -> None:
    """A day without trouble: every frame in spool and stream, notes from connected to the last interval."""
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(2_500)
        await eventually(lambda: connector._status()["unacked_bytes"] == 0)
        assert connector._status()["n"] == 2_502
        exchange.connections[0].send(10)
    assert connector._status()["state"] == "stopped"
    await assert_whole(setting, stores, tmp_path, {"3-a-0": 2_510})
    noted = notes_of(setting, "3-a-0")
    assert [event for event in noted if event != "interval"] == ["connected", "subscribed", "stopping", "disconnected"]
    assert gaps_between(spool_of(setting), "a") == []


async def test_a_lost_connection_is_followed_by_another_with_a_gap_between(
    tmp_path: Path, setting: Setting, stores: Stores, book: DayBook, exchange: FakeExchange
) -> None:
    """A new id, a declared gap, and nothing of either connection lost."""
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(5)
        exchange.connections[0].drop()
        await eventually(lambda: connector._status()["conn"] == "3-a-1" and connector._state == "subscribed")
        exchange.connections[1].send(7)
        await eventually(lambda: connector._gaps.waiting == 0)
    await assert_whole(setting, stores, tmp_path, {"3-a-0": 5, "3-a-1": 7})
    day = await book.day(DATE)
    assert day is not None
    assert [(gap.gap_id, gap.cause, gap.outcome) for gap in day.gaps] == [("gap-3-a-0", "connection_lost", "stays")]
    (lost,) = gaps_between(spool_of(setting), "a")
    assert (lost.from_ns, lost.cause) == (day.gaps[0].from_ns, day.gaps[0].cause)


async def test_connections_that_do_not_come_up_leave_nothing_running(
    tmp_path: Path, setting: Setting, stores: Stores, exchange: FakeExchange
) -> None:
    """Refused handshakes and subscriptions are tried again; the last gap stays one gap."""
    exchange.connect_errors = [UnreachableError("refused")] * 2
    exchange.subscribe_errors = [UnreachableError("no answer")] * 2
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        await eventually(lambda: len(connector._pipelines) == 1)
        exchange.connections[-1].send(3)
    assert len(exchange.sinks) == 5
    conns = spooled_connections(spool_of(setting))
    assert conns == ["3-a-2", "3-a-3", "3-a-4"]
    await assert_whole(setting, stores, tmp_path, {"3-a-4": 3})
    assert gaps_between(spool_of(setting), "a") == []


async def test_what_an_abandoned_connection_still_says_does_not_get_into_the_next_one(
    tmp_path: Path, setting: Setting, stores: Stores, exchange: FakeExchange
) -> None:
    """A socket that is told of its end late, when the next one records already, changes nothing of that."""
    exchange.connect_errors = [UnreachableError("no handshake in time")]
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(3)
        exchange.sinks[0].on_closed(setting.clock(), "abandoned")
        exchange.connections[0].send(3)
    await assert_whole(setting, stores, tmp_path, {"3-a-1": 6})


async def test_a_disk_that_stays_full_closes_the_socket_and_records_again_when_there_is_room(
    tmp_path: Path,
    setting: Setting,
    stores: Stores,
    book: DayBook,
    exchange: FakeExchange,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What waits in memory is bounded: the connection ends with `buffer_overflow`, and what had come in is not lost."""
    monkeypatch.setattr(connector_module, "MAX_UNSEALED_BYTES", 100_000)
    full = False
    append = SpoolWriter.append

    def refusing(self: SpoolWriter, parts: list[bytes]) -> list[int]:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, parts)

    monkeypatch.setattr(SpoolWriter, "append", refusing)
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(1)
        await eventually(lambda: connector._status()["unacked_bytes"] == 0)
        full = True
        exchange.connections[0].send(200, pad="x" * 1_000)
        await eventually(lambda: connector._status()["state"] == "full")
        assert exchange.connections[0].closed
        assert "No space left" in connector._status()["error"]
        assert len(exchange.connections) == 1
        full = False
        await eventually(lambda: connector._status()["state"] == "subscribed")
        assert connector._status()["error"] is None
        exchange.connections[1].send(2)
        await eventually(lambda: connector._gaps.waiting == 0)
    await assert_whole(setting, stores, tmp_path, {"3-a-0": 201, "3-a-1": 2})
    day = await book.day(DATE)
    assert day is not None
    assert [(gap.cause, gap.outcome) for gap in day.gaps] == [("buffer_overflow", "stays")]
    assert [lost.cause for lost in gaps_between(spool_of(setting), "a")] == ["buffer_overflow"]


async def test_a_connector_records_without_servers_and_publishes_when_they_come(
    tmp_path: Path, make_setting: MakeSetting, exchange: FakeExchange
) -> None:
    """NATS is not there when it starts: the spool takes everything, the stream gets it once NATS is up."""
    (tmp_path / "nats").mkdir()
    late = servers.NatsServer(tmp_path / "nats")
    setting = make_setting(nats_url=late.url)
    try:
        async with recording(setting, exchange) as connector:
            await eventually(lambda: connector._status()["state"] == "subscribed")
            exchange.connections[0].send(50)
            await eventually(lambda: connector._status()["unacked_batches"] > 0)
            assert connector._stores is None
            await asyncio.to_thread(late.start)
            await eventually(lambda: connector._stores is not None)
            assert connector._stores is not None
            await connector._stores.raw_stream.create(1 << 20)
            await eventually(lambda: connector._status()["unacked_bytes"] == 0)
    finally:
        late.kill()
    assert sum(header_of(data).header.channel == "trade" for data in whole_spool(setting)) > 0


async def test_a_spool_that_lags_makes_the_socket_wait(
    setting: Setting, stores: Stores, exchange: FakeExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays flat in a burst: what cannot be written yet is not read yet."""
    monkeypatch.setattr(connector_module, "PAUSE_AT_BYTES", 1_000)
    monkeypatch.setattr(connector_module, "READ_ON_AT_BYTES", 500)
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        holding = threading.Event()
        connector._executor.submit(holding.wait)
        exchange.connections[0].send(100)
        await eventually(lambda: True in exchange.paused)
        exchange.paused.clear()
        holding.set()
        await eventually(lambda: False in exchange.paused)
    assert len(exchange.connections) == 1


async def test_refused_credentials_end_the_connector(setting: Setting, stores: Stores, exchange: FakeExchange) -> None:
    """A person has to change something: exit code 8, which the supervisor does not retry, and the heartbeat says why."""
    exchange.connect_errors = [ConfigurationError("the exchange refused the credentials")]
    connector = Connector(setting, exchange, DATE, EPOCH, "a")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        await asyncio.wait_for(connector.run(asyncio.Event()), 20)
    status = connector._status()
    assert (status["state"], status["exit_code"]) == ("refused", 8)
    assert "refused the credentials" in status["error"]
    assert spooled_connections(spool_of(setting)) == []


async def test_a_bug_in_the_line_to_the_stream_ends_the_process(
    setting: Setting, stores: Stores, exchange: FakeExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records must not pile up behind a task that died: the supervisor starts another connector."""

    async def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(Connector, "_publish", broken)
    connector = Connector(setting, exchange, DATE, EPOCH, "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(connector.run(asyncio.Event()), 20)
    assert exchange.connections[0].closed


async def test_a_stop_just_behind_a_lost_connection_ends_quietly(
    tmp_path: Path, setting: Setting, stores: Stores, exchange: FakeExchange
) -> None:
    """The end of the socket and the signal meet: the connection's last record stays its last."""
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(3)
        exchange.connections[0].drop()
    await assert_whole(setting, stores, tmp_path, {"3-a-0": 3})
    assert notes_of(setting, "3-a-0").count("disconnected") == 1


async def test_silence_ends_a_connection(
    setting: Setting, stores: Stores, exchange: FakeExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither frame nor ping for too long: the socket is taken for dead, and the note says so."""
    monkeypatch.setattr(connector_module, "SILENCE_S", 0.2)
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["conn"] == "3-a-1")
    assert "silent" in notes_of(setting, "3-a-0")
    assert exchange.connections[0].closed


@pytest.mark.parametrize(
    ("closed", "causes"),
    [
        (Closed(cause="exchange_maintenance"), ["exchange_maintenance"]),
        (Closed(cause="closed_by_schedule", since_ns=0, until_ns=0), ["closed_by_schedule"]),
        (None, ["connection_lost"]),
    ],
)
async def test_the_exchange_is_asked_why_it_is_gone(
    setting: Setting, stores: Stores, book: DayBook, exchange: FakeExchange, closed: Closed | None, causes: list[str]
) -> None:
    """Maintenance and hours without trading are no loss of the recorder's."""
    exchange.closed_now = closed
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connect_errors = [UnreachableError("refused")] * 3
        exchange.connections[0].send(1)
        exchange.connections[0].drop("closed by the exchange: 1001 maintenance")
        await eventually(lambda: connector._status()["conn"] == "3-a-4" and connector._state == "subscribed")
        await eventually(lambda: connector._gaps.waiting == 0)
    day = await book.day(DATE)
    assert day is not None
    assert [gap.cause for gap in day.gaps] == causes


async def test_an_exchange_that_does_not_answer_is_in_the_maintenance_that_it_announced(
    setting: Setting, stores: Stores, book: DayBook, exchange: FakeExchange
) -> None:
    """What was asked before counts where nothing can be asked now; what came before the window is lost."""
    silent = UnreachableError("no answer")
    began_ns = setting.clock() + 300_000_000
    await stores.cache.put_maintenance([Window(began_ns, began_ns + 3_600_000_000_000)])

    async def closed(at_ns: int) -> Closed | None:
        raise silent

    exchange.closed = closed  # type: ignore[method-assign]
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(1)
        exchange.connect_errors = [silent]
        await eventually(lambda: setting.clock() > began_ns)
        exchange.connections[0].drop("closed by the exchange: 1001 maintenance")
        await eventually(lambda: connector._status()["conn"] == "3-a-2" and connector._state == "subscribed")
        await eventually(lambda: connector._gaps.waiting == 0)
    day = await book.day(DATE)
    assert day is not None
    assert [gap.cause for gap in day.gaps] == ["connection_lost", "exchange_maintenance"]
    assert day.gaps[1].from_ns == day.gaps[0].to_ns == began_ns


async def test_a_host_that_slept_gets_a_new_connection(
    setting: Setting, stores: Stores, book: DayBook, exchange: FakeExchange
) -> None:
    """Whatever TCP believes; the gap runs from the last frame until it is up again. A clock that was set is only noted."""
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(1)
        connector._found(ClockStep(5))
        connector._found(Stalled(3.0))
        connector._found(Suspended(3_600.0))
        await eventually(lambda: connector._status()["conn"] == "3-a-1" and connector._state == "subscribed")
        await eventually(lambda: connector._gaps.waiting == 0)
    day = await book.day(DATE)
    assert day is not None
    assert [(gap.cause, gap.outcome) for gap in day.gaps] == [("host_suspended", "stays")]
    assert {"clock_step", "stalled", "host_suspended"} <= set(notes_of(setting, "3-a-0"))
    assert [lost.cause for lost in gaps_between(spool_of(setting), "a")] == ["host_suspended"]


async def test_a_frame_that_is_not_kept_is_a_gap(
    setting: Setting, stores: Stores, book: DayBook, exchange: FakeExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too large for a batch: a note in its place, a gap at that instant, and a number that is missing."""
    monkeypatch.setattr(recorder_module, "MAX_FRAME_BYTES", 500)
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        exchange.connections[0].send(1)
        exchange.connections[0].send(1, pad="x" * 600)
        exchange.connections[0].send(1)
        await eventually(lambda: connector._status()["missing"] == 1)
        await eventually(lambda: connector._gaps.waiting == 0)
    day = await book.day(DATE)
    assert day is not None
    assert [(gap.cause, gap.scope["channel"]) for gap in day.gaps] == [
        ("oversized", "trade"),
        ("sequence_jump", "trade"),
    ]


async def test_a_market_that_is_late_is_a_gap_of_its_batch(
    make_setting: MakeSetting, stores: Stores, book: DayBook
) -> None:
    """Listed when it had opened already: one gap for the batch, closed once it is subscribed; refused, it stays open."""
    setting = make_setting(channels=["trade", "orderbook_delta"])
    exchange = FakeExchange(setting)
    async with recording(setting, exchange) as connector:
        await eventually(lambda: connector._status()["state"] == "subscribed")
        await eventually(lambda: connector._listing._complained is None)
        for number in range(150):
            connector._roster.hear(MarketNews(ticker=f"KX-NEW-{number}", event="listed"), setting.clock())
        connector._listing.changed.set()
        await eventually(lambda: connector._status()["markets"] == 151)
        exchange.add_errors = [MarketLimitError("full")]
        connector._roster.hear(MarketNews(ticker="KX-REFUSED", event="listed"), setting.clock())
        connector._listing.changed.set()
        await eventually(lambda: connector._status()["markets_left_out"] == 1)
        await eventually(lambda: connector._gaps.waiting == 0)
        day = await book.day(DATE)
        assert day is not None
        assert [
            (gap.cause, gap.outcome, gap.scope.get("markets_count", gap.scope.get("markets"))) for gap in day.gaps
        ] == [
            ("not_subscribed", "stays", 150),
            ("not_subscribed", "open", ["KX-REFUSED"]),
        ]
    assert {"added", "refused"} <= set(notes_of(setting, "3-a-0"))


async def test_fifty_thousand_markets_listed_at_once_are_subscribed_in_batches(
    make_setting: MakeSetting, stores: Stores, book: DayBook
) -> None:
    """Three shards take their share within seconds, none more than a connection takes."""
    setting = make_setting(channels=["trade", "orderbook_delta"], markets={"all": True, "max": 50_000})
    exchange = FakeExchange(setting)
    total = 0
    for shard in ("a", "a2", "a3"):
        async with recording(setting, exchange, shard) as connector:
            await eventually(lambda connector=connector: connector._status()["state"] == "subscribed")  # type: ignore[misc]
            for number in range(50_000):
                connector._roster.hear(MarketNews(ticker=f"KX-{number}", event="listed"), setting.clock())
            connector._listing.changed.set()
            wanted = len(connector._roster.tickers())
            await eventually(lambda connector=connector, wanted=wanted: connector._status()["markets"] == wanted)  # type: ignore[misc]
            assert connector._status()["markets_left_out"] == 0
            total += sum(1 for ticker in connector._roster.tickers() if ticker != "KX-1")
    assert total == 49_999
    assert max(exchange.batches) <= 1_000


async def test_a_connections_id_is_not_used_again_where_the_spool_was_lost(
    setting: Setting, stores: Stores, book: DayBook
) -> None:
    """What came under it would be taken for what the stream and the archive have already."""
    day = await book.day(DATE)
    assert day is not None
    assert day.epoch is not None
    for conn in (f"{day.epoch}-a-9", f"{day.epoch}-a-10", f"{day.epoch}-b-11", "of somebody else"):
        await (await stores.raw_stream.publish(b"", date=DATE, channel="trade", conn=conn, batch=0, records=1))
    epoch, last = await begin_from(setting, DATE, "a")
    assert next_connection(setting.home, epoch, "a", last) == f"{day.epoch}-a-11"
    assert await begin_from(setting, DATE, "a2") == (day.epoch, None)


async def test_half_the_channels_are_the_first_shards_alone(make_setting: MakeSetting, stores: Stores) -> None:
    """What names no market is subscribed once."""
    setting = make_setting(channels=["trade", "market_lifecycle_v2"], markets={"all": True, "max": 50_000})
    exchange = FakeExchange(setting)
    assert Connector(setting, exchange, DATE, EPOCH, "a")._channels == ["trade", "market_lifecycle_v2"]  # type: ignore[arg-type]
    assert Connector(setting, exchange, DATE, EPOCH, "b2")._channels == ["trade"]  # type: ignore[arg-type]
