"""Loading the tables of recorded days, with their holes in view.

One function, `load`, for Arrow, Polars, pandas and DuckDB; it needs the files alone, be they in a folder or on S3. Not here:
finding the files (`recorded`), reading their rows (`selection`, `engines`), folding order books (`books`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssmd_dagster.archive.engines import ENGINES, Engine, library_of
from ssmd_dagster.archive.recorded import (
    Dates,
    DayNotFoundError,
    DayNotReadyError,
    Recorded,
    Sealed,
    TableFile,
    bounds_of,
    dates_of,
    find,
)
from ssmd_dagster.archive.selection import Selection, strings
from ssmd_dagster.archive.tables import SCHEMAS, TABLE_OF_CHANNEL
from ssmd_dagster.day.causes import NEVER_DEGRADE
from ssmd_dagster.errors import NotFoundError, RefusedError, SsmdError, UsageError

OnGap = Literal["raise", "warn", "ignore"]

_CHANNEL_OF_TABLE = {table: channel for channel, table in TABLE_OF_CHANNEL.items()}
_WITHOUT_TIME = frozenset({"coverage", "security_master"})
_MAY_BE_ABSENT = frozenset({"late"})
_COVERAGE = "coverage"
_GAPS_TOLD = 10


class GapError(RefusedError):
    """Rows of the asked interval are missing. `gaps` are the rows of `coverage` that say so, each with its date."""

    def __init__(self, what: str, *, gaps: Sequence[dict[str, Any]], where: str, do: str) -> None:
        super().__init__(what, where=where, do=do)
        self.gaps = tuple(gaps)


class GapWarning(UserWarning):
    """Rows of the asked interval are missing, or a day is not verified."""


class NoRowsWarning(UserWarning):
    """A ticker has no row; the text says whether the exchange listed it."""


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
    if engine not in ENGINES:
        raise UsageError(f"no such engine: {engine}", do=f"One of {', '.join(ENGINES)}")
    if on_gap not in get_args(OnGap):
        raise UsageError(f"no such on_gap: {on_gap}", do=f"One of {', '.join(get_args(OnGap))}")
    columns = [columns] if isinstance(columns, str) else columns
    names = SCHEMAS[table].names if table in SCHEMAS else []
    if unknown := [name for name in columns or () if names and name not in names]:
        raise UsageError(f"the table {table} has no column {', '.join(unknown)}", do=f"It has {', '.join(names)}")
    library = library_of(engine)
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
    return ENGINES[engine](library, selection, columns, decimals)


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
    condition = None if tickers is None else pc.field("market").is_null() | pc.field("market").isin(strings(tickers))
    if channels is not None:
        named = strings(channels)
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
