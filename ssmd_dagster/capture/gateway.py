"""The gateway: passes an environment's live events on to WebSocket clients, across rolls.

    python -m ssmd_dagster.capture.gateway ENV

`GET /v1/stream` upgrades to a WebSocket. A client sends `{"op":"subscribe","tickers":["KXBTCD-…"],"channels":["trade"]}`
(both optional: left out means all) and receives one JSON event a message:
`{"type":"event","day":…,"channel":…,"ticker":…,"conn":…,"n":…,"recv_ns":…,"wire":{…}}`, the last ones as recorded.
Several subscriptions of a client add up: every ticker that it named, in every channel that it named. `unsubscribe` takes
tickers or channels away, without either everything. `GET /v1/health` says how it fares.

It reads the stream beside the archiver and can never slow capture down: a client that does not keep up loses its oldest
events and is told how many (`{"type":"dropped","count":…}`); where the gateway itself had to pass batches over, all are told
how many (`{"type":"dropped","batches":…}`). Not here: history, durability.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, BatchHeader, decode_records, read_last
from ssmd_dagster.archive.layout import FILE_OF_CHANNEL
from ssmd_dagster.archive.records import Record, parse_record
from ssmd_dagster.capture.control import control_subject, serve
from ssmd_dagster.capture.process import Heartbeat, cancel, connected, run
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.environments.home import gateway_file
from ssmd_dagster.errors import ExitCode, SsmdError
from ssmd_dagster.exchange import OTHER, SESSION, market_reader
from ssmd_dagster.stores.connect import Stores

COMPONENT = "gateway"
MAX_QUEUED = 10_000
"""Events that wait for one client; beyond that its oldest are dropped and counted."""
MAX_QUEUED_BYTES = 16 << 20
MAX_CLIENTS = 10_000
MAX_TICKERS = 100_000
"""Tickers that one client may name."""
MAX_REQUEST_BYTES = 1 << 20
DRAIN_TIMEOUT_S, CLOSE_TIMEOUT_S = 2.0, 1.0
"""Together less than whoever asks for the drain waits for the answer (`control.ANSWER_TIMEOUT_S`)."""
FETCH_TIMEOUT_S = 1.0
CURRENT_DAY_EVERY_S = 1.0
GOING_AWAY = 1001

_log = logging.getLogger(__name__)
_encode = msgspec.json.encode


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What a client sends. `op` is `subscribe` (adds) or `unsubscribe` (takes away); None means all."""

    op: str
    tickers: list[str] | None = None
    channels: list[str] | None = None


