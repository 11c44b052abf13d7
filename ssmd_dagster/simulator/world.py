"""The simulated exchange's markets: what is listed, open, closed and settled at an instant, and what each book holds.

The same seed lists the same events, markets and books. Time comes in as a parameter. Not for sockets or HTTP.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, NamedTuple

from ssmd_dagster.simulator import catalog
from ssmd_dagster.simulator.catalog import SECOND_NS, EventPlan, MarketPlan, Series
from ssmd_dagster.simulator.tapes import ONE_DOLLAR, Levels, Tape, contracts, delta_part, dollars, make_tapes

KEPT_AFTER_SETTLEMENT_S = 26 * 3_600
"""A settled market leaves the live lists after this long."""
JUMP_S = 2 * 86_400
"""A clock that moves further at once makes the world afresh instead of living through every quarter hour between."""
BACKWARD_S = 1
_ROUNDS_A_BOOT = 1 << 30
_ROUNDS_A_REMAKE = 1 << 20


class Happening(IntEnum):
    """What the passing of time does to an event or a market, in the order in which it may happen."""

    CREATED = 0
    OPENED = 1
    RENAMED = 2
    FEE_SET = 3
    FEE_CLEARED = 4
    DEACTIVATED = 5
    ACTIVATED = 6
    DATE_UPDATED = 7
    CLOSED = 8
    EMPTIED = 9
    DETERMINED = 10
    SETTLED = 11
    DROPPED = 12


STATUS_OF_FILTER = {"unopened": "initialized", "open": "active", "paused": "inactive", "settled": "finalized"}


def rfc3339(at_s: int) -> str:
    """Write whole seconds since the epoch as Kalshi does."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_uuid(name: str) -> str:
    """Return the UUID that belongs to a name; the same name gives the same one."""
    text = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"


class Event:
    """One event and its markets."""

    __slots__ = ("created_s", "markets", "plan")

    def __init__(self, plan: EventPlan) -> None:
        self.plan = plan
        self.created_s = plan.created_s
        self.markets: list[Market] = []

    @property
    def ticker(self) -> str:
        """The event's ticker."""
        return self.plan.ticker

    def status(self) -> str:
        """Return the event's status as the filter names it."""
        statuses = {market.status for market in self.markets}
        if "active" in statuses or "inactive" in statuses:
            return "open"
        if statuses == {"initialized"}:
            return "unopened"
        return "settled" if statuses == {"finalized"} else "closed"


