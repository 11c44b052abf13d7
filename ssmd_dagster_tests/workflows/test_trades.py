"""The exchange's list against the archive's trades: each kind of difference by itself, and what it makes of gaps.

The exchange is a list in memory; that the real requests are made is tested with the simulator in `test_verify`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from ssmd_dagster.archive.coverage import TRADES_REPAIRED
from ssmd_dagster.archive.trade_ids import TradeIds
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Gap, TradingDay
from ssmd_dagster.day.ledger import Ledger, TradesLedger
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ConfigurationError, SsmdError, UnreachableError
from ssmd_dagster.exchange import Covered, MarketSelection, TradePage, TradeQuery, TradesRead
from ssmd_dagster.kalshi.scaled import rfc3339_ns
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.trades import close_repaired_gaps, compare_trades, line_of
from ssmd_dagster.workflows.verify_sealed import again_with_trades, mending, missing_by_name
from ssmd_dagster_tests.capture.recordings import DATE, START_NS, build_segments, read_segments
from ssmd_dagster_tests.workflows.stored_days import ENV, a_day, book_frames, trade_frames

CLOSE_NS = START_NS + 60_000_000_000
WINDOW = Window(open_ns=START_NS, close_ns=CLOSE_NS)


def row(number: int, *, ticker: str = "KX-1", at: str = "2025-12-14T00:00:00.010000Z") -> dict[str, str]:
    """A trade of the exchange's list; numbers 1 to 20 are those of `trade_frames`."""
    return {"trade_id": f"00000000-0000-4000-8000-{number:012x}", "ticker": ticker, "created_time": at}


@dataclass
class ListedTrades:
    """An exchange that has a list of trades, and what it was asked for."""

    rows: list[dict[str, str]]
    error: SsmdError | None = None
    tape_pages: int = 1
    asked: list[TradeQuery] = field(default_factory=list)

    async def pages_of_tape(self, _from_ns: int, _to_ns: int) -> int:
        """Say how long the whole tape is."""
        return self.tape_pages

    async def trade_pages(self, query: TradeQuery, take: Callable[[TradePage], Awaitable[None]]) -> TradesRead:
        """Hand over what is of the interval, seven a page."""
        self.asked.append(query)
        if self.error is not None:
            raise self.error
        wanted = [r for r in self.rows if query.from_ns <= rfc3339_ns(r["created_time"]) < query.to_ns]
        wanted = [r for r in wanted if query.tickers is None or r["ticker"] in query.tickers]
        covered = Covered(endpoint="/x", ticker=None, selection="all", from_ns=0, to_ns=1, cutoff_ns=0)
        for start in range(0, len(wanted), 7):
            rows = wanted[start : start + 7]
            times = [rfc3339_ns(row["created_time"]) for row in rows]
            page = TradePage(
                endpoint="/x",
                params={},
                covered=covered,
                rows=json.dumps(rows).encode(),
                ids=[row["trade_id"] for row in rows],
                first_ns=min(times),
                last_ns=max(times),
                tickers=frozenset(["KX-1"]),
            )
            await take(page)
        return TradesRead(trades=len(wanted), pages=1, requests=1, cutoff_ns=0)

    async def close(self) -> None:
        """Nothing is open."""


