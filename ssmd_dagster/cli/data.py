"""`ssmd data`: looking at recorded days. Parsing and printing only; no server is asked.

ENV is an environment's name or, as for `ssmd_dagster.load`, a folder of tables.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from ssmd_dagster.archive.books import MICROS, Book, Level, book_at
from ssmd_dagster.archive.export import export
from ssmd_dagster.archive.reader import (
    GapWarning,
    coverage_of,
    select,
    warn_of_absent_tickers,
)
from ssmd_dagster.archive.recorded import BrokenFileError, Recorded, TableFile, find
from ssmd_dagster.archive.selection import FutureVersionError, Selection
from ssmd_dagster.archive.tables import SCHEMAS
from ssmd_dagster.cli.desk import env_argument, json_option
from ssmd_dagster.cli.output import message, print_json, thousands
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.day.events import Gap
from ssmd_dagster.errors import ExitCode, UsageError
from ssmd_dagster.kalshi.scaled import rfc3339_ns

_TELL_EVERY_S = 2.0
_from_option = click.option("--from", "first", metavar="YYYY-MM-DD", help="First day. Default: the first recorded.")
_to_option = click.option("--to", "last", metavar="YYYY-MM-DD", help="Last day, included. Default: the last recorded.")
_revision_option = click.option(
    "--revision", type=click.IntRange(min=1), help="A sealed revision. Default: the latest."
)
_env = click.argument("env", metavar="ENV")
_date = click.argument("date", metavar="DATE")


@click.group("data")
def data_group() -> None:
    """Look at recorded days: what there is, what is missing, books, exports."""


@data_group.command("inventory")
@env_argument
@_from_option
@_to_option
@json_option
def inventory_command(env: str, first: str | None, last: str | None, as_json: bool) -> None:
    """List recorded days: revision, condition, rows of each table, size."""
    recorded = find(env)
    days = []
    for date in _each(recorded, first, last, "counting rows of"):
        sealed = recorded.sealed(date)
        as_of = None if sealed is None else sealed.revision
        files = {table: file for table in SCHEMAS if (file := recorded.file(date, table, as_of)) is not None}
        days.append(
            {
                "date": date,
                "revision": as_of,
                "condition": "unknown"
                if not recorded.has_manifests
                else "pending"
                if sealed is None
                else sealed.condition,
                "tables": {
                    table: {
                        "rows": _rows(recorded, file),
                        "bytes": file.size,
                        "revision": file.revision,
                        "path": file.path,
                    }
                    for table, file in files.items()
                },
            }
        )
    if as_json:
        print_json({"environment": env, "days": days})
        return
    names = list(SCHEMAS)
    lines = [["DATE", "REV", "CONDITION", *(name.upper() for name in names), "MB"]]
    for day in days:
        tables: Mapping[str, Any] = day["tables"]  # type: ignore[assignment] # one mapping holds several types
        rows = [_shown(tables[name]["rows"]) if name in tables else "-" for name in names]
        megabytes = f"{sum(table['bytes'] for table in tables.values()) / 1e6:,.1f}"
        revision = "-" if day["revision"] is None else f"r{day['revision']}"
        lines.append([str(day["date"]), revision, str(day["condition"]), *rows, megabytes])
    _print_table(lines, right=range(3, len(names) + 4))


@data_group.command("gaps")
@env_argument
@_from_option
@_to_option
@json_option
def gaps_command(env: str, first: str | None, last: str | None, as_json: bool) -> None:
    """List all intervals that were not simply recorded, with cause and what became of them."""
    recorded = find(env)
    rows: list[dict[str, Any]] = []
    looked = False
    for date in _each(recorded, first, last, "reading gaps of"):
        looked = True
        sealed = recorded.sealed(date)
        file = recorded.file(date, "coverage", None if sealed is None else sealed.revision)
        if file is not None:
            rows += [row for row in coverage_of(recorded, [file]).to_pylist() if row["state"] != "present"]
        elif sealed is not None:
            rows += [_gap_row(date, gap, sealed.close_ns) for gap in sealed.gaps]
        else:
            message(f"{date} is not ended yet; see `ssmd day show {env} {date}`")
    if as_json:
        print_json({"environment": env, "gaps": rows})
    elif rows:
        _print_intervals(rows)
    elif looked:
        message("No gaps")


@data_group.command("coverage")
@_env
@_date
@click.option("--channel", "channels", multiple=True, help="Only this channel; may be repeated.")
@click.option(
    "--ticker", "tickers", multiple=True, help="Besides rows of all markets only this one's; may be repeated."
)
@_revision_option
@json_option
def coverage_command(
    env: str, date: str, channels: tuple[str, ...], tickers: tuple[str, ...], revision: int | None, as_json: bool
) -> None:
    """Say of each channel and interval of a day whether it is present, missing, healed or repaired."""
    selection = select(find(env), parse_date(date), "coverage", on_gap="ignore", revision=revision)
    rows = coverage_of(selection.recorded, selection.files, channels or None, tickers or None).to_pylist()
    if as_json:
        print_json({"environment": env, "date": date, "coverage": rows})
        return
    _print_intervals(rows)


@data_group.command("export")
@_env
@_date
@click.argument("table", type=click.Choice(list(SCHEMAS)))
@click.option(
    "--to", type=click.Path(path_type=Path, dir_okay=False), required=True, help=".parquet, .csv, .jsonl or .arrow"
)
@click.option("--tickers", help="Only these markets, separated by commas.")
@click.option("--decimals", is_flag=True, help="Prices in dollars and counts in contracts, as exact decimals.")
@click.option("--on-gap", type=click.Choice(["raise", "warn", "ignore"]), default="warn", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@_revision_option
@json_option
def export_command(
    env: str,
    date: str,
    table: str,
    to: Path,
    tickers: str | None,
    decimals: bool,
    on_gap: str,
    overwrite: bool,
    revision: int | None,
    as_json: bool,
) -> int:
    """Copy rows of a day's table into a file. With gaps in it the exit code is 3."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selection = select(
            find(env),
            parse_date(date),
            table,
            tickers=None if tickers is None else [ticker for ticker in tickers.split(",") if ticker],
            on_gap=on_gap,  # type: ignore[arg-type] # click checks the choice
            revision=revision,
        )
        if on_gap != "ignore":
            warn_of_absent_tickers(selection)
    for warning in caught:
        message(f"Warning: {warning.message}")
    with _progress(f"rows of {table}") as told:
        rows = export(selection, to, decimals=decimals, overwrite=overwrite, told=told)
    gaps = any(issubclass(warning.category, GapWarning) for warning in caught)
    if as_json:
        print_json({"environment": env, "date": date, "table": table, "file": str(to), "rows": rows, "gaps": gaps})
    else:
        click.echo(f"{thousands(rows)} rows to {to}")
    return int(ExitCode.DEGRADED if gaps else ExitCode.OK)


