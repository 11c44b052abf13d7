"""Keeps the subscriptions of one connection in step with the roster, and its order books provable.

Subscribes, adds, deletes; subscribes anew what the exchange has ended; asks for snapshots where one stayed away, where numbers of
a book's sequence are missing, and every few minutes of some books, so that verification has something to compare. Whatever was
not subscribed when it should have been is a gap. Not here: which markets are wanted (`subscriptions`), and the socket's life.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from ssmd_dagster.capture.gaps import SUBSCRIBED, GapLog
from ssmd_dagster.capture.process import cancel, wait_any
from ssmd_dagster.capture.recorder import Recorder
from ssmd_dagster.capture.sequence import Hole, gap_id_of
from ssmd_dagster.capture.subscriptions import BATCH, Roster, batches
from ssmd_dagster.clock import Clock
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.payloads import GapOpened
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import (
    Connection,
    Exchange,
    MarketLimitError,
    SnapshotCame,
    SubscriptionLost,
)

LOOK_EVERY_S = 1.0
SNAPSHOT_WITHIN_S = 5.0
"""So long after the last snapshot that came, those still due are asked for again."""
SNAPSHOT_TRIES = 3
PROOF_EVERY_S = 120.0
PROOF_MARKETS = 50
LAST_PROOF_TIMEOUT_S = 2.0
RESYNC_EVERY_S = 2.0
SUBSCRIBE_AGAIN_MAX_S = 30.0
MARKETS_IN_SCOPE = 100
"""A gap names its markets up to so many, else it counts them."""

_log = logging.getLogger(__name__)


class Follower:
    """The subscriptions of one connection."""

    def __init__(
        self,
        connection: Connection,
        recorder: Recorder,
        exchange: Exchange,
        roster: Roster,
        gaps: GapLog,
        clock: Clock,
        *,
        component: str,
        channels: Sequence[str],
    ) -> None:
        self._connection, self._recorder, self._roster = connection, recorder, roster
        self._gaps, self._clock = gaps, clock
        self._channels = channels
        self._market_channels = [channel for channel in channels if channel in exchange.market_channels]
        self._book_channels = [channel for channel in channels if channel in exchange.book_channels]
        self._scope = {"conn": recorder.origin.conn, "component": component}
        self._up_ns: int | None = None
        self._sids: dict[str, int] = {}
        self._members: dict[str, None] = {}
        self._refused: set[str] = set()
        self._missed: dict[str, str] = {}
        """Markets that are not subscribed although they should be, with the gap that says so."""
        self._seen_version = -1
        self._gap_number = 0
        self._lost: dict[str, str] = {}
        """Channels whose subscription the exchange has ended, with the gap that lasts until they are whole again."""
        self._lost_early: dict[int, tuple[int, SubscriptionLost]] | None = None
        """While a channel is being subscribed: what was ended that is not known yet. Its end may come with its beginning."""
        self._again_at: dict[str, float] = {}
        self._again_after_s: dict[str, float] = {}
        self._snapshots_due: dict[str, int] = {}
        """Markets whose snapshot has not come yet, with how often it was asked for."""
        self._snapshot_at = 0.0
        self._resync_at: dict[int, float] = {}
        self._resyncs: set[int] = set()
        self._proved = 0
        self._wake = asyncio.Event()
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def markets(self) -> int:
        """Return how many markets are subscribed."""
        return len(self._members)

    @property
    def refused(self) -> int:
        """Return how many wanted markets the exchange has not taken."""
        return len(self._refused)

    @property
    def snapshots_due(self) -> int:
        """Return how many subscribed books have not had their snapshot."""
        return len(self._snapshots_due)

    @property
    def sids(self) -> dict[str, int]:
        """Return the acknowledged subscriptions: channel → sid."""
        return dict(self._sids)

    # What frames tell.

    def subscription_lost(self, recv_ns: int, event: SubscriptionLost) -> None:
        """The exchange ended a subscription: a gap from here until it is acknowledged again."""
        channel = next((name for name, sid in self._sids.items() if sid == event.sid), None)
        if channel is None:
            if self._lost_early is not None:
                self._lost_early[event.sid] = recv_ns, event
            return
        del self._sids[channel]
        heard_ns = self._recorder.forget(event.sid, channel)
        if event.forgotten and heard_ns is not None:
            recv_ns = min(recv_ns, heard_ns)
        self._recorder.note_if_open(
            {"event": "subscription_lost", "channel": channel, "sid": event.sid, "reason": event.reason}
        )
        if channel not in self._lost:  # else it is lost again while it is made anew, and its gap goes on
            gap_id = self._lost[channel] = self._gap_id()
            scope = {**self._scope, "sid": event.sid, "channel": channel}
            self._gaps.open(GapOpened(gap_id=gap_id, cause=GapCause.NOT_SUBSCRIBED, from_ns=recv_ns, scope=scope))
        self._put_off(channel)
        _log.warning("the exchange ended the subscription of %s: %s", channel, event.reason)
        self._wake.set()

    def _put_off(self, channel: str) -> None:
        """Choose when the channel is subscribed again: at once, then after pauses that grow while it keeps failing."""
        now = time.monotonic()
        after_s = self._again_after_s.get(channel, 0.0)
        if now - self._again_at.get(channel, -SUBSCRIBE_AGAIN_MAX_S) > SUBSCRIBE_AGAIN_MAX_S:
            after_s = 0.0
        self._again_at[channel] = now + after_s
        self._again_after_s[channel] = min(max(0.5, after_s * 2), SUBSCRIBE_AGAIN_MAX_S)

    def snapshot_came(self, event: SnapshotCame) -> None:
        """A book's snapshot is there."""
        if self._snapshots_due:
            self._snapshots_due.pop(event.ticker, None)
            self._snapshot_at = time.monotonic()

    def hole(self, hole: Hole) -> None:
        """Numbers of a sequence did not come: declare it, and ask for the books anew. Told again, it has been filled."""
        channel = next((name for name, sid in self._sids.items() if sid == hole.sid), None)
        healed = len(hole.filled) == hole.size
        scope = {**self._scope, "sid": hole.sid, **({"channel": channel} if channel is not None else {})}
        gap_id = gap_id_of(self._recorder.origin.conn, hole.sid, hole.first, hole.numbering)
        gap = GapOpened(gap_id=gap_id, cause=GapCause.SEQUENCE_JUMP, from_ns=hole.from_ns, scope=scope)
        self._gaps.declare(gap, hole.to_ns, "healed" if healed else "stays")
        if not healed:
            self._recorder.note_if_open(
                {
                    "event": "sequence_jump",
                    "sid": hole.sid,
                    "channel": channel,
                    "seq": [hole.first - 1, hole.last + 1],
                    **({"numbering": hole.numbering} if hole.numbering else {}),
                }
            )
            if channel in self._book_channels:
                self._resyncs.add(hole.sid)
                self._wake.set()

    # What is done about it.

    async def begin(self) -> None:
        """Subscribe everything; return once all of it is acknowledged. Raises what the connection raises."""
        await self._step()
        self._note_subscribed()
        self._up_ns = self._clock()

    async def run(self, changed: asyncio.Event) -> None:
        """Follow the roster until cancelled; `changed` says that it is worth looking at once."""
        proof_at = time.monotonic() + PROOF_EVERY_S
        try:
            while True:
                await wait_any(changed.wait(), self._wake.wait(), timeout_s=LOOK_EVERY_S)
                changed.clear()
                self._wake.clear()
                try:
                    await self._step()
                except SsmdError as error:
                    if self._recorder.ended is not None:
                        return
                    _log.warning("subscriptions: %s", error)
                    self._recorder.note_if_open({"event": "refused", "error": str(error)})
                self._resync()
                self._ask_again()
                if time.monotonic() >= proof_at:
                    proof_at = time.monotonic() + PROOF_EVERY_S
                    self._start(self._prove())
        finally:
            await cancel(*self._asking)

    async def last_proof(self) -> None:
        """Ask for a last round of snapshots and wait for them a little."""
        try:
            async with asyncio.timeout(LAST_PROOF_TIMEOUT_S):
                await self._prove()
        except TimeoutError:
            _log.info("no snapshots within %.0f s at the end", LAST_PROOF_TIMEOUT_S)

    async def _step(self) -> None:
        """Do whatever there is to do; what fails is tried again by the next step. Raises the first failure, at the end."""
        wanted = self._roster.tickers()
        new = self._roster.version != self._seen_version
        if new and self._market_channels:
            # Whatever comes in between: from now on somebody knows that these are missed.
            for batch in batches(sorted(wanted - self._members.keys() - self._refused)):
                self._open_gap_of_late(batch)
        whole = [partial(self._subscribe_whole, channel) for channel in self._channels]
        await self._each([*whole, *([self._follow_roster] if new else [])])

    async def _follow_roster(self) -> None:
        version = self._roster.version
        wanted = self._roster.tickers()
        self._refused.intersection_update(wanted)
        self._close_gaps_of([ticker for ticker in self._missed if ticker not in wanted])
        if self._market_channels:
            gone = batches([ticker for ticker in self._members if ticker not in wanted])
            await self._each([*(partial(self._delete, batch) for batch in gone), self._add_new])
        else:
            self._members = dict.fromkeys(wanted)
        self._seen_version = version

    async def _add_new(self) -> None:
        new = batches(sorted(self._roster.tickers() - self._members.keys() - self._refused))
        await self._each([partial(self._add, batch) for batch in new])

    async def _each(
        self, doings: Iterable[Callable[[], Awaitable[None]]], *, unless: tuple[type[SsmdError], ...] = ()
    ) -> None:
        """Do one after another; none keeps the others from being done by its failure. Raises the first, at the end.

        At once where going on is no use: one of `unless`, the connection has ended, or the beginning has failed.
        """
        failure: SsmdError | None = None
        for do in doings:
            try:
                await do()
            except unless:
                raise
            except SsmdError as error:
                if self._up_ns is None or self._recorder.ended is not None:
                    raise
                failure = failure or error
        if failure is not None:
            raise failure

    async def _subscribe_whole(self, channel: str) -> None:
        """Subscribe a channel that has no subscription, or not all of it, with all markets that the others have."""
        if (channel in self._sids and channel not in self._lost) or time.monotonic() < self._again_at.get(channel, 0.0):
            return
        if channel not in self._market_channels:
            await self._subscribe(channel, None)
        elif not self._members:
            return  # it comes with its first markets
        else:
            try:
                await self._subscribe_members(channel)
            except SsmdError:
                self._put_off(channel)
                raise
        if channel not in self._sids:
            return  # ended again: all of it once more
        gap_id = self._lost.pop(channel, None)
        if gap_id is not None:
            self._note_subscribed()
            self._gaps.close(gap_id, self._clock())

    async def _subscribe_members(self, channel: str) -> None:
        more = batches(list(self._members))
        self._await_snapshots(channel, list(self._members))
        if channel not in self._sids:
            await self._subscribe(channel, more.pop(0))
        sid = self._sids.get(channel)
        for batch in more:
            if sid is None or self._sids.get(channel) != sid:
                return
            await self._connection.add_markets(sid, batch)
        self._snapshot_at = time.monotonic()

    def _note_subscribed(self) -> None:
        left_out = self._roster.left_out + len(self._refused)
        about = {"sids": self._sids, "markets": len(self._members), "left_out": left_out}
        self._recorder.note_if_open({"event": SUBSCRIBED, **about})

    async def _subscribe(self, channel: str, tickers: list[str] | None) -> None:
        began_ns = self._clock()
        early: dict[int, tuple[int, SubscriptionLost]] = {}
        self._lost_early = early
        try:
            for subscription in await self._connection.subscribe([channel], tickers):
                self._sids[subscription.channel] = subscription.sid
                self._recorder.expect(subscription.sid, began_ns)
                if subscription.sid in early:
                    self.subscription_lost(*early[subscription.sid])
        finally:
            self._lost_early = None

    async def _add(self, batch: list[str]) -> None:
        """Subscribe a batch of markets on every channel; late, it is a gap."""
        self._open_gap_of_late(batch)  # of those, too, that have come up while others were waited for
        try:
            adds = (partial(self._add_to, channel, batch) for channel in self._market_channels)
            await self._each(adds, unless=(MarketLimitError,))
            self._snapshot_at = time.monotonic()
        except MarketLimitError as error:
            # The others shall not suffer from it. The gap stays open: these markets are not recorded.
            self._refused.update(batch)
            for ticker in batch:
                self._snapshots_due.pop(ticker, None)
            _log.error("%d markets are not recorded: %s", len(batch), error)
            self._recorder.note_if_open({"event": "refused", "markets": len(batch), "error": str(error)})
            if more := [ticker for ticker in batch if ticker not in self._missed]:
                self._open_gap(more, self._clock())
            return
        self._members.update(dict.fromkeys(batch))
        if self._up_ns is not None:
            self._recorder.note_if_open({"event": "added", "tickers": batch})
        self._close_gaps_of(batch)

    async def _add_to(self, channel: str, batch: list[str]) -> None:
        if channel in self._lost:
            return  # it gets them with all others
        self._await_snapshots(channel, batch)
        if channel in self._sids:
            await self._connection.add_markets(self._sids[channel], batch)
        else:
            await self._subscribe(channel, batch)

    async def _delete(self, batch: list[str]) -> None:
        await self._each(partial(self._delete_from, channel, batch) for channel in self._market_channels)
        for ticker in batch:
            self._members.pop(ticker, None)
            self._snapshots_due.pop(ticker, None)
        self._refused.clear()  # there is room again
        self._recorder.note_if_open({"event": "deleted", "tickers": batch})

    async def _delete_from(self, channel: str, batch: list[str]) -> None:
        if channel in self._sids:
            await self._connection.delete_markets(self._sids[channel], batch)

    def _open_gap_of_late(self, batch: list[str]) -> None:
        """Open a gap of those that are missed by now; one whose command failed before has its gap, and keeps it."""
        if self._up_ns is None:
            return
        now_ns = self._clock()
        since_ns = {
            one: missed_ns
            for one in batch
            if one not in self._missed
            and (missed_ns := self._roster.missed_since([one], self._up_ns, now_ns)) is not None
        }
        if since_ns:
            self._open_gap(list(since_ns), min(since_ns.values()))

    def _close_gaps_of(self, tickers: Sequence[str]) -> None:
        """These are missed no longer: a gap ends with the last of its markets."""
        ended = {self._missed.pop(ticker) for ticker in tickers if ticker in self._missed}
        for gap_id in sorted(ended.difference(self._missed.values())):
            self._gaps.close(gap_id, self._clock())

    def _open_gap(self, tickers: list[str], from_ns: int) -> None:
        gap_id = self._gap_id()
        few = len(tickers) <= MARKETS_IN_SCOPE
        about: dict[str, Any] = {"markets": tickers} if few else {"markets_count": len(tickers)}
        scope = {**self._scope, **about}
        self._gaps.open(GapOpened(gap_id=gap_id, cause=GapCause.NOT_SUBSCRIBED, from_ns=from_ns, scope=scope))
        self._missed.update(dict.fromkeys(tickers, gap_id))

    def _gap_id(self) -> str:
        self._gap_number += 1
        return f"gap-{self._recorder.origin.conn}-sub-{self._gap_number}"

    # Snapshots.

    def _await_snapshots(self, channel: str, tickers: list[str]) -> None:
        """Expect a snapshot of each: before it is asked for, since many come before the answer to the command."""
        if channel in self._book_channels:
            self._snapshots_due.update(dict.fromkeys(tickers, 0))

    def _ask_again(self) -> None:
        """Ask for the snapshots that stayed away, of markets that are open, when none has come for a while."""
        if not self._snapshots_due or time.monotonic() - self._snapshot_at < SNAPSHOT_WITHIN_S:
            return
        now_ns = self._clock()
        due = [ticker for ticker in self._snapshots_due if self._roster.is_open(ticker, now_ns)][:BATCH]
        for ticker in due:
            self._snapshots_due[ticker] += 1
            if self._snapshots_due[ticker] >= SNAPSHOT_TRIES:
                del self._snapshots_due[ticker]
        self._snapshot_at = time.monotonic()
        if due:
            self._start(self._ask("no_snapshot", due))

    def _resync(self) -> None:
        now = time.monotonic()
        for sid in list(self._resyncs):
            if now >= self._resync_at.get(sid, 0.0) and sid in self._sids.values():
                self._resyncs.discard(sid)
                self._resync_at[sid] = now + RESYNC_EVERY_S
                tickers = list(self._members)
                self._snapshots_due.update(dict.fromkeys(tickers, 0))
                self._snapshot_at = now
                self._start(self._ask("sequence_jump", tickers))

    async def _prove(self) -> None:
        """Ask for the snapshots of some open markets, others every time."""
        now_ns = self._clock()
        tickers = [ticker for ticker in self._members if self._roster.is_open(ticker, now_ns)]
        if tickers:
            at = self._proved % len(tickers)
            chosen = (tickers[at:] + tickers[:at])[:PROOF_MARKETS]
            self._proved = at + len(chosen)
            await self._ask("proof", chosen)

    async def _ask(self, why: str, tickers: list[str]) -> None:
        for channel in self._book_channels:
            sid = self._sids.get(channel)
            if sid is None:
                continue
            self._recorder.note_if_open({"event": "get_snapshot", "why": why, "sid": sid, "markets": len(tickers)})
            for batch in batches(tickers):
                try:
                    await self._connection.request_snapshots(sid, batch)
                except SsmdError as error:
                    if not self._recorder.note_if_open({"event": "no_snapshots", "sid": sid, "error": str(error)}):
                        return
                    _log.warning("snapshots (%s): %s", why, error)

    def _start(self, asking: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(asking)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
