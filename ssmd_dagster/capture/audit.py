"""The audit of a day's spool, on the connector's own host: publish what the stream lacks, count, tell the journal.

    python -m ssmd_dagster.capture.audit ENV DATE

Runs once after the connectors have stopped, whether they stopped by themselves or were killed. It writes the notes that a
killed connector owes, tells the journal of gaps that no connector came to tell it of and of those that a second socket has
healed, compares the sets of batches in spool and stream and publishes what is missing, and appends a final `checkpoint` with
the counts per connection and channel. Running it twice changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ssmd_dagster.archive.batch import Batch, BatchHeader
from ssmd_dagster.archive.intervals import (
    Interval,
    IntervalCheck,
    Jump,
    Ordinals,
    Torn,
    ends_session,
    intervals_in,
    jumps_in,
    ordinals_of,
)
from ssmd_dagster.archive.losses import Loss
from ssmd_dagster.archive.numbering import Numberings, Run, cut
from ssmd_dagster.archive.records import note_line, parse_record
from ssmd_dagster.capture.gaps import GapEvent, gaps_between, life_of, noted_gaps, tell
from ssmd_dagster.capture.healing import healed
from ssmd_dagster.capture.pipeline import IN_FLIGHT
from ssmd_dagster.capture.process import connected, run
from ssmd_dagster.capture.recorder import Origin, Unsealed, seal
from ssmd_dagster.capture.sequence import gap_id_of
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.capture.spool import (
    append_to_spool,
    is_written,
    mend_spool,
    read_spool,
    shard_of,
    spool_path,
    spooled_connections,
    spooled_records,
)
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.payloads import ChannelCount, Checkpoint, GapClosed, GapOpened
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import ExitCode, SsmdError
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster.stores.stream import BatchId, BatchTooLargeError

COMPONENT = "spool"
REPAIR_ROUNDS = 3

_log = logging.getLogger(__name__)


def count_connection(path: Path) -> dict[str, ChannelCount]:
    """Count a spool file by channel, from the headers of its whole batches."""
    channels: dict[str, ChannelCount] = {}
    for batch, _encoded in read_spool(path):
        header = batch.header
        known = channels.get(header.channel)
        channels[header.channel] = ChannelCount(
            records=header.records + (known.records if known else 0),
            batches=1 + (known.batches if known else 0),
            bytes=header.bytes + (known.bytes if known else 0),
            last_n=header.n_last,
        )
    return channels


def finish_connection(path: Path, now_ns: int) -> int:
    """Append the notes that a connection's recorder did not come to write; return how many there were.

    These are a `torn` note where the last flush got in only in part, or a batch has been spoilt, and the interval notes. A torn
    tail is cut off first.
    The connection's last record is then, as always, the note about `session`.
    """
    stated: list[Interval] = []
    headers: dict[str, BatchHeader] = {}
    last_session = b""
    end, last_n, records = 0, -1, 0
    for batch, encoded in read_spool(path):
        header = batch.header
        headers[header.channel] = header
        last_n, end, records = max(last_n, header.n_last), batch.end, records + header.records
        if header.channel == SESSION:
            last_session = spooled_records(encoded, batch)
            stated.extend(intervals_in(last_session))
    if last_n < 0 or _is_finished(last_session, last_n):
        return 0
    checks = {channel: IntervalCheck(channel, stated) for channel in headers}
    ordinals = Ordinals()
    spoilt: list[BatchHeader] = []
    for batch, encoded in read_spool(path):
        header = batch.header
        block = spooled_records(encoded, batch)
        if not block:
            spoilt.append(header)
            continue
        checks[header.channel].feed(block, header.n_first, header.n_last)
        if records <= last_n:  # some are missing, so it matters which
            ordinals.add(ordinals_of(block))
    if records <= last_n:
        ordinals.reach(last_n)
    torn = ordinals.torn()
    if torn is None and spoilt:
        first, last = min(header.n_first for header in spoilt), max(header.n_last for header in spoilt)
        torn = Torn(first, last, sum(header.records for header in spoilt))
    notes: list[dict[str, Any]] = []
    if torn is not None:
        ends = {header.channel: header.n_last for header in spoilt if header == headers[header.channel]}
        notes.append({**torn.note(), **({"last": ends} if ends else {})})
    notes += [
        interval.note()
        for check in checks.values()
        if check.channel != SESSION and (interval := check.finish()) is not None
    ]
    first = last_n + 1
    lines = [note_line(first + i, now_ns, note) for i, note in enumerate(notes)]
    session = checks.get(SESSION) or IntervalCheck(SESSION, ())
    if lines:
        session.feed(b"".join(lines), first, first + len(lines) - 1)
    remainder = session.finish()
    assert remainder is not None, "a connection without that last note owes one at least"
    lines.append(note_line(first + len(lines), now_ns, remainder.note()))
    known, template = headers.get(SESSION), next(iter(headers.values()))
    append_to_spool(
        path,
        end,
        seal(
            Origin(env=template.env, day=template.day, epoch=template.epoch, conn=template.conn),
            Unsealed(
                channel=SESSION,
                batch=known.batch + 1 if known else 0,
                records=len(lines),
                n_first=first,
                n_last=first + len(lines) - 1,
                recv_first_ns=now_ns,
                recv_last_ns=now_ns,
                seqs={},
                block=b"".join(lines),
            ),
        ),
    )
    return len(lines)


def _is_finished(session_records: bytes, last_n: int) -> bool:
    """Tell whether the connection's last record is the interval note about `session` itself."""
    if not session_records:
        return False
    last = session_records.splitlines()[-1]
    return ends_session(last) and parse_record(last).n == last_n


