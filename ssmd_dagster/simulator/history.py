"""What the simulated exchange did before anybody looked: trades and settled markets of months, made on demand from the seed.

The past is cut into blocks of at most a quarter of an hour. A block's trades are a pure function of seed, block and
`trades_per_day`; they are made when a page asks for them and the last ones are kept. Not for what happened while the
simulator ran: that is in `tradebook`, and the spans of the past are exactly the times without it.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import random
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ssmd_dagster.simulator import catalog
from ssmd_dagster.simulator.catalog import DAY_S, EASTERN, EventPlan, MarketPlan, Rhythm, Series
from ssmd_dagster.simulator.keys import write_file
from ssmd_dagster.simulator.tapes import Tape
from ssmd_dagster.simulator.world import JUMP_S, Event, Market, World, plan_fate

_BLOCKS_S = (900, 300, 60, 20, 5)
_ROWS_A_BLOCK = 4_000
_ROWS_KEPT = 400_000
_PLANS_KEPT = 4_096
_BLOCK_TRADES = 0.004
_QUARTER_AROUND_S = 3_600
_MICROS = 1_000_000
_MONTHS = {f"{date(2000, number, 1):%b}".upper(): number for number in range(1, 13)}

Position = tuple[int, int]
"""A trade's place: its block, and its index in it."""


class Block(NamedTuple):
    """The trades of a stretch of time, ascending: times in µs, rows as REST shows them, and their tickers."""

    times_us: list[int]
    rows: list[bytes]
    tickers: list[str]


class PastMarket(NamedTuple):
    """A market that is over: settled at `settled_s`; `market` writes its row."""

    market: Market
    settled_s: int


