"""Is the day's archive what came in? Everything is read back from the store and held against every other account of it.

The ledger's sides: received (the recorder's interval notes), spooled (the audit's count), published (the stream's batches),
archived (the bytes in the store); beside them the exchange's own numbers, its list of trades, and the order books. Lines that
cannot be drawn up stay `not computed`, with the reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ssmd_dagster.archive.numbering import cut
from ssmd_dagster.archive.proofs import BOOKS, BookFindings
from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.archive.trade_ids import TRADES, TradeIds
from ssmd_dagster.capture.audit import COMPONENT as SPOOL
from ssmd_dagster.capture.sequence import gap_id_of
from ssmd_dagster.day.events import Gap, TradingDay
from ssmd_dagster.day.ledger import BooksLedger, ChannelLedger, Explanation, Ledger, TradesLedger, WireLedger
from ssmd_dagster.day.payloads import DriftFound, LateRows, Verified
from ssmd_dagster.day.seal import TableEntry
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import UnexplainedDifferenceError
from ssmd_dagster.stores.stream import BatchId
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.reading import DayReading
from ssmd_dagster.workflows.trades import Compared, line_of

if TYPE_CHECKING:  # loads pyarrow, which most commands have no use for
    from ssmd_dagster.archive.normalize_job import ChannelFiling

MAX_FAULTS_TOLD = 10
MAX_FAULTS_JOURNALED = 100
MAX_EXPLANATIONS = 100
"""Gaps that are named one by one in the ledger; what the others explain is added up."""
WIRE_HOLES = "wire: holes"
FILED_LINES = ("normalised", "duplicates", "control", "rejected", "other_day", "opening_fold")


TELL_EVERY_S = 5.0


class Telling:
    """Tells an operator of progress, not too often. `read` is told of every segment, `say` passes a text on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._segments = 0
        self._told_at = time.monotonic()

    def read(self, _key: str) -> None:
        """Count a segment that was read back."""
        self._segments += 1
        now = time.monotonic()
        if now - self._told_at > TELL_EVERY_S:
            self._told_at = now
            self.say(f"{self._segments} segments read back")


def reading_of(desk: Desk, day: TradingDay, told: Callable[[str], None]) -> DayReading:
    """Return a reading of the day's archive; nothing is read yet."""
    env = desk.setting.env
    return DayReading(desk.stores.raw, env.name, env.feed, day.date, desk.window(day), told)


async def read_back(
    desk: Desk, day: TradingDay, told: Callable[[str], None]
) -> tuple[Readback, BookFindings, TradeIds]:
    """Read every segment of a day from the store and return the findings."""
    async with reading_of(desk, day, told) as reading:
        await reading.read_new()
        readback, books = await reading.finish()
    return readback, books, reading.ids


class Verdict(NamedTuple):
    """What a verification found; `faults` empty means that every check passed.

    `spoilt` says that stored segments do not give back what was put into them, `lost` that nobody else has all of it either.
    `tables` are those that were made of what was read back, as `revision`, `late` and `drift` what was found in making them.
    """

    readback: Readback
    ledger: Ledger
    faults: tuple[str, ...]
    spoilt: bool = False
    lost: bool = False
    tables: tuple[TableEntry, ...] = ()
    revision: int | None = None
    late: LateRows | None = None
    drift: DriftFound | None = None


