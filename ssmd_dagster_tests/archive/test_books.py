"""Order books rebuilt from the table `orderbook`: against a naive fold, over seams of connections, in and out of holes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.books import (
    BookBrokenError,
    BookBrokenWarning,
    BookUnknownError,
    Level,
    book_at,
    book_from,
    depth_from,
    depth_of_book,
    top_of_book,
)
from ssmd_dagster.archive.recorded import DayNotFoundError
from ssmd_dagster.archive.tables import table_from_rows
from ssmd_dagster.errors import NotFoundError, UsageError
from ssmd_dagster_tests.archive.recorded_days import DATE, OPEN_NS, SECOND, Shelf, hole

TICKER = "KX-A"
LAG_NS = 5_000_000
Levels = Mapping[tuple[str, int], int]


def at(seconds: float) -> int:
    """Return an instant of the day."""
    return OPEN_NS + round(seconds * SECOND)


def row(kind: str, seconds: float, n: int, **more: Any) -> dict[str, Any]:
    """Return a row of `orderbook`, received 5 ms after its event unless it says otherwise."""
    found = {"ticker": TICKER, "kind": kind, "event_ns": at(seconds), "recv_ns": at(seconds) + LAG_NS, "n": n}
    return {**found, "conn": "7-a-1", "seq": n, "source": "live", "last": True, "msg": 0, **more}


def snapshot(seconds: float, n: int, levels: Levels, **more: Any) -> list[dict[str, Any]]:
    """Return the rows of a snapshot; its event time is its receive time."""
    more = {"recv_ns": at(seconds), **more}
    if not levels:
        return [row("snapshot", seconds, n, **more)]
    return [
        row("snapshot", seconds, n, side=side, price=price, size=size, msg=index, last=index == len(levels) - 1, **more)
        for index, ((side, price), size) in enumerate(levels.items())
    ]


def delta(seconds: float, n: int, side: str, price: int, size: int, **more: Any) -> dict[str, Any]:
    """Return the row of a change."""
    return row("delta", seconds, n, side=side, price=price, size=size, **more)


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return rows as the file has them: by event time."""
    return table_from_rows("orderbook", rows).sort_by("event_ns")


PLAIN = [
    *snapshot(1, 0, {("yes", 400_000): 1_000, ("yes", 390_000): 500, ("no", 550_000): 700}),
    delta(2, 1, "yes", 410_000, 300),
    delta(3, 2, "yes", 400_000, -1_000),
    delta(3, 3, "no", 560_000, 200),
]


def test_a_book_is_the_snapshot_with_all_changes_up_to_the_instant() -> None:
    """Best levels first; an emptied level is gone; the ask of YES is the other side of the best bid for NO."""
    book = book_from(table(PLAIN), TICKER, at(3))
    assert book.yes == (Level(410_000, 300), Level(390_000, 500))
    assert book.no == (Level(560_000, 200), Level(550_000, 700))
    assert (book.best_bid, book.best_ask) == (Level(410_000, 300), Level(440_000, 200))
    assert (book.snapshot_ns, book.changed_ns, book.changes, book.known) == (at(1), at(3), 3, True)
    earlier = book_from(table(PLAIN), TICKER, at(3) - 1, depth=1)
    assert earlier.yes == (Level(410_000, 300),)
    assert earlier.changes == 1


def test_an_empty_snapshot_is_an_empty_book() -> None:
    """That is what a market that closed looks like."""
    book = book_from(table([*PLAIN, *snapshot(9, 8, {})]), TICKER, at(9))
    assert (book.yes, book.no, book.best_bid, book.best_ask) == ((), (), None, None)


def test_changes_that_the_exchange_made_before_a_snapshot_was_received_are_not_lost() -> None:
    """A change whose event time lies before the snapshot's receive time but that came after it on the wire counts."""
    rows = [*snapshot(5, 10, {("yes", 400_000): 100}), delta(4.999, 11, "yes", 400_000, 50)]
    assert book_from(table(rows), TICKER, at(6)).yes == (Level(400_000, 150),)
    assert depth_from(table(rows), TICKER, 1)["bid_size_1"].to_pylist() == [100, 150]


