"""A month comes back although processes are killed, the exchange refuses, and one day cannot be read at first."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import duckdb
import psutil
import pytest

from ssmd_dagster_tests.house import House
from ssmd_dagster_tests.workflows.replaying import ago, archived_ids, sim, true_ids

pytestmark = [pytest.mark.long, pytest.mark.timeout(1_500)]

ENV = "month"
DAYS = 30
VICTIMS = ("capture.replayer", "capture.archiver", "day backfill", "capture.audit")
DEADLINE_S = 1_200.0


@pytest.fixture
def month(tmp_path: Path) -> Iterator[House]:
    """A house whose exchange has a past of small days and takes 60 requests a second."""
    house = House.build(tmp_path)
    feed = house.exchanges / "feeds" / "kalshi.yaml"
    feed.write_text(feed.read_text().replace("rate_limit_per_second: 20", "rate_limit_per_second: 60"))
    simulator = {"markets": 30, "rate_per_second": 20, "trades_per_day": 6_000, "reads_per_second": 60}
    house.add(ENV, simulator={"seed": 7, **simulator})
    try:
        house.up(ENV)
        yield house
    finally:
        house.down()


def processes(house: House) -> list[tuple[psutil.Process, str]]:
    """Return the processes of this house that may be killed."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        victim = next((name for name in VICTIMS if name in line), None)
        try:
            if victim is not None and process.environ().get("SSMD_HOME") == str(house.home):
                found.append((process, victim))
        except psutil.Error:
            continue
    return found


def test_a_month_is_backfilled_whatever_is_killed(month: House) -> None:
    """Every trade of the truth is in the archive and once in the tables; no day is COMPLETE with fewer; today is untouched."""
    month.ssmd("day", "start", ENV)
    first, last = ago(month, DAYS + 45), ago(month, 46)
    words = ("day", "backfill", ENV, "--from", first, "--to", last, "--parallel", "2")
    rng = random.Random(1)
    deadline = time.monotonic() + DEADLINE_S
    kills = refusals = 0
    sim(month, ENV, "/sim/faults", {"fault": "http_5xx", "path": "/historical/cutoff", "status": 400, "count": 1})
    running: subprocess.Popen[str] = month.spawn(*words)
    outcomes: list[tuple[int, str]] = []
    while True:
        assert time.monotonic() < deadline, outcomes
        if running.poll() is not None:
            out, err = running.communicate()
            outcomes.append((running.returncode, (out + err)[-2_000:]))
            if running.returncode == 0:
                break
            running = month.spawn(*words)
        if kills < 25 and rng.random() < 0.2:
            candidates = processes(month)
            if candidates:
                process, _ = rng.choice(candidates)
                process.send_signal(signal.SIGKILL)
                kills += 1
        if refusals < 12 and rng.random() < 0.1:
            refusals += 1  # bounded: refusals that wait for a client who backs off would be all that he ever meets
            body = rng.choice(["flat", "nested"])
            sim(month, ENV, "/sim/faults", {"fault": "http_429", "path": "/historical", "count": 5, "body": body})
        time.sleep(0.5)
    assert kills >= 10
    history = month.json("day", "history", ENV, "--limit", "100")["days"]
    states = {day["date"]: (day["state"], day["mode"], day["revision"]) for day in history}
    assert states.pop(month.today())[:2] == ("ACTIVE", "live")
    dates = [(date.fromisoformat(first) + timedelta(days=number)).isoformat() for number in range(DAYS)]
    assert states == dict.fromkeys(dates, ("COMPLETE", "replay", 1))
    for day in dates:
        true = true_ids(month, ENV, day)
        assert set(archived_ids(month, ENV, day)) == true, day
        table = month.home / "objects" / f"normalized-{ENV}" / "kalshi" / "v1" / "trade" / day.replace("-", "/")
        for file in table.glob("data*.parquet"):
            rows = duckdb.connect().execute(f"select trade_id from read_parquet('{file}')").fetchall()
            assert sorted(row[0] for row in rows) == sorted(true), day
    assert not [name for _, name in processes(month) if name != "capture.archiver"]
    assert json.loads(month.ssmd("day", "status", ENV, "--json").stdout)["state"] == "ACTIVE"