class Client:
    """One WebSocket client: what it wants, and what waits for it."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self.socket = socket
        self.all_tickers = False
        self.tickers: set[str] = set()
        self.channels: set[str] = set()
        self.dropped = 0
        self._queue: deque[str] = deque()
        self._queued_bytes = 0
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def wants(self, channel: str, ticker: str | None) -> bool:
        """Tell whether an event is for this client; events without a ticker go to those who want all tickers."""
        return channel in self.channels and (self.all_tickers or (ticker is not None and ticker in self.tickers))

    def put(self, event: str) -> None:
        """Queue one event; never waits. The oldest makes room where the client does not keep up."""
        self._queue.append(event)
        self._queued_bytes += len(event)
        while len(self._queue) > MAX_QUEUED or (self._queued_bytes > MAX_QUEUED_BYTES and len(self._queue) > 1):
            self._queued_bytes -= len(self._queue.popleft())
            self.dropped += 1
        self._idle.clear()
        self._more.set()

    async def send_all(self) -> None:
        """Send what is queued, in order, until cancelled or the socket is gone."""
        told = 0
        while True:
            await self._more.wait()
            while self._queue:
                if self.dropped > told:
                    count, told = self.dropped - told, self.dropped
                    await self.socket.send_str(_text({"type": "dropped", "count": count}))
                    continue
                event = self._queue.popleft()
                self._queued_bytes -= len(event)
                await self.socket.send_str(event)
            self._more.clear()
            self._idle.set()

    async def drained(self) -> None:
        """Wait until nothing is queued."""
        await self._idle.wait()

    def apply(self, request: Request) -> None:
        """Change what the client wants; raise `ValueError` for what no gateway knows or holds."""
        known = {name for name in FILE_OF_CHANNEL if name != SESSION}
        unknown = set(request.channels or ()) - known
        if unknown:
            raise ValueError(f"unknown channels {sorted(unknown)}; known: {sorted(known)}")
        if request.op == "subscribe":
            if len(self.tickers) + len(request.tickers or ()) > MAX_TICKERS:
                raise ValueError(f"more than {MAX_TICKERS} tickers; subscribe without tickers for all")
            self.channels |= known if request.channels is None else set(request.channels)
            self.all_tickers = self.all_tickers or request.tickers is None
            self.tickers |= set(request.tickers or ())
        elif request.op == "unsubscribe":
            self._take_away(request)
        else:
            raise ValueError(f"unknown op {request.op!r}; known: subscribe, unsubscribe")

    def _take_away(self, request: Request) -> None:
        if request.tickers is not None and request.channels is not None:
            raise ValueError("unsubscribe takes tickers or channels, not both")
        if request.channels is not None:
            self.channels -= set(request.channels)
        elif request.tickers is None:
            self.all_tickers = False
            self.channels.clear()
            self.tickers.clear()
        elif self.all_tickers:
            raise ValueError("all tickers are subscribed: unsubscribe without tickers, then subscribe those you want")
        else:
            self.tickers -= set(request.tickers)

    def wanted(self) -> dict[str, Any]:
        """Return what the client wants, None for all."""
        return {
            "tickers": None if self.all_tickers else sorted(self.tickers),
            "channels": None if len(self.channels) == len(FILE_OF_CHANNEL) - 1 else sorted(self.channels),
        }


class Gateway:
    """Serves one environment's events until told to stop."""

    def __init__(self, setting: Setting, stores: Stores) -> None:
        self._setting, self._stores = setting, stores
        self._env = setting.env.name
        self._clients: set[Client] = set()
        self._ticker_of = market_reader(setting.env.feed)
        self._events = 0
        self._last_event_ns: int | None = None
        self._damaged = 0
        self._current: str | None = None
        self._passed_over = 0
        self._control = control_subject(self._env, COMPONENT)
        self._beats_as = "live", COMPONENT
        self._close_s = CLOSE_TIMEOUT_S
        self.port = 0
        self.tailing = False

    async def run(self, stop: asyncio.Event) -> None:
        """Serve on a free loopback port (kept in SSMD_HOME) until `stop`."""
        app = web.Application()
        app.router.add_get("/v1/stream", self._stream)
        app.router.add_get("/v1/health", self._health)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_TIMEOUT_S)
        await runner.setup()
        self.port = await self._listen(runner)
        service = await serve(self._stores.nc, self._control, self._answer)
        heartbeat = Heartbeat(self._stores.cache, *self._beats_as, 0, self._status)
        tasks = [asyncio.create_task(self._feed()), asyncio.create_task(heartbeat.run())]
        waiting = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiting}:
                task.result()
        finally:
            await cancel(*tasks, waiting)
            await service.unsubscribe()
            await self._drain("gateway stops", close=True)
            await runner.cleanup()

    async def _listen(self, runner: web.AppRunner) -> int:
        return await _listen(runner, self._setting)

    async def _feed(self) -> None:
        """Pass on what the stream gets, until cancelled."""
        channels = [name for name in FILE_OF_CHANNEL if name != SESSION]
        looked = 0.0
        async with await self._stores.raw_stream.tail(channels) as tail:
            self.tailing = True
            while True:
                if time.monotonic() - looked > CURRENT_DAY_EVERY_S:
                    looked = time.monotonic()
                    await self._look_up_current_day()
                for batch in await tail.fetch(FETCH_TIMEOUT_S):
                    # Around a roll two days record the same markets: clients get the events of the current one.
                    if self._clients and self._current in (None, batch.date):
                        self._pass_on(batch.data)
                        # Lets the senders send: nobody shall lose events because the stream is read in large steps.
                        await asyncio.sleep(0)
                if tail.dropped > self._passed_over:
                    lost = _text({"type": "dropped", "batches": tail.dropped - self._passed_over})
                    self._passed_over = tail.dropped
                    for client in self._clients:
                        client.put(lost)

    async def _look_up_current_day(self) -> None:
        try:
            self._current = await self._stores.cache.current()
        except SsmdError as error:
            _log.warning("current day not looked up: %s", error)

    def _pass_on(self, data: bytes) -> None:
        batch = read_last(data)
        if not isinstance(batch, Batch):
            self._damaged += 1
            return
        if not any(batch.header.channel in client.channels for client in self._clients):
            self._last_event_ns = batch.header.recv_last_ns
            return
        try:
            records = decode_records(data, batch)
        except BatchDamagedError:
            self._damaged += 1  # verification names it; live clients have lost these events either way
            return
        for line in records.splitlines():
            self._pass_record_on(batch.header, parse_record(line), line)

    def _pass_record_on(self, header: BatchHeader, record: Record, line: bytes) -> None:
        ticker = self._ticker_of(record.wire) if header.channel != OTHER and record.wire else None
        self._last_event_ns = record.recv_ns
        event: str | None = None
        for client in self._clients:
            if not client.wants(header.channel, ticker):
                continue
            if event is None:
                prefix = _encode(
                    {
                        "type": "event",
                        "day": header.day,
                        "channel": header.channel,
                        "ticker": ticker,
                        "conn": header.conn,
                    }
                )
                event = (prefix[:-1] + b"," + line[1:]).decode()
                self._events += 1
            client.put(event)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if len(self._clients) >= MAX_CLIENTS:
            raise web.HTTPServiceUnavailable(text=f"the gateway serves {MAX_CLIENTS} clients already")
        # Uncompressed: whoever is on this host has the room, and one event goes to many.
        socket = web.WebSocketResponse(
            heartbeat=20.0, max_msg_size=MAX_REQUEST_BYTES, timeout=self._close_s, compress=False
        )
        await socket.prepare(request)
        client = Client(socket)
        self._clients.add(client)
        sender = asyncio.create_task(client.send_all())
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    client.put(_apply(client, message.data))
                elif message.type is WSMsgType.BINARY:
                    client.put(_text({"type": "error", "error": "a request is one JSON object in a text message"}))
        finally:
            self._clients.discard(client)
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        return socket

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "environment": self._env, **self._status()})

    async def _answer(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if command == "drain":
            await self._drain(f"trading day {arguments.get('date')} ended", close=bool(arguments.get("close")))
        elif command != "status":
            raise SsmdError(f"unknown command `{command}`")
        return self._status()

    async def _drain(
        self, reason: str, *, close: bool, drain_s: float = DRAIN_TIMEOUT_S, close_s: float = CLOSE_TIMEOUT_S
    ) -> None:
        """Let every client have what is queued for it, within `drain_s`; close them where asked."""
        clients = list(self._clients)
        for client in clients:
            client.put(_text({"type": "day_ended", "reason": reason}))
        await _within(drain_s, [client.drained() for client in clients])
        if close:
            message = reason.encode()[:120]
            await _within(close_s, [client.socket.close(code=GOING_AWAY, message=message) for client in clients])

    def _status(self) -> dict[str, Any]:
        return {
            "state": "serving",
            "at_ns": self._setting.clock(),
            "port": self.port,
            "clients": len(self._clients),
            "events": self._events,
            "dropped": sum(client.dropped for client in self._clients),
            "damaged_batches": self._damaged,
            "passed_over_batches": self._passed_over,
            "last_event_ns": self._last_event_ns,
        }


async def _within(timeout_s: float, waits: Sequence[Coroutine[Any, Any, Any]]) -> None:
    """Wait for all of `waits`, and cancel those that are not done in time."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _text(message: dict[str, Any]) -> str:
    return _encode(message).decode()


def _apply(client: Client, text: str) -> str:
    """Carry out one request and return the answer."""
    try:
        request = msgspec.json.decode(text, type=Request)
        client.apply(request)
    except (msgspec.DecodeError, ValueError) as error:
        return _text({"type": "error", "error": str(error)})
    return _text({"type": "subscribed", **client.wanted()})


async def _listen(runner: web.AppRunner, setting: Setting) -> int:
    """Listen on the port of the last time where it is free, else on any, and remember it."""
    path = gateway_file(setting.home, setting.env.name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    known = path.read_text() if path.exists() else ""
    ports = [int(known), 0] if known.isdigit() else [0]
    for port in ports:
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            break
        except OSError:
            if port == 0:
                raise
    port = int(runner.addresses[0][1])
    path.write_text(str(port))
    return port


async def main(env_name: str, stop: asyncio.Event) -> None:
    """Run one gateway until `stop` is set."""
    setting = load_setting(env_name)
    async with connected(setting, COMPONENT) as stores:
        await Gateway(setting, stores).run(stop)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], stop))
