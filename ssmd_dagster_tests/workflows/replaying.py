"""What tests of replays share: the simulated exchange's truth of past days, and what a day's archive holds."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import zstandard

from ssmd_dagster.stores.connect import read_stack
from ssmd_dagster_tests.house import House


def ago(house: House, days: int) -> str:
    """Return the date of some days before today."""
    return (date.fromisoformat(house.today()) - timedelta(days=days)).isoformat()


def sim(house: House, env: str, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
    """Ask the simulator's control surface."""
    base = read_stack(house.home).simulators[env].rest_endpoint.removesuffix("/trade-api/v2")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        base + path, data=data, method=method if data is not None or method == "DELETE" else "GET"
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


def true_ids(house: House, env: str, day: str, *, combos: bool = False) -> set[str]:
    """Return the ids of the trades of a trading day, by the simulator's truth."""
    start = int(datetime.fromisoformat(f"{day}T00:00:00").replace(tzinfo=house.timezone).timestamp())
    rows = [json.loads(line) for line in sim(house, env, f"/sim/truth?from={start}&to={start + 86_400}").splitlines()]
    return {row["trade_id"] for row in rows if combos or not row["ticker"].startswith("KXMVE")}


def archived_ids(house: House, env: str, day: str) -> Counter[str]:
    """Return the ids of the trades in a day's archive, by the pages in its files."""
    folder = Path(house.day(env, day)["archive"])
    ids: Counter[str] = Counter()
    for path in folder.glob("rest-*.jsonl.zst"):
        with (
            path.open("rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader,
        ):
            for line in reader.read().splitlines():
                ids.update(row["trade_id"] for row in json.loads(line)["wire"]["msg"].get("trades", ()))
    return ids
