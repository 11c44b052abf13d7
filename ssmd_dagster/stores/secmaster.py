"""The security master of an environment: which markets are open, in Redis, and how that changed, in a stream.

Not for asking the exchange: the caller brings the list. What a market's fields mean is the exchange's matter; any
difference in them is an update, so what changes with every trade does not belong into `Market.detail`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Literal, NamedTuple, cast

import msgspec
import nats.js.errors
import redis.asyncio
import redis.exceptions
from nats.js import JetStreamContext, api

from ssmd_dagster.errors import NotFoundError, RefusedError, UnreachableError
from ssmd_dagster.exchange import Market
from ssmd_dagster.stores.cache import redis_errors, rfc3339, text
from ssmd_dagster.stores.jetstream import (
    Publisher,
    StreamReader,
    ensure_stream,
    nats_errors,
    read_up_to,
    wait_connected,
)

_ATTEMPTS = 3
_IN_FLIGHT = 500
_PUBLISH_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 10.0
_KEEP_S = 400 * 86_400
"""Changes are kept for 400 days; each day's tables hold the security master of that day for ever."""
_WHOLE_EVERY_NS = 7 * 86_400 * 1_000_000_000
"""So often a sync also tells the whole list: who asks for a day need not read the years before it, which age away."""
_WHOLE_HEAD = b'{"event":"markets_listed",'
_PART_BYTES = 512 * 1024
_BEFORE_NS = 3_600 * 1_000_000_000
"""How long before a day the whole list must have been told: clocks are set, and other syncs under way."""
_WHOLE_TRIED = 3
_SETTLED = frozenset({"settled", "finalized"})
_Event = Literal["market_added", "market_updated", "market_settled", "markets_listed"]


class MarketChange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of `{env}.secmaster.changes`.

    `old` is missing for `market_added`. For `market_settled`, `new` is missing where the market left the list. `markets_listed`
    tells a part of the whole list, once a week, and has `listed` alone.
    """

    event: _Event
    ticker: str = ""
    at_ns: int
    old: Market | None = None
    new: Market | None = None
    listed: tuple[Market, ...] = ()


class SyncResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a sync changed, in markets, and how many are open now."""

    added: int
    updated: int
    settled: int
    total: int


