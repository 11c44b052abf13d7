"""Order books of a recorded day: one at an instant, or the best levels over time, from the rows of `orderbook`.

A book is known from a snapshot on until a hole begins; inside a hole, up to the next snapshot, it is not known, and that is
said rather than guessed. Both sides hold bids: on Kalshi a NO bid at 0.40 is a YES ask at 0.60.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ssmd_dagster.archive.reader import coverage_of, known_hole, listed_of, select
from ssmd_dagster.archive.recorded import Recorded, find
from ssmd_dagster.archive.selection import Selection
from ssmd_dagster.archive.tables import CONTRACTS, DOLLARS, NANOSECONDS
from ssmd_dagster.errors import NotFoundError, RefusedError, SsmdError, UsageError

CHANNEL, TABLE = "orderbook_delta", "orderbook"
MICROS = 1_000_000
"""A YES and a NO contract together pay one dollar."""
SEAM_NS = 10_000_000_000
"""How far two connections' receive times of the same change may lie apart where one continues the other."""

_COLUMNS = ("event_ns", "recv_ns", "conn", "n", "seq", "source", "kind", "clock", "side", "price", "size", "msg")
_SIDES = ("yes", "no")

Ints = npt.NDArray[np.int64]


class BookUnknownError(RefusedError):
    """The book at that instant is not known: it lies before the first snapshot, or in a hole."""


class BookBrokenError(SsmdError):
    """The rows of the table contradict each other: a level would become negative."""


class BookBrokenWarning(UserWarning):
    """A book is not known from a record on that contradicts those before it, until its next snapshot."""


class Level(NamedTuple):
    """A price in micro-dollars, on its own side's scale, and the contracts bid there, in hundredths."""

    price: int
    size: int


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """One market's order book at an instant.

    `yes` and `no` are bids, best first. `snapshot_ns` is the event time of the snapshot that it starts from, `changed_ns` that of
    the latest change in it, `changes` how many were applied. `holes` are the rows of coverage that make it unknown; with any of
    them it is what was last known with all that came since, not what the exchange had.
    """

    ticker: str
    at_ns: int
    yes: tuple[Level, ...]
    no: tuple[Level, ...]
    snapshot_ns: int
    changed_ns: int
    changes: int
    clock: int | None = None
    holes: tuple[dict[str, Any], ...] = ()

    @property
    def known(self) -> bool:
        """Say whether no hole lies between the snapshot and the instant."""
        return not self.holes

    @property
    def best_bid(self) -> Level | None:
        """Return the best bid for YES, None where there is none."""
        return self.yes[0] if self.yes else None

    @property
    def best_ask(self) -> Level | None:
        """Return the best offer of YES (the best bid for NO, seen from the other side), None where there is none."""
        return Level(MICROS - self.no[0].price, self.no[0].size) if self.no else None


def book_at(
    env_or_path: str | Path,
    ticker: str,
    at_ns: int,
    depth: int | None = None,
    *,
    allow_unknown: bool = False,
    revision: int | None = None,
) -> Book:
    """Rebuild a market's book at an instant: all changes whose event time is not after it.

    Args:
        env_or_path: As for `load`.
        ticker: A market.
        at_ns: Nanoseconds since the Unix epoch, UTC; the day whose window holds it is found.
        depth: At most so many levels a side; None is all.
        allow_unknown: Give a book inside a hole too, marked by its `holes`.
        revision: As for `load`.

    Raises:
        BookUnknownError: The instant lies before the first snapshot or, unless allowed, in a hole; or a hole may have swallowed
            all that there was of a listed market.
        BookBrokenError: The rows contradict each other; names the record.
        NotFoundError: No recorded day holds the instant, or the market has no book in it.
    """
    if depth is not None and depth < 1:
        raise UsageError(f"a depth of {depth} levels", do="Give 1 or more, or none for all")
    recorded = find(env_or_path)
    selection = _day_of(recorded, ticker, at_ns, allow_unknown, revision)
    rows = selection.read(_COLUMNS)
    if not len(rows):
        rows = _rows(selection._replace(to_ns=None), at_ns)  # later ones say from when on there is a book
    return book_from(rows, ticker, at_ns, depth, holes=_holes(selection), allow_unknown=allow_unknown)


