"""The exchange's own list of trades against the archive's, by id; what the archive lacks is fetched and recorded as pages.

Limited to the markets that were recorded and to the time from the first subscription to the close; what another day's recording
holds of the beginning is listed too, and recorded as pages. An exchange that cannot be asked leaves the line not computed, with
the reason. Not here: how the archive's ids are gathered (`archive.trade_ids`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Literal, NamedTuple

import msgspec

from ssmd_dagster.archive.coverage import TRADES_REPAIRED
from ssmd_dagster.archive.trade_ids import TRADES, Matching, TradeIds
from ssmd_dagster.capture.audit import COMPONENT as SPOOL
from ssmd_dagster.capture.rest_pages import RestPages
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.causes import NEVER_DEGRADE
from ssmd_dagster.day.events import Gap, TradingDay
from ssmd_dagster.day.ledger import TradesLedger
from ssmd_dagster.day.payloads import Checkpoint, GapClosed
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import SESSION, Exchange, TradePage, TradeQuery, room_part
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.recorded_on import recorded_before, recorded_into

AROUND_NS = 2_000_000_000
"""How far beyond the day's ends the list is asked for."""
LIST_TIMEOUT_S = 2 * 3600.0
PAGE = 1_000
SETTLE_POLL_S = 0.2
TELL_EVERY_PAGES = 200

Tell = Callable[[str], None]
_raw_rows = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Compared(NamedTuple):
    """The comparison as far as it got: `matching` None where the exchange was not asked, and `why_not` says why.

    Both None: the day does not record trades.

    `asked` is the interval of the list without its surroundings; `recorded` whether pages were recorded.
    """

    matching: Matching | None
    asked: Window | None = None
    why_not: str | None = None
    recorded: bool = False


NOTHING_TO_COMPARE = TradesLedger(exchange=0, captured=0, repaired=0, missing=0, extra=0)
"""The line of a day that does not record trades."""


async def compare_trades(desk: Desk, day: TradingDay, ids: TradeIds, *, repair: bool, tell: Tell) -> Compared:
    """Ask for the exchange's list and hold `ids` against it; with `repair`, record what is missing as pages.

    Recorded pages are in spool and stream when this returns, not yet in the archive. Raises `UnreachableError` where they cannot
    be recorded; whatever hinders the asking is the reason of a line that is not computed.
    """
    if TRADES not in desk.setting.env.capture.channels:
        return Compared(None)
    window = desk.window(day)
    if ids.first_up_ns is None and not ids.markets:
        return Compared(None, why_not="no subscription is recorded")
    # A day that was only recorded, and by itself alone, is asked for from its first subscription on.
    before = recorded_before(desk, day)
    held_before = before is not None and recorded_into(desk, before, day)
    first_ns = window.open_ns if day.mode == "replay" or held_before or ids.first_up_ns is None else ids.first_up_ns
    asked = Window(open_ns=max(window.open_ns, first_ns), close_ns=window.close_ns)
    if asked.open_ns >= asked.close_ns:
        return Compared(ids.matching(), asked)
    await _settle(desk, window.close_ns, tell)
    async with _recorder(desk, day, repair) as pages:
        listing = _Listing(desk, ids, asked, pages, tell)
        why_not = await _read(desk, day, listing)
    if listing.recorded and pages is not None:
        await _count_pages(desk, day, pages)
    if why_not is None and listing.matching.listed == 0 and listing.matching.archived:
        why_not = "the exchange lists no trade of the day"
    matching = listing.matching if why_not is None else None
    return Compared(matching, asked, why_not=why_not, recorded=listing.recorded)


def line_of(compared: Compared, ids: TradeIds) -> TradesLedger:
    """Return the ledger's line, with what was recorded since taken into account as far as `ids` has seen it."""
    if compared.matching is None:
        return TradesLedger() if compared.why_not is not None else NOTHING_TO_COMPARE
    compared.matching.look_again(ids)
    matched = compared.matching.result()
    return TradesLedger(
        exchange=matched.exchange,
        captured=matched.captured,
        repaired=matched.repaired,
        missing=matched.missing,
        extra=matched.extra,
    )


async def close_repaired_gaps(
    desk: Desk, day: TradingDay, compared: Compared, line: TradesLedger, ids: TradeIds
) -> None:
    """Journal which gaps the exchange's list has repaired: wholly where only trades were recorded, else their trades.

    A gap that is still open at the end of the day ends there.
    """
    window = desk.window(day)
    whole = line.missing == 0 and compared.asked is not None and TRADES in desk.setting.env.capture.channels
    for gap in day.gaps:
        if gap.outcome not in ("open", "stays"):
            continue
        outcome: Literal["repaired", "stays"] = "stays"
        detail = gap.detail
        if whole and _within(gap, compared.asked):
            channels = _channels_of(gap, desk.setting.env.capture.channels, ids)
            if channels == {TRADES}:
                outcome = "repaired"
            elif TRADES in channels:
                detail = TRADES_REPAIRED
        if (outcome, detail) != (gap.outcome, gap.detail):
            to_ns = gap.to_ns if gap.to_ns is not None else max(gap.from_ns, window.close_ns)
            closed = GapClosed(gap_id=gap.gap_id, to_ns=to_ns, outcome=outcome, detail=detail)
            await desk.book.append(day.date, EventName.GAP_CLOSED, epoch=day.epoch, data=closed)


