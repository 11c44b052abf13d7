"""Markets, books and time: rules that need no socket."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.simulator import catalog
from ssmd_dagster.simulator.catalog import SECOND_NS, Rhythm
from ssmd_dagster.simulator.tapes import ONE_DOLLAR, Tape, make_tapes
from ssmd_dagster.simulator.world import Happening, World

NOON_NS = calendar.timegm((2026, 11, 22, 12, 0, 0)) * SECOND_NS
DAY_NS = catalog.DAY_S * SECOND_NS


@given(st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_no_tape_ever_dips_below_zero_or_crosses(seed: int) -> None:
    """At every step each level is positive, the sides do not cross, the clock rises, and the end is the beginning."""
    for tapes in make_tapes.__wrapped__(seed).values():
        for tape in tapes:
            yes, no = dict(tape.start[0]), dict(tape.start[1])
            clock = 0
            for step, top in zip(tape.steps, tape.tops, strict=True):
                side = yes if step.yes_side else no
                side[step.price] = side.get(step.price, 0) + step.delta
                assert side[step.price] >= 0
                assert tape.grid.snap(step.price) == step.price
                if not side[step.price]:
                    del side[step.price]
                assert not yes or not no or max(yes) + max(no) < ONE_DOLLAR
                assert step.clock >= clock if step.chained else step.clock > clock
                clock = step.clock
                assert (top.yes_bid, top.no_bid) == (max(yes, default=0), max(no, default=0))
                if step.trade is not None:
                    assert step.delta == -step.trade.size
                    assert step.yes_side is not step.trade.taker_yes
                    at = step.price if step.yes_side else ONE_DOLLAR - step.price
                    assert step.trade.yes_price == at
            assert (yes, no) == tape.start


def test_books_have_sub_cent_prices_fractions_and_empty_sides() -> None:
    """The tapes hold what recorders get wrong: tenths of a cent, hundredths of a contract, a side without levels."""
    tapes: list[Tape] = [tape for each in make_tapes(1).values() for tape in each]
    steps = [step for tape in tapes for step in tape.steps]
    assert any(step.price % 100 for step in steps)
    assert 0.02 < sum(step.delta % 100 != 0 for step in steps) / len(steps) < 0.5
    sides = [side for tape in tapes for position in range(tape.length) for side in tape.book(position)]
    assert any(not side for side in sides)
    assert b'"yes_dollars_fp"' not in tapes[0].book_part(0, yes_scale=False) or tapes[0].book(0)[0]


@pytest.mark.parametrize("markets", [1, 12, 200, 5_000])
def test_about_so_many_markets_are_open_as_were_asked_for(markets: int) -> None:
    """From one to thousands, over series of several categories, with the daily series always among them."""
    world = World(5, markets, 1, NOON_NS)
    found = {series.ticker: len(open_now) for series, open_now in world.open_markets().items() if not series.combo}
    assert markets * 0.5 - 2 <= sum(found.values()) <= markets * 1.5 + 5
    assert found["KXBTCD"] > 0
    assert found["INXD"] > 0
    if markets >= 200:
        assert len({series.category for series in world.allotted}) >= 5


def test_the_same_seed_lists_the_same_markets() -> None:
    """Tickers, ids, strikes and books depend on the seed and the time alone."""
    one, two, other = (World(seed, 100, 1, NOON_NS) for seed in (5, 5, 6))
    assert {ticker: market.row() for ticker, market in one.markets.items()} == {
        ticker: market.row() for ticker, market in two.markets.items()
    }
    assert {m.market_id for m in one.markets.values()} != {m.market_id for m in other.markets.values()}


def test_tickers_have_dots_and_are_unique() -> None:
    """Strikes with decimals stand in tickers as on Kalshi, and no two markets share a name or an id."""
    world = World(5, 3_000, 1, NOON_NS)
    assert any("." in ticker for ticker in world.markets)
    assert len({market.market_id for market in world.markets.values()}) == len(world.markets)
    assert len({market.head for market in world.markets.values()}) == len(world.markets)


def test_a_day_brings_everything_in_order() -> None:
    """Over a day in small steps each market is created, opened, closed, emptied, determined and settled in this order."""
    world = World(5, 60, 1, NOON_NS)
    seen: dict[str, list[Happening]] = {}
    for minutes in range(0, 24 * 60, 5):
        for change in world.advance(NOON_NS + minutes * 60 * SECOND_NS):
            if change.market is not None:
                seen.setdefault(change.market.ticker, []).append(change.what)
    for happened in seen.values():
        # The empty snapshot comes when it comes: the market may be determined by then.
        in_order = [what for what in happened if what is not Happening.EMPTIED]
        assert in_order == sorted(in_order)
    quarter = [happened for ticker, happened in seen.items() if ticker.startswith("KXBTC15M")]
    assert len(quarter) > 90
    complete = [happened for happened in quarter if happened[0] is Happening.CREATED and Happening.SETTLED in happened]
    assert len(complete) > 80
    for happened in complete:
        assert set(happened) >= {Happening.OPENED, Happening.CLOSED, Happening.EMPTIED, Happening.DETERMINED}
        assert happened.count(Happening.EMPTIED) in (1, 2)


@given(st.integers(0, 400 * DAY_NS) | st.integers(-3 * DAY_NS, -2 * SECOND_NS), st.integers(0, 3 * DAY_NS))
@settings(max_examples=25, deadline=None)
def test_any_time_has_open_markets_and_true_statuses(first: int, then: int) -> None:
    """Wherever the clock is set, and after time has passed from there, the lists say what the times say."""
    world = World(5, 40, 1, NOON_NS)
    for now_ns in (NOON_NS + first, NOON_NS + first + then):
        world.advance(now_ns)
        now_s = now_ns // SECOND_NS
        by_status: dict[str, int] = {}
        for market in world.markets.values():
            by_status[market.status] = by_status.get(market.status, 0) + 1
            plan = market.event.plan
            if market.status == "initialized":
                assert plan.open_s > now_s
            elif market.status in ("active", "inactive"):
                assert plan.open_s <= now_s < plan.ends_s
            else:
                assert plan.ends_s <= now_s
        assert by_status["active"] >= 20
        found = world.open_markets()
        assert all(markets for series, markets in found.items() if series.rhythm is not Rhythm.GAME)


def test_going_back_and_forth_keeps_clocks_and_trades_apart() -> None:
    """A market that was closed and is open again, after the clock was set back, has a higher clock and new trade ids."""
    world = World(5, 40, 1, NOON_NS)
    market = next(
        m for m in world.markets.values() if m.status == "active" and m.event.plan.series.ticker == "KXBTC15M"
    )
    before = market.clock, market.trade_id()
    market.closing_clock = market.clock + 1
    world.advance(NOON_NS + 5 * DAY_NS)
    assert market.ticker not in world.markets
    world.advance(NOON_NS)
    again = world.markets[market.ticker]
    assert again.market_id == market.market_id
    assert again.clock > before[0]
    assert again.trade_id() != before[1]


def test_clocks_rise_over_restarts() -> None:
    """The next start of the same home begins all clocks above the last."""
    first, second = (World(5, 40, boot, NOON_NS) for boot in (1, 2))
    for ticker, market in first.markets.items():
        assert market.clock <= second.markets[ticker].clock
        if market.live:
            assert second.markets[ticker].clock > market.clock + 1_000_000_000
            assert second.markets[ticker].clock < 1 << 53


def test_the_thursday_pause_follows_eastern_time() -> None:
    """03:00 to 05:00 Eastern on Thursdays is 07:00–09:00 UTC in summer and 08:00–10:00 in winter."""
    for month, day, first_hour in ((7, 9, 7), (1, 8, 8)):
        for hour in range(24):
            at = datetime(2026, month, day, hour, 30, tzinfo=UTC)
            until_s = catalog.paused_until_s(int(at.timestamp()))
            assert (until_s is not None) == (first_hour <= hour < first_hour + 2)
            if until_s is not None:
                assert datetime.fromtimestamp(until_s, UTC).hour == first_hour + 2
    assert catalog.paused_until_s(int(datetime(2026, 7, 10, 8, 0, tzinfo=UTC).timestamp())) is None