class SecurityMaster:
    """The keys `{env}:secmaster:…` and the stream `{env}-secmaster` of one environment.

    Every method raises UnreachableError when Redis or NATS does not answer.
    """

    def __init__(self, client: redis.asyncio.Redis, js: JetStreamContext, env: str) -> None:
        self.stream = f"{env}-secmaster"
        self.subject = f"{env}.secmaster.changes"
        self._redis = client
        self._js = js
        self._publisher = Publisher(js, self.stream, _PUBLISH_TIMEOUT_S)
        self._markets = f"{env}:secmaster:markets"
        self._by_category = f"{self._markets}:by_category:"
        self._expiring = f"{self._markets}:expiring"
        self._last_sync = f"{env}:secmaster:last_sync"
        self._whole = f"{env}:secmaster:whole"

    async def create(self) -> None:
        """Create the stream of changes unless it is there.

        Raises:
            ConfigurationError: A stream of that name has other settings.
        """
        await ensure_stream(
            self._js,
            api.StreamConfig(
                name=self.stream,
                subjects=[self.subject],
                retention=api.RetentionPolicy.LIMITS,
                storage=api.StorageType.FILE,
                discard=api.DiscardPolicy.OLD,
                max_msgs=-1,
                max_bytes=-1,
                max_age=_KEEP_S,
                duplicate_window=120,
            ),
        )

    async def apply(self, markets: Iterable[Market], now_ns: int) -> SyncResult:
        """Make `markets` the list of open markets: publish what changed, then write the new rows to Redis, some at a time, and
        all that makes them the list in one transaction. Once a week the whole list is told, too.

        A market that is not in the list any more, or is in it as settled, is settled. An interrupted sync is made again
        as a whole; its changes are recognised by NATS within two minutes, and published twice after that.

        Args:
            markets: All open markets of the environment, each ticker once.
            now_ns: Time of the sync.

        Raises:
            RefusedError: Other syncs of the same environment came in between, three times.
        """
        return await self.apply_rows({market.ticker: pack(market) for market in markets}, now_ns)

    async def apply_rows(self, rows: Mapping[str, bytes], now_ns: int) -> SyncResult:
        """Do the same with packed rows by ticker: fifty thousand markets take a fifth of their memory so."""
        for attempt in range(_ATTEMPTS):
            # Whoever came in between may have told the whole list without what this sync has written: then it is told again.
            whole = attempt > 0 or not await self._told_lately(now_ns)
            result = await self._try_apply(rows, now_ns, whole=whole)
            if result is not None:
                return result
        raise RefusedError(
            "another sync of the security master runs", where=self._markets, do="Wait until it is done and try again"
        )

    async def _try_apply(self, rows: Mapping[str, bytes], now_ns: int, *, whole: bool) -> SyncResult | None:
        with redis_errors(self._redis):
            async with self._redis.pipeline(transaction=True) as pipeline:
                await pipeline.watch(self._last_sync)
                last_sync = text(await pipeline.get(self._last_sync) or b"never")
                there = cast("dict[bytes, bytes]", await self._redis.hgetall(self._markets))
                old = {text(ticker): row for ticker, row in there.items()}
                changes = list(_changes(old, rows))
                await self._publish(changes, old, rows, now_ns, last_sync)
                await self._put(rows, [change.ticker for change in changes if change.event != "market_settled"])
                listed = {ticker: _listed(row) for ticker, row in rows.items()}
                open_now = {ticker: market for ticker, market in listed.items() if market.status not in _SETTLED}
                told = await self._publish_whole([rows[ticker] for ticker in open_now], now_ns) if whole else None
                stale = [key async for key in self._redis.scan_iter(match=f"{self._by_category}*", count=1000)]
                pipeline.multi()  # type: ignore[no-untyped-call]  # redis-py forgot its return type
                self._write(pipeline, changes, open_now, stale)
                pipeline.set(self._last_sync, rfc3339(now_ns))
                if told is not None:
                    pipeline.zadd(self._whole, {told.written: now_ns / 1e9})
                    pipeline.zremrangebyscore(self._whole, 0, now_ns / 1e9 - _KEEP_S)
                try:
                    await pipeline.execute()
                except redis.exceptions.WatchError:
                    return None
        counts = defaultdict[str, int](int)
        for change in changes:
            counts[change.event] += 1
        return SyncResult(
            added=counts["market_added"],
            updated=counts["market_updated"],
            settled=counts["market_settled"],
            total=len(open_now),
        )

    async def _put(self, rows: Mapping[str, bytes], tickers: Sequence[str]) -> None:
        """Write the rows of some markets, outside of the transaction, which would hold all of them in memory twice.

        Their changes have been published: whoever syncs after a crash finds them written, and publishes only the others.
        """
        for begin in range(0, len(tickers), _IN_FLIGHT):
            some = {ticker: rows[ticker] for ticker in tickers[begin : begin + _IN_FLIGHT]}
            await self._redis.hset(self._markets, mapping=some)  # type: ignore[arg-type]  # a Mapping of bytes is one

    def _write(
        self,
        pipeline: redis.asyncio.client.Pipeline,
        changes: Sequence[_Change],
        open_now: Mapping[str, _Listed],
        stale: list[bytes],
    ) -> None:
        settled = [change.ticker for change in changes if change.event == "market_settled"]
        if settled:
            pipeline.hdel(self._markets, *settled)
        # The sets are small beside the rows and are made anew, so that they always agree with them.
        pipeline.delete(self._expiring, *stale)
        if open_now:
            # Seconds: a score is a double, which has no room for nanoseconds.
            pipeline.zadd(self._expiring, {ticker: market.close_ns / 1e9 for ticker, market in open_now.items()})
        tickers_by_category = defaultdict[str, list[str]](list)
        for ticker, market in open_now.items():
            tickers_by_category[market.category].append(ticker)
        for category, tickers in tickers_by_category.items():
            pipeline.sadd(f"{self._by_category}{category}", *tickers)

    async def _publish(
        self,
        changes: Sequence[_Change],
        old: Mapping[str, bytes],
        rows: Mapping[str, bytes],
        now_ns: int,
        last_sync: str,
    ) -> None:
        if not changes:
            return
        await wait_connected(self._js, _PUBLISH_TIMEOUT_S, f"publishing to {self.subject}")
        for begin in range(0, len(changes), _IN_FLIGHT):
            acks = []
            for event, ticker in changes[begin : begin + _IN_FLIGHT]:
                before, after = old.get(ticker), rows.get(ticker)
                change = MarketChange(
                    event=event,
                    ticker=ticker,
                    at_ns=now_ns,
                    old=None if before is None else _market(before),
                    new=None if after is None else _market(after),
                )
                headers = {api.Header.MSG_ID.value: _change_id(change, last_sync)}
                acks.append(await self._publisher.publish(self.subject, msgspec.json.encode(change), headers))
            await asyncio.gather(*acks)

    async def _publish_whole(self, rows: Sequence[bytes], now_ns: int) -> _Told | None:
        """Tell the whole list, in parts, and return where in the stream; None for an empty one."""
        if not rows:
            return None
        await wait_connected(self._js, _PUBLISH_TIMEOUT_S, f"publishing to {self.subject}")
        seqs = []
        for part in _parts(rows):
            data = b'%b"at_ns":%d,"listed":[%b]}' % (_WHOLE_HEAD, now_ns, b",".join(part))
            seqs.append(await (await self._publisher.publish(self.subject, data, {})))
        return _Told(seqs[0], seqs[-1], now_ns)

    async def known(self, open_ns: int, close_ns: int) -> list[Market]:
        """Return the markets that were listed at any time in `[open_ns, close_ns)`, as last known before its end.

        Made of the stream of changes, so that it is the same whenever it is asked for; read from the last time on that the whole
        list was told before the interval, where Redis knows that place. Sorted by ticker.
        """
        with nats_errors(self._js, f"reading {self.stream}"):
            try:
                last_seq = (await self._js.stream_info(self.stream)).state.last_seq
            except nats.js.errors.NotFoundError:
                return []
            told = await self._whole_before(open_ns - _BEFORE_NS) or _Told(1, last_seq, 0)
        known: dict[str, Market] = {}
        async with StreamReader(self._js, self.stream, [self.subject], start_seq=told.first_seq) as reader:
            async for messages in read_up_to(reader, last_seq, _READ_TIMEOUT_S):
                for message in messages:
                    if message.seq > told.last_seq and message.data.startswith(_WHOLE_HEAD):
                        continue  # a whole list that is told later says nothing new
                    change = _change(message.data)
                    if change.at_ns >= close_ns:
                        continue
                    known |= {market.ticker: market for market in change.listed}
                    if change.event == "market_settled" and change.at_ns < open_ns:
                        known.pop(change.ticker, None)
                    elif (market := change.new or change.old) is not None:
                        known[change.ticker] = market
        return [known[ticker] for ticker in sorted(known)]

    async def _whole_before(self, at_ns: int) -> _Told | None:
        """Return where the stream last tells of the whole list before a time, None where nobody knows: then all is read."""
        try:
            return await self._told_between(0, at_ns)
        except UnreachableError:
            return None

    async def _told_lately(self, now_ns: int) -> bool:
        return await self._told_between(now_ns - _WHOLE_EVERY_NS, now_ns) is not None

    async def _told_between(self, from_ns: int, to_ns: int) -> _Told | None:
        """Return the last place of the stream at which the whole list was told in an interval."""
        with redis_errors(self._redis):
            places = await self._redis.zrange(
                self._whole, to_ns / 1e9, from_ns / 1e9, desc=True, byscore=True, offset=0, num=_WHOLE_TRIED
            )
        with nats_errors(self._js, f"reading {self.stream}"):
            for place in places:
                told = _Told.read(text(place))
                if await self._is_there(told):
                    return told
        return None

    async def _is_there(self, told: _Told) -> bool:
        """Tell whether the stream has what was told, from its first to its last message: streams are lost and made anew."""
        for seq in (told.first_seq, told.last_seq):
            try:
                message = await self._js.get_msg(self.stream, seq)
            except nats.js.errors.NotFoundError:
                return False
            if _change(message.data or b"").at_ns != told.at_ns:
                return False
        return True

    async def markets(self) -> list[Market]:
        """Return all open markets, sorted by ticker."""
        with redis_errors(self._redis):
            rows = await self._redis.hvals(self._markets)
        return sorted(map(_market, rows), key=lambda market: market.ticker)

    async def each(self) -> AsyncIterator[Market]:
        """Yield all open markets, in no order, some at a time: memory does not grow with their number."""
        with redis_errors(self._redis):
            async for _, row in self._redis.hscan_iter(self._markets, count=1000):
                yield _market(row)

    async def get(self, ticker: str) -> Market:
        """Return one open market.

        Raises:
            NotFoundError: There is no open market of that ticker.
        """
        with redis_errors(self._redis):
            row = await self._redis.hget(self._markets, ticker)
        if row is None:
            raise NotFoundError(
                f"no open market {ticker}", where=self._markets, do="`ssmd secmaster sync` reads the list again"
            )
        return _market(row)

    async def in_category(self, category: str) -> list[str]:
        """Return the tickers of a category, sorted; empty for a category that has none."""
        with redis_errors(self._redis):
            return sorted(text(ticker) for ticker in await self._redis.smembers(f"{self._by_category}{category}"))

    async def expiring(self, before_ns: int) -> list[str]:
        """Return the tickers of markets that close before `before_ns`, the earliest first."""
        with redis_errors(self._redis):
            tickers = await self._redis.zrange(self._expiring, "-inf", f"({before_ns / 1e9}", byscore=True)
        return [text(ticker) for ticker in tickers]

    async def last_sync(self) -> str | None:
        """Return when the list was last written, RFC 3339 UTC; None before the first sync."""
        with redis_errors(self._redis):
            at = await self._redis.get(self._last_sync)
        return None if at is None else text(at)


