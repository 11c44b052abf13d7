"""Dagster's own processes and runs are killed, cancelled and reloaded; sensors alone bring the days to where they should be."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any

import psutil
import pytest

from ssmd_dagster.capture.programs import day_group
from ssmd_dagster.capture.supervisord import connect_supervisor
from ssmd_dagster.environments.home import segments_dir
from ssmd_dagster_tests.defs.dagster_instance import ENDED, ENV, LAUNCH, LOCATION, Instance
from ssmd_dagster_tests.house import House, until

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def dagster_instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A house with Dagster in it."""
    house = House.build(tmp_path_factory.mktemp("faults"))
    house.add(ENV, simulator={"seed": 7, "markets": 40, "rate_per_second": 200})
    try:
        house.ssmd("up", ENV, "--detach")
        yield Instance(house)
    finally:
        house.down()


def processes(house: House, word: str) -> list[psutil.Process]:
    """Return the house's processes with a word in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if word in " ".join(process.info["cmdline"] or []) and process.environ().get("SSMD_HOME") == str(
                house.home
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill(house: House, word: str) -> None:
    """Kill them without a word."""
    killed = processes(house, word)
    assert killed, word
    for process in killed:
        os.kill(process.pid, signal.SIGKILL)


def launched(instance: Instance, job: str, day: str) -> str:
    """Launch a job for a partition, and return the run's id."""
    params: dict[str, Any] = {
        "selector": {**LOCATION, "jobName": job},
        "runConfigData": {},
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": day}]},
    }
    return str(instance.ask(LAUNCH, params=params)["run"]["runId"])


def ended(instance: Instance, run_id: str) -> str:
    """Wait for the end of a run and return its status."""
    until(lambda: instance.run(run_id)["status"] in ENDED, PATIENCE_S)
    return str(instance.run(run_id)["status"])


def active(instance: Instance, day: str) -> bool:
    """Say whether the day is ACTIVE."""
    return bool(instance.house.day(ENV, day)["state"] == "ACTIVE")


def test_a_run_that_is_killed_in_its_start_is_done_again_by_the_sensors(dagster_instance: Instance) -> None:
    """SIGKILL of the run's worker in `archive` (D2): the day is told, and reconcile starts it, without anybody's help."""
    house, day = dagster_instance.house, dagster_instance.house.today()
    obstacle = segments_dir(house.home, ENV, day).parent
    obstacle.parent.mkdir(mode=0o700, exist_ok=True)
    obstacle.write_text("in the way")
    run_id = dagster_instance.launch("start")
    until(lambda: dagster_instance.step(run_id, "archive") == "IN_PROGRESS", PATIENCE_S)
    obstacle.unlink()
    kill(house, "multiprocessing.spawn")  # the run's worker, a child of the code server
    assert ended(dagster_instance, run_id) == "FAILURE"
    until(lambda: active(dagster_instance, day), PATIENCE_S)
    asked = dagster_instance.runs(dagster__sensor_name="reconcile")
    assert {run["jobName"] for run in asked} == {f"{ENV}_start_day"}


@pytest.mark.parametrize("word", ["dagster._daemon", "dagster_webserver", "code_server start", "api grpc"])
def test_dagsters_processes_come_back_and_the_capture_does_not_notice(dagster_instance: Instance, word: str) -> None:
    """Daemon, webserver, code server, its child: each is killed and comes back, the day stays ACTIVE in its epoch."""
    house, day = dagster_instance.house, dagster_instance.house.today()
    before = house.day(ENV, day)
    kill(house, word)
    until(lambda: processes(house, word), PATIENCE_S)

    def relaunched() -> str | None:
        try:
            return launched(dagster_instance, f"{ENV}_recover_day", day)
        except (OSError, AssertionError, KeyError):
            return None  # the webserver says 500 until it has found the new code server

    run_id = until(relaunched, PATIENCE_S)
    assert ended(dagster_instance, run_id) == "SUCCESS"
    after = house.day(ENV, day)
    assert (after["state"], after["epoch"]) == ("ACTIVE", before["epoch"])