class Book:
    """Keeps what is journaled."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.days: dict[str, TradingDay] = {}
        self.book = self

    async def append(self, _date: str, event: str, **fields: Any) -> None:
        """Take an event."""
        self.events.append((event, fields["data"]))


def desk_of(exchange: ListedTrades | SsmdError, channels: tuple[str, ...] = ("trade", "orderbook_delta")) -> Desk:
    """Return what `compare_trades` needs of a desk."""

    def open_exchange(_date: str) -> ListedTrades:
        if isinstance(exchange, SsmdError):
            raise exchange
        return exchange

    selection = MarketSelection()
    capture = SimpleNamespace(
        channels=channels, trades_settle_s=0, markets=SimpleNamespace(selection=lambda: selection)
    )
    env = SimpleNamespace(capture=capture, feed="kalshi", name=ENV)
    setting = SimpleNamespace(env=env, clock=lambda: CLOSE_NS, open_exchange=open_exchange)
    return cast("Desk", SimpleNamespace(setting=setting, book=Book(), window=lambda _day: WINDOW, env=ENV))


def day_with(*gaps: Gap) -> TradingDay:
    """An ENDING day with these gaps."""
    return TradingDay(
        env=ENV,
        date=DATE,
        state=DayState.ENDING,
        epoch=812,
        actor="test",
        gap_by_id={gap.gap_id: gap for gap in gaps},
        first_seq=1,
        last_seq=9,
        updated_ns=1,
    )


@pytest.fixture
def ids(tmp_path: Path) -> TradeIds:
    """The trades 1 to 20 of KX-1, captured from the beginning of the day."""
    return ids_of(tmp_path)


def ids_of(folder: Path, count: int = 20) -> TradeIds:
    """Read a day's trades back."""
    found = TradeIds("kalshi", START_NS, CLOSE_NS)
    segments = build_segments(folder, a_day(book_frames(), trade_frames(count)).batches(), env=ENV)
    assert read_segments(segments, env=ENV, see=found.see).faults == ()
    return found


async def compared(exchange: ListedTrades, ids: TradeIds) -> tuple[TradesLedger, str | None]:
    """Compare without recording anything."""
    done = await compare_trades(desk_of(exchange), day_with(), ids, repair=False, tell=lambda _text: None)
    assert not done.recorded
    return line_of(done, ids), done.why_not


def ledger(exchange: int, captured: int, missing: int = 0, extra: int = 0) -> TradesLedger:
    """A line of the ledger."""
    return TradesLedger(exchange=exchange, captured=captured, repaired=0, missing=missing, extra=extra)


LISTED = [row(number) for number in range(1, 21)]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (LISTED, ledger(20, 20)),
        ([*LISTED, *LISTED], ledger(20, 20)),
        ([*LISTED, row(99)], ledger(21, 20, missing=1)),
        ([*LISTED, row(99), row(99)], ledger(21, 20, missing=1)),
        (LISTED[3:], ledger(17, 17, extra=3)),
        ([*LISTED, row(99, ticker="KX-OTHER")], ledger(20, 20)),
        ([*LISTED, row(99, at="2025-12-13T23:59:59.999999Z")], ledger(20, 20)),
        ([*LISTED, row(99, at="2025-12-14T00:01:00.000000Z")], ledger(20, 20)),
        ([*LISTED[1:], row(1, at="2025-12-14T00:01:00.500000Z")], ledger(20, 20)),
        ([*LISTED[1:], row(1, at="2025-12-13T23:59:59.500000Z")], ledger(20, 20)),
    ],
    ids=[
        *("equal", "repeated", "missing", "missing-repeated", "extra", "other-market", "before", "after"),
        *("other-side-of-the-close", "other-side-of-the-opening"),
    ],
)
async def test_each_difference_is_counted_as_what_it_is(
    ids: TradeIds, rows: list[dict[str, str]], line: TradesLedger
) -> None:
    """Trades are the same by their id, whatever times the two sides give them; other markets and days are none of ours."""
    assert await compared(ListedTrades(rows), ids) == (line, None)


@pytest.mark.parametrize(
    "exchange",
    [
        ListedTrades([], error=UnreachableError("no answer from the exchange")),
        ListedTrades([]),
    ],
)
async def test_an_exchange_that_cannot_be_asked_leaves_the_line_not_computed(
    ids: TradeIds, exchange: ListedTrades
) -> None:
    """Neither silence nor an empty list is a proof."""
    line, why_not = await compared(exchange, ids)
    assert line == TradesLedger()
    assert why_not is not None


async def test_a_missing_key_is_the_reason_of_a_line_that_is_not_computed(ids: TradeIds) -> None:
    """The day waits for somebody who has one."""
    desk = desk_of(ConfigurationError("the variable KALSHI_API_KEY is not set"))
    done = await compare_trades(desk, day_with(), ids, repair=False, tell=lambda _text: None)
    assert done.why_not == "the exchange cannot be asked: the variable KALSHI_API_KEY is not set"