async def mend(stores: Stores, directory: Path, date: str) -> int:
    """Put back from the stream what the disk has spoilt of the spool and the audit has to read; return how many batches."""
    spoilt = {
        BatchId(conn, batch.header.channel, batch.header.batch): batch
        for conn in spooled_connections(directory)
        for batch in _spoilt(spool_path(directory, conn))
    }
    mended: set[BatchId] = set()
    async for known, encoded in stores.raw_stream.copies(date, spoilt):
        if known not in mended and mend_spool(spool_path(directory, known.conn), spoilt[known], encoded):
            mended.add(known)
    return len(mended)


def _spoilt(path: Path) -> list[Batch]:
    """Return what is spoilt of a connection's notes, or, where these do not end it, of all its batches."""
    last_session, last_n = b"", -1
    spoilt: list[Batch] = []
    for batch, encoded in read_spool(path):
        last_n = max(last_n, batch.header.n_last)
        if batch.header.channel == SESSION:
            last_session = spooled_records(encoded, batch)
            spoilt += [] if last_session else [batch]
    if _is_finished(last_session, last_n):
        return spoilt
    return [batch for batch, encoded in read_spool(path) if not spooled_records(encoded, batch)]


class Republished(NamedTuple):
    """How many batches the stream lacked and has now, and the spoilt ones that it lacks for good."""

    batches: int
    lost: tuple[BatchHeader, ...]


async def republish(stores: Stores, directory: Path, date: str) -> Republished:
    """Publish every spooled batch that the stream lacks; one that the disk has spoilt is no copy of what came in.

    Ends when a look at the stream finds none missing: a batch that was lost inside the stream's duplicate window is refused
    under its old name. A batch that no message takes is left to verification, which names it.
    """
    published = 0
    too_large: set[BatchId] = set()
    lost: dict[BatchId, BatchHeader] = {}
    for repair_round in range(1, REPAIR_ROUNDS + 1):
        in_stream = await stores.raw_stream.batches(date)
        missing = 0
        under_way: deque[asyncio.Future[int]] = deque()
        for conn in spooled_connections(directory):
            for batch, encoded in read_spool(spool_path(directory, conn)):
                header = batch.header
                known = BatchId(conn, header.channel, header.batch)
                if known in in_stream or known in too_large or known in lost:
                    continue
                if not spooled_records(encoded, batch):
                    lost[known] = header
                    continue
                if len(under_way) >= IN_FLIGHT:
                    await under_way.popleft()
                try:
                    acknowledged = await stores.raw_stream.publish(
                        encoded,
                        date=date,
                        channel=header.channel,
                        conn=conn,
                        batch=header.batch,
                        records=header.records,
                        repair_round=repair_round,
                    )
                except BatchTooLargeError as error:
                    _log.error("%s/%s/%d stays in the spool: %s", *known, error)
                    too_large.add(known)
                    continue
                under_way.append(acknowledged)
                missing += 1
        await asyncio.gather(*under_way)
        published += missing
        if missing == 0:
            return Republished(published, tuple(lost.values()))
    raise SsmdError(
        f"the stream lost batches again while they were published, {REPAIR_ROUNDS} times",
        where=f"{stores.raw_stream.stream} {date}",
        do="See the log of the NATS server and its disk; then run the command again.",
    )


