"""Which rows a day keeps and in which order: pure rules over the rows of some markets, all of each market together.

Exactly one row for each thing that happened: trades by trade id; everything else from the first connection of its shard,
where that has a hole from the second, and at the day's edges from the neighbouring days' connections. A row belongs to the day
whose window holds its event time (the receive time where the exchange gives none). Not for reading or writing files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.exchange import Row

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NORMALISED, DUPLICATE, OTHER_DAY, OPENING_FOLD = range(4)
"""What became of a row."""

FIRST, SECOND, NEIGHBOUR_FIRST, NEIGHBOUR_SECOND, REST = range(5)
"""Ranks of connections: of several copies of one thing the lowest rank's is kept."""

NULL = int(np.iinfo(np.int64).min)
"""Stands for null among integers."""
SAME_NS = 10_000_000_000
"""Without a time of the exchange's, equal messages of two connections within 10 s are one thing."""
SNAPSHOT_LAG_NS = 5_000_000_000
"""A snapshot is received at most so long behind the event time of the connection's next change."""

VALUES: Mapping[str, tuple[str, ...]] = {
    "orderbook": ("kind", "clock", "side", "price", "size"),
    "ticker": (
        "price", "yes_bid", "yes_ask", "yes_bid_size", "yes_ask_size", "last_trade_size", "volume", "open_interest",
        "dollar_volume", "dollar_open_interest", "clock", "ts_ns",
    ),
    "lifecycle": (
        "message_type", "event_type", "event_ticker", "series_ticker", "title", "open_ns", "close_ns", "determination_ns",
        "settled_ns", "result", "settlement_value", "is_deactivated", "exchange_index", "price_level_structure", "detail",
    ),
}  # fmt: skip
"""The columns that tell one thing from another, beside market and event time."""


class Spans(NamedTuple):
    """Intervals that do not overlap, in order; `[from_ns, to_ns)`."""

    from_ns: Integers
    to_ns: Integers

    def hold(self, at_ns: Integers, margin_ns: int = 0) -> Mask:
        """Tell of each instant whether it is inside of one, or within the margin of its ends."""
        if not len(self.from_ns):
            return np.zeros(len(at_ns), np.bool_)
        began = np.searchsorted(self.from_ns, at_ns + margin_ns, side="right") - 1
        inside: Mask = (began >= 0) & (at_ns < self.to_ns[np.maximum(began, 0)] + margin_ns)
        return inside


def spans(intervals: Iterable[tuple[int, int]]) -> Spans:
    """Return the union of intervals."""
    merged: list[list[int]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], high)
        elif low < high:
            merged.append([low, high])
    return Spans(np.array([low for low, _ in merged], np.int64), np.array([high for _, high in merged], np.int64))


