"""A day's tables in the store: made once, left alone when they are made again, a new revision when they differ."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pyarrow.parquet as pq
import pytest

from ssmd_dagster.archive.figures import Figures
from ssmd_dagster.archive.layout import drift_key, segment_key, table_key
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Book, TradingDay
from ssmd_dagster.day.payloads import Sealed
from ssmd_dagster.day.states import DayState
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import Market
from ssmd_dagster.stores.objects import LocalObjectStore
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.normalize import Beside, Normalised, normalise
from ssmd_dagster_tests.archive.rawdays import CLOSE_NS, DATE, MS, OPEN_NS, Frame, S, record, trade
from ssmd_dagster_tests.day.builders import started

NOON = OPEN_NS + 12 * 3600 * S


class _Secmaster:
    async def known(self, _open_ns: int, _close_ns: int) -> list[Market]:
        return []


class _Book:
    def __init__(self, day: TradingDay) -> None:
        self.book = Book(days={day.date: day})

    async def refresh(self) -> Book:
        return self.book


class Bench:
    """A desk with local stores and one COMPLETE day."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.normalized = LocalObjectStore(folder / "raw"), LocalObjectStore(folder / "tables")
        env = load_registry().environments["kalshi-sim"].model_copy(update={"formats": ("parquet", "capnp")})
        self.day = TradingDay(
            env=env.name,
            date=DATE,
            state=DayState.COMPLETE,
            actor="test",
            first_seq=1,
            last_seq=1,
            updated_ns=CLOSE_NS,
            epoch=1,
        )
        stores = SimpleNamespace(raw=self.raw, normalized=self.normalized, secmaster=_Secmaster())
        self.desk = cast(
            "Desk",
            SimpleNamespace(
                env=env.name,
                setting=SimpleNamespace(env=env, home=folder),
                stores=stores,
                window=lambda _day: Window(open_ns=OPEN_NS, close_ns=CLOSE_NS),
                book=_Book(self.day),
                where=lambda date: f"{env.name} {date}",
            ),
        )
        self.told: list[str] = []

    async def store(self, number: int, frames: list[Frame]) -> None:
        """Put a segment of trades into the raw store."""
        segments = record(self.folder / f"made{number}", {f"1-a-{number}": frames})
        for segment in segments:
            await self.raw.create(segment_key("kalshi", DATE, segment.channel, number), Path(segment.path))

    async def normalise(self) -> Normalised:
        """Make the tables."""
        return await normalise(self.desk, self.day, told=self.told.append)

    def table(self, name: str, revision: int = 1) -> Path:
        """Return the path of a table."""
        return Path(self.normalized.url(table_key("kalshi", name, DATE, revision)))


def trades(first: int, count: int) -> list[Frame]:
    """Return trades numbered from `first` on."""
    return [(NOON + n * MS, trade("A.B" if n % 2 else "C", n, NOON + n * MS)) for n in range(first, first + count)]


async def test_tables_are_stored_once_and_a_rerun_says_so(tmp_path: Path) -> None:
    """The same raw files give the same bytes, so the second run finds everything there."""
    bench = Bench(tmp_path)
    await bench.store(0, trades(0, 40))
    first = await bench.normalise()
    assert (first.revision, first.already, first.rows()["trade"]) == (1, False, 40)
    assert first.filings["trade"].normalised == 40
    noted = json.loads(Path(bench.normalized.url(drift_key("kalshi", DATE))).read_bytes())
    assert sum(dict(zip(Figures._fields, noted["figures"], strict=True))["bins"]["trade"]) == 40
    keys = [entry.key for entry in first.tables]
    assert "kalshi/v1/trade/2026/11/10/A%2EB/data.capnp.zst" in keys
    for entry in first.tables:
        data = Path(bench.normalized.url(entry.key)).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)
    again = await bench.normalise()
    assert again.already
    assert again.tables == first.tables
    assert list((tmp_path / "normalize").iterdir()) == []


