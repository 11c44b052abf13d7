"""A week in fast time that nobody looks after: schedules and sensors alone bring every day to where it should be.

The daemon is killed, the machine is switched off over a midnight, a day fails to start, a connection breaks, Dagster is down
over another midnight. At the end the UI, `ssmd day history`, the journal and the exchange's log of the truth must agree on
every day. `make week` runs it; each day takes some tens of seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pyarrow.parquet as pq
import pytest

from ssmd_dagster.day.states import DayState
from ssmd_dagster.environments.home import segments_dir
from ssmd_dagster_tests.defs.week import ENV, Week
from ssmd_dagster_tests.judge import judge as archived

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

_S = DayState
MADE = """query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  assetPartitionStatuses { ... on TimePartitionStatuses { ranges { startKey endKey status } } }
  assetMaterializations(limit: 200) { partition metadataEntries { label
    ... on TextMetadataEntry { text } ... on IntMetadataEntry { intValue } } } } } }"""


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Week]:
    """A house with everything in it; the exchange's clock stands shortly before the first day is due."""
    made = Week(tmp_path_factory.mktemp("week"))
    try:
        made.up()
        yield made
    finally:
        made.house.down()


def roll(week: Week, number: int) -> None:
    """Lead the exchange's clock from the middle of a day over its midnight, as time would, only faster."""
    week.records(number)
    week.leap(number, "23:57:50")
    week.is_ready(number + 1)
    week.leap(number, "23:59:57")
    week.reaches(number + 1, _S.ACTIVE)
    week.reaches(number, _S.COMPLETE)


def live_through(week: Week) -> None:
    """Lead the clock through the week and break what is to be broken."""
    week.begin()
    roll(week, 0)

    # Day 1: the daemon is killed, and a connection breaks.
    week.kill("dagster._daemon")
    week.records(1)
    week.tell("faults", fault="disconnect")
    week.wait(lambda: week.gaps(1), "a gap")
    roll(week, 1)

    # Day 2: the machine is switched off over its midnight.
    week.records(2)
    week.leap(2, "23:50:00")
    week.proves_books()
    week.records(2)
    week.switch_off()
    week.leap(3, "01:00:00")
    week.up()
    week.reaches(2, _S.COMPLETE)
    week.reaches(3, _S.ACTIVE)

    # Day 4 fails to start; day 3 records on until it does.
    obstacle = segments_dir(week.house.home, ENV, week.date(4))
    week.obstruct(obstacle)
    week.records(3)
    week.leap(3, "23:57:50")
    week.reaches(4, _S.FAILED)
    week.clear(obstacle)
    week.leap(4, "00:04:00")
    week.reaches(4, _S.ACTIVE)
    week.reaches(3, _S.COMPLETE)

    # Dagster is down over the midnight of day 4, for three hours.
    week.records(4)
    week.leap(4, "23:50:00")
    with week.without_daemon():
        week.leap(5, "00:00:10")
        week.records(4)
        week.leap(5, "02:50:00")
        week.records(4)
    week.reaches(5, _S.ACTIVE)
    week.reaches(4, _S.COMPLETE)
    roll(week, 5)
    roll(week, 6)


def trades_are_true(week: Week, day: dict[str, Any]) -> None:
    """See that a day's table has every trade of its window once, but those before a late start."""
    rows = pq.read_table(week.table(day["date"], "trade"), columns=["trade_id"])["trade_id"].to_pylist()
    true = week.true_trades(week.window(day["date"]))
    assert len(rows) == len(set(rows))
    assert set(rows) <= true.keys()
    late_ns = max((gap["to_ns"] for gap in day["gaps"] if gap["cause"] == "late_start"), default=0)
    assert [at_ns for number, at_ns in true.items() if number not in set(rows) and at_ns >= late_ns] == []


def test_a_week_goes_by_itself(week: Week) -> None:
    """Seven days end COMPLETE, each with the condition and the gaps that it has to have, and the eighth is ACTIVE."""
    live_through(week)
    days = {day["date"]: day for day in week.history()}
    shown = [days[week.date(number)] for number in range(8)]
    assert [day["state"] for day in shown] == ["COMPLETE"] * 7 + ["ACTIVE"]
    assert sorted(days) == [week.date(number) for number in range(8)]
    causes = [sorted({gap["cause"] for gap in day["gaps"] if gap["outcome"] != "healed"}) for day in shown[:7]]
    assert causes == [[], ["connection_lost"], ["process_crash"], ["late_start"], [], [], []]
    assert [day["condition"] for day in shown[:7]] == [
        *("available", "degraded", "degraded", "degraded", "available", "available", "available")
    ]
    sealed = {day["date"]: day for day in shown[:7]}
    for before, after in pairwise(shown[:7]):
        assert week.window(before["date"]).end == week.window(after["date"]).start

    # The truth log: nothing is lost that no gap declares, and every trade is in the table of its day.
    verdict = week.judged(sealed)
    assert verdict.faults() == {}, verdict.examples
    for date, day in sealed.items():
        assert day["messages"] == week.stored_messages(date) > 0
        trades_are_true(week, day)


