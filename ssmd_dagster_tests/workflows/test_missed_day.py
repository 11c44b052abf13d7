"""A day that was recorded with another one, on real processes: nobody rolled at its midnight, and it becomes a day of its own."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.simulator.truth import Frame, read_truth
from ssmd_dagster.workflows.desk import open_desk
from ssmd_dagster.workflows.reconcile import reconcile
from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.workflows.replaying import sim
from ssmd_dagster_tests.workflows.test_roll import SCHEDULE, _set_clock

pytestmark = pytest.mark.long


def records(house: House, env: str, day: str) -> None:
    """Wait until some hundred more messages have come in."""
    seen = house.day(env, day)["messages"]
    until(lambda: house.day(env, day)["messages"] > seen + 500)


def test_a_missed_day_is_made_of_the_archive_that_recorded_on(
    house: House, env_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next day is rolled to late; the missed one has every trade and every change of its books, and a book to begin with."""
    monkeypatch.setenv("SSMD_HOME", str(house.home))
    monkeypatch.setenv("SSMD_EXCHANGES", str(house.exchanges))
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    first, missed, last = ((midnight + timedelta(days=number)).date().isoformat() for number in (-2, -1, 0))
    house.add(
        env_name,
        simulator={"seed": 3, "markets": 60, "rate_per_second": 1000, "trades_per_day": 0},
        schedule=SCHEDULE,
        capture={
            "channels": ["trade", "ticker", "orderbook_delta", "market_lifecycle_v2"],
            "markets": {"series": ["KXFED", "KXPRESPERSON"]},
        },
    )
    house.up(env_name)
    _set_clock(house, env_name, midnight - timedelta(days=1, hours=1))
    house.ssmd("day", "start", env_name)
    for at in (midnight - timedelta(hours=12), midnight + timedelta(hours=2)):
        records(house, env_name, first)
        _set_clock(house, env_name, at)
    records(house, env_name, first)

    async def look() -> None:
        async with open_desk(load_setting(env_name), "sensor:test") as desk:
            made = await reconcile(desk)
            assert [entry.recorded_with for entry in made.missed] == [first]
            assert [ask.verb for ask in made.asks] == ["roll"]

    asyncio.run(look())
    refused = house.ssmd("day", "backfill", env_name, "--from", missed, "--to", missed, check=None)
    assert f"was recorded with {first}, which is ACTIVE" in refused.stderr + refused.stdout
    house.ssmd("day", "roll", env_name)
    house.ssmd("day", "backfill", env_name, "--from", missed, "--to", missed)

    days = [house.day(env_name, name) for name in (first, missed, last)]
    assert [(day["state"], day["condition"], day["gaps"]) for day in days] == [
        ("COMPLETE", "available", []),
        ("COMPLETE", "available", []),
        ("ACTIVE", None, []),
    ]
    manifest = json.loads((Path(days[1]["archive"]) / "manifest.json").read_text())
    low, high = manifest["open_ns"], manifest["close_ns"]
    frames = read_truth(house.home / "simulator" / env_name / "truth")
    told = [one.type for one in frames if isinstance(one, Frame) and low <= one.event_ns < high]
    folder = house.home / "objects" / f"normalized-{env_name}" / "kalshi" / "v1"
    tables = {
        name: pq.read_table(folder / name / missed.replace("-", "/") / "data.parquet")
        for name in ("trade", "orderbook")
    }
    kinds = tables["orderbook"]["kind"].to_pylist()
    assert kinds.count("delta") == told.count("orderbook_delta") > 0
    assert "opening_fold" in tables["orderbook"]["source"].to_pylist()
    listed = sim(house, env_name, f"/sim/truth?from={low // 10**9}&to={high // 10**9 - 1}").splitlines()
    rows = [json.loads(line) for line in listed]
    wanted = {row["trade_id"] for row in rows if row["ticker"].startswith(("KXFED", "KXPRESPERSON"))}
    assert set(tables["trade"]["trade_id"].to_pylist()) == wanted
    coverage = pq.read_table(folder / "coverage" / missed.replace("-", "/") / "data.parquet").to_pylist()
    assert {row["state"] for row in coverage} == {"present"}
    assert {(row["from_ns"], row["to_ns"]) for row in coverage} == {(low, high)}
