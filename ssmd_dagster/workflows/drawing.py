"""The pictures of a finished day: messages a minute, coverage, lateness, markets.

They are drawn from the figures that the normaliser left beside the tables, and from the coverage: little, however large the
day. A day normalised before there were figures has its coverage drawn alone; `ssmd day report` draws everything.
"""

from __future__ import annotations

import asyncio
import re

from ssmd_dagster.archive.layout import table_prefix
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.holdings import Holdings

MOST_BYTES = 64 * 1024 * 1024
"""A coverage or figures larger than this are left out: a sensor draws, and it has seconds."""
_REVISION = re.compile(r"/data(?:\.r(?P<revision>[0-9]+))?\.json\Z")


async def draw(desk: Desk, day: TradingDay, held: Holdings) -> dict[str, str]:
    """Return a day's pictures as SVG by name (`messages`, `coverage`, `latency`, `markets`); none where the store is away."""
    try:
        findings = await _findings(desk, day.date)
        coverage = await _small(desk, held.newest.get("coverage"))
    except SsmdError:
        return {}
    return await asyncio.to_thread(_drawn, desk.window(day), findings, coverage)


async def _findings(desk: Desk, date: str) -> bytes | None:
    found: dict[int, str] = {}
    for info in await desk.stores.normalized.list(table_prefix(desk.setting.env.feed, "drift", date)):
        if (match := _REVISION.search(info.key)) is not None:
            found[int(match["revision"] or 1)] = info.key
    return await _small(desk, found[max(found)] if found else None)


async def _small(desk: Desk, key: str | None) -> bytes | None:
    if key is None or await desk.stores.normalized.head(key) > MOST_BYTES:
        return None
    return await desk.stores.normalized.get(key)


def _drawn(window: Window, findings: bytes | None, coverage: bytes | None) -> dict[str, str]:
    from ssmd_dagster.archive.report import pictures  # pyarrow: not for those who only load the definitions

    return pictures(window, findings, coverage)
