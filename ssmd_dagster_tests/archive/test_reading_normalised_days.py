"""From frames over raw segments and the normaliser to what a researcher loads: rows, books at any instant, holes, a report."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest

from ssmd_dagster.archive.books import BookUnknownError, book_at, book_from, depth_from
from ssmd_dagster.archive.layout import table_key
from ssmd_dagster.archive.reader import GapError, load
from ssmd_dagster.archive.recorded import find
from ssmd_dagster.archive.report import report
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Gap
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster_tests.archive import recorded_days
from ssmd_dagster_tests.archive.rawdays import DATE, MS, OPEN_NS, Day, S, books, normalized, record, trade
from ssmd_dagster_tests.archive.test_normalize import NOON, capture_of, market_story, needs_data, roll, told
from ssmd_dagster_tests.archive.test_reader import ENGINES, rows_of

Story = list[tuple[int, str, int, int, int]]


def assert_books(day: Day, story: Story, from_ns: int, holes: tuple[tuple[int, int], ...] = ()) -> None:
    """Find at every instant of the story, outside of `holes`, the level that it tells, by both ways of asking."""
    rows = day.arrow("orderbook")
    levels: dict[str, int] = {}
    instants = [at_ns for at_ns, *_ in story]
    tops = {
        ticker: depth_from(rows.filter(pc.field("ticker") == ticker), ticker, 1) for ticker in {one[1] for one in story}
    }
    for index, (at_ns, ticker, _clock, _size, level) in enumerate(story):
        levels[ticker] = level
        last_of_instant = index + 1 == len(story) or instants[index + 1] > at_ns
        if at_ns < from_ns or not last_of_instant or any(low <= at_ns < high for low, high in holes):
            continue
        mine = rows.filter(pc.field("ticker") == ticker)
        book = book_from(mine, ticker, at_ns)
        assert sum(one.size for one in book.yes) == level, (index, ticker)
        if index % 7 == 0:
            top = tops[ticker].filter(pc.field("event_ns") <= at_ns).to_pylist()[-1]
            assert (top["bid_size_1"] or 0) == level, (index, ticker)


@pytest.mark.parametrize("clocked", [True, False])
@pytest.mark.parametrize("seed", [10, 14, 20, 24])
def test_books_over_a_seam_of_two_connections(tmp_path: Path, seed: int, clocked: bool) -> None:
    """Where the second connection fills the first one's hole, sooner or later than it, each instant's book is the exchange's."""
    draw = random.Random(seed)
    story = market_story(draw, ["A", "B.1", "C"], start_ns=NOON, count=300)
    lost, back = sorted(draw.sample(range(60, 260), 2))
    until = story[-1][0] + S
    spans = {
        "1-a-0": (NOON - S, story[lost][0]),
        "1-a-1": (story[back][0], until),
        "1-b-0": (NOON - S, until),
    }
    segments = record(
        tmp_path / "raw",
        {
            conn: told(story, *span, latency_ns=draw.choice([1, 3, 7, 20]) * MS, clocked=clocked)
            for conn, span in spans.items()
        },
    )
    assert_books(normalized(tmp_path / "out", segments), story, story[20][0])


def test_books_on_both_sides_of_a_roll(tmp_path: Path) -> None:
    """The old day's books hold up to the boundary, the new day's from its opening fold on."""
    one, two, story = roll(tmp_path, 5)
    close_ns = OPEN_NS + 86_400 * S
    assert_books(one, [row for row in story if row[0] < close_ns], story[5][0])
    levels = [row for row in story if row[0] >= close_ns]
    assert_books(two, levels, levels[0][0])


@needs_data
@pytest.mark.parametrize("name", ["ws-sports-2026-08", "ws-kxbtc-2026-04", "ws-kxbtc15m-2026-05"])
def test_real_captures_fold_without_a_negative_level(tmp_path: Path, name: str) -> None:
    """Every market's best levels over time, and its last book, which is that of a plain replay."""
    frames = capture_of(f"{name}.frames.jsonl")
    open_ns = frames[0][0] - 3600 * S
    segments = record(tmp_path / "raw", {"812-a-0": frames})
    day = normalized(tmp_path / "out", segments, open_ns=open_ns, close_ns=open_ns + 86_400 * S)
    rows = day.arrow("orderbook")
    replayed = books(day.rows("orderbook"))
    assert replayed
    for ticker, levels in replayed.items():
        mine = rows.filter(pc.field("ticker") == ticker)
        assert len(depth_from(mine, ticker, 5)) > 0
        book = book_from(mine, ticker, frames[-1][0] + S)
        found = {(side, one.price): one.size for side in ("yes", "no") for one in getattr(book, side)}
        assert found == levels