def test_a_process_that_is_gone_is_brought_back_by_the_sensors(dagster_instance: Instance) -> None:
    """Stopped for good, the archiver is missed: the day is an ERROR with the cause, and recovered under a new epoch."""
    house, day = dagster_instance.house, dagster_instance.house.today()
    before = house.day(ENV, day)["epoch"]
    asyncio.run(connect_supervisor(house.home).stop(day_group(ENV, day), "archiver"))
    until(lambda: house.day(ENV, day)["epoch"] > before and active(dagster_instance, day), PATIENCE_S)
    assert dagster_instance.runs(dagster__sensor_name="health")[0]["jobName"] == f"{ENV}_recover_day"
    until(lambda: (day, "ACTIVE → ERROR") in dagster_instance.observed(ENV, "trading_day"), PATIENCE_S)


def test_a_reload_with_other_settings_leaves_the_running_day_alone(dagster_instance: Instance) -> None:
    """Code and configuration are loaded anew in the middle of a day (W3): the same processes record on."""
    house, day = dagster_instance.house, dagster_instance.house.today()
    before = {process.pid for process in processes(house, "ssmd_dagster.capture.")}
    house.add("another", enabled=False)
    assert dagster_instance.reload() == "LOADED"
    run_id = launched(dagster_instance, f"{ENV}_recover_day", day)
    assert ended(dagster_instance, run_id) == "SUCCESS"
    assert {process.pid for process in processes(house, "ssmd_dagster.capture.")} == before


def test_a_backfill_beside_a_running_day_does_not_touch_it(dagster_instance: Instance) -> None:
    """Two days are replayed while today is ACTIVE (D10): epoch and state of today stay, and the runs say what they did."""
    house, day = dagster_instance.house, dagster_instance.house.today()
    before = house.day(ENV, day)
    past = [(date.fromisoformat(day) - timedelta(days=back)).isoformat() for back in (2, 1)]
    runs = [launched(dagster_instance, f"{ENV}_replay_day", one) for one in past]
    assert [ended(dagster_instance, run_id) for run_id in runs] == ["SUCCESS", "SUCCESS"]
    after = house.day(ENV, day)
    assert (after["state"], after["epoch"]) == ("ACTIVE", before["epoch"])
    results = {run["id"]: run["tags"]["ssmd/result"] for run in dagster_instance.runs() if run["id"] in runs}
    assert all(results[run_id].startswith("COMPLETE, ") for run_id in runs)
    again = launched(dagster_instance, f"{ENV}_replay_day", past[0])
    assert ended(dagster_instance, again) == "SUCCESS"
    tags = next(run["tags"] for run in dagster_instance.runs() if run["id"] == again)
    assert tags["ssmd/result"].startswith("already COMPLETE, ")


def test_a_loss_after_completion_is_found_and_journaled(dagster_instance: Instance) -> None:
    """A segment disappears from the store (D11): the verify job fails, names it, and the day is judged anew."""
    house, day = dagster_instance.house, dagster_instance.house.today()
    past = (date.fromisoformat(day) - timedelta(days=1)).isoformat()
    folder = house.home / "objects" / f"raw-{ENV}" / "kalshi" / past.replace("-", "/")
    segment = min(folder.glob("rest-*.jsonl.zst"))
    kept = segment.read_bytes()
    segment.unlink()
    lost = launched(dagster_instance, f"{ENV}_verify_day", past)
    assert ended(dagster_instance, lost) == "FAILURE"
    shown = house.day(ENV, past)
    assert (shown["state"], shown["condition"]) == ("COMPLETE", "degraded")
    segment.write_bytes(kept)
    found = launched(dagster_instance, f"{ENV}_verify_day", past)
    assert ended(dagster_instance, found) == "SUCCESS"