@data_group.command("book")
@_env
@click.argument("ticker")
@click.option("--at", "at", required=True, metavar="TIME", help="2025-12-14T14:30:00.25Z, or nanoseconds since 1970.")
@click.option("--depth", type=click.IntRange(min=1), help="At most so many levels a side. Default: all.")
@click.option("--allow-unknown", is_flag=True, help="Show a book inside a gap too; the exit code is then 3.")
@_revision_option
@json_option
def book_command(
    env: str, ticker: str, at: str, depth: int | None, allow_unknown: bool, revision: int | None, as_json: bool
) -> int:
    """Show a market's order book at an instant, by the exchange's time."""
    book = book_at(env, ticker, _instant(at), depth, allow_unknown=allow_unknown, revision=revision)
    if as_json:
        print_json(
            {
                "environment": env,
                **msgspec.to_builtins(book),
                "known": book.known,
                "yes": [level._asdict() for level in book.yes],
                "no": [level._asdict() for level in book.no],
            }
        )
    else:
        _print_book(book)
    return int(ExitCode.OK if book.known else ExitCode.DEGRADED)


def _rows(recorded: Recorded, file: TableFile) -> int | None:
    """Return how many rows a table has; None, and a word of warning, where that one cannot be read: the others still can."""
    try:
        return Selection(recorded, file.table, (file,)).row_count()
    except (BrokenFileError, FutureVersionError) as error:
        message(f"Warning: {error.what} ({error.where})")
        return None


def _shown(rows: int | None) -> str:
    return "unreadable" if rows is None else thousands(rows)


