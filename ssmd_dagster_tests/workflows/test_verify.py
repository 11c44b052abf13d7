"""A whole day proved: its end compares numbers, trades and books; later verifications find what was done to its files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from ssmd_dagster.archive.batch import Batch, scan
from ssmd_dagster_tests.house import House, until


def lines_of(day: dict[str, Any], part: str) -> dict[str, int]:
    """Return one part of the ledger that stands beside the channels."""
    lines: dict[str, int] = day["ledger"][part]
    return lines


def connector_of(house: House, env: str) -> dict[str, Any]:
    """Return what the connector says of itself, empty where it says nothing."""
    beat: dict[str, Any] = house.json("day", "status", env)["components"].get("connector-a", {})
    return {"conn": None, "n": 0, **beat}


def flip(path: Path) -> tuple[str, bytes]:
    """Change one byte in the middle of a segment's last batch; return the batch's name and the bytes before."""
    before = path.read_bytes()
    batch = [item for item in scan(before) if isinstance(item, Batch)][-1]
    changed = bytearray(before)
    changed[(batch.start + batch.data_end) // 2] ^= 0x10
    path.chmod(0o600)
    path.write_bytes(bytes(changed))
    header = batch.header
    return f"{header.conn}/{header.channel}/{header.span[0]}", before


def test_a_day_is_proved_at_its_end_and_whenever_later(house: House, simulated: str) -> None:
    """The trades of a crash are fetched; a byte changed later is named with its batch and journaled; put back, all is well."""
    house.ssmd("day", "start", simulated)
    today = house.today()
    first = connector_of(house, simulated)
    until(lambda: connector_of(house, simulated)["n"] > 500)
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: connector_of(house, simulated)["conn"] not in (None, first["conn"]))
    until(lambda: connector_of(house, simulated)["n"] > 500)
    house.ssmd("day", "end", simulated, check=3)
    day = house.day(simulated, today)
    (gap,) = day["gaps"]
    assert (gap["cause"], gap["outcome"], gap["detail"]) == ("process_crash", "stays", "trades repaired")
    wire, trades = lines_of(day, "wire"), lines_of(day, "trades")
    assert wire["distinct"] > 500
    assert (wire["holes"], wire["duplicates"]) == (0, 0)
    assert trades["exchange"] == trades["captured"] + trades["repaired"] > trades["repaired"] > 0
    assert trades["missing"] == trades["extra"] == 0

    assert day["condition"] == "degraded"
    found = house.json("day", "verify", simulated, today, check=3)
    assert (found["faults"], found["journal"], found["changed"]) == ([], True, False)
    assert all(
        found["examined"][name] > 0 for name in ("segments", "batches", "records", "intervals", "numbers", "tables")
    )
    alone = house.json("day", "verify", simulated, today, "--store-only", check=3)
    assert (alone["faults"], alone["journal"], alone["examined"]) == ([], False, found["examined"])

    segment = max(Path(day["archive"]).glob("orderbook-*.jsonl.zst"))
    name, before = flip(segment)
    for arguments in ((), ("--store-only",)):
        spoilt = house.json("day", "verify", simulated, today, *arguments, check=6)
        assert any(segment.name in fault and name in fault for fault in spoilt["faults"])
    after = house.day(simulated, today)
    assert (after["state"], after["condition"]) == ("COMPLETE", "degraded")
    assert "faults found by a later verification" in after["condition_reasons"][0]
    segment.write_bytes(before)
    mended = house.json("day", "verify", simulated, today, check=3)
    assert (mended["changed"], mended["condition_reasons"]) == (True, day["condition_reasons"])
    shown = house.ssmd("day", "show", simulated, today).stdout
    assert "wire: distinct" in shown
    assert "trades: exchange" in shown


def test_a_forced_day_is_verified_and_sealed_later(house: House, simulated: str) -> None:
    """`ssmd day verify` draws up the ledger that the forced end skipped, changes the condition and seals the day."""
    house.ssmd("day", "start", simulated)
    today = house.today()
    until(lambda: house.day(simulated, today)["messages"] > 300)
    house.ssmd("day", "end", simulated, "--force", check=3)
    forced = house.day(simulated, today)
    assert (forced["condition"], forced["ledger"]) == ("degraded", None)
    found = house.json("day", "verify", simulated, today)
    assert (found["faults"], found["changed"]) == ([], True)
    day = house.day(simulated, today)
    assert (day["condition"], day["condition_reasons"]) == ("available", [])
    assert lines_of(day, "trades")["missing"] == 0
    assert (Path(day["archive"]) / "manifest.json").exists()
    again = house.json("day", "verify", simulated, today)
    assert (again["faults"], again["changed"]) == ([], False)
