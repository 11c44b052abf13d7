"""Loading tables of recorded days: four engines, pruning, holes, and every kind of bad input."""

from __future__ import annotations

import subprocess
import sys
import warnings
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

import ssmd_dagster
from ssmd_dagster.archive import reader
from ssmd_dagster.archive.reader import (
    GapError,
    GapWarning,
    NoRowsWarning,
    coverage,
    load,
)
from ssmd_dagster.archive.recorded import BrokenFileError, DayNotFoundError, DayNotReadyError, find, store_error
from ssmd_dagster.archive.selection import FutureVersionError
from ssmd_dagster.archive.tables import SCHEMAS, table_from_rows
from ssmd_dagster.archive.units import contracts, dollars
from ssmd_dagster.errors import ConfigurationError, NotFoundError, SsmdError, UnreachableError, UsageError
from ssmd_dagster_tests.archive.recorded_days import DATE, ENV, FEED, OPEN_NS, SECOND, Shelf, hole, trade, window_of
from ssmd_dagster_tests.environments.folders import changed, copied
from ssmd_dagster_tests.servers import S3Server

ENGINES = ["arrow", "polars", "pandas", "duckdb"]
NEXT = "2025-12-15"
BUCKETS = {"raw": "ssmd-raw", "normalized": "ssmd-normalized"}