class _Change(NamedTuple):
    event: _Event
    ticker: str


class _Told(NamedTuple):
    """Where in the stream a sync told something: the sequences of its first and last message, and its time."""

    first_seq: int
    last_seq: int
    at_ns: int

    @property
    def written(self) -> str:
        """Return it as a member of the set in Redis."""
        return f"{self.first_seq}-{self.last_seq}-{self.at_ns}"

    @classmethod
    def read(cls, written: str) -> _Told:
        """Read such a member."""
        return cls(*map(int, written.split("-")))


class _Listed(msgspec.Struct, frozen=True):
    """What the keys beside a market's row are made of."""

    status: str
    category: str
    close_ns: int


_market = msgspec.json.Decoder(Market).decode
_change = msgspec.json.Decoder(MarketChange).decode
_listed = msgspec.json.Decoder(_Listed).decode


def pack(market: Market) -> bytes:
    """Return a market's row as it is stored."""
    return msgspec.json.encode(market)


def _changes(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> Iterator[_Change]:
    for ticker, row in new.items():
        before = old.get(ticker)
        if _listed(row).status in _SETTLED:
            if before is not None:
                yield _Change("market_settled", ticker)
        elif before is None:
            yield _Change("market_added", ticker)
        elif before != row and _market(before) != _market(row):
            yield _Change("market_updated", ticker)
    for ticker in old:
        if ticker not in new:
            yield _Change("market_settled", ticker)


def _parts(rows: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Cut rows into parts of about `_PART_BYTES`."""
    part: list[bytes] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row)
        if size > _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _change_id(change: MarketChange, last_sync: str) -> str:
    """Make an id that a repetition of the same sync makes again, and a later sync does not."""
    what = msgspec.json.encode((change.event, change.ticker, change.old, change.new))
    return sha256(last_sync.encode() + b"\n" + what).hexdigest()[:32]