def undeclared_holes(directory: Path, conn: str) -> list[GapEvent]:
    """Return a gap for every hole in a connection's numbers, as its connector would have declared it had it lived on.

    Not for those that it has noted, nor for the numbers of a spoilt batch: that is another gap, or comes from the stream.
    """
    path = spool_path(directory, conn)
    numbers = Numberings()
    jumps: list[Jump] = []
    for batch, encoded in read_spool(path):
        if batch.header.channel == SESSION:
            jumps += jumps_in(spooled_records(encoded, batch))
        if batch.header.seq:
            records = spooled_records(encoded, batch)
            if records:
                numbers.feed(batch.header, records)
            else:
                numbers.feed_spoilt(batch.header)
    holes = {count.sid: list(count.holes) for count in numbers.counts()}
    for jump in jumps:
        holes[jump.sid], _ = cut(holes.get(jump.sid, ()), (jump.first, jump.last))
    holes = {sid: runs for sid, runs in holes.items() if runs}
    times = _times_around(path, {str(sid): runs for sid, runs in holes.items()})
    events: list[GapEvent] = []
    for sid, runs in holes.items():
        for (first, _last), (from_ns, to_ns) in zip(runs, times[str(sid)], strict=True):
            gap_id = gap_id_of(conn, sid, first)
            scope = {"conn": conn, "sid": sid, "component": f"connector-{shard_of(conn)}"}
            gap = GapOpened(gap_id=gap_id, cause=GapCause.SEQUENCE_JUMP, from_ns=from_ns, scope=scope)
            end = GapClosed(gap_id=gap_id, to_ns=to_ns, outcome="stays")
            events += [(EventName.GAP_OPENED, gap), (EventName.GAP_CLOSED, end)]
    return events


def _times_around(path: Path, holes: Mapping[str, Sequence[Run]]) -> dict[str, list[tuple[int, int]]]:
    """Return for each hole of each sid, in order, an interval that holds the frames on both sides of it. One pass."""
    firsts = {sid: [first for first, _ in runs] for sid, runs in holes.items()}
    lasts = {sid: [last for _, last in runs] for sid, runs in holes.items()}
    # A batch is before every hole from some place on, and behind every hole up to some place.
    before = {sid: [0] * (len(runs) + 1) for sid, runs in holes.items()}
    behind = {sid: [2**63 - 1] * (len(runs) + 1) for sid, runs in holes.items()}
    for batch, _encoded in read_spool(path):
        for sid in holes.keys() & batch.header.seq.keys():
            low, high, _ = batch.header.seq[sid]
            place = bisect_right(firsts[sid], low)
            before[sid][place] = max(before[sid][place], batch.header.recv_first_ns)
            place = bisect_left(lasts[sid], high)
            behind[sid][place] = min(behind[sid][place], batch.header.recv_last_ns)
    return {
        sid: [
            (min(from_ns, to_ns), to_ns)
            for from_ns, to_ns in zip(
                accumulate(before[sid][:-1], max), list(accumulate(reversed(behind[sid][1:]), min))[::-1], strict=True
            )
        ]
        for sid in holes
    }


async def declare_gaps(directory: Path, book: DayBook, date: str, close_ns: int = 0) -> int:
    """Tell the journal of every gap that it has not been told of, and what healed which; return how many events these were.

    `close_ns` is when the day closed; 0 while it goes on.
    """
    declared = 0
    for event, data in noted_gaps(directory):
        declared += await tell(book, date, event, data)
    for conn in spooled_connections(directory):
        if (life := life_of(directory, conn)) is not None and life.cause == GapCause.PROCESS_CRASH:
            for event, data in undeclared_holes(directory, conn):
                declared += await tell(book, date, event, data)
    for shard in sorted({shard_of(conn) for conn in spooled_connections(directory)}):
        for lost in gaps_between(directory, shard, close_ns):
            for event, data in lost.events(f"connector-{shard}"):
                declared += await tell(book, date, event, data)
    lives = [life for conn in spooled_connections(directory) if (life := life_of(directory, conn)) is not None]
    day = await book.day(date)
    for end in healed(day.gaps if day is not None else (), lives):
        declared += await tell(book, date, EventName.GAP_CLOSED, end)
    return declared