def test_a_stepped_clock_of_the_recorder_does_not_disorder_a_connection() -> None:
    """The ordinal decides, not the receive time that jumped back."""
    rows = [
        *snapshot(5, 10, {("yes", 400_000): 100}, recv_ns=at(60)),
        delta(6, 11, "yes", 400_000, -100, recv_ns=at(6)),
        delta(7, 12, "yes", 400_000, 30, recv_ns=at(7)),
    ]
    assert book_from(table(rows), TICKER, at(8)).yes == (Level(400_000, 30),)


def test_the_opening_fold_begins_the_day() -> None:
    """It outdoes the connection's own earlier snapshot, whatever its ordinal says."""
    rows = [
        *snapshot(-60, 3, {("yes", 100_000): 9}),
        *snapshot(0, 3, {("yes", 400_000): 100}, source="opening_fold", recv_ns=at(-1)),
        delta(0.001, 4, "yes", 400_000, -40, recv_ns=at(-0.1)),
    ]
    assert book_from(table(rows), TICKER, at(1)).yes == (Level(400_000, 60),)
    assert book_from(table(rows), TICKER, at(-30)).yes == (Level(100_000, 9),)


def test_a_second_connection_goes_on_where_the_first_stopped() -> None:
    """Its changes count once: those that the next snapshot holds by the exchange's clock are left out, newer ones kept."""
    rows = [
        *snapshot(1, 0, {("yes", 400_000): 100}, clock=10),
        delta(2, 1, "yes", 400_000, 10, clock=11),
        delta(3, 900, "yes", 400_000, 20, clock=12, conn="7-b-1"),
        delta(9.998, 901, "yes", 400_000, 40, clock=13, conn="7-b-1", recv_ns=at(10) + 3_000_000),
        delta(9.999, 902, "yes", 300_000, 7, clock=15, conn="7-b-1", recv_ns=at(10) - 2_000_000),
        *snapshot(10, 0, {("yes", 400_000): 170}, clock=14, conn="7-a-2"),
        delta(11, 1, "yes", 400_000, -70, clock=16, conn="7-a-2"),
    ]
    assert book_from(table(rows), TICKER, at(4)).yes == (Level(400_000, 130),)
    last = book_from(table(rows), TICKER, at(12))
    assert last.yes == (Level(400_000, 100), Level(300_000, 7))
    assert last.clock == 16
    assert depth_from(table(rows), TICKER, 2)["bid_size_1"].to_pylist() == [100, 110, 130, 170, 170, 100]


def test_a_book_in_a_hole_is_not_served_as_if_it_were_known() -> None:
    """From the hole's beginning to the next snapshot; on request it is given, marked with the hole."""
    lost = [hole("orderbook_delta", 2.5, 4)]
    rows = table([*PLAIN, *snapshot(6, 9, {("yes", 100_000): 1})])
    assert book_from(rows, TICKER, at(2), holes=lost).known
    with pytest.raises(
        BookUnknownError, match=r"not known at 2025-12-14T00:00:05\.000Z: connection_lost from .*00:00:02\.500Z"
    ):
        book_from(rows, TICKER, at(5), holes=lost)
    doubtful = book_from(rows, TICKER, at(5), holes=lost, allow_unknown=True)
    assert not doubtful.known
    assert doubtful.holes[0]["cause"] == "connection_lost"
    assert book_from(rows, TICKER, at(6), holes=lost).known
    told = depth_from(rows, TICKER, 1, holes=lost).to_pylist()
    assert [(r["event_ns"], r["known"], r["bid_1"]) for r in told] == [
        (at(1), True, 400_000),
        (at(2), True, 410_000),
        (at(2.5), False, None),
        (at(6), True, 100_000),
    ]


def test_a_hole_after_the_last_record_ends_the_table() -> None:
    """What nobody saw is not known to have stayed."""
    told = depth_from(table(PLAIN), TICKER, 1, holes=[hole("orderbook_delta", 50, 60)]).to_pylist()
    assert (told[-1]["event_ns"], told[-1]["known"], told[-1]["bid_1"]) == (at(50), False, None)


