"""Days of raw records become tables: one row for each thing that happened, in the right day, and every record accounted for."""

from __future__ import annotations

import json
import random
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.normalize import OPEN_FILES, allow_open_files
from ssmd_dagster.archive.normalize_job import LateElsewhere, Neighbour
from ssmd_dagster.archive.tables import SCHEMAS
from ssmd_dagster.capture.replayer import markets_message
from ssmd_dagster.day.events import Gap
from ssmd_dagster.exchange import Market, MarketPage, Place
from ssmd_dagster_tests.archive.rawdays import (
    CLOSE_NS,
    DATE,
    MS,
    OPEN_NS,
    Frame,
    S,
    books,
    delta,
    frame,
    normalized,
    record,
    rest_page,
    snapshot,
    ticker_message,
    trade,
    trade_msg,
)
from ssmd_dagster_tests.kalshi.fakes import REAL_DATA

needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real captures at {REAL_DATA}")
NOON = OPEN_NS + 12 * 3600 * S
PREVIOUS, NEXT = "2026-11-09", "2026-11-11"


def capture_of(name: str) -> list[Frame]:
    """Return a real capture's frames."""
    lines = [json.loads(line) for line in (REAL_DATA / name).read_text().splitlines()]
    return [(line["recv_ns"], line["raw"].encode()) for line in lines]


@needs_data
@pytest.mark.parametrize(
    ("name", "snapshots", "deltas", "tickers", "control"),
    [
        ("ws-sports-2026-08.frames.jsonl", 12, 245, 0, 12),
        ("ws-kxbtc-2026-04.frames.jsonl", 8, 61, 0, 5),
        ("ws-kxbtc15m-2026-05.frames.jsonl", 1, 208, 1, 0),
    ],
)
def test_real_captures_give_the_counts_that_their_sources_state(
    tmp_path: Path, name: str, snapshots: int, deltas: int, tickers: int, control: int
) -> None:
    """Real frames become so many snapshots, changes and tickers, and books without a negative level."""
    frames = capture_of(name)
    assert len(frames) == snapshots + deltas + tickers + control
    open_ns = frames[0][0] - 3600 * S
    segments = record(tmp_path / "raw", {"812-a-0": frames})
    day = normalized(tmp_path / "out", segments, open_ns=open_ns, close_ns=open_ns + 86_400 * S)
    rows = day.rows("orderbook")
    kinds = Counter((row["kind"], row["msg"] == 0) for row in rows)
    assert kinds["snapshot", True] == snapshots
    assert kinds["delta", True] == deltas
    assert len(day.rows("ticker")) == tickers
    assert all(not filing.rejected and not filing.duplicates for filing in day.result.filings.values())
    assert books(rows)
    notes = json.loads(json.dumps({c: f.control for c, f in day.result.filings.items()}))
    assert sum(notes.values()) - sum(1 for _ in session_notes(segments)) == control
    assert day.result.drift == ()


def test_a_replayed_day_lacks_no_trades(tmp_path: Path) -> None:
    """Before its first trade and after its last one there was none, since all of the day's were fetched."""
    pages = [(NOON, rest_page([trade_msg("T", 1, NOON)]))]
    day = normalized(tmp_path / "out", record(tmp_path / "raw", {"7-rest-0": pages}), channels=("trade", "ticker"))
    rows = [(row["channel"], row["state"], row["from_ns"], row["to_ns"]) for row in day.rows("coverage")]
    assert rows == [("trade", "repaired", OPEN_NS, CLOSE_NS), ("ticker", "missing", OPEN_NS, CLOSE_NS)]


def session_notes(segments: Any) -> list[bytes]:
    """Return the recorder's own notes."""
    import zstandard

    path = next(segment.path for segment in segments if segment.channel == "session")
    with Path(path).open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    return [line for line in data.splitlines() if b'"note":' in line]