def book_from(
    rows: pa.Table,
    ticker: str,
    at_ns: int,
    depth: int | None = None,
    *,
    holes: Sequence[dict[str, Any]] = (),
    allow_unknown: bool = False,
) -> Book:
    """Rebuild a book from rows of `orderbook`, all of one market, in any order; see `book_at`.

    `holes` are rows of `coverage` of the order book's channel that say `missing`, of all markets or of this one.
    """
    feed = _Feed.of(rows.filter(pc.field("event_ns") <= at_ns), ticker)
    begin = int(feed.snapshot_starts[-1]) if len(feed.snapshot_starts) else None
    if begin is None:
        first = rows.filter(pc.field("kind").cast(pa.string()) == "snapshot")
        known = (
            f"its first snapshot is of {_time(pc.min(first['event_ns']).as_py())}"
            if len(first)
            else "there is no snapshot of it up to then"
        )
        inside = [_hole(hole) for hole in holes if hole["from_ns"] <= at_ns < hole["to_ns"]]
        raise BookUnknownError(
            f"the book of {ticker} is not known at {_time(at_ns)}: {'; '.join([known, *inside])}",
            do="Ask for a later instant",
        )
    # A snapshot received inside a hole ends it for its market: only what began after it counts.
    since = [hole for hole in holes if feed.recv_ns[begin] <= hole["from_ns"] <= at_ns]
    if since and not allow_unknown:
        raise _unknown(ticker, at_ns, since)
    sides, prices, sizes = feed.levels_after(begin)
    deltas = feed.is_delta[begin:]
    clocks = feed.clock[begin:][feed.clock[begin:] >= 0]
    per_side = []
    for side in range(len(_SIDES)):
        mine = (sides == side) & (sizes > 0)
        order = np.argsort(-prices[mine])
        levels = zip(prices[mine][order].tolist(), sizes[mine][order].tolist(), strict=True)
        per_side.append(tuple(Level(*level) for level in levels)[:depth])
    return Book(
        ticker=ticker,
        at_ns=at_ns,
        yes=per_side[0],
        no=per_side[1],
        snapshot_ns=int(feed.event_ns[begin]),
        changed_ns=int(feed.event_ns[begin:].max()),
        changes=int(deltas.sum()),
        clock=int(clocks.max()) if len(clocks) else None,
        holes=tuple(since),
    )


def top_of_book(env_or_path: str | Path, ticker: str, date: str, *, revision: int | None = None) -> pa.Table:
    """Return the best bid and ask of a market whenever they changed on a day.

    Columns: `event_ns`, `recv_ns`, `known`, `bid`, `bid_size`, `ask`, `ask_size`; prices in micro-dollars for YES, sizes in
    hundredths of a contract, null where the side is empty. Where a hole begins there is a row with `known` false and nulls;
    the next row is that of the next snapshot. A record that contradicts those before it begins a hole too, with a
    `BookBrokenWarning` that names it. Raises what `depth_of_book` raises.
    """
    rows = depth_of_book(env_or_path, ticker, date, 1, revision=revision)
    return rows.rename_columns([name.removesuffix("_1") for name in rows.column_names])


def depth_of_book(
    env_or_path: str | Path, ticker: str, date: str, depth: int, *, revision: int | None = None
) -> pa.Table:
    """Return the best `depth` levels of each side of a market whenever they changed on a day.

    As `top_of_book`, with columns `bid_1`, `bid_size_1`, `ask_1`, `ask_size_1`, `bid_2` and so on.

    Raises:
        NotFoundError: The day is not recorded, or the market has no book in it.
        BookUnknownError: A listed market has no row, and the day has holes.
    """
    if not 1 <= depth <= 100:
        raise UsageError(f"a depth of {depth} levels", do="Give 1 to 100")
    selection = select(find(env_or_path), date, TABLE, tickers=ticker, on_gap="ignore", revision=revision)
    selection = selection._replace(
        to_ns=_window(selection)[1]
    )  # snapshots that came behind it are the next day's to show
    return depth_from(_rows(selection), ticker, depth, holes=_holes(selection))


def depth_from(rows: pa.Table, ticker: str, depth: int, *, holes: Sequence[dict[str, Any]] = ()) -> pa.Table:
    """Return the best levels over time from rows of `orderbook`, all of one market; see `depth_of_book`."""
    columns: list[list[Any]] = [[] for _ in range(3 + 4 * depth)]
    last: tuple[Any, ...] | None = None
    for event_ns, recv_ns, yes, no in _folded(_Feed.of(rows, ticker), holes):
        if yes is None or no is None:
            best: tuple[Any, ...] = (False, *[None] * 4 * depth)
        else:
            best = (True, *_best(yes, no, depth))
        if best == last:
            continue
        last = best
        for column, value in zip(columns, (event_ns, recv_ns, *best), strict=True):
            column.append(value)
    return pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, _depth_schema(depth), strict=True)],
        schema=_depth_schema(depth),
    )


