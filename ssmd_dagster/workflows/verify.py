"""Is the day's archive what came in? Everything is read back from the store and held against every other account of it.

The ledger's sides: received (the recorder's interval notes), spooled (the audit's count), published (the stream's batches),
archived (the bytes in the store). Lines that nobody draws up yet stay `not computed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ssmd_dagster.archive.layout import day_prefix, parse_segment_key
from ssmd_dagster.archive.readback import DayReadback, Readback
from ssmd_dagster.capture.audit import COMPONENT as SPOOL
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.ledger import ChannelLedger, Ledger
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import UnexplainedDifferenceError
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.stores.objects import ObjectStore
from ssmd_dagster.workflows.desk import Desk

MAX_FAULTS_TOLD = 10


async def read_back(store: ObjectStore, env: str, feed: str, date: str, told: Callable[[str], None]) -> Readback:
    """Read every segment of a day from the store and return the findings. Memory: one segment."""
    found = [
        (*parsed, info.key)
        for info in await store.list(day_prefix(feed, date))
        if (parsed := parse_segment_key(info.key)) is not None
    ]
    readback = DayReadback(env, date)
    # `session` first: it holds the interval notes that the other channels are held against.
    for channel, number, key in sorted(found, key=lambda entry: (entry[0] != SESSION, entry)):
        data = await store.get(key)
        await asyncio.to_thread(readback.feed, key, channel, number, data)
        told(key)
    loop = asyncio.get_running_loop()

    def read_range(key: str, start: int, length: int) -> bytes:
        return asyncio.run_coroutine_threadsafe(store.get_range(key, start, length), loop).result()

    return await asyncio.to_thread(readback.finish, read_range)


async def draw_up(desk: Desk, day: TradingDay, readback: Readback) -> Ledger:
    """Return the day's ledger as far as it can be drawn up."""
    spooled: dict[str, int] = {}
    checkpoint = day.checkpoints.get(SPOOL)
    for channels in checkpoint.connections.values() if checkpoint else ():
        for channel, count in channels.items():
            spooled[channel] = spooled.get(channel, 0) + count.records
    published: dict[str, int] = {}
    for batch, records in (await desk.stores.raw_stream.batches(day.date)).items():
        published[batch.channel] = published.get(batch.channel, 0) + records
    names = sorted({*spooled, *published, *readback.archived, *readback.received})
    return Ledger(
        channels=tuple(
            ChannelLedger(
                channel=name,
                received=readback.received.get(name, 0),
                spooled=spooled.get(name, 0) if checkpoint else None,
                published=published.get(name, 0),
                archived=readback.archived.get(name, 0),
            )
            for name in names
        )
    )


async def verify(desk: Desk, day: TradingDay, told: Callable[[str], None]) -> tuple[Readback, Ledger]:
    """Read the day back, draw up its ledger, and journal the verdict.

    Raises `UnexplainedDifferenceError` (exit 6), naming what differs, where a fault or a difference is explained by no gap,
    and where there was nothing to examine though records were received.
    """
    env = desk.setting.env
    readback = await read_back(desk.stores.raw, env.name, env.feed, day.date, told)
    ledger = await draw_up(desk, day, readback)
    unexplained = [f"{difference.name}: {difference.size:+d}" for difference in ledger.unexplained()]
    faults = [*readback.faults, *unexplained]
    await desk.book.append(
        day.date,
        EventName.VERIFIED,
        epoch=day.epoch,
        data={"ledger": ledger.to_json(), "examined": readback.records, "differences": len(faults)},
    )
    if faults:
        more = f" and {len(faults) - MAX_FAULTS_TOLD} more" if len(faults) > MAX_FAULTS_TOLD else ""
        raise UnexplainedDifferenceError(
            f"the archive is not what came in: {'; '.join(faults[:MAX_FAULTS_TOLD])}{more}",
            where=desk.where(day.date),
            do=f"Look at `ssmd day show {desk.env} {day.date}`; the spool and the stream still hold what was recorded. "
            f"`ssmd day end {desk.env} --date {day.date}` tries again, with --force it ends the day as degraded.",
        )
    if readback.records == 0:
        raise UnexplainedDifferenceError(
            "there is nothing to verify: the archive of the day holds no record",
            where=desk.where(day.date),
            do="See the logs of connector and archiver; `ssmd day end --force` ends the day all the same.",
        )
    return readback, ledger