@needs_data
def test_single_frames_of_both_eras_are_read(tmp_path: Path) -> None:
    """Cents and dollars give the same units; a market never traded has no price."""
    lines = [json.loads(line) for line in (REAL_DATA / "ws-single-frames.jsonl").read_text().splitlines()]
    frames = [(NOON + n, line["raw"].encode()) for n, line in enumerate(lines)]
    assert len(frames) == 16
    segments = record(tmp_path / "raw", {"812-a-0": frames})
    day = normalized(tmp_path / "out", segments, open_ns=0)
    assert [row["kind"] for row in day.rows("orderbook")] == ["delta"]
    trades = {row["ticker"]: row for row in day.rows("trade")}
    assert len(trades) == 3
    old = trades["KXHIGHCHI-25OCT02-B80.5"]
    assert (old["yes_price"], old["no_price"], old["count"], old["taker_side"]) == (270_000, 730_000, 700, "yes")
    assert old["event_ns"] == 1_759_350_609 * S
    tickers = day.rows("ticker")
    assert sorted(row["price"] is None for row in tickers) == [False, True, True]
    assert {row["yes_ask"] for row in tickers} == {30_000, 120_000, 430_000}
    assert {row["clock"] for row in tickers} == {6598272994, 6598272643, 4117569085}
    lifecycle = Counter(row["event_type"] for row in day.rows("lifecycle"))
    assert lifecycle == Counter(
        {"created": 2, "determined": 2, "settled": 2, "deactivated": 1, "close_date_updated": 1, None: 1}
    )
    assert all(not filing.rejected for filing in day.result.filings.values())


