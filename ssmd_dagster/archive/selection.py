"""The rows of one table that an answer comes from: which files, which rows of them, and how they are read.

Not here: which files those are, and what speaks against serving them (`reader`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from ssmd_dagster.archive.recorded import (
    BrokenFileError,
    Recorded,
    TableFile,
    store_error,
)
from ssmd_dagster.archive.tables import SCHEMA_VERSION, SCHEMAS
from ssmd_dagster.errors import SsmdError

_FEW = 8
_FROM_STORE = "AWS Error"


class FutureVersionError(SsmdError):
    """A table was written by a newer version, whose columns may mean something else."""


class Selection(NamedTuple):
    """The files of one table that an answer comes from, and which of their rows are wanted."""

    recorded: Recorded
    table: str
    files: tuple[TableFile, ...]
    tickers: tuple[str, ...] | None = None
    from_ns: int | None = None
    to_ns: int | None = None

    @property
    def paths(self) -> list[str]:
        """Return the files' paths."""
        return [file.path for file in self.files]

    def dataset(self) -> ds.FileSystemDataset:
        """Return all rows of the files as a lazy dataset; it reads their footers.

        Raises:
            BrokenFileError: A footer cannot be read, or it lacks what every table states.
            FutureVersionError: A table is of a later version than this one knows.
        """
        filesystem = self.recorded.filesystem
        parquet = _parquet()
        fragments = [_opened(parquet, filesystem, file) for file in self.files]
        schema = SCHEMAS[self.table].with_metadata(
            {
                "ssmd.env": self.recorded.name,
                "ssmd.table": self.table,
                "ssmd.files": ",".join(f"{file.date}/r{file.revision}" for file in self.files),
            }
        )
        return ds.FileSystemDataset(fragments, schema, parquet, filesystem)

    def stated(self) -> dict[str, str]:
        """Return what the first file says of itself: `ssmd.date`, `ssmd.open_ns`, …; raises what `dataset` raises."""
        metadata = next(self.dataset().get_fragments()).physical_schema.metadata
        return {key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"ssmd.")}

    def condition(self) -> pc.Expression | None:
        """Return the expression of the wanted rows, None for all; equality lets Parquet's statistics skip row groups."""
        terms = [] if self.tickers is None else [pc.field("ticker").isin(strings(self.tickers))]
        if self.tickers is not None and len(self.tickers) == 1:
            terms = [pc.field("ticker") == self.tickers[0]]
        if self.from_ns is not None:
            terms.append(pc.field("event_ns") >= self.from_ns)
        if self.to_ns is not None:
            terms.append(pc.field("event_ns") < self.to_ns)
        expression = None
        for term in terms:
            expression = term if expression is None else expression & term
        return expression

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the wanted rows into memory.

        Raises:
            BrokenFileError: A file is damaged; names it. And what `dataset` raises.
        """
        dataset = self.dataset()
        try:
            rows = dataset.to_table(columns=None if columns is None else list(columns), filter=self.condition())
        except (pa.ArrowException, OSError) as error:
            raise self._broken(dataset, error) from error
        return rows.unify_dictionaries()

    def row_count(self) -> int:
        """Return the number of wanted rows; without conditions the files' footers tell."""
        dataset = self.dataset()
        try:
            rows: int = dataset.count_rows(filter=self.condition())
        except (pa.ArrowException, OSError) as error:
            raise self._broken(dataset, error) from error
        return rows

    def absent_tickers(self) -> list[str]:
        """Return those of the wanted tickers that have no row; of a few, one row each is looked for, which reads little."""
        tickers = self.tickers or ()
        dataset = self.dataset()
        try:
            if len(tickers) <= _FEW:
                found = {ticker for ticker in tickers if self._replace(tickers=(ticker,))._any(dataset)}
            else:
                found = set(
                    pc.unique(dataset.to_table(columns=["ticker"], filter=self.condition())["ticker"]).to_pylist()
                )
        except (pa.ArrowException, OSError) as error:
            raise self._broken(dataset, error) from error
        return [ticker for ticker in tickers if ticker not in found]

    def _any(self, dataset: ds.FileSystemDataset) -> bool:
        return bool(dataset.head(1, columns=[], filter=self.condition()).num_rows)

    def _broken(self, dataset: ds.FileSystemDataset, error: Exception) -> SsmdError:
        """Find the file that cannot be read."""
        for fragment in dataset.get_fragments():
            try:
                fragment.to_table(schema=dataset.schema, filter=self.condition())
            except (pa.ArrowException, OSError) as cause:
                return _broken(fragment.path, cause)
        return _broken(", ".join(self.paths), error)


def _opened(parquet: ds.ParquetFileFormat, filesystem: fs.FileSystem, file: TableFile) -> ds.ParquetFileFragment:
    fragment = parquet.make_fragment(file.path, filesystem)
    try:
        metadata = fragment.physical_schema.metadata or {}
        version = int(metadata[b"ssmd.schema_version"])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise _broken(file.path, error) from error
    if version > SCHEMA_VERSION:
        raise FutureVersionError(
            f"the table is of version {version}, this installation knows versions up to {SCHEMA_VERSION}",
            where=file.path,
            do="Install a newer ssmd-dagster",
        )
    return fragment


def _parquet() -> ds.ParquetFileFormat:
    options = ds.ParquetFragmentScanOptions(pre_buffer=True, page_checksum_verification=True)
    return ds.ParquetFileFormat(default_fragment_scan_options=options)


def _broken(path: str, error: Exception) -> SsmdError:
    """Make the error of a file that cannot be read: it is damaged, unless the store says something of itself."""
    if isinstance(error, OSError) and (_FROM_STORE in str(error) or isinstance(error, FileNotFoundError)):
        return store_error(error, path)
    text = str(error).partition("\n")[0]
    what = f"no {text}" if isinstance(error, KeyError) else text
    return BrokenFileError(
        f"the table cannot be read: {what}",
        where=path,
        do="The raw files hold its rows: `ssmd day normalize` makes the table again, as the next revision",
    )


def strings(values: str | Iterable[str]) -> pa.Array:
    """Return one text or several as an array of strings."""
    return pa.array([values] if isinstance(values, str) else list(values), pa.string())
