"""Which intervals of a day were recorded, per channel and market, and what became of the rest.

One pure function over what the recorder noted: when its connections lived, and its gaps. Not here: reading either, nor
what follows from a hole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.events import Gap
from ssmd_dagster.exchange import REST

State = Literal["present", "missing", "healed", "repaired"]

REPAIRABLE = "trade"
"""The only channel that the exchange gives again over REST."""
TRADES_REPAIRED = "trades repaired"
"""Detail of a gap that stays, since books and tickers cannot be had again, though its trades were fetched."""

_CONN = re.compile(r"[0-9]+-(?P<replica>[a-z]+)(?P<slice>[0-9]*)-[0-9]+")
_COMPONENT = re.compile(r"connector-(?P<replica>[a-z]+)(?P<slice>[0-9]*)")


class Life(NamedTuple):
    """An interval in which a connection recorded some channels: from fully subscribed to its last frame."""

    conn: str
    channels: tuple[str, ...]
    from_ns: int
    to_ns: int


class CoverageRow(NamedTuple):
    """One row of the table `coverage`. `market` None: all markets of the channel, other rows' markets aside.

    `cause` and `gap_id` are None where `state` is present; `gap_id` also where no gap explains a hole.
    """

    channel: str
    market: str | None
    from_ns: int
    to_ns: int
    state: State
    cause: str | None
    gap_id: str | None


def coverage_rows(
    window: Window, lives: Iterable[Life], gaps: Iterable[Gap], channels: Sequence[str]
) -> list[CoverageRow]:
    """Divide the window of each channel into intervals and say of each what is there.

    Connections of shards `a`, `b` (and of `a2`, `b2`) record the same markets, so a hole of one in which the other recorded
    is healed; those of `a` and `a2` record different ones, so a hole of either is a hole of the channel. What a connection of
    the shard `rest` fetched of a channel repairs its holes. Gaps of single markets become rows of those markets.

    Args:
        window: The day's.
        lives: In any order; what lies outside the window is cut off. Names of the connections are `{epoch}-{shard}-{k}`.
        gaps: In any order; an open one lasts to the end of the window.
        channels: Those that the day was to record; each gets rows.

    Returns:
        Per channel, in the order given: rows of all markets that fill the window without overlap, then those of single
        markets by market and time.
    """
    lives = [life for life in lives if life.from_ns < life.to_ns]
    gaps = list(gaps)
    rows: list[CoverageRow] = []
    for channel in channels:
        mine = [life for life in lives if channel in life.channels]
        concerned = [gap for gap in gaps if gap.scope.get("channel", channel) == channel]
        whole = [gap for gap in concerned if not _markets(gap)]
        rows += _merged(_intervals(channel, window, mine, whole))
        rows += sorted(
            CoverageRow(channel, market, from_ns, to_ns, _state(gap, channel), gap.cause, gap.gap_id)
            for gap in concerned
            for market in _markets(gap)
            if (from_ns := max(gap.from_ns, window.open_ns)) < (to_ns := min(_end(gap, window), window.close_ns))
        )
    return rows


def _intervals(channel: str, window: Window, lives: list[Life], gaps: list[Gap]) -> Iterator[CoverageRow]:
    """Sweep over the window; between two instants at which anything begins or ends the answer is one and the same."""
    slices = {_slice(life.conn) for life in lives} - {None} or {""}
    edges: list[tuple[int, bool, Life | Gap]] = []
    for life in lives:
        edges += [(life.from_ns, True, life), (life.to_ns, False, life)]
    for gap in gaps:
        if gap.from_ns < _end(gap, window):
            edges += [(gap.from_ns, True, gap), (_end(gap, window), False, gap)]
    edges.sort(key=lambda edge: (edge[0], edge[1]))
    alive: list[Life] = []
    missing: list[Gap] = []
    at_ns = window.open_ns
    for edge_ns, begins, thing in edges:
        until_ns = min(edge_ns, window.close_ns)
        if until_ns > at_ns:
            yield _judged(channel, at_ns, until_ns, slices, alive, missing)
            at_ns = until_ns
        if isinstance(thing, Life):
            alive.append(thing) if begins else alive.remove(thing)
        else:
            missing.append(thing) if begins else missing.remove(thing)
    if at_ns < window.close_ns:
        yield _judged(channel, at_ns, window.close_ns, slices, alive, missing)


_RANK: dict[State, int] = {"present": 0, "healed": 1, "repaired": 2, "missing": 3}


def _judged(
    channel: str, from_ns: int, to_ns: int, slices: set[str | None], alive: list[Life], gaps: list[Gap]
) -> CoverageRow:
    """Return the worst of what can be said of each slice of markets over one stretch."""
    worst = CoverageRow(channel, None, from_ns, to_ns, "present", None, None)
    fetched = any(_slice(life.conn) is None for life in alive)
    for part in sorted(slices, key=str):
        concerned = [gap for gap in gaps if _concerns(gap, part)]
        recorded = [
            life
            for life in alive
            if _slice(life.conn) == part and not any(_spoils(gap, life.conn) for gap in concerned)
        ]
        gap = max(concerned, key=lambda gap: _RANK[_state(gap, channel)], default=None)
        state: State
        if recorded:
            state = "healed" if gap is not None else "present"
        elif fetched:
            state = "repaired"
        else:
            state = "missing" if gap is None else _state(gap, channel)
        if _RANK[state] > _RANK[worst.state]:
            # A hole that no gap explains: nobody recorded the channel then.
            cause, gap_id = (GapCause.NOT_CAPTURED, None) if gap is None else (gap.cause, gap.gap_id)
            worst = worst._replace(state=state, cause=cause, gap_id=gap_id)
    return worst


def _merged(rows: Iterable[CoverageRow]) -> Iterator[CoverageRow]:
    """Join neighbours that say the same."""
    last: CoverageRow | None = None
    for row in rows:
        if last is not None and last.to_ns == row.from_ns and last[4:] == row[4:]:
            last = last._replace(to_ns=row.to_ns)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


def _state(gap: Gap, channel: str) -> State:
    if gap.outcome == "healed":
        return "healed"
    repaired = gap.outcome == "repaired" or gap.detail == TRADES_REPAIRED
    return "repaired" if repaired and channel == REPAIRABLE else "missing"


def _markets(gap: Gap) -> tuple[str, ...]:
    """Return the markets that a gap is limited to; none where it concerns all, or more than it names."""
    if "market" in gap.scope:
        return (str(gap.scope["market"]),)
    return tuple(gap.scope.get("markets", ()))


def _end(gap: Gap, window: Window) -> int:
    return window.close_ns if gap.to_ns is None else gap.to_ns


def _slice(conn: str) -> str | None:
    """Return which part of the markets a connection records: `` for `812-a-3` and `812-b-1`, `2` for `812-a2-1`.

    None for one that fetches over REST.
    """
    match = _CONN.fullmatch(conn)
    if match is None or match["replica"] == REST:
        return None
    return match["slice"]


def _concerns(gap: Gap, part: str | None) -> bool:
    """Say whether a gap is one of a part of the markets; one that names neither connection nor connector is one of all."""
    if "conn" in gap.scope:
        return _slice(str(gap.scope["conn"])) == part
    match = _COMPONENT.fullmatch(str(gap.scope.get("component")))
    return match is None or match["slice"] == part


def _spoils(gap: Gap, conn: str) -> bool:
    """Say whether what a connection recorded meanwhile has the gap."""
    if "conn" in gap.scope:
        return bool(gap.scope["conn"] == conn)
    match = _COMPONENT.fullmatch(str(gap.scope.get("component")))
    return match is None or conn.split("-")[1] == f"{match['replica']}{match['slice']}"