def test_nobody_asked_for_anything(week: Week) -> None:
    """Every run was launched by a sensor or a schedule, and every event of the journal was written by such a run or a process."""
    runs = week.runs()
    assert runs
    launched = {run["tags"].get("dagster/sensor_name") or run["tags"].get("dagster/schedule_name") for run in runs}
    assert launched <= {"moved_clocks", "reconcile", "health", f"{ENV}_sync_markets_schedule"}
    ids = {f"dagster:{run['id']}" for run in runs}
    actors = {event.actor for _, event in week.events()}
    assert {actor for actor in actors if actor.startswith("dagster:")} <= ids
    assert {actor.partition(":")[0] for actor in actors} <= {"dagster", "sensor", "capture"}


def test_the_ui_shows_the_same_days(week: Week) -> None:
    """The catalog has the same days, conditions, counts and transitions as `ssmd day history` and the journal."""
    days = {day["date"]: day for day in week.history()}
    done = {date: day for date, day in days.items() if day["state"] == "COMPLETE"}
    ranges: list[dict[str, Any]] = []

    def settled() -> bool:
        node = week.instance.ask(MADE, key={"path": [ENV, "trading_day"]})
        ranges[:] = node["assetPartitionStatuses"]["ranges"]
        return {entry["partition"] for entry in node["assetMaterializations"]} == set(done)

    week.wait(settled, "the catalog to have every day")
    assert [(one["startKey"], one["endKey"], one["status"]) for one in ranges] == [
        (min(done), max(done), "MATERIALIZED")
    ]
    node = week.instance.ask(MADE, key={"path": [ENV, "trading_day"]})
    for made in node["assetMaterializations"]:
        entries = {entry["label"]: entry.get("text", entry.get("intValue")) for entry in made["metadataEntries"]}
        day = done[made["partition"]]
        assert (entries["state"], entries["condition"]) == ("COMPLETE", day["condition"])
        assert (entries["messages"], entries["gaps"]) == (day["messages"], len(day["gaps"]))
    transitions = [(event.date, f"{event.from_ or 'new'} → {event.to}") for _, event in week.events() if event.to]

    def told() -> bool:
        seen = week.instance.observed(ENV, "trading_day")
        return [entry for entry in reversed(seen) if "→" in entry[1]] == transitions

    week.wait(told, "every transition of the journal, in order")


def test_days_without_dagster_come_back_whole(week: Week) -> None:
    """Dagster is down over three midnights while a day records on: each date becomes a day of its own, nothing is lost."""
    first = week.running()
    between, last = (first + 1, first + 2), first + 3
    week.records(first)
    with week.without_daemon():
        for number, at in ((between[0], "12:00:00"), (between[1], "12:00:00"), (last, "02:00:00")):
            week.leap(number, at)
            week.records(first)
    for number in (first, *between):
        week.reaches(number, _S.COMPLETE)
    week.reaches(last, _S.ACTIVE)
    days = {day["date"]: day for day in week.history()}
    shown = [days[week.date(number)] for number in (first, *between)]
    assert [(day["condition"], day["gaps"]) for day in shown] == [("available", [])] * 3
    why = {
        run["tags"]["dagster/partition"]: run["tags"]["ssmd/why"]
        for run in week.runs()
        if run["jobName"] == f"{ENV}_replay_day"
    }
    assert why == {
        week.date(number): f"its messages are recorded with {week.date(first)}, which is COMPLETE" for number in between
    }
    for day in shown:
        trades_are_true(week, day)
    for date in (week.date(number) for number in between):
        kinds = pq.read_table(week.table(date, "orderbook"), columns=["kind", "source"])
        assert kinds["kind"].to_pylist().count("delta") == week.true_changes(week.window(date)) > 0
        assert "opening_fold" in kinds["source"].to_pylist()
    roll(week, last)
    trades_are_true(week, week.house.day(ENV, week.date(last)))
    began, back = week.window(week.date(first)).start, week.window(week.date(last)).start + 7_200_000_000_000
    verdict = archived(week.truth, *(week.folder(week.date(number)) for number in range(last + 1)))
    assert [frame for frame in verdict.lost if began <= frame.send_ns < back] == []
