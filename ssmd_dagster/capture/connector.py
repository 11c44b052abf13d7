"""The connector: one process that records a shard of an exchange's markets for one trading day.

    python -m ssmd_dagster.capture.connector ENV DATE SHARD

Socket → recorder → spool (fsync) → stream (acknowledged), with subscriptions that follow the exchange's markets. It goes on when
NATS, Redis or Dagster are away: the spool takes everything. It ends on SIGTERM, after its last batch, with exit code 0; a refused
credential ends it with exit code 8, which the supervisor does not retry. Not here: what a message means, what is subscribed
(`follower`), and what the day's state ought to be.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ssmd_dagster.capture.follower import Follower
from ssmd_dagster.capture.gaps import STOPPING, GapLog
from ssmd_dagster.capture.listing import Listing
from ssmd_dagster.capture.pipeline import Pipeline
from ssmd_dagster.capture.process import Heartbeat, cancel, current_epoch, run, unless_stopped, wait_any
from ssmd_dagster.capture.programs import markets_per_shard, shard_count, shard_number
from ssmd_dagster.capture.recorder import Origin, Recorder
from ssmd_dagster.capture.sequence import Hole
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.capture.spool import last_connection, next_connection, spooled_connections
from ssmd_dagster.capture.subscriptions import Roster
from ssmd_dagster.capture.watch import (
    SILENCE_S,
    Clocks,
    ClockStep,
    Finding,
    Silent,
    Stalled,
    Suspended,
    Watch,
    read_clocks,
)
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.maintenance import window_at
from ssmd_dagster.day.payloads import ChannelCount, Checkpoint, GapOpened
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import ConfigurationError, ExitCode, SsmdError, UnreachableError
from ssmd_dagster.exchange import (
    Closed,
    Connection,
    Exchange,
    ExchangeEvent,
    MarketNews,
    RateLimitedError,
    SnapshotCame,
    SubscriptionLost,
)
from ssmd_dagster.stores.connect import Stores, connect
from ssmd_dagster.stores.stream import BatchTooLargeError

INTERVAL_S = 60.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.25, 30.0
RATE_LIMITED_MIN_S = 2.0
"""The shortest pause after the exchange has said that it is asked too often."""
CLOSED_TIMEOUT_S = 5.0
JOURNAL_TIMEOUT_S = 2.0
COUNTED_CONNECTIONS = 10
"""Connections that are over and still named in a checkpoint; the audit counts all of them."""
LAST_BATCH_TIMEOUT_S = 8.0
SERVERS_RETRY_AFTER_S = 1.0
SERVERS_WAIT_S = 0.5
MAX_UNSEALED_BYTES = 96 << 20
"""Records in memory that the disk does not take, at most; then the socket is closed."""
PAUSE_AT_BYTES, READ_ON_AT_BYTES = 16 << 20, 4 << 20
"""Records in memory for want of CPU: the socket waits from the one on until the other. Memory stays flat in a burst."""
DISK_HANGS_S = 2.0
"""A write that takes longer is no want of CPU: the socket is read on, up to `MAX_UNSEALED_BYTES`."""
ROOM_EVERY_S = 0.05
SWITCH_INTERVAL_S = 0.0005

_log = logging.getLogger(__name__)


class Connector:
    """Keeps one connection to the exchange open and recorded until told to stop."""

    def __init__(
        self, setting: Setting, exchange: Exchange, date: str, epoch: int, shard: str, last_conn: str | None = None
    ) -> None:
        self.component = f"connector-{shard}"
        self._setting, self._exchange, self._date, self._epoch, self._shard = setting, exchange, date, epoch, shard
        self._clock = setting.clock
        # As the exchange was opened with it: a key's file may be gone by the next connection.
        self._endpoint = setting.exchange_settings(date).endpoint
        self._spool = spool_dir(setting.home, setting.env.name, date)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._stores: Stores | None = None
        self._stores_there = asyncio.Event()
        self._heartbeat: Heartbeat | None = None
        self._gaps = GapLog(self._spool, self.component)
        self._state = "connecting"
        self._up_ns: int | None = None
        self._error: str | None = None
        self._exit_code: int | None = None
        self._recorder: Recorder | None = None
        self._follower: Follower | None = None
        self._pipelines: set[Pipeline] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._last_conn = last_conn
        self._disk_error: str | None = None
        self._refused_batches = 0
        self._random = random.Random()
        env = setting.env
        number = shard_number(shard)
        self._roster = Roster(most=markets_per_shard(env), number=number, shards=shard_count(env))
        self._listing = Listing(
            exchange, env.capture.markets.selection(), self._roster, self._clock, lambda: self._stores
        )
        # What is no market's belongs to the first shard alone; twice recorded it would count twice.
        self._channels = [name for name in env.capture.channels if number == 1 or name in exchange.market_channels]
        self._connections = 0
        self._cut = asyncio.Event()
        self._cut_cause: str | None = None
        self._judging: asyncio.Task[None] | None = None
        self._oversized = 0
        self._over: deque[tuple[str, dict[str, ChannelCount]]] = deque(maxlen=COUNTED_CONNECTIONS)

    async def run(self, stop: asyncio.Event) -> None:
        """Record until `stop` is set; raise `ConfigurationError` where the exchange refuses the credentials."""
        servers = asyncio.create_task(self._keep_servers())
        recording = asyncio.create_task(self._keep_recording(stop))
        listing = asyncio.create_task(self._keep_listing())
        watch = Watch(self._read_clocks, self._signs, self._found, SILENCE_S)
        try:
            done, _ = await asyncio.wait([servers, recording, listing], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ConfigurationError as error:
            self._error, self._exit_code, self._state = str(error), int(error.exit_code), "refused"
            raise
        finally:
            watch.close()
            await cancel(recording, listing, *([self._judging] if self._judging is not None else []))
            await self._let_go()
            if self._exit_code is None:
                self._state = "stopped"
            if self._heartbeat is not None:
                await self._heartbeat.beat()
                self._gaps.checkpoint(self._counts(final=True))
                await wait_any(self._gaps.told(), timeout_s=JOURNAL_TIMEOUT_S)
            await cancel(servers)
            self._executor.shutdown()

    async def _keep_servers(self) -> None:
        """Connect to NATS and Redis beside the recording, which does not wait for them; try again for as long as it runs."""
        while True:
            try:
                async with connect(
                    self._setting.env, self._setting.home, self._setting.secrets, name=self.component
                ) as stores:
                    self._stores = stores
                    self._stores_there.set()
                    self._heartbeat = Heartbeat(stores.cache, self._date, self.component, self._epoch, self._status)
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._heartbeat.run())
                        group.create_task(self._gaps.run(stores, self._clock, self._setting.env.name, self._date))
            except* SsmdError as errors:
                for error in errors.exceptions:
                    _log.warning("%s; trying again in %.0f s", error, SERVERS_RETRY_AFTER_S)
            self._stores = self._heartbeat = None
            await asyncio.sleep(SERVERS_RETRY_AFTER_S)

    async def _keep_listing(self) -> None:
        """Follow the list of markets once there is a first one, which the recording brings in."""
        await self._listing.changed.wait()
        await self._listing.keep()

    async def _keep_recording(self, stop: asyncio.Event) -> None:
        delay_s = RECONNECT_MIN_S
        while not stop.is_set():
            began = time.monotonic()
            refusal: SsmdError | None = None
            try:
                await self._record_connection(stop)
            except ConfigurationError:
                raise
            except SsmdError as error:
                refusal = error
                self._error = str(error)
                _log.warning("%s", error)
            if time.monotonic() - began > RECONNECT_MAX_S:
                delay_s = RECONNECT_MIN_S
            if not stop.is_set():
                self._state = "reconnecting"
                least_s = 0.0
                if isinstance(refusal, RateLimitedError):
                    delay_s = max(delay_s, RATE_LIMITED_MIN_S)
                    least_s = refusal.retry_after_s or 0.0
                self._judge(refusal)
                await wait_any(stop.wait(), timeout_s=max(least_s, delay_s * self._random.uniform(0.5, 1.0)))
                delay_s = min(delay_s * 2, RECONNECT_MAX_S)
            await self._wait_for_room(stop)

    def _judge(self, refusal: SsmdError | None) -> None:
        """Find out why there is no connection now, beside the next attempt, which does not wait for it."""
        if self._judging is not None:
            self._judging.cancel()
        if isinstance(refusal, RateLimitedError):
            self._gaps.cause_is(GapCause.RATE_LIMITED, self._clock())
        else:
            self._judging = asyncio.create_task(self._ask_whether_closed())

    async def _ask_whether_closed(self) -> None:
        try:
            async with asyncio.timeout(CLOSED_TIMEOUT_S):
                closed = await self._exchange.closed(self._clock())
        except (SsmdError, TimeoutError):
            closed = await self._announced()  # it does not say so now
        now_ns = self._clock()
        if closed is None:
            self._gaps.cause_is_over(now_ns)
        else:
            self._gaps.cause_is(closed.cause, now_ns, since_ns=closed.since_ns, until_ns=closed.until_ns)

    async def _announced(self) -> Closed | None:
        """Return the announced maintenance that is on, as far as anybody has asked the exchange for it."""
        stores = self._stores
        if stores is None:
            return None
        try:
            window = window_at(await stores.cache.maintenance(), self._clock())
        except SsmdError as error:
            _log.warning("what maintenance is announced is not known: %s", error)
            return None
        if window is None:
            return None
        return Closed(cause="exchange_maintenance", since_ns=window.open_ns, until_ns=window.close_ns)

    async def _record_connection(self, stop: asyncio.Event) -> None:
        """Open one connection, subscribe, and record it until it ends."""
        if not self._roster.tickers():
            # The cache has the list at once; where it is away, the exchange is asked.
            await wait_any(self._stores_there.wait(), timeout_s=SERVERS_WAIT_S)
            await unless_stopped(stop, self._listing.first())
        if stop.is_set():
            return
        conn = self._last_conn = next_connection(self._spool, self._epoch, self._shard, self._last_conn)
        origin = Origin(env=self._setting.env.name, day=self._date, epoch=self._epoch, conn=conn)
        pipeline = Pipeline(origin, self._spool, self._publish, self._executor, on_disk=self._note_disk)
        self._pipelines.add(pipeline)
        ended = asyncio.Event()
        recorder = Recorder(
            origin,
            channel_of_type=self._exchange.channel_of_type,
            clock=self._clock,
            on_flush=pipeline.submit,
            on_end=lambda _reason: ended.set(),
            on_event=self._heard,
            on_hole=self._hole,
            on_oversized=self._too_large,
        )
        try:
            connection = await unless_stopped(
                stop, self._exchange.connect(recorder, use_yes_price=self._setting.env.capture.use_yes_price)
            )
            if connection is None:
                return
            self._connections += 1
            self._cut.clear()
            self._cut_cause = None
            self._recorder = recorder
            self._follower = Follower(
                connection,
                recorder,
                self._exchange,
                self._roster,
                self._gaps,
                self._clock,
                component=self.component,
                channels=self._channels,
            )
            await self._record(connection, recorder, self._follower, pipeline, ended, stop)
        finally:
            self._over.append((conn, recorder.counts()))
            # The next connection does not wait for the stream to take the last batches of this one.
            closing = asyncio.create_task(self._close(pipeline))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _record(
        self,
        connection: Connection,
        recorder: Recorder,
        follower: Follower,
        pipeline: Pipeline,
        ended: asyncio.Event,
        stop: asyncio.Event,
    ) -> None:
        ticking = asyncio.create_task(self._tick(recorder))
        broken = asyncio.create_task(pipeline.failed())
        try:
            self._note_connected(recorder)
            await unless_stopped(stop, follower.begin())
            if stop.is_set():
                return
            self._state, self._error = "subscribed", None
            now_ns = self._clock()
            self._up_ns = self._up_ns or now_ns
            self._gaps.connection_up(now_ns, recorder.note_if_open)
            self._listing.changed.set()
            if self._heartbeat is not None:
                await self._heartbeat.beat()
            full = asyncio.create_task(self._watch_room(connection, pipeline))
            waits: list[asyncio.Task[Any]] = [
                full,
                asyncio.create_task(follower.run(self._listing.changed)),
                asyncio.create_task(self._cut.wait()),
                asyncio.create_task(stop.wait()),
                asyncio.create_task(ended.wait()),
            ]
            try:
                done, _ = await asyncio.wait([*waits, ticking, broken], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel(*waits)
            for task in done:
                task.result()
            if full in done and recorder.ended is None:
                self._cut_cause = GapCause.BUFFER_OVERFLOW
                recorder.note({"event": GapCause.BUFFER_OVERFLOW, "bytes": self._waiting_bytes()})
            elif stop.is_set() and recorder.ended is None:
                await follower.last_proof()
        finally:
            await cancel(ticking, broken)
            conn = recorder.origin.conn
            if stop.is_set() and recorder.note_if_open({"event": STOPPING}):
                self._gaps.connection_over(self._clock(), conn)
            await connection.close()
            if not stop.is_set():
                self._gaps.connection_lost(recorder.last_frame_ns or self._clock(), self._cut_cause, conn)

    async def _close(self, pipeline: Pipeline) -> None:
        try:
            await pipeline.close(None)
        finally:
            self._pipelines.discard(pipeline)
            if pipeline.unacked_batches:
                _log.warning("%d batches of %s stay in the spool", pipeline.unacked_batches, pipeline.origin.conn)

    async def _let_go(self) -> None:
        """Wait for the last batches, within `LAST_BATCH_TIMEOUT_S`; the rest stays in the spool."""
        closing = set(self._closing)
        if closing:
            _, late = await asyncio.wait(closing, timeout=LAST_BATCH_TIMEOUT_S)
            await cancel(*late)

    def _waiting_bytes(self) -> int:
        """Return the bytes that the stream has not acknowledged, those that are not yet in the spool included."""
        return sum(pipeline.unacked_bytes + pipeline.unsealed_bytes for pipeline in self._pipelines)

    def _is_full(self, share: float = 1.0) -> bool:
        unsealed_bytes = sum(pipeline.unsealed_bytes for pipeline in self._pipelines)
        limit_bytes = self._setting.env.capture.spool_limit_mb << 20
        return unsealed_bytes > share * MAX_UNSEALED_BYTES or self._waiting_bytes() > share * limit_bytes

    async def _watch_room(self, connection: Connection, pipeline: Pipeline) -> None:
        """Let the socket wait for the spool where that lags; return when more waits for the disk or the stream than may.

        A disk that refuses or hangs is another matter: nobody knows until when, and a socket that is not read is lost anyway.
        """
        while not self._is_full():
            hangs = self._disk_error is not None or pipeline.writing_s > DISK_HANGS_S
            if pipeline.unsealed_bytes > PAUSE_AT_BYTES and not hangs:
                connection.pause_reading(paused=True)
            elif pipeline.unsealed_bytes < READ_ON_AT_BYTES or hangs:
                connection.pause_reading(paused=False)
            await asyncio.sleep(ROOM_EVERY_S)

    async def _wait_for_room(self, stop: asyncio.Event) -> None:
        """Once it was too much, open no connection before half of it is gone."""
        if self._is_full():
            self._state = "full"
            self._error = (
                f"{self._waiting_bytes() >> 20} MB wait for the disk or the stream; capture.spool_limit_mb is "
                f"{self._setting.env.capture.spool_limit_mb}"
            )
            _log.error("%s", self._error)
        while self._state == "full" and self._is_full(0.5) and not stop.is_set():
            await wait_any(stop.wait(), timeout_s=0.2)

    def _note_connected(self, recorder: Recorder) -> None:
        recorder.note(
            {
                "event": "connected",
                "conn": recorder.origin.conn,
                "endpoint": self._endpoint,
                "use_yes_price": self._setting.env.capture.use_yes_price,
                "channels": self._channels,
                "tickers": sorted(self._roster.tickers()),
            }
        )

    def _heard(self, recv_ns: int, event: ExchangeEvent) -> None:
        if isinstance(event, MarketNews):
            self._listing.hear(recv_ns, event)
        elif self._follower is None:
            return
        elif isinstance(event, SnapshotCame):
            self._follower.snapshot_came(event)
        elif isinstance(event, SubscriptionLost):
            self._follower.subscription_lost(recv_ns, event)

    def _hole(self, hole: Hole) -> None:
        if self._follower is not None:
            self._follower.hole(hole)

    def _too_large(self, recv_ns: int, channel: str) -> None:
        assert self._recorder is not None
        self._oversized += 1
        conn = self._recorder.origin.conn
        scope = {"conn": conn, "channel": channel, "component": self.component}
        gap_id = f"gap-{conn}-oversized-{self._oversized}"
        gap = GapOpened(gap_id=gap_id, cause=GapCause.OVERSIZED, from_ns=recv_ns, scope=scope)
        self._gaps.declare(gap, recv_ns)

    def _counts(self, *, final: bool = False) -> Checkpoint:
        connections = dict(self._over)
        if self._recorder is not None:
            connections[self._recorder.origin.conn] = self._recorder.counts()
        return Checkpoint(component=self.component, final=final, connections=connections)

    def _read_clocks(self) -> Clocks:
        return read_clocks(self._clock)

    def _signs(self) -> int:
        """Return a number that changes with every sign of life and every connection; read by the watch's thread."""
        recorder = self._recorder
        return (self._connections << 48) + (recorder.frames + recorder.signs_of_life if recorder is not None else 0)

    def _found(self, finding: Finding) -> None:
        """Note what the watch has found, and cut a connection that it has found dead."""
        _log.warning("%s", finding)
        if self._recorder is None:
            return
        note = self._recorder.note_if_open
        match finding:
            case ClockStep(by_ns):
                note({"event": "clock_step", "by_ns": by_ns})
            case Stalled(for_s):
                note({"event": "stalled", "for_s": for_s})
            case Suspended(for_s) if not self._cut.is_set():
                if note({"event": GapCause.HOST_SUSPENDED, "for_s": for_s}):
                    self._cut_cause = GapCause.HOST_SUSPENDED
                    self._cut.set()
            case Silent(for_s) if not self._cut.is_set():
                if note({"event": "silent", "for_s": for_s}):
                    self._error = f"no frame and no ping for {for_s:.0f} s"
                    self._cut.set()

    async def _tick(self, recorder: Recorder) -> None:
        """Flush every linger interval; every minute write the interval notes and journal the counts."""
        linger_s = self._setting.env.capture.linger_ms / 1000
        next_interval = time.monotonic() + INTERVAL_S
        while True:
            await asyncio.sleep(linger_s)
            if time.monotonic() >= next_interval:
                next_interval += INTERVAL_S
                recorder.note_interval()
                self._gaps.checkpoint(self._counts())
            else:
                recorder.tick()

    async def _publish(self, conn: str, channel: str, batch: int, records: int, data: bytes) -> asyncio.Future[int]:
        if self._stores is None:
            raise UnreachableError("not connected to NATS yet")
        try:
            return await self._stores.raw_stream.publish(
                data, date=self._date, channel=channel, conn=conn, batch=batch, records=records
            )
        except BatchTooLargeError:
            self._refused_batches += 1
            raise

    def _note_disk(self, error: OSError | None) -> None:
        self._disk_error = None if error is None else f"the spool takes nothing: {error}"
        _log.error("%s", self._disk_error or "the spool takes records again")

    def _status(self) -> dict[str, Any]:
        recorder, follower = self._recorder, self._follower
        sequences = recorder.sequences if recorder else None
        own = [pipeline for pipeline in self._pipelines if recorder and pipeline.origin.conn == recorder.origin.conn]
        return {
            "state": self._state,
            "up_ns": self._up_ns,
            "error": self._disk_error or self._error,
            "exit_code": self._exit_code,
            "at_ns": self._clock(),
            "conn": recorder.origin.conn if recorder else None,
            "n": recorder.n if recorder else 0,
            "frames": recorder.frames if recorder else 0,
            "odd_frames": recorder.odd_frames if recorder else 0,
            "last_frame_ns": recorder.last_frame_ns if recorder else None,
            "signs_of_life": recorder.signs_of_life if recorder else 0,
            "by_channel": dict(recorder.by_channel) if recorder else {},
            "markets": follower.markets if follower else 0,
            "markets_left_out": self._roster.left_out + (follower.refused if follower else 0),
            "snapshots_due": follower.snapshots_due if follower else 0,
            "missing": sequences.missing if sequences else 0,
            "duplicates": sequences.duplicates if sequences else 0,
            "reordered": sequences.reordered if sequences else 0,
            "healed": sequences.healed if sequences else 0,
            "acked_records": sum(pipeline.acked_records for pipeline in own),
            "unacked_batches": sum(pipeline.unacked_batches for pipeline in self._pipelines),
            "unacked_bytes": self._waiting_bytes(),
            "refused_batches": self._refused_batches,
        }


