"""A block of raw records as Arrow tables, in C++ where its lines are of today's shape and line by line where they are not.

Both ways give the same rows, which is what the exchange's `RowReader` promises. What no reader can read is counted with its
reason and stays in raw. Not for which rows a day keeps: see `normalize`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from ssmd_dagster.archive.drift import Drift, DriftLog
from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.archive.tables import LIFECYCLE, ORDERBOOK, TICKER, TRADE, WORD
from ssmd_dagster.exchange import REST, Row, RowReader

NOT_JSON, NOT_A_RECORD = "not JSON", "not a record"
ROWS_AT_ONCE = 2_000
"""How many rows of a table that are read one by one wait in memory, where each takes a kilobyte."""


def _loose(schema: pa.Schema) -> pa.Schema:
    fields = [field for field in schema if field.name not in ("conn", "source")]
    return pa.schema(
        [
            pa.field(
                field.name, WORD if field.name == "ticker" else field.type, field.nullable or field.name == "event_ns"
            )
            for field in fields
        ]
    )


LOOSE: Mapping[str, pa.Schema] = MappingProxyType(
    {
        name: _loose(schema)
        for name, schema in (("trade", TRADE), ("ticker", TICKER), ("orderbook", ORDERBOOK), ("lifecycle", LIFECYCLE))
    }
)
"""The tables' schemas while their rows are on the way: no connection and source yet, no event time where none was given."""


class BlockRows(NamedTuple):
    """What a block of records of one connection and channel holds.

    `tables` are rows by table, in no order. Of the block's `records`, `control` and `rejected` (by reason) give no rows,
    the others at least one; `markets` are rows of the security master. A page of which a row cannot be read counts as
    rejected (`rejected_pages` has its ordinal), though its other rows are in `tables`. A page without rows is `control`.
    """

    records: int
    tables: Mapping[str, pa.Table]
    markets: Sequence[Row]
    control: int
    rejected: Mapping[str, int]
    rejected_pages: Sequence[int]
    drift: tuple[Drift, ...]


def read_block(reader: RowReader, channel: str, records: bytes) -> BlockRows:
    """Read the lines of one channel of one connection. Safe in any thread; memory: about three times the block."""
    lines = int(np.count_nonzero(np.frombuffer(records, np.uint8) == ord("\n")))  # several times as fast as `count`
    drift = DriftLog()
    quick, left = _read_quickly(reader, channel, records, lines, drift)
    slow = _Patient(reader, drift)
    if channel == REST and (paged := _read_pages(reader, records)) is not None:
        quick["trade"], slow.control = paged
    elif left is None:
        for line in records.splitlines():
            slow.take(line)
    elif len(left):
        ends = np.flatnonzero(np.frombuffer(records, np.uint8) == ord("\n"))
        for at in left.tolist():
            slow.take(records[0 if at == 0 else int(ends[at - 1]) + 1 : int(ends[at])])
    tables = slow.tables()
    for name, table in quick.items():
        tables[name] = pa.concat_tables([table, tables[name]]) if name in tables else table
    return BlockRows(lines, tables, slow.markets, slow.control, slow.rejected, slow.rejected_pages, drift.found())


