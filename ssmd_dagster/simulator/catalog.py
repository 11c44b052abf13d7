"""Which series the simulated exchange lists, and when their events are created, open and close.

Pure rules: series and an index in, times, tickers and words out. Not for the state of a market.
"""

from __future__ import annotations

import calendar
import math
import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from ssmd_dagster.simulator.tapes import DECI_CENT, LINEAR_CENT, TAPERED, Grid

EASTERN = ZoneInfo("America/New_York")
SECOND_NS = 1_000_000_000
DAY_S = 86_400
_QUARTER_S = 900
_FEWEST = 4
_COMBO_S = 6 * 3_600
_PLAYED_FROM_S = calendar.timegm((2021, 1, 1, 0, 0, 0))
_PLAYED_TO_S = calendar.timegm((2099, 1, 1, 0, 0, 0))


class Rhythm(StrEnum):
    """How a series' events follow each other."""

    QUARTER = "fifteen_min"
    DAILY = "daily"
    YEARLY = "annual"
    GAME = "custom"
    COMBO = "combo"


class Series(NamedTuple):
    """One series. `share` is its part of the markets (0: one market an event), `most` the limit of one event's markets."""

    ticker: str
    title: str
    category: str
    tags: tuple[str, ...]
    rhythm: Rhythm
    grid: Grid
    share: float = 0.0
    most: int = 100_000
    spot: float = 0.0
    step: float = 1.0
    close_hour: int = 17
    strike: str = "greater"
    shard: int = 0

    @property
    def combo(self) -> bool:
        """True for multivariate (KXMVE) series."""
        return self.rhythm is Rhythm.COMBO


CATALOG = (
    Series("KXBTC15M", "BTC up or down in 15 minutes", "Crypto", ("BTC",), Rhythm.QUARTER, DECI_CENT, spot=98_000, shard=2),
    Series("KXBTCD", "Bitcoin price above", "Crypto", ("BTC",), Rhythm.DAILY, LINEAR_CENT, 5, spot=98_249.99, step=250, shard=2),
    Series("INXD", "S&P 500 range", "Financials", ("S&P",), Rhythm.DAILY, TAPERED, 4, spot=6_912.5, step=12.5, close_hour=16,
           strike="between"),
    Series("KXETHD", "Ethereum price above", "Crypto", ("ETH",), Rhythm.DAILY, LINEAR_CENT, 2, spot=3_749.99, step=20, shard=2),
    Series("KXHIGHNY", "Highest temperature in NYC", "Climate and Weather", ("Daily temperature",), Rhythm.DAILY, LINEAR_CENT, 1,
           most=400, spot=53.5, step=1, close_hour=23, strike="between"),
    Series("KXNBAGAME", "Professional basketball game", "Sports", ("Basketball",), Rhythm.GAME, LINEAR_CENT, 2, most=800,
           strike="structured", shard=3),
    Series("KXFED", "Fed funds rate", "Economics", ("Fed",), Rhythm.YEARLY, TAPERED, 1, most=60, spot=3.75, step=0.25),
    Series("KXPRESPERSON", "Next president", "Elections", ("US Elections",), Rhythm.YEARLY, DECI_CENT, 1, most=300,
           strike="custom"),
    Series("KXETH15M", "ETH up or down in 15 minutes", "Crypto", ("ETH",), Rhythm.QUARTER, DECI_CENT, spot=3_700, shard=2),
    Series("KXSOL15M", "SOL up or down in 15 minutes", "Crypto", ("SOL",), Rhythm.QUARTER, DECI_CENT, spot=180, shard=2),
    Series("KXMVESPORTSMULTIGAME", "Combo", "Sports", (), Rhythm.COMBO, TAPERED, most=200, strike="custom", shard=1),
)  # fmt: skip
"""Fewer markets than series: the first ones of this list are kept."""


class EventPlan(NamedTuple):
    """One event to come. Times are whole seconds since the epoch; `ends_s` is when trading really ends."""

    series: Series
    ticker: str
    title: str
    sub_title: str
    created_s: int
    open_s: int
    close_s: int
    ends_s: int


class MarketPlan(NamedTuple):
    """One market of an event: its ticker, its words, its strike and where its price lives (1e-4 dollar)."""

    ticker: str
    title: str
    sub_title: str
    floor_strike: float | None
    cap_strike: float | None
    centre: int


