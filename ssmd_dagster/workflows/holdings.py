"""What the store holds of a day: how many objects and bytes per kind of raw file and per table, and where."""

from __future__ import annotations

import re

import msgspec

from ssmd_dagster.archive.layout import FILE_OF_CHANNEL, day_prefix, parse_segment_key, table_prefix
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.workflows.desk import Desk

_REVISION = re.compile(r"/data(?:\.r(?P<revision>[0-9]+))?\.parquet\Z")

TABLES = ("trade", "ticker", "orderbook", "lifecycle", "coverage", "security_master", "late")


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """Objects of one kind: how many, and their bytes as stored."""

    objects: int = 0
    size: int = 0


class Holdings(msgspec.Struct, frozen=True, kw_only=True):
    """All objects of a day; `newest` is the key of each table's latest revision. `error`: why nothing is known of the store."""

    raw: dict[str, Holding] = {}
    tables: dict[str, Holding] = {}
    raw_url: str = ""
    table_urls: dict[str, str] = {}
    newest: dict[str, str] = {}
    markets: int | None = None
    error: str | None = None


async def holdings(desk: Desk, date: str) -> Holdings:
    """List what the store holds of a day; a store that does not answer is said so, not raised."""
    feed = desk.setting.env.feed
    raw: dict[str, Holding] = {}
    tables: dict[str, Holding] = {}
    newest: dict[str, tuple[int, str]] = {}
    try:
        for info in await desk.stores.raw.list(day_prefix(feed, date)):
            parsed = parse_segment_key(info.key)
            _count(raw, "manifest" if parsed is None else FILE_OF_CHANNEL[parsed[0]], info.size)
        for table in TABLES:
            for info in await desk.stores.normalized.list(table_prefix(feed, table, date)):
                _count(tables, table, info.size)
                if (match := _REVISION.search(info.key)) is not None:
                    newest[table] = max(newest.get(table, (0, "")), (int(match["revision"] or 1), info.key))
        markets = len(await desk.stores.secmaster.markets())
    except SsmdError as error:
        return Holdings(error=str(error))
    return Holdings(
        raw=raw,
        tables=tables,
        raw_url=desk.stores.raw.url(day_prefix(feed, date)),
        table_urls={table: desk.stores.normalized.url(table_prefix(feed, table, date)) for table in tables},
        newest={table: key for table, (_, key) in newest.items()},
        markets=markets,
    )


def _count(found: dict[str, Holding], kind: str, size: int) -> None:
    before = found.get(kind, Holding())
    found[kind] = Holding(objects=before.objects + 1, size=before.size + size)
