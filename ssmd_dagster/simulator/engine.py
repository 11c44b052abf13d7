"""What makes the simulated exchange move: paces the world and tells every subscription what changed.

Not for commands (`session`) or HTTP (`rest`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

from ssmd_dagster.simulator import catalog, indices
from ssmd_dagster.simulator.faults import Faults
from ssmd_dagster.simulator.frames import (
    TradeStamp,
    compact,
    delta_tail,
    event_created,
    fee_update,
    lifecycle_created,
    ticker_tail,
)
from ssmd_dagster.simulator.maintenance import Maintenance
from ssmd_dagster.simulator.playback import Recording
from ssmd_dagster.simulator.session import (
    BOOK,
    CHANNELS,
    COMBO_LIFECYCLE,
    LIFECYCLE,
    TICKER,
    TRADE,
    Connection,
    Limits,
    Subscription,
)
from ssmd_dagster.simulator.shift import SimulatorClock
from ssmd_dagster.simulator.tradebook import TradeBook
from ssmd_dagster.simulator.truth import TYPE_CODE, TruthLog
from ssmd_dagster.simulator.world import Change, Happening, Market, World

_PICKS = 16_384
_PICKS_REUSED = 8
_TICK_S = 0.005
_SLOW_TICK_S = 0.1
_BURST = 1_024
_FAST_ACTIONS = 4
"""At full speed a chosen market moves this often before another is chosen; it spares half the work of choosing."""
_DROPPED_IN_PAUSE = 0.5
_IDLE_RATE = 1_000.0
_ZIPF = 1.1
_COMBO_WEIGHT = 0.1


class Engine:
    """The running exchange. `rate` is messages a second over all markets and the three data channels; 0 is full speed."""

    def __init__(
        self,
        world: World,
        trades: TradeBook,
        truth: TruthLog,
        clock: SimulatorClock,
        *,
        rate: float,
        limits: Limits,
        seed: int,
        pauses: bool,
        recording: Recording | None = None,
    ) -> None:
        self.world = world
        self.trades = trades
        self.truth = truth
        self.clock = clock
        self.rate = rate
        self.limits = limits
        self.rng = random.Random(seed)
        self.pauses = pauses
        self.recording = recording
        self._players: set[asyncio.Task[None]] = set()
        self.connections: dict[int, Connection] = {}
        self.everything: dict[str, list[Subscription]] = {channel: [] for channel in CHANNELS}
        self.faults = Faults(self)
        self.maintenance = Maintenance()
        self.messages = 0
        self.paused = False
        self._index_ticks: dict[str, int] = {}
        self._picks: Iterator[Market] = iter(())
        self._drawn: list[Market] = []
        self._reuse = 0
        self._open: list[Market] = []
        self._weights: list[float] = []
        self._weighed_version = -1
        self._remakes = 0
        self._event_ms = 0
        self._lag_ms = 5
        self._room = asyncio.Event()

    # -- time ------------------------------------------------------------------------------------------------------

    def stamp(self) -> tuple[int, int]:
        """Return the time of an event that is told now, and the time of telling, in ms since the epoch."""
        send_ms = self.clock() // 1_000_000
        # Kalshi's messages leave 3 to 9 ms after the event; a market's event time never goes down.
        self._event_ms = max(self._event_ms, send_ms - self._lag_ms)
        return self._event_ms, send_ms

    def shift(self, offset_ns: int) -> None:
        """Move the exchange's clock, and the world with it."""
        back = offset_ns < self.clock.offset_ns
        self.clock.shift_to(offset_ns)
        if back:
            self._event_ms = 0
        self.truth.note("clock", self.clock(), offset_ns=offset_ns)
        self.pass_time()

    def pass_time(self) -> None:
        """Let the world come up to the clock, and tell what that did."""
        now_ns = self.clock()
        for change in self.world.advance(now_ns):
            self._tell(change)
        if self.world.remakes != self._remakes:
            self._remakes = self.world.remakes
            self._show_all()
        self._tell_indices(now_ns // 1_000_000)
        before = self.paused
        now_s = now_ns // catalog.SECOND_NS
        maintained = self.maintenance.at(now_s) is not None
        self.paused = maintained or (self.pauses and catalog.paused_until_s(now_s) is not None)
        self._flush()
        if maintained:
            for connection in list(self.connections.values()):
                connection.close()
        elif self.paused and not before:
            self._drop_sessions()

    def _drop_sessions(self) -> None:
        """Close about half of the connections: Kalshi says that sessions may be dropped when the pause begins."""
        for connection in list(self.connections.values()):
            if random.Random(f"{self.world.seed}/{connection.number}/pause").random() < _DROPPED_IN_PAUSE:
                connection.close()

    def _show_all(self) -> None:
        """Send the books of all subscribed markets: after a leap in time what clients hold may be of another day."""
        for connection in self.connections.values():
            for sub in connection.subscriptions.values():
                for market in (sub.markets or ()) if sub.channel == BOOK else ():
                    if sub in market.book_subs:
                        connection.snapshot(sub, market)

    def play(self, connection: Connection) -> None:
        """Begin to play the recording, if there is one, to a connection."""
        if self.recording is None:
            return
        numbers = {ticker: market.index for ticker, market in self.world.markets.items()}
        player = asyncio.create_task(self.recording.play(connection, numbers))
        self._players.add(player)
        player.add_done_callback(self._players.discard)

    async def run(self) -> None:
        """Run until cancelled."""
        if self.recording is not None:
            while True:
                await asyncio.sleep(_SLOW_TICK_S)
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        owed = 0.0
        tick_s = min(_SLOW_TICK_S, max(_TICK_S, 0.5 / self.rate)) if self.rate else _TICK_S
        while True:
            self.pass_time()
            rate = self.rate
            if not rate:
                if self._listeners():
                    await self._full_speed()
                    last_s = loop.time()
                    continue
                rate = _IDLE_RATE
            now_s = loop.time()
            # After a stall the exchange does not make up for more than a second.
            owed = min(owed + rate * (now_s - last_s), max(rate, 1.0))
            last_s = now_s
            if self.paused:
                owed = 0.0
            while owed >= 1:
                made = self._burst(min(int(owed), _BURST))
                if not made:
                    owed = 0.0
                owed -= made
                await asyncio.sleep(0)
            await asyncio.sleep(tick_s)

    def _listeners(self) -> bool:
        return any(connection.subscriptions for connection in self.connections.values())

    async def _full_speed(self) -> None:
        """Send as fast as the slowest socket takes, for a moment."""
        for _ in range(16):
            if self.paused or not self._burst(_BURST):
                await asyncio.sleep(_TICK_S)
                return
            if any(connection.paused for connection in self.connections.values()):
                await self._wait_for_room()
            else:
                await asyncio.sleep(0)

    async def _wait_for_room(self) -> None:
        deadline_s = asyncio.get_running_loop().time() + self.limits.stall_s
        while slow := [connection for connection in self.connections.values() if connection.paused]:
            self._room.clear()
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._room.wait()
            except TimeoutError:
                for connection in slow:
                    connection.overflow()
                return

    def drained(self, connection: Connection) -> None:
        """Take note that a connection's socket takes data again, or is gone."""
        self._room.set()

    # -- markets that trade ----------------------------------------------------------------------------------------

    def _weigh(self) -> None:
        """Weigh the open markets: every series alike, and few markets of a series most of the time."""
        self._open, self._weights = [], []
        total = 0.0
        for series, found in self.world.open_markets().items():
            ranks = [rank**-_ZIPF for rank in range(1, len(found) + 1)]
            scale = (_COMBO_WEIGHT if series.combo else 1.0) / (sum(ranks) or 1)
            self._open += found
            for weight in ranks:
                total += weight * scale
                self._weights.append(total)
        self._weighed_version = self.world.version
        self._drawn = []

    def _draw(self) -> bool:
        """Choose the next markets to move; return False if none is open."""
        if self._weighed_version != self.world.version:
            self._weigh()
        if not self._open:
            return False
        if not self._drawn or self._reuse == _PICKS_REUSED:
            quick = not self.rate or self.rate > _PICKS
            self._drawn = self.rng.choices(self._open, cum_weights=self._weights, k=_PICKS if quick else _PICKS // 8)
            self._reuse = 0
        self._reuse += 1
        self._picks = iter(self._drawn)
        self._lag_ms = self.rng.randint(3, 9)
        return True

    def _burst(self, budget: int) -> int:
        """Move markets until about `budget` messages were made, and send what was subscribed; return the messages."""
        if self._weighed_version != self.world.version:
            self._draw()
        event_ms, send_ms = self.stamp()
        tail = delta_tail(event_ms, send_ms)
        stamp = TradeStamp(event_ms, send_ms)
        price_tail = ticker_tail(event_ms, send_ms)
        everyone_ticker, everyone_trade = self.everything[TICKER], self.everything[TRADE]
        at_once = _FAST_ACTIONS if not self.rate else 1
        made = 0
        while made < budget:
            market = next(self._picks, None)
            if market is None:
                if not self._draw():
                    break
                continue
            if not market.built:
                made += self._build(market, tail)
                continue
            tape = market.tape
            hot, ends, length, head, subs, index = (
                tape.hot,
                tape.ends,
                tape.length,
                market.head,
                market.book_subs,
                market.index,
            )
            position = market.position
            actions = 0
            while actions < at_once:
                position += 1
                if position == length:
                    position = 0
                    market.next_round()
                offset, part, yes_part, trade, top_moved = hot[position]
                clock = market.clock_base + offset
                for sub in subs:
                    sub.seq = seq = sub.seq + 1
                    sub.out.append(
                        b"%b%d%b%d%b%b" % (sub.prefix, seq, head, clock, yes_part if sub.yes_scale else part, tail)
                    )
                    sub.keys.append(seq << 24 | sub.key)
                    sub.marks.append(index)
                made += 1
                if ends[position]:
                    actions += 1
                if trade:
                    market.position = position
                    self._trade(market, trade, stamp, everyone_trade)
                    made += 1
                if top_moved and (everyone_ticker or market.ticker_subs):
                    market.position = position
                    self._ticker(market, price_tail, everyone_ticker)
                    made += 1
            market.position = position
        self.messages += made
        self._flush(event_ms)
        return made

    def _build(self, market: Market, tail: bytes) -> int:
        """Let the first orders of a market arrive."""
        market.built = True
        self._deltas(market, market.clock, tail, removing=False)
        return max(1, len(market.book_deltas(removing=False, yes_scale=False)))

    def _deltas(self, market: Market, clock: int, tail: bytes, *, removing: bool) -> None:
        for sub in market.book_subs:
            for part in market.book_deltas(removing=removing, yes_scale=sub.yes_scale):
                sub.seq += 1
                sub.out.append(b"%b%d%b%d%b%b" % (sub.prefix, sub.seq, market.head, clock, part, tail))
                sub.keys.append(sub.seq << 24 | sub.key)
                sub.marks.append(market.index)

    def _trade(self, market: Market, fields: bytes, stamp: TradeStamp, everyone: list[Subscription]) -> None:
        identity = market.trade_id()
        row = stamp.row(identity, market.ticker_bytes, fields)
        self.trades.add(stamp.event_us, market.ticker, row)
        if not everyone and not market.trade_subs:
            return
        told = stamp.told(identity, market.ticker_bytes, fields)
        for subs in (everyone, market.trade_subs):
            for sub in subs:
                sub.seq += 1
                sub.out.append(b"%b%d%b" % (sub.prefix, sub.seq, told))
                sub.keys.append(sub.seq << 24 | sub.key)
                sub.marks.append(market.index)

    def _ticker(self, market: Market, tail: bytes, everyone: list[Subscription]) -> None:
        body = market.ticker_message()
        for subs in (everyone, market.ticker_subs):
            for sub in subs:
                sub.out.append(b'{"type":"ticker","sid":%d%b%b' % (sub.sid, body, tail))
                sub.keys.append(sub.key)
                sub.marks.append(market.index)

    # -- markets that come and go ----------------------------------------------------------------------------------

    def _tell(self, change: Change) -> None:
        market = change.market
        if market is None:
            if change.what is Happening.CREATED:
                self._lifecycle(change, "event_lifecycle", event_created(change.event), 0)
            elif change.what in (Happening.FEE_SET, Happening.FEE_CLEARED):
                self._lifecycle(change, "event_fee_update", fee_update(change), 0)
            return
        msg: dict[str, object] | None = None
        if change.what is Happening.CREATED:
            msg = lifecycle_created(market)
            for connection in self.connections.values():
                connection.listed(market)
        elif change.what is Happening.RENAMED:
            msg = {
                "event_type": "metadata_updated",
                "market_ticker": market.ticker,
                **market.strike(),
                "yes_sub_title": market.plan.sub_title,
            }
        elif change.what in (Happening.DEACTIVATED, Happening.ACTIVATED):
            stopped = change.what is Happening.DEACTIVATED
            kind = "deactivated" if stopped else "activated"
            msg = {"market_ticker": market.ticker, "is_deactivated": stopped, "event_type": kind}
        elif change.what is Happening.DATE_UPDATED:
            msg = {"market_ticker": market.ticker, "close_ts": change.at_s, "event_type": "close_date_updated"}
        elif change.what is Happening.DETERMINED:
            msg = {
                "market_ticker": market.ticker,
                "determination_ts": change.at_s,
                "result": market.result,
                "settlement_value": "1.0000" if market.result == "yes" else "0.0000",
                "event_type": "determined",
            }
        elif change.what is Happening.SETTLED:
            msg = {"market_ticker": market.ticker, "settled_ts": change.at_s, "event_type": "settled"}
        elif change.what is Happening.CLOSED:
            self._close(market)
        elif change.what is Happening.EMPTIED:
            for sub in market.book_subs:
                sub.connection.snapshot(sub, market)
        if msg is not None:
            kind = COMBO_LIFECYCLE if change.event.plan.series.combo else LIFECYCLE
            self._lifecycle(change, kind, msg, market.index)

    def _close(self, market: Market) -> None:
        if not market.live:
            return
        event_ms, send_ms = self.stamp()
        clock = market.clock + 1
        self._deltas(market, clock, delta_tail(event_ms, send_ms), removing=True)
        market.closing_clock = clock
        self._flush(event_ms)

    def _lifecycle(self, change: Change, kind: str, msg: dict[str, object], index: int) -> None:
        combo = change.event.plan.series.combo
        channels = (COMBO_LIFECYCLE,) if combo else (LIFECYCLE,)
        body = compact(msg)
        send_ms = self.clock() // 1_000_000
        for channel in channels:
            for sub in self.everything[channel]:
                seq = sub.next_seq()
                payload = b'{"type":"%b","sid":%d,"seq":%d,"msg":%b,"sending_ts_ms":%d}' % (
                    kind.encode(), sub.sid, seq, body, send_ms)  # fmt: skip
                sub.connection.put(payload, kind, sid=sub.sid, seq=seq, market=index)

    def _tell_indices(self, now_ms: int) -> None:
        for channel in indices.CHANNELS:
            subs = self.everything[channel]
            tick = now_ms // indices.EVERY_MS[channel]
            if not subs or tick == self._index_ticks.get(channel):
                continue
            self._index_ticks[channel] = tick
            for name in indices.NAMES[channel]:
                body = compact(indices.message(channel, name, now_ms))
                for sub in subs:
                    if name in sub.names or "all" in sub.names:
                        seq = sub.next_seq()
                        payload = b'%b%d,"msg":%b,"sending_ts_ms":%d}' % (sub.prefix, seq, body, now_ms)
                        sub.connection.put(payload, channel, sid=sub.sid, seq=seq)

    def _flush(self, event_ms: int = 0) -> None:
        """Put trades on disk before anyone hears of them, then send."""
        self.trades.flush()
        for connection in list(self.connections.values()):
            connection.flush(event_ms * 1_000_000)


assert {BOOK, TICKER, TRADE, LIFECYCLE, COMBO_LIFECYCLE} <= set(TYPE_CODE)
