"""A roll over midnight on the exchange's own clock: both days record around the boundary, and nothing falls between them."""

from __future__ import annotations

import json
import urllib.request
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssmd_dagster.day.calendar import TradingCalendar
from ssmd_dagster.day.events import Book
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import RefusedError
from ssmd_dagster.workflows.roll import dates_to_roll
from ssmd_dagster_tests.day.builders import DATE, ENV, Log
from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.judge import judge

SECOND_NS = 1_000_000_000
SCHEDULE = {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00", "auto_roll": True}


def _set_clock(house: House, env: str, to: datetime) -> None:
    stack = json.loads((house.home / "stack.json").read_text())
    url = stack["simulators"][env]["rest_endpoint"].replace("/trade-api/v2", "/sim/clock")
    request = urllib.request.Request(
        url, json.dumps({"set": to.isoformat()}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


def _started_ns(day: dict[str, Any]) -> int:
    return int(day["started_ns"])


def test_a_roll_over_midnight_leaves_no_hole(house: House, env_name: str) -> None:
    """Asked for before midnight it waits for it: the new day is ACTIVE at the boundary, the old one records on beyond it."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    boundary_ns = int(midnight.timestamp()) * SECOND_NS
    first, second = (midnight - timedelta(days=1)).date().isoformat(), midnight.date().isoformat()
    house.add(env_name, simulator={"seed": 3, "markets": 60, "rate_per_second": 2000}, schedule=SCHEDULE)
    house.up(env_name)
    _set_clock(house, env_name, midnight - timedelta(seconds=30))
    house.ssmd("day", "start", env_name)
    until(lambda: house.day(env_name, first)["messages"] > 2_000)
    rolled = house.ssmd("day", "roll", env_name)
    assert "Ready; the day begins in" in rolled.stderr
    assert house.json("day", "status", env_name)["date"] == second
    until(lambda: house.day(env_name, second)["messages"] > 2_000)
    house.ssmd("day", "end", env_name)

    old, new = house.day(env_name, first), house.day(env_name, second)
    assert (old["state"], new["state"], old["gaps"], new["gaps"]) == ("COMPLETE", "COMPLETE", [], [])
    assert 0 <= _started_ns(new) - boundary_ns < SECOND_NS
    folders = [Path(day["archive"]) for day in (old, new)]
    windows = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert windows[0]["close_ns"] == windows[1]["open_ns"] == boundary_ns
    # The journal says so too: no later edit of the schedule moves the window of a day that was recorded.
    events = [json.loads(line) for line in house.ssmd("day", "events", env_name, "--json").stdout.splitlines()]
    opened = {event["date"]: event["data"]["open_ns"] for event in events if event["event"] == "started"}
    closed = {event["date"]: event["data"]["close_ns"] for event in events if event["event"] == "end_requested"}
    assert (closed[first], opened[second]) == (boundary_ns, boundary_ns)

    truth = house.home / "simulator" / env_name / "truth"
    verdict = judge(truth, *folders)
    assert (verdict.phantom, verdict.duplicated) == (0, 0)
    # What is missing was sent on a connection whose recorder had already said goodbye: never around the boundary.
    for connection in {frame.connection for frame in verdict.lost}:
        times = [frame.send_ns for frame in verdict.lost if frame.connection == connection]
        assert max(times) - min(times) < SECOND_NS
        assert min(times) > boundary_ns + 2 * SECOND_NS


@pytest.mark.parametrize(("left_s", "rolls"), [(7_200, False), (120, True), (-60, True)])
async def test_a_day_that_never_was_active_is_rolled_from_at_its_boundary(left_s: int, rolls: bool) -> None:
    """So the next one is recorded from its opening; before, whoever asks is told to start a day."""
    log = Log()
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.START_FAILED):
        log.add(event)
    calendar = TradingCalendar(**SCHEDULE, first_day=date.fromisoformat(DATE))  # type: ignore[arg-type]
    now_ns = calendar.close_ns(date.fromisoformat(DATE)) - left_s * 1_000_000_000

    async def refresh() -> Book:
        return log.book

    desk: Any = SimpleNamespace(
        env=ENV,
        book=SimpleNamespace(refresh=refresh),
        calendar=calendar,
        setting=SimpleNamespace(clock=lambda: now_ns),
        today=lambda: DATE,
    )
    if rolls:
        assert await dates_to_roll(desk, DATE) == (DATE, "2025-12-15")
    else:
        with pytest.raises(RefusedError, match=f"{DATE} never was ACTIVE"):
            await dates_to_roll(desk, DATE)
