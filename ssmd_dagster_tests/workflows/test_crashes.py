"""Processes killed while a day runs: the day goes on, and what is missing is what no socket of ours was up for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.judge import judge


def _messages(house: House, env: str) -> int:
    return int(house.day(env, house.today())["messages"])


def pid_of(house: House, program: str, group: str) -> int | None:
    """Return the process that the supervisor of this house runs under that name."""
    for process in psutil.process_iter():
        try:
            words, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if (
            variables.get("SSMD_HOME") == str(house.home)
            and variables.get("SSMD_GROUP") == group
            and program in " ".join(words)
        ):
            return int(process.pid)
    return None


def _kill(house: House, program: str, group: str) -> None:
    """SIGKILL a process and wait until its supervisor has put another one into its place."""
    pid = until(lambda: pid_of(house, program, group))
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid_of(house, program, group) not in (None, pid))


@pytest.fixture
def running(house: House, simulated: str) -> Iterator[str]:
    """An environment whose day is ACTIVE and has recorded something."""
    house.ssmd("day", "start", simulated)
    until(lambda: _messages(house, simulated) > 500)
    yield simulated
    house.ssmd("day", "end", simulated, "--force", check=None)


def _end(house: House, env: str) -> dict[str, Any]:
    done = house.ssmd("day", "end", env, check=None)
    assert done.returncode in (0, 3), done.stderr  # 3: a gap stays
    return house.day(env, house.today())


def test_an_undisturbed_day_holds_every_frame_that_was_sent(house: House, running: str) -> None:
    """Against the exchange's own log nothing is lost, nothing is invented and nothing is there twice."""
    day = _end(house, running)
    verdict = judge(house.home / "simulator" / running / "truth", Path(day["archive"]))
    assert verdict.archived > 500
    assert (verdict.phantom, verdict.duplicated) == (0, 0)
    # What the exchange sent after the connector had said goodbye reached nobody.
    last_ns = max(frame.send_ns for frame in verdict.lost) if verdict.lost else 0
    assert all(last_ns - frame.send_ns < 1_000_000_000 for frame in verdict.lost)
    assert len(verdict.lost) < 300


def test_a_killed_connector_costs_only_the_declared_gap(house: House, running: str) -> None:
    """After SIGKILL the supervisor's next connector records on; the gap's interval holds every frame that is missing."""
    _kill(house, "capture.connector", f"{running}-{house.today()}")
    before = _messages(house, running)
    until(lambda: _messages(house, running) > before + 500)
    day = _end(house, running)
    assert [gap["cause"] for gap in day["gaps"]] == ["process_crash"]
    gap = day["gaps"][0]
    verdict = judge(house.home / "simulator" / running / "truth", Path(day["archive"]))
    assert (verdict.phantom, verdict.duplicated) == (0, 0)
    end_ns = max(frame.send_ns for frame in verdict.lost) if verdict.lost else 0
    undeclared = [
        frame
        for frame in verdict.lost
        if not gap["from_ns"] - 5_000_000 <= frame.send_ns <= gap["to_ns"] and end_ns - frame.send_ns > 1_000_000_000
    ]
    assert undeclared == []


@pytest.mark.parametrize("program", ["capture.archiver", pytest.param("capture.gateway", marks=pytest.mark.long)])
def test_a_killed_archiver_or_gateway_costs_nothing(house: House, running: str, program: str) -> None:
    """The next one takes up where the store's segments end; no gap, and the ledger balances."""
    group = f"{running}-{house.today()}" if program.endswith("archiver") else running
    _kill(house, program, group)
    day = _end(house, running)
    assert (day["state"], day["gaps"]) == ("COMPLETE", [])
    verdict = judge(house.home / "simulator" / running / "truth", Path(day["archive"]))
    assert (verdict.phantom, verdict.duplicated) == (0, 0)


def test_killed_servers_cost_nothing(house: House, running: str) -> None:
    """NATS and Redis killed in turn: the spool takes everything meanwhile, the stream catches up, the ledger balances."""
    for program in ("nats-server", "valkey-server"):
        _kill(house, program, "stack")
    until(lambda: house.ssmd("day", "status", running, check=None).returncode == 0)
    before = until(lambda: _messages(house, running))
    until(lambda: _messages(house, running) > before + 300, timeout_s=60)
    day = _end(house, running)
    assert (day["state"], day["gaps"]) == ("COMPLETE", [])
    verdict = judge(house.home / "simulator" / running / "truth", Path(day["archive"]))
    assert (verdict.phantom, verdict.duplicated) == (0, 0)