def test_nothing_is_known_before_the_first_snapshot() -> None:
    """The error says when it came."""
    with pytest.raises(BookUnknownError, match="its first snapshot is of 2025-12-14T00:00:01"):
        book_from(table(PLAIN), TICKER, at(0.5), allow_unknown=True)
    with pytest.raises(BookUnknownError, match="there is no snapshot of it up to then"):
        book_from(table([delta(2, 1, "yes", 410_000, 300)]), TICKER, at(5))


def test_a_negative_level_names_the_record() -> None:
    """Even where later changes make up for it."""
    rows = table([*PLAIN, delta(4, 17, "yes", 390_000, -501, seq=99), delta(5, 18, "yes", 390_000, 501)])
    words = r"the level yes 0\.3900 of KX-A would hold -0\.01 contracts"
    with pytest.raises(BookBrokenError, match=words) as caught:
        book_from(rows, TICKER, at(6))
    assert caught.value.where == "connection 7-a-1, record n 17, seq 99"


def test_a_contradiction_ends_what_is_known_until_the_next_snapshot() -> None:
    """One record's fault does not take the rest of the day away, and is told."""
    back = snapshot(6, 19, {("yes", 100_000): 100})
    rows = table([*PLAIN, delta(4, 17, "yes", 390_000, -501), delta(5, 18, "yes", 390_000, 501), *back])
    with pytest.warns(BookBrokenWarning, match=r"yes 0\.3900 of KX-A would hold -0\.01 contracts.*record n 17"):
        told = depth_from(rows, TICKER, 1).to_pylist()
    assert [(r["event_ns"], r["known"], r["bid_1"]) for r in told] == [
        (at(1), True, 400_000),
        (at(2), True, 410_000),
        (at(3), True, 410_000),
        (at(4), False, None),
        (at(6), True, 100_000),
    ]


