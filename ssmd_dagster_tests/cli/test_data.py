"""`ssmd data` and `ssmd day report`: what they print, what they write, and their exit codes."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssmd_dagster.archive.export import export
from ssmd_dagster.archive.reader import select
from ssmd_dagster.archive.recorded import find
from ssmd_dagster.cli.main import run
from ssmd_dagster.day.events import Gap
from ssmd_dagster.errors import ConfigurationError
from ssmd_dagster_tests.archive.recorded_days import DATE, OPEN_NS, SECOND, Shelf, hole, trade
from ssmd_dagster_tests.archive.test_books import PLAIN

TRADES = 10


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """A day with trades, a book and a hole in the ticker channel; one with a manifest only; one that still runs."""
    shelf = Shelf(tmp_path / "objects")
    trades = [trade("KX-A", at, price=123_456) for at in range(1, TRADES)] + [trade("KX-B", 1)]
    coverage = [
        hole("trade", 0, 86_400, state="present", cause=None),
        hole("ticker", 60, 90.5),
        hole("orderbook_delta", 100, 200, market="KX-A"),
    ]
    shelf.put({"trade": trades, "orderbook": PLAIN, "coverage": coverage}, condition="degraded")
    gaps = [Gap(gap_id="g", cause="late_start", from_ns=OPEN_NS + 86_400 * SECOND, scope={"market": "KX-A"})]
    shelf.seal("2025-12-15", condition="pending", gaps=gaps)
    (shelf.raw / "kalshi/2025/12/16").mkdir()
    return shelf


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Run a command and return what it printed to stdout."""
    assert run(words) == code
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """Run a command with `--json` and return what it said."""
    return json.loads(printed(capsys, *words, "--json", code=code))