async def test_other_bytes_with_the_same_rows_open_no_revision(tmp_path: Path) -> None:
    """What a day's rows are decides: an end that is made again knows a connection more, a new version says more of a column."""
    bench = Bench(tmp_path)
    await bench.store(0, trades(0, 40))
    first = await bench.normalise()
    path = bench.table("trade")
    rows = pq.read_table(path)
    path.unlink()
    pq.write_table(rows.replace_schema_metadata(None), path, compression="gzip")
    again = await bench.normalise()
    assert (again.revision, again.already, again.differences) == (1, True, {})
    assert [entry.key for entry in again.tables] == [entry.key for entry in first.tables]
    path.unlink()
    pq.write_table(rows.slice(1), path)
    assert (await bench.normalise()).revision == 2


async def test_other_tables_open_the_next_revision(tmp_path: Path) -> None:
    """More raw records give a second revision of the tables that differ, with a summary; the first is as it was."""
    bench = Bench(tmp_path)
    await bench.store(0, trades(0, 40))
    await bench.normalise()
    before = bench.table("trade").read_bytes()
    await bench.store(1, [(NOON + 60 * S, trade("C", 7, NOON + 7 * MS)), *trades(100, 5)])
    second = await bench.normalise()
    assert (second.revision, second.already, second.rows()["trade"]) == (2, False, 45)
    assert (second.differences["trade"].added, second.differences["trade"].removed) == (5, 0)
    assert bench.table("trade").read_bytes() == before
    assert pq.read_table(bench.table("trade", 2)).schema.metadata[b"ssmd.revision"] == b"2"
    assert not bench.table("ticker", 2).exists()
    keys = {entry.key.split("/v1/")[1] for entry in second.tables}
    assert {"trade/2026/11/10/data.r2.parquet", "ticker/2026/11/10/data.parquet"} <= keys
    again = await bench.normalise()
    assert (again.revision, again.already, again.tables) == (2, True, second.tables)


async def test_a_run_that_was_cut_off_is_finished_by_the_next(tmp_path: Path) -> None:
    """Tables that are missing are added to the revision; what is there stays."""
    bench = Bench(tmp_path)
    await bench.store(0, trades(0, 10))
    first = await bench.normalise()
    bench.table("coverage").unlink()
    shutil.rmtree(bench.table("late").parent)
    second = await bench.normalise()
    assert (second.revision, second.already, second.tables) == (1, False, first.tables)


async def test_a_normaliser_that_fails_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed run stores nothing and says what to do."""
    bench = Bench(tmp_path)
    await bench.store(0, trades(0, 10))
    (tmp_path / "normalize").mkdir()
    monkeypatch.setattr(bench.raw, "url", lambda _key: str(tmp_path / "gone"))
    with pytest.raises(SsmdError, match=r"exit code 1.*FileNotFoundError"):
        await bench.normalise()
    assert await bench.normalized.list() == []


async def test_a_sealed_revision_gets_no_other_table_than_it_was_sealed_with(tmp_path: Path) -> None:
    """It may have taken a table from the revision before: a new one of that is the next revision's, not its own."""
    bench = Bench(tmp_path)
    await bench.store(0, trades(0, 10))
    assert (await bench.normalise()).revision == 1
    sealed = Sealed(manifest_sha256="00", root_hash="11", revision=2)
    bench.day = msgspec.structs.replace(bench.day, revision=2, sealed=sealed)
    await bench.store(1, trades(10, 5))
    assert (await bench.normalise()).revision == 3
    assert not bench.table("trade", 2).exists()
    assert pq.read_table(bench.table("trade", 3)).num_rows == 15


def test_a_day_that_recorded_on_also_says_how_long() -> None:
    """Its notes tell which channels were subscribed; of other neighbours only segments with rows at the edge matter."""
    names = ["session-00", "trades-00", "trades-01", "trades-02", "rest-00"]
    keys = [f"kalshi/2026/11/09/{name}.jsonl.zst" for name in names]
    day = started().day()
    assert Beside(day, None, None, recorded_on=True).holding(keys) == [keys[4], keys[0], *keys[1:4]]
    assert Beside(day, "last", None, recorded_on=False).holding(keys) == keys[2:4]
    assert Beside(day, "first", None, recorded_on=False).holding(keys) == keys[1:3]