async def test_a_day_that_records_no_trades_has_none_to_compare(ids: TradeIds) -> None:
    """Its line is computed: there is nothing that could be missing."""
    done = await compare_trades(
        desk_of(ListedTrades([]), ("ticker",)), day_with(), ids, repair=False, tell=lambda _text: None
    )
    assert line_of(done, ids) == ledger(0, 0)


async def test_a_recorded_day_that_was_replayed_is_held_against_the_whole_list(ids: TradeIds) -> None:
    """Its pages have what was traded before the first subscription: that is listed too, and nothing of it is extra."""
    ids.first_up_ns = START_NS + 30_000_000_000
    exchange = ListedTrades([row(number) for number in range(1, 21)])
    day = msgspec.structs.replace(day_with(), mode="replay")
    done = await compare_trades(desk_of(exchange), day, ids, repair=False, tell=lambda _text: None)
    assert done.asked == WINDOW
    assert line_of(done, ids) == ledger(20, 20)


async def test_a_day_whose_beginning_another_one_recorded_is_held_against_the_whole_list(ids: TradeIds) -> None:
    """Its own connectors came up late; what the day before recorded on is in its tables, and is listed too."""
    assert ids.first_up_ns is not None
    before = msgspec.structs.replace(day_with(), date="2025-12-13", recorded=True, recorded_until_ns=CLOSE_NS)
    asked = []
    for days in ({}, {before.date: before}):
        exchange = ListedTrades([row(1)])
        desk = desk_of(exchange)
        desk.book.book.days.update(days)
        ids.first_up_ns = START_NS + 20_000_000_000
        await compare_trades(desk, day_with(), ids, repair=False, tell=print)
        asked.append(exchange.asked[0].from_ns)
    assert asked[0] - asked[1] == 20_000_000_000


@pytest.mark.parametrize(("tape_pages", "per_ticker"), [(1, False), (2, True), (10_000, True)])
async def test_whatever_needs_fewer_requests_is_asked(ids: TradeIds, tape_pages: int, per_ticker: bool) -> None:
    """One market: its own list, unless the whole tape is one page."""
    exchange = ListedTrades(LISTED, tape_pages=tape_pages)
    await compared(exchange, ids)
    (query,) = exchange.asked
    assert (query.per_ticker, query.tickers) == (per_ticker, frozenset(["KX-1"]))
    assert query.to_ns == CLOSE_NS + 2_000_000_000
    assert START_NS - 2_000_000_000 <= query.from_ns < START_NS


async def test_a_fetched_page_repairs_once_it_is_read_back(tmp_path: Path) -> None:
    """Until then its trades are missing."""
    found = ids_of(tmp_path)
    listed = [*LISTED, row(99), row(98)]
    done = await compare_trades(desk_of(ListedTrades(listed)), day_with(), found, repair=False, tell=lambda _text: None)
    assert line_of(done, found) == ledger(22, 20, missing=2)
    assert done.matching is not None
    assert done.matching.missing_ids(1) == [row(98)["trade_id"]]
    page = {"type": "rest_trades", "msg": {"endpoint": "/x", "params": {}, "trades": [row(99), row(98)]}}
    recording = a_day()
    recording.recorder._channel_of_type = {"rest_trades": "rest"}
    recording.recorder.ended = None
    recording.raw(json.dumps(page).encode())
    recording.recorder.flush()
    (folder := tmp_path / "rest").mkdir()
    segments = build_segments(folder, recording.batches(), env=ENV)
    read_segments({k: v for k, v in segments.items() if v[0] == "rest"}, env=ENV, see=found.see)
    assert line_of(done, found) == TradesLedger(exchange=22, captured=20, repaired=2, missing=0, extra=0)