def _read_quickly(
    reader: RowReader, channel: str, records: bytes, lines: int, drift: DriftLog
) -> tuple[dict[str, pa.Table], np.ndarray | None]:
    """Return what can be read as a whole, and the numbers of the lines that are left; None where all are."""
    wire = reader.wire_type(channel)
    if wire is None or not records.isascii():
        return {}, None
    schema = pa.schema([("n", pa.int64()), ("recv_ns", pa.int64()), ("wire", wire), ("pad", pa.list_(pa.string()))])
    try:
        parsed = pyarrow.json.read_json(
            pa.BufferReader(records),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(records) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=schema, newlines_in_values=False, unexpected_field_behavior="infer"
            ),
        )
    except pa.ArrowException:
        return {}, None
    if parsed.num_rows != lines:  # a line that is not exactly one object
        return {}, None
    batch = parsed.combine_chunks().to_batches()[0]
    if {field.name for field in batch.schema} - set(schema.names):  # notes, text that is no JSON
        odd = [batch.column(i) for i, field in enumerate(batch.schema) if field.name not in schema.names]
        plain = ~np.logical_or.reduce([pc.is_valid(column).to_numpy(zero_copy_only=False) for column in odd])
    else:
        plain = np.ones(lines, np.bool_)
    numbered = batch.column("n").null_count == 0 and batch.column("recv_ns").null_count == 0
    if not numbered:
        return {}, None
    read = reader.columns(channel, batch.column("wire"))
    ok = read.readable & plain
    for key, mask in read.unknown:
        having = np.flatnonzero(mask & ok)
        if len(having):
            example = records.split(b"\n", int(having[0]) + 1)[int(having[0])]
            drift.add("key", key.name, key.kind, len(having), example)
    loose = LOOSE[read.table]
    columns = read.columns | {"n": batch.column("n"), "recv_ns": batch.column("recv_ns")}
    arrays = [_as(columns[field.name], field.type) for field in loose]
    table = pa.Table.from_arrays(arrays, names=loose.names)
    if not ok.all():
        table = table.filter(pa.array(ok))
    # the masks have seen to it that no column lacks what it must have
    return {read.table: table.cast(loose)}, np.flatnonzero(~ok)


def _read_pages(reader: RowReader, records: bytes) -> tuple[pa.Table, int] | None:
    """Return the rows of a block of pages, and how many pages have none; None where they have to be read one by one."""
    try:
        read = [parse_record(line) for line in records.splitlines()]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    found = reader.pages([bytes(record.wire) for record in read])
    if found is None:
        return None
    rows, counts = found
    columns = rows.columns | {
        name: pa.array(np.repeat(np.array([getattr(record, name) for record in read], np.int64), counts))
        for name in ("n", "recv_ns")
    }
    loose = LOOSE[rows.table]
    table = pa.Table.from_arrays([_as(columns[field.name], field.type) for field in loose], names=loose.names)
    made: pa.Table = table.cast(loose)
    return made, counts.count(0)


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if kind == WORD and not pa.types.is_dictionary(array.type):
        return array.dictionary_encode()
    return array if array.type == kind else array.cast(kind)


class _Patient:
    """Reads line by line."""

    def __init__(self, reader: RowReader, drift: DriftLog) -> None:
        self._reader, self._drift = reader, drift
        self._rows: dict[str, list[Row]] = {}
        self._tables: dict[str, list[pa.Table]] = {}
        self.markets: list[Row] = []
        self.control = 0
        self.rejected_pages: list[int] = []
        self.rejected: Counter[str] = Counter()

    def take(self, line: bytes) -> None:
        """Read one record."""
        try:
            record = parse_record(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._reject(NOT_A_RECORD, line)
        if record.note is not None:
            self.control += 1
            return None
        if not bytes(record.wire):
            return self._reject(NOT_JSON, line)
        message = self._reader.rows(bytes(record.wire))
        for key in message.unknown:
            if key.kind == "type":
                self._drift.add("type", key.name, "", 1, line)
            else:
                self._drift.add("key", key.name, key.kind, 1, line)
        if message.outcome == "rejected":
            self._reject(message.reason, line, message.type)
            self.rejected_pages += [record.n] * bool(message.rows)
        elif message.outcome == "control" or not message.rows:
            self.control += 1
        if message.table == "security_master":
            self.markets += message.rows
        elif message.rows:
            target = self._rows.setdefault(message.table, [])
            for row in message.rows:
                row["n"], row["recv_ns"] = record.n, record.recv_ns
                target.append(row)
            if len(target) > ROWS_AT_ONCE:
                self._make_table(message.table)
        return None

    def _reject(self, reason: str, line: bytes, kind: str = "") -> None:
        self.rejected[reason] += 1
        self._drift.add("shape", f"{kind}: {reason}" if kind else reason, "", 1, line)

    def _make_table(self, name: str) -> None:
        schema, rows = LOOSE[name], self._rows.pop(name)
        arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
        self._tables.setdefault(name, []).append(pa.Table.from_arrays(arrays, schema=schema))

    def tables(self) -> dict[str, pa.Table]:
        """Return the rows."""
        for name in list(self._rows):
            self._make_table(name)
        return {name: pa.concat_tables(tables) for name, tables in self._tables.items()}
