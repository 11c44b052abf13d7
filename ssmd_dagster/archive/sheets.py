"""Writes the files of tables: Parquet for everything, Cap'n Proto for the trades of one market.

The same rows give the same bytes. Not for what the rows are, nor for where the files go.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from ssmd_dagster.archive.layout import encode_ticker
from ssmd_dagster.errors import ConfigurationError

ROW_GROUP_ROWS = 131_072
"""A reader that wants one market or some minutes reads one or two of these."""
ZSTD_LEVEL = 3
_HASH_BYTES = 1 << 20


class TableWriter:
    """One Parquet file; `rows`, `size` and `sha256` are known at exit. Rows come in the table's order."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self.size = 0
        self.sha256 = ""
        self._path, self._schema = path, schema
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        # Numbers that mostly grow pack best as differences; of the others few are distinct.
        packed = [field.name for field in schema if pa.types.is_integer(field.type) and field.name in _GROWING]
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=[field.name for field in schema if field.name not in packed and field.name not in _DISTINCT],
            column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
            write_page_index=True,
            write_page_checksum=True,
            sorting_columns=_sorting(schema),
        )

    def __enter__(self) -> Self:
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows; they are written in row groups of `ROW_GROUP_ROWS`."""
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        if self._waiting_rows >= ROW_GROUP_ROWS:
            whole = self._waiting_rows - self._waiting_rows % ROW_GROUP_ROWS
            both = pa.concat_tables(self._waiting).unify_dictionaries()
            self._write(both.slice(0, whole))
            self._waiting, self._waiting_rows = [both.slice(whole)], both.num_rows - whole

    def _write(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._waiting_rows:
            self._write(pa.concat_tables(self._waiting).unify_dictionaries())
        self._writer.close()
        if kind is None:
            self.size, self.sha256 = self._path.stat().st_size, sha256_of(self._path)


_GROWING = frozenset({"event_ns", "recv_ns", "n", "seq", "ts_ns", "sent_ns", "clock"})
_DISTINCT = frozenset({"trade_id", "detail", "row", "gap_id"})


def _sorting(schema: pa.Schema) -> list[pq.SortingColumn] | None:
    names = [name for name in ("ticker", "event_ns") if name in schema.names]
    return [pq.SortingColumn(schema.names.index(name)) for name in names] or None


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CapnpWriter:
    """Writes the trades of each market as a zstd-compressed stream of Cap'n Proto messages, by the published schema.

    Raises `ConfigurationError` where the schema lacks what is to be written.
    """

    def __init__(self, schema: Path, output: Path) -> None:
        import capnp  # here, since most days are Parquet alone

        capnp.remove_import_hook()
        try:
            self._parser = capnp.SchemaParser()  # of its own: two schemas of one id would end the process
            self._trade = self._parser.load(str(schema)).Trade
            missing = set(_CAPNP_FIELDS.values()) - set(self._trade.schema.fieldnames)
        except (capnp.KjException, AttributeError) as error:
            raise ConfigurationError(
                f"not a schema of trades: {str(error)[:200]}", where=str(schema), do="Restore the shipped file"
            ) from error
        if missing:
            raise ConfigurationError(
                f"the schema lacks {', '.join(sorted(missing))}", where=str(schema), do="Restore the shipped file"
            )
        self._folder = output / "capnp"
        self._folder.mkdir(exist_ok=True)

    def write(self, trades: pa.Table) -> list[dict[str, Any]]:
        """Write one file for each market of `trades`, which has each market's rows together; return what they are."""
        tickers = trades["ticker"].combine_chunks().to_pylist()
        columns = {name: _plain(trades[name]) for name in _CAPNP_FIELDS}
        files = []
        start = 0
        while start < len(tickers):
            end = start
            while end < len(tickers) and tickers[end] == tickers[start]:
                end += 1
            files.append(self._write(tickers[start], columns, start, end))
            start = end
        return files

    def _write(self, ticker: str, columns: dict[str, list[Any]], start: int, end: int) -> dict[str, Any]:
        parts = []
        for at in range(start, end):
            values = {field: columns[name][at] for name, field in _CAPNP_FIELDS.items()}
            parts.append(self._trade.new_message(**values).to_bytes())
        data = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(b"".join(parts))
        path = self._folder / f"{encode_ticker(ticker)}.capnp.zst"
        path.write_bytes(data)
        return {
            "path": str(path), "rows": end - start, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
            "ticker": ticker,
        }  # fmt: skip


_CAPNP_FIELDS = {
    "trade_id": "tradeId", "ticker": "ticker", "yes_price": "yesPrice", "no_price": "noPrice", "count": "count",
    "taker_side": "takerSide", "event_ns": "eventNs", "recv_ns": "recvNs", "is_block_trade": "isBlockTrade",
    "source": "source", "conn": "conn", "n": "n",
}  # fmt: skip
"""Columns and what they are called in the schema."""


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values; what a row lacks is what the schema says of an unknown."""
    if pa.types.is_boolean(column.type):
        return list(pc.fill_null(column, False).to_pylist())
    if pa.types.is_dictionary(column.type):
        return list(pc.fill_null(column.cast(pa.string()), "unknown").to_pylist())
    return list(column.to_pylist())