def rows_of(loaded: Any) -> list[dict[str, Any]]:
    """Return what any engine loaded as plain rows."""
    if hasattr(loaded, "collect"):
        loaded = loaded.collect().to_arrow()
    elif hasattr(loaded, "to_arrow_table"):
        loaded = loaded.to_arrow_table()
    elif not isinstance(loaded, pa.Table):
        loaded = pa.Table.from_pandas(loaded, preserve_index=False)
    rows: list[dict[str, Any]] = loaded.to_pylist()
    return rows


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Two days: trades of three markets, no holes."""
    shelf = Shelf(tmp_path / "objects")
    first = [trade(f"KX-{name}", at, price=10_000 * at, count=at) for name in "ABC" for at in range(1, 11)]
    second = [trade(f"KX-{name}", at, date=NEXT) for name in "AD" for at in range(1, 4)]
    listed = [{"ticker": f"KX-{name}", "source": "secmaster"} for name in "ABCE"]
    shelf.put({"trade": first, "security_master": listed})
    shelf.put({"trade": second, "security_master": listed}, date=NEXT)
    return shelf


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_rows(shelf: Shelf, engine: Any) -> None:
    """Tickers, columns, their order, days and values are the same in all."""
    columns = ["ticker", "yes_price", "event_ns", "source", "seq"]
    loaded = load(shelf.folder, (DATE, NEXT), "trade", ["KX-A", "KX-D"], columns, engine=engine)
    rows = rows_of(loaded)
    assert len(rows) == 10 + 3 + 3
    assert list(rows[0]) == columns
    assert rows[2] == {
        "ticker": "KX-A",
        "yes_price": 30_000,
        "event_ns": OPEN_NS + 3 * SECOND,
        "source": "live",
        "seq": None,
    }
    assert {row["ticker"] for row in rows} == {"KX-A", "KX-D"}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_exact_decimals(shelf: Shelf, engine: Any) -> None:
    """Prices in dollars with six places, counts in contracts with two; other columns stay as they are."""
    rows = rows_of(load(shelf.folder, DATE, "trade", "KX-A", engine=engine, decimals=True))
    assert [row["yes_price"] for row in rows] == [Decimal(at) / 100 for at in range(1, 11)]
    assert rows[0]["yes_price"].as_tuple().exponent == -6
    assert rows[4]["count"] == Decimal("0.05")
    assert rows[0]["event_ns"] == OPEN_NS + SECOND


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interval_chooses_rows_and_holes(shelf: Shelf, engine: Any) -> None:
    """`from_ns` is inclusive, `to_ns` exclusive, and a hole elsewhere does not matter."""
    shelf.write("coverage", [hole("trade", 100, 200)], revision=1)
    loaded = load(shelf.folder, DATE, "trade", engine=engine, from_ns=OPEN_NS + 2 * SECOND, to_ns=OPEN_NS + 4 * SECOND)
    assert len(rows_of(loaded)) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_no_ticker_at_all_is_no_row(shelf: Shelf, engine: Any) -> None:
    """An empty list of tickers is not the same as None."""
    assert rows_of(load(shelf.folder, DATE, "trade", [], engine=engine)) == []


def test_reading_skips_row_groups_of_other_tickers(shelf: Shelf) -> None:
    """Statistics of the sorted file name the row groups of a ticker; the others are not read."""
    selection = reader.select(find(shelf.folder), DATE, "trade", tickers="KX-B")
    (fragment,) = selection.dataset().get_fragments()
    assert fragment.num_row_groups == 8
    assert len(fragment.split_by_row_group(selection.condition())) == 3


def test_columns_carry_their_units(shelf: Shelf) -> None:
    """Description and unit come with the table, and follow a conversion."""
    loaded = load(shelf.folder, DATE, "trade")
    assert loaded.schema.field("yes_price").metadata[b"unit"] == b"1e-6 USD"
    assert loaded.schema.metadata[b"ssmd.files"] == f"{DATE}/r1".encode()
    exact = load(shelf.folder, DATE, "trade", decimals=True)
    assert exact.schema.field("yes_price").metadata[b"unit"] == b"USD"


def test_polars_and_duckdb_read_nothing_before_they_are_asked(shelf: Shelf) -> None:
    """The file may go away between loading and collecting: only then is it missed."""
    frame = load(shelf.folder, DATE, "trade", engine="polars")
    relation = load(shelf.folder, DATE, "trade", engine="duckdb")
    for path in shelf.tables.rglob("trade/2025/12/14/data.parquet"):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        frame.collect()
    with pytest.raises(Exception, match=r"No files found|could not open|Cannot open"):
        relation.fetchall()


def test_the_latest_sealed_revision_is_served(shelf: Shelf) -> None:
    """A manifest makes a revision; a table without one is not taken, and older ones stay to be asked for."""
    shelf.write("trade", [trade("KX-A", 1)], revision=2)
    assert len(load(shelf.folder, DATE, "trade")) == 30
    shelf.seal(DATE, 2)
    assert len(load(shelf.folder, DATE, "trade")) == 1
    assert len(load(shelf.folder, DATE, "trade", revision=1)) == 30
    assert len(load(shelf.folder, DATE, "security_master")) == 4
    with pytest.raises(NotFoundError, match="no revision r3") as caught:
        load(shelf.folder, DATE, "trade", revision=3)
    assert caught.value.do == "Its revisions: r1, r2"


@pytest.mark.parametrize("inner", ["ssmd-normalized", f"ssmd-normalized/{FEED}"])
def test_the_bucket_of_tables_is_enough(shelf: Shelf, inner: str) -> None:
    """Without manifests the newest file counts, since the condition is not known."""
    shelf.write("trade", [trade("KX-A", 1)], revision=2)
    assert len(load(shelf.folder / inner, DATE, "trade")) == 1
    assert len(load(shelf.folder / inner, DATE, "trade", revision=1)) == 30


def test_a_folder_without_tables_says_so(tmp_path: Path) -> None:
    """Neither an empty folder nor one that is not there is a store."""
    for folder, words in ((tmp_path, "no tables in that folder"), (tmp_path / "nowhere", "there is no such folder")):
        with pytest.raises(NotFoundError, match=words):
            load(folder, DATE, "trade")


@pytest.mark.parametrize(("date", "near"), [("2025-12-13", DATE), ("2025-12-20", NEXT), ("2024-01-01", DATE)])
def test_a_day_that_is_not_recorded_names_the_nearest(shelf: Shelf, date: str, near: str) -> None:
    """Before the first, after the last, far away."""
    with pytest.raises(DayNotFoundError, match=f"{date} is not recorded") as caught:
        load(shelf.folder, date, "trade", on_gap="ignore")
    assert near in caught.value.do


def test_a_range_has_all_of_its_days_or_says_which_not(shelf: Shelf) -> None:
    """Both ends are included; a range in which nothing is recorded, one backwards and one of three days are errors."""
    assert len(load(shelf.folder, [DATE, NEXT], "trade")) == 36
    assert len(load(shelf.folder, (NEXT, NEXT), "trade")) == 6
    shelf.put({"trade": [], "coverage": []}, date="2025-12-18")
    asked = "not recorded, though the range asks for them"
    with pytest.raises(DayNotFoundError, match=f"{asked}: 2025-12-16, 2025-12-17"):
        load(shelf.folder, (DATE, "2025-12-18"), "trade")
    with pytest.raises(DayNotFoundError, match=f"{asked}: 2025-12-13 "):
        load(shelf.folder, ("2025-12-13", DATE), "trade")
    with pytest.warns(GapWarning, match=f"{asked}: 2025-12-16, .*2025-12-26 and 5 more"):
        assert len(load(shelf.folder, (DATE, "2025-12-31"), "trade", on_gap="warn")) == 36
    with pytest.raises(DayNotFoundError, match="no day from 2025-11-01 to 2025-11-30"):
        load(shelf.folder, ("2025-11-01", "2025-11-30"), "trade")
    with pytest.raises(UsageError, match="ends before it begins"):
        load(shelf.folder, (NEXT, DATE), "trade")
    with pytest.raises(UsageError, match="first and a last day"):
        load(shelf.folder, (DATE, DATE, NEXT), "trade")


def test_a_day_without_tables_is_not_ready(shelf: Shelf) -> None:
    """A day that runs has raw files only; one sealed as pending says why; in a range they follow `on_gap`."""
    (shelf.raw / FEED / "2025/12/16").mkdir(parents=True)
    shelf.seal("2025-12-17", condition="pending", reasons=["not computed: normalised"])
    with pytest.raises(DayNotReadyError, match="2025-12-16 is pending: not ended yet; it has no tables"):
        load(shelf.folder, "2025-12-16", "trade", on_gap="ignore")
    with pytest.raises(DayNotReadyError, match="2025-12-17 is pending: not computed: normalised"):
        load(shelf.folder, "2025-12-17", "trade")
    with pytest.raises(DayNotReadyError):
        load(shelf.folder, (DATE, "2025-12-17"), "trade")
    with pytest.warns(GapWarning, match="2025-12-16 is pending"):
        assert len(load(shelf.folder, (DATE, "2025-12-16"), "trade", on_gap="warn")) == 36
    assert len(load(shelf.folder, (DATE, "2025-12-17"), "trade", on_gap="ignore")) == 36


def test_an_unproved_day_is_served_only_on_request(tmp_path: Path) -> None:
    """Tables of a day whose condition is pending, or that was not sealed: an error, a warning, or taken as they are."""
    shelf = Shelf(tmp_path)
    shelf.put({"trade": [trade("KX-A", 1)]}, condition="pending", reasons=["not computed: wire"])
    shelf.put({"trade": [trade("KX-A", 1, date=NEXT)]}, date=NEXT, sealed=False)
    for date, words in ((DATE, "pending: not computed: wire; it is not proved"), (NEXT, "its tables are not sealed")):
        with pytest.raises(DayNotReadyError, match=words):
            load(tmp_path, date, "trade")
        with pytest.warns(GapWarning, match=words):
            assert len(load(tmp_path, date, "trade", on_gap="warn")) == 1
        assert len(load(tmp_path, date, "trade", on_gap="ignore")) == 1


def test_a_hole_in_the_interval_is_raised_warned_of_or_ignored(shelf: Shelf) -> None:
    """The error lists the gaps with time and cause; only those of the table's channel and of the tickers count."""
    shelf.write("coverage", [hole("trade", 3600, 3660), hole("ticker", 0, 9), hole("trade", 70, 80, market="KX-C")])
    with pytest.raises(GapError, match=r"2 gaps in trade: 2025-12-14T01:00:00\.000Z to 01:01:00\.000Z") as caught:
        load(shelf.folder, DATE, "trade")
    assert [gap["cause"] for gap in caught.value.gaps] == ["connection_lost"] * 2
    assert caught.value.gaps[0]["date"] == DATE
    with pytest.raises(GapError, match="1 gap in trade"):
        load(shelf.folder, DATE, "trade", "KX-A")
    with pytest.warns(GapWarning, match="of KX-C") as told:
        assert len(load(shelf.folder, DATE, "trade", on_gap="warn")) == 30
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(shelf.folder, DATE, "trade", on_gap="ignore")) == 30


