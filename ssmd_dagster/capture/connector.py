"""The connector: one process that records a shard of an exchange's markets for one trading day.

    python -m ssmd_dagster.capture.connector ENV DATE SHARD

Socket → recorder → spool (fsync) → stream (acknowledged). It goes on when NATS, Redis or Dagster are away: the spool takes
everything. It ends on SIGTERM, after its last batch, with exit code 0; a refused credential ends it with exit code 8, which
the supervisor does not retry. Not here: what a message means, and what the day's state ought to be.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ssmd_dagster.capture.gaps import BUFFER_OVERFLOW, STOPPING, SUBSCRIBED, GapLog
from ssmd_dagster.capture.pipeline import Pipeline
from ssmd_dagster.capture.process import Heartbeat, cancel, current_epoch, run, wait_any
from ssmd_dagster.capture.recorder import Origin, Recorder
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.capture.spool import next_connection, spooled_connections
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import ConfigurationError, ExitCode, SsmdError, UnreachableError
from ssmd_dagster.exchange import Connection, Exchange
from ssmd_dagster.stores.connect import Stores, connect

SILENCE_S = 20.0
"""No frame and no ping for this long: the connection is dead, whatever TCP says."""
INTERVAL_S = 60.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.25, 30.0
LAST_BATCH_TIMEOUT_S = 10.0
SERVERS_RETRY_AFTER_S = 1.0
MAX_UNSEALED_BYTES = 256 << 20
"""Records in memory that the disk does not take, at most; then the socket is closed."""

_log = logging.getLogger(__name__)


class Connector:
    """Keeps one connection to the exchange open and recorded until told to stop."""

    def __init__(self, setting: Setting, exchange: Exchange, date: str, epoch: int, shard: str) -> None:
        self.component = f"connector-{shard}"
        self._setting, self._exchange, self._date, self._epoch, self._shard = setting, exchange, date, epoch, shard
        self._clock = setting.clock
        self._spool = spool_dir(setting.home, setting.env.name, date)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._stores: Stores | None = None
        self._heartbeat: Heartbeat | None = None
        self._gaps = GapLog(self._spool, self.component)
        self._state = "connecting"
        self._error: str | None = None
        self._exit_code: int | None = None
        self._recorder: Recorder | None = None
        self._pipelines: set[Pipeline] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._last_conn: str | None = None
        self._disk_error: str | None = None
        self._markets = 0
        self._random = random.Random()

    async def run(self, stop: asyncio.Event) -> None:
        """Record until `stop` is set; raise `ConfigurationError` where the exchange refuses the credentials."""
        servers = asyncio.create_task(self._keep_servers())
        recording = asyncio.create_task(self._keep_recording(stop))
        try:
            done, _ = await asyncio.wait([servers, recording], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ConfigurationError as error:
            self._error, self._exit_code, self._state = str(error), int(error.exit_code), "refused"
            raise
        finally:
            await cancel(recording)
            await self._let_go()
            if self._exit_code is None:
                self._state = "stopped"
            if self._heartbeat is not None:
                await self._heartbeat.beat()
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
                    self._heartbeat = Heartbeat(stores.cache, self._date, self.component, self._epoch, self._status)
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._heartbeat.run())
                        group.create_task(self._gaps.run(stores, self._clock, self._setting.env.name, self._date))
            except* SsmdError as errors:
                for error in errors.exceptions:
                    _log.warning("%s; trying again in %.0f s", error, SERVERS_RETRY_AFTER_S)
            self._stores = self._heartbeat = None
            await asyncio.sleep(SERVERS_RETRY_AFTER_S)

    async def _keep_recording(self, stop: asyncio.Event) -> None:
        delay_s = RECONNECT_MIN_S
        while not stop.is_set():
            began = time.monotonic()
            try:
                await self._record_connection(stop)
            except ConfigurationError:
                raise
            except SsmdError as error:
                self._error = str(error)
                _log.warning("%s", error)
            if time.monotonic() - began > RECONNECT_MAX_S:
                delay_s = RECONNECT_MIN_S
            if not stop.is_set():
                self._state = "reconnecting"
                await wait_any(stop.wait(), timeout_s=delay_s * self._random.uniform(0.5, 1.0))
                delay_s = min(delay_s * 2, RECONNECT_MAX_S)
            await self._wait_for_room(stop)

    async def _record_connection(self, stop: asyncio.Event) -> None:
        """Open one connection, subscribe, and record it until it ends."""
        tickers = await self._tickers()
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
        )
        try:
            connection = await self._exchange.connect(recorder, use_yes_price=self._setting.env.capture.use_yes_price)
            self._recorder = recorder
            await self._record(connection, recorder, pipeline, ended, tickers, stop)
        finally:
            # The next connection does not wait for the stream to take the last batches of this one.
            closing = asyncio.create_task(self._close(pipeline))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _record(
        self,
        connection: Connection,
        recorder: Recorder,
        pipeline: Pipeline,
        ended: asyncio.Event,
        tickers: list[str],
        stop: asyncio.Event,
    ) -> None:
        ticking = asyncio.create_task(self._tick(recorder))
        broken = asyncio.create_task(pipeline.failed())
        cause = "connection_lost"
        try:
            await self._subscribe(connection, recorder, tickers)
            self._state, self._error = "subscribed", None
            self._gaps.connection_up(self._clock())
            if self._heartbeat is not None:
                await self._heartbeat.beat()
            silent = asyncio.create_task(self._watch_silence(recorder))
            full = asyncio.create_task(self._watch_room())
            waits = [silent, full, asyncio.create_task(stop.wait()), asyncio.create_task(ended.wait())]
            try:
                done, _ = await asyncio.wait([*waits, ticking, broken], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel(*waits)
            for task in done:
                task.result()
            if full in done and recorder.ended is None:
                cause = BUFFER_OVERFLOW
                recorder.note({"event": BUFFER_OVERFLOW, "bytes": self._waiting_bytes()})
        finally:
            await cancel(ticking, broken)
            if stop.is_set() and recorder.ended is None:
                recorder.note({"event": STOPPING})
            await connection.close()
            if not stop.is_set():
                self._gaps.connection_lost(recorder.last_frame_ns or self._clock(), cause, recorder.origin.conn)

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

    async def _watch_room(self) -> None:
        """Return when more waits for the disk or the stream than may."""
        while not self._is_full():
            await asyncio.sleep(0.2)

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

    async def _tickers(self) -> list[str]:
        """Return the markets to subscribe to: from the security master in the cache, else from the exchange."""
        markets = []
        if self._stores is not None:
            try:
                markets = await self._stores.secmaster.markets()
            except UnreachableError as error:
                _log.warning("security master not read from the cache: %s", error)
        if not markets:
            markets = [market async for market in self._exchange.markets(self._setting.env.capture.markets.selection())]
        now_ns = self._clock()
        tickers = sorted(market.ticker for market in markets if market.close_ns > now_ns)
        self._markets = len(tickers)
        return tickers

    async def _subscribe(self, connection: Connection, recorder: Recorder, tickers: list[str]) -> None:
        capture = self._setting.env.capture
        recorder.note(
            {
                "event": "connected",
                "conn": recorder.origin.conn,
                "endpoint": self._setting.exchange_settings(self._date).endpoint,
                "use_yes_price": capture.use_yes_price,
                "channels": list(capture.channels),
                "tickers": tickers,
            }
        )
        subscriptions = await connection.subscribe(capture.channels, tickers)
        recorder.note({"event": SUBSCRIBED, "sids": {s.channel: s.sid for s in subscriptions}})

    async def _tick(self, recorder: Recorder) -> None:
        """Flush every linger interval and write the interval notes every minute."""
        linger_s = self._setting.env.capture.linger_ms / 1000
        next_interval = time.monotonic() + INTERVAL_S
        while True:
            await asyncio.sleep(linger_s)
            if time.monotonic() >= next_interval:
                next_interval += INTERVAL_S
                recorder.note_interval()
            else:
                recorder.flush()

    async def _watch_silence(self, recorder: Recorder) -> None:
        """Return when neither a frame nor a ping has come for `SILENCE_S`."""
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < SILENCE_S:
            signs = recorder.frames + recorder.signs_of_life
            if signs != seen:
                seen, since = signs, time.monotonic()
            await asyncio.sleep(1.0)
        if recorder.ended is None:
            recorder.note({"event": "silent", "for_s": SILENCE_S})
        self._error = f"no frame and no ping for {SILENCE_S:.0f} s"

    async def _publish(self, conn: str, channel: str, batch: int, records: int, data: bytes) -> asyncio.Future[int]:
        if self._stores is None:
            raise UnreachableError("not connected to NATS yet")
        return await self._stores.raw_stream.publish(
            data, date=self._date, channel=channel, conn=conn, batch=batch, records=records
        )

    def _note_disk(self, error: OSError | None) -> None:
        self._disk_error = None if error is None else f"the spool takes nothing: {error}"
        _log.error("%s", self._disk_error or "the spool takes records again")

    def _status(self) -> dict[str, Any]:
        recorder = self._recorder
        return {
            "state": self._state,
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
            "markets": self._markets,
            "unacked_batches": sum(pipeline.unacked_batches for pipeline in self._pipelines),
            "unacked_bytes": self._waiting_bytes(),
        }


async def main(env_name: str, date: str, shard: str, stop: asyncio.Event) -> None:
    """Run one connector until `stop` is set."""
    setting = load_setting(env_name)
    epoch = await _epoch(setting, date, shard)
    exchange = setting.open_exchange(date)
    try:
        await Connector(setting, exchange, date, epoch, shard).run(stop)
    finally:
        await exchange.close()


async def _epoch(setting: Setting, date: str, shard: str) -> int:
    """Return the day's epoch: from the journal, or, where NATS is away, that of the latest connection in the spool.

    A batch is valid if its epoch is one of the day's, so a connector that is restarted without NATS goes on in the old one.
    """
    try:
        async with connect(setting.env, setting.home, setting.secrets, name=f"connector-{shard}") as stores:
            return await current_epoch(setting, stores, date, f"connector-{shard}")
    except UnreachableError:
        known = spooled_connections(spool_dir(setting.home, setting.env.name, date))
        if not known:
            raise
        return int(known[-1].split("-")[0])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], sys.argv[2], sys.argv[3], stop))
