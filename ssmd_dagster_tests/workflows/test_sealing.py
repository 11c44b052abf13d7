"""Seals: the same bytes when done again, the next revision beside the first one, and never over another's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from ssmd_dagster.archive.readback import Readback
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import Payload
from ssmd_dagster.day.seal import Manifest, TableEntry, sha256_hex
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import RefusedError, SsmdError, UnexplainedDifferenceError
from ssmd_dagster.stores.objects import LocalObjectStore
from ssmd_dagster.workflows.damage import check_sealed
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.sealing import seal, seal_revision
from ssmd_dagster_tests.capture.recordings import DATE, START_NS, build_segments, read_segments
from ssmd_dagster_tests.day.builders import ENV, Log, started
from ssmd_dagster_tests.workflows.stored_days import a_day, trade_frames

KEY = "kalshi/2025/12/14/manifest.json"
TABLE = TableEntry(key="kalshi/v1/trade/2025/12/14/data.parquet", size=1, sha256="ab", rows=2)


class Stage:
    """A desk over a folder and a journal in memory."""

    def __init__(self, folder: Path) -> None:
        self.log: Log = started()
        self.log.add(EventName.END_REQUESTED, epoch=self.log.day().epoch)
        self.log.add(EventName.COMPLETED)
        self.raw = LocalObjectStore(folder / "raw")
        self.folder = folder
        env = SimpleNamespace(name=ENV, feed="kalshi", fingerprint=lambda: "f")
        self.desk = cast(
            "Desk",
            SimpleNamespace(
                env=ENV,
                setting=SimpleNamespace(env=env),
                stores=SimpleNamespace(raw=self.raw, journal=self),
                book=self,
                window=lambda _day: Window(open_ns=START_NS, close_ns=START_NS + 1),
            ),
        )

    async def read_day(self, _day: TradingDay) -> list[Any]:
        """Return the journal, which has events of one day only."""
        return [SimpleNamespace(seq=seq, event=event) for seq, event in self.log.events]

    async def append(
        self, date: str, event: EventName, *, epoch: int | None, data: Payload | Mapping[str, Any]
    ) -> TradingDay:
        """Append an event."""
        day = self.log.add(event, date=date, epoch=epoch, data=msgspec.to_builtins(data))
        assert day is not None
        return day

    @property
    def day(self) -> TradingDay:
        """Return the day."""
        return self.log.day()

    def bytes(self, key: str = KEY) -> bytes:
        """Return a manifest as it is stored."""
        return (self.folder / "raw" / key).read_bytes()

    def forget_seal(self) -> None:
        """Leave the journal as a crash before the last `sealed` would have."""
        events = self.log.events[:-1]
        self.log = Log()
        for _, event in events:
            self.log.add(event.event, epoch=event.epoch, data=dict(event.data), at_ns=event.at_ns)


@pytest.fixture
def readback(tmp_path: Path) -> Readback:
    """A few records that were read back."""
    (tmp_path / "build").mkdir()
    return read_segments(build_segments(tmp_path / "build", a_day(trades=trade_frames()).batches(), env=ENV), env=ENV)


async def test_a_seal_that_was_cut_off_is_done_again_with_the_same_bytes(tmp_path: Path, readback: Readback) -> None:
    """The manifest was written and the journal not told."""
    stage = Stage(tmp_path)
    day = await seal(stage.desk, stage.day, readback, [TABLE])
    before = stage.bytes()
    assert day.sealed is not None
    assert day.sealed.manifest_sha256 == sha256_hex(before)
    assert Manifest.decode(before).tables == (TABLE,)
    stage.forget_seal()
    again = await seal(stage.desk, stage.day, readback, [TABLE])
    assert again.sealed == day.sealed
    assert stage.bytes() == before


async def test_a_manifest_of_before_a_later_verdict_is_kept(tmp_path: Path, readback: Readback) -> None:
    """The journal went on between the manifest and its seal; the same files are claimed, so what is stored counts."""
    stage = Stage(tmp_path)
    await seal(stage.desk, stage.day, readback)
    before = stage.bytes()
    stage.forget_seal()
    stage.log.add(EventName.CONDITION_CHANGED)
    day = await seal(stage.desk, stage.day, readback)
    assert stage.bytes() == before
    assert day.sealed is not None
    assert day.sealed.manifest_sha256 == sha256_hex(before)


async def test_another_manifest_in_the_place_is_refused(tmp_path: Path, readback: Readback) -> None:
    """Other files, or no manifest at all: it is not overwritten."""
    stage = Stage(tmp_path)
    await seal(stage.desk, stage.day, readback)
    stage.forget_seal()
    with pytest.raises(SsmdError, match="another manifest already"):
        await seal(stage.desk, stage.day, readback, [TABLE])
    before = b"something else"
    (tmp_path / "raw" / KEY).write_bytes(before)
    with pytest.raises(SsmdError, match="another manifest already"):
        await seal(stage.desk, stage.day, readback)
    assert stage.bytes() == before


async def test_the_next_revision_stands_beside_the_first(tmp_path: Path, readback: Readback) -> None:
    """On a COMPLETE day; the first one's bytes stay."""
    stage = Stage(tmp_path)
    with pytest.raises(RefusedError, match="no sealed revision"):
        await seal_revision(stage.desk, stage.day, readback, [TABLE])
    await seal(stage.desk, stage.day, readback)
    first = stage.bytes()
    later = msgspec.structs.replace(TABLE, key="kalshi/v1/trade/2025/12/14/data.r2.parquet")
    day = await seal_revision(stage.desk, stage.day, readback, [TABLE, later])
    assert (day.revision, day.sealed and day.sealed.manifest_key) == (2, KEY.replace(".json", ".r2.json"))
    manifest = Manifest.decode(stage.bytes(KEY.replace(".json", ".r2.json")))
    assert (manifest.revision, manifest.tables) == (2, (TABLE, later))
    assert (manifest.segments, manifest.root_hash) == (
        Manifest.decode(first).segments,
        Manifest.decode(first).root_hash,
    )
    assert stage.bytes() == first
    assert manifest.date == DATE


async def test_what_was_spoilt_since_is_sealed_as_it_was_and_what_came_since_is_sealed_too(
    tmp_path: Path, readback: Readback
) -> None:
    """A later revision never blesses damage; without the manifest of before there is only what was read back."""
    stage = Stage(tmp_path)
    first = readback.segments[0]
    await seal(stage.desk, stage.day, readback)
    spoilt = msgspec.structs.replace(first, sha256="00", records=0)
    added = msgspec.structs.replace(first, key=first.key.replace("-00.", "-07."))
    found = msgspec.structs.replace(readback, segments=(spoilt, *readback.segments[1:], added))
    await seal_revision(stage.desk, stage.day, found, [TABLE])
    keys = {segment.key: segment.sha256 for segment in (*readback.segments, added)}
    second = Manifest.decode(stage.bytes(KEY.replace(".json", ".r2.json")))
    assert {segment.key: segment.sha256 for segment in second.segments} == keys

    path = tmp_path / "raw" / KEY.replace(".json", ".r2.json")
    path.unlink()
    path.write_bytes(stage.bytes())
    with pytest.raises(UnexplainedDifferenceError, match=r"manifest.r2.json: is not the manifest that was sealed"):
        await check_sealed(stage.desk, stage.day, DATE)
    await seal_revision(stage.desk, stage.day, found, [TABLE])
    third = Manifest.decode(stage.bytes(KEY.replace(".json", ".r3.json")))
    assert {segment.key: segment.sha256 for segment in third.segments} == keys | {spoilt.key: "00"}
