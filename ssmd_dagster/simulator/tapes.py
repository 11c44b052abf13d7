"""Order books as endless tapes: the state of a market's book is one number, its position.

A tape is a short simulated life of one order book (orders, cancels, trades) that ends as it began, so it can be played
round and round. Everything about a market is then a pure function of (tape, position): its levels, best prices,
volume, last trade and exchange clock. That is what makes 100,000 markets cheap and every book exactly known.

Prices are integers of 1e-4 dollar, counts integers of 1e-2 contract. Not for sockets, time or JSON envelopes.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import NamedTuple

ONE_DOLLAR = 10_000
STEPS = 256
"""Actions of one tape before the book is led back to its beginning."""


class Grid(NamedTuple):
    """Valid prices of a market, named as Kalshi names them; bands are (start, end, step)."""

    name: str
    bands: tuple[tuple[int, int, int], ...]

    def snap(self, price: int) -> int:
        """Return the valid price nearest below `price`, inside (0, 1) dollar."""
        for start, end, step in self.bands:
            if price < end or end == ONE_DOLLAR:
                price = start + (max(price, start) - start) // step * step
                return min(max(price, self.bands[0][2]), ONE_DOLLAR - self.bands[-1][2])
        raise AssertionError(price)

    def step_at(self, price: int) -> int:
        """Return the tick size at a price."""
        return next(step for start, end, step in self.bands if start <= price < end)


LINEAR_CENT = Grid("linear_cent", ((0, ONE_DOLLAR, 100),))
DECI_CENT = Grid("deci_cent", ((0, ONE_DOLLAR, 10),))
TAPERED = Grid("tapered_deci_cent", ((0, 1_000, 10), (1_000, 9_000, 100), (9_000, ONE_DOLLAR, 10)))


class Print(NamedTuple):
    """One trade of a tape: the price on the yes scale, the size (1e-2 contract), and which outcome the taker bought."""

    yes_price: int
    size: int
    taker_yes: bool

    def fields(self) -> str:
        """Return the prices, count and sides as they stand in JSON, on the WebSocket and over REST alike."""
        outcome, book = ("yes", "bid") if self.taker_yes else ("no", "ask")
        return (
            f'"yes_price_dollars":"{dollars(self.yes_price)}","no_price_dollars":"{dollars(ONE_DOLLAR - self.yes_price)}"'
            f',"count_fp":"{contracts(self.size)}","taker_side":"{outcome}","taker_outcome_side":"{outcome}"'
            f',"taker_book_side":"{book}","is_block_trade":false'
        )


class Step(NamedTuple):
    """One change of one level. `clock` is the offset in the round; `chained` belongs to the action before it."""

    clock: int
    part: bytes
    yes_part: bytes
    trade: Print | None
    top_moved: bool
    chained: bool
    yes_side: bool
    price: int
    delta: int


class Top(NamedTuple):
    """What a ticker shows after a step; a price of 0 with size 0 means that the side is empty."""

    yes_bid: int
    yes_bid_size: int
    no_bid: int
    no_bid_size: int
    last_price: int
    last_count: int
    volume: int
    dollars: int


Levels = dict[int, int]


def dollars(price: int) -> str:
    """Write 1e-4 dollars as Kalshi does: four decimals."""
    return f"{price // ONE_DOLLAR}.{price % ONE_DOLLAR:04d}"


def contracts(count: int) -> str:
    """Write 1e-2 contracts as Kalshi does: two decimals, with a sign only below zero."""
    sign, count = ("-", -count) if count < 0 else ("", count)
    return f"{sign}{count // 100}.{count % 100:02d}"


def delta_part(*, yes_side: bool, price: int, delta: int, yes_scale: bool) -> bytes:
    """Return the price, amount and side of one delta, as they stand in its JSON."""
    shown = ONE_DOLLAR - price if yes_scale and not yes_side else price
    side = "yes" if yes_side else "no"
    return f',"price_dollars":"{dollars(shown)}","delta_fp":"{contracts(delta)}","side":"{side}"'.encode()


def levels_json(levels: Levels, *, mirrored: bool = False) -> str:
    """Write one side of a book as `[["0.0800","300.00"],…]`, ascending by the price shown."""
    shown = {ONE_DOLLAR - price: count for price, count in levels.items()} if mirrored else levels
    return "[" + ",".join(f'["{dollars(price)}","{contracts(shown[price])}"]' for price in sorted(shown)) + "]"


class Tape:
    """One endless life of a book."""

    def __init__(self, rng: random.Random, grid: Grid, centre: int) -> None:
        self.grid = grid
        self.centre = centre
        self._yes: Levels = {}
        self._no: Levels = {}
        self._last = grid.snap(centre), 100
        self._volume = 0
        self._dollars = 0
        self._clock = 0
        self.steps: list[Step] = []
        self.tops: list[Top] = []
        self._books: dict[tuple[int, bool], bytes] = {}
        self._ticker_parts: dict[int, tuple[bytes, bytes]] = {}
        self._fill(rng)
        self.start = dict(self._yes), dict(self._no)
        for _ in range(STEPS):
            self._act(rng)
        self._lead_back()
        self.length = len(self.steps)
        self.hot = [
            (step.clock, step.part, step.yes_part, step.trade.fields().encode() if step.trade else b"", step.top_moved)
            for step in self.steps
        ]
        """What frames need of each step, cheap to unpack: clock, delta, delta on the yes scale, trade or empty, ticker."""
        self.ends = [not after.chained for after in self.steps[1:]] + [True]
        """False where the next step belongs to the same action and must follow at once."""
        self.span = self._clock + 1
        self.volume = self._volume
        self.dollars = self._dollars
        # Before the first trade of the round the last price is that of the round before.
        first_trade = next(index for index, step in enumerate(self.steps) if step.trade is not None)
        for index in range(first_trade):
            self.tops[index] = self.tops[index]._replace(
                last_price=self.tops[-1].last_price, last_count=self.tops[-1].last_count
            )

    def book(self, position: int) -> tuple[Levels, Levels]:
        """Return the levels (yes, no) after the step at `position`; -1 is the beginning."""
        yes, no = dict(self.start[0]), dict(self.start[1])
        for step in self.steps[: position + 1]:
            side = yes if step.yes_side else no
            count = side.get(step.price, 0) + step.delta
            if count:
                side[step.price] = count
            else:
                del side[step.price]
        return yes, no

    def book_part(self, position: int, *, yes_scale: bool) -> bytes:
        """Return both sides as they stand in a snapshot's JSON; the key of an empty side is absent."""
        key = position, yes_scale
        part = self._books.get(key)
        if part is None:
            yes, no = self.book(position)
            text = f',"yes_dollars_fp":{levels_json(yes)}' if yes else ""
            if no:
                text += f',"no_dollars_fp":{levels_json(no, mirrored=yes_scale)}'
            part = self._books[key] = text.encode()
        return part

    def ticker_parts(self, position: int | None, last_price: int, last_count: int) -> tuple[bytes, bytes]:
        """Return the prices and the sizes of a ticker message; `position` is None for a book without levels."""
        key = -1 if position is None else position
        parts = self._ticker_parts.get(key)
        if parts is None or position is None:
            top = Top(0, 0, 0, 0, 0, 0, 0, 0) if position is None else self.tops[position]
            prices = (
                f',"price_dollars":"{dollars(last_price)}","yes_bid_dollars":"{dollars(top.yes_bid)}"'
                f',"yes_ask_dollars":"{dollars(ONE_DOLLAR - top.no_bid)}"'
            )
            sizes = (
                f',"yes_bid_size_fp":"{contracts(top.yes_bid_size)}","yes_ask_size_fp":"{contracts(top.no_bid_size)}"'
                f',"last_trade_size_fp":"{contracts(last_count)}"'
            )
            parts = self._ticker_parts[key] = prices.encode(), sizes.encode()
        return parts

    def _fill(self, rng: random.Random) -> None:
        depth = min(40, 1 + int(rng.paretovariate(0.9) * 2))
        for side, centre in ((self._yes, self.centre), (self._no, ONE_DOLLAR - self.centre)):
            if rng.random() < 0.06:
                continue
            price = self.grid.snap(centre - self.grid.step_at(self.grid.snap(centre)))
            for _ in range(depth):
                side[price] = self._size(rng)
                price = self.grid.snap(price - self.grid.step_at(price) * rng.choice((1, 1, 1, 2, 5)))

    @staticmethod
    def _size(rng: random.Random) -> int:
        whole = rng.choice((1, 2, 5, 10, 25, 50, 100, 100, 250, 1_000, 5_000)) * rng.randint(1, 9)
        return whole * 100 + (rng.randint(1, 99) if rng.random() < 0.15 else 0)

    def _act(self, rng: random.Random) -> None:
        yes_side = rng.random() < 0.5
        side = self._yes if yes_side else self._no
        kind = rng.random()
        if kind < 0.12 and side:
            self._trade(rng, yes_side=yes_side)
        elif kind < 0.5 and len(side) > 1:
            price = rng.choice(sorted(side)[-8:])
            count = side[price]
            self._change(yes_side, price, -count if rng.random() < 0.6 else -rng.randint(1, count))
        else:
            self._order(rng, yes_side=yes_side)

    def _order(self, rng: random.Random, *, yes_side: bool) -> None:
        own, other = (self._yes, self._no) if yes_side else (self._no, self._yes)
        centre = self.centre if yes_side else ONE_DOLLAR - self.centre
        tick = self.grid.step_at(self.grid.snap(centre))
        price = self.grid.snap(centre - tick * int(rng.expovariate(0.35)) - tick * rng.randint(0, 1))
        while other and price + max(other) >= ONE_DOLLAR and price > tick:
            price = self.grid.snap(ONE_DOLLAR - max(other) - tick)
            break
        if other and price + max(other) >= ONE_DOLLAR:
            price = max(own, default=0)
            if price == 0:
                return
        self._change(yes_side, price, self._size(rng))

    def _trade(self, rng: random.Random, *, yes_side: bool) -> None:
        resting = self._yes if yes_side else self._no
        sweep = rng.random() < 0.2 and len(resting) > 2
        price = max(resting)
        if sweep:
            self._print(yes_side, price, resting[price], chained=False)
            price = max(resting)
        count = resting[price]
        # Whole contracts as a rule; a hundredth of a contract is the least that trades.
        traded = count if rng.random() < 0.3 else rng.randint(1, count)
        if traded > 100 and rng.random() < 0.85:
            traded -= traded % 100
        self._print(yes_side, price, traded, chained=sweep)

    def _print(self, yes_side: bool, price: int, count: int, *, chained: bool) -> None:
        yes_price = price if yes_side else ONE_DOLLAR - price
        self._last = yes_price, count
        self._volume += count
        self._dollars += count * yes_price
        self._change(yes_side, price, -count, Print(yes_price, count, not yes_side), chained=chained)

    def _change(
        self, yes_side: bool, price: int, delta: int, trade: Print | None = None, *, chained: bool = False
    ) -> None:
        side = self._yes if yes_side else self._no
        before = max(side, default=0), side.get(max(side, default=0), 0)
        count = side.get(price, 0) + delta
        assert count >= 0, (price, delta)
        if count:
            side[price] = count
        else:
            del side[price]
        if not chained:
            self._clock += 1 + (price * 7 + abs(delta)) % 5
        after = max(side, default=0), side.get(max(side, default=0), 0)
        self.steps.append(
            Step(
                clock=self._clock,
                part=delta_part(yes_side=yes_side, price=price, delta=delta, yes_scale=False),
                yes_part=delta_part(yes_side=yes_side, price=price, delta=delta, yes_scale=True),
                trade=trade,
                top_moved=before != after,
                chained=chained,
                yes_side=yes_side,
                price=price,
                delta=delta,
            )
        )
        yes_bid, no_bid = max(self._yes, default=0), max(self._no, default=0)
        self.tops.append(
            Top(
                yes_bid,
                self._yes.get(yes_bid, 0),
                no_bid,
                self._no.get(no_bid, 0),
                *self._last,
                self._volume,
                self._dollars,
            )
        )

    def _lead_back(self) -> None:
        """Undo the difference to the beginning, the reductions first so that the book never crosses."""
        for growing in (False, True):
            for yes_side, side, wanted in ((True, self._yes, self.start[0]), (False, self._no, self.start[1])):
                for price in sorted(set(side) | set(wanted), reverse=True):
                    delta = wanted.get(price, 0) - side.get(price, 0)
                    if delta and (delta > 0) == growing:
                        self._change(yes_side, price, delta)


@lru_cache(maxsize=4)
def make_tapes(seed: int) -> dict[str, list[Tape]]:
    """Return the tapes of every grid, ordered by their centre price, the same ones for the same seed."""
    tapes: dict[str, list[Tape]] = {}
    for grid in (LINEAR_CENT, DECI_CENT, TAPERED):
        rng = random.Random(f"{seed}/{grid.name}")
        tapes[grid.name] = [Tape(rng, grid, centre) for centre in range(400, ONE_DOLLAR, 800)]
    return tapes
