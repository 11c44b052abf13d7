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

from ssmd_dagster.capture.gaps import STOPPING_NOTE, GapLog
from ssmd_dagster.capture.pipeline import Pipeline
from ssmd_dagster.capture.process import Heartbeat, connected, current_epoch, run, wait_any
from ssmd_dagster.capture.recorder import Flush, Origin, Recorder
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
        self._pipeline: Pipeline | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._markets = 0
        self._random = random.Random()

    async def run(self, stop: asyncio.Event) -> None:
        """Record until `stop` is set; raise `ConfigurationError` where the exchange refuses the credentials."""
        servers = asyncio.create_task(self._keep_servers(stop))
        try:
            await self._keep_recording(stop)
        except ConfigurationError as error:
            self._error, self._exit_code, self._state = str(error), int(error.exit_code), "refused"
            raise
        finally:
            if self._closing:
                await asyncio.wait(self._closing, timeout=LAST_BATCH_TIMEOUT_S)
            if self._exit_code is None:
                self._state = "stopped"
            if self._heartbeat is not None:
                await self._heartbeat.beat()
            servers.cancel()
            await asyncio.gather(servers, return_exceptions=True)
            self._executor.shutdown()

    async def _keep_servers(self, stop: asyncio.Event) -> None:
        """Connect to NATS and Redis beside the recording, which does not wait for them."""
        async with connected(self._setting, self.component) as stores:
            self._stores = stores
            self._heartbeat = Heartbeat(stores.cache, self._date, self.component, self._epoch, self._status)
            await asyncio.gather(
                self._heartbeat.run(), self._gaps.run(stores, self._clock, self._setting.env.name, self._date)
            )

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

    async def _record_connection(self, stop: asyncio.Event) -> None:
        """Open one connection, subscribe, and record it until it ends."""
        tickers = await self._tickers()
        conn = next_connection(self._spool, self._epoch, self._shard)
        origin = Origin(env=self._setting.env.name, day=self._date, epoch=self._epoch, conn=conn)
        ended = asyncio.Event()
        recorder = Recorder(
            origin,
            channel_of_type=self._exchange.channel_of_type,
            clock=self._clock,
            on_flush=lambda flush: self._submit(origin, flush),
            on_end=lambda _reason: ended.set(),
        )
        self._pipeline = None
        connection = await self._exchange.connect(recorder, use_yes_price=self._setting.env.capture.use_yes_price)
        self._recorder = recorder
        ticking = asyncio.create_task(self._tick(recorder))
        try:
            await self._subscribe(connection, recorder, tickers)
            self._state, self._error = "subscribed", None
            self._gaps.connection_up(self._clock())
            if self._heartbeat is not None:
                await self._heartbeat.beat()
            await wait_any(stop.wait(), ended.wait(), self._watch_silence(recorder))
        finally:
            ticking.cancel()
            if stop.is_set():
                recorder.note(STOPPING_NOTE)
            await connection.close()
            if not stop.is_set():
                self._gaps.connection_lost(recorder.last_frame_ns or self._clock(), "connection_lost", conn)
            if self._pipeline is not None:
                # The next connection does not wait for the stream to take the last batches of this one.
                closing = asyncio.create_task(self._close(self._pipeline))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def _close(self, pipeline: Pipeline) -> None:
        if not await pipeline.close(LAST_BATCH_TIMEOUT_S):
            _log.warning("%d batches of %s stay in the spool", pipeline.unacked_batches, pipeline.origin.conn)

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
        recorder.note({"event": "subscribed", "sids": {s.channel: s.sid for s in subscriptions}})

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
        recorder.note({"event": "silent", "for_s": SILENCE_S})
        self._error = f"no frame and no ping for {SILENCE_S:.0f} s"

    def _submit(self, origin: Origin, flush: Flush) -> None:
        if self._pipeline is None:
            self._pipeline = Pipeline(
                origin, self._spool, self._publish, self._executor, on_disk_error=self._disk_refuses
            )
        self._pipeline.submit(flush)

    async def _publish(self, conn: str, channel: str, batch: int, records: int, data: bytes) -> asyncio.Future[int]:
        if self._stores is None:
            raise UnreachableError("not connected to NATS yet")
        return await self._stores.raw_stream.publish(
            data, date=self._date, channel=channel, conn=conn, batch=batch, records=records
        )

    def _disk_refuses(self, error: OSError) -> None:
        self._error = f"the spool takes nothing: {error}"
        _log.error("%s", self._error)

    def _status(self) -> dict[str, Any]:
        recorder, pipeline = self._recorder, self._pipeline
        return {
            "state": self._state,
            "error": self._error,
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
            "unacked_batches": pipeline.unacked_batches if pipeline else 0,
            "unacked_bytes": pipeline.unacked_bytes if pipeline else 0,
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