def test_what_was_healed_repaired_or_never_there_is_no_hole(shelf: Shelf) -> None:
    """Nor are the exchange's maintenance and scheduled pauses."""
    shelf.write(
        "coverage",
        [
            hole("trade", 1, 2, state="healed"),
            hole("trade", 2, 3, state="repaired"),
            hole("trade", 3, 4, cause="exchange_maintenance"),
            hole("trade", 4, 5, cause="closed_by_schedule"),
        ],
    )
    assert len(load(shelf.folder, DATE, "trade")) == 30


def test_a_day_whose_coverage_is_gone_has_unknown_holes(shelf: Shelf) -> None:
    """Nobody can promise then that nothing is missing."""
    next(shelf.tables.rglob("coverage/2025/12/14/data.parquet")).unlink()
    with pytest.raises(GapError, match="its holes are not known"):
        load(shelf.folder, DATE, "trade")
    assert len(load(shelf.folder, DATE, "trade", on_gap="ignore")) == 30


def test_a_ticker_that_never_traded_is_empty_with_a_note(shelf: Shelf) -> None:
    """The note tells a listed market from one that was not recorded; several days are named as a range."""
    with pytest.warns(NoRowsWarning, match=f"KX-E has no row in trade of {DATE}: listed by the exchange"):
        empty = load(shelf.folder, DATE, "trade", "KX-E")
    assert len(empty) == 0
    assert empty.schema.names == SCHEMAS["trade"].names
    with pytest.warns(NoRowsWarning, match=f"KX-Z .* of {DATE} to {NEXT}: not among the recorded markets"):
        assert len(load(shelf.folder, (DATE, NEXT), "trade", ["KX-A", "KX-Z"], on_gap="warn")) == 13


