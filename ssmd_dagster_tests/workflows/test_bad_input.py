"""What goes wrong around a day's start and end: each with its exit code, its words, and nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from ssmd_dagster_tests.exchanges import plain_exchange
from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.servers import free_port


def _last_event(house: House, env: str) -> dict[str, Any]:
    day = house.day(env, house.today())
    return {"state": day["state"], "step": day["failed_step"], "error": day["error"]}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("day", "start", "no-such-environment"), 4, "no-such-environment"),
        (("day", "status", "../../etc"), 4, "../../etc"),
        (("day", "start", "ENV", "--date", "14-12-2025"), 2, "YYYY-MM-DD"),
        (("day", "start", "ENV", "--date", "2025-02-30"), 2, "2025-02-30"),
        (("day", "start", "ENV", "--date", "1999-01-01"), 4, "2025-12-01"),
        (("day", "start", "ENV", "--date", "2999-01-01"), 4, "The calendar goes from"),
        (("day", "start", "ENV", "--mode", "replay"), 5, "is not over"),
        (("day", "end", "ENV"), 5, "no trading day to end"),
        (("day", "end", "ENV", "--date", "YESTERDAY"), 5, "never started"),
        (("day", "roll", "ENV"), 5, "no trading day to roll from"),
        (("day", "show", "ENV", "2025-12-01"), 4, "not recorded"),
        (("day", "status", "ENV"), 4, "no trading day has been started"),
    ],
)
def test_what_does_not_exist_or_cannot_be_is_refused_with_its_exit_code(
    house: House, idle: str, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """Unknown environments and dates, dates outside the calendar, and verbs that the state does not allow."""
    yesterday = (date.fromisoformat(house.today()) - timedelta(days=1)).isoformat()
    filled = [word.replace("ENV", idle).replace("YESTERDAY", yesterday) for word in arguments]
    done = house.ssmd(*filled, check=code)
    assert words.replace("YESTERDAY", yesterday) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def idle(house: House) -> str:
    """An environment in which no day is ever started."""
    house.add("idle", endpoint="ws://127.0.0.1:9/ws", rest_endpoint="http://127.0.0.1:9/x", auth_method="none", keys={})
    house.up("idle")
    return "idle"


def test_an_exchange_that_cannot_be_reached_fails_the_day_with_the_step(house: House, env_name: str) -> None:
    """Exit code 7 with the address; the day is FAILED at the step that needed the exchange."""
    port = free_port()
    house.add(
        env_name,
        endpoint=f"ws://127.0.0.1:{port}/ws",
        rest_endpoint=f"http://127.0.0.1:{port}/trade-api/v2",
        auth_method="none",
        keys={},
    )
    house.up(env_name)
    done = house.ssmd("day", "start", env_name, check=7)
    assert f"127.0.0.1:{port}" in done.stderr
    found = _last_event(house, env_name)
    assert (found["state"], found["step"]) == ("FAILED", "secmaster")
    with plain_exchange([b'{"type":"trade","sid":1,"seq":1,"msg":{}}']) as exchange:
        house.add(env_name, **exchange.settings())
        house.ssmd("day", "start", env_name)
        house.ssmd("day", "end", env_name)
    assert _last_event(house, env_name)["state"] == "COMPLETE"


@pytest.mark.parametrize("server", ["transport", "cache"])
def test_a_server_that_cannot_be_reached_is_named(house: House, env_name: str, server: str) -> None:
    """Without NATS or Redis nothing is started; the error names the address and ends with exit code 7."""
    port = free_port()
    remote = {"transport": {"type": "nats", "url": f"nats://127.0.0.1:{port}"}}
    if server == "cache":
        remote = {"cache": {"type": "redis", "url": f"redis://127.0.0.1:{port}/0"}}
    house.add(
        env_name,
        endpoint="ws://127.0.0.1:9/ws",
        rest_endpoint="http://127.0.0.1:9/x",
        keys={},
        auth_method="none",
        **remote,
    )
    house.up(env_name)
    done = house.ssmd("day", "start", env_name, check=7)
    assert f"127.0.0.1:{port}" in done.stderr


def test_a_refused_key_is_a_matter_of_configuration_and_is_not_tried_again(house: House, env_name: str) -> None:
    """401 at the handshake: exit code 8, the day FAILED, and no storm of handshakes."""
    with plain_exchange([]) as exchange:
        exchange.status = 401
        house.add(env_name, **exchange.settings())
        house.up(env_name)
        house.ssmd("day", "start", env_name, check=8)
        assert exchange.handshakes == 1
    found = _last_event(house, env_name)
    assert (found["state"], found["step"]) == ("FAILED", "connector")


@pytest.mark.long
def test_a_wrong_key_of_the_simulated_exchange_is_refused(house: House, simulated: str) -> None:
    """A key id that the exchange does not know ends with exit code 8 and is never printed."""
    slug = simulated.upper().replace("-", "_")
    wrong = {f"{slug}_KEY_ID": "11111111-2222-3333-4444-555555555555"}
    done = house.ssmd("day", "start", simulated, check=8, **wrong)
    assert wrong[f"{slug}_KEY_ID"] not in done.stdout + done.stderr
    assert _last_event(house, simulated)["state"] == "FAILED"
    house.ssmd("day", "start", simulated)
    house.ssmd("day", "end", simulated)


def test_a_missing_secret_is_named_before_anything_starts(house: House, env_name: str) -> None:
    """Without its credentials an environment starts nothing and says which variable is missing."""
    house.add(env_name, endpoint="ws://127.0.0.1:9/ws", rest_endpoint="http://127.0.0.1:9/x")
    house.up(env_name)
    done = house.ssmd("day", "start", env_name, check=8)
    assert f"{env_name.upper().replace('-', '_')}_KEY_ID" in done.stderr


@pytest.mark.long
def test_a_day_that_is_being_started_is_refused_and_taken_over_once_its_starter_is_dead(
    house: House, env_name: str
) -> None:
    """A second start names who is at it (exit 5); after SIGKILL the next start takes the day under a new epoch."""
    house.add(env_name, simulator={"seed": 7, "markets": 40, "rate_per_second": 400}, lease_ttl_s=8)
    house.up(env_name)
    simulated = env_name
    first = house.spawn("day", "start", simulated)
    try:
        until(lambda: house.ssmd("day", "status", simulated, check=None).stdout.count("STARTING"))
        os.kill(first.pid, signal.SIGSTOP)
        refused = house.ssmd("day", "start", simulated, check=5)
        assert "is being worked on by cli:" in refused.stderr
        assert "cli:" in house.ssmd("day", "end", simulated, check=5).stderr
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    before = house.day(simulated, house.today())
    tried: list[subprocess.CompletedProcess[str]] = []

    def taken_over() -> bool:
        tried.append(house.ssmd("day", "start", simulated, check=None))
        assert tried[-1].returncode in (0, 5), tried[-1].stderr  # 5 while the dead starter's lease lives
        return tried[-1].returncode == 0

    until(taken_over)
    assert "nobody is at work on it" in tried[-1].stderr
    day = house.day(simulated, house.today())
    assert day["state"] == "ACTIVE"
    assert day["epoch"] > before["epoch"]
    house.ssmd("day", "end", simulated, check=None)
    assert house.day(simulated, house.today())["state"] == "COMPLETE"


def test_an_object_that_is_already_there_is_never_overwritten(house: House, env_name: str) -> None:
    """A foreign object under a segment's name keeps its bytes; the day says so instead of replacing it."""
    with plain_exchange([b'{"type":"trade","sid":1,"seq":1,"msg":{}}']) as exchange:
        house.add(env_name, **exchange.settings())
        house.up(env_name)
        folder = house.home / "objects" / f"raw-{env_name}" / "kalshi" / house.today().replace("-", "/")
        folder.mkdir(parents=True)
        foreign = folder / "trades-00.jsonl.zst"
        foreign.write_bytes(b"somebody else's")
        done = house.ssmd("day", "start", env_name, check=None)
        assert done.returncode != 0
        assert "trades-00" in done.stderr + str(house.day(env_name, house.today())["error"])
        assert foreign.read_bytes() == b"somebody else's"
        foreign.unlink()
        house.ssmd("day", "start", env_name)
        house.ssmd("day", "end", env_name)


@pytest.mark.long
def test_a_spoilt_archive_keeps_the_day_from_being_complete(house: House, simulated: str) -> None:
    """A flipped bit in a stored segment: exit code 6, the segment is named, and the day is FAILED until it is mended."""
    house.ssmd("day", "start", simulated)
    until(lambda: house.day(simulated, house.today())["messages"] > 200)
    house.ssmd("day", "end", simulated)
    folder = Path(house.day(simulated, house.today())["archive"])
    segment = next(folder.glob("orderbook-*.zst"))
    kept = segment.read_bytes()
    house.ssmd("day", "start", simulated)
    spoilt = bytearray(kept)
    spoilt[len(spoilt) // 3] ^= 1
    segment.chmod(0o600)
    segment.write_bytes(spoilt)
    done = house.ssmd("day", "end", simulated, check=6)
    assert segment.name in done.stderr
    assert _last_event(house, simulated) == {
        "state": "FAILED",
        "step": "verify",
        "error": _last_event(house, simulated)["error"],
    }
    segment.write_bytes(kept)
    house.ssmd("day", "end", simulated, check=3)  # the pause between the two revisions is a gap
    assert house.day(simulated, house.today())["state"] == "COMPLETE"
    shutil.rmtree(folder)