class History:
    """The past of one exchange: spans of whole seconds in which the simulator did not run, from `first` on.

    They are kept in `history.json` of the exchange's home, so that the past does not change with a restart. Without trades a day
    there is no past.
    """

    def __init__(self, home: Path, world: World, now_s: int, *, trades_per_day: int, first: date, pauses: bool) -> None:
        self._path = home / "history.json"
        self._world = world
        self._pauses = pauses
        self.trades_per_day = trades_per_day
        self.first_s = calendar.timegm(first.timetuple())
        self.block_s = next(
            (size for size in _BLOCKS_S if trades_per_day * size / DAY_S <= _ROWS_A_BLOCK), _BLOCKS_S[-1]
        )
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._rows_kept = 0
        self._prints: dict[int, list[bytes]] = {}
        try:
            self.spans = [(int(low), int(high)) for low, high in json.loads(self._path.read_bytes())["spans"]]
        except FileNotFoundError:
            self.spans = [(self.first_s, now_s)] if trades_per_day and now_s > self.first_s else []
            self._keep()

    def _keep(self) -> None:
        write_file(self._path, json.dumps({"spans": self.spans}).encode())

    def leapt(self, from_s: int, to_s: int) -> None:
        """Take note that the clock leapt ahead over a time that nobody lived through; short hops are lived through.

        Where it went back, what it comes by again is lived through now, so the past ends there.
        """
        if to_s < from_s and any(high > to_s for _, high in self.spans):
            self.spans = [(low, min(high, to_s)) for low, high in self.spans if low < to_s]
            self._keep()
        if self.trades_per_day and to_s > from_s + JUMP_S and seconds_within(self.spans, from_s, to_s) == 0:
            self.spans.append((from_s, to_s))
            self.spans.sort()
            self._keep()

    # -- trades ----------------------------------------------------------------------------------------------------

    def holds(self, low_us: int, high_us: int) -> bool:
        """Tell whether any span of the past lies in the inclusive interval."""
        return any(low * _MICROS <= high_us and high * _MICROS > low_us for low, high in self.spans)

    def newest_first(
        self, low_us: int, high_us: int, below: Position | None, ticker: str | None
    ) -> Iterator[tuple[int, bytes, Position]]:
        """Yield `(time, row, position)` of the trades in the inclusive interval, from the newest below `below` down."""
        for number, block, start, end in self._parts(low_us, high_us, below):
            for index in range(end - 1, start - 1, -1):
                if ticker is None or block.tickers[index] == ticker:
                    yield block.times_us[index], block.rows[index], (number, index)

    def page(
        self, low_us: int, high_us: int, below: Position | None, limit: int
    ) -> tuple[list[bytes], Position | None]:
        """Return up to `limit` rows from the newest down and the position of the last one, None where none is left.

        The quick way of `newest_first` for the whole tape.
        """
        rows: list[bytes] = []
        last_position: Position | None = None
        for number, block, start, end in self._parts(low_us, high_us, below):
            if len(rows) == limit:
                return rows, last_position
            begin = max(start, end - (limit - len(rows)))
            part = block.rows[begin:end]
            part.reverse()
            rows += part
            last_position = number, begin
            if begin > start:
                return rows, last_position
        return rows, None

    def _parts(self, low_us: int, high_us: int, below: Position | None) -> Iterator[tuple[int, Block, int, int]]:
        """Yield the blocks of an inclusive interval below `below`, the newest first, with the indices that lie in it."""
        for span_low, span_high in reversed(self.spans):
            low, high = max(low_us, span_low * _MICROS), min(high_us, span_high * _MICROS - 1)
            if low > high:
                continue
            last = high // _MICROS // self.block_s
            if below is not None:
                last = min(last, below[0])
            for number in range(last, low // _MICROS // self.block_s - 1, -1):
                block = self.block(number)
                start, end = bisect_left(block.times_us, low), bisect_right(block.times_us, high)
                if below is not None and below[0] == number:
                    end = min(end, below[1])
                if start < end:
                    yield number, block, start, end

    def block(self, number: int) -> Block:
        """Return a block's trades, made anew where they are not kept."""
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        block = self._make(number)
        self._blocks[number] = block
        self._rows_kept += len(block.rows)
        while self._rows_kept > _ROWS_KEPT and len(self._blocks) > 1:
            _, dropped = self._blocks.popitem(last=False)
            self._rows_kept -= len(dropped.rows)
        return block

    def _make(self, number: int) -> Block:
        start_s = number * self.block_s
        if self._pauses and catalog.paused_until_s(start_s) is not None:
            return Block([], [], [])
        markets, weights = self._open_at(start_s // 900)
        rng = random.Random(f"{self._world.seed}/history/{self.trades_per_day}/{number}")
        count = round(self.trades_per_day * self.block_s / DAY_S * rng.uniform(0.6, 1.4)) if markets else 0
        digest = hashlib.blake2b(f"{self._world.seed}/past/{start_s}".encode(), digest_size=10).hexdigest()
        span_us = self.block_s * _MICROS
        offsets = sorted([int(rng.random() * span_us) for _ in range(count)])
        chosen = rng.choices(markets, cum_weights=weights, k=count)
        picks = [rng.random() for _ in range(count)]
        day, second = divmod(start_s, DAY_S)
        on = datetime.fromtimestamp(day * DAY_S, UTC).strftime("%Y-%m-%dT").encode()
        seconds = [on + text for text in _clock_times()[second : second + self.block_s]]
        names = [named for _, named, _ in chosen]
        fields = [
            prints[int(pick * len(prints))]
            if pick >= _BLOCK_TRADES
            else prints[int(pick * len(prints))].replace(b'"is_block_trade":false', b'"is_block_trade":true')
            for (_, _, prints), pick in zip(chosen, picks, strict=True)
        ]
        row = (
            f'{{"trade_id":"{digest[:8]}-{digest[8:12]}-4{digest[12:15]}-8{digest[15:18]}-%012x%b%b%b%06dZ"}}'.encode()
        )
        times = [seconds[offset // _MICROS] for offset in offsets]
        micros = [offset % _MICROS for offset in offsets]
        # `map` over the format itself: most of what a past day costs is this line.
        rows = list(map(row.__mod__, zip(range(count), names, fields, times, micros, strict=True)))
        tickers = [ticker for ticker, _, _ in chosen]
        base_us = start_s * _MICROS
        return Block([base_us + offset for offset in offsets], rows, tickers)

    @lru_cache(maxsize=64)  # noqa: B019 - one history lives as long as its process
    def _open_at(self, quarter: int) -> tuple[list[tuple[str, bytes, list[bytes]]], list[float]]:
        """Return the markets that trade in a quarter of an hour, with their prints, and their activity, summed up."""
        from_s, to_s = quarter * 900, quarter * 900 + 900
        found: list[tuple[str, bytes, list[bytes]]] = []
        weights: list[float] = []
        for series in self._world.allotted:
            rank = 0
            for plan, markets in self._around(series, from_s):
                if plan.open_s <= from_s and plan.ends_s >= to_s:
                    for market in markets:
                        rank += 1
                        named = f'","ticker":"{market.ticker}",'.encode()
                        found.append((market.ticker, named, self._prints_of(series, market)))
                        weights.append(1 / rank)
        return found, list(accumulate(weights))

    def _prints_of(self, series: Series, market: MarketPlan) -> list[bytes]:
        tape = self._world.tape_of(series, market)
        prints = self._prints.get(id(tape))
        if prints is None:
            prints = self._prints[id(tape)] = _prints(tape)
        return prints

    def _around(self, series: Series, at_s: int) -> Iterator[tuple[EventPlan, list[MarketPlan]]]:
        index = catalog.index_at(series, at_s)
        behind, ahead = {Rhythm.YEARLY: (1, 1), Rhythm.QUARTER: (0, 0), Rhythm.COMBO: (2, 0)}.get(series.rhythm, (1, 4))
        for each in range(index - behind, index + ahead + 1):
            yield from self._plans(series, each)

    @lru_cache(maxsize=_PLANS_KEPT)  # noqa: B019 - as above
    def _plans(self, series: Series, index: int) -> list[tuple[EventPlan, list[MarketPlan]]]:
        seed, an_event = self._world.seed, self._world.allotted[series]
        return [
            (plan, list(catalog.plan_markets(plan, an_event, seed)))
            for plan in catalog.plan_events(series, index, an_event, seed)
        ]

    # -- markets ---------------------------------------------------------------------------------------------------

    @lru_cache(maxsize=_PLANS_KEPT)  # noqa: B019 - as above
    def event(self, ticker: str) -> tuple[Event, int] | None:
        """Return a past event with its markets, and when it was settled; None where there never was one."""
        name, _, rest = ticker.partition("-")
        for series in self._world.allotted:
            if series.ticker == name:
                for index in self._indices(series, rest):
                    for plan, markets in self._plans(series, index):
                        if plan.ticker == ticker:
                            return self._settled(plan, markets)
        return None

    def market(self, ticker: str) -> PastMarket | None:
        """Return a past market, None where there never was one of that name."""
        found = self.event(ticker.rpartition("-")[0])
        for market in found[0].markets if found else ():
            if market.ticker == ticker:
                assert found is not None
                return PastMarket(market, found[1])
        return None

    def settled_on(self, day: int, series_ticker: str | None = None) -> list[PastMarket]:
        """Return the markets (of a series) settled on a day, counted from the epoch, UTC; the last settled first."""
        found: list[PastMarket] = []
        if not seconds_within(self.spans, day * DAY_S, (day + 1) * DAY_S):
            return found
        for series in self._world.allotted:
            if series.rhythm is Rhythm.YEARLY or series_ticker not in (None, series.ticker):
                continue
            around_s = _QUARTER_AROUND_S if series.rhythm is Rhythm.QUARTER else DAY_S
            low = catalog.index_at(series, day * DAY_S - around_s)
            high = catalog.index_at(series, day * DAY_S + DAY_S + around_s)
            for index in range(low, high + 1):
                for plan, markets in self._plans(series, index):
                    if plan.ends_s // DAY_S in (day - 1, day) and (settled := self._settled(plan, markets)):
                        event, settled_s = settled
                        if settled_s // DAY_S == day:
                            found += [PastMarket(market, settled_s) for market in event.markets]
        found.sort(key=lambda past: (past.settled_s, past.market.ticker), reverse=True)
        return found

    def _settled(self, plan: EventPlan, plans: list[MarketPlan]) -> tuple[Event, int] | None:
        fate = plan_fate(self._world.seed, plan)
        if not any(low <= fate.settled_s < high for low, high in self.spans):
            return None
        return self._world.past_event(plan, plans), fate.settled_s

    def _indices(self, series: Series, suffix: str) -> Iterator[int]:
        """Yield the indices under which an event of that suffix can be; the tickers are the simulator's own."""
        if series.rhythm is Rhythm.COMBO:
            index = _combos(self._world.seed, series, self._world.allotted[series], *self._reach(series)).get(suffix)
            yield from () if index is None else (index,)
            return
        try:
            year, month, day = 2000 + int(suffix[:2]), _MONTHS[suffix[2:5]], int(suffix[5:7])
            on = date(year, month, day)
        except (ValueError, KeyError):
            return
        if series.rhythm is Rhythm.YEARLY:
            yield year
        elif series.rhythm is Rhythm.QUARTER:
            hours, minutes = suffix[7:9], suffix[9:11]
            if hours.isdigit() and minutes.isdigit() and int(hours) < 24 and int(minutes) < 60:
                for fold in (0, 1):
                    closes = datetime.combine(on, time(int(hours), int(minutes), fold=fold), EASTERN)
                    yield int(closes.timestamp()) // 900 - 1
        else:
            yield (on - date(1970, 1, 1)) // timedelta(days=1)

    def _reach(self, series: Series) -> tuple[int, int]:
        low = min((low for low, _ in self.spans), default=0)
        high = max((high for _, high in self.spans), default=0)
        return catalog.index_at(series, low), catalog.index_at(series, high)


def seconds_within(spans: list[tuple[int, int]], from_s: int, to_s: int) -> int:
    """Return how many seconds of the spans lie in an interval."""
    return sum(max(0, min(high, to_s) - max(low, from_s)) for low, high in spans)


@lru_cache(maxsize=1)
def _clock_times() -> list[bytes]:
    """Return `HH:MM:SS.` of every second of a day."""
    return [b"%02d:%02d:%02d." % (at // 3_600, at // 60 % 60, at % 60) for at in range(DAY_S)]


def _prints(tape: Tape) -> list[bytes]:
    """Return what rows say between their market and the digits of their time."""
    return [fields + b',"created_time":"' for _, _, _, fields, _ in tape.hot if fields]


@lru_cache(maxsize=8)
def _combos(seed: int, series: Series, an_event: int, low: int, high: int) -> dict[str, int]:
    """Return the index of every combo event by the suffix of its ticker, which tells nothing of its time."""
    return {
        plan.ticker.partition("-")[2]: index
        for index in range(low - 2, high + 1)
        for plan in catalog.plan_events(series, index, an_event, seed)
    }
