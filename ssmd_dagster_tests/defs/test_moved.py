"""Which schedules are due on an exchange's clock that is moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.events import EMPTY_BOOK
from ssmd_dagster.defs.build import build_definitions
from ssmd_dagster.defs.held import Seen
from ssmd_dagster.defs.moved import passed
from ssmd_dagster.defs.watch import Found, Watch
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.workflows.roll import LEAD_S
from ssmd_dagster_tests.environments.folders import changed, copied

DAY = date(2026, 11, 10)
MINUTE_NS = 60_000_000_000


def calendar(*, auto_roll: bool = True) -> TradingCalendar:
    """Return the calendar of the shipped simulated environment."""
    return TradingCalendar(timezone="UTC", day_start="00:10", day_end="00:00", auto_roll=auto_roll, first_day=DAY)


def due(after: int, now: int, *, auto_roll: bool = True) -> list[tuple[str, int]]:
    """Return verbs and days (the first one being 0) that are due between two minutes of the first day."""
    days = calendar(auto_roll=auto_roll)
    open_ns = days.close_ns(DAY - timedelta(days=1))
    found = passed(days, open_ns + after * MINUTE_NS, open_ns + now * MINUTE_NS)
    return [(one.verb, (one.date - DAY).days) for one in found]


@pytest.mark.parametrize(
    ("after", "now", "expected"),
    [
        (9, 10, [("start", 0)]),
        (10, 11, []),
        (11, 1438 - 1, []),
        (1437, 1438, [("roll", 0)]),
        (1438, 1449, []),
        (11, 1450, [("roll", 0), ("start", 1)]),
        (9, 5 * 1440, [("roll", 4), ("start", 4)]),
        (-60, 5, []),  # the roll of the day before the first one
        (2000, 1500, []),  # the clock was put back
    ],
)
def test_each_time_that_the_clock_passes_is_due_once(after: int, now: int, expected: list[tuple[str, int]]) -> None:
    """Of several days that a leap passes over only the latest is asked for, a roll before a start."""
    assert LEAD_S == 120
    assert due(after, now) == expected


def test_without_rolls_a_day_is_ended_at_its_close() -> None:
    """`auto_roll: false`: the end is due at `day_end`."""
    assert due(1438, 1439, auto_roll=False) == []
    assert due(1439, 1440, auto_roll=False) == [("end", 0)]


class Moved(Watch):
    """An exchange on another clock than the host's, in announced maintenance from one hour to the next."""

    def __init__(self, *minutes: int) -> None:
        super().__init__()
        self._at = iter(minutes)

    def look(
        self, names: Iterable[str], work: object, *, actor: str, timeout_s: float = 1.0
    ) -> Mapping[str, Found[Any]]:
        """Find an empty journal at the next of the minutes."""
        opens_ns = calendar().close_ns(DAY - timedelta(days=1))
        now_ns = opens_ns + next(self._at) * MINUTE_NS
        seen = Seen(now_ns=now_ns, moved=True, book=EMPTY_BOOK, maintenance=Window(now_ns, now_ns + 60 * MINUTE_NS))
        return {name: Found(seen, None) for name in names}


@pytest.mark.parametrize("auto_roll", [True, False])
def test_in_announced_maintenance_nothing_is_started_and_a_day_is_ended_all_the_same(
    tmp_path: Path, auto_roll: bool
) -> None:
    """The same rule as the schedules': what connects to the exchange is left to reconcile, an end is asked for."""
    folder = copied(tmp_path)
    schedule = {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00", "auto_roll": auto_roll}
    changed(folder / "environments" / "kalshi-sim.yaml", {"schedule": schedule})
    repository = build_definitions(load_registry(folder), watch=Moved(1430, 1455)).get_repository_def()
    sensor, cursor = repository.get_sensor_def("moved_clocks"), None
    for _ in range(2):
        answer = sensor.evaluate_tick(dg.build_sensor_context(cursor=cursor, repository_def=repository))
        cursor = answer.cursor
    asked = [(request.job_name, request.partition_key) for request in answer.run_requests or []]
    assert asked == ([] if auto_roll else [("kalshi_sim_end_day", DAY.isoformat())])
    if auto_roll:
        assert answer.skip_message == (
            "the exchange of kalshi-sim is in announced maintenance until 2026-11-11T01:15:00+00:00; "
            "the roll of 2026-11-10 is left to reconcile, after it; the start of 2026-11-11 is left to reconcile, after it"
        )
