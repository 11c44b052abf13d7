"""Kalshi's list of trades, page by page as it came: stretches of time read side by side within the key's rate.

For the replay of a missed day: pages go to the archive as they are, and every page says which stretch of time is complete
with it, so that a reading that was cut off goes on where it was. Not for single trades: see `trades`.

Pages come newest first. A chain of pages is bound by the network's latency, so a day is read in several chains; one that has
much before it gives its older half away to a reader who is idle.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

import msgspec

from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import Covered, TradePage, TradeQuery, TradesRead
from ssmd_dagster.kalshi.errors import ExchangeAnswerError
from ssmd_dagster.kalshi.rest import RestClient
from ssmd_dagster.kalshi.scaled import rfc3339_ns, sort_as_text
from ssmd_dagster.kalshi.trades import read_cutoff

LIVE, HISTORICAL = "/markets/trades", "/historical/trades"
READERS = 12
"""Chains under way at once: at 20 requests a second enough for answers that take half a second."""
TRADES_PER_PAGE = 1000
SPLIT_PAGES = 6
"""A chain that has at least this much before it gives half of it to an idle reader."""
DISORDER_NS = 1_000_000_000
"""How far rows may stand out of the order of their times."""
SEAM_NS = 600 * 1_000_000_000
ROUNDS = 4
MAX_PAGES = 1_000_000
_NS_PER_S = 1_000_000_000
_REMEMBERED_PAGES = 4
_COMBO_PREFIX = "KXMVE"
"""Tickers of multivariate markets begin with it: the list of trades has no filter for them."""

Take = Callable[[TradePage], Awaitable[None]]
Interval = tuple[int, int]


class _Page(msgspec.Struct):
    trades: msgspec.Raw = msgspec.Raw(b"[]")
    cursor: str | None = None


class _Row(msgspec.Struct, gc=False):
    trade_id: str
    ticker: str
    created_time: str


_decode_rows = msgspec.json.Decoder(list[_Row]).decode
_decode_raw_rows = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _Chain:
    """One chain of pages: all of `[low_ns, high_ns)` is its to read, all from `at_ns` on has come.

    `recent` are the ids of its last pages, `earliest_ns` the time of the earliest row that came.
    """

    __slots__ = (
        "at_ns",
        "cursor",
        "cursors",
        "earliest_ns",
        "high_ns",
        "low_ns",
        "params",
        "path",
        "recent",
        "rows",
        "ticker",
    )

    def __init__(self, path: str, ticker: str | None, low_ns: int, high_ns: int) -> None:
        self.path, self.ticker, self.low_ns, self.high_ns = path, ticker, low_ns, high_ns
        self.at_ns = high_ns
        self.earliest_ns = high_ns
        self.cursor = ""
        self.cursors = 0
        self.rows = 0
        self.recent: deque[set[str]] = deque(maxlen=_REMEMBERED_PAGES)
        self.params = [("min_ts", str(low_ns // _NS_PER_S)), ("max_ts", str(-(-high_ns // _NS_PER_S)))]
        if ticker is not None:
            self.params.append(("ticker", ticker))

    def older_half(self) -> _Chain | None:
        """Give away the older half of what is still to come, where that is worth a chain of its own."""
        passed_ns, left_ns = self.high_ns - self.at_ns, self.at_ns - self.low_ns
        if passed_ns <= 0 or self.rows * left_ns < SPLIT_PAGES * TRADES_PER_PAGE * passed_ns:
            return None
        middle_ns = (self.low_ns + left_ns // 2) // _NS_PER_S * _NS_PER_S
        if not self.low_ns < middle_ns < self.at_ns:
            return None
        older = _Chain(self.path, self.ticker, self.low_ns, middle_ns)
        self.low_ns = middle_ns
        return older


async def read_tape(rest: RestClient, query: TradeQuery, take: Take) -> TradesRead:
    """Hand every page of the query's interval to `take`, in no order, several at once; return what was read.

    The interval is read from the historical part below the cutoff and from the live part above it, ten minutes into the other
    one; the cutoff is asked for again afterwards, and what it passed over meanwhile is read from the historical part. Rows
    are dropped where they are of other markets than asked for, outside of the interval, or came before; where none is
    dropped the page's rows are the exchange's own bytes. Raises what `RestClient.get` raises, and `ExchangeAnswerError`
    where rows cannot be read or the cutoff never rests.
    """
    tape = _Tape(rest, query, take)
    cutoff_ns = (await read_cutoff(rest)).trades_ns
    for _ in range(ROUNDS):
        chains = tape.chains(cutoff_ns)
        if chains:
            await tape.read(chains, cutoff_ns)
        before_ns, cutoff_ns = cutoff_ns, (await read_cutoff(rest)).trades_ns
        if cutoff_ns == before_ns:
            return TradesRead(trades=tape.trades, pages=tape.pages, requests=tape.requests, cutoff_ns=cutoff_ns)
    raise ExchangeAnswerError("the historical cutoff moved again and again while trades were read", where=HISTORICAL)


async def pages_of_tape(rest: RestClient, from_ns: int, to_ns: int) -> int:
    """Estimate how many pages the whole tape of an interval has, from its newest page: one request, two at the cutoff."""
    cutoff_ns = (await read_cutoff(rest)).trades_ns
    path = LIVE if to_ns > cutoff_ns else HISTORICAL
    params = [("min_ts", str(from_ns // _NS_PER_S)), ("max_ts", str(-(-to_ns // _NS_PER_S)))]
    page = await rest.get(path, [*params, ("limit", str(TRADES_PER_PAGE))], answer=_Page)
    times = [_time_ns(row, path) for row in _rows(page.trades, path)]
    if not page.cursor or not times:
        return 1
    return max(2, (to_ns - from_ns) // max(1, to_ns - min(times)))


def selection_of(query: TradeQuery) -> str:
    """Return a name for which markets a query means, so that pages of another selection are told apart."""
    if query.tickers is None:
        return "all" if query.include_multivariate else "single"
    return hashlib.sha256("\n".join(sorted(query.tickers)).encode()).hexdigest()[:16]


class _Tape:
    """Reads chains side by side."""

    def __init__(self, rest: RestClient, query: TradeQuery, take: Take) -> None:
        self._rest, self._query, self._take = rest, query, take
        self._selection = selection_of(query)
        self._covered = [known for known in query.known if known.selection == self._selection]
        self._cutoff_ns = 0
        self._queue: asyncio.Queue[_Chain | None] = asyncio.Queue()
        self._unfinished = 0
        self._idle = 0
        self._seam_ids: set[str] = set()
        self._seam: Interval | None = None
        self.trades = self.pages = self.requests = 0

    def chains(self, cutoff_ns: int) -> list[_Chain]:
        """Return what is still to be read, by where the cutoff is now."""
        query = self._query
        per_ticker: Collection[str | None] = (None,)
        if query.per_ticker and query.tickers is not None:
            per_ticker = sorted(query.tickers)
        self._seam = None
        if query.from_ns < cutoff_ns < query.to_ns:
            self._seam = (cutoff_ns - SEAM_NS, cutoff_ns + SEAM_NS)
        found: list[_Chain] = []
        for ticker in per_ticker:
            known = [one for one in self._covered if one.ticker == ticker]
            old = [(one.from_ns, min(one.to_ns, one.cutoff_ns)) for one in known if one.endpoint == HISTORICAL]
            new = [(max(one.from_ns, cutoff_ns), one.to_ns) for one in known if one.endpoint == LIVE]
            for low, high in without((query.from_ns, min(query.to_ns, cutoff_ns)), old):
                end = min(query.to_ns, cutoff_ns + SEAM_NS) if high == cutoff_ns else high
                found.append(_Chain(HISTORICAL, ticker, low, end))
            for low, high in without((max(query.from_ns, cutoff_ns), query.to_ns), new):
                start = max(query.from_ns, cutoff_ns - SEAM_NS) if low == cutoff_ns else low
                found.append(_Chain(LIVE, ticker, start, high))
        return found if query.per_ticker else [part for chain in found for part in _parts(chain, len(found))]

    async def read(self, chains: Sequence[_Chain], cutoff_ns: int) -> None:
        """Read chains to their ends."""
        self._cutoff_ns = cutoff_ns
        self._unfinished = len(chains)
        for chain in chains:
            self._queue.put_nowait(chain)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(READERS):
                    group.create_task(self._work())
        except* SsmdError as failed:
            raise _first(failed) from None

    async def _work(self) -> None:
        while True:
            self._idle += 1
            chain = await self._queue.get()
            self._idle -= 1
            if chain is None:
                return
            while await self._page(chain):
                if self._idle and self._queue.empty() and (older := chain.older_half()) is not None:
                    self._unfinished += 1
                    self._queue.put_nowait(older)
            self._unfinished -= 1
            if not self._unfinished:
                for _ in range(READERS):
                    self._queue.put_nowait(None)

    async def _page(self, chain: _Chain) -> bool:
        """Read the next page of a chain; False at its end."""
        with_cursor = [("cursor", chain.cursor)] if chain.cursor else []
        params = [*chain.params, ("limit", str(TRADES_PER_PAGE)), *with_cursor]
        page = await self._rest.get(chain.path, params, answer=_Page)
        self.requests += 1
        chain.cursors += 1
        rows = _rows(page.trades, chain.path)
        if page.cursor and (page.cursor == chain.cursor or chain.cursors > MAX_PAGES):
            raise ExchangeAnswerError("the list of trades repeats a cursor and would never end", where=chain.path)
        chain.cursor = page.cursor or ""
        low_ns, high_ns = _reach(rows, chain.path)
        kept = self._kept(chain, rows, low_ns, high_ns)
        ended = not chain.cursor or (bool(rows) and low_ns < chain.low_ns - DISORDER_NS)
        at_ns = chain.at_ns
        if ended:
            chain.at_ns = chain.low_ns
        elif rows:
            chain.at_ns = max(chain.low_ns, min(at_ns, low_ns + DISORDER_NS))
        chain.rows += len(rows)
        raw = bytes(page.trades) if kept is None else _joined(page.trades, kept)
        here = rows if kept is None else [rows[index] for index in kept]
        covered = Covered(
            endpoint=chain.path,
            ticker=chain.ticker,
            selection=self._selection,
            from_ns=chain.at_ns,
            to_ns=at_ns,
            cutoff_ns=self._cutoff_ns,
        )
        if here or chain.at_ns < at_ns:
            first_ns, last_ns = (low_ns, high_ns) if kept is None else _reach(here, chain.path)
            await self._take(
                TradePage(
                    endpoint=chain.path,
                    params=dict(params),
                    covered=covered,
                    rows=raw.replace(b"\n", b" ").replace(b"\r", b" ") if b"\n" in raw or b"\r" in raw else raw,
                    ids=[row.trade_id for row in here],
                    first_ns=first_ns,
                    last_ns=last_ns,
                    tickers=frozenset([row.ticker for row in here]),
                )
            )
            self._covered.append(covered)
            self.pages += 1
            self.trades += len(here)
        return not ended

    def _kept(self, chain: _Chain, rows: list[_Row], low_ns: int, high_ns: int) -> list[int] | None:
        """Return the indices of the rows to keep, None for all of them."""
        if not rows:
            return None
        query = self._query
        ids = {row.trade_id for row in rows}
        tickers = {row.ticker for row in rows}
        first, end = max(chain.low_ns, query.from_ns), min(chain.high_ns, query.to_ns)
        simple = (
            low_ns >= first
            and high_ns < end
            and len(ids) == len(rows)
            and (high_ns < chain.earliest_ns or all(ids.isdisjoint(page) for page in chain.recent))
            and (query.tickers is None or tickers <= query.tickers)
            and (query.include_multivariate or not any(map(_is_combo, tickers)))
            and (self._seam is None or high_ns < self._seam[0] or low_ns > self._seam[1])
        )
        kept: list[int] | None = None
        if not simple:
            before = set().union(*chain.recent)
            kept = []
            for index, row in enumerate(rows):
                at_ns = _time_ns(row, chain.path)
                if not first <= at_ns < end or row.trade_id in before:
                    continue
                if query.tickers is not None and row.ticker not in query.tickers:
                    continue
                if not query.include_multivariate and _is_combo(row.ticker):
                    continue
                before.add(row.trade_id)
                if self._seam is not None and self._seam[0] <= at_ns <= self._seam[1]:
                    if row.trade_id in self._seam_ids:
                        continue
                    self._seam_ids.add(row.trade_id)
                kept.append(index)
        chain.recent.append(ids)
        chain.earliest_ns = min(chain.earliest_ns, low_ns)
        return kept


def _parts(chain: _Chain, chains: int) -> Iterable[_Chain]:
    """Cut a chain into as many as keep all readers busy, by time."""
    count = max(1, READERS // chains)
    length_ns = max(_NS_PER_S, -(-(chain.high_ns - chain.low_ns) // count // _NS_PER_S) * _NS_PER_S)
    low_ns = chain.low_ns
    while low_ns < chain.high_ns:
        high_ns = min(chain.high_ns, (low_ns + length_ns) // _NS_PER_S * _NS_PER_S)
        yield _Chain(chain.path, chain.ticker, low_ns, high_ns)
        low_ns = high_ns


def without(whole: Interval, parts: Iterable[Interval]) -> list[Interval]:
    """Return what is left of a half-open interval when `parts` are taken out."""
    left: list[Interval] = []
    at = whole[0]
    for start, end in sorted(part for part in parts if part[0] < part[1]):
        if start >= whole[1]:
            break
        if start > at:
            left.append((at, start))
        at = max(at, end)
    if at < whole[1]:
        left.append((at, whole[1]))
    return left


def _is_combo(ticker: str) -> bool:
    return ticker.startswith(_COMBO_PREFIX)


def _rows(raw: msgspec.Raw, path: str) -> list[_Row]:
    try:
        return _decode_rows(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExchangeAnswerError(f"a trade's row cannot be read: {error}", where=path) from error


def _joined(raw: msgspec.Raw, kept: Sequence[int]) -> bytes:
    rows = _decode_raw_rows(raw)
    return b"[" + b",".join(bytes(rows[index]) for index in kept) + b"]"


def _reach(rows: list[_Row], path: str) -> Interval:
    """Return the earliest and the latest time of a page's rows, in nanoseconds."""
    if not rows:
        return 0, 0
    texts = [row.created_time for row in rows]
    if sort_as_text(texts):
        return _parsed(min(texts), path), _parsed(max(texts), path)
    times = [_parsed(text, path) for text in texts]
    return min(times), max(times)


def _time_ns(row: _Row, path: str) -> int:
    return _parsed(row.created_time, path)


def _parsed(text: str, path: str) -> int:
    try:
        return rfc3339_ns(text)
    except ValueError as error:
        raise ExchangeAnswerError(f"a trade's row cannot be read: {error}", where=path) from error


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the first error of a group: the others came of it or are like it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