def lost_batches(lost: Iterable[BatchHeader], counts: Mapping[str, Mapping[str, ChannelCount]]) -> list[Loss]:
    """Return what neither spool nor stream gives back, neighbours together, as verification will find it.

    `counts` of each connection say which batches are the last ones of their channels.
    """
    losses: list[Loss] = []
    for header in sorted(lost, key=lambda header: (header.conn, header.channel, header.batch)):
        last = None if header.n_last == counts[header.conn][header.channel].last_n else header.batch
        loss = Loss(
            conn=header.conn,
            channel=header.channel,
            first=header.batch,
            last=last,
            from_ns=header.recv_first_ns,
            to_ns=max(header.recv_first_ns, header.recv_last_ns),
            seq={sid: (low, high) for sid, (low, high, _) in header.seq.items()},
        )
        before = losses[-1] if losses else None
        if before is not None and (before.conn, before.channel, before.last) == (
            header.conn,
            header.channel,
            header.batch - 1,
        ):
            seq = {**before.seq, **loss.seq}
            seq |= {sid: (before.seq[sid][0], seq[sid][1]) for sid in before.seq}
            to_ns = max(before.to_ns, loss.to_ns)
            losses[-1] = msgspec.structs.replace(before, last=last, to_ns=to_ns, seq=seq)
        else:
            losses.append(loss)
    return losses


async def _closed_ns(setting: Setting, book: DayBook, date: str) -> int:
    """Return when the day closed, 0 where it is not being ended."""
    day = await book.day(date)
    if day is None or day.state is not DayState.ENDING:
        return 0
    planned_ns = setting.env.calendar().close_ns(Date.fromisoformat(date))
    return planned_ns if day.close_ns is None else day.close_ns


async def main(env_name: str, date: str, stop: asyncio.Event) -> None:
    """Audit the spool of one day."""
    setting = load_setting(env_name)
    async with connected(setting, COMPONENT) as stores:
        await audit(setting, stores, date)


async def audit(setting: Setting, stores: Stores, date: str) -> None:
    """Repair the stream from the spool and append the final checkpoint. Raises `SsmdError` while somebody records."""
    directory = spool_dir(setting.home, setting.env.name, date)
    living = [conn for conn in spooled_connections(directory) if is_written(spool_path(directory, conn))]
    if living:
        raise SsmdError(
            f"still being recorded: {', '.join(living)}",
            where=str(directory),
            do="Stop that connector, which its supervisor does not know of (`ps`); then run the command again.",
        )
    mended = await mend(stores, directory, date)
    if mended:
        _log.warning("put back %d batches of the spool from the stream", mended)
    for conn in spooled_connections(directory):
        owed = finish_connection(spool_path(directory, conn), setting.clock())
        if owed:
            _log.warning("wrote %d interval notes that %s did not come to write", owed, conn)
    book = DayBook(setting.env.name, stores.journal, stores.cache, setting.clock, f"capture:{COMPONENT}")
    declared = await declare_gaps(directory, book, date, await _closed_ns(setting, book, date))
    if declared:
        _log.warning("told the journal of %d beginnings and ends of gaps that it did not know", declared)
    repaired, lost = await republish(stores, directory, date)
    if repaired:
        _log.warning("published %d batches that the stream lacked", repaired)
    counts = {conn: count_connection(spool_path(directory, conn)) for conn in spooled_connections(directory)}
    for loss in lost_batches(lost, counts):
        await tell(book, date, EventName.GAP_OPENED, loss.gap)
        end = GapClosed(gap_id=loss.gap.gap_id, to_ns=loss.to_ns, outcome="stays")
        await tell(book, date, EventName.GAP_CLOSED, end)
    messages = sum(c.records for channels in counts.values() for name, c in channels.items() if name != SESSION)
    checkpoint = Checkpoint(
        component=COMPONENT,
        final=True,
        connections=counts,
        messages=messages,
        bytes=sum(c.bytes for channels in counts.values() for c in channels.values()),
    )
    day = await book.day(date)
    if day is not None and day.checkpoints.get(COMPONENT) == checkpoint:
        return
    await book.append(date, EventName.CHECKPOINT, data=checkpoint)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], sys.argv[2], stop))
