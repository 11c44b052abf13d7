"""The pictures of a finished day, from the tables in the store: messages a minute, coverage, lateness, markets.

Bounded: of a day whose tables are larger than `MOST_BYTES` only the coverage is drawn; `ssmd day report` draws everything.
"""

from __future__ import annotations

import asyncio
import io
from typing import Any

from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.holdings import Holdings

MOST_BYTES = 64 * 1024 * 1024
COVERAGE = "coverage"


async def draw(desk: Desk, day: TradingDay, held: Holdings) -> dict[str, str]:
    """Return a day's pictures as SVG by name (`messages`, `coverage`, `latency`, `markets`); none where the store is away."""
    size = sum(holding.size for holding in held.tables.values())
    wanted = [table for table in held.newest if size <= MOST_BYTES or table == COVERAGE]
    try:
        files = {table: await desk.stores.normalized.get(held.newest[table]) for table in wanted}
    except SsmdError:
        return {}
    return await asyncio.to_thread(_drawn, desk.window(day), files) if files else {}


def _drawn(window: Any, files: dict[str, bytes]) -> dict[str, str]:
    import pyarrow.parquet as pq

    from ssmd_dagster.archive.report import pictures

    return pictures(window, {table: pq.read_table(io.BytesIO(data)) for table, data in files.items()})