def holes(lives: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what the union of intervals leaves open, from the beginning of time to its end."""
    covered = spans(lives)
    limit = 2**62
    edges = [-limit, *(int(at) for pair in zip(*covered, strict=True) for at in pair), limit]
    return [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high]


class Connections(NamedTuple):
    """What is known of connections, by code: rank, place in time, and for second ones when the first had a hole."""

    rank: Integers
    place: Integers
    filling: Mapping[int, Spans]


class Filed(NamedTuple):
    """The answer for the rows of some markets.

    `order` are the rows to write, in the table's order; `event_ns` and `outcome` are of all rows. A row of a neighbouring
    day that is not wanted is a duplicate. `folded` are rows to write before the others of their market.
    """

    order: Integers
    event_ns: Integers
    outcome: npt.NDArray[np.int8]
    folded: Sequence[Row] = ()


def integers(column: pa.ChunkedArray | pa.Array) -> Integers:
    """Return a column as integers, texts as codes of this very table, null as `NULL`."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_string(array.type):
        array = array.dictionary_encode()
    if pa.types.is_dictionary(array.type):
        array = array.indices
    if array.type != pa.int64():
        array = array.cast(pa.int64())
    numbers: Integers = pc.fill_null(array, NULL).to_numpy(zero_copy_only=False)
    return numbers


def market_ranks(rows: pa.Table) -> Integers:
    """Return per row the place of its ticker among all tickers of the table, by code point."""
    encoded = rows["ticker"].combine_chunks()
    names = encoded.dictionary.to_pylist()
    place = np.empty(len(names), np.int64)
    place[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    ranks: Integers = place[encoded.indices.to_numpy()]
    return ranks


class _Rows:
    """The columns that every rule looks at."""

    def __init__(self, rows: pa.Table, conns: Connections) -> None:
        self.table = rows
        self.conn = integers(rows["conn"])
        self.rank = conns.rank[self.conn]
        self.place = conns.place[self.conn]
        self.n = integers(rows["n"])
        self.recv_ns = integers(rows["recv_ns"])
        self.stated_ns = integers(rows["event_ns"])
        self.event_ns = np.where(self.stated_ns == NULL, self.recv_ns, self.stated_ns)
        self.market = market_ranks(rows)

    def ints(self, name: str) -> Integers:
        """Return a column as integers."""
        return integers(self.table[name])


def _within(window: Window, event_ns: Integers) -> Mask:
    inside: Mask = (event_ns >= window.open_ns) & (event_ns < window.close_ns)
    return inside


def file_trades(table: pa.Table, conns: Connections, window: Window) -> Filed:
    """Keep one row per trade id: the lowest rank's first. The kept row's time decides whether it is of this day."""
    rows = _Rows(table, conns)
    ids = rows.ints("trade_id")
    by_id = np.lexsort((rows.n, rows.place, rows.rank, ids))
    first = np.ones(len(by_id), np.bool_)
    first[1:] = ids[by_id][1:] != ids[by_id][:-1]
    outcome = np.full(len(by_id), DUPLICATE, np.int8)
    kept = by_id[first]
    outcome[kept] = np.where(_within(window, rows.event_ns[kept]), NORMALISED, OTHER_DAY)
    kept = np.flatnonzero(outcome == NORMALISED)
    order = kept[np.lexsort(tuple(a[kept] for a in (rows.n, rows.place, rows.event_ns, rows.market)))]
    return Filed(order, rows.event_ns, outcome)


def file_changes(name: str, table: pa.Table, conns: Connections, window: Window) -> Filed:
    """File the rows of `orderbook` or `ticker`.

    The caller has left out what second connections have while the first is whole. Order books are in the order in which
    they can be replayed: by event time, then the exchange's clock, a snapshot behind the changes that it holds.
    """
    rows = _Rows(table, conns)
    count = len(rows.n)
    seq, sid = rows.ints("seq"), rows.ints("sid")
    clock = rows.ints("clock")
    if name == "orderbook":
        msg = rows.ints("msg")
        kinds = table["kind"].combine_chunks()
        texts = kinds.dictionary.to_pylist()
        snapshot = kinds.indices.to_numpy() == (texts.index("snapshot") if "snapshot" in texts else -1)
    else:
        msg, snapshot = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    base = np.lexsort((msg, rows.n, rows.place, rows.market))
    if snapshot.any():
        _place_snapshots(rows, base, snapshot, clock)
    event_ns = rows.event_ns
    outcome = np.full(count, NORMALISED, np.int8)
    own = rows.rank <= SECOND
    outcome[~_within(window, event_ns) & ~snapshot] = OTHER_DAY
    if name == "orderbook":
        outcome[own & (event_ns < window.open_ns)] = OPENING_FOLD
    for code, filling in conns.filling.items():
        mine = (rows.conn == code) & snapshot & (outcome == NORMALISED)
        if mine.any():
            outcome[mine & ~filling.hold(rows.recv_ns)] = DUPLICATE
    outcome[~own & snapshot] = DUPLICATE
    if (rows.rank > FIRST).any():
        values = [rows.ints(value) for value in VALUES[name]]
        compared = ~snapshot & (outcome != DUPLICATE)
        outcome[_repeated(rows, base, compared, values) & (outcome == NORMALISED)] = DUPLICATE
    unruly = _unruly(rows, base, event_ns, clock, seq, sid)
    if unruly.any():
        outcome[_sent_twice(rows, unruly, seq, sid) & (outcome == NORMALISED)] = DUPLICATE
    order = base[outcome[base] == NORMALISED]
    if unruly.any():
        again = unruly[order]
        some = order[again]
        behind = snapshot & (clock != NULL)  # without clocks the order of arrival is all there is
        keys = (msg, rows.n, seq, rows.place, behind, clock, event_ns, rows.market)
        order[again] = some[np.lexsort(tuple(key[some] for key in keys))]
    if name == "ticker":
        same = _same_as_before(rows, order, [event_ns, rows.conn, *(rows.ints(value) for value in VALUES[name])])
        outcome[order[same]] = DUPLICATE
        order = order[~same]
    folded = _fold(rows, base, outcome, snapshot, window.open_ns) if name == "orderbook" else ()
    return Filed(order, event_ns, outcome, folded)


def _place_snapshots(rows: _Rows, base: Integers, snapshot: Mask, clock: Integers) -> None:
    """Give each snapshot an event time between those of the connection's changes around it.

    A snapshot has only a receive time, which is later than the event times of the changes behind it; sorted by that it
    would stand behind changes that it does not hold.
    """
    market, place = rows.market[base], rows.place[base]
    is_change, at = ~snapshot[base], np.arange(len(base))
    event_ns, recv_ns, clocks = rows.event_ns[base], rows.recv_ns[base], clock[base]
    following = np.minimum.accumulate(np.where(is_change, at, len(base))[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(is_change, at, -1))
    which = np.flatnonzero(~is_change)
    at_ns = recv_ns[which]

    def of_same(index: Integers) -> tuple[Integers, Mask]:
        safe = np.clip(index, 0, len(base) - 1)
        same = (index >= 0) & (index < len(base)) & (market[safe] == market[which]) & (place[safe] == place[which])
        return safe, same

    index, same = of_same(following[which])
    later = (clocks[index] > clocks[which]) | (clocks[index] == NULL) | (clocks[which] == NULL)
    sane = same & later & (at_ns - event_ns[index] <= SNAPSHOT_LAG_NS)
    at_ns = np.where(sane, np.minimum(at_ns, event_ns[index]), at_ns)
    index, same = of_same(preceding[which])
    sane = same & (event_ns[index] - recv_ns[which] <= SNAPSHOT_LAG_NS)
    at_ns = np.where(sane, np.maximum(at_ns, event_ns[index]), at_ns)
    rows.event_ns[base[which]] = at_ns


def _repeated(rows: _Rows, base: Integers, compared: Mask, values: list[Integers]) -> Mask:
    """Tell which rows the first connections, or one that comes before among the others, have as well.

    Where one connection has a thing twice and another once, one of the two is repeated: all connections are sent the same.
    """
    repeated = np.zeros(len(base), np.bool_)
    asked = compared & (rows.rank > FIRST)
    if not asked.any():
        return repeated
    low, high = rows.event_ns[asked].min(), rows.event_ns[asked].max()
    some = base[(compared & (rows.event_ns >= low) & (rows.event_ns <= high))[base]]
    keys = [rows.market[some], rows.event_ns[some], *(value[some] for value in values)]
    by_thing = np.lexsort(tuple(reversed(keys)))
    new = np.zeros(len(some), np.bool_)
    new[:1] = True
    for key in keys:
        new[1:] |= key[by_thing][1:] != key[by_thing][:-1]
    thing = np.empty(len(some), np.int64)
    thing[by_thing] = np.cumsum(new) - 1
    rank, place = rows.rank[some], rows.place[some]
    group = np.where(rank == FIRST, -1, rank * (int(place.max()) + 1) + place)
    order = np.lexsort((group, thing))
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (thing[order][1:] != thing[order][:-1]) | (group[order][1:] != group[order][:-1])
    starts = np.flatnonzero(begins)
    counts = np.diff(np.append(starts, len(order)))
    of_run = np.cumsum(begins) - 1
    # Per connection and thing, in order: how often a connection before it has the thing at most.
    things, more = thing[order][starts], int(counts.max()) + 1
    most = np.maximum.accumulate(things * more + counts)
    had = np.zeros(len(starts), np.int64)
    same = things[1:] == things[:-1]
    had[1:][same] = (most[:-1] - things[1:] * more)[same]
    repeated[some[order]] = np.arange(len(order)) - starts[of_run] < had[of_run]
    return repeated


def _unruly(rows: _Rows, base: Integers, event_ns: Integers, clock: Integers, seq: Integers, sid: Integers) -> Mask:
    """Tell which rows are of markets whose rows, connection by connection as they came, are not in the table's order."""
    market = rows.market[base]
    same = market[1:] == market[:-1]
    time, clocks = event_ns[base], clock[base]
    wrong = same & (time[1:] < time[:-1])
    wrong |= same & (time[1:] == time[:-1]) & (clocks[1:] < clocks[:-1])
    place, number, sids, n = rows.place[base], seq[base], sid[base], rows.n[base]
    sequel = same & (place[1:] == place[:-1]) & (sids[1:] == sids[:-1]) & (number[1:] != NULL) & (n[1:] != n[:-1])
    wrong |= sequel & (number[1:] <= number[:-1])
    bad = np.zeros(int(market.max(initial=0)) + 1, np.bool_)
    bad[market[1:][wrong]] = True
    unruly: Mask = bad[rows.market]
    return unruly


def _sent_twice(rows: _Rows, unruly: Mask, seq: Integers, sid: Integers) -> Mask:
    """Tell which records come under a sequence number that their connection's subscription had before."""
    twice = np.zeros(len(seq), np.bool_)
    some = np.flatnonzero(unruly & (seq != NULL))
    order = some[np.lexsort((rows.n[some], seq[some], sid[some], rows.conn[some]))]
    same = np.ones(max(len(order) - 1, 0), np.bool_)
    for key in (rows.conn, sid, seq):
        same &= key[order][1:] == key[order][:-1]
    starts = np.flatnonzero(np.concatenate(([True], ~same))) if len(order) else np.zeros(0, np.int64)
    first_n = rows.n[order][starts][np.cumsum(np.concatenate(([True], ~same))) - 1] if len(order) else rows.n[order]
    twice[order] = rows.n[order] != first_n
    return twice


def _same_as_before(rows: _Rows, order: Integers, keys: list[Integers]) -> Mask:
    same = np.zeros(len(order), np.bool_)
    near = np.flatnonzero(
        (rows.market[order][1:] == rows.market[order][:-1]) & (keys[0][order][1:] == keys[0][order][:-1])
    )
    for key in keys:
        near = near[key[order[near + 1]] == key[order[near]]]
    same[near + 1] = True
    return same


def _fold(rows: _Rows, base: Integers, outcome: npt.NDArray[np.int8], snapshot: Mask, open_ns: int) -> list[Row]:
    """Return one snapshot per market, as the first connection's earlier frames left its book when the day opened.

    A market without a snapshot before the opening has none: what its changes changed is not known.
    """
    early = base[(outcome == OPENING_FOLD)[base]]
    if not snapshot[early].any():
        return []
    early = early[_of_newest_book(rows, early, snapshot[early])]
    market = rows.market[early]
    last = early[np.flatnonzero(np.append(market[1:] != market[:-1], True))]
    columns = ["ticker", "recv_ns", "conn", "n", "sid", "seq", "clock", "market_id"]
    books: dict[str, dict[tuple[str, int], int]] = {}
    taken = rows.table.select(["ticker", "side", "price", "size"]).take(pa.array(early))
    sums = taken.filter(pc.is_valid(taken["side"])).group_by(["ticker", "side", "price"]).aggregate([("size", "sum")])
    for row in sums.to_pylist():
        books.setdefault(row["ticker"], {})[row["side"], row["price"]] = row["size_sum"]
    lasts = rows.table.select(columns).take(pa.array(last)).to_pylist()
    return [
        level
        for row in sorted(lasts, key=lambda row: str(row["ticker"]))
        for level in _folded(row, books.get(row["ticker"], {}), open_ns)
    ]


def _of_newest_book(rows: _Rows, early: Integers, snapshot: Mask) -> Mask:
    """Tell which rows make a market's newest book: its last snapshot by the best connection, and that one's changes since."""
    market, rank, conn, n = (values[early] for values in (rows.market, rows.rank, rows.conn, rows.n))
    at, markets = np.arange(len(early)), int(market.max()) + 1
    best = np.full(markets, REST + 1)
    np.minimum.at(best, market[snapshot], rank[snapshot])
    wanted = snapshot & (rank == best[market])
    newest = np.full(markets, -1)
    np.maximum.at(newest, market[wanted], at[wanted])
    newest = newest[market]
    same = (newest >= 0) & (conn == conn[newest])
    kept: Mask = same & np.where(snapshot, n == n[newest], at > newest)
    return kept


def _folded(last: Row, book: Mapping[tuple[str, int], int], open_ns: int) -> list[Row]:
    levels: list[tuple[str | None, int | None, int | None]] = [
        (side, price, size)
        for (side, price), size in sorted(book.items(), key=lambda item: (item[0][0] != "yes", item[0][1]))
        if size > 0
    ]
    levels = levels or [(None, None, None)]
    return [
        last
        | {"event_ns": open_ns, "kind": "snapshot", "side": side, "price": price, "size": size}
        | {"msg": at, "last": at == len(levels) - 1}
        for at, (side, price, size) in enumerate(levels)
    ]


def file_lifecycle(table: pa.Table, conns: Connections, window: Window) -> Filed:
    """File the rows of `lifecycle`: the exchange gives them no time, so copies are known by what they say and when.

    A thing's time is the earliest receive time of its copies, whichever day's connection that was on, so that both days
    file it alike.
    """
    rows = _Rows(table, conns)
    count = len(rows.n)
    outcome = np.full(count, NORMALISED, np.int8)
    keys = [rows.market, *(rows.ints(value) for value in VALUES["lifecycle"])]
    if (rows.rank > FIRST).any() and count:
        order = np.lexsort((rows.n, rows.recv_ns, *reversed(keys)))
        new = np.zeros(count, np.bool_)
        new[:1] = True
        for key in keys:
            new[1:] |= key[order][1:] != key[order][:-1]
        group: list[int] = []
        for at, begins in zip(order.tolist(), new.tolist(), strict=True):
            if group and (
                begins or rows.recv_ns[at] - rows.recv_ns[group[0]] > SAME_NS or rows.rank[at] in rows.rank[group]
            ):
                _one_thing(rows, group, outcome)
                group = []
            group.append(at)
        _one_thing(rows, group, outcome)
    inside = _within(window, rows.event_ns)
    outcome[(outcome == NORMALISED) & ~inside] = OTHER_DAY
    kept = np.flatnonzero(outcome == NORMALISED)
    order = kept[np.lexsort(tuple(a[kept] for a in (rows.n, rows.place, rows.event_ns, rows.market)))]
    return Filed(order, rows.event_ns, outcome)


def _one_thing(rows: _Rows, copies: list[int], outcome: npt.NDArray[np.int8]) -> None:
    kept = min(copies, key=lambda at: int(rows.rank[at]))
    rows.event_ns[kept] = min(int(rows.event_ns[at]) for at in copies)
    for at in copies:
        if at != kept:
            outcome[at] = DUPLICATE