def day_with_a_hole(tmp_path: Path) -> tuple[recorded_days.Shelf, Story, tuple[int, int]]:
    """Return a recorded and normalised day of two markets, what happened to their books, and when nothing was recorded."""
    story = market_story(random.Random(1), ["A", "B"], start_ns=NOON, count=300)
    lost, back = story[150][0], story[200][0]
    first = told(story, NOON - S, lost, latency_ns=3 * MS)
    first += [(NOON + n * MS, trade("A", n, NOON + n * MS)) for n in range(1, 90)]
    first.sort(key=lambda one: one[0])
    hole = (first[-1][0], back)
    segments = record(
        tmp_path / "raw", {"1-a-0": first, "1-a-1": told(story, back, story[-1][0] + S, latency_ns=3 * MS)}
    )
    gap = Gap(
        gap_id="gap-1-a-0", cause="connection_lost", from_ns=hole[0], to_ns=hole[1], scope={"conn": "1-a-0"}, outcome="stays"
    )  # fmt: skip
    day = normalized(tmp_path / "out", segments, gaps=(gap,), channels=("trade", "orderbook_delta"))
    shelf = recorded_days.Shelf(tmp_path / "objects")
    for table, file in day.files.items():
        path = shelf.tables / table_key("kalshi", table, DATE)
        path.parent.mkdir(parents=True)
        shutil.copyfile(file.path, path)
    shelf.seal(DATE, condition="degraded", gaps=[gap], window=Window(OPEN_NS, OPEN_NS + 86_400 * S))
    return shelf, story, hole


def test_a_day_with_a_hole_from_frames_to_the_researcher(tmp_path: Path) -> None:
    """The same rows in four engines; the hole raises; the book in it is unknown; the report shows it."""
    shelf, story, hole = day_with_a_hole(tmp_path)
    sums = set()
    for engine in ENGINES:
        rows = rows_of(load(shelf.folder, DATE, "trade", "A", engine=engine, on_gap="ignore"))  # type: ignore[arg-type]
        sums.add(
            (len(rows), sum(row["yes_price"] * row["count"] for row in rows), sum(row["event_ns"] for row in rows))
        )
    assert sums == {(89, 89 * 350_000 * 250, sum(NOON + n * MS for n in range(1, 90)))}
    with pytest.raises(GapError, match="connection_lost"):
        load(shelf.folder, DATE, "orderbook", "A")

    assert book_at(shelf.folder, "A", hole[0] - 20 * MS).known
    with pytest.raises(BookUnknownError, match="connection_lost"):
        book_at(shelf.folder, "A", sum(hole) // 2)
    at_last = next(row for row in reversed(story) if row[1] == "A")
    book = book_at(shelf.folder, "A", story[-1][0])
    assert book.known
    assert sum(level.size for level in book.yes) == at_last[4]
    html = report(find(shelf.folder), DATE)
    assert "connection_lost" in html
    assert html.count("<svg") == 4


def test_the_notebook_runs(tmp_path: Path) -> None:
    """docs/research.ipynb loads the day, finds its hole, shows a book and draws the market."""
    shelf, _story, _hole = day_with_a_hole(tmp_path)
    path = project_dir() / "docs" / "research.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    script = "\n".join(_shown("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=path.parent,
        env={**os.environ, "SSMD_OBJECTS": str(shelf.folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        DATE,
        "1e-6 USD",
        "Decimal('0.350000')",
        "missing  connection_lost",
        "in orderbook_delta: ",
        " @ ",
        "<svg",
    ):
        assert words in done.stdout, words


def _shown(cell: str) -> str:
    """Return a cell's code so that it prints its last expression, as a notebook does."""
    body = ast.parse(cell).body
    if not isinstance(body[-1], ast.Expr):
        return cell
    return ast.unparse(ast.Module([*body[:-1], ast.parse(f"print({ast.unparse(body[-1])})").body[0]], []))