def test_every_table_has_its_schema_and_the_days_metadata(tmp_path: Path) -> None:
    """Files can be read by anybody: columns with descriptions and units, sorted, with statistics and page index."""
    segments = record(tmp_path / "raw", {"1-a-0": [(NOON, trade("B.1", 1, NOON)), (NOON, trade("A", 2, NOON))]})
    day = normalized(tmp_path / "out", segments)
    for name, schema in SCHEMAS.items():
        file = pq.ParquetFile(day.files[name].path)
        assert file.schema_arrow.equals(schema)
        metadata = file.schema_arrow.metadata
        assert metadata[b"ssmd.date"] == DATE.encode()
        assert metadata[b"ssmd.open_ns"] == str(OPEN_NS).encode()
        assert all(field.metadata[b"description"] for field in file.schema_arrow)
    file = pq.ParquetFile(day.files["trade"].path)
    column = file.metadata.row_group(0).column(0)
    assert (column.statistics.min, column.statistics.max, column.compression) == ("A", "B.1", "ZSTD")
    content = bytearray(Path(day.files["trade"].path).read_bytes())
    content[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(pa.BufferReader(bytes(content)), page_checksum_verification=True)
    assert column.has_offset_index
    assert [row["ticker"] for row in day.rows("trade")] == ["A", "B.1"]


def test_a_trade_is_one_row_whoever_saw_it(tmp_path: Path) -> None:
    """Live wins over REST, the first connection over the second; what only REST has comes from there."""
    known, second, missed = (trade_msg("T", n, NOON + n * MS) for n in (1, 2, 3))
    segments = record(
        tmp_path / "raw",
        {
            "1-a-0": [(NOON + 5 * MS, trade("T", 1, NOON + MS))],
            "1-b-0": [(NOON + 4 * MS, trade("T", 1, NOON + MS)), (NOON + 5 * MS, trade("T", 2, NOON + 2 * MS))],
            "1-rest-0": [(NOON + 60 * S, rest_page([known, missed])), (NOON + 61 * S, rest_page([second]))],
        },
    )
    day = normalized(tmp_path / "out", segments)
    assert [(row["conn"], row["source"], row["trade_id"][-1]) for row in day.rows("trade")] == [
        ("1-a-0", "live", "1"),
        ("1-b-0", "live", "2"),
        ("1-rest-0", "rest", "3"),
    ]
    rest = day.result.filings["rest"]
    assert (rest.normalised, rest.duplicates) == (1, 1)
    assert day.result.filings["trade"].duplicates == 1


def test_a_broken_batch_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    """A flipped byte in the middle costs its own batch."""
    frames = [(NOON + n * MS, trade("T", n, NOON + n * MS, padding="x" * 900)) for n in range(900)]
    segments = record(tmp_path / "raw", {"1-a-0": frames}, every=300)
    path = next(Path(segment.path) for segment in segments if segment.channel == "trade")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    day = normalized(tmp_path / "out", segments)
    assert len(day.result.damaged) == 1
    assert "1-a-0/trade/1 is damaged" in day.result.damaged[0]
    assert len(day.rows("trade")) == 600
    assert day.result.filings["trade"].archived == 600
    assert [(one.name, one.count) for one in day.result.drift] == [("trade.msg.padding", 600)]


def test_what_cannot_be_read_is_counted_with_its_reason(tmp_path: Path) -> None:
    """Bad values, unknown types and frames that are no JSON are rejected; an unknown key is drift and nothing else."""
    frames = [
        (NOON, trade("T", 1, NOON)),
        (NOON, trade("T", 2, NOON, count_fp="2.505")),
        (NOON, trade("T", 3, NOON, count_fp="many")),
        (NOON, trade("T", 4, NOON, trade_id="")),
        (NOON, trade("T", 5, NOON, mood="good")),
        (NOON, trade("T", 6, NOON, ts_ms=2**62)),
        (NOON, frame("tip", {"a": 1})),
        (NOON, b"\xff\xfe"),
        (NOON, b"[1,2"),
    ]
    day = normalized(tmp_path / "out", record(tmp_path / "raw", {"1-a-0": frames}))
    assert day.result.filings["trade"].rejected == {
        "count_fp: more than 2 decimal places": 1,
        "count_fp: not a decimal number": 1,
        "event_ns: too large a number": 1,
        "trade_id is missing": 1,
    }
    assert day.result.filings["other"].rejected == {"not JSON": 2, "unknown type": 1}
    assert [row["trade_id"][-1] for row in day.rows("trade")] == ["1", "5"]
    drift = {(one.kind, one.name): one for one in day.result.drift}
    assert drift["key", "trade.msg.mood"].json_type == "string"
    assert '"mood":"good"' in drift["key", "trade.msg.mood"].example
    assert drift["type", "tip"].count == 1


def market_story(
    draw: random.Random, tickers: list[str], *, start_ns: int, count: int
) -> list[tuple[int, str, int, int, int]]:
    """Return what happens to some books: `(event_ns, ticker, clock, size of the change, level after it)`."""
    level = dict.fromkeys(tickers, 0)
    clocks = dict.fromkeys(tickers, 0)
    story = []
    at_ns = start_ns
    for _ in range(count):
        at_ns += draw.choice([0, 0, 1, 2, 50]) * MS
        ticker = draw.choice(tickers)
        size = draw.choice([100, 100, 250, -level[ticker], -100])
        if size == 0 or level[ticker] + size < 0:
            size = 100
        level[ticker] += size
        clocks[ticker] += draw.choice([1, 3])
        story.append((at_ns, ticker, clocks[ticker], size, level[ticker]))
    return story


def told(
    story: list[tuple[int, str, int, int, int]], from_ns: int, to_ns: int, *, latency_ns: int, clocked: bool = True
) -> list[Frame]:
    """Return what a connection that is up for a while is sent of a story: a snapshot of each book, then the changes."""
    frames: list[Frame] = []
    seq = 0
    books_now: dict[str, tuple[int, int]] = {ticker: (0, 0) for _, ticker, *_ in story}
    begun = False
    for at_ns, ticker, clock, size, level in story:
        if at_ns >= from_ns and not begun:
            begun = True
            for name, (now, clock_now) in sorted(books_now.items()):
                seq += 1
                more = {"clock": clock_now} if clocked else {}
                frames.append((from_ns + latency_ns, snapshot(name, seq, now, **more)))
        books_now[ticker] = (level, clock)
        if from_ns <= at_ns < to_ns:
            seq += 1
            more = {"clock": clock} if clocked else {}
            frames.append((at_ns + latency_ns, delta(ticker, seq, at_ns, size, **more)))
    return frames


@pytest.mark.parametrize("clocked", [True, False])
def test_a_hole_of_the_first_connection_is_filled_from_the_second(tmp_path: Path, clocked: bool) -> None:
    """Every change is there exactly once, in an order in which the books can be replayed, whatever the seam looks like."""
    for seed in range(3):
        draw = random.Random(seed)
        tickers = ["A", "B.1", "C"]
        story = market_story(draw, tickers, start_ns=NOON, count=600)
        hole, back = (story[draw.randrange(*span)][0] for span in ((150, 300), (301, 450)))
        until = story[-1][0] + S
        segments = record(
            tmp_path / f"raw{seed}",
            {
                "1-a-0": told(story, NOON - S, hole, latency_ns=3 * MS, clocked=clocked),
                "1-a-1": told(story, back, until, latency_ns=7 * MS, clocked=clocked),
                "1-b-0": told(story, NOON - S, until, latency_ns=5 * MS, clocked=clocked),
            },
        )
        day = normalized(tmp_path / f"out{seed}", segments)
        rows = day.rows("orderbook")
        changes = Counter((r["ticker"], r["event_ns"], r["clock"], r["size"]) for r in rows if r["kind"] == "delta")
        assert changes == Counter((t, at, clock if clocked else None, size) for at, t, clock, size, _ in story)
        final = {ticker: level for _, ticker, _, _, level in story}
        if clocked:
            replayed = books(rows)
            assert {ticker: sum(replayed[ticker].values()) for ticker in tickers} == final
        assert {row["conn"] for row in rows} == {"1-a-0", "1-a-1", "1-b-0"}
        filing = day.result.filings["orderbook_delta"]
        assert filing.duplicates == filing.archived - len(story) - 6


def test_a_declared_gap_of_the_first_connection_is_filled_too(tmp_path: Path) -> None:
    """A jump in the sequence numbers of one connection is no hole in the table where another saw what it lacks."""
    first = [(NOON + n * S, delta("T", n, NOON + n * S, 100)) for n in range(1, 100) if n not in (50, 51)]
    second = [(NOON + n * S + 3 * MS, delta("T", n, NOON + n * S, 100)) for n in range(1, 100)]
    segments = record(tmp_path / "raw", {"1-a-0": first, "1-b-0": second})
    gap = Gap(
        gap_id="gap-1-a-0-1-49", cause="sequence_gap", from_ns=NOON + 49 * S, to_ns=NOON + 52 * S,
        scope={"conn": "1-a-0", "sid": 1}, outcome="healed",
    )  # fmt: skip
    day = normalized(tmp_path / "out", segments, gaps=(gap,))
    rows = day.rows("orderbook")
    assert [row["seq"] for row in rows] == list(range(1, 100))
    assert [row["seq"] for row in rows if row["conn"] == "1-b-0"] == [50, 51]
    assert any(row["state"] == "healed" for row in day.rows("coverage"))


def test_connections_of_one_shard_that_overlap_are_one_account(tmp_path: Path) -> None:
    """A connector that was started before the old one was gone repeats nothing, and nothing of it is lost."""
    story = market_story(random.Random(3), ["A", "B"], start_ns=NOON, count=300)
    old = told(story, NOON - S, story[200][0], latency_ns=2 * MS)
    new = told(story, story[100][0], story[-1][0] + S, latency_ns=4 * MS)
    day = normalized(tmp_path / "out", record(tmp_path / "raw", {"1-a-0": old, "2-a-0": new}))
    rows = day.rows("orderbook")
    changes = Counter((r["ticker"], r["event_ns"], r["clock"], r["size"]) for r in rows if r["kind"] == "delta")
    assert changes == Counter((t, at, clock, size) for at, t, clock, size, _ in story)
    final = {ticker: level for _, ticker, _, _, level in story}
    assert {ticker: sum(book.values()) for ticker, book in books(rows).items()} == final


@pytest.mark.parametrize("gap_known", [True, False], ids=["killed", "overlapping"])
def test_two_replicas_of_which_one_after_the_other_is_killed_are_one_account(tmp_path: Path, gap_known: bool) -> None:
    """The notes that a killed connection owes are written at the day's end: they do not make its successor a second one.

    Nor does a successor that really overlaps its predecessor, beside the other replica, repeat anything.
    """
    story = market_story(random.Random(5), ["A", "B"], start_ns=NOON, count=900)
    end_ns = story[-1][0] + S
    owed = (end_ns + 50 * S, b'{"type":"ok","id":7}')
    first = [*told(story, NOON - S, story[200][0], latency_ns=2 * MS), owed]
    other = [*told(story, NOON - S, story[500][0], latency_ns=4 * MS), owed]
    successor = told(story, story[300][0], end_ns, latency_ns=3 * MS)
    other_successor = told(story, story[600][0], end_ns, latency_ns=5 * MS)
    segments = record(
        tmp_path / "raw", {"1-a-0": first, "1-b-0": other, "1-a-1": successor, "1-b-1": other_successor}, every=20
    )
    gaps = [
        Gap(
            gap_id=f"gap-{conn}", cause="process_crash", from_ns=frames[-2][0], to_ns=story[again][0] + 3 * MS,
            scope={"conn": conn}, outcome="healed",
        )
        for conn, frames, again in (("1-a-0", first, 300), ("1-b-0", other, 600))
    ]  # fmt: skip
    day = normalized(tmp_path / "out", segments, gaps=tuple(gaps) if gap_known else ())
    rows = day.rows("orderbook")
    changes = Counter((r["ticker"], r["event_ns"], r["clock"], r["size"]) for r in rows if r["kind"] == "delta")
    expected = Counter((t, at, clock, size) for at, t, clock, size, _ in story)
    assert changes == expected if gap_known else changes <= expected
    final = {ticker: level for _, ticker, _, _, level in story}
    if gap_known:
        assert {ticker: sum(book.values()) for ticker, book in books(rows).items()} == final


def test_a_record_sent_twice_or_out_of_order_is_one_row_in_its_place(tmp_path: Path) -> None:
    """The table is unique and in order where the wire was not."""
    frames = [(NOON + n * S, delta("T", n, NOON + n * S, 100, clock=n)) for n in range(1, 20)]
    frames.insert(10, (NOON + 10 * S, frames[9][1]))
    frames[3], frames[4] = (frames[3][0], frames[4][1]), (frames[4][0], frames[3][1])
    frames.append((NOON + 300 * S, frames[6][1]))
    late = delta("T", 20, NOON + 5 * S + MS, 100, clock=5)
    frames.append((NOON + 301 * S, late))
    tickers = [(NOON, ticker_message("T", NOON, 5)), (NOON, ticker_message("T", NOON, 5))]
    day = normalized(tmp_path / "out", record(tmp_path / "raw", {"1-a-0": frames + tickers}))
    assert [row["seq"] for row in day.rows("orderbook")] == [1, 2, 3, 4, 5, 20, *range(6, 20)]
    assert day.result.filings["orderbook_delta"].duplicates == 2
    assert day.result.filings["ticker"].duplicates == 1


def roll(folder: Path, seed: int) -> tuple[Any, Any, list[tuple[int, str, int, int, int]]]:
    """Record a roll: both days' connectors saw the seconds around the boundary. Return both normalised days."""
    draw = random.Random(seed)
    story = market_story(draw, ["A", "B"], start_ns=CLOSE_NS - 5 * S, count=900)
    stop, begin = CLOSE_NS + 3 * S, CLOSE_NS - 2 * S
    old = told(story, CLOSE_NS - 6 * S, stop, latency_ns=4 * MS)
    new = told(story, begin, story[-1][0] + S, latency_ns=2 * MS)
    trades = [(CLOSE_NS + n * 100 * MS, n) for n in range(-30, 40)]
    old += [(at + MS, trade("A", n + 100, at)) for at, n in trades if at < stop]
    new += [(at + 2 * MS, trade("A", n + 100, at)) for at, n in trades if at >= begin]
    old += [(at + MS, ticker_message("A", at, n + 100)) for at, n in trades if at < stop]
    new += [(at + 2 * MS, ticker_message("A", at, n + 100)) for at, n in trades if at >= begin]
    # The exchange gives these no time, and the two sockets received them on either side of midnight.
    told_to_both = frame("market_lifecycle_v2", {"market_ticker": "A", "event_type": "activated"})
    old.append((CLOSE_NS + draw.choice([-1, 1]) * MS, told_to_both))
    new.append((CLOSE_NS + draw.choice([-2, 2]) * MS, told_to_both))
    first = record(folder / "d1", {"1-a-0": sorted(old, key=lambda one: one[0])})
    second = record(folder / "d2", {"9-a-0": sorted(new, key=lambda one: one[0])}, date=NEXT)
    before = Neighbour(date=DATE, open_ns=OPEN_NS, close_ns=CLOSE_NS, segments=first)
    after = Neighbour(date=NEXT, open_ns=CLOSE_NS, close_ns=CLOSE_NS + 86_400 * S, segments=second)
    one = normalized(folder / "o1", first, neighbours=(after,))
    two = normalized(
        folder / "o2", second, neighbours=(before,), date=NEXT, open_ns=CLOSE_NS, close_ns=CLOSE_NS + 86_400 * S
    )
    return one, two, story


def test_around_a_roll_each_thing_is_in_exactly_one_day(tmp_path: Path) -> None:
    """Rows are filed by the exchange's time, whichever day's connector received them, and the new day stands alone."""
    for seed in range(3):
        one, two, story = roll(tmp_path / str(seed), seed)
        for day, (low, high) in ((one, (0, CLOSE_NS)), (two, (CLOSE_NS, 2**62))):
            expected = Counter((t, at, clock, size) for at, t, clock, size, _ in story if low <= at < high)
            rows = day.rows("orderbook")
            assert (
                Counter((r["ticker"], r["event_ns"], r["clock"], r["size"]) for r in rows if r["kind"] == "delta")
                == expected
            )
        for table in ("trade", "ticker", "lifecycle"):
            both = one.rows(table) + two.rows(table)
            assert len(both) == {"trade": 70, "ticker": 70, "lifecycle": 1}[table]
            assert all(row["event_ns"] < CLOSE_NS for row in one.rows(table))
            assert all(row["event_ns"] >= CLOSE_NS for row in two.rows(table))
        rows = two.rows("orderbook")
        opening = [row for row in rows if row["source"] == "opening_fold"]
        assert {row["ticker"] for row in opening} == {"A", "B"}
        assert all(row["event_ns"] == CLOSE_NS for row in opening)
        level = {ticker: level for at, ticker, _, _, level in story if at < CLOSE_NS}
        assert {row["ticker"]: row["size"] or 0 for row in opening} == level
        final = {ticker: level for _, ticker, _, _, level in story}
        assert {ticker: sum(book.values()) for ticker, book in books(rows).items()} == final
        assert two.result.filings["orderbook_delta"].opening_fold > 0
        assert one.result.filings["orderbook_delta"].other_day > 0


def test_a_day_that_started_late_has_what_its_neighbour_saw(tmp_path: Path) -> None:
    """What only the previous day's connector received after midnight is in the new day's table, and counted apart."""
    old = [(CLOSE_NS + n * S, trade("T", n + 10, CLOSE_NS + n * S)) for n in range(-3, 3)]
    new = [(CLOSE_NS + n * S, trade("T", n + 10, CLOSE_NS + n * S)) for n in range(2, 5)]
    before = Neighbour(date=DATE, open_ns=OPEN_NS, close_ns=CLOSE_NS, segments=record(tmp_path / "d1", {"1-a-0": old}))
    day = normalized(
        tmp_path / "out",
        record(tmp_path / "d2", {"9-a-0": new}, date=NEXT),
        neighbours=(before,),
        date=NEXT,
        open_ns=CLOSE_NS,
        close_ns=CLOSE_NS + 86_400 * S,
    )
    assert [row["conn"] for row in day.rows("trade")] == ["1-a-0", "1-a-0", "9-a-0", "9-a-0", "9-a-0"]
    assert day.result.from_neighbours["trade"] == 2
    assert day.result.filings["trade"].normalised == 3
    states = [
        row["state"] for row in day.rows("coverage") if row["channel"] == "trade" and row["from_ns"] < CLOSE_NS + 4 * S
    ]
    assert states == ["present"]


def test_days_that_one_recording_held_stand_alone(tmp_path: Path) -> None:
    """A day that was missed, and one that was rolled to late, have their rows and the books that they open with."""
    day_ns, late = 86_400 * S, 9_000 * S
    story = [
        row
        for number in range(3)
        for row in market_story(
            random.Random(number), ["A", "B"], start_ns=OPEN_NS + number * day_ns + 60 * S, count=200
        )
    ]
    levels: Counter[str] = Counter()
    story = [(at, ticker, clock, size, 0) for clock, (at, ticker, _, size, _) in enumerate(story, 1)]
    story = [(at, t, clock, abs(size), levels.update({t: abs(size)}) or levels[t]) for at, t, clock, size, _ in story]
    rolled_ns = OPEN_NS + 2 * day_ns + late
    frames = told(story, OPEN_NS, rolled_ns + 3 * S, latency_ns=4 * MS)
    frames += [(at + MS, trade("A", at // S, at)) for at in (OPEN_NS + n * 43_200 * S + S for n in range(5))]
    held = record(tmp_path / "d1", {"1-a-0": sorted(frames, key=lambda one: one[0])})
    before = Neighbour(date=DATE, open_ns=OPEN_NS, close_ns=CLOSE_NS, segments=held, recorded_on=True)
    last = told(story, rolled_ns, OPEN_NS + 3 * day_ns, latency_ns=4 * MS)
    own = record(tmp_path / "d3", {"9-a-0": last}, date="2026-11-12")
    fetched = record(tmp_path / "d2", {"7-rest-1": [(rolled_ns, rest_page([trade_msg("A", 5, CLOSE_NS + S)]))]})
    for number, segments in ((1, fetched), (2, own)):
        open_ns = OPEN_NS + number * day_ns
        day = normalized(
            tmp_path / f"o{number}",
            segments,
            neighbours=(before,),
            date=f"2026-11-{10 + number}",
            open_ns=open_ns,
            close_ns=open_ns + day_ns,
            channels=("trade", "orderbook_delta"),
        )
        rows = day.rows("orderbook")
        mine = [row for row in story if open_ns <= row[0] < open_ns + day_ns]
        changes = [(row["ticker"], row["event_ns"], row["clock"]) for row in rows if row["kind"] == "delta"]
        assert Counter(changes) == Counter((ticker, at, clock) for at, ticker, clock, _, _ in mine)
        opening = {row["ticker"]: row["size"] for row in rows if row["source"] == "opening_fold"}
        assert opening == {t: level for at, t, _, _, level in story if at < open_ns}
        final = {ticker: level for at, ticker, _, _, level in story if at < open_ns + day_ns}
        assert {ticker: sum(book.values()) for ticker, book in books(rows).items()} == final
        assert {row["conn"] for row in day.rows("trade")} >= {"1-a-0"}
        missing = [row for row in day.rows("coverage") if row["state"] == "missing" and row["from_ns"] < rolled_ns]
        assert [row for row in missing if row["to_ns"] < rolled_ns - S] == []
        assert set(day.result.filings) == {segment.channel for segment in segments}


def test_rows_that_came_after_the_seal_are_late(tmp_path: Path) -> None:
    """A late row is in its table and in `late`; one that belongs to the sealed day before is reported to that day."""
    frames = [
        (NOON, trade("T", 1, NOON)),
        (NOON + 50 * S, trade("T", 2, NOON - 40 * S)),
        (NOON + 55 * S, trade("T", 4, NOON + 54 * S)),  # the day was started again, and goes on
        (NOON + 60 * S, trade("T", 3, OPEN_NS - 5 * S)),
        (NOON + 61 * S, delta("T", 7, OPEN_NS - 6 * S, 100)),
    ]
    before = Neighbour(date=PREVIOUS, open_ns=OPEN_NS - 86_400 * S, close_ns=OPEN_NS, seals=(OPEN_NS + 60 * S,))
    fetched = [(NOON + 70 * S, rest_page([trade_msg("T", 5, NOON - 30 * S)]))]
    segments = record(tmp_path / "raw", {"1-a-0": frames, "1-rest-1": fetched})
    day = normalized(tmp_path / "out", segments, neighbours=(before,), seals=(NOON + S,), revision=2)
    assert [(row["table"], row["n"]) for row in day.rows("late")] == [("trade", 2)]
    assert json.loads(day.rows("late")[0]["row"])["yes_price"] == 350_000
    assert len(day.rows("trade")) == 4
    assert day.result.late == 1
    assert day.result.late_elsewhere == {PREVIOUS: LateElsewhere(2, NOON + 61 * S)}
    assert day.result.filings["trade"].other_day == 1


def test_the_tables_do_not_depend_on_how_much_fits_into_memory(tmp_path: Path) -> None:
    """Tiny runs and units, a single market split by time among them, give the same bytes."""
    draw = random.Random(4)
    story = market_story(draw, ["A", "B", "HOT", "HOT", "HOT", "HOT", "HOT"], start_ns=NOON, count=3_000)
    story = [(at + n * S, *rest) for n, (at, *rest) in enumerate(story)]  # type: ignore[misc]
    frames = told(story, NOON - S, story[1_500][0], latency_ns=4 * MS)
    again = told(story, story[1_510][0], story[-1][0] + S, latency_ns=4 * MS)
    second = told(story, NOON - S, story[-1][0] + S, latency_ns=6 * MS)
    segments = record(tmp_path / "raw", {"1-a-0": frames, "1-a-1": again, "1-b-0": second})
    whole = normalized(tmp_path / "whole", segments)
    split = normalized(tmp_path / "split", segments, run_rows=170, unit_rows=300)
    assert [(f.table, f.sha256) for f in split.result.files] == [(f.table, f.sha256) for f in whole.result.files]
    assert split.result.filings == whole.result.filings
    assert sum(row["kind"] == "delta" for row in split.rows("orderbook")) == 3_000


def test_replayed_markets_have_the_series_that_their_page_tells_of(tmp_path: Path) -> None:
    """A row of the exchange's list names its event only; the page says beside it where that belongs, as far as it is known."""
    rows = [
        {"ticker": ticker, "event_ticker": event, "status": "finalized"} for ticker, event in (("A", "E"), ("B", "F"))
    ]
    page = MarketPage(
        endpoint="/markets", params={}, rows=json.dumps(rows).encode(), tickers=frozenset("AB"), events=frozenset("EF")
    )
    told = markets_message(page, ["A", "B"], {"E": Place("S", "Crypto"), "G": Place("S", "Crypto")})
    frames = [(NOON, b'{"type":"rest_markets","msg":%b}' % told)]
    day = normalized(tmp_path / "out", record(tmp_path / "raw", {"1-rest-0": frames}))
    found = [(row["ticker"], row["series_ticker"], row["category"]) for row in day.rows("security_master")]
    assert found == [("A", "S", "Crypto"), ("B", None, None)]


def test_the_security_master_holds_what_the_day_knew(tmp_path: Path) -> None:
    """Markets of the master list are completed by what their lifecycle told; others come from there alone."""
    market = Market(
        ticker="A", event_ticker="E", series_ticker="S", category="Crypto", title="Will it?", status="active",
        open_ns=1, close_ns=2, detail={"rules": "x"},
    )  # fmt: skip
    created = {
        "market_ticker": "NEW", "event_type": "created", "open_ts": 5, "close_ts": 6,
        "additional_metadata": {"event_ticker": "E2", "title": "New?", "floor_strike": 70000.25},
    }  # fmt: skip
    determined = {"market_ticker": "A", "event_type": "determined", "result": "yes", "settlement_value": "1.0000"}
    frames = [(NOON, frame("market_lifecycle_v2", created)), (NOON + 1, frame("market_lifecycle_v2", determined))]
    day = normalized(tmp_path / "out", record(tmp_path / "raw", {"1-a-0": frames}), markets=(market,))
    first, second = day.rows("security_master")
    assert (first["ticker"], first["source"], first["result"], first["settlement_value"]) == (
        "A",
        "secmaster",
        "yes",
        1_000_000,
    )
    assert (second["ticker"], second["source"], second["status"], second["close_ns"]) == (
        "NEW",
        "lifecycle",
        "initialized",
        6 * S,
    )
    detail = json.loads(day.rows("lifecycle")[1]["detail"])
    assert detail["floor_strike"] == "70000.25"


@st.composite
def stories(draw: st.DrawFn) -> dict[str, list[Frame]]:
    """Return frames of several connections: good, repeated, odd, of any time around the day."""
    connections: dict[str, list[Frame]] = {}
    for conn in draw(st.lists(st.sampled_from(["1-a-0", "1-a-1", "1-b-0", "7-a2-0"]), unique=True, min_size=1)):
        frames: list[Frame] = []
        recv_ns = OPEN_NS - 5 * S
        for seq in range(draw(st.integers(1, 12))):
            recv_ns += draw(st.integers(0, 4)) * S
            event_ns = recv_ns - draw(st.integers(0, 2)) * S
            number = draw(st.integers(1, 6))
            ticker = "AB"[number % 2]  # a trade is of one market
            payload = draw(
                st.sampled_from(
                    [
                        trade(ticker, number, event_ns, seq=seq),
                        delta(ticker, seq, event_ns, 100 * number, clock=seq + 1),
                        snapshot(ticker, seq, 100 * number, clock=seq),
                        snapshot(ticker, seq, 0),
                        ticker_message(ticker, event_ns, number),
                        frame("market_lifecycle_v2", {"market_ticker": ticker, "event_type": "activated"}, seq=seq),
                        frame("ok", {"market_tickers": []}, seq=seq),
                        trade(ticker, number, event_ns, yes_price_dollars="1e3"),
                        frame("surprise", {}),
                        b"{nothing",
                    ]
                )
            )
            frames.append((recv_ns, payload))
        connections[conn] = frames
    return connections


@settings(max_examples=30, deadline=None)
@given(connections=stories(), run_rows=st.integers(1, 8))
def test_every_record_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, connections: Any, run_rows: int
) -> None:
    """Whatever comes in: the lines of each channel add up, no trade is there twice, and no row is of another day."""
    folder = tmp_path_factory.mktemp("story")
    day = normalized(folder / "out", record(folder / "raw", connections), run_rows=run_rows, unit_rows=run_rows)
    ids = [row["trade_id"] for row in day.rows("trade")]
    assert len(ids) == len(set(ids))
    for table in ("trade", "ticker", "lifecycle"):
        assert all(OPEN_NS <= row["event_ns"] < CLOSE_NS for row in day.rows(table))
    for table in ("trade", "ticker", "orderbook", "lifecycle"):
        keys = [(row["ticker"], row["event_ns"]) for row in day.rows(table)]
        assert keys == sorted(keys)


def test_a_large_day_may_have_many_files_open() -> None:
    """Rows are put aside in one file for every 150,000; systemd's usual 1,024 would end a day of 150 million."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1_024), hard))
    try:
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, OPEN_FILES) if hard > 0 else OPEN_FILES, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
