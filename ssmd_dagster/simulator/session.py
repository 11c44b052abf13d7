"""One WebSocket connection of the simulated exchange: its subscriptions, commands and answers.

Every frame goes through `Connection.put` and `Connection.flush`, which log it before the socket gets it. What makes books
move is `engine`'s business.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from hashlib import sha256
from itertools import groupby
from typing import Any, Protocol

import msgspec
from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from ssmd_dagster.simulator import indices
from ssmd_dagster.simulator.faults import Faults, FrameFault, Queued
from ssmd_dagster.simulator.frames import compact, ticker_tail, wire
from ssmd_dagster.simulator.playback import Recording
from ssmd_dagster.simulator.shift import SimulatorClock
from ssmd_dagster.simulator.truth import TYPE_CODE, TYPES, TruthLog
from ssmd_dagster.simulator.world import Market, World

BOOK = "orderbook_delta"
TICKER = "ticker"
TRADE = "trade"
LIFECYCLE = "market_lifecycle_v2"
COMBO_LIFECYCLE = "multivariate_market_lifecycle"
UNKNOWN_SID = 7
QUIET = frozenset(("fill", "market_positions", "user_orders", "order_group_updates", "communications"))
"""Private channels: they can be subscribed and stay silent, since nobody trades here."""
CHANNELS = frozenset((BOOK, TICKER, TRADE, LIFECYCLE, COMBO_LIFECYCLE, *indices.CHANNELS)) | QUIET

ERRORS = {
    1: "Unable to process message",
    2: "Params required",
    3: "Channels required",
    4: "Subscription IDs required",
    5: "Unknown command",
    UNKNOWN_SID: "Unknown subscription ID",
    8: "Unknown channel name",
    9: "Authentication required",
    10: "Channel error",
    11: "Invalid parameter",
    12: "Exactly one subscription ID is required",
    13: "Unsupported action",
    14: "Market Ticker required",
    15: "Action required",
    24: "Index IDs required",
    25: "Subscription buffer overflow",
    26: "Subscription market limit exceeded",
    27: "Too many requests",
    28: "Underlying tickers required",
}
_HIGH_WATER_BYTES = 2 << 20
_LOW_WATER_BYTES = 256 << 10
_MAX_SWALLOWED = 1_000_000
_SNAPSHOTS_AT_ONCE = 250
_HEARTBEAT = b"heartbeat"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the exchange allows and how it behaves; Kalshi publishes few of these numbers."""

    ping_interval_s: float = 10.0
    pong_timeout_s: float = 20.0
    buffer_bytes: int = 32 << 20
    markets_per_subscription: int = 500_000
    commands_per_second: int = 1_000
    answer_delay_s: float = 0.003
    stall_s: float = 5.0


class Subscription:
    """One channel on one connection. `markets` is None where the client set no filter."""

    __slots__ = (
        "alive",
        "channel",
        "commands",
        "connection",
        "key",
        "keys",
        "markets",
        "marks",
        "missing",
        "names",
        "out",
        "prefix",
        "seq",
        "sid",
        "skip_ack",
        "yes_scale",
    )

    def __init__(self, connection: Connection, channel: str, sid: int) -> None:
        self.connection = connection
        self.channel = channel
        self.sid = sid
        self.seq = 0
        self.key = sid << 8 | TYPE_CODE.get(channel, 0)
        self.prefix = f'{{"type":"{channel}","sid":{sid},"seq":'.encode()
        self.yes_scale = False
        self.skip_ack = False
        self.alive = True
        self.markets: dict[Market, None] | None = {}
        self.missing: dict[str, None] = {}
        self.names: dict[str, None] = {}
        """Indices or underlyings of the channels that have such; `all` is one of them."""
        self.commands: deque[float] = deque()
        # The connection's own lists, one attribute nearer for the loop that fills them.
        self.out, self.keys, self.marks = connection.out, connection.keys, connection.marks

    def next_seq(self) -> int:
        """Take the next sequence number."""
        self.seq += 1
        return self.seq

    def subscribers(self, market: Market) -> list[Any]:
        """Return the market's list of subscriptions of this channel."""
        if self.channel == BOOK:
            return market.book_subs
        return market.trade_subs if self.channel == TRADE else market.ticker_subs