def test_many_tickers_without_a_row_are_two_notes(shelf: Shelf) -> None:
    """Somebody who asks for a thousand markets is not told a thousand times."""
    asked = ["KX-A", "KX-E", *(f"KX-Z{n:02}" for n in range(15))]
    with pytest.warns(NoRowsWarning) as noted:
        assert len(load(shelf.folder, DATE, "trade", asked)) == len(load(shelf.folder, DATE, "trade", "KX-A"))
    first, second = (str(one.message) for one in noted)
    assert first == f"KX-E has no row in trade of {DATE}: listed by the exchange, and nothing of the kind happened"
    assert second.startswith("KX-Z00, KX-Z01, ")
    assert second.endswith(f"KX-Z09 and 5 more have no row in trade of {DATE}: not among the recorded markets")


def test_a_table_of_a_future_version_is_refused(shelf: Shelf) -> None:
    """Its columns may mean something else: no engine gives rows."""
    path = shelf.write("trade", [trade("KX-A", 1)], schema_version="2")
    for engine in ENGINES:
        with pytest.raises(
            FutureVersionError, match="of version 2, this installation knows versions up to 1"
        ) as caught:
            load(shelf.folder, DATE, "trade", engine=engine)  # type: ignore[arg-type]
        assert caught.value.where == str(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "foreign"])
def test_a_broken_table_is_named(shelf: Shelf, damage: str) -> None:
    """A file cut short, emptied, of another format, with a flipped bit, or not made by us: an error with its path."""
    path = next(shelf.tables.rglob("trade/2025/12/14/data.parquet"))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        chunk = pq.read_metadata(path).row_group(0).column(SCHEMAS["trade"].get_field_index("trade_id"))
        content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    if damage == "foreign":
        pq.write_table(table_from_rows("trade", [trade("KX-A", 1)]), path)
    else:
        spoiled = {"cut": content[:-100], "empty": b"", "text": b"no table" * 9, "flipped": content}
        path.write_bytes(bytes(spoiled[damage]))
    with pytest.raises(BrokenFileError, match="cannot be read") as caught:
        load(shelf.folder, (DATE, NEXT), "trade")
    assert caught.value.where == str(path)
    assert "ssmd day normalize" in caught.value.do