def draw_up(
    day: TradingDay,
    readback: Readback,
    books: BookFindings,
    *,
    published: dict[str, int] | None,
    trades: TradesLedger,
    why_not: dict[str, str],
) -> tuple[Ledger, tuple[str, ...]]:
    """Return the day's ledger, and a fault for every hole of the wire that no gap explains.

    Args:
        day: Its gaps and the audit's counts.
        readback: What the store holds.
        books: What the folding found.
        published: Records per channel in the stream; None where it no longer has the day.
        trades: The line of the exchange's list.
        why_not: Why lines are not computed.
    """
    spooled: Counter[str] = Counter()
    checkpoint = day.checkpoints.get(SPOOL)
    for channels in checkpoint.connections.values() if checkpoint else ():
        spooled.update({channel: count.records for channel, count in channels.items()})
    names = sorted({*spooled, *(published or {}), *readback.archived, *readback.received})
    explanations, faults = explain_holes(readback, day.gaps)
    why_not = dict(why_not)
    wire = WireLedger(
        distinct=sum(count.distinct for count in readback.wire),
        holes=sum(count.missing for count in readback.wire),
        duplicates=sum(count.duplicates for count in readback.wire),
    )
    if not wire.distinct and any(readback.archived.get(channel) for channel in (TRADES, BOOKS)):
        wire, why_not["wire"] = WireLedger(), "no frame carries the exchange's number"
    proved = BooksLedger(points=books.points, differing=books.differing, markets=books.markets)
    if not books.points and readback.archived.get(BOOKS):
        proved, why_not["books"] = BooksLedger(), "no book has a second snapshot"
    ledger = Ledger(
        channels=tuple(
            ChannelLedger(
                channel=name,
                received=readback.received.get(name, 0),
                spooled=spooled.get(name, 0) if checkpoint else None,
                published=published.get(name, 0) if published is not None else None,
                archived=readback.archived.get(name, 0),
            )
            for name in names
        ),
        wire=wire,
        trades=trades,
        books=proved,
        explanations=explanations,
        why_not=why_not,
    )
    return ledger, faults


def explain_holes(readback: Readback, gaps: tuple[Gap, ...]) -> tuple[tuple[Explanation, ...], tuple[str, ...]]:
    """Return what gaps explain of the holes, and a fault for every hole that is left.

    A gap of a subscription, `gap-{conn}-{sid}-{number before}`, explains the numbers that its connection noted beside it, or,
    where that note was lost, the run of numbers that begins there; one of batches that the archive lost, the numbers that it
    names. What a connection's recorder says it did not keep, a torn flush or a frame too large, explains as many more.
    """
    known = {gap.gap_id for gap in gaps}
    noted = {
        gap_id_of(conn, jump.sid, jump.first, jump.numbering): (jump.first, jump.last)
        for conn, jumps in readback.jumps.items()
        for jump in jumps
    }
    archive_lost = [
        (gap.gap_id, (gap.scope["conn"], int(sid), (first, last)))
        for gap in gaps
        for sid, (first, last) in gap.scope.get("seq", {}).items()
    ]
    explained: Counter[str] = Counter()
    faults: list[str] = []
    left_of = dict(readback.unrecorded)
    for count in readback.wire:
        holes = list(count.holes)
        prefix = f"gap-{count.conn}-{count.sid}-"
        runs = {gap_id_of(count.conn, count.sid, first): (first, last) for first, last in holes}
        runs |= {gap_id: run for gap_id, run in noted.items() if gap_id.startswith(prefix)}
        runs |= {gap_id: run for gap_id, (conn, sid, run) in archive_lost if (conn, sid) == (count.conn, count.sid)}
        for gap_id, run in runs.items():
            if gap_id in known:
                holes, size = cut(holes, run)
                if size:
                    explained[gap_id] += size
        for first, last in holes:
            lost = min(last - first + 1, left_of.get(count.conn, 0))
            if lost:
                left_of[count.conn] -= lost
                explained[f"gap-{count.conn}"] += lost
            if lost < last - first + 1:
                faults.append(
                    f"{count.conn}: of sid {count.sid} the numbers {first}-{last} are missing and no gap says so"
                )
    named = [Explanation(difference=WIRE_HOLES, gap_id=gap_id, size=size) for gap_id, size in explained.items()]
    if len(named) > MAX_EXPLANATIONS:
        others = named[MAX_EXPLANATIONS:]
        size = sum(entry.size or 0 for entry in others)
        named[MAX_EXPLANATIONS:] = [Explanation(difference=WIRE_HOLES, gap_id=f"{len(others)} more gaps", size=size)]
    return tuple(named), tuple(faults)


