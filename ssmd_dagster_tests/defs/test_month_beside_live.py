"""A month is backfilled from Dagster's UI while a day is recorded: the day goes on, and a roll that is due does not wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from ssmd_dagster_tests.defs.dagster_instance import ENV, LAUNCH, LOCATION, Instance
from ssmd_dagster_tests.house import House
from ssmd_dagster_tests.workflows.replaying import ago, true_ids

pytestmark = [pytest.mark.long, pytest.mark.timeout(2_400)]
DAYS = 30
ROLL_STARTS_WITHIN_S = 15.0
BACKFILL_TIMEOUT_S = 2_000.0

BACKFILL = """mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""


@pytest.fixture
def dagster_instance(tmp_path: Path) -> Iterator[Instance]:
    """A house with Dagster in it, whose exchange has a past of small days."""
    house = House.build(tmp_path)
    house.add(ENV, simulator={"seed": 7, "markets": 30, "rate_per_second": 100, "trades_per_day": 2_000})
    try:
        house.ssmd("up", ENV, "--detach")
        yield Instance(house)
    finally:
        house.down()


def until_seldom(condition: Callable[[], Any], timeout_s: float) -> None:
    """Wait until `condition` holds, asking every two seconds: the asking shall not take the CPU that it waits for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s: {condition}"
        time.sleep(2)


def _replayed(house: House) -> dict[str, str]:
    history = house.json("day", "history", ENV, "--limit", "100")["days"]
    return {day["date"]: day["state"] for day in history if day["mode"] == "replay"}


def test_a_roll_does_not_wait_for_a_months_backfill(dagster_instance: Instance) -> None:
    """The next day is being started within 15 s of the roll's launch; every day of the month has every trade once."""
    house = dagster_instance.house
    today = house.today()
    tomorrow = (date.fromisoformat(today) + timedelta(days=1)).isoformat()
    house.ssmd("day", "start", ENV)
    epoch = house.day(ENV, today)["epoch"]
    dates = [ago(house, back) for back in range(DAYS + 1, 1, -1)]
    params = {
        "selector": {"partitionSetName": f"{ENV}_replay_day_partition_set", "repositorySelector": LOCATION},
        "partitionNames": dates,
    }
    assert dagster_instance.ask(BACKFILL, params=params)["__typename"] == "LaunchBackfillSuccess"
    until_seldom(lambda: "COMPLETE" in _replayed(house).values(), 300.0)
    until_seldom(lambda: {"STARTING", "ACTIVE", "ENDING"} & set(_replayed(house).values()), 60.0)
    assert house.day(ENV, today)["epoch"] == epoch

    asked_ns = time.time_ns()
    roll = {
        "selector": {**LOCATION, "jobName": f"{ENV}_roll_day"},
        "runConfigData": {},
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": today}]},
    }
    run_id = str(dagster_instance.ask(LAUNCH, params=roll)["run"]["runId"])
    until_seldom(lambda: dagster_instance.run(run_id)["status"] == "SUCCESS", 300.0)
    asked = [step for step in house.day(ENV, tomorrow)["steps"] if step["step"] == "secmaster"]
    assert (asked[0]["started_ns"] - asked_ns) / 1e9 < ROLL_STARTS_WITHIN_S
    assert list(_replayed(house).values()).count("COMPLETE") < DAYS  # so it was beside the backfill

    until_seldom(lambda: _replayed(house) == dict.fromkeys(dates, "COMPLETE"), BACKFILL_TIMEOUT_S)
    assert [house.day(ENV, day)["state"] for day in (today, tomorrow)] == ["COMPLETE", "ACTIVE"]
    assert house.day(ENV, today)["gaps"] == []
    for day in dates:
        table = house.home / "objects" / f"normalized-{ENV}" / "kalshi" / "v1" / "trade" / day.replace("-", "/")
        rows = duckdb.connect().execute(f"select trade_id from read_parquet('{table}/data*.parquet')").fetchall()
        assert sorted(row[0] for row in rows) == sorted(true_ids(house, ENV, day)), day