async def main(env_name: str, date: str, shard: str, stop: asyncio.Event) -> None:
    """Run one connector until `stop` is set."""
    # The thread that seals and writes lets go of the interpreter several times a batch; it shall not wait 5 ms for it each time.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    setting = load_setting(env_name)
    epoch, last_conn = await begin_from(setting, date, shard)
    exchange = setting.open_exchange(date)
    try:
        await Connector(setting, exchange, date, epoch, shard, last_conn).run(stop)
    finally:
        await exchange.close()


async def begin_from(setting: Setting, date: str, shard: str) -> tuple[int, str | None]:
    """Return the day's epoch and the shard's last connection in the stream: its id is taken, even where the spool was lost.

    Where NATS is away, the epoch is that of the latest connection in the spool. A batch is valid if its epoch is one of the
    day's, so a connector that is restarted without NATS goes on in the old one.
    """
    try:
        async with connect(setting.env, setting.home, setting.secrets, name=f"connector-{shard}") as stores:
            epoch = await current_epoch(setting, stores, date, f"connector-{shard}")
            return epoch, last_connection(await stores.raw_stream.connections(date), epoch, shard)
    except UnreachableError:
        known = spooled_connections(spool_dir(setting.home, setting.env.name, date))
        if not known:
            raise
        return int(known[-1].split("-")[0]), None


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], sys.argv[2], sys.argv[3], stop))
