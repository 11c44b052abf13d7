"""How fast researchers get at a large day: `python -m benchmarks reader`; prints a table with its targets, writes nothing else.

Ten million trades and ten million order book messages of 5,000 markets, most of them in few, written as the normaliser writes
them; then one market's rows in every engine, books at instants of the busiest market and of a middling one, and the best
levels over a whole day. Beside it the same rows asked of the same files with plain DuckDB and Polars. What is timed is the call
in a process that has called before, footers and coverage read each time, until every row is in memory; the first call of a new
process, which imports Arrow and the engine, has lines of its own. Wants about two minutes, 1 GB of disk and 4 GB of memory (for
making the day; reading takes little).
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from ssmd_dagster.archive.books import book_at, top_of_book
from ssmd_dagster.archive.layout import table_key
from ssmd_dagster.archive.reader import load
from ssmd_dagster.archive.sheets import TableWriter
from ssmd_dagster.archive.tables import SCHEMAS, day_schema, table_from_rows

ROWS = 10_000_000
MARKETS = 5_000
DATE, OPEN_NS, DAY_NS = "2025-12-14", 1_765_670_400_000_000_000, 86_400_000_000_000
TIMES = 5
LOAD_TARGET_S, BOOK_TARGET_S = 0.3, 1.0
SNAPSHOTS_A_DAY, LEVELS = 24, 101
PRICES = np.arange(1, 100) * 10_000


def main() -> None:
    """Make the day, measure, print."""
    warnings.simplefilter("ignore")  # a plain bucket of tables says nothing of conditions
    with tempfile.TemporaryDirectory(prefix="ssmd-bench-") as folder:
        root = Path(folder)
        began = time.perf_counter()
        tickers, counts = _markets()
        trades, books = _write_trades(root, tickers, counts), _write_books(root, tickers, counts)
        print(f"made {ROWS:,} trades and {ROWS:,} order book messages in {time.perf_counter() - began:.0f} s")
        print(f"trade {trades.stat().st_size / 1e6:,.0f} MB, orderbook {books.stat().st_size / 1e6:,.0f} MB\n")
        hot, middling = tickers[int(np.argmax(counts))], tickers[int(np.argsort(counts)[MARKETS // 2])]
        for name, ticker in (("busiest", hot), ("middling", middling)):
            print(f"{name} market {ticker}: {counts[tickers.index(ticker)]:,} rows of each")
            _measure(root, trades, ticker)
        print(f"\npeak memory of the whole run {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


def _measure(root: Path, trades: Path, ticker: str) -> None:
    def loaded(engine: Any) -> Any:
        return load(root, DATE, "trade", ticker, engine=engine, on_gap="warn")

    noon = OPEN_NS + DAY_NS // 2
    rows: list[tuple[str, Callable[[], Any], float | None]] = [
        ("load trades, arrow", lambda: loaded("arrow"), LOAD_TARGET_S),
        ("load trades, pandas", lambda: loaded("pandas"), LOAD_TARGET_S),
        ("load trades, polars, collected", lambda: loaded("polars").collect(), LOAD_TARGET_S),
        ("load trades, duckdb, fetched", lambda: loaded("duckdb").to_arrow_table(), LOAD_TARGET_S),
        ("  beside it: plain DuckDB", lambda: _plain_duckdb(trades, ticker), None),
        ("  beside it: plain Polars", lambda: _plain_polars(trades, ticker), None),
        ("book at noon", lambda: book_at(root, ticker, noon), BOOK_TARGET_S),
        ("book at the end of the day", lambda: book_at(root, ticker, OPEN_NS + DAY_NS - 1), BOOK_TARGET_S),
        ("top of book, whole day", lambda: top_of_book(root, ticker, DATE), None),
        *(
            (f"  {engine}, in a new process", lambda engine=engine: _in_new_process(root, ticker, engine), None)
            for engine in _FETCH
        ),
    ]
    for name, work, target_s in rows:
        work()
        taken = []
        for _ in range(TIMES):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
        verdict = (
            ""
            if target_s is None
            else f"  target {target_s} s: {'met' if statistics.median(taken) < target_s else 'MISSED'}"
        )
        print(f"  {name:<34}{statistics.median(taken):>8.3f} s  (worst {max(taken):.3f}){verdict}")


_FETCH = {"arrow": "", "pandas": "", "polars": ".collect()", "duckdb": ".to_arrow_table()"}
_LOAD = "import ssmd_dagster, sys; ssmd_dagster.load(*sys.argv[1:3], 'trade', sys.argv[3], engine=sys.argv[4], on_gap='warn'){}"


def _in_new_process(root: Path, ticker: str, engine: str) -> None:
    line = [sys.executable, "-W", "ignore", "-c", _LOAD.format(_FETCH[engine]), str(root), DATE, ticker, engine]
    subprocess.run(line, check=True)


def _plain_duckdb(path: Path, ticker: str) -> Any:
    return (
        duckdb.connect().execute("select * from read_parquet(?) where ticker = ?", [str(path), ticker]).to_arrow_table()
    )


def _plain_polars(path: Path, ticker: str) -> Any:
    return pl.scan_parquet(path).filter(pl.col("ticker") == ticker).collect()


def _markets() -> tuple[list[str], Any]:
    tickers = sorted(f"KXBTCD-26FEB07-T{98_000 + index}.99" for index in range(MARKETS))
    shares = 1 / (np.arange(MARKETS) + 2)
    counts = np.maximum((shares / shares.sum() * ROWS).astype(np.int64), 10)
    counts[0] += ROWS - counts.sum()
    return tickers, np.random.default_rng(7).permutation(counts)


def _write_trades(root: Path, tickers: list[str], counts: Any) -> Path:
    draw = np.random.default_rng(1)

    def rows(ticker: str, count: int, first: int) -> dict[str, Any]:
        price = draw.choice(PRICES, count)
        ids = pc.binary_join_element_wise(
            pa.scalar("3f1c9a52-8e0b-4d2c-9b1a-"), pa.array(np.arange(first, first + count)).cast(pa.string()), ""
        )
        return {
            "trade_id": ids,
            "yes_price": price,
            "no_price": 1_000_000 - price,
            "count": draw.integers(1, 50_000, count),
            "taker_side": _word("yes", count),
            "taker_book_side": _word("bid", count),
            "is_block_trade": np.zeros(count, np.bool_),
        }

    return _write(root, "trade", tickers, counts, rows)


def _write_books(root: Path, tickers: list[str], counts: Any) -> Path:
    draw = np.random.default_rng(2)

    def rows(ticker: str, count: int, first: int) -> dict[str, Any]:
        # A snapshot of an empty book now and then, contracts on many levels, then some put on a level and taken away again.
        place = np.arange(count) % max(count // SNAPSHOTS_A_DAY, 2)
        snapshot, takes = place == 0, (place > LEVELS) & (place % 2 == 0)
        added, price = draw.integers(1, 10_000, count), draw.choice(PRICES, count)
        side = draw.integers(0, 2, count)
        return {
            "kind": pa.DictionaryArray.from_arrays((~snapshot).astype(np.int32), ["snapshot", "delta"]),
            "side": pa.DictionaryArray.from_arrays(
                pa.array(np.where(takes, np.roll(side, 1), side).astype(np.int32), mask=snapshot), ["yes", "no"]
            ),
            "price": pa.array(np.where(takes, np.roll(price, 1), price), mask=snapshot),
            "size": pa.array(np.where(takes, -np.roll(added, 1), added), mask=snapshot),
            "clock": np.arange(1, count + 1),
            "last": np.ones(count, np.bool_),
            "msg": np.zeros(count, np.int32),
        }

    return _write(root, "orderbook", tickers, counts, rows)


def _write(
    root: Path, table: str, tickers: list[str], counts: Any, rows: Callable[[str, int, int], dict[str, Any]]
) -> Path:
    """Write a day's table as the normaliser does, and the coverage that says that nothing is missing."""
    draw = np.random.default_rng(3)
    path, schema = _path(root, table), _schema(table)
    with TableWriter(path, schema) as writer:
        first = 0
        for ticker, count in zip(tickers, counts.tolist(), strict=True):
            event_ns = OPEN_NS + np.sort(draw.integers(0, DAY_NS // 1_000_000, count)) * 1_000_000
            columns = {
                "ticker": pa.array([ticker]).take(pa.array(np.zeros(count, np.int32))),
                "event_ns": event_ns,
                "recv_ns": event_ns + draw.integers(2_000_000, 9_000_000, count),
                "conn": _word("7-a-1", count),
                "n": np.arange(first, first + count),
                "sid": np.ones(count, np.int32),
                "seq": np.arange(first, first + count),
                "source": _word("live", count),
                **rows(ticker, count, first),
            }
            first += count
            absent = {name: pa.nulls(count, schema.field(name).type) for name in schema.names if name not in columns}
            writer.write(pa.table({name: ({**columns, **absent})[name] for name in schema.names}, schema=schema))
    present = [
        {"channel": channel, "from_ns": OPEN_NS, "to_ns": OPEN_NS + DAY_NS, "state": "present"}
        for channel in ("trade", "orderbook_delta")
    ]
    with TableWriter(_path(root, "coverage"), _schema("coverage")) as writer:
        writer.write(table_from_rows("coverage", present))
    return path


def _schema(table: str) -> pa.Schema:
    return day_schema(table, env="bench", date=DATE, revision=1, open_ns=OPEN_NS, close_ns=OPEN_NS + DAY_NS)


def _path(root: Path, table: str) -> Path:
    assert table in SCHEMAS
    path = root / "ssmd-normalized" / table_key("kalshi", table, DATE)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _word(word: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [word])