class Market:
    """One market; its book is a tape and a position. `subs` of each channel are the socket's business."""

    __slots__ = (
        "book_subs",
        "built",
        "clock_base",
        "close_s",
        "closing_clock",
        "determined_s",
        "dollars_base",
        "event",
        "head",
        "index",
        "market_id",
        "number",
        "plan",
        "position",
        "previous",
        "result",
        "round",
        "row_parts",
        "settled_s",
        "status",
        "steps",
        "tape",
        "ticker",
        "ticker_bytes",
        "ticker_head",
        "ticker_subs",
        "trade_head",
        "trade_subs",
        "updated_s",
        "volume_base",
    )

    def __init__(
        self, seed: int, first_round: int, index: int, number: int, event: Event, plan: MarketPlan, tapes: list[Tape]
    ):
        self.index = index
        self.number = number
        self.event = event
        self.plan = plan
        self.ticker = plan.ticker
        digest = hashlib.blake2b(f"{seed}/{plan.ticker}".encode(), digest_size=16).digest()
        text = digest.hex()
        self.market_id = f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"
        self.trade_head = f"{text[20:28]}-{text[28:]}-4{text[13:16]}-8".encode()
        self.ticker_bytes = plan.ticker.encode()
        self.ticker_head = f',"msg":{{"market_id":"{self.market_id}","market_ticker":"{plan.ticker}"'.encode()
        self.head = f',"msg":{{"market_ticker":"{plan.ticker}","market_id":"{self.market_id}","clock":'.encode()
        self.tape = tapes[min(len(tapes) - 1, plan.centre * len(tapes) // ONE_DOLLAR)]
        self.steps = self.tape.steps
        self.position = int.from_bytes(digest[:4], "little") % self.tape.length
        self.round = first_round
        self.clock_base = self.round * self.tape.span
        self.volume_base = int.from_bytes(digest[4:7], "little") - self.tape.tops[self.position].volume
        self.dollars_base = self.volume_base * plan.centre
        self.previous = dollars(self.tape.grid.snap(plan.centre))
        self.built = False
        self.closing_clock = 0
        self.status = "initialized"
        self.close_s = event.plan.close_s
        self.result = ""
        self.determined_s = 0
        self.settled_s = 0
        self.updated_s = event.plan.created_s
        self.row_parts: tuple[bytes, bytes] | None = None
        self.book_subs: list[Any] = []
        self.trade_subs: list[Any] = []
        self.ticker_subs: list[Any] = []

    @property
    def clock(self) -> int:
        """The exchange clock of the book's newest change; 0 for a book that never changed."""
        if self.closing_clock:
            return self.closing_clock
        return self.clock_base + self.steps[self.position].clock if self.built else 0

    def trade_id(self) -> bytes:
        """Return the id of the trade that the newest step made, a UUID that is never used again."""
        serial = self.round * 1_000 + self.position
        return b"%b%03x-%012x" % (self.trade_head, serial >> 48, serial & 0xFFFF_FFFF_FFFF)

    @property
    def live(self) -> bool:
        """True while the book holds levels."""
        return self.built and not self.closing_clock

    def next_round(self) -> None:
        """Begin the tape again."""
        self.round += 1
        self.clock_base += self.tape.span
        self.volume_base += self.tape.volume
        self.dollars_base += self.tape.dollars

    def book(self) -> tuple[Levels, Levels]:
        """Return the levels of the yes and the no side, 1e-4 dollars to 1e-2 contracts."""
        return self.tape.book(self.position) if self.live else ({}, {})

    def book_part(self, *, yes_scale: bool) -> bytes:
        """Return the book as it stands in a snapshot's JSON; empty sides are absent."""
        return self.tape.book_part(self.position, yes_scale=yes_scale) if self.live else b""

    def book_deltas(self, *, removing: bool, yes_scale: bool) -> list[bytes]:
        """Return the parts of the deltas that make the book from nothing, or nothing from it."""
        yes, no = self.tape.book(self.position)
        sign = -1 if removing else 1
        return [
            delta_part(yes_side=side, price=price, delta=sign * count, yes_scale=yes_scale)
            for side, levels in ((True, yes), (False, no))
            for price, count in sorted(levels.items(), reverse=removing)
        ]

    def volume(self) -> int:
        """Return the contracts traded in all (1e-2)."""
        return self.volume_base + self.tape.tops[self.position].volume if self.built else 0

    def ticker_message(self) -> bytes:
        """Return a ticker message from behind its sid to the sizes."""
        top = self.tape.tops[self.position]
        prices, sizes = self.tape.ticker_parts(self.position if self.live else None, top.last_price, top.last_count)
        volume = self.volume_base + top.volume
        spent = self.dollars_base + top.dollars
        held = volume * 3 // 5
        return (
            b'%b%b,"volume_fp":"%d.%02d","open_interest_fp":"%d.%02d","dollar_volume":%d,"dollar_open_interest":%d%b'
            % (
                self.ticker_head,
                prices,
                *divmod(volume, 100),
                *divmod(held, 100),
                spent // 1_000_000,
                spent * 3 // 5_000_000,
                sizes,
            )
        )

    def row(self) -> bytes:
        """Return the market as REST shows it."""
        if self.row_parts is None:
            self.row_parts = self._fixed_parts()
        before, after = self.row_parts
        top = self.tape.tops[self.position]
        if self.live:
            bid, bid_size, ask, ask_size = top.yes_bid, top.yes_bid_size, ONE_DOLLAR - top.no_bid, top.no_bid_size
        else:
            bid, bid_size, ask, ask_size = 0, 0, ONE_DOLLAR, 0
        volume = self.volume()
        quotes = (
            f',"yes_bid_dollars":"{dollars(bid)}","yes_bid_size_fp":"{contracts(bid_size)}"'
            f',"yes_ask_dollars":"{dollars(ask)}","yes_ask_size_fp":"{contracts(ask_size)}"'
            f',"no_bid_dollars":"{dollars(ONE_DOLLAR - ask)}","no_ask_dollars":"{dollars(ONE_DOLLAR - bid)}"'
            f',"last_price_dollars":"{dollars(top.last_price if self.built else 0)}"'
            f',"volume_fp":"{contracts(volume)}","volume_24h_fp":"{contracts(volume // 2)}"'
            f',"open_interest_fp":"{contracts(volume * 3 // 5)}"'
        )
        return b"".join((before, quotes.encode(), after))

    def strike(self) -> dict[str, Any]:
        """Return the strike fields of REST and lifecycle messages."""
        fields: dict[str, Any] = {"strike_type": self.event.plan.series.strike}
        if self.plan.floor_strike is not None:
            fields["floor_strike"] = self.plan.floor_strike
        if self.plan.cap_strike is not None:
            fields["cap_strike"] = self.plan.cap_strike
        if fields["strike_type"] in ("custom", "structured"):
            fields["custom_strike"] = {"choice": make_uuid(self.ticker)}
        return fields

    def price_ranges(self) -> list[dict[str, str]]:
        """Return the valid prices."""
        return [
            {"start": dollars(start), "end": dollars(end), "step": dollars(step)}
            for start, end, step in self.tape.grid.bands
        ]

    def rules(self) -> str:
        """Return the primary rule's words."""
        return f"If {self.plan.sub_title} for {self.event.plan.title} then the market resolves to Yes."

    def _fixed_parts(self) -> tuple[bytes, bytes]:
        plan = self.event.plan
        previous = {
            "previous_yes_bid_dollars": self.previous,
            "previous_yes_ask_dollars": self.previous,
            "previous_price_dollars": self.previous,
        }
        before = {
            "ticker": self.ticker,
            "event_ticker": plan.ticker,
            "market_type": "binary",
            "title": self.plan.title,
            "subtitle": "",
            "yes_sub_title": self.plan.sub_title,
            "no_sub_title": self.plan.sub_title,
            "created_time": f"{rfc3339(plan.created_s)[:-1]}.{self.number % 1_000_000:06d}Z",
            "updated_time": f"{rfc3339(self.updated_s)[:-1]}.{self.number % 1_000_000:06d}Z",
            "open_time": rfc3339(plan.open_s),
            "close_time": rfc3339(self.close_s),
            "expected_expiration_time": rfc3339(plan.ends_s),
            "expiration_time": rfc3339(plan.close_s + 7 * 86_400),
            "latest_expiration_time": rfc3339(plan.close_s + 7 * 86_400),
            "settlement_timer_seconds": 300,
            "status": self.status,
            "notional_value_dollars": "1.0000",
            # Gone from Kalshi's specification since October 2026, and still required by clients of that month.
            "liquidity_dollars": "0.0000",
        }
        after: dict[str, Any] = {
            **previous,
            "result": self.result,
            "can_close_early": True,
            "early_close_condition": "This market will close early if the outcome is known.",
            "expiration_value": "" if not self.result else self.result,
            "rules_primary": self.rules(),
            "rules_secondary": "",
            "price_level_structure": self.tape.grid.name,
            "price_ranges": self.price_ranges(),
            "settlement_bounds_type": "default",
            "exchange_index": plan.series.shard,
            **self.strike(),
        }
        if self.result:
            after["settlement_value_dollars"] = "1.0000" if self.result == "yes" else "0.0000"
        if self.settled_s:
            after["settlement_ts"] = rfc3339(self.settled_s)
        if plan.series.combo:
            after["mve_collection_ticker"] = f"{plan.series.ticker}-R"
            after["mve_selected_legs"] = [
                {"event_ticker": f"KXNBAGAME-LEG{leg}", "market_ticker": f"KXNBAGAME-LEG{leg}-YES", "side": "yes"}
                for leg in (1, 2)
            ]
        return _compact(before)[:-1], b"," + _compact(after)[1:]


def _compact(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


class Fate(NamedTuple):
    """When an event's markets are determined and settled, in seconds since the epoch."""

    determined_s: int
    settled_s: int


def plan_fate(seed: int, plan: EventPlan) -> Fate:
    """Return the end that an event comes to; what else happens to it is drawn from the same source, behind it."""
    return _fate(random.Random(f"{seed}/{plan.ticker}/fate"), plan)


def _fate(rng: random.Random, plan: EventPlan) -> Fate:
    determined_s = plan.ends_s + rng.randint(5, 90)
    return Fate(determined_s, determined_s + min(1_800, int(rng.lognormvariate(5.88, 0.6))))


class Change(NamedTuple):
    """Something that time did, for the socket to tell."""

    what: Happening
    event: Event
    market: Market | None
    at_s: int


class World:
    """All markets of one simulated exchange."""

    def __init__(
        self,
        seed: int,
        markets: int,
        boot: int,
        now_ns: int,
        *,
        series: tuple[str, ...] = (),
        played: tuple[str, ...] = (),
    ) -> None:
        self.seed = seed
        self.boot = boot
        self.allotted = {} if played else catalog.allot(markets, series)
        self._played = catalog.plan_played(played)
        self._tapes = make_tapes(seed)
        self.events: dict[str, Event] = {}
        self.markets: dict[str, Market] = {}
        self.by_index: dict[int, Market] = {}
        self.by_id: dict[str, Market] = {}
        self.names: dict[int, str] = {}
        """Ticker of every market index ever given, for the truth log."""
        self._next_index = 1
        self._due: list[tuple[int, int, int, Happening, Event, Market | None]] = []
        self._plans: list[tuple[int, int, Series, int]] = []
        self._tie = 0
        self._order: list[int] = []
        self._ordered = False
        self.now_s = now_ns // SECOND_NS
        self.remakes = 0
        """How often a leap of the clock made the lists afresh."""
        self.version = 0
        """Rises whenever the set of open markets changes."""
        self._make()

    def open_markets(self) -> dict[Series, list[Market]]:
        """Return the markets that trade now, by series, in the order of their activity."""
        found: dict[Series, list[Market]] = {series: [] for series in self.allotted}
        for market in self.markets.values():
            if market.status == "active":
                found[market.event.plan.series].append(market)
        for markets in found.values():
            markets.sort(key=lambda market: market.market_id)
        return found

    def newest_first(self, below: int | None) -> Iterator[Market]:
        """Yield the listed markets, the last listed first, from those with an index under `below`."""
        if not self._ordered:
            self._order = sorted(self.by_index)
            self._ordered = True
        end = len(self._order) if below is None else bisect_left(self._order, below)
        return (self.by_index[index] for index in reversed(self._order[:end]))

    def events_newest_first(self) -> list[Event]:
        """Return the listed events by time of creation, the newest first."""
        return sorted(self.events.values(), key=lambda event: (event.plan.created_s, event.ticker), reverse=True)

    def advance(self, now_ns: int) -> list[Change]:
        """Let time pass up to `now_ns` and return what that did, in order.

        A jump back, or ahead by more than `JUMP_S`, makes the lists afresh: markets whose time has come or gone change
        their status without a word, as they would for a client who was away.
        """
        now_s = now_ns // SECOND_NS
        if now_s < self.now_s - BACKWARD_S or now_s > self.now_s + JUMP_S:
            self.now_s = now_s
            self.remakes += 1
            self._make()
            return []
        if now_s <= self.now_s:
            return []
        self.now_s = now_s
        changes: list[Change] = []
        while True:
            next_plan_s = self._plans[0][0] if self._plans else now_s + 1
            next_due_s = self._due[0][0] if self._due else now_s + 1
            if min(next_plan_s, next_due_s) > now_s:
                return changes
            if next_plan_s <= next_due_s:
                at_s, _, series, index = heapq.heappop(self._plans)
                self._plan(series, index + 1)
                for event in self._list(series, index):
                    for due_s, what in self._fate(event):
                        self._push(due_s, what, event, None)
                    changes.append(Change(Happening.CREATED, event, None, at_s))
                    changes.extend(Change(Happening.CREATED, event, market, at_s) for market in event.markets)
            else:
                at_s, _, _, what, event, due = heapq.heappop(self._due)
                changes.extend(self._happen(what, event, due, at_s))

    def _make(self) -> None:
        """List what an exchange would list at this instant; markets that are listed already stay the same objects."""
        self._due.clear()
        self._plans.clear()
        self.events.clear()
        kept = dict(self.markets)
        self.markets.clear()
        self.by_index.clear()
        self.by_id.clear()
        for series in [] if self._played else self.allotted:
            index = catalog.index_at(series, self.now_s)
            while catalog.created_s(series, index) <= self.now_s:
                index += 1
            self._plan(series, index)
            first = index - 1
            while self._lasts(series, first):
                first -= 1
            for listed in range(first + 1, index):
                for event in self._list(series, listed, kept):
                    self._catch_up(event)
        for plan, market_plans in self._played:
            event = Event(plan)
            for number, market_plan in enumerate(market_plans):
                market = kept.get(market_plan.ticker) or self._new_market(number, event, market_plan)
                market.event, market.status = event, "active"
                self._enter(market)
            self.allotted[plan.series] = len(market_plans)
            self.events[event.ticker] = event
        for market in kept.values():
            if market.ticker not in self.markets and market.live:
                # Clients may still hold it; whoever asks sees an empty book.
                market.closing_clock = market.clock + 1
        self.version += 1

    def tape_of(self, series: Series, plan: MarketPlan) -> Tape:
        """Return the tape that a market's book is played from."""
        tapes = self._tapes[series.grid.name]
        return tapes[min(len(tapes) - 1, plan.centre * len(tapes) // ONE_DOLLAR)]

    def past_event(self, plan: EventPlan, plans: Iterable[MarketPlan]) -> Event:
        """Return an event that was settled long ago, with its markets; it is in no list of this world."""
        event, fate = Event(plan), plan_fate(self.seed, plan)
        rng = random.Random(f"{self.seed}/{plan.ticker}/{Happening.DETERMINED}")
        for number, market_plan in enumerate(plans):
            market = Market(self.seed, 0, 0, number, event, market_plan, self._tapes[plan.series.grid.name])
            market.status, market.close_s, market.built, market.closing_clock = "finalized", plan.ends_s, True, 1
            market.determined_s, market.settled_s = fate
            market.updated_s = fate.settled_s
            market.result = "yes" if rng.random() * ONE_DOLLAR < market_plan.centre else "no"
            event.markets.append(market)
        return event

    def _new_market(self, number: int, event: Event, plan: MarketPlan) -> Market:
        tapes = self._tapes[event.plan.series.grid.name]
        # No market ever begins where one of the same name has been before, whatever was done to the clock.
        first_round = self.boot * _ROUNDS_A_BOOT + self.remakes * _ROUNDS_A_REMAKE
        market = Market(self.seed, first_round, self._next_index, number, event, plan, tapes)
        self.names[self._next_index] = plan.ticker
        self._next_index += 1
        return market

    def _enter(self, market: Market) -> None:
        market.event.markets.append(market)
        self._ordered = False
        self.markets[market.ticker] = market
        self.by_index[market.index] = market
        self.by_id[market.market_id] = market

    def _lasts(self, series: Series, index: int) -> bool:
        """True if an index has events that are still to close or have closed within the last two hours."""
        plans = catalog.plan_events(series, index, self.allotted[series], self.seed)
        return any(plan.ends_s > self.now_s - 7_200 for plan in plans)

    def _plan(self, series: Series, index: int) -> None:
        self._tie += 1
        heapq.heappush(self._plans, (catalog.created_s(series, index), self._tie, series, index))

    def _list(self, series: Series, index: int, kept: dict[str, Market] | None = None) -> list[Event]:
        an_event = self.allotted[series]
        events = []
        for plan in catalog.plan_events(series, index, an_event, self.seed):
            event = Event(plan)
            for number, market_plan in enumerate(catalog.plan_markets(plan, an_event, self.seed)):
                market = kept.get(market_plan.ticker) if kept else None
                if market is None:
                    market = self._new_market(number, event, market_plan)
                else:
                    market.event = event
                    if market.closing_clock:
                        market.next_round()
                    market.built, market.closing_clock = False, 0
                    market.status, market.close_s, market.result = "initialized", plan.close_s, ""
                    market.settled_s = market.determined_s = 0
                    market.row_parts = None
                self._enter(market)
            self.events[event.ticker] = event
            events.append(event)
        return events

    def _fate(self, event: Event) -> list[tuple[int, Happening]]:
        """Return all that will ever happen to an event after its creation, in order."""
        plan = event.plan
        rng = random.Random(f"{self.seed}/{plan.ticker}/fate")
        determined_s, settled_s = _fate(rng, plan)
        steps = [(plan.open_s, Happening.OPENED), (plan.ends_s, Happening.CLOSED), (determined_s, Happening.DETERMINED),
                 (settled_s, Happening.SETTLED), (settled_s + KEPT_AFTER_SETTLEMENT_S, Happening.DROPPED)]  # fmt: skip
        if plan.series.rhythm is catalog.Rhythm.QUARTER:
            # The strike of a 15-minute market is known only when it opens.
            steps.append((plan.open_s, Happening.RENAMED))
        if plan.series.rhythm is catalog.Rhythm.GAME:
            interrupted_s = plan.ends_s - rng.randint(600, 6_000)
            steps += [(plan.ends_s, Happening.DATE_UPDATED), (interrupted_s, Happening.DEACTIVATED),
                      (interrupted_s + rng.randint(30, 180), Happening.ACTIVATED),
                      (plan.ends_s - 9_000, Happening.FEE_SET), (plan.ends_s, Happening.FEE_CLEARED)]  # fmt: skip
        return sorted(steps)

    def _push(self, at_s: int, what: Happening, event: Event, market: Market | None) -> None:
        self._tie += 1
        heapq.heappush(self._due, (at_s, what, self._tie, what, event, market))

    def _catch_up(self, event: Event) -> None:
        """Bring a newly listed event to the state that it has now, silently, and schedule the rest."""
        for at_s, what in self._fate(event):
            if at_s > self.now_s:
                self._push(at_s, what, event, None)
            else:
                self._happen(what, event, None, at_s, silent=True)
        for market in event.markets:
            if market.status in ("active", "inactive"):
                market.built = True

    def _happen(
        self, what: Happening, event: Event, market: Market | None, at_s: int, *, silent: bool = False
    ) -> Iterable[Change]:
        changes = []
        rng = random.Random(f"{self.seed}/{event.ticker}/{what}")
        if what is Happening.DROPPED:
            self._ordered = False
            for dropped in event.markets:
                self.markets.pop(dropped.ticker, None)
                self.by_index.pop(dropped.index, None)
                self.by_id.pop(dropped.market_id, None)
            self.events.pop(event.ticker, None)
            return [Change(what, event, None, at_s)]
        if what in (Happening.FEE_SET, Happening.FEE_CLEARED):
            return [Change(what, event, None, at_s)]
        for each in [market] if market else event.markets:
            if what is Happening.OPENED:
                each.status = "active"
                each.updated_s = at_s
            elif what is Happening.RENAMED:
                each.updated_s = at_s
            elif what is Happening.DEACTIVATED:
                each.status, each.updated_s = "inactive", at_s
            elif what is Happening.ACTIVATED:
                each.status, each.updated_s = "active", at_s
            elif what is Happening.DATE_UPDATED:
                each.close_s = at_s
                each.updated_s = at_s
            elif what is Happening.CLOSED:
                each.status = "closed"
                if silent:
                    continue
                # The exchange sends an empty book some seconds after the close, now and then twice.
                empties_s = at_s + min(25, max(1, round(rng.lognormvariate(1.86, 0.7))))
                for _ in range(2 if rng.random() < 0.14 else 1):
                    self._push(empties_s, Happening.EMPTIED, event, each)
                    empties_s += 2
            elif what is Happening.DETERMINED:
                each.status, each.determined_s, each.updated_s = "determined", at_s, at_s
                each.result = "yes" if rng.random() * ONE_DOLLAR < each.plan.centre else "no"
            elif what is Happening.SETTLED:
                each.status, each.settled_s, each.updated_s = "finalized", at_s, at_s
            each.row_parts = None
            changes.append(Change(what, event, each, at_s))
        if what in (Happening.OPENED, Happening.DEACTIVATED, Happening.ACTIVATED, Happening.CLOSED):
            self.version += 1
        return changes
