"""The journal as history: the audit trail, where its chain of hashes breaks, and days from the journal alone."""

from __future__ import annotations

import asyncio
import json
import signal
from itertools import pairwise
from typing import Any

import pytest

from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.stores.connect import connect
from ssmd_dagster_tests.house import House

SETTINGS: dict[str, Any] = {"simulator": {"seed": 7, "markets": 10, "rate_per_second": 20}}


@pytest.fixture(scope="module")
def played(house: House) -> str:
    """An environment with one day that was started and ended by force: some thirty events."""
    env = "played"
    house.add(env, **SETTINGS)
    house.up(env)
    house.ssmd("day", "start", env, "--reason", "a test")
    house.ssmd("day", "end", env, "--force", check=None)
    return env


async def _stores(house: House, env: str, work: Any) -> Any:
    environment = load_registry(house.exchanges).get(env)
    async with connect(environment, house.home, load_secrets(house.home), name="test") as stores:
        return await work(stores)


def test_history_and_show_need_nothing_but_the_journal(house: House, played: str) -> None:
    """With every key of the cache gone they say what they said before, and with Redis gone, too."""
    before = house.ssmd("day", "history", played).stdout, house.ssmd("day", "show", played, house.today()).stdout

    async def flush(stores: Any) -> None:
        await stores.redis.flushdb()

    asyncio.run(_stores(house, played, flush))
    after = house.ssmd("day", "history", played).stdout, house.ssmd("day", "show", played, house.today()).stdout
    assert after == before
    assert "COMPLETE" in after[0]
    house.add(played, **SETTINGS, cache={"type": "redis", "url": "redis://127.0.0.1:1/0"})
    try:
        away = house.ssmd("day", "history", played).stdout, house.ssmd("day", "show", played, house.today()).stdout
        assert "State: COMPLETE" in house.ssmd("day", "status", played).stdout
        assert "completed ENDING → COMPLETE" in house.ssmd("day", "events", played).stdout
        house.ssmd("day", "start", played, check=7)
    finally:
        house.add(played, **SETTINGS)
    assert away == before


@pytest.mark.usefixtures("signals_of_a_terminal")
def test_a_day_is_watched_until_it_is_enough(house: House, played: str) -> None:
    """A line a look where nobody sits before it, JSON where that is asked for; interrupted it ends with 130."""
    for more, has in (((), f"{house.today()}  COMPLETE  "), (("--json",), '"state":"COMPLETE"')):
        watching = house.spawn("day", "watch", played, "--every", "0.5", *more)
        assert watching.stdout is not None
        assert watching.stderr is not None
        try:
            assert all(has in watching.stdout.readline() for _ in range(2))
            watching.send_signal(signal.SIGINT)
            assert watching.wait(timeout=10) == 130
        finally:
            watching.kill()
            watching.wait()
            watching.stdout.close()
            watching.stderr.close()


# Last: it forges an event.
def test_the_audit_trail_shows_who_did_what_and_where_its_chain_breaks(house: House, played: str) -> None:
    """Every event in order with states, actor and reason; as JSON lines; of one day; a forged event is named, exit code 1."""
    shown = house.ssmd("day", "events", played)
    lines = shown.stdout.splitlines()
    assert lines[0].split()[2:] == [house.today(), "defined", "-", "→", "PENDING", *lines[0].split()[7:]]
    assert any("start_requested PENDING → STARTING" in line and "(a test)" in line for line in lines)
    assert any("completed ENDING → COMPLETE" in line for line in lines)
    assert "the chain of hashes is whole" in shown.stderr
    rows = [json.loads(line) for line in house.ssmd("day", "events", played, "--json").stdout.splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, len(lines) + 1))
    assert all(after["prev_sha256"] == before["sha256"] for before, after in pairwise(rows))
    assert house.ssmd("day", "events", played, "--date", "2026-01-01").stdout == ""
    following = house.spawn("day", "events", played, "--follow")
    assert following.stdout is not None
    assert following.stderr is not None
    try:
        assert [following.stdout.readline().rstrip("\n") for _ in lines] == lines
        house.ssmd("env", "pause", played)
        assert "paused" in following.stdout.readline()
    finally:
        following.kill()
        following.wait()
        following.stdout.close()
        following.stderr.close()

    async def forge(stores: Any) -> None:
        row = {key: value for key, value in rows[-1].items() if key not in ("seq", "sha256")}
        await stores.js.publish(f"{played}.day.events", json.dumps({**row, "id": "forged"}).encode())

    asyncio.run(_stores(house, played, forge))
    broken = house.ssmd("day", "events", played, check=1)
    assert len(broken.stdout.splitlines()) == len(lines) + 1
    assert f"broken at sequence {len(lines) + 2}" in broken.stderr
