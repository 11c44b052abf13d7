"""A day over maintenance that the exchange has announced, with real processes."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from ssmd_dagster_tests.house import House, until

LEAD_S, LASTS_S = 25, 8


def announce(house: House, env: str) -> dict[str, Any]:
    """Let the simulated exchange announce maintenance."""
    stack = json.loads((house.home / "stack.json").read_text())
    base = stack["simulators"][env]["rest_endpoint"].removesuffix("/trade-api/v2")
    body = json.dumps({"in_s": LEAD_S, "for_s": LASTS_S}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{base}/sim/maintenance", body), timeout=10) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


@pytest.mark.long
def test_maintenance_is_a_gap_that_degrades_nothing_and_a_start_in_it_says_until_when(
    house: House, simulated: str
) -> None:
    """Shown before it comes; the gap has its cause and ends with it; a start within it fails as one that may be repeated."""
    window = announce(house, simulated)
    house.ssmd("day", "start", simulated)
    day = house.today()
    shown = house.day(simulated, day)["maintenance"]
    assert shown == [{"from_ns": window["from_s"] * 10**9, "to_ns": window["to_s"] * 10**9}]
    until(lambda: [gap["cause"] for gap in house.day(simulated, day)["gaps"]] == ["exchange_maintenance"], 60)
    until(lambda: all(gap["outcome"] != "open" for gap in house.day(simulated, day)["gaps"]), 60)
    maintenance = house.day(simulated, day)["gaps"][0]
    assert maintenance["to_ns"] <= window["to_s"] * 10**9
    house.ssmd("day", "end", simulated, check=None)
    assert "exchange_maintenance" not in " ".join(house.day(simulated, day)["condition_reasons"])

    again = announce(house, simulated)
    house.ssmd("secmaster", "sync", simulated)
    until(lambda: house.day(simulated, day) and _now_s(house, simulated) >= again["from_s"], 60)
    failed = house.ssmd("day", "start", simulated, check=7)
    assert "the exchange is in announced maintenance until" in failed.stderr
    until(lambda: house.ssmd("day", "start", simulated, check=None).returncode == 0, 60)


def _now_s(house: House, env: str) -> int:
    stack = json.loads((house.home / "stack.json").read_text())
    base = stack["simulators"][env]["rest_endpoint"].removesuffix("/trade-api/v2")
    with urllib.request.urlopen(f"{base}/sim/status", timeout=10) as answer:
        return int(json.load(answer)["now_ns"]) // 10**9
