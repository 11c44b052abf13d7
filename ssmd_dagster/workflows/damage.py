"""What becomes of raw objects that do not give back what was put into them.

While the spool or the stream still has a batch, its object can be built again, byte for byte; it is laid beside, never put
over what is stored. A batch that nobody has any more is a gap of the day, which is healed once the object is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, SegmentFooter, read_last, read_whole
from ssmd_dagster.archive.layout import ordered_segments, parse_segment_key, segment_key
from ssmd_dagster.archive.losses import Loss
from ssmd_dagster.archive.segment import Ranges, SegmentWriter, add_range, covered, in_ranges
from ssmd_dagster.capture.archiver import read_footer, sha256_of
from ssmd_dagster.capture.spool import read_spool, spool_path, spooled_connections
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.events import Gap, TradingDay
from ssmd_dagster.day.payloads import GapClosed
from ssmd_dagster.day.seal import Manifest
from ssmd_dagster.day.states import EventName
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import NotFoundError, SsmdError, UnexplainedDifferenceError
from ssmd_dagster.stores.cache import rfc3339
from ssmd_dagster.stores.stream import NO_BATCH, BatchId
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.sealing import newest_manifest

FETCH_TIMEOUT_S = 1.0
_NS_PER_MS = 1_000_000


class Sorted(NamedTuple):
    """Losses by what can be done: `gone` are those of which nobody has every batch, `elsewhere` the others."""

    gone: tuple[Loss, ...]
    elsewhere: tuple[Loss, ...]

    def faults(self) -> tuple[str, ...]:
        """Return a fault for each: which batches, from when to when, and whether another copy was found."""
        return (
            *(f"{described(loss)}: lost ({GapCause.ARCHIVE_DAMAGED})" for loss in self.gone),
            *(f"{described(loss)}: still in the spool or the stream" for loss in self.elsewhere),
        )


def described(loss: Loss) -> str:
    """Return which batches a loss is of, and when they were received."""
    if loss.last is None:
        batches = f"every batch of {loss.channel}" + (f" from {loss.first} on" if loss.first else "")
    else:
        span = f"batch {loss.first}" if loss.first == loss.last else f"batches {loss.first}-{loss.last}"
        batches = f"{span} of {loss.channel}"
    numbers = "".join(f", numbers {first}-{last} of sid {sid}" for sid, (first, last) in sorted(loss.seq.items()))
    times = [rfc3339(at_ns // _NS_PER_MS * _NS_PER_MS) for at_ns in (loss.from_ns, loss.to_ns)]
    return f"{loss.conn}: {batches}, {' - '.join(times)}{numbers}"


async def sort_out(desk: Desk, date: str, losses: Iterable[Loss]) -> Sorted:
    """Look for other copies in the spool and the stream; one that is spoilt too is none.

    Raises `UnreachableError` where NATS does not answer.
    """
    losses = tuple(losses)
    if not losses:
        return Sorted((), ())
    raw_stream = desk.stores.raw_stream
    copies: dict[BatchId, bool] = {}
    wanted = {batch for batch in await raw_stream.batches(date) if _is_of(batch, losses)}
    async for batch, encoded in raw_stream.copies(date, wanted):
        copies[batch] = copies.get(batch, False) or read_whole(encoded) is not None
    for conn in {loss.conn for loss in losses}:
        path = spool_path(spool_dir(desk.setting.home, desk.env, date), conn)
        for batch, whole in (await asyncio.to_thread(_spooled, path, losses)).items():
            copies[batch] = copies.get(batch, False) or whole
    gone = tuple(loss for loss in losses if not _all_there(loss, copies))
    return Sorted(gone, tuple(loss for loss in losses if loss not in gone))


def _is_of(batch: BatchId, losses: Iterable[Loss]) -> bool:
    return any(
        (batch.conn, batch.channel) == (loss.conn, loss.channel) and loss.overlaps(batch.batch, batch.batch)
        for loss in losses
    )


def _spooled(path: Path, losses: Iterable[Loss]) -> dict[BatchId, bool]:
    """Return which of the lost batches a spool file has, and whether they can be read."""
    found = {}
    for batch, encoded in read_spool(path) if path.exists() else ():
        known = BatchId(batch.header.conn, batch.header.channel, batch.header.batch)
        if _is_of(known, losses):
            found[known] = read_whole(encoded) is not None
    return found


def _all_there(loss: Loss, copies: Mapping[BatchId, bool]) -> bool:
    last = loss.last
    if last is None:
        last = max((batch.batch for batch in copies if _is_of(batch, (loss,))), default=loss.first)
    return all(copies.get(BatchId(loss.conn, loss.channel, number), False) for number in range(loss.first, last + 1))


async def check_sealed(
    desk: Desk, day: TradingDay, wanted: str, holding: Callable[[Iterable[str]], list[str]] = ordered_segments
) -> None:
    """See that raw objects of a day are those of its newest sealed revision, if it has one, before tables are made of them.

    Raises `UnexplainedDifferenceError`, which names those that are missing or changed.

    Args:
        desk: The environment.
        day: The day that the objects are of.
        wanted: The day whose tables are to be made.
        holding: Chooses of the keys of segments those that matter.
    """
    if day.sealed is None:
        return
    raw = desk.stores.raw
    manifest = await newest_manifest(desk, day.date, day.sealed)
    sealed = {entry.key: entry.sha256 for entry in manifest.segments}
    spoilt = []
    for key in holding(sealed):
        try:
            same = await sha256_of(raw, key) == sealed[key]
        except NotFoundError:
            same = False
        if not same:
            spoilt.append(key)
    if spoilt:
        raise UnexplainedDifferenceError(
            f"not what was sealed: {', '.join(spoilt)}; tables made of it would lack rows that are in those there",
            where=desk.where(day.date),
            do=f"`ssmd day verify {desk.env} {day.date}` names what is spoilt and what mends it; of what is gone for good "
            f"`ssmd day normalize {desk.env} {wanted} --despite-damage` makes a revision without it.",
        )


async def journal_losses(desk: Desk, day: TradingDay, gone: Iterable[Loss], losses: Iterable[Loss]) -> TradingDay:
    """Declare a gap for everything that is `gone`, and heal those of which nothing is missing among `losses` any more."""
    losses = tuple(losses)
    for loss in gone:
        gap = loss.gap
        known = day.gap_by_id.get(gap.gap_id)
        if known is None:
            await desk.book.append(day.date, EventName.GAP_OPENED, epoch=day.epoch, data=gap)
        if known is None or known.outcome in ("open", "healed"):
            await _close(desk, day, gap.gap_id, loss.to_ns, "stays")
    for declared in day.gaps:
        if (
            declared.cause == GapCause.ARCHIVE_DAMAGED
            and declared.outcome != "healed"
            and not any(_of(declared, loss) for loss in losses)
        ):
            await _close(desk, day, declared.gap_id, declared.to_ns or declared.from_ns, "healed")
    after = await desk.book.day(day.date)
    assert after is not None
    return after


def _of(gap: Gap, loss: Loss) -> bool:
    first, last = gap.scope["batches"]
    return (loss.conn, loss.channel) == (gap.scope["conn"], gap.scope["channel"]) and loss.overlaps(first, last)


async def _close(desk: Desk, day: TradingDay, gap_id: str, to_ns: int, outcome: Literal["stays", "healed"]) -> None:
    closed = GapClosed(gap_id=gap_id, to_ns=to_ns, outcome=outcome)
    await desk.book.append(day.date, EventName.GAP_CLOSED, epoch=day.epoch, data=closed)


async def rebuild(desk: Desk, manifest: Manifest, key: str) -> Path | None:
    """Build a sealed segment again from the stream or the spool and return where it lies; None where that cannot be.

    It is laid into `$SSMD_HOME/rebuilt/{env}/`, and only if it has the hash that was sealed.
    """
    sealed = {segment.key: segment.sha256 for segment in manifest.segments}
    parsed = parse_segment_key(key)
    if key not in sealed or parsed is None:
        return None
    channel, number = parsed
    taken: Ranges = {}
    for name in sealed:
        footer = await _footer(desk, name)
        if footer is not None and footer.channel == channel and footer.segment != number:  # wherever it lies
            for conn, first, last in covered([footer]):
                add_range(taken, conn, first, last)
    before = sealed.get(segment_key(manifest.feed, manifest.date, channel, number - 1))
    target = desk.setting.home / "rebuilt" / desk.env / f"{manifest.date}-{key.rsplit('/', 1)[-1]}"
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for copies in (_streamed, _spooled_in_order):
        batches = [data async for data in copies(desk, manifest, channel, taken)]
        for epoch in manifest.epochs:
            writer = SegmentWriter(
                target, env=manifest.env, day=manifest.date, channel=channel, number=number, prev_sha256=before
            )
            if await asyncio.to_thread(_written, writer, batches, epoch) == sealed[key]:
                return target
            writer.discard()
    return None


def _written(writer: SegmentWriter, batches: Iterable[bytes], epoch: int) -> str:
    for data in batches:
        batch = read_last(data)
        if isinstance(batch, Batch):
            with contextlib.suppress(BatchDamagedError):  # the hash says that something is missing
                writer.append(data, batch)
    writer.close(epoch)
    return writer.sha256


async def _footer(desk: Desk, key: str) -> SegmentFooter | None:
    try:
        return await read_footer(desk.stores.raw, key)
    except SsmdError:  # missing or cut: what it held is not known
        return None


async def _streamed(desk: Desk, manifest: Manifest, channel: str, taken: Ranges) -> AsyncIterator[bytes]:
    """Yield the stream's batches of a channel that no other segment has, in order, each once."""
    seen = {conn: list(ranges) for conn, ranges in taken.items()}
    async with desk.stores.raw_stream.consume(manifest.date, channel) as consumer:
        while await consumer.backlog():
            for message in await consumer.fetch(FETCH_TIMEOUT_S):
                if message.id.batch != NO_BATCH and not in_ranges(seen, message.id.conn, message.id.batch):
                    add_range(seen, message.id.conn, message.id.batch, message.id.batch)
                    yield message.data


async def _spooled_in_order(desk: Desk, manifest: Manifest, channel: str, taken: Ranges) -> AsyncIterator[bytes]:
    """Yield the same of the spool; where several connections recorded at once, their order is a guess."""
    directory = spool_dir(desk.setting.home, desk.env, manifest.date)
    found = [
        (batch.header.recv_last_ns, conn, batch.header.batch, encoded)
        for conn in (spooled_connections(directory) if directory.is_dir() else ())
        for batch, encoded in read_spool(spool_path(directory, conn))
        if batch.header.channel == channel and not in_ranges(taken, conn, batch.header.batch)
    ]
    for *_, encoded in sorted(found):
        yield encoded