def allot(markets: int, wanted: tuple[str, ...] = ()) -> dict[Series, int]:
    """Share out about `markets` open markets: markets of one event by series. Unknown names in `wanted` are ignored."""
    listed = [series for series in CATALOG if not wanted or series.ticker in wanted]
    plain = [series for series in listed if not series.combo]
    quarters = [series for series in plain if series.rhythm is Rhythm.QUARTER][: max(1, markets // 25)]
    chosen = dict.fromkeys(quarters, 1)
    left = max(_FEWEST, markets - len(quarters))
    sharing = [series for series in plain if series.share][: max(2, left // 8)]
    while sharing and left:
        total = sum(series.share for series in sharing)
        capped = [series for series in sharing if left * series.share / total > series.most * _open_events(series)]
        for series in capped or sharing:
            an_event = min(series.most, max(1, round(left * series.share / total / _open_events(series))))
            chosen[series] = an_event
        if not capped:
            break
        left -= sum(chosen[series] * _open_events(series) for series in capped)
        sharing = [series for series in sharing if series not in capped]
    for series in listed:
        if series.combo:
            chosen[series] = max(1, min(series.most, markets // 20))
    return chosen


def _open_events(series: Series) -> int:
    """Events of a series that are open at one time (of games: the markets of one game day count as one event)."""
    return {Rhythm.GAME: 3}.get(series.rhythm, 2)


def index_at(series: Series, at_s: int) -> int:
    """Return the index of the event that is on around an instant; neighbours in time are neighbours in index."""
    if series.rhythm is Rhythm.QUARTER:
        return at_s // _QUARTER_S
    if series.rhythm is Rhythm.COMBO:
        return at_s // _COMBO_S
    if series.rhythm is Rhythm.YEARLY:
        return datetime.fromtimestamp(at_s, UTC).year
    return at_s // DAY_S


def created_s(series: Series, index: int) -> int:
    """Return when the events of an index are created."""
    return _times(series, index)[0]


@lru_cache(maxsize=4096)
def _eastern_s(day: int, hour: int) -> int:
    """Seconds since the epoch of an hour, Eastern time, on a day counted from the epoch."""
    on = date(1970, 1, 1) + timedelta(days=day)
    return int(datetime(on.year, on.month, on.day, hour, tzinfo=EASTERN).timestamp())


def _times(series: Series, index: int) -> tuple[int, int, int]:
    """Return created, open, close of the events of an index, in seconds."""
    if series.rhythm is Rhythm.QUARTER:
        opens = index * _QUARTER_S
        return opens - _QUARTER_S, opens, opens + _QUARTER_S
    if series.rhythm is Rhythm.COMBO:
        opens = index * _COMBO_S
        return opens - 60, opens, opens + 2 * _COMBO_S
    if series.rhythm is Rhythm.YEARLY:
        opens = calendar.timegm((index - 1, 1, 1, 15, 0, 0))
        return opens - 7 * DAY_S, opens, calendar.timegm((index + 1, 1, 1, 4, 59, 0))
    close = _eastern_s(index, series.close_hour)
    if series.rhythm is Rhythm.GAME:
        # Listed to close two days after the game, and closed early when it is over.
        start = _eastern_s(index, 12)
        return start - 3 * DAY_S + 3_600, start - 3 * DAY_S + 5 * 3_600, start + 2 * DAY_S
    return close - 2 * DAY_S - 1_800, close - 2 * DAY_S, close


def plan_events(series: Series, index: int, an_event: int, seed: int) -> Iterator[EventPlan]:
    """Yield the events of one index: one, or the games of a day."""
    created, opens, closes = _times(series, index)
    close_et = datetime.fromtimestamp(closes, EASTERN)
    day = f"{close_et:%y}{close_et:%b}{close_et:%d}".upper()
    if series.rhythm is Rhythm.GAME:
        yield from _plan_games(series, index, an_event, seed)
        return
    if series.rhythm is Rhythm.QUARTER:
        suffix, words = f"{day}{close_et:%H%M}", f"{close_et:%b %d, %H:%M} ET"
    elif series.rhythm is Rhythm.YEARLY:
        suffix, words = f"{index % 100:02d}DEC31", f"Before {index + 1}"
    elif series.rhythm is Rhythm.COMBO:
        suffix, words = f"S{random.Random(f'{seed}/{series.ticker}/{index}').getrandbits(48):012X}", "Combo"
    elif series.close_hour == 17:
        suffix, words = f"{day}17", f"{close_et:%b %d, %Y} at 5pm EDT"
    else:
        suffix, words = day, f"On {close_et:%b %d, %Y}"
    yield EventPlan(
        series, f"{series.ticker}-{suffix}", f"{series.title} {words}?", words, created, opens, closes, closes
    )


_TEAMS = (
    *("ATL", "BOS", "BKN", "CHA", "CHI", "CLE", "DAL", "DEN", "DET", "GSW", "HOU", "IND", "LAC", "LAL", "MEM"),
    *("MIA", "MIL", "MIN", "NOP", "NYK", "OKC", "ORL", "PHI", "PHX", "POR", "SAC", "SAS", "TOR", "UTA", "WAS"),
)


def _plan_games(series: Series, index: int, an_event: int, seed: int) -> Iterator[EventPlan]:
    created, opens, closes = _times(series, index)
    rng = random.Random(f"{seed}/{series.ticker}/{index}")
    pairs = [(away, home) for away in _TEAMS for home in _TEAMS if away != home]
    first_day = datetime.fromtimestamp(_eastern_s(index, 12), EASTERN)
    for away, home in rng.sample(pairs, max(1, an_event // 2)):
        ends = _eastern_s(index, 12) + rng.randrange(2 * 3_600, 11 * 3_600)
        ticker = f"{series.ticker}-{f'{first_day:%y%b%d}'.upper()}{away}{home}"
        title = f"{away} at {home} winner?"
        yield EventPlan(series, ticker, title, f"{away} at {home}", created, opens, closes, ends)


def plan_markets(event: EventPlan, an_event: int, seed: int) -> Iterator[MarketPlan]:
    """Yield the markets of an event, the likeliest strike in the middle."""
    series = event.series
    rng = random.Random(f"{seed}/{event.ticker}")
    if series.rhythm is Rhythm.QUARTER:
        minutes = datetime.fromtimestamp(event.close_s, EASTERN).strftime("%M")
        strike = round(series.spot * (1 + rng.gauss(0, 0.01)), 2)
        words = f"${strike:,.2f} or above"
        yield MarketPlan(f"{event.ticker}-{minutes}", event.title, words, strike, None, rng.randrange(2_500, 7_500))
        return
    if series.rhythm is Rhythm.GAME:
        away, home = event.ticker[-6:-3], event.ticker[-3:]
        centre = rng.randrange(1_500, 8_500)
        yield MarketPlan(f"{event.ticker}-{away}", event.title, away, None, None, centre)
        yield MarketPlan(f"{event.ticker}-{home}", event.title, home, None, None, 10_000 - centre)
        return
    if series.strike == "custom":
        for number in range(an_event):
            code = f"{rng.getrandbits(44):011X}" if series.combo else f"P{number + 1:03d}"
            yield MarketPlan(f"{event.ticker}-{code}", event.title, f"Choice {number + 1}", None, None,
                             max(150, int(6_000 / (number + 1.6))))  # fmt: skip
        return
    step = min(series.step, series.spot * 1.6 / (an_event + 1))
    decimals = 2 if step >= 0.01 else 6
    middle = round(series.spot * (1 + rng.gauss(0, 0.01)) / step) * step
    middle += math.fmod(series.spot, step) if step == series.step else 0
    for number in range(an_event):
        floor = round(middle + (number - an_event // 2) * step, decimals)
        distance = (number - an_event // 2) / max(3.0, an_event / 8)
        if series.strike == "between":
            cap = round(floor + step - 10**-decimals, decimals)
            centre = int(4_000 * math.exp(-distance * distance)) + 150
            yield MarketPlan(
                f"{event.ticker}-B{_number(floor)}", event.title, f"{floor:,.2f} to {cap:,.2f}", floor, cap, centre
            )
        else:
            centre = int(10_000 / (1 + math.exp(distance)))
            yield MarketPlan(
                f"{event.ticker}-T{_number(floor)}", event.title, f"{floor:,.2f} or above", floor, None, centre
            )


def _number(strike: float) -> str:
    return f"{strike:.6f}".rstrip("0").rstrip(".")


def plan_played(tickers: tuple[str, ...]) -> list[tuple[EventPlan, list[MarketPlan]]]:
    """Return the events and markets of a recording; they are open for ever. Series and event are read off the tickers."""
    events: dict[str, list[str]] = {}
    for ticker in tickers:
        events.setdefault(ticker.rpartition("-")[0] or ticker, []).append(ticker)
    plans = []
    for event_ticker, market_tickers in events.items():
        name = event_ticker.partition("-")[0]
        series = Series(name, f"Recorded {name}", "Recorded", (), Rhythm.YEARLY, LINEAR_CENT)
        event = EventPlan(
            series, event_ticker, event_ticker, "", _PLAYED_FROM_S, _PLAYED_FROM_S, _PLAYED_TO_S, _PLAYED_TO_S
        )
        plans.append((event, [MarketPlan(ticker, ticker, ticker, None, None, 5_000) for ticker in market_tickers]))
    return plans


def paused_until_s(at_s: int) -> int | None:
    """Return the end of Thursday's trading pause (03:00–05:00 Eastern) if an instant is in it."""
    local = datetime.fromtimestamp(at_s, EASTERN)
    if local.weekday() == calendar.THURSDAY and 3 <= local.hour < 5:
        return int(local.replace(hour=5, minute=0, second=0, microsecond=0).timestamp())
    return None
