"""Copying rows of a recorded day into one file for other programs. Not for reading them in Python: see `reader`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq

from ssmd_dagster.archive.selection import Selection
from ssmd_dagster.archive.units import with_decimals
from ssmd_dagster.errors import ConfigurationError, RefusedError, UsageError

_ROWS_A_GROUP = 128 * 1024

Told = Callable[[int], None]


class _Writer(Protocol):
    def write(self, rows: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


def export(
    selection: Selection, to: Path, *, decimals: bool = False, overwrite: bool = False, told: Told = lambda _rows: None
) -> int:
    """Write the selected rows to a file whose ending says the format, and return how many there are.

    The file is whole or not there at all. CSV and JSON lines have no types: take `decimals` there for prices in dollars, which
    are then text in JSON, so that no reader rounds them.

    Args:
        selection: Files and rows, as `reader.select` finds them.
        to: Ends in `.parquet`, `.csv`, `.jsonl` or `.arrow`.
        decimals: Prices in dollars and counts in contracts, as exact decimals.
        overwrite: Replace a file that is there.
        told: Called with the number of rows written so far.

    Raises:
        UsageError: Another ending.
        RefusedError: There is such a file already.
        ConfigurationError: The folder cannot be written to.
        BrokenFileError: A table is damaged; names it.
    """
    if to.suffix not in _WRITERS:
        raise UsageError(
            f"the name {to.name} does not say a known format", do=f"Let it end in one of {', '.join(_WRITERS)}"
        )
    if to.exists() and not overwrite:
        raise RefusedError("there is such a file already", where=str(to), do="Choose another name, or say --overwrite")
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    dataset = selection.dataset()
    try:
        rows = _write(selection, dataset, part, to.suffix, decimals, told)
        part.replace(to)
    except FileNotFoundError as error:
        raise ConfigurationError("the folder is not there", where=str(to.parent), do="Make it first") from error
    except PermissionError as error:
        raise ConfigurationError(
            "the folder cannot be written to", where=str(to.parent), do="Choose another"
        ) from error
    except (pa.ArrowException, OSError) as error:
        selection.read()  # raises with the name of the file that is damaged
        raise ConfigurationError(f"cannot be written: {error}", where=str(to), do="Check the disk") from error
    finally:
        part.unlink(missing_ok=True)
    return rows


def _write(selection: Selection, dataset: Any, part: Path, suffix: str, decimals: bool, told: Told) -> int:
    def shown(rows: pa.Table) -> pa.Table:
        return with_decimals(rows) if decimals else rows

    writer = _WRITERS[suffix](part, shown(dataset.schema.empty_table()).schema)
    written = 0
    try:
        for batch in dataset.to_batches(filter=selection.condition(), batch_size=_ROWS_A_GROUP):
            for rows in shown(pa.Table.from_batches([batch])).to_batches():
                writer.write(rows)
            written += len(batch)
            told(written)
    finally:
        writer.close()
    return written


class _Parquet:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, rows: pa.RecordBatch) -> None:
        self._writer.write_batch(rows, row_group_size=_ROWS_A_GROUP)

    def close(self) -> None:
        self._writer.close()


class _Csv:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = pa.schema([field.with_type(_plain(field.type)) for field in schema])
        self._writer = pyarrow.csv.CSVWriter(path, self._schema)

    def write(self, rows: pa.RecordBatch) -> None:
        self._writer.write_table(pa.Table.from_batches([rows]).cast(self._schema))

    def close(self) -> None:
        self._writer.close()


class _Arrow:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        # The words of a dictionary differ from one batch to the next, which Arrow's file format takes only as text.
        self._schema = pa.schema([field.with_type(_plain(field.type)) for field in schema], schema.metadata)
        self._file = path.open("wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def write(self, rows: pa.RecordBatch) -> None:
        self._writer.write_table(pa.Table.from_batches([rows]).cast(self._schema))

    def close(self) -> None:
        self._writer.close()
        self._file.close()


class _JsonLines:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = path.open("wb")
        self._encoder = msgspec.json.Encoder(decimal_format="string")

    def write(self, rows: pa.RecordBatch) -> None:
        self._file.write(self._encoder.encode_lines(rows.to_pylist()))

    def close(self) -> None:
        self._file.close()


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


_WRITERS: Mapping[str, Callable[[Path, pa.Schema], _Writer]] = {
    ".parquet": _Parquet,
    ".csv": _Csv,
    ".jsonl": _JsonLines,
    ".arrow": _Arrow,
}
