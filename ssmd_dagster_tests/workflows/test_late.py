"""Rows that come after a day was sealed: the next day's end tells the sealed day, and its next revision has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest

from ssmd_dagster.archive.layout import manifest_key, segment_key, table_key
from ssmd_dagster.archive.normalize_job import LateElsewhere
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Book, TradingDay
from ssmd_dagster.day.payloads import LateRows, Payload
from ssmd_dagster.day.seal import Manifest, SegmentEntry, root_hash, sha256_hex
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import UnexplainedDifferenceError
from ssmd_dagster.workflows.late import late_of, tell_the_neighbours
from ssmd_dagster.workflows.normalize import normalise, normalise_again
from ssmd_dagster_tests.archive.rawdays import CLOSE_NS, DATE, OPEN_NS, Frame, S, record, trade
from ssmd_dagster_tests.day.builders import Log
from ssmd_dagster_tests.workflows.test_normalize import Bench

NEXT = "2026-11-11"
DAY_NS = CLOSE_NS - OPEN_NS
SEALED_NS = CLOSE_NS + 90 * S
HOUR_NS = 3_600 * S


class _Book:
    """The journal of a desk, over a log in memory."""

    def __init__(self, log: Log) -> None:
        self._log = log

    @property
    def book(self) -> Book:
        return self._log.book

    async def refresh(self) -> Book:
        return self._log.book

    async def day(self, date: str) -> TradingDay | None:
        return self._log.book.days.get(date)

    async def append(self, date: str, event: EventName, *, epoch: int | None, data: Payload) -> TradingDay:
        self._log.add(event, date=date, epoch=epoch, data=msgspec.to_builtins(data), at_ns=SEALED_NS + DAY_NS)
        return self._log.day(date)


class TwoDays(Bench):
    """A bench with a journal in memory and two COMPLETE days, the first of them sealed as available."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.log = Log()
        self.windows = {
            DATE: Window(open_ns=OPEN_NS, close_ns=CLOSE_NS),
            NEXT: Window(open_ns=CLOSE_NS, close_ns=CLOSE_NS + DAY_NS),
        }
        for date in self.windows:
            for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED, EventName.END_REQUESTED):
                self.log.add(event, date=date)
            self.log.add(EventName.COMPLETED, date=date, data={"condition": "available"})
        desk: Any = self.desk
        desk.book = _Book(self.log)
        desk.stores.journal = SimpleNamespace(read_day=self.read_day)
        desk.window = lambda day: self.windows[day.date]

    async def read_day(self, day: TradingDay) -> list[Any]:
        """Return a day's events."""
        return [SimpleNamespace(seq=seq, event=event) for seq, event in self.log.events if event.date == day.date]

    async def put(self, date: str, connections: Mapping[str, list[Frame]]) -> None:
        """Put a day's segments of trades into the raw store, and the manifest that names them; the first day is sealed so."""
        segments = []
        for segment in record(self.folder / f"made-{date}", dict(connections), date=date):
            key, path = segment_key("kalshi", date, segment.channel, 0), Path(segment.path)
            await self.raw.create(key, path)
            sha256 = sha256_hex(path.read_bytes())
            segments.append(SegmentEntry(key=key, size=path.stat().st_size, sha256=sha256, batches=1, records=1))
        manifest = Manifest(
            env=self.desk.env,
            feed="kalshi",
            date=date,
            open_ns=self.windows[date].open_ns,
            close_ns=self.windows[date].close_ns,
            revision=1,
            epochs=(1,),
            segments=tuple(segments),
            root_hash=root_hash(segments),
            connections=(),
            gaps=(),
            ledger=None,
            condition="available",
            condition_reasons=(),
            rules_version=1,
            journal_seq=1,
            events=(),
            versions={},
            created_at="",
        )
        await self.raw.create(manifest_key("kalshi", date, 1), manifest.encode())
        if date == DATE:
            await self.seal(date)

    async def seal(self, date: str) -> None:
        """Journal the seal of a day whose manifest is there."""
        data = {"manifest_sha256": sha256_hex(await self.raw.get(manifest_key("kalshi", date, 1)))}
        self.log.add(EventName.SEALED, date=date, at_ns=SEALED_NS, data=data)