def _within(gap: Gap, asked: Window | None) -> bool:
    if asked is None or gap.cause in NEVER_DEGRADE:
        return False
    return gap.from_ns >= asked.open_ns - AROUND_NS


def _channels_of(gap: Gap, captured: tuple[str, ...], ids: TradeIds) -> set[str]:
    """Return the channels in which a gap may lack records."""
    if "channel" in gap.scope:
        return {gap.scope["channel"]}
    if "sid" in gap.scope:
        channel = ids.channel_of_sid.get((gap.scope.get("conn", ""), gap.scope["sid"]))
        return set(captured) if channel is None else {channel}
    return set(captured)


@contextlib.asynccontextmanager
async def _recorder(desk: Desk, day: TradingDay, repair: bool) -> AsyncIterator[RestPages | None]:
    if not repair or day.epoch is None:
        yield None
        return
    async with RestPages(desk.setting, desk.stores, day.date, day.epoch) as pages:
        yield pages


class _Listing:
    """Reads the list page by page; what the archive lacks of it is recorded at once, so that nothing piles up."""

    def __init__(self, desk: Desk, ids: TradeIds, asked: Window, pages: RestPages | None, tell: Tell) -> None:
        self.matching = ids.matching()
        self.recorded = False
        self.cannot_record: SsmdError | None = None
        self._selection = desk.setting.env.capture.markets.selection()
        self._ids, self._asked, self._pages, self._tell = ids, asked, pages, tell
        self._rows_within = room_part(desk.setting.env.feed, "matching").rows_within
        self._read = 0

    async def read(self, exchange: Exchange) -> None:
        """Ask for the whole tape, or for each market by itself, whichever needs fewer requests."""
        from_ns, to_ns = self._asked.open_ns - AROUND_NS, self._asked.close_ns + AROUND_NS
        tickers = None if self._ids.all_markets else frozenset(self._ids.markets)
        per_ticker = False
        if tickers is not None:
            requests = len(tickers) + self._ids.captured // PAGE
            per_ticker = requests < await exchange.pages_of_tape(from_ns, to_ns)
        query = TradeQuery(
            from_ns=from_ns,
            to_ns=to_ns,
            tickers=tickers,
            include_multivariate=self._selection.include_multivariate,
            per_ticker=per_ticker,
        )
        await exchange.trade_pages(query, self._take)

    async def _take(self, page: TradePage) -> None:
        open_ns, close_ns = self._asked.open_ns, self._asked.close_ns
        whole = open_ns <= page.first_ns and page.last_ns < close_ns
        of_window = [True] * page.count if whole else self._rows_within(page.rows, open_ns, close_ns)
        missing = self.matching.take(page.ids, of_window)
        self._read += 1
        if self._read % TELL_EVERY_PAGES == 0:
            self._tell(f"{self._read:,} pages of the exchange's trades compared")
        if not missing or self._pages is None:
            return
        rows = _raw_rows(page.rows)
        lacking = b",".join(bytes(rows[index]) for index in missing)
        head = msgspec.json.encode({"endpoint": page.endpoint, "params": page.params})
        self.recorded = True
        try:
            await self._pages.put("rest_trades", head[:-1] + b',"trades":[' + lacking + b"]}")
        except SsmdError as error:
            self.cannot_record = error
            raise


async def _read(desk: Desk, day: TradingDay, listing: _Listing) -> str | None:
    """Read the list and return why it could not be read, None where it was."""
    try:
        exchange = desk.setting.open_exchange(day.date)
    except SsmdError as error:
        return f"the exchange cannot be asked: {error.what}"
    try:
        async with asyncio.timeout(LIST_TIMEOUT_S):
            await listing.read(exchange)
    except TimeoutError:
        return f"the exchange's list did not end within {LIST_TIMEOUT_S:.0f} s"
    except SsmdError as error:
        if listing.cannot_record is not None:
            raise
        return f"the exchange cannot be asked: {error.what}"
    finally:
        await exchange.close()
    return None


async def _count_pages(desk: Desk, day: TradingDay, pages: RestPages) -> None:
    """Journal what the pages' spool file holds, as the audit does for the connectors'."""
    counts = await pages.counts()
    current = await desk.book.day(day.date)
    before = current.messages if current is not None else None
    await desk.book.append(
        day.date,
        EventName.CHECKPOINT,
        epoch=day.epoch,
        data=Checkpoint(
            component=SPOOL,
            final=True,
            connections={pages.conn: counts},
            messages=(before or 0) + sum(count.records for name, count in counts.items() if name != SESSION),
        ),
    )


async def _settle(desk: Desk, close_ns: int, tell: Tell) -> None:
    """Wait until the exchange's list of the day is taken to be complete."""
    settle_s = desk.setting.env.capture.trades_settle_s
    left_s = (close_ns - desk.setting.clock()) / 1e9 + settle_s
    if left_s > 2:
        tell(f"waiting {left_s:.0f} s until the exchange's list of trades is complete")
    for _ in range(int((settle_s + 5) / SETTLE_POLL_S)):
        if desk.setting.clock() >= close_ns + settle_s * 1_000_000_000:
            return
        await asyncio.sleep(SETTLE_POLL_S)