class _Ladder:
    """One side of a book: the sizes by price, and the prices in order."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.prices: list[int] = []

    def set(self, price: int, size: int) -> None:
        if size == 0:
            if self.sizes.pop(price, None) is not None:
                del self.prices[bisect_left(self.prices, price)]
            return
        if price not in self.sizes:
            insort(self.prices, price)
        self.sizes[price] = size


def _best(yes: _Ladder, no: _Ladder, depth: int) -> Iterator[int | None]:
    for rank in range(1, depth + 1):
        bid = yes.prices[-rank] if len(yes.prices) >= rank else None
        ask = no.prices[-rank] if len(no.prices) >= rank else None
        yield bid
        yield None if bid is None else yes.sizes[bid]
        yield None if ask is None else MICROS - ask
        yield None if ask is None else no.sizes[ask]


def _folded(feed: _Feed, holes: Sequence[dict[str, Any]]) -> Iterator[tuple[int, int, _Ladder | None, _Ladder | None]]:
    """Yield times and both sides after every record; None while the book is not known. The sides are changed in place."""
    waiting = sorted({hole["from_ns"] for hole in holes}, reverse=True)
    sides: tuple[_Ladder, _Ladder] | None = None
    rows = zip(
        feed.event_ns.tolist(),
        feed.recv_ns.tolist(),
        feed.is_delta.tolist(),
        feed.side.tolist(),
        feed.price.tolist(),
        feed.size.tolist(),
        feed.record_ends.tolist(),
        strict=True,
    )
    begins = True
    for index, (event_ns, recv_ns, delta, side, price, size, ends) in enumerate(rows):
        while waiting and waiting[-1] < recv_ns:
            from_ns = waiting.pop()
            if sides is not None:
                sides = None
                yield from_ns, from_ns, None, None
        if not delta and begins:
            sides = (_Ladder(), _Ladder())
        begins = ends
        if sides is None:
            continue
        if side >= 0:
            ladder = sides[side]
            now = size + (ladder.sizes.get(price, 0) if delta else 0)
            if now < 0:
                warnings.warn(str(feed.broken(index, now)), BookBrokenWarning, stacklevel=2)
                sides = None
                yield event_ns, recv_ns, None, None
                continue
            ladder.set(price, now)
        if ends:
            yield event_ns, recv_ns, *sides
    if sides is not None and waiting:
        yield waiting[-1], waiting[-1], None, None


class _Feed(NamedTuple):
    """One market's rows as arrays, in the order in which they change the book.

    `side` is 0 for yes, 1 for no, -1 in the one row of an empty snapshot; `clock` and `seq` are -1 where there is none.
    """

    ticker: str
    conns: tuple[str, ...]
    event_ns: Ints
    recv_ns: Ints
    conn: Ints
    n: Ints
    seq: Ints
    clock: Ints
    side: Ints
    price: Ints
    size: Ints
    is_delta: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, rows: pa.Table, ticker: str) -> _Feed:
        """Put rows in order: each connection's by its ordinals, connections where their receive times meet.

        A connection that goes on where another one stopped may have received the same instant a little earlier or later: see
        `_stitched`.
        """
        fold = pc.equal(rows["source"].cast(pa.string()), "opening_fold").to_numpy()
        names = rows["conn"].cast(pa.string()).combine_chunks().dictionary_encode()
        known: list[str] = names.dictionary.to_pylist()
        # The fold stands for all that came before the day: a connection of its own, before the others.
        conn = np.where(fold, len(known), names.indices.to_numpy()).astype(np.int64)
        ints = {
            name: _ints(rows[name]) for name in ("event_ns", "recv_ns", "n", "seq", "clock", "price", "size", "msg")
        }
        is_delta = pc.equal(rows["kind"].cast(pa.string()), "delta").to_numpy()
        sides = rows["side"].cast(pa.string())
        side = pc.fill_null(pc.index_in(sides, pa.array(_SIDES)), -1).to_numpy().astype(np.int64)
        order = np.lexsort((ints["msg"], ints["n"], np.where(fold, -1, conn)))
        at = np.where(fold, ints["event_ns"], ints["recv_ns"])[order]
        for one in np.unique(conn):
            mine = conn[order] == one
            at[mine] = np.maximum.accumulate(
                at[mine]
            )  # a stepped clock does not put a connection's records out of order
        if fold.any():
            opened = ints["event_ns"][fold].max()
            later = (ints["event_ns"] >= opened)[order] & ~fold[order]
            at[later] = np.maximum(at[later], opened)
        by_time = np.argsort(at, kind="stable")
        order, at = order[by_time], at[by_time]
        feed = cls(
            ticker=ticker,
            conns=(*known, "of the opening fold"),
            event_ns=ints["event_ns"][order],
            recv_ns=ints["recv_ns"][order],
            conn=conn[order],
            n=ints["n"][order],
            seq=ints["seq"][order],
            clock=ints["clock"][order],
            side=side[order],
            price=ints["price"][order],
            size=ints["size"][order],
            is_delta=is_delta[order],
        )
        return feed if len(np.unique(conn)) < 2 else feed._stitched(at)

    @property
    def record_ends(self) -> npt.NDArray[np.bool_]:
        """Say of each row whether it is the last one of its record."""
        ends = np.ones(len(self.n), np.bool_)
        if len(ends) > 1:
            ends[:-1] = (self.n[1:] != self.n[:-1]) | (self.conn[1:] != self.conn[:-1])
        return ends

    @property
    def snapshot_starts(self) -> Ints:
        """Return where snapshots begin."""
        starts = np.ones(len(self.n), np.bool_)
        starts[1:] = self.record_ends[:-1]
        return np.flatnonzero(starts & ~self.is_delta)

    def levels_after(self, begin: int) -> tuple[Ints, Ints, Ints]:
        """Return sides, prices and sizes of all levels after the rows from `begin`, a snapshot's first, on; empty ones too.

        Raises:
            BookBrokenError: A level becomes negative on the way.
        """
        rows = begin + np.flatnonzero(self.side[begin:] >= 0)
        key = self.price[rows] * len(_SIDES) + self.side[rows]
        order = np.argsort(key, kind="stable")
        key, rows = key[order], rows[order]
        running = np.cumsum(self.size[rows])
        first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.array([], np.int64)
        before = np.where(first > 0, running[first - 1], 0) if len(first) else first
        running = running - np.repeat(before, np.diff(np.r_[first, len(key)]))
        negative = np.flatnonzero(running < 0)
        if len(negative):
            worst = negative[np.argmin(rows[negative])]
            raise self.broken(int(rows[worst]), int(running[worst]))
        last = np.r_[first[1:], len(key)] - 1 if len(first) else first
        return key[last] % len(_SIDES), key[last] // len(_SIDES), running[last]

    def broken(self, index: int, size: int) -> BookBrokenError:
        """Make the error of a row that takes more from a level than is there."""
        seq = f", seq {self.seq[index]}" if self.seq[index] >= 0 else ""
        return BookBrokenError(
            f"the level {_SIDES[self.side[index]]} {self.price[index] / MICROS:.4f} of {self.ticker} would hold "
            f"{size / 100:.2f} contracts",
            where=f"connection {self.conns[self.conn[index]]}, record n {self.n[index]}{seq}",
            do="A change before it is missing, or was counted twice: `ssmd day verify` reads the raw files again",
        )

    def _stitched(self, at: Ints) -> _Feed:
        """Put right what two connections' receive times got wrong around each snapshot.

        Which changes of another connection a snapshot holds the exchange's clock says, and before there was one the event
        times: a snapshot's own is none later than its connection's next change. The fold holds what came before the day.
        """
        place = np.arange(len(self.n), dtype=np.float64)
        keep = np.ones(len(self.n), np.bool_)
        ends = np.flatnonzero(self.record_ends)
        for begin in self.snapshot_starts:
            end = int(ends[np.searchsorted(ends, begin)])
            low, high = np.searchsorted(at, [at[begin] - SEAM_NS, at[begin] + SEAM_NS + 1])
            near = np.arange(low, high)
            near = near[self.is_delta[near] & (self.conn[near] != self.conn[begin])]
            fold = self.conn[begin] == len(self.conns) - 1
            held = self.event_ns[near] < self.event_ns[begin] + (not fold)
            if self.clock[begin] >= 0:
                held = np.where(self.clock[near] >= 0, self.clock[near] <= self.clock[begin], held)
            keep[near[held & (near > end)]] = False
            place[near[~held & (near < begin)]] = end + 0.5
        order = np.argsort(place, kind="stable")
        order = order[keep[order]]
        return self._replace(**{name: getattr(self, name)[order] for name in self._fields[2:]})


def _rows(selection: Selection, at_ns: int | None = None) -> pa.Table:
    """Read the rows of a market; where there are none, say why, as far as holes up to an instant explain it."""
    rows = selection.read(_COLUMNS)
    if len(rows):
        return rows
    assert selection.tickers is not None
    (ticker,) = selection.tickers
    date = f" on {selection.files[0].date}" if selection.files else ""
    holes = [hole for hole in _holes(selection) if at_ns is None or hole["from_ns"] <= at_ns]
    if holes and listed_of(selection, [ticker]) != set():
        raise BookUnknownError(
            f"the book of {ticker} is not known{date}: there is no row of it; {'; '.join(map(_hole, holes))}",
            where=selection.recorded.name,
            do="See which intervals are missing: coverage(…)",
        )
    raise NotFoundError(
        f"{ticker} has no order book{date}",
        where=selection.recorded.name,
        do="See which markets there are: load(…, 'security_master')",
    )


def _day_of(recorded: Recorded, ticker: str, at_ns: int, allow_unknown: bool, revision: int | None) -> Selection:
    """Find the day whose window holds an instant: windows need not be dates of UTC, so the neighbours are tried too."""
    utc = datetime.fromtimestamp(at_ns // 1_000_000_000, UTC).date()
    candidates = [(utc + timedelta(days=offset)).isoformat() for offset in (0, -1, 1)]
    there = [date for date in candidates if recorded.file(date, TABLE) is not None]
    for date in there:
        selection = select(
            recorded,
            date,
            TABLE,
            tickers=ticker,
            on_gap="ignore",
            revision=revision,
        )
        open_ns, close_ns = _window(selection)
        if open_ns <= at_ns < close_ns:
            return selection._replace(to_ns=at_ns + 1)
    if there:
        raise NotFoundError(
            f"no recorded day holds {_time(at_ns)}", where=recorded.name, do=f"Tried {', '.join(there)}"
        )
    return select(recorded, candidates[0], TABLE, tickers=ticker)  # raises what there is to say of that day


def _window(selection: Selection) -> tuple[int, int]:
    stated = selection.stated()
    return int(stated["ssmd.open_ns"]), int(stated["ssmd.close_ns"])


def _holes(selection: Selection) -> list[dict[str, Any]]:
    recorded = selection.recorded
    files = [found for file in selection.files if (found := recorded.file(file.date, "coverage", file.as_of))]
    if len(files) < len(selection.files):
        raise NotFoundError("the day has no table coverage, so nobody knows its holes", where=recorded.name)
    rows = coverage_of(recorded, files, [CHANNEL], selection.tickers).to_pylist()
    return [row for row in rows if known_hole(row, None, None)]


def _unknown(ticker: str, at_ns: int, holes: Iterable[dict[str, Any]]) -> BookUnknownError:
    told = "; ".join(map(_hole, holes))
    return BookUnknownError(
        f"the book of {ticker} is not known at {_time(at_ns)}: {told}, and no snapshot since",
        do="Ask for an instant before the hole or after the next snapshot, or allow an unknown book",
    )


def _hole(hole: dict[str, Any]) -> str:
    return f"{hole['cause']} from {_time(hole['from_ns'])} to {_time(hole['to_ns'])}"


def _time(at_ns: int) -> str:
    return f"{np.datetime64(at_ns, 'ns').astype('datetime64[ms]')}Z"


def _ints(column: pa.ChunkedArray) -> Ints:
    values: Ints = pc.fill_null(column, -1).to_numpy().astype(np.int64)
    return values


def _depth_schema(depth: int) -> pa.Schema:
    fields = [
        pa.field("event_ns", pa.int64(), metadata={"unit": NANOSECONDS}),
        pa.field("recv_ns", pa.int64(), metadata={"unit": NANOSECONDS}),
        pa.field("known", pa.bool_()),
    ]
    for rank in range(1, depth + 1):
        for name in ("bid", "ask"):
            fields.append(pa.field(f"{name}_{rank}", pa.int64(), metadata={"unit": DOLLARS}))
            fields.append(pa.field(f"{name}_size_{rank}", pa.int64(), metadata={"unit": CONTRACTS}))
    return pa.schema(fields)