def test_the_inventory_lists_days_and_tables(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and sizes of each table, revision and condition; a day that still runs is pending."""
    folder = str(shelf.folder)
    lines = printed(capsys, "data", "inventory", folder).splitlines()
    assert lines[0].split()[:4] == ["DATE", "REV", "CONDITION", "TRADE"]
    assert [line.split()[:4] for line in lines[1:]] == [
        [DATE, "r1", "degraded", "10"],
        ["2025-12-15", "r1", "pending", "-"],
        ["2025-12-16", "-", "pending", "-"],
    ]
    (day,) = told(capsys, "data", "inventory", folder, "--to", DATE)["days"]
    assert day["tables"]["orderbook"]["rows"] == 6
    assert Path(day["tables"]["trade"]["path"]).stat().st_size == day["tables"]["trade"]["bytes"]
    assert told(capsys, "data", "inventory", folder, "--from", "2026-01-01")["days"] == []
    assert run(["data", "inventory", folder, "--from", "2026-01-01", "--to", "2025-01-01"]) == 2
    (unknown, *_) = told(capsys, "data", "inventory", str(shelf.tables))["days"]
    assert unknown["condition"] == "unknown"


def test_an_inventory_goes_on_past_a_table_that_cannot_be_read(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one is named; the other tables and days are listed."""
    next(shelf.tables.rglob("trade/2025/12/14/data.parquet")).write_bytes(b"PAR1")
    assert run(["data", "inventory", str(shelf.folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[3] == "unreadable"
    assert len(captured.out.splitlines()) == 4
    assert "Warning: the table cannot be read" in captured.err


def test_gaps_are_listed_over_days(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """From the tables of coverage, from the manifest where there is none; a running day is pointed to."""
    assert run(["data", "gaps", str(shelf.folder)]) == 0
    captured = capsys.readouterr()
    assert [line.split() for line in captured.out.splitlines()[1:]] == [
        [DATE, "00:01:00.000", "00:01:30.500", "30.500", "ticker", "all", "missing", "connection_lost"],
        [DATE, "00:01:40.000", "00:03:20.000", "100.000", "orderbook_delta", "KX-A", "missing", "connection_lost"],
        ["2025-12-15", "00:00:00.000", "2025-12-16T00:00:00.000", "86,400.000", "all", "KX-A", "missing", "late_start"],
    ]
    assert "2025-12-16 is not ended yet" in captured.err
    assert len(told(capsys, "data", "gaps", str(shelf.folder), "--to", DATE)["gaps"]) == 2
    assert run(["data", "gaps", str(shelf.folder), "--from", "2026-01-01"]) == 0
    assert capsys.readouterr().err == "No day is recorded in that range\n"


def test_coverage_of_a_day(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows, or those of a channel and a market."""
    rows = told(capsys, "data", "coverage", str(shelf.folder), DATE)["coverage"]
    assert [row["state"] for row in rows] == ["present", "missing", "missing"]
    chosen = printed(
        capsys, "data", "coverage", str(shelf.folder), DATE, "--channel", "orderbook_delta", "--ticker", "KX-B"
    )
    assert len(chosen.splitlines()) == 1
    assert run(["data", "coverage", str(shelf.folder), "2025-12-24"]) == 4
    assert run(["data", "coverage", str(shelf.folder), DATE, "--channel", "trades"]) == 2


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "arrow"])
def test_an_export_holds_the_rows(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    """In every format, as integers or exact decimals."""
    path = tmp_path / f"trades.{suffix}"
    base = ["data", "export", str(shelf.folder), DATE, "trade", "--to", str(path), "--tickers", "KX-A"]
    assert told(capsys, *base)["rows"] == TRADES - 1
    assert [int(row["yes_price"]) for row in _read(path)] == [123_456] * (TRADES - 1)
    assert run([*base, "--decimals"]) == 5
    assert run([*base, "--decimals", "--overwrite"]) == 0
    rows = _read(path)
    assert {Decimal(str(row["yes_price"])) for row in rows} == {Decimal("0.123456")}
    assert rows[0]["source"] == "live"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]


def _read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]]
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".arrow":
        with pa.ipc.open_file(path) as file:
            rows = file.read_all().to_pylist()
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
    else:
        rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    return rows


def test_an_export_with_gaps_says_so(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 and the gaps on stderr; or nothing is written."""
    base = ["data", "export", str(shelf.folder), DATE, "orderbook", "--to", str(tmp_path / "book.csv")]
    assert run([*base, "--on-gap", "raise"]) == 5
    assert "1 gap in orderbook_delta" in capsys.readouterr().err
    assert not (tmp_path / "book.csv").exists()
    assert run(base) == 3
    assert "Warning: 1 gap in orderbook_delta" in capsys.readouterr().err
    assert run([*base, "--overwrite", "--on-gap", "ignore"]) == 0
    assert run([*base, "--overwrite", "--tickers", "KX-NOPE"]) == 0
    assert "Warning: KX-NOPE has no row in orderbook" in capsys.readouterr().err


def test_an_export_that_cannot_be_written_leaves_nothing(shelf: Shelf, tmp_path: Path) -> None:
    """Another ending, a folder that is not there; progress counts the rows."""
    base = ["data", "export", str(shelf.folder), DATE, "trade", "--to"]
    assert run([*base, str(tmp_path / "trades.xlsx")]) == 2
    assert run([*base, str(tmp_path / "nowhere" / "trades.csv")]) == 8
    selection = select(find(shelf.folder), DATE, "trade")
    counts: list[int] = []
    assert export(selection, tmp_path / "trades.csv", told=counts.append) == TRADES == counts[-1]
    with pytest.raises(ConfigurationError, match="the folder is not there"):
        export(selection, tmp_path / "nowhere" / "trades.csv")


def test_a_book_is_printed_as_a_ladder(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """Bids and asks of YES, best first."""
    words = ["data", "book", str(shelf.folder), "KX-A", "--at", "2025-12-14T00:00:03Z"]
    assert printed(capsys, *words).splitlines()[3:] == [
        "     CONTRACTS      BID  ASK      CONTRACTS",
        "          3.00   0.4100  0.4400   2.00",
        "          5.00   0.3900  0.4500   7.00",
    ]
    assert told(capsys, *words, "--depth", "1")["yes"] == [{"price": 410_000, "size": 300}]


def test_a_book_in_a_hole_is_refused_or_marked(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 5, or 3 on request; a time that is none is a usage error, an unknown market is not found."""
    words = ["data", "book", str(shelf.folder), "KX-A", "--at", str(OPEN_NS + 150 * SECOND)]
    assert run(words) == 5
    assert "connection_lost" in capsys.readouterr().err
    assert "Known: no" in printed(capsys, *words, "--allow-unknown", code=3)
    assert told(capsys, *words, "--allow-unknown", code=3)["known"] is False
    assert run([*words[:-1], "half past nine"]) == 2
    assert run(["data", "book", str(shelf.folder), "KX-Z", "--at", str(OPEN_NS)]) == 4


def test_an_empty_book_says_so(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """A closed market has no levels."""
    empty = {**PLAIN[0], "event_ns": OPEN_NS, "side": None, "price": None, "size": None, "last": True}
    shelf.write("orderbook", [empty])
    out = printed(capsys, "data", "book", str(shelf.folder), "KX-A", "--at", str(OPEN_NS + 1))
    assert out.splitlines()[-1] == "The book is empty"


def test_a_report_is_written(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One HTML file where it was asked for; a day without a manifest is refused."""
    path = tmp_path / "day.html"
    said = told(capsys, "day", "report", str(shelf.folder), DATE, "--to", str(path))
    assert said["bytes"] == path.stat().st_size
    assert path.read_text().startswith("<!doctype html>")
    assert run(["day", "report", str(shelf.folder), "2025-12-16"]) == 5
    assert run(["day", "report", "a", "b", "c"]) == 2
    assert run(["day", "report", str(shelf.folder), DATE, "--to", str(tmp_path / "no" / "x.html")]) == 8
