"""Loading the tables of recorded days, with their holes in view.

One function, `load`, for Arrow, Polars, pandas and DuckDB; it needs the files alone, be they in a folder or on S3. Not here:
finding the files (`recorded`), folding order books (`books`).
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from ssmd_dagster.archive.recorded import (
    BrokenFileError,
    Dates,
    DayNotFoundError,
    DayNotReadyError,
    Recorded,
    Sealed,
    TableFile,
    bounds_of,
    dates_of,
    find,
    store_error,
)
from ssmd_dagster.archive.tables import CONTRACTS, DOLLARS, SCHEMA_VERSION, SCHEMAS, TABLE_OF_CHANNEL
from ssmd_dagster.day.causes import NEVER_DEGRADE
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.errors import ConfigurationError, NotFoundError, RefusedError, SsmdError, UsageError

Engine = Literal["arrow", "polars", "pandas", "duckdb"]
OnGap = Literal["raise", "warn", "ignore"]

PLACES = {DOLLARS: 6, CONTRACTS: 2}
"""Units that are scaled integers, with the decimal places that their numbers have."""

_CHANNEL_OF_TABLE = {table: channel for channel, table in TABLE_OF_CHANNEL.items()}
_WITHOUT_TIME = frozenset({"coverage", "security_master"})
_MAY_BE_ABSENT = frozenset({"late"})
_COVERAGE = "coverage"
_GAPS_TOLD = 10
_FEW = 8
_FROM_STORE = "AWS Error"
_DIGITS = 18


class GapError(RefusedError):
    """Rows of the asked interval are missing. `gaps` are the rows of `coverage` that say so, each with its date."""

    def __init__(self, what: str, *, gaps: Sequence[dict[str, Any]], where: str, do: str) -> None:
        super().__init__(what, where=where, do=do)
        self.gaps = tuple(gaps)


class FutureVersionError(SsmdError):
    """A table was written by a newer version, whose columns may mean something else."""


class GapWarning(UserWarning):
    """Rows of the asked interval are missing, or a day is not verified."""


class NoRowsWarning(UserWarning):
    """A ticker has no row; the text says whether the exchange listed it."""


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
        terms = [] if self.tickers is None else [pc.field("ticker").isin(_strings(self.tickers))]
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


def load(
    env_or_path: str | Path,
    date: Dates,
    table: str,
    tickers: str | Iterable[str] | None = None,
    columns: str | Sequence[str] | None = None,
    *,
    engine: Engine = "arrow",
    on_gap: OnGap = "raise",
    revision: int | None = None,
    from_ns: int | None = None,
    to_ns: int | None = None,
    decimals: bool = False,
) -> Any:
    """Load a table of one day or of a range of days.

    Only the columns and row groups that are needed are read. Prices are integers in micro-dollars, counts integers in
    hundredths of a contract, times integers in nanoseconds since the Unix epoch, UTC; every column's description and unit are
    in the metadata of the Arrow schema (`table.schema.field("yes_price").metadata`) and in `docs/data-dictionary.md`.

    Args:
        env_or_path: Name of an environment, or a folder of tables: a path, or `s3://bucket/folder`.
        date: A day, `2025-12-14`, or first and last of a range, both included.
        table: trade, ticker, orderbook, lifecycle, coverage, security_master or late.
        tickers: One or more market tickers; None is all.
        columns: One name or more, in the order wanted; None is all.
        engine: arrow (a `pyarrow.Table`), polars (a `LazyFrame`), pandas (a `DataFrame` of Arrow's types, so that integers
            stay exact beside nulls) or duckdb (a relation of the default connection). Polars and DuckDB read when asked to,
            with their own readers, which pass over the checksum of a page; the others check every page that they read.
        on_gap: What a hole of the asked interval, an unverified day, or (within a range) a day without tables or one that
            was not recorded is: raise an error, warn of it, or nothing. Maintenance of the exchange and scheduled pauses
            are no holes.
        revision: Take this sealed revision of the day; None is the latest.
        from_ns: Only rows from this event time on; it also limits which holes matter. `to_ns` likewise, exclusive.
        decimals: Give prices in dollars and counts in contracts, as exact decimals, in place of the scaled integers.

    Raises:
        DayNotFoundError: Nothing is recorded of the day; names the nearest ones.
        DayNotReadyError: The day has no tables yet or was not verified; says its condition.
        GapError: Rows are missing; lists the gaps.
        FutureVersionError: A table was written by a newer version.
        BrokenFileError: A table or manifest is damaged; names it.
        UsageError: No such table, column, engine or date.
        ConfigurationError: The engine's package is not installed, or the store refuses.

    Warns:
        GapWarning: With `on_gap="warn"`.
        NoRowsWarning: A ticker has no row in the interval.
    """
    if engine not in _ENGINES:
        raise UsageError(f"no such engine: {engine}", do=f"One of {', '.join(_ENGINES)}")
    if on_gap not in get_args(OnGap):
        raise UsageError(f"no such on_gap: {on_gap}", do=f"One of {', '.join(get_args(OnGap))}")
    columns = [columns] if isinstance(columns, str) else columns
    names = SCHEMAS[table].names if table in SCHEMAS else []
    if unknown := [name for name in columns or () if names and name not in names]:
        raise UsageError(f"the table {table} has no column {', '.join(unknown)}", do=f"It has {', '.join(names)}")
    package = importlib.import_module("pyarrow") if engine == "arrow" else _package(engine)
    selection = select(
        find(env_or_path),
        date,
        table,
        tickers=tickers,
        on_gap=on_gap,
        revision=revision,
        from_ns=from_ns,
        to_ns=to_ns,
    )
    if on_gap != "ignore":
        warn_of_absent_tickers(selection)
    return _ENGINES[engine](package, selection, columns, decimals)


def select(
    recorded: Recorded,
    date: Dates,
    table: str,
    *,
    tickers: str | Iterable[str] | None = None,
    on_gap: OnGap = "raise",
    revision: int | None = None,
    from_ns: int | None = None,
    to_ns: int | None = None,
) -> Selection:
    """Find the files and check the days' conditions and holes; see `load`."""
    if table not in SCHEMAS:
        raise UsageError(f"there is no table {table!r}", do=f"The tables: {', '.join(SCHEMAS)}")
    wanted = None if tickers is None else tuple([tickers] if isinstance(tickers, str) else dict.fromkeys(tickers))
    if table in _WITHOUT_TIME and (from_ns is not None or to_ns is not None):
        raise UsageError(f"the table {table} has no event time to choose by", do="Leave from_ns and to_ns out")
    if from_ns is not None and to_ns is not None and to_ns < from_ns:
        raise UsageError(f"the interval ends before it begins: {from_ns} to {to_ns}", do="Swap from_ns and to_ns")
    if table == _COVERAGE and wanted is not None:
        raise UsageError("the table coverage is not chosen by ticker", do="Use `coverage(…, tickers=…)`")
    files: list[TableFile] = []
    dates = dates_of(recorded, date)
    if absent := _not_recorded(date, dates):
        more = f" and {len(absent) - _GAPS_TOLD} more" if len(absent) > _GAPS_TOLD else ""
        what = f"not recorded, though the range asks for them: {', '.join(absent[:_GAPS_TOLD])}{more}"
        do = "on_gap='warn' or 'ignore' takes the days that there are; a missed day's trades can be had: `ssmd day backfill`"
        _tell(DayNotFoundError(what, where=recorded.name, do=do), on_gap)
    for day in dates:
        file, concern = _file_of(recorded, day, table, revision, alone=isinstance(date, str | Date))
        if concern is not None:
            _tell(concern, on_gap)
        if file is not None:
            files.append(file)
    selection = Selection(recorded, table, tuple(files), wanted, from_ns, to_ns)
    if on_gap != "ignore" and table in _CHANNEL_OF_TABLE:
        _check_holes(selection, on_gap)
    return selection