def test_a_broken_manifest_is_named(shelf: Shelf) -> None:
    """Its day is not served as if nothing had happened."""
    path = shelf.raw / FEED / "2025/12/14/manifest.json"
    path.write_bytes(b'{"v":1')
    with pytest.raises(BrokenFileError, match="the manifest cannot be read") as caught:
        load(shelf.folder, DATE, "trade")
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"table": "trades"}, "no table 'trades'"),
        ({"columns": ["price"]}, "the table trade has no column price"),
        ({"engine": "spark"}, "no such engine: spark"),
        ({"on_gap": "hide"}, "no such on_gap: hide"),
        ({"date": "14.12.2025"}, "not a date"),
        ({"date": 20251214}, "not a date: '20251214'"),
        ({"date": (20251214, 20251215)}, "not a date: '20251214'"),
        ({"from_ns": 2, "to_ns": 1}, "the interval ends before it begins"),
        ({"table": "coverage", "tickers": "KX-A"}, "not chosen by ticker"),
        ({"table": "security_master", "from_ns": 1}, "no event time"),
    ],
)
def test_wrong_words_are_refused_with_what_was_expected(shelf: Shelf, arguments: dict[str, Any], words: str) -> None:
    """Tables, columns, engines and dates that do not exist."""
    with pytest.raises(UsageError, match=words):
        load(shelf.folder, **{"date": DATE, "table": "trade", **arguments})


def test_one_name_stands_for_a_list_of_one_and_a_time_for_its_date(shelf: Shelf) -> None:
    """As researchers write it: a column's name, a `datetime` (pandas' `Timestamp` is one)."""
    rows = load(shelf.folder, datetime(2025, 12, 14, 9, tzinfo=UTC), "trade", columns="yes_price")
    assert rows.column_names == ["yes_price"]
    assert len(rows) == len(load(shelf.folder, DATE, "trade"))


def test_a_folder_that_looks_like_an_environment_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder needs a slash in its name; the error says so where there is one."""
    (tmp_path / "days").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        load("days", DATE, "trade")
    assert caught.value.do == "For the folder of that name say ./days"


def test_a_table_that_the_day_lacks_is_named_with_those_it_has(shelf: Shelf) -> None:
    """Only `late` may be absent: there were no late rows then."""
    assert len(load(shelf.folder, DATE, "late")) == 0
    with pytest.raises(NotFoundError, match="has no table ticker") as caught:
        load(shelf.folder, DATE, "ticker")
    assert caught.value.do == "It has trade, coverage, security_master"


def test_an_engine_that_is_not_installed_is_named(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ConfigurationError, match="needs the package polars") as caught:
        load(shelf.folder, DATE, "trade", engine="polars")
    assert "pip install polars" in caught.value.do


def test_coverage_lists_the_days_and_markets_asked_for(shelf: Shelf) -> None:
    """A first column says which day; rows of other channels and markets are left out."""
    shelf.write(
        "coverage", [hole("trade", 1, 2), hole("trade", 1, 2, market="KX-A"), hole("trade", 1, 2, market="KX-B")]
    )
    found = coverage(shelf.folder, (DATE, NEXT), channels=["trade"], tickers=["KX-B"]).to_pylist()
    assert [(row["date"], row["market"], row["state"]) for row in found] == [
        (DATE, None, "missing"),
        (DATE, "KX-B", "missing"),
        (NEXT, None, "present"),
    ]
    assert found[2]["to_ns"] == window_of(NEXT).close_ns
    assert coverage(shelf.folder, (DATE, NEXT), channels="trade", tickers="KX-B").to_pylist() == found
    with pytest.raises(UsageError, match="no such channel: trades"):
        coverage(shelf.folder, DATE, channels=["trades"])


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(-(10**18) + 1, 10**18 - 1)), st.integers(0, 3))
def test_decimals_are_the_integers_with_a_point(values: list[int | None], cut: int) -> None:
    """No digit changes, nulls stay null, slices too."""
    array = pa.array(values, pa.int64())[cut:]
    assert dollars(array).to_pylist() == [v if v is None else Decimal(v).scaleb(-6) for v in values[cut:]]
    assert contracts(pa.chunked_array([array])).to_pylist() == [
        v if v is None else Decimal(v).scaleb(-2) for v in values[cut:]
    ]


def test_a_number_too_long_for_a_decimal_is_refused() -> None:
    """Nineteen digits do not fit."""
    with pytest.raises(SsmdError, match="more than 18 digits"):
        dollars(pa.array([-(2**63)]))


def test_an_environment_is_found_by_its_name(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML says where its days are; no server is asked."""
    _configured(tmp_path, monkeypatch, {"storage.path": str(shelf.folder), "storage.buckets": BUCKETS})
    assert len(ssmd_dagster.load(ENV, DATE, "trade")) == 30
    with pytest.raises(NotFoundError, match="no environment 'nobody'"):
        load("nobody", DATE, "trade")


