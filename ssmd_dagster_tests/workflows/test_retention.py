"""Stream and spool let go of what is sealed once its time is up, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.states import EventName
from ssmd_dagster.stores.stream import Usage
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.retention import let_go_of_sealed_days
from ssmd_dagster_tests.day.builders import ENV, Log

DAY_NS = 86_400_000_000_000
RETAIN_DAYS = 2
SIZE = 10
SEAL = (EventName.END_REQUESTED, EventName.COMPLETED, EventName.SEALED)
DAYS: dict[str, tuple[EventName, ...]] = {
    "2025-12-10": SEAL,
    "2025-12-11": SEAL[:2],
    "2025-12-12": (EventName.END_REQUESTED, EventName.END_FAILED),
    "2025-12-13": SEAL,
    "2025-12-14": SEAL,
    "2025-12-15": (),
}
"""What became of each day; the last one runs, the first one's spool is that of a revision that is sealed."""


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Desk, Path, list[str], dict[str, int]]:
    """A desk over those days, each with a spool; what is purged of the stream is listed, and the clock can be set."""
    log = Log()
    folder = tmp_path / "spool" / ENV
    for date, events in DAYS.items():
        for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED, *events):
            log.add(event, date=date)
        (folder / date).mkdir(parents=True)
        (folder / date / "1-a-0.batches").write_bytes(b"x" * SIZE)
        (tmp_path / "logs" / f"{ENV}-{date}").mkdir(parents=True)
    (folder / "lost+found").mkdir()
    purged: list[str] = []
    clock = {"now": 0, "free": SIZE}

    async def usage() -> Usage:
        return Usage(1_000, 1_000 + clock["free"])

    async def purge(date: str) -> None:
        purged.append(date)

    def window(day: Any) -> Window:
        opened = list(DAYS).index(day.date) * DAY_NS
        return Window(open_ns=opened, close_ns=opened + DAY_NS)

    desk = SimpleNamespace(
        env=ENV,
        window=window,
        setting=SimpleNamespace(
            home=tmp_path, env=SimpleNamespace(retain_days=RETAIN_DAYS), clock=lambda: clock["now"]
        ),
        stores=SimpleNamespace(raw_stream=SimpleNamespace(purge=purge, usage=usage)),
        book=SimpleNamespace(book=log.book),
    )
    return cast("Desk", desk), folder, purged, clock


async def test_a_sealed_day_is_kept_for_the_days_that_were_asked_for(
    scene: tuple[Desk, Path, list[str], dict[str, int]],
) -> None:
    """To the nanosecond; then its batches go, once, and the logs of its processes."""
    desk, folder, purged, clock = scene
    clock["now"] = (1 + RETAIN_DAYS) * DAY_NS
    assert await let_go_of_sealed_days(desk) == ()
    clock["now"] += 1
    assert await let_go_of_sealed_days(desk) == ("2025-12-10",)
    assert await let_go_of_sealed_days(desk) == ()
    assert purged == ["2025-12-10"]
    assert sorted(path.name for path in folder.iterdir()) == [*list(DAYS)[1:], "lost+found"]
    logs = desk.setting.home / "logs"
    assert sorted(path.name for path in logs.iterdir()) == [f"{ENV}-{date}" for date in list(DAYS)[1:]]


async def test_what_is_not_sealed_stays_for_ever(scene: tuple[Desk, Path, list[str], dict[str, int]]) -> None:
    """A day without a seal, one that failed and one that runs keep theirs."""
    desk, folder, purged, clock = scene
    clock["now"] = 1_000 * DAY_NS
    assert await let_go_of_sealed_days(desk) == ("2025-12-10", "2025-12-13", "2025-12-14")
    assert purged == ["2025-12-10", "2025-12-13", "2025-12-14"]
    assert sorted(path.name for path in folder.iterdir()) == ["2025-12-11", "2025-12-12", "2025-12-15", "lost+found"]


async def test_a_stream_without_room_for_another_day_gets_it_from_the_oldest_sealed(
    scene: tuple[Desk, Path, list[str], dict[str, int]],
) -> None:
    """One byte short is too short; no more goes than is needed."""
    desk, _, purged, clock = scene
    assert await let_go_of_sealed_days(desk) == ()
    clock["free"] = SIZE - 1
    assert await let_go_of_sealed_days(desk) == ("2025-12-10",)
    clock["free"] = 0
    assert await let_go_of_sealed_days(desk) == ("2025-12-13",)
    assert purged == ["2025-12-10", "2025-12-13"]