def _each(recorded: Recorded, first: str | None, last: str | None, doing: str) -> Iterator[str]:
    """Yield the recorded days of a range, telling a patient operator how far it is."""
    low = "" if first is None else parse_date(first).isoformat()
    high = "9999" if last is None else parse_date(last).isoformat()
    if low > high:
        raise UsageError(f"the range ends before it begins: {low} to {high}", do="Swap --from and --to")
    dates = [date for date in recorded.dates() if low <= date <= high]
    if not dates:
        message(
            "No day is recorded" + (f" in {recorded.place}" if first is None and last is None else " in that range")
        )
    shown = time.monotonic()
    for index, date in enumerate(dates):
        if time.monotonic() - shown > _TELL_EVERY_S:
            shown = time.monotonic()
            message(f"{doing} {date} ({index + 1} of {len(dates)})")
        yield date


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    shown = time.monotonic()

    def told(count: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > _TELL_EVERY_S:
            shown = time.monotonic()
            message(f"{thousands(count)} {what}")

    yield told


def _instant(text: str) -> int:
    if text.isdigit():
        return int(text)
    try:
        return rfc3339_ns(text)
    except ValueError as error:
        raise UsageError(
            f"not a time: {text!r}", do="Expected 2025-12-14T14:30:00.25Z, or nanoseconds since 1970"
        ) from error


def _gap_row(date: str, gap: Gap, close_ns: int) -> dict[str, Any]:
    """Return a gap of a manifest as a row of coverage; a day without tables has no others."""
    return {
        "date": date,
        "channel": str(gap.scope.get("channel", "all")),
        "market": gap.scope.get("market"),
        "from_ns": gap.from_ns,
        "to_ns": close_ns if gap.to_ns is None else gap.to_ns,
        "state": gap.outcome if gap.outcome in ("healed", "repaired") else "missing",
        "cause": gap.cause,
        "gap_id": gap.gap_id,
    }


def _print_intervals(rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [["DATE", "FROM", "TO", "SECONDS", "CHANNEL", "MARKET", "STATE", "CAUSE"]]
    for row in rows:
        from_ns, to_ns = row["from_ns"], row["to_ns"]
        lines.append(
            [
                row["date"],
                _clock(from_ns, row["date"]),
                _clock(to_ns, row["date"]),
                f"{(to_ns - from_ns) / 1e9:,.3f}",
                row["channel"],
                row["market"] or "all",
                row["state"],
                row["cause"] or "-",
            ]
        )
    _print_table(lines, right=[3])


def _print_book(book: Book) -> None:
    click.echo(f"Market: {book.ticker}")
    click.echo(f"At: {_stamp(book.at_ns)}")
    click.echo(
        f"Snapshot: {_stamp(book.snapshot_ns)}, {thousands(book.changes)} changes since, last {_stamp(book.changed_ns)}"
    )
    if not book.known:
        click.echo("Known: no, records are missing since the snapshot")
        for hole in book.holes:
            click.echo(f"  - {_stamp(hole['from_ns'])} to {_stamp(hole['to_ns'])} ({hole['cause']})")
    asks = [Level(MICROS - level.price, level.size) for level in book.no]
    click.echo(f"{'CONTRACTS':>14}{'BID':>9}  {'ASK':<9}CONTRACTS")
    for rank in range(max(len(book.yes), len(asks))):
        bid = book.yes[rank] if rank < len(book.yes) else None
        ask = asks[rank] if rank < len(asks) else None
        left = f"{bid.size / 100:>14,.2f}{bid.price / MICROS:>9.4f}" if bid else " " * 23
        right = f"{ask.price / MICROS:<9.4f}{ask.size / 100:<14,.2f}" if ask else ""
        click.echo(f"{left}  {right}".rstrip())
    if not book.yes and not asks:
        click.echo("The book is empty")


def _print_table(lines: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def _clock(at_ns: int, date: str) -> str:
    """Return the time of day, with its date where that is another: most days end on the next one."""
    stamp = _stamp(at_ns).removesuffix("Z")
    return stamp.removeprefix(f"{date}T")


def _stamp(at_ns: int) -> str:
    return f"{np.datetime64(at_ns, 'ns').astype('datetime64[ms]')}Z"