@pytest.mark.parametrize("engine", ENGINES)
def test_days_on_s3_load_like_those_in_a_folder(
    shelf: Shelf, s3: S3Server, env_name: str, engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By an address with its endpoint, or by the environment, whose buckets may have a prefix."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_access_key)
    query = f"endpoint_override=127.0.0.1:{s3.port}&scheme=http&region=us-east-1"
    buckets = {}
    for which in ("raw", "normalized"):
        buckets[which] = f"{env_name}-{which}"
        s3.make_bucket(buckets[which])
        filesystem, root = fs.FileSystem.from_uri(f"s3://{buckets[which]}/team?{query}")
        fs.copy_files(str(shelf.folder / f"ssmd-{which}"), root, destination_filesystem=filesystem)
    by_address = load(f"s3://{buckets['normalized']}/team?{query}", DATE, "trade", "KX-B", engine=engine)
    assert [row["yes_price"] for row in rows_of(by_address)] == [10_000 * at for at in range(1, 11)]
    storage = {"type": "s3", "endpoint": s3.url, "region": "us-east-1", "buckets": buckets, "prefix": "team"}
    _configured(tmp_path, monkeypatch, {"storage": storage})
    assert len(rows_of(load(ENV, (DATE, NEXT), "trade", ["KX-A"], engine=engine))) == 13


def _configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Configure the environment of these tests."""
    exchanges = copied(tmp_path)
    path = exchanges / "environments" / f"{ENV}.yaml"
    (exchanges / "environments" / "kalshi-sim.yaml").rename(path)
    changed(path, {"name": ENV, **changes})
    monkeypatch.setenv("SSMD_EXCHANGES", str(exchanges))
    monkeypatch.setenv("SSMD_HOME", str(tmp_path / "home"))


def test_a_store_that_does_not_answer_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within seconds, with the address."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(UnreachableError):
        load("s3://bucket/feed?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", DATE, "trade")


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (OSError("When reading information for key: AWS Error ACCESS_DENIED during HeadObject"), ConfigurationError),
        (PermissionError("mode"), ConfigurationError),
        (FileNotFoundError("gone"), NotFoundError),
        (OSError("AWS Error NETWORK_CONNECTION during ListObjectsV2"), UnreachableError),
    ],
)
def test_what_a_store_says_becomes_an_operators_error(raised: OSError, kind: type[SsmdError]) -> None:
    """Refused, gone, or no answer: never taken for a damaged file."""
    error = store_error(raised, "bucket/key")
    assert type(error) is kind
    assert error.where == "bucket/key"


def test_importing_the_package_brings_in_no_server_and_no_dagster() -> None:
    """Neither the package nor reading a day needs dagster, NATS or Redis; engines wait (Arrow itself brings pandas in)."""
    code = (
        "import sys, ssmd_dagster; a = set(sys.modules); ssmd_dagster.load; ssmd_dagster.book_at\n"
        "names = {'dagster', 'nats', 'redis', 'aiohttp', 'polars', 'duckdb'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
        "assert not {'pyarrow', 'numpy'} & a, a"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_all_that_the_package_offers_is_there() -> None:
    """Every name of `__all__` can be had, and no other."""
    assert all(getattr(ssmd_dagster, name) for name in ssmd_dagster.__all__)
    assert set(ssmd_dagster.__all__) <= set(dir(ssmd_dagster))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ssmd_dagster.lode


def test_the_shelf_of_these_tests_writes_what_the_schemas_say(shelf: Shelf) -> None:
    """The files here have exactly the schema of the real ones."""
    (file,) = reader.select(find(shelf.folder), DATE, "trade").files
    assert pq.read_schema(file.path).equals(SCHEMAS["trade"])
    assert msgspec.json.decode((shelf.raw / FEED / "2025/12/14/manifest.json").read_bytes())["condition"] == "available"
