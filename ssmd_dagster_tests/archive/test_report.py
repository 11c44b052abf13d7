"""The report of a day and its pictures: the numbers in them, and that they stand alone."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest

from ssmd_dagster.archive.figures import figures
from ssmd_dagster.archive.layout import drift_key
from ssmd_dagster.archive.pictures import Bar, Lane, Range, Stretch, bars, lanes, markdown, ranges, strip
from ssmd_dagster.archive.recorded import BrokenFileError, DayNotFoundError, DayNotReadyError, Findings, find
from ssmd_dagster.archive.report import drawn, page, pictures, report
from ssmd_dagster.archive.tables import SCHEMAS, table_from_rows
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.ledger import ChannelLedger, Explanation, Ledger
from ssmd_dagster_tests.archive.recorded_days import DATE, FEED, OPEN_NS, SECOND, Shelf, hole, trade, window_of
from ssmd_dagster_tests.archive.test_books import PLAIN

SVG = "{http://www.w3.org/2000/svg}"
LATE_NS = 1_000_000


def parsed(svg: str) -> ET.Element:
    """Return a picture's tree; it loads nothing from elsewhere."""
    assert not re.findall(r"""(?:href|src|url\()\s*=?\s*["']?(?!#)\w""", svg)
    assert "<script" not in svg
    return ET.fromstring(svg)


def titles(svg: str) -> list[str]:
    """Return the tooltips of a picture."""
    return [title.text or "" for title in parsed(svg).iter(f"{SVG}title")]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """A day with trades of two markets at one and a hundred seconds, books, a gap and a ledger."""
    trades = [
        trade("KX-A", at, recv_ns=OPEN_NS + round(at * SECOND) + late * LATE_NS)
        for at, late in ((1, 1), (2, 2), (100, 100), (200, -5))
    ]
    gap = Gap(gap_id="gap-7-a-1", cause="connection_lost", from_ns=OPEN_NS, to_ns=OPEN_NS + SECOND, outcome="stays")
    ledger = Ledger(
        channels=(ChannelLedger(channel="trade", received=9, archived=7, published=9, rejected={"not <JSON>": 2}),),
        explanations=(Explanation(difference="trade: published - archived", gap_id="gap-7-a-1"),),
    )
    shelf = Shelf(tmp_path)
    return shelf.put(
        {
            "trade": [*trades, trade("KX-<B>", 5)],
            "orderbook": PLAIN,
            "coverage": [hole("trade", 0, 1), hole("trade", 1, 86_400, state="present", cause=None)],
        },
        condition="degraded",
        reasons=["gap gap-7-a-1 (connection_lost) stays"],
        gaps=[gap],
        ledger=ledger.to_json(),
    )


def test_figures_count_messages_not_levels(shelf: Shelf) -> None:
    """A snapshot of three levels is one message; lateness is that of live records with an event time of their own."""
    recorded = find(shelf.folder)
    sealed = recorded.sealed(DATE)
    assert sealed is not None
    tables = {
        name: pq.read_table(next(shelf.tables.rglob(f"{name}/**/data.parquet"))) for name in ("trade", "orderbook")
    }
    found = figures(sealed, tables)
    assert found.messages == {"trade": 5, "orderbook_delta": 4}
    assert (len(found.bins["trade"]), found.bins["trade"][:4]) == (1_440, [3, 1, 0, 1])
    assert found.markets == [("KX-A", 8), ("KX-<B>", 1)]
    assert found.traded == {"KX-A": 400, "KX-<B>": 100}
    late = found.latency["trade"]
    assert (late.counted, late.early, late.longest_ns) == (4, 1, 100 * LATE_NS)
    assert late.quantiles_ns[1] == pytest.approx(2 * LATE_NS, rel=0.05)
    assert late.quantiles_ns[3] == pytest.approx(100 * LATE_NS, rel=0.05)


def test_a_short_day_has_shorter_bins() -> None:
    """The demo's day of a minute is not one column."""
    window = window_of(DATE)

    class Short:
        open_ns, close_ns = window.open_ns, window.open_ns + 60 * SECOND

    found = figures(Short(), {"trade": table_from_rows("trade", [trade("KX-A", 59.5)])})
    assert found.bin_ns == SECOND
    assert found.bins["trade"] == [0] * 59 + [1]


def test_pictures_are_drawn_from_what_the_normaliser_left(shelf: Shelf) -> None:
    """What Dagster shows beside a day: SVG by name, and Markdown of it without a file; the tables are not needed for it."""
    recorded = find(shelf.folder)
    sealed, coverage = recorded.sealed(DATE), recorded.file(DATE, "coverage")
    assert sealed is not None
    assert coverage is not None
    found = figures(sealed, {"trade": table_from_rows("trade", [trade("KX-A", 1)])})
    findings = msgspec.json.encode({"drift": [], "figures": found})
    made = pictures(sealed, findings, Path(coverage.path).read_bytes())
    assert list(made) == ["messages", "coverage", "latency", "markets"]
    assert made["latency"] == drawn(sealed, found)["latency"]
    assert list(pictures(sealed, b'{"drift":[]}', Path(coverage.path).read_bytes())) == ["coverage"]
    assert pictures(sealed, None, None) == {}
    text = markdown(made)
    encoded = re.findall(r"!\[messages\]\(data:image/svg\+xml;base64,([^)]+)\)", text)
    assert base64.b64decode(encoded[0]).decode() == made["messages"]


