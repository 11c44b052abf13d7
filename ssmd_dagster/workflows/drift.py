"""What the exchange sends right now that no reader knows: looks into the newest batch of each channel of a running day.

A sample, for a change of the format that has come to stay. Every record is looked at when the day's tables are made.
"""

from __future__ import annotations

import asyncio

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, decode_records, scan
from ssmd_dagster.archive.drift import DriftLog, briefly
from ssmd_dagster.day.payloads import DriftFound
from ssmd_dagster.errors import NotFoundError
from ssmd_dagster.exchange import OTHER, row_reader
from ssmd_dagster.workflows.desk import Desk


async def newest_drift(desk: Desk, date: str) -> DriftFound:
    """Return what the newest batches hold that is unknown. Raises `UnreachableError` where NATS does not answer."""
    from ssmd_dagster.archive.columns import read_block  # loads pyarrow, which other looks have no use for

    reader, log = row_reader(desk.setting.env.feed), DriftLog()
    for channel in (*desk.setting.env.capture.channels, OTHER):
        try:
            data = await desk.stores.raw_stream.newest(date, channel)
        except NotFoundError:
            continue  # nothing was recorded of it yet
        batch = next(scan(data), None)
        if not isinstance(batch, Batch):
            continue
        try:
            records = decode_records(data, batch)
        except BatchDamagedError:
            continue
        log.merge((await asyncio.to_thread(read_block, reader, channel, records)).drift)
    return briefly(log.found())