class Exchange(Protocol):
    """What a connection needs of the rest of the simulator."""

    world: World
    clock: SimulatorClock
    truth: TruthLog
    limits: Limits
    rng: random.Random
    connections: dict[int, Connection]
    everything: dict[str, list[Subscription]]
    faults: Faults
    recording: Recording | None

    def play(self, connection: Connection) -> None:
        """Begin to play the recording to a connection."""

    def stamp(self) -> tuple[int, int]:
        """Return when something that happens now happened, and when it is sent, in ms; the first never goes down."""

    def drained(self, connection: Connection) -> None:
        """Take note that a connection's socket takes data again, or is gone."""


class Connection(WSListener):
    """One client. Made at the handshake, counted from 1 over the whole life of the simulator's home."""

    def __init__(self, exchange: Exchange, number: int, remote: str) -> None:
        self.exchange = exchange
        self.number = number
        self.remote = remote
        self.out: list[bytes] = []
        self.keys: list[int] = []
        self.marks: list[int] = []
        self.faults: list[FrameFault] = []
        self.cut_in_snapshots = 0
        """Number of the fault that breaks the connection amid its next snapshots."""
        self.paused = False
        self.open = False
        self.subscriptions: dict[int, Subscription] = {}
        self.by_channel: dict[str, Subscription] = {}
        self.frames = 0
        self._swallowing = 0
        """Number of the fault that made a black hole: nothing is read, sent or answered."""
        self._swallowed: list[Queued] = []
        self._last_sid = 0
        self._playing = False
        self._wanted: deque[tuple[Subscription, Market, int | None]] = deque()
        self._pumping = False
        self._transport: WSTransport | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._pong_due: asyncio.TimerHandle | None = None

    # -- the socket ------------------------------------------------------------------------------------------------

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Begin: first ping in one interval."""
        self._transport = transport
        transport.underlying_transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES, low=_LOW_WATER_BYTES)
        self.open = True
        self.exchange.connections[self.number] = self
        self.exchange.truth.note("opened", self.exchange.clock(), connection=self.number, remote=self.remote)
        self.exchange.faults.opened(self)
        self._later(self.exchange.limits.ping_interval_s, self._ping)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """End: forget all subscriptions. Frames still in the socket's buffer may never have arrived."""
        self.open = False
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for sid in list(self.subscriptions):
            self.drop(sid)
        self.exchange.connections.pop(self.number, None)
        self.exchange.truth.note("closed", self.exchange.clock(), connection=self.number, frames=self.frames)
        self.exchange.drained(self)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Take a command, or a sign of life."""
        if self._swallowing:
            return
        kind = frame.msg_type
        if kind == WSMsgType.TEXT or kind == WSMsgType.BINARY:
            command = frame.get_payload_as_bytes()
            # Answers come out of the order of the commands, as Kalshi's do.
            delay_s = self.exchange.limits.answer_delay_s
            if delay_s:
                delay_s *= self.exchange.rng.random() * (6 if self.exchange.rng.random() < 0.1 else 1)
            self._later(delay_s, lambda: self.command(command))
        elif kind == WSMsgType.PONG:
            if self._pong_due is not None:
                self._cancel(self._pong_due)
                self._pong_due = None
        elif kind == WSMsgType.PING:
            transport.send_pong(frame.get_payload_as_bytes())
        elif kind == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        self.paused = True

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.paused = False
        self.exchange.drained(self)
        if self._wanted:
            self._start_pump()

    def close(self, code: WSCloseCode = WSCloseCode.GOING_AWAY) -> None:
        """Say goodbye and close."""
        if self._transport is not None and self.open:
            self.flush()
            self.open = False
            self._transport.send_close(code)
            self._transport.disconnect()

    def cut(self) -> None:
        """Break the connection without a word; what the socket still buffers is lost."""
        if self._transport is not None:
            self.flush()
            self.open = False
            self._transport.underlying_transport.abort()

    def _later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        def run() -> None:
            self._timers.discard(timer)
            if self.open:
                call()

        timer = asyncio.get_running_loop().call_later(delay_s, run)
        self._timers.add(timer)
        return timer

    def _cancel(self, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self._timers.discard(timer)

    def _ping(self) -> None:
        limits = self.exchange.limits
        if self._transport is not None and not self._swallowing:
            self._transport.send_ping(_HEARTBEAT)
            if self._pong_due is None:
                self._pong_due = self._later(limits.pong_timeout_s, self._no_pong)
        self._later(limits.ping_interval_s, self._ping)

    def _no_pong(self) -> None:
        self._pong_due = None
        if not self._swallowing:
            self.exchange.truth.note("no_pong", self.exchange.clock(), connection=self.number)
            self.cut()

    # -- frames out ------------------------------------------------------------------------------------------------

    def put(self, payload: bytes, kind: str, *, sid: int = 0, seq: int = 0, market: int = 0) -> None:
        """Queue one frame for the next flush."""
        self.out.append(payload)
        self.keys.append(seq << 24 | sid << 8 | TYPE_CODE[kind])
        self.marks.append(market)

    def flush(self, event_ns: int = 0) -> None:
        """Log what is queued, then hand it to the socket."""
        out, keys, marks = self.out, self.keys, self.marks
        if not out:
            return
        if self.faults or self._swallowing:
            queued = [Queued(*each) for each in zip(out, keys, marks, strict=True)]
            self._send_faulty(queued, event_ns)
        else:
            self._send(out, keys, marks, event_ns, 0)
        out.clear()
        keys.clear()
        marks.clear()

    def _send(self, out: list[bytes], keys: list[int], marks: list[int], event_ns: int, fault: int) -> None:
        exchange = self.exchange
        if self._transport is None or not self.open:
            return
        exchange.truth.sent(
            self.number, exchange.clock(), event_ns, fault, keys, marks, [sha256(p).digest() for p in out]
        )
        self.frames += len(out)
        transport = self._transport.underlying_transport
        transport.write(wire(out))
        if self.paused and transport.get_write_buffer_size() > exchange.limits.buffer_bytes:
            # Not amid a flush: the error message is queued behind what is going out.
            self._later(0, self.overflow)

    def _send_faulty(self, queued: list[Queued], event_ns: int) -> None:
        """Send through the faults of this connection, each run of frames under the number of its fault."""
        for fault in list(self.faults):
            queued = fault.alter(queued, self)
            if fault.left <= 0:
                self.faults.remove(fault)
        if self._swallowing:
            self._swallowed += queued
            if len(self._swallowed) > _MAX_SWALLOWED:
                self.cut()
            return
        for number, run in groupby(queued, key=lambda each: each.fault):
            items = list(run)
            self._send(
                [each.payload for each in items],
                [each.key for each in items],
                [each.market for each in items],
                event_ns,
                number,
            )

    # -- faults ----------------------------------------------------------------------------------------------------

    def put_fault(self, payload: bytes, kind: str, number: int, *, sid: int = 0, seq: int = 0) -> None:
        """Send one frame that a fault made up."""
        self.flush()
        self._send_faulty([Queued(payload, seq << 24 | sid << 8 | TYPE_CODE[kind], 0, number)], 0)

    def release_later(self, queued: Queued, delay_s: float) -> None:
        """Send a frame that was kept back, some time from now."""

        def release() -> None:
            self.flush()
            self._send_faulty([queued], 0)

        self._later(delay_s, release)

    def tell_withheld(self, withheld: list[Queued], number: int) -> None:
        """Log frames that a fault keeps from the socket, for now or for good."""
        self.exchange.truth.note(
            "withheld",
            self.exchange.clock(),
            fault=number,
            connection=self.number,
            frames=[[each.key >> 8 & 0xFFFF, each.key >> 24, TYPES[each.key & 0xFF]] for each in withheld],
        )

    def tear(self, beginning: bytes) -> None:
        """Send the beginning of a frame and break the connection."""
        if self._transport is not None and self.open:
            self.flush()
            self._transport.underlying_transport.write(beginning)
            self.cut()

    def swallow(self, number: int, for_s: float, *, resume: bool) -> None:
        """Let nothing in or out for a while; then send what was due, or break the connection."""
        self.flush()
        self._swallowing = number

        def end() -> None:
            self._swallowing = 0
            held, self._swallowed = self._swallowed, []
            if resume:
                self._send_faulty([each._replace(fault=each.fault or number) for each in held], 0)
            else:
                self.tell_withheld(held, number)
                self.cut()

        self._later(for_s, end)

    def overflow(self) -> None:
        """End the busiest subscription of a client that does not keep up (code 25)."""
        busiest = max(self.subscriptions.values(), key=lambda sub: sub.seq, default=None)
        if busiest is not None:
            self.exchange.truth.note("overflow", self.exchange.clock(), connection=self.number, sid=busiest.sid)
            self.end_subscription(busiest, 25)

    def end_subscription(self, sub: Subscription, code: int) -> None:
        """Send a terminal error of a subscription, and end it; with code 7 without a word."""
        if code != UNKNOWN_SID:
            seq = sub.next_seq()
            self._answer("error", None, {"code": code, "msg": ERRORS[code]}, sid=sub.sid, seq=seq)
        self.drop(sub.sid)
        self.flush()

    def _answer(self, kind: str, command_id: int | None, msg: Any, *, sid: int = 0, seq: int = 0) -> None:
        frame: dict[str, Any] = {"type": kind}
        if command_id:
            frame["id"] = command_id
        if sid:
            frame["sid"] = sid
        if seq:
            frame["seq"] = seq
        if msg is not None:
            frame["msg"] = msg
        frame["sending_ts_ms"] = self.exchange.clock() // 1_000_000
        self.put(compact(frame), kind, sid=sid, seq=seq)

    def _error(self, command_id: int | None, code: int, *, sub: Subscription | None = None, **more: Any) -> None:
        msg = {"code": code, "msg": ERRORS[code], **more}
        if sub is None:
            self._answer("error", command_id, msg)
        else:
            self._answer("error", command_id, msg, sid=sub.sid, seq=sub.next_seq())

    # -- commands --------------------------------------------------------------------------------------------------

    def command(self, raw: bytes) -> None:
        """Carry out one command and answer it."""
        try:
            told = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            told = None
        if not isinstance(told, dict):
            self._error(None, 1)
            self.flush()
            return
        command_id = told.get("id")
        if not isinstance(command_id, int) or isinstance(command_id, bool) or command_id <= 0:
            command_id = None
        name, params = told.get("cmd"), told.get("params")
        if name == "list_subscriptions":
            open_now = [{"channel": sub.channel, "sid": sub.sid} for sub in self.subscriptions.values()]
            self._answer("ok", command_id, open_now)
        elif name not in ("subscribe", "unsubscribe", "update_subscription"):
            self._error(command_id, 5)
        elif not isinstance(params, dict):
            self._error(command_id, 2)
        elif name == "subscribe":
            self._subscribe(command_id, params)
        elif name == "unsubscribe":
            self._unsubscribe(command_id, params)
        else:
            self._update(command_id, params)
        self.flush()

    def _subscribe(self, command_id: int | None, params: dict[str, Any]) -> None:
        channels = params.get("channels")
        if not isinstance(channels, list) or not channels:
            self._error(command_id, 3)
            return
        names = _named_markets(params)
        if names is None:
            self._error(command_id, 11)
            return
        tickers, ids = names
        for channel in channels:
            if not isinstance(channel, str) or channel not in CHANNELS:
                self._error(command_id, 8)
            elif channel == BOOK and not tickers:
                self._error(command_id, 14)
            elif ids and channel != TICKER:
                self._error(command_id, 11)
            else:
                self._open_channel(command_id, channel, tickers, ids, params)

    def _open_channel(
        self, command_id: int | None, channel: str, tickers: list[str], ids: list[str], params: dict[str, Any]
    ) -> None:
        limit = self.exchange.limits.markets_per_subscription
        sub = self.by_channel.get(channel)
        fresh = sub is None
        if sub is None:
            if len(tickers) + len(ids) > limit:
                self._error(command_id, 26)
                return
            self._last_sid += 1
            sub = Subscription(self, channel, self._last_sid)
            sub.yes_scale = channel == BOOK and params.get("use_yes_price") is True
            sub.skip_ack = params.get("skip_ticker_ack") is True
            self.subscriptions[sub.sid] = sub
            self.by_channel[channel] = sub
            self._answer("subscribed", command_id, {"channel": channel, "sid": sub.sid})
            if channel not in (BOOK, TICKER, TRADE) or not (tickers or ids):
                sub.markets = None
                self.exchange.everything[channel].append(sub)
        if self.exchange.recording is not None:
            if not self._playing:
                self._playing = True
                self.flush()
                self.exchange.play(self)
            return
        if not fresh and not self._may(command_id, sub, len(tickers) + len(ids)):
            return
        if channel in indices.CHANNELS:
            sub.names |= dict.fromkeys(_index_names(sub, params))
            if not fresh:
                self._acknowledge(command_id, sub)
        elif sub.markets is not None and channel in (BOOK, TICKER, TRADE):
            added = self._add(sub, tickers, ids)
            if not fresh:
                self._acknowledge(command_id, sub)
            self._show(sub, added, initial=params.get("send_initial_snapshot") is True)
        elif not fresh:
            self._acknowledge(command_id, sub)

    def _may(self, command_id: int | None, sub: Subscription, adding: int) -> bool:
        """Check the rate of a subscription's commands and its number of markets."""
        limits = self.exchange.limits
        now_s = asyncio.get_running_loop().time()
        while sub.commands and sub.commands[0] < now_s - 1:
            sub.commands.popleft()
        if len(sub.commands) >= limits.commands_per_second:
            self._error(command_id, 27, sub=sub)
            return False
        sub.commands.append(now_s)
        if sub.markets is not None and len(sub.markets) + len(sub.missing) + adding > limits.markets_per_subscription:
            self._error(command_id, 26, sub=sub)
            return False
        return True

    def _add(self, sub: Subscription, tickers: Iterable[str], ids: Iterable[str]) -> list[Market]:
        world = self.exchange.world
        assert sub.markets is not None
        added = []
        for ticker in tickers:
            market = world.markets.get(ticker)
            if market is None:
                # The filter is by name: a market that is listed later matches it then.
                sub.missing[ticker] = None
            elif market not in sub.markets:
                sub.markets[market] = None
                added.append(market)
        for market_id in ids:
            market = world.by_id.get(market_id)
            if market is not None and market not in sub.markets:
                sub.markets[market] = None
                added.append(market)
        return added

    def listed(self, market: Market) -> None:
        """Take note of a newly listed market that a filter may have named already."""
        for sub in self.subscriptions.values():
            if market.ticker in sub.missing and sub.markets is not None:
                del sub.missing[market.ticker]
                sub.markets[market] = None
                self._show(sub, [market], initial=False)

    def _show(self, sub: Subscription, added: list[Market], *, initial: bool) -> None:
        """Begin to send the data of markets; a book's deltas follow its snapshot, never lead it."""
        if sub.channel == BOOK:
            self._wanted.extend((sub, market, None) for market in added)
            self._start_pump()
            return
        for market in added:
            sub.subscribers(market).append(sub)
            if initial and sub.channel == TICKER and market.built:
                tail = ticker_tail(*self.exchange.stamp())
                payload = b'{"type":"ticker","sid":%d%b%b' % (sub.sid, market.ticker_message(), tail)
                self.put(payload, "ticker", sid=sub.sid, market=market.index)

    def _start_pump(self) -> None:
        if not self._pumping and self._wanted:
            self._pumping = True
            self._later(0, self._pump)

    def _pump(self) -> None:
        """Send some of the snapshots that are asked for, then let the rest of the exchange have a turn."""
        self._pumping = False
        if self.paused:
            return
        at_once = min(_SNAPSHOTS_AT_ONCE, len(self._wanted))
        if self.cut_in_snapshots:
            at_once = max(1, at_once // 2)
        for _ in range(at_once):
            sub, market, command_id = self._wanted.popleft()
            if not sub.alive or sub.markets is None:
                continue
            if command_id is not None:
                self.snapshot(sub, market, command_id)
            elif market in sub.markets and sub not in market.book_subs:
                self.snapshot(sub, market)
                market.book_subs.append(sub)
        self.flush()
        if self.cut_in_snapshots and at_once:
            # What the client has got so far must reach it; the rest never comes.
            self.cut_in_snapshots = 0
            self.close(WSCloseCode.INTERNAL_ERROR)
            return
        self._start_pump()

    def snapshot(self, sub: Subscription, market: Market, command_id: int | None = None) -> None:
        """Queue a snapshot of a book as it is now."""
        seq = sub.next_seq()
        head = f'{{"type":"orderbook_snapshot","id":{command_id}' if command_id else '{"type":"orderbook_snapshot"'
        payload = b'%b,"sid":%d,"seq":%d%b%d%b},"sending_ts_ms":%d}' % (
            head.encode(),
            sub.sid,
            seq,
            market.head,
            market.clock,
            market.book_part(yes_scale=sub.yes_scale),
            self.exchange.clock() // 1_000_000,
        )
        self.put(payload, "orderbook_snapshot", sid=sub.sid, seq=seq, market=market.index)

    def _acknowledge(self, command_id: int | None, sub: Subscription) -> None:
        msg: dict[str, Any] | None = None
        if sub.channel in indices.CHANNELS:
            msg = {indices.PARAMETER[sub.channel]: ["all"] if "all" in sub.names else list(sub.names)}
        elif not sub.skip_ack and sub.markets is not None:
            msg = {"market_tickers": [market.ticker for market in sub.markets] + list(sub.missing)}
        self._answer("ok", command_id, msg, sid=sub.sid, seq=sub.next_seq())

    def _unsubscribe(self, command_id: int | None, params: dict[str, Any]) -> None:
        sids = params.get("sids")
        if not isinstance(sids, list) or not sids:
            self._error(command_id, 4)
            return
        for sid in sids:
            sub = self.subscriptions.get(sid) if isinstance(sid, int) else None
            if sub is None:
                self._error(command_id, UNKNOWN_SID)
            else:
                self._answer("unsubscribed", command_id, None, sid=sub.sid, seq=sub.next_seq())
                self.drop(sub.sid)

    def drop(self, sid: int) -> None:
        """Forget a subscription."""
        sub = self.subscriptions.pop(sid)
        del self.by_channel[sub.channel]
        sub.alive = False
        if sub.markets is None:
            self.exchange.everything[sub.channel].remove(sub)
            return
        for market in sub.markets:
            self._forget(sub, market)

    @staticmethod
    def _forget(sub: Subscription, market: Market) -> None:
        subscribers = sub.subscribers(market)
        if sub in subscribers:
            subscribers.remove(sub)

    def _update(self, command_id: int | None, params: dict[str, Any]) -> None:
        sids = params.get("sids")
        if sids is None:
            sids = [params["sid"]] if "sid" in params else []
        elif "sid" in params:
            sids = []
        if not isinstance(sids, list) or len(sids) != 1:
            self._error(command_id, 12)
            return
        sub = self.subscriptions.get(sids[0]) if isinstance(sids[0], int) else None
        if sub is None:
            self._error(command_id, UNKNOWN_SID)
            return
        action = params.get("action")
        names = _named_markets(params)
        if action is None:
            self._error(command_id, 15, sub=sub)
        elif sub.channel in indices.CHANNELS:
            self._update_indices(command_id, sub, action, params)
        elif (
            action not in ("add_markets", "delete_markets", "get_snapshot")
            or sub.channel not in (BOOK, TICKER, TRADE)
            or (action == "get_snapshot" and sub.channel != BOOK)
        ):
            self._error(command_id, 13, sub=sub)
        elif names is None or (names[1] and sub.channel != TICKER):
            self._error(command_id, 11, sub=sub)
        elif not names[0] and not names[1]:
            self._error(command_id, 14, sub=sub)
        elif self._may(command_id, sub, len(names[0]) + len(names[1]) if action == "add_markets" else 0):
            self._change(command_id, sub, action, names, params)

    def _update_indices(self, command_id: int | None, sub: Subscription, action: Any, params: dict[str, Any]) -> None:
        channel = sub.channel
        if action == indices.LIST[channel]:
            seq = sub.next_seq()
            listed = {indices.PARAMETER[channel]: sorted(indices.NAMES[channel])}
            self._answer(indices.LIST_TYPE[channel], command_id, listed, sid=sub.sid, seq=seq)
            return
        if action not in (indices.ADD[channel], indices.REMOVE[channel]):
            self._error(command_id, 13, sub=sub)
            return
        names = _index_names(sub, params)
        if not names:
            self._error(command_id, indices.MISSING[channel], sub=sub)
            return
        if action == indices.ADD[channel]:
            sub.names |= dict.fromkeys(names)
        else:
            sub.names = {name: None for name in sub.names if name not in names and "all" not in names}
        self._acknowledge(command_id, sub)

    def _change(
        self, command_id: int | None, sub: Subscription, action: str, names: tuple[list[str], list[str]], params: Any
    ) -> None:
        tickers, ids = names
        world = self.exchange.world
        if action == "get_snapshot":
            found = [world.markets[ticker] for ticker in tickers if ticker in world.markets]
            self._wanted.extend((sub, market, command_id or 0) for market in found)
            self._start_pump()
            return
        if sub.markets is None:
            self._acknowledge(command_id, sub)
            return
        if action == "add_markets":
            added = self._add(sub, tickers, ids)
            self._acknowledge(command_id, sub)
            self._show(sub, added, initial=params.get("send_initial_snapshot") is True)
            return
        for name in (*tickers, *ids):
            sub.missing.pop(name, None)
            market = world.markets.get(name) or world.by_id.get(name)
            if market is not None and market in sub.markets:
                del sub.markets[market]
                self._forget(sub, market)
        self._acknowledge(command_id, sub)


def _index_names(sub: Subscription, params: dict[str, Any]) -> list[str]:
    names = params.get(indices.PARAMETER[sub.channel])
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _named_markets(params: dict[str, Any]) -> tuple[list[str], list[str]] | None:
    """Return the tickers and ids that a command names, each at most once, or None where they contradict each other."""
    named = [key for key in ("market_ticker", "market_tickers", "market_id", "market_ids") if key in params]
    if not named:
        return [], []
    if len(named) > 1:
        return None
    value = params[named[0]]
    if named[0] in ("market_ticker", "market_id"):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None
    unique = list(dict.fromkeys(value))
    return ([], unique) if "id" in named[0] else (unique, [])
