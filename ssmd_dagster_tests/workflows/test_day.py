"""A trading day through the `ssmd` command, with real servers and processes: what it prints, returns and leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import duckdb
import pytest

from ssmd_dagster_tests.house import House, until

TODAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def _messages(house: House, env: str, date: str) -> int:
    return int(house.day(env, date)["messages"])


def test_a_day_is_started_recorded_ended_and_sealed(house: House, simulated: str) -> None:
    """Start, status, end, show and history print the design's lines; the files can be read; the seal agrees with them."""
    started = house.ssmd("day", "start", simulated)
    date = TODAY.search(started.stdout)
    assert date is not None
    today = date[0]
    assert started.stdout.splitlines() == [
        f"Starting trading day {today}...",
        "  ✓ Syncing security master",
        "  ✓ Starting connector",
        "  ✓ Starting archiver",
        "  ✓ Starting gateway",
        "  ✓ Health check passed",
        f"Trading day {today} is ACTIVE",
    ]
    again = house.ssmd("day", "start", simulated)
    assert again.stdout.splitlines() == [f"Trading day {today} is ACTIVE already"]
    until(lambda: _messages(house, simulated, today) > 500)
    lines = house.ssmd("day", "status", simulated).stdout.splitlines()
    assert lines[:3] == [f"Environment: {simulated}", f"Trading Day: {today}", "State: ACTIVE"]
    assert re.fullmatch(r"Started: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \((\d+m )?\d+s ago\)", lines[3])
    assert re.fullmatch(r"Messages: \d{1,3}(,\d{3})*", lines[4])
    assert lines[5:] == ["Gaps: 0"]

    ended = house.ssmd("day", "end", simulated)
    assert ended.stdout.splitlines() == [
        f"Ending trading day {today}...",
        "  ✓ Draining gateway connections",
        "  ✓ Flushing archiver buffers",
        "  ✓ Stopping connector",
        "  ✓ Verifying archive completeness",
        "  ✓ Recording day completion",
        f"Trading day {today} is COMPLETE",
    ]
    assert house.ssmd("day", "end", simulated, "--date", today).stdout.splitlines() == [
        f"Trading day {today} is COMPLETE already"
    ]

    day = house.day(simulated, today)
    assert (day["state"], day["condition"], day["gaps"]) == ("COMPLETE", "available", [])
    assert [step["step"] for step in day["steps"]] == [
        *("secmaster", "connector", "archiver", "gateway", "health"),
        *("drain", "flush", "stop", "verify", "record"),
    ]
    for sheet in day["ledger"]["channels"]:
        assert sheet["received"] == sheet["spooled"] == sheet["published"] == sheet["archived"] > 0
        filed = ("normalised", "duplicates", "control", "other_day", "opening_fold")
        assert sum(sheet[name] for name in filed) + sum(sheet["rejected"].values()) == sheet["archived"]
    shown = house.ssmd("day", "show", simulated, today).stdout.splitlines()
    assert shown[:3] == [f"Trading Day: {today}", f"Environment: {simulated}", "State: COMPLETE"]
    assert [line.split(":")[0] for line in shown[3:9]] == [
        "Started",
        "Ended",
        "Duration",
        "Messages",
        "Gaps",
        "Archive",
    ]
    header, row = house.ssmd("day", "history", simulated, "--limit", "7").stdout.splitlines()
    assert [header.index(word) for word in ("DATE", "STATE", "START", "END", "MSGS", "GAPS")] == [0, 12, 22, 41, 61, 72]
    assert row.startswith(f"{today}  COMPLETE  {today}T")
    assert row[61:72].strip() == f"{day['messages']:,}"
    assert row[72:] == "0"

    folder = Path(day["archive"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["condition"] == "available"
    assert {entry["key"].split("/")[2] for entry in manifest["tables"]} >= {"trade", "orderbook", "ticker", "coverage"}
    assert {Path(segment["key"]).name for segment in manifest["segments"]} == {
        path.name for path in folder.glob("*.jsonl.zst")
    }
    channels = {"trade": "trades", "ticker": "ticker", "orderbook_delta": "orderbook"}
    for sheet in day["ledger"]["channels"]:
        if sheet["channel"] in channels:
            files = folder / f"{channels[sheet['channel']]}-*.jsonl.zst"
            rows = (
                duckdb.connect()
                .execute(f"select count(*) from read_json('{files}', format='newline_delimited')")
                .fetchall()
            )
            assert rows == [(sheet["archived"],)]


@pytest.mark.long
def test_a_roll_by_hand_ends_one_day_and_starts_the_next(house: House, simulated: str) -> None:
    """Rolling prints the design's lines, ends the day and leaves the next one ACTIVE."""
    house.ssmd("day", "start", simulated)
    first = house.json("day", "status", simulated)["date"]
    rolled = house.ssmd("day", "roll", simulated)
    second = house.json("day", "status", simulated)["date"]
    assert second > first
    lines = rolled.stdout.splitlines()
    design = [
        f"Rolling from {first} to {second}...",
        f"  Starting {second}...",
        f"  ✓ Day {second} ACTIVE",
        f"  Ending {first}...",
        f"  ✓ Day {first} COMPLETE",
        "Roll complete",
    ]
    assert [line for line in lines if line in design] == design
    assert [row.split()[:2] for row in house.ssmd("day", "history", simulated).stdout.splitlines()[1:]] == [
        [second, "ACTIVE"],
        [first, "COMPLETE"],
    ]
    house.ssmd("day", "end", simulated)
    assert house.day(simulated, second)["state"] == "COMPLETE"


def test_a_forced_end_skips_the_proof_and_says_so(house: House, simulated: str) -> None:
    """`--force` ends the day as degraded, exit code 3, with who and why in the journal."""
    house.ssmd("day", "start", simulated)
    ended = house.ssmd("day", "end", simulated, "--force", "--reason", "power is going", check=3)
    assert ended.stdout.splitlines()[-1].endswith("is COMPLETE")
    day = house.day(simulated, house.today())
    assert day["condition"] == "degraded"
    assert day["condition_reasons"][0].startswith("forced by cli:")
    assert day["ledger"] is None


def test_a_completed_day_can_be_started_again_while_its_window_is_open(house: House, simulated: str) -> None:
    """A restart opens the next revision with a gap for the pause; the first revision's files stay as they are."""
    house.ssmd("day", "start", simulated)
    until(lambda: _messages(house, simulated, house.today()) > 100)
    house.ssmd("day", "end", simulated)
    folder = Path(house.day(simulated, house.today())["archive"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    house.ssmd("day", "start", simulated)
    house.ssmd("day", "end", simulated, check=3)
    day = house.day(simulated, house.today())
    assert day["revision"] == 2
    assert "operator_stop" in {gap["cause"] for gap in day["gaps"]}
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert "manifest.r2.json" in after


def test_an_emptied_cache_is_rebuilt_from_the_journal(house: House, simulated: str) -> None:
    """History and show need only the journal; rebuild writes the cache's keys again."""
    house.ssmd("day", "start", simulated)
    house.ssmd("day", "end", simulated)
    shown = house.day(simulated, house.today())
    rebuilt = house.json("day", "rebuild", simulated)
    assert rebuilt["days"] == 1
    assert house.day(simulated, house.today()) == shown