def coverage(
    env_or_path: str | Path,
    date: Dates,
    *,
    channels: str | Iterable[str] | None = None,
    tickers: str | Iterable[str] | None = None,
    revision: int | None = None,
) -> pa.Table:
    """Return what was recorded, per channel, market and interval: the table `coverage` with a first column `date`.

    `channels` are the recorder's, one or more (`trade`, `orderbook_delta`, …); with `tickers` only rows of all markets and of
    those. Raises what `load` raises, but for the gaps that it is about.
    """
    selection = select(find(env_or_path), date, _COVERAGE, on_gap="ignore", revision=revision)
    return coverage_of(selection.recorded, selection.files, channels, tickers)


def coverage_of(
    recorded: Recorded,
    files: Sequence[TableFile],
    channels: str | Iterable[str] | None = None,
    tickers: str | Iterable[str] | None = None,
) -> pa.Table:
    """Return the rows of the given files of `coverage`; see `coverage`."""
    condition = None if tickers is None else pc.field("market").is_null() | pc.field("market").isin(_strings(tickers))
    if channels is not None:
        named = _strings(channels)
        if unknown := sorted(set(named.to_pylist()) - set(TABLE_OF_CHANNEL)):
            raise UsageError(f"no such channel: {', '.join(unknown)}", do=f"One of {', '.join(TABLE_OF_CHANNEL)}")
        chosen = pc.field("channel").cast(pa.string()).isin(named)
        condition = chosen if condition is None else condition & chosen
    parts = [pa.schema([pa.field("date", pa.string()), *SCHEMAS[_COVERAGE]]).empty_table()]
    for file in files:
        rows = Selection(recorded, _COVERAGE, (file,)).read()
        rows = rows if condition is None else rows.filter(condition)
        parts.append(rows.add_column(0, "date", pa.array([file.date] * len(rows), pa.string())))
    return pa.concat_tables([part.replace_schema_metadata() for part in parts]).unify_dictionaries()