_changes = st.lists(
    st.tuples(st.sampled_from(["yes", "no"]), st.integers(1, 6), st.integers(-300, 300), st.integers(0, 3)), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(_changes, st.lists(st.integers(0, 60), max_size=3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_books_equal_a_naive_fold(
    changes: list[tuple[str, int, int, int]], snapshots: list[int], depth: int, rnd: random.Random
) -> None:
    """At every instant, whatever the order of the rows in the file, and so does the table of the best levels."""
    naive: dict[tuple[str, int], int] = {}
    rows = list(snapshot(0, 0, naive, recv_ns=at(0)))
    states = {0: dict(naive)}
    now, n = 0, 0
    for index, (side, cents, size, step) in enumerate(changes):
        key = (side, cents * 10_000)
        size = max(size, -naive.get(key, 0))
        now, n = now + step, n + 1
        rows.append(delta(now, n, *key, size))
        naive[key] = naive.get(key, 0) + size
        naive = {k: v for k, v in naive.items() if v}
        if index in snapshots:
            n += 1
            rows += snapshot(now, n, naive, recv_ns=at(now) + LAG_NS, event_ns=at(now))
        states[now] = dict(naive)
    rnd.shuffle(rows)
    made = table_from_rows("orderbook", rows)
    best = depth_from(made, TICKER, depth)
    for instant, state in states.items():
        book = book_from(made, TICKER, at(instant))
        sides = {
            name: sorted(((price, size) for (side, price), size in state.items() if side == name), reverse=True)
            for name in ("yes", "no")
        }
        assert [tuple(level) for level in book.yes] == sides["yes"]
        assert [tuple(level) for level in book.no] == sides["no"]
        told = best.filter(pc.field("event_ns") <= at(instant)).to_pylist()[-1]
        for rank in range(1, depth + 1):
            yes, no = (sides[name][rank - 1] if len(sides[name]) >= rank else (None, None) for name in ("yes", "no"))
            assert (told[f"bid_{rank}"], told[f"bid_size_{rank}"]) == yes
            ask = None if no[0] is None else 1_000_000 - no[0]
            assert (told[f"ask_{rank}"], told[f"ask_size_{rank}"]) == (ask, no[1])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """A day with the books of three markets."""
    rows = [{**one, "ticker": f"KX-{name}"} for name in "ABC" for one in PLAIN]
    return Shelf(tmp_path).put({"orderbook": rows, "security_master": []})


def test_a_book_of_a_recorded_day_is_found_by_its_instant(shelf: Shelf) -> None:
    """The day is the one whose window holds it; the table of the best levels is for a whole day."""
    assert book_at(shelf.folder, "KX-B", at(3)).best_bid == Level(410_000, 300)
    assert book_at(shelf.folder, "KX-B", at(86_399), depth=1).yes == (Level(410_000, 300),)
    tops = top_of_book(shelf.folder, "KX-B", DATE)
    assert tops.column_names == ["event_ns", "recv_ns", "known", "bid", "bid_size", "ask", "ask_size"]
    assert tops["ask"].to_pylist() == [450_000, 450_000, 440_000]
    assert depth_of_book(shelf.folder, "KX-B", DATE, 2).num_columns == 11


def test_the_best_levels_of_a_day_end_with_it(shelf: Shelf) -> None:
    """A snapshot that its connection was sent behind the close is in the table, but shows another day's book."""
    before = top_of_book(shelf.folder, "KX-B", DATE)
    rows = [{**one, "ticker": "KX-B"} for one in [*PLAIN, *snapshot(86_401, 900, {("yes", 10_000): 100})]]
    shelf.write("orderbook", rows)
    assert top_of_book(shelf.folder, "KX-B", DATE).to_pylist() == before.to_pylist()


def test_holes_of_a_recorded_day_come_from_its_coverage(shelf: Shelf) -> None:
    """Those of another market do not matter."""
    shelf.write("coverage", [hole("orderbook_delta", 10, 20, market="KX-B"), hole("trade", 10, 20)])
    assert book_at(shelf.folder, "KX-A", at(30)).known
    with pytest.raises(BookUnknownError):
        book_at(shelf.folder, "KX-B", at(30))
    assert not book_at(shelf.folder, "KX-B", at(30), allow_unknown=True).known


def test_a_book_whose_rows_are_all_in_a_hole_is_unknown(shelf: Shelf) -> None:
    """The hole is named; a market that was never listed has no book all the same."""
    shelf.write("coverage", [hole("orderbook_delta", 0, 86_400)])
    shelf.write("security_master", [{"ticker": "KX-Y", "source": "secmaster"}])
    for ask in (lambda: book_at(shelf.folder, "KX-Y", at(30)), lambda: top_of_book(shelf.folder, "KX-Y", DATE)):
        with pytest.raises(BookUnknownError, match=r"KX-Y is not known on 2025-12-14: there is no row of it; .* to "):
            ask()
    with pytest.raises(NotFoundError, match="KX-Z has no order book"):
        book_at(shelf.folder, "KX-Z", at(30))


def test_before_its_first_row_a_book_is_unknown(shelf: Shelf) -> None:
    """The answer says from when on there is one."""
    with pytest.raises(
        BookUnknownError, match=r"KX-A is not known at 2025-12-14T00:00:00.000Z: its first snapshot is of"
    ):
        book_at(shelf.folder, "KX-A", at(0))


def test_wrong_questions_have_clear_answers(shelf: Shelf) -> None:
    """A day that is not recorded, a market without a book, a depth of nothing, a day without coverage."""
    with pytest.raises(DayNotFoundError, match="2025-12-20 is not recorded"):
        book_at(shelf.folder, "KX-A", at(6 * 86_400 + 5))
    with pytest.raises(NotFoundError, match="no recorded day holds 2025-12-15T00:00:05"):
        book_at(shelf.folder, "KX-A", at(86_405))
    with pytest.raises(NotFoundError, match="KX-Z has no order book on 2025-12-14"):
        book_at(shelf.folder, "KX-Z", at(3))
    with pytest.raises(UsageError, match="a depth of 0 levels"):
        book_at(shelf.folder, "KX-A", at(3), 0)
    with pytest.raises(UsageError, match="a depth of 500 levels"):
        depth_of_book(shelf.folder, "KX-A", DATE, 500)
    next(shelf.tables.rglob("coverage/**/data.parquet")).unlink()
    with pytest.raises(NotFoundError, match="nobody knows its holes"):
        book_at(shelf.folder, "KX-A", at(3))
