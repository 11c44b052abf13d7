"""Verbs and processes killed at every named point: the next recover finishes what they began, and nothing runs twice."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from ssmd_dagster.workflows.end import END
from ssmd_dagster.workflows.recover import RECOVER
from ssmd_dagster.workflows.start import START
from ssmd_dagster_tests.house import House, until
from ssmd_dagster_tests.judge import judge
from ssmd_dagster_tests.workflows.test_crashes import pid_of


def points(verb: str, steps: list[str]) -> list[str]:
    """Return every named point of a verb."""
    return [f"{verb}.{step}.{when}" for step in ("take", *steps, "finish") for when in ("before", "after")]


START_POINTS = points("start", [step.name for step in START.steps])
END_POINTS = points("end", [step.name for step in END.steps])
RECOVER_POINTS = points("recover", [step.name for step in RECOVER.steps])
QUICK = {"start.connector.after"}


def _choose(all_points: list[str]) -> list[object]:
    return [point if point in QUICK else pytest.param(point, marks=pytest.mark.long) for point in all_points]


def _recover(house: House, *words: str) -> str:
    """Recover once the dead actor's lease has run out; until then it is refused, since nobody can tell it from a slow one."""
    done = until(lambda: (tried := house.ssmd("day", "recover", *words, check=None)).returncode != 5 and tried)
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: COMPLETE, and a gap stays
    return str(done.stdout)


def _killed(house: House, *words: str, at: str) -> None:
    done = house.ssmd(*words, check=None, SSMD_CRASH_AT=at)
    assert done.returncode == -signal.SIGKILL, f"{at} was not reached\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("point", _choose(START_POINTS))
def test_a_start_killed_at_any_point_is_finished_by_recover(house: House, simulated: str, point: str) -> None:
    """SIGKILL in the middle of start; once the lease is gone, recover brings the day to ACTIVE, and it ends COMPLETE."""
    _killed(house, "day", "start", simulated, at=point)
    if point == "start.take.before":  # nothing was journaled
        until(lambda: house.ssmd("day", "start", simulated, check=None).returncode == 0)
    else:
        assert f"Trading day {house.today()} is ACTIVE" in _recover(house, simulated, "--date", house.today())
    house.ssmd("day", "end", simulated, check=None)
    assert house.day(simulated, house.today())["state"] == "COMPLETE"


@pytest.mark.parametrize("point", _choose(END_POINTS))
def test_an_end_killed_at_any_point_is_finished_by_recover(house: House, simulated: str, point: str) -> None:
    """SIGKILL in the middle of end; recover goes on to COMPLETE, sealed, with every frame in the archive once."""
    house.ssmd("day", "start", simulated)
    until(lambda: house.day(simulated, house.today())["messages"] > 300)
    _killed(house, "day", "end", simulated, at=point)
    if point == "end.take.before":
        until(lambda: house.ssmd("day", "end", simulated, check=None).returncode in (0, 3))
    else:
        _recover(house, simulated)
    day = house.day(simulated, house.today())
    assert day["state"] == "COMPLETE"
    assert (Path(day["archive"]) / "manifest.json").exists()
    verdict = judge(house.home / "simulator" / simulated / "truth", Path(day["archive"]))
    assert (verdict.phantom, verdict.duplicated) == (0, 0)


@pytest.mark.long
@pytest.mark.parametrize("verb", ["roll", "recover"])
@pytest.mark.parametrize("point", ["start.finish.after", *END_POINTS[1:-1]])
def test_a_roll_killed_after_the_new_day_took_over_is_gone_on_with(
    house: House, simulated: str, point: str, verb: str
) -> None:
    """The old day is ended where the new one opened, which records on: no third day is begun."""
    house.ssmd("day", "start", simulated)
    first = house.json("day", "status", simulated)["date"]
    until(lambda: house.day(simulated, first)["messages"] > 300)
    _killed(house, "day", "roll", simulated, at=point)
    seen = house.json("day", "status", simulated)
    second = seen["date"]
    assert second > first
    if seen["behind"] is not None:  # from its completion on only the seal is missing
        assert seen["behind"]["date"] == first
        until(lambda: house.ssmd("day", verb, simulated, check=None).returncode == 0)
    else:
        until(lambda: house.ssmd("day", "end", simulated, "--date", first, check=None).returncode == 0)
    states = {date: house.day(simulated, date)["state"] for date in (first, second)}
    assert states == {first: "COMPLETE", second: "ACTIVE"}
    assert [row.split()[0] for row in house.ssmd("day", "history", simulated).stdout.splitlines()[1:]] == [
        second,
        first,
    ]
    until(lambda: house.day(simulated, second)["messages"] > 300)
    house.ssmd("day", "end", simulated)
    folders = [Path(house.day(simulated, date)["archive"]) for date in (first, second)]
    windows = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert windows[0]["close_ns"] == windows[1]["open_ns"]


@pytest.mark.parametrize(
    "point", _choose(RECOVER_POINTS)[:1] + [pytest.param(p, marks=pytest.mark.long) for p in RECOVER_POINTS[1:]]
)
def test_a_recovery_killed_at_any_point_is_finished_by_the_next_one(house: House, simulated: str, point: str) -> None:
    """A day whose processes are gone, a recovery that is killed, and the next one that succeeds."""
    house.ssmd("day", "start", simulated)
    until(lambda: house.day(simulated, house.today())["messages"] > 300)
    group = f"{simulated}-{house.today()}"
    supervisord = pid_of(house, "supervisor.supervisord", "supervisor")
    assert supervisord is not None
    os.kill(supervisord, signal.SIGKILL)
    for program in ("capture.connector", "capture.archiver"):
        pid = pid_of(house, program, group)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    until(lambda: house.ssmd("day", "status", simulated, check=None).stdout.count("State: ERROR"), timeout_s=40)
    house.up(simulated)
    _killed(house, "day", "recover", simulated, at=point)
    assert "is ACTIVE" in _recover(house, simulated)
    again = json.loads(house.ssmd("day", "recover", simulated, "--json").stdout)
    assert (again["state"], again["already"]) == ("ACTIVE", True)
    house.ssmd("day", "end", simulated, check=3)
    day = house.day(simulated, house.today())
    assert day["state"] == "COMPLETE"
    assert "process_crash" in {gap["cause"] for gap in day["gaps"]}