def test_the_page_says_everything_and_needs_nothing(shelf: Shelf) -> None:
    """Condition, reasons, gaps, ledger with its explained difference, rejections, drift; names are escaped."""
    done: list[str] = []
    html = report(find(shelf.folder), DATE, told=done.append)
    assert done == ["trade", "orderbook"]
    for words in (
        "degraded",
        "gap gap-7-a-1 (connection_lost) stays",
        "2025-12-14 00:00:01.000",
        "explained by gap-7-a-1",
        "not &lt;JSON&gt;",
        "Not computed:",
        "KX-&lt;B&gt;",
        "Nothing was sent that the reader does not know",
    ):
        assert words in html
    assert "KX-<B>" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert html.count("<svg") == 4


def test_drift_is_shown_with_an_example(shelf: Shelf) -> None:
    """What no reader knows is named, counted and quoted."""
    recorded = find(shelf.folder)
    path = shelf.tables / drift_key(FEED, DATE)
    path.parent.mkdir(parents=True)
    drift = {"kind": "key", "name": "trade.msg.mood", "json_type": "string", "count": 3, "example": '{"mood":"<b>"}'}
    path.write_text(json.dumps({"drift": [drift], "damaged": ["trades-00: bytes 7-9"], "late": 0}))
    html = report(recorded, DATE)
    assert "trades-00: bytes 7-9" in html
    assert "trade.msg.mood" in html
    assert "{&quot;mood&quot;:&quot;&lt;b&gt;&quot;}" in html
    path.write_text("{")
    with pytest.raises(BrokenFileError, match="notes cannot be read"):
        report(recorded, DATE)


def test_a_day_of_nothing_has_a_page_too(tmp_path: Path) -> None:
    """No tables, no ledger, no gaps: nothing is drawn, and nothing is claimed."""
    shelf = Shelf(tmp_path).put({}, condition="missing", reasons=["nothing archived"])
    html = report(find(shelf.folder), DATE)
    assert "nothing archived" in html
    assert "the day was not verified" in html
    empty = Shelf(tmp_path / "empty").put({table: [] for table in SCHEMAS})
    assert "<h2>Coverage" not in report(find(empty.folder), DATE)


def test_days_that_cannot_be_reported_are_named(shelf: Shelf) -> None:
    """Not recorded, not sealed, or with a broken table."""
    recorded = find(shelf.folder)
    with pytest.raises(DayNotFoundError):
        report(recorded, "2025-12-20")
    shelf.put({"trade": []}, date="2025-12-15", sealed=False)
    with pytest.raises(DayNotReadyError, match="has no manifest yet"):
        report(recorded, "2025-12-15")
    path = next(shelf.tables.rglob("trade/2025/12/14/data.parquet"))
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(BrokenFileError) as caught:
        report(recorded, DATE)
    assert caught.value.where == str(path)


def test_long_lists_of_gaps_are_cut(shelf: Shelf) -> None:
    """A page with ten thousand gaps would serve nobody; it says how many more there are."""
    sealed = find(shelf.folder).sealed(DATE)
    assert sealed is not None
    gaps = [
        Gap(gap_id=f"g{k}", cause="rate_limited", from_ns=OPEN_NS + k, scope={"markets": [f"KX-{m}" for m in range(9)]})
        for k in range(250)
    ]
    fields: dict[str, Any] = {name: getattr(sealed, name) for name in sealed.__struct_fields__}
    html = page(type(sealed)(**{**fields, "gaps": gaps}), figures(sealed, {}), Findings())
    assert "50 more; see" in html
    assert "markets KX-0, KX-1, KX-2, KX-3, KX-4 and 4 more" in html
    assert "still open" in html


def test_what_is_too_short_to_be_seen_is_drawn_wide_enough() -> None:
    """A gap of a second in a day has its mark, also at the very end."""
    window = window_of(DATE)
    second = [Stretch(window.close_ns - SECOND, window.close_ns, "missing", "lost")]
    svg = strip("s", window.open_ns, window.close_ns, [("trade", second)])
    mark = next(rect for rect in parsed(svg).iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None)
    assert float(mark.get("width", 0)) >= 2
    assert float(mark.get("x", 0)) + float(mark.get("width", 0)) <= 960
    assert titles(svg) == ["lost"]


def test_the_axis_of_a_day_of_seconds_has_times() -> None:
    """The demo's first day lasts a quarter of a minute."""
    svg = strip("t", OPEN_NS, OPEN_NS + 15 * SECOND, [("trade", [])])
    assert re.findall(r">([0-9:]+)</text>", svg) == [f"00:00:{at:02}" for at in range(0, 16, 2)]


def test_every_chart_stands_empty_input() -> None:
    """Nothing to show is an empty picture, not an error."""
    for svg in (lanes("l", 0, SECOND, [], ""), strip("s", 0, SECOND, []), ranges("r", [], "ms"), bars("b", [])):
        parsed(svg)
    parsed(lanes("l", 0, SECOND, [Lane("trade", [0, 0])], ""))
    parsed(ranges("r", [Range("x", (5.0, 5.0, 5.0, 5.0), "w")], "ms"))
    assert titles(bars("b", [Bar("KX", 0, "none")])) == ["KX: none"]