def dollars(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return micro-dollars as exact decimals in dollars, `decimal128(18, 6)`."""
    return _scaled(values, PLACES[DOLLARS])


def contracts(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return hundredths as exact decimals in contracts, `decimal128(18, 2)`."""
    return _scaled(values, PLACES[CONTRACTS])


def with_decimals(rows: pa.Table) -> pa.Table:
    """Return the table with every scaled integer as an exact decimal in its whole unit; metadata says so."""
    for index, field in enumerate(rows.schema):
        places = places_of(field)
        if places is not None:
            metadata = {**field.metadata, b"unit": field.metadata[b"unit"].partition(b" ")[2]}
            column = _scaled(rows.column(index), places)
            rows = rows.set_column(index, pa.field(field.name, column.type, field.nullable, metadata), column)
    return rows


def places_of(field: pa.Field) -> int | None:
    """Return the decimal places of a column of scaled integers, None for any other."""
    return PLACES.get((field.metadata or {}).get(b"unit", b"").decode())


def known_hole(row: dict[str, Any], from_ns: int | None, to_ns: int | None) -> bool:
    """Say whether a row of `coverage` tells of data missing in an interval."""
    return (
        row["state"] == "missing"
        and row["cause"] not in NEVER_DEGRADE
        and (to_ns is None or row["from_ns"] < to_ns)
        and (from_ns is None or row["to_ns"] > from_ns)
    )


def _not_recorded(wanted: Dates, dates: Sequence[str]) -> list[str]:
    """Return the days of a range that nothing is recorded of."""
    first, last = map(Date.fromisoformat, bounds_of(wanted))
    asked = ((first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1))
    return sorted(set(asked) - set(dates))


def _file_of(
    recorded: Recorded, date: str, table: str, revision: int | None, *, alone: bool
) -> tuple[TableFile | None, DayNotReadyError | None]:
    """Return a day's file and what speaks against serving it; raises where there is nothing to serve of a single day."""
    sealed = recorded.sealed(date, revision)
    file = recorded.file(date, table, sealed.revision if sealed is not None else revision)
    if file is not None:
        if recorded.has_manifests and sealed is None:
            return file, _not_ready(recorded, date, sealed, "its tables are not sealed yet")
        if sealed is not None and sealed.condition in ("pending", "missing"):
            return file, _not_ready(recorded, date, sealed, "it is not proved complete")
        return file, None
    if table in _MAY_BE_ABSENT and sealed is not None:
        return None, None
    others = [name for name in SCHEMAS if recorded.file(date, name) is not None]
    if others:
        raise NotFoundError(f"{date} has no table {table}", where=recorded.name, do=f"It has {', '.join(others)}")
    if sealed is None and date not in recorded.dates():
        raise recorded.not_recorded(date)
    concern = _not_ready(recorded, date, sealed, "it has no tables")
    if alone:
        raise concern
    return None, concern


def _not_ready(recorded: Recorded, date: str, sealed: Sealed | None, what: str) -> DayNotReadyError:
    reasons = "" if sealed is None or not sealed.condition_reasons else f": {'; '.join(sealed.condition_reasons)}"
    condition = "pending: not ended yet" if sealed is None else f"{sealed.condition}{reasons}"
    return DayNotReadyError(
        f"{date} is {condition}; {what}",
        where=recorded.name,
        do=f"See `ssmd day show {recorded.name} {date}`; on_gap='warn' or 'ignore' takes what there is",
    )


def _check_holes(selection: Selection, on_gap: OnGap) -> None:
    recorded, channel = selection.recorded, _CHANNEL_OF_TABLE[selection.table]
    known = [found for file in selection.files if (found := recorded.file(file.date, _COVERAGE, file.as_of))]
    if len(known) < len(selection.files):
        dates = ", ".join(sorted({file.date for file in selection.files} - {file.date for file in known}))
        what = f"{dates} has no table coverage, so its holes are not known"
        _tell(GapError(what, gaps=(), where=recorded.name, do="on_gap='ignore' takes what there is"), on_gap)
    rows = coverage_of(recorded, known, [channel], selection.tickers).to_pylist()
    holes = [row for row in rows if known_hole(row, selection.from_ns, selection.to_ns)]
    if holes:
        more = f"; and {len(holes) - _GAPS_TOLD} more" if len(holes) > _GAPS_TOLD else ""
        _tell(
            GapError(
                f"{len(holes)} gap{'s' if len(holes) > 1 else ''} in {channel}: "
                f"{'; '.join(map(_hole_text, holes[:_GAPS_TOLD]))}{more}",
                gaps=holes,
                where=recorded.name,
                do="on_gap='warn' or 'ignore' takes what there is",
            ),
            on_gap,
        )


def _hole_text(row: dict[str, Any]) -> str:
    times = [str(np.datetime64(row[name], "ns").astype("datetime64[ms]")) for name in ("from_ns", "to_ns")]
    market = "" if row["market"] is None else f" of {row['market']}"
    until = times[1].removeprefix(times[0][:11])  # without its date where that is the same
    return f"{times[0]}Z to {until}Z{market} ({row['cause']})"


def _tell(concern: SsmdError, on_gap: OnGap) -> None:
    if on_gap == "raise":
        raise concern
    if on_gap == "warn":
        warnings.warn(concern.what, GapWarning, stacklevel=_outside())


def _outside() -> int:
    """Return the stack level of the researcher's own line, as the caller of this function counts it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    return level


def warn_of_absent_tickers(selection: Selection) -> None:
    """Warn of tickers without a row, once for those that existed and once for the others, as the security master says."""
    if selection.tickers is None or selection.table in _WITHOUT_TIME or not selection.files:
        return
    absent = selection.absent_tickers()
    dates = selection.files[0].date
    dates += f" to {selection.files[-1].date}" if len(selection.files) > 1 else ""
    for tickers, why in _listing(selection, absent):
        if tickers:
            named = ", ".join(tickers[:_GAPS_TOLD])
            more = f" and {len(tickers) - _GAPS_TOLD} more have" if len(tickers) > _GAPS_TOLD else ""
            have = more or (" has" if len(tickers) == 1 else " have")
            note = f"{named}{have} no row in {selection.table} of {dates}: {why}"
            warnings.warn(note, NoRowsWarning, stacklevel=_outside())


def _listing(selection: Selection, tickers: list[str]) -> list[tuple[list[str], str]]:
    """Return the tickers that the exchange listed and those that it did not, each with what that means."""
    listed = listed_of(selection, tickers) if tickers else None
    if listed is None:
        return [(tickers, "whether listed by the exchange is not known")]
    return [
        ([one for one in tickers if one in listed], "listed by the exchange, and nothing of the kind happened"),
        ([one for one in tickers if one not in listed], "not among the recorded markets"),
    ]


def listed_of(selection: Selection, tickers: Sequence[str]) -> set[str] | None:
    """Return which of the tickers the exchange listed, as the security masters of a selection's days say; None without any."""
    recorded = selection.recorded
    files = [found for file in selection.files if (found := recorded.file(file.date, "security_master", file.as_of))]
    if not files:
        return None
    masters = Selection(recorded, "security_master", tuple(files), tuple(tickers)).read(["ticker"])
    return set(masters["ticker"].to_pylist())


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


def _scaled(values: pa.Array | pa.ChunkedArray, places: int) -> pa.Array | pa.ChunkedArray:
    """Give 64-bit integers a decimal point by widening them to 128 bits: no arithmetic, so nothing is rounded."""
    kind = pa.decimal128(_DIGITS, places)
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([_scaled(chunk, places) for chunk in values.chunks], kind)
    low = values.fill_null(0).to_numpy()
    if len(low) and max(int(low.max()), -int(low.min())) >= 10**_DIGITS:
        raise SsmdError(f"a number of more than {_DIGITS} digits", do="Use the integers")
    wide = np.stack([low, low >> 63], axis=1)
    valid = None
    if values.null_count:
        valid = pa.py_buffer(np.packbits(values.is_valid().to_numpy(zero_copy_only=False), bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(np.ascontiguousarray(wide))])


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"the engine {name} needs the package {name}, which is not installed",
            do=f"Run: pip install {name} (or, from the project's folder, pip install -e '.[research]')"
            if (project_dir() / "pyproject.toml").exists()
            else f"Run: pip install {name} (or ssmd-dagster[research])",
        ) from error