async def judge(
    desk: Desk, day: TradingDay, readback: Readback, books: BookFindings, compared: Compared, ids: TradeIds
) -> Verdict:
    """Draw up the ledger with all that the running servers know, and return it with every fault.

    `day` has its final gaps. What there was to examine and was not is a fault, too.
    """
    why_not = {} if compared.why_not is None else {"trades": compared.why_not}
    trades = line_of(compared, ids)
    # What an earlier revision has proved may have left the stream.
    proved = day.sealed is not None and day.sealed.revision < day.revision
    published = published_by_channel(await desk.stores.raw_stream.batches(day.date), readback if proved else None)
    ledger, holes = draw_up(day, readback, books, published=published, trades=trades, why_not=why_not)
    faults = (*readback.faults, *nothing_examined(readback), *holes, *books.faults, *unexplained(ledger))
    return Verdict(readback, ledger, faults)


def published_by_channel(batches: Mapping[BatchId, int], proved: Readback | None) -> dict[str, int]:
    """Return the records per channel in the stream.

    With `proved`, the archive speaks for the connections of which the stream has nothing any more.
    """
    published: Counter[str] = Counter()
    for batch, records in batches.items():
        published[batch.channel] += records
    if proved is not None:
        present = {batch.conn for batch in batches}
        for conn, counts in proved.by_connection.items():
            published.update(counts if conn not in present else {})
    return dict(published)


def unexplained(ledger: Ledger) -> tuple[str, ...]:
    """Return the ledger's differences that no gap explains, as faults."""
    return tuple(f"{difference.name}: {difference.size:+d}" for difference in ledger.unexplained())


def nothing_examined(readback: Readback) -> tuple[str, ...]:
    """Return a fault for a check that should have had something to look at and had nothing."""
    if readback.records and not readback.intervals_confirmed:
        return ("no interval note could be confirmed: nothing proves that the archive is what came in",)
    return ()


async def journal_verdict(desk: Desk, day: TradingDay, verdict: Verdict) -> None:
    """Append `verified`."""
    data = Verified(
        ledger=verdict.ledger.to_json(),
        examined=verdict.readback.records,
        differences=len(verdict.faults),
        faults=verdict.faults[:MAX_FAULTS_JOURNALED],
    )
    await desk.book.append(day.date, EventName.VERIFIED, epoch=day.epoch, data=data)


def refuse(desk: Desk, date: str, verdict: Verdict) -> None:
    """Raise `UnexplainedDifferenceError` (exit 6), naming what differs, where anything does or nothing was examined."""
    if verdict.faults:
        raise UnexplainedDifferenceError(
            f"the archive is not what came in: {briefly(verdict.faults)}",
            where=desk.where(date),
            do=_remedy(desk.env, date, verdict),
        )
    if verdict.readback.records == 0:
        raise UnexplainedDifferenceError(
            "there is nothing to verify: the archive of the day holds no record",
            where=desk.where(date),
            do="See the logs of connector and archiver; `ssmd day end --force` ends the day all the same.",
        )


def _remedy(env: str, date: str, verdict: Verdict) -> str:
    if verdict.lost:
        what = "Put the named objects back from a copy or from the store's own versions."
    elif verdict.spoilt:
        what = "Move the named objects and the later ones of their channels away: they are made again from the stream."
    else:
        what = f"Look at `ssmd day show {env} {date}`; the spool and the stream still hold what was recorded."
    return f"{what} `ssmd day end {env} --date {date}` tries again, with --force it ends the day as degraded."


def briefly(faults: tuple[str, ...]) -> str:
    """Return the first faults in one text."""
    more = f" and {len(faults) - MAX_FAULTS_TOLD} more" if len(faults) > MAX_FAULTS_TOLD else ""
    return "; ".join(faults[:MAX_FAULTS_TOLD]) + more


def with_filings(ledger: Ledger, filings: Mapping[str, ChannelFiling]) -> Ledger:
    """Return the ledger with the lines of what became of each channel's records."""
    return msgspec.structs.replace(
        ledger, channels=tuple(_filed(sheet, filings.get(sheet.channel)) for sheet in ledger.channels)
    )


def _filed(sheet: ChannelLedger, filing: ChannelFiling | None) -> ChannelLedger:
    if filing is None:
        return sheet
    return msgspec.structs.replace(sheet, **{name: getattr(filing, name) for name in FILED_LINES})