async def test_a_later_verification_takes_from_the_list_only_what_speaks_against_the_day(ids: TradeIds) -> None:
    """Trades that have come to the list since are missing, named and to be fetched; trades that have left it prove nothing."""
    sealed = Ledger(trades=ledger(20, 20))
    done = await compare_trades(
        desk_of(ListedTrades([*LISTED, row(99)])), day_with(), ids, repair=False, tell=lambda _text: None
    )
    found = again_with_trades(sealed, done, line_of(done, ids))
    assert found.trades == ledger(21, 20, missing=1)
    (fault,) = missing_by_name(found, done)
    assert fault == f"the exchange lists trades that the day does not have: {row(99)['trade_id']}"
    (step,) = mending(ENV, DATE, 1, 0, found)
    assert f"into revision 2: `ssmd day start {ENV} --date {DATE} --mode replay`" in step
    assert again_with_trades(sealed, done, ledger(17, 17, extra=3)) == sealed
    assert mending(ENV, DATE, 1, 0, sealed) == ()
    pending = again_with_trades(Ledger(why_not={"trades": "no key"}), done, line_of(done, ids))
    assert (pending.trades.missing, pending.why_not) == (1, {})


GAPS = {
    "connection": Gap(gap_id="g", cause="connection_lost", from_ns=START_NS + 9, to_ns=START_NS + 99, outcome="stays"),
    "open": Gap(gap_id="g", cause="process_crash", from_ns=START_NS + 9),
    "trade sid": Gap(
        gap_id="g",
        cause="sequence_jump",
        from_ns=START_NS + 9,
        to_ns=START_NS + 99,
        outcome="stays",
        scope={"conn": "812-a-0", "sid": 1, "seq_from": 5, "seq_to": 6},
    ),
    "book sid": Gap(
        gap_id="g",
        cause="sequence_jump",
        from_ns=START_NS + 9,
        to_ns=START_NS + 99,
        outcome="stays",
        scope={"conn": "812-a-0", "sid": 2, "seq_from": 5, "seq_to": 6},
    ),
    "healed": Gap(gap_id="g", cause="connection_lost", from_ns=START_NS + 9, to_ns=START_NS + 99, outcome="healed"),
    "pause": Gap(gap_id="g", cause="exchange_maintenance", from_ns=START_NS + 9, to_ns=START_NS + 99, outcome="stays"),
    "before": Gap(gap_id="g", cause="late_start", from_ns=START_NS - 10**11, to_ns=START_NS, outcome="stays"),
}


@pytest.mark.parametrize(
    ("gap", "channels", "outcome"),
    [
        ("connection", ("trade", "orderbook_delta"), ("stays", TRADES_REPAIRED)),
        ("connection", ("trade",), ("repaired", None)),
        ("open", ("trade", "orderbook_delta"), ("stays", TRADES_REPAIRED)),
        ("open", ("orderbook_delta",), ("stays", None)),
        ("trade sid", ("trade", "orderbook_delta"), ("repaired", None)),
        ("book sid", ("trade", "orderbook_delta"), None),
        ("healed", ("trade",), None),
        ("pause", ("trade",), None),
        ("before", ("trade",), None),
    ],
)
async def test_gaps_are_repaired_as_far_as_their_trades_were_all_they_lacked(
    ids: TradeIds, gap: str, channels: tuple[str, ...], outcome: tuple[str, str | None] | None
) -> None:
    """A gap in the books stays, and says that its trades are there; an open one ends with the day."""
    desk = desk_of(ListedTrades(LISTED), channels)
    day = day_with(GAPS[gap])
    done = await compare_trades(desk, day, ids, repair=False, tell=lambda _text: None)
    await close_repaired_gaps(desk, day, done, line_of(done, ids), ids)
    events = cast("Any", desk.book).events
    assert [(data.outcome, data.detail) for _, data in events] == ([] if outcome is None else [outcome])
    assert all(data.to_ns == (GAPS[gap].to_ns or CLOSE_NS) for _, data in events)
    short = msgspec.structs.replace(line_of(done, ids), missing=1)
    cast("Any", desk.book).events.clear()
    await close_repaired_gaps(desk, day, done, short, ids)
    assert [data.outcome for _, data in cast("Any", desk.book).events] == (["stays"] if gap == "open" else [])