def _to_arrow(_package: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> pa.Table:
    rows = selection.read(columns)
    return with_decimals(rows) if decimals else rows


def _to_pandas(pandas: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> Any:
    rows = _to_arrow(None, selection, columns, decimals)
    return rows.to_pandas(types_mapper=pandas.ArrowDtype)


def _to_polars(polars: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> Any:
    dataset, column = selection.dataset(), polars.col
    if not selection.files:
        frame = polars.from_arrow(dataset.schema.empty_table()).lazy()
    elif _is_local(selection):
        frame = polars.scan_parquet(selection.paths, missing_columns="insert", extra_columns="ignore")
    else:
        frame = polars.scan_pyarrow_dataset(dataset)
    if selection.tickers is not None:
        frame = frame.filter(
            polars.any_horizontal(polars.lit(False), *(column("ticker") == t for t in selection.tickers))
        )
    if selection.from_ns is not None:
        frame = frame.filter(column("event_ns") >= selection.from_ns)
    if selection.to_ns is not None:
        frame = frame.filter(column("event_ns") < selection.to_ns)
    frame = frame.select(columns if columns is not None else SCHEMAS[selection.table].names)
    if decimals:
        frame = frame.with_columns(
            (column(name).cast(polars.Decimal(_DIGITS, 0)) * _smallest(places)).cast(polars.Decimal(_DIGITS, places))
            for name, places in _scaled_columns(selection.table, columns)
        )
    return frame


def _to_duckdb(duckdb: Any, selection: Selection, columns: Sequence[str] | None, decimals: bool) -> Any:
    dataset = selection.dataset()
    if selection.files and _is_local(selection):
        relation = duckdb.read_parquet(selection.paths, union_by_name=True)
    else:
        relation = duckdb.from_arrow(dataset)
    terms = []
    if selection.tickers is not None:
        quoted = ["'" + ticker.replace("'", "''") + "'" for ticker in selection.tickers]
        terms.append(f"ticker IN ({', '.join(quoted)})" if quoted else "false")
    if selection.from_ns is not None:
        terms.append(f"event_ns >= {selection.from_ns}")
    if selection.to_ns is not None:
        terms.append(f"event_ns < {selection.to_ns}")
    if terms:
        relation = relation.filter(" AND ".join(terms))
    shown = {name: f'"{name}"' for name in (columns if columns is not None else SCHEMAS[selection.table].names)}
    for name, places in _scaled_columns(selection.table, columns) if decimals else ():
        kind = f"DECIMAL({_DIGITS}, {places})"
        shown[name] = f'CAST(CAST("{name}" AS DECIMAL({_DIGITS}, 0)) * {_smallest(places):f} AS {kind}) AS "{name}"'
    return relation.project(", ".join(shown.values()))


def _smallest(places: int) -> Decimal:
    return Decimal(1).scaleb(-places)


def _strings(values: str | Iterable[str]) -> pa.Array:
    return pa.array([values] if isinstance(values, str) else list(values), pa.string())


def _is_local(selection: Selection) -> bool:
    return isinstance(selection.recorded.filesystem, fs.LocalFileSystem)


def _scaled_columns(table: str, columns: Sequence[str] | None) -> list[tuple[str, int]]:
    return [
        (field.name, places)
        for field in SCHEMAS[table]
        if (places := places_of(field)) is not None and (columns is None or field.name in columns)
    ]


_ENGINES: dict[str, Callable[[Any, Selection, Sequence[str] | None, bool], Any]] = {
    "arrow": _to_arrow,
    "polars": _to_polars,
    "pandas": _to_pandas,
    "duckdb": _to_duckdb,
}