async def test_late_rows_change_the_condition_and_the_next_revision_has_them(tmp_path: Path) -> None:
    """Journaled once when the next day is done; filed, counted exactly and sealed when the day's tables are made again."""
    days = TwoDays(tmp_path)
    desk = days.desk
    known = [(CLOSE_NS - n * S, trade("T", n, CLOSE_NS - n * S)) for n in (9, 8, 7)]
    await days.put(DATE, {"1-a-0": known})
    first = await normalise(desk, days.log.day(DATE), told=days.told.append)
    assert (first.late, first.late_elsewhere) == (0, {})

    at_ns = CLOSE_NS + HOUR_NS
    late = [(at_ns + n * S, trade("T", n, CLOSE_NS - n * S)) for n in (5, 7)]
    await days.put(NEXT, {"9-a-0": [(at_ns, trade("T", 100, at_ns)), *late, (at_ns + 9 * S, trade("T", 101, at_ns))]})
    second = await normalise(desk, days.log.day(NEXT), told=days.told.append)
    assert second.late_elsewhere == {DATE: LateElsewhere(2, at_ns + 7 * S)}
    for _ in range(2):
        await tell_the_neighbours(desk, second.late_elsewhere)
    day = days.log.day(DATE)
    assert day.late == LateRows(rows=2, until_ns=at_ns + 7 * S)
    assert (day.condition, day.condition_reasons) == (
        "degraded",
        ("2 rows arrived after the seal, and no table has them yet",),
    )
    assert [event.event for _, event in days.log.events].count(EventName.CONDITION_CHANGED) == 1

    third = await normalise_again(desk, DATE, told=days.told.append)
    assert (third.revision, third.late, third.differences["trade"].added) == (2, 1, 1)
    rows = pq.read_table(days.normalized.url(table_key("kalshi", "late", DATE, 2))).to_pylist()
    assert [(row["table"], row["conn"]) for row in rows] == [("trade", "9-a-0")]
    day = days.log.day(DATE)
    assert day.late == LateRows(rows=1, until_ns=at_ns + 7 * S, filed=True) == late_of(day, 1)
    assert (day.condition, day.condition_reasons) == ("degraded", ("1 rows arrived after the seal",))
    assert (day.revision, day.sealed is not None and day.sealed.revision) == (2, 2)

    await tell_the_neighbours(desk, second.late_elsewhere)  # the next day's tables are made again
    assert days.log.day(DATE) == day


@pytest.mark.parametrize("what", ["flipped", "cut", "gone"])
async def test_no_tables_are_made_of_raw_files_that_are_not_those_that_were_sealed(tmp_path: Path, what: str) -> None:
    """A revision without the rows of a spoilt object would be the newest, and its manifest never verified again."""
    days = TwoDays(tmp_path)
    await days.put(DATE, {"1-a-0": [(CLOSE_NS - n * S, trade("T", n, CLOSE_NS - n * S)) for n in (9, 8, 7)]})
    await normalise(days.desk, days.log.day(DATE), told=days.told.append)
    there = sorted(tmp_path.glob("tables/**/*"))
    path = Path(days.raw.url(segment_key("kalshi", DATE, "trade", 0)))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.unlink()
    if what != "gone":
        path.write_bytes(data if what == "flipped" else data[: len(data) // 2])
    with pytest.raises(UnexplainedDifferenceError, match=r"not what was sealed: .*trades-00.*day verify"):
        await normalise_again(days.desk, DATE, told=days.told.append)
    assert sorted(tmp_path.glob("tables/**/*")) == there
    without = await normalise_again(days.desk, DATE, told=days.told.append, despite_damage=True)
    assert (without.revision, without.differences["trade"].removed > 0) == (2, True)
    manifests = [Manifest.decode(await days.raw.get(manifest_key("kalshi", DATE, number))) for number in (1, 2)]
    assert manifests[0].segments == manifests[1].segments  # what is spoilt is not sealed as it is now


@pytest.mark.parametrize(("day", "beside"), [(DATE, NEXT), (NEXT, DATE)])
async def test_no_tables_are_made_beside_raw_files_that_are_not_those_that_were_sealed(
    tmp_path: Path, day: str, beside: str
) -> None:
    """The neighbours' files around the boundary have rows of the day, too."""
    days = TwoDays(tmp_path)
    for date in (DATE, NEXT):
        at_ns = days.windows[date].open_ns + HOUR_NS
        await days.put(date, {f"{date}-a-0": [(at_ns + n * S, trade("T", n, at_ns + n * S)) for n in (1, 2, 3)]})
        await normalise(days.desk, days.log.day(date), told=days.told.append)
    await days.seal(NEXT)
    Path(days.raw.url(segment_key("kalshi", beside, "trade", 0))).unlink()
    with pytest.raises(UnexplainedDifferenceError, match=rf"not what was sealed: .*trades-00.*day verify \S+ {beside}"):
        await normalise_again(days.desk, day, told=days.told.append)


async def test_a_day_that_is_not_sealed_is_told_nothing(tmp_path: Path) -> None:
    """Its own end will find the rows."""
    days = TwoDays(tmp_path)
    before = len(days.log.events)
    await tell_the_neighbours(days.desk, {NEXT: LateElsewhere(3, CLOSE_NS), "2026-12-01": LateElsewhere(1, CLOSE_NS)})
    assert len(days.log.events) == before
