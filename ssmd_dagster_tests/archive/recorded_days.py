"""Recorded days for the tests of readers: tables and manifests in a folder, made without capture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ssmd_dagster.archive.layout import manifest_key, table_key
from ssmd_dagster.archive.tables import SCHEMAS, TABLE_OF_CHANNEL, day_schema, table_from_rows
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.payloads import ConditionValue
from ssmd_dagster.day.seal import Manifest, root_hash

ENV, FEED = "test-env", "kalshi"
DATE = "2025-12-14"
OPEN_NS = 1_765_670_400_000_000_000
DAY_NS = 86_400_000_000_000
SECOND = 1_000_000_000
Rows = Iterable[Mapping[str, Any]]


def window_of(date: str) -> Window:
    """Return the UTC day; dates of December 2025 only."""
    open_ns = OPEN_NS + (int(date[-2:]) - 14) * DAY_NS
    return Window(open_ns, open_ns + DAY_NS)


def trade(
    ticker: str, at_s: float, *, price: int = 450_000, count: int = 100, date: str = DATE, **more: Any
) -> dict[str, Any]:
    """Return a row of `trade`, `at_s` seconds after the day's open."""
    event_ns = window_of(date).open_ns + int(at_s * SECOND)
    return {
        "ticker": ticker,
        "event_ns": event_ns,
        "recv_ns": event_ns + 5_000_000,
        "conn": "7-a-1",
        "n": int(at_s * 10),
        "source": "live",
        "trade_id": f"{ticker}-{at_s}",
        "yes_price": price,
        "no_price": 1_000_000 - price,
        "count": count,
        "taker_side": "yes",
        **more,
    }


def hole(
    channel: str,
    from_s: float,
    to_s: float,
    *,
    state: str = "missing",
    cause: str | None = "connection_lost",
    **more: Any,
) -> dict[str, Any]:
    """Return a row of `coverage` about an interval that is not simply present."""
    return {
        "channel": channel,
        "from_ns": OPEN_NS + int(from_s * SECOND),
        "to_ns": OPEN_NS + int(to_s * SECOND),
        "state": state,
        "cause": cause,
        "gap_id": "gap-7-a-1",
        **more,
    }


class Shelf:
    """A folder with an environment's two buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.tables = folder / "ssmd-raw", folder / "ssmd-normalized"

    def put(
        self,
        tables: Mapping[str, Rows],
        *,
        date: str = DATE,
        revision: int = 1,
        condition: ConditionValue = "available",
        reasons: Sequence[str] = (),
        gaps: Sequence[Gap] = (),
        sealed: bool = True,
        row_group_rows: int = 4,
        ledger: dict[str, Any] | None = None,
    ) -> Shelf:
        """Write a day; `coverage` says that everything is present unless it is given."""
        window = window_of(date)
        whole = [
            {"channel": channel, "from_ns": window.open_ns, "to_ns": window.close_ns, "state": "present"}
            for channel in TABLE_OF_CHANNEL
        ]
        for table, rows in {"coverage": whole, **tables}.items():
            self.write(table, rows, date=date, revision=revision, row_group_rows=row_group_rows)
        if sealed:
            self.seal(date, revision, condition, reasons, gaps, ledger)
        return self

    def write(
        self,
        table: str,
        rows: Rows | pa.Table,
        *,
        date: str = DATE,
        revision: int = 1,
        row_group_rows: int = 4,
        **metadata: str,
    ) -> Path:
        """Write one table, sorted as the normaliser sorts it; `metadata` replaces what the file states of itself."""
        window = window_of(date)
        made = rows if isinstance(rows, pa.Table) else table_from_rows(table, rows)
        if "ticker" in SCHEMAS[table].names and "event_ns" in SCHEMAS[table].names and not isinstance(rows, pa.Table):
            made = made.sort_by([("ticker", "ascending"), ("event_ns", "ascending")])
        schema = day_schema(
            table, env=ENV, date=date, revision=revision, open_ns=window.open_ns, close_ns=window.close_ns
        )
        stated = {key.decode(): value.decode() for key, value in schema.metadata.items()}
        made = made.replace_schema_metadata({**stated, **{f"ssmd.{key}": value for key, value in metadata.items()}})
        path = self.tables / table_key(FEED, table, date, revision)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(made, path, compression="zstd", row_group_size=row_group_rows, write_page_checksum=True)
        return path

    def seal(
        self,
        date: str,
        revision: int = 1,
        condition: ConditionValue = "available",
        reasons: Sequence[str] = (),
        gaps: Sequence[Gap] = (),
        ledger: dict[str, Any] | None = None,
        window: Window | None = None,
    ) -> Path:
        """Write a manifest."""
        window = window or window_of(date)
        fields: dict[str, Any] = dict.fromkeys(("segments", "connections", "events", "epochs"), ())
        fields |= {"env": ENV, "feed": FEED, "date": date, "open_ns": window.open_ns, "close_ns": window.close_ns}
        fields |= {"revision": revision, "root_hash": root_hash([]), "gaps": msgspec.to_builtins(gaps)}
        fields |= {"condition": condition, "condition_reasons": reasons, "rules_version": 1, "journal_seq": 9}
        fields |= {"ledger": ledger, "versions": {}, "created_at": "2025-12-15T00:00:00Z"}
        path = self.raw / manifest_key(FEED, date, revision)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.convert(fields, Manifest).encode())
        return path
