"""Dagster as `ssmd up` runs it: webserver, daemon and code server with the project's own `dagster.yaml`.

One instance and one environment for all tests of this module, so each begins where the one before it left the day.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssmd_dagster.environments.home import segments_dir
from ssmd_dagster_tests.defs.dagster_instance import (
    ENV,
    LOCATION,
    LOGS,
    PARTITIONS,
    RETRY,
    RUN_TIMEOUT_S,
    TERMINATE,
    Instance,
)
from ssmd_dagster_tests.environments.folders import changed
from ssmd_dagster_tests.house import House, until


@pytest.fixture(scope="module")
def dagster_instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A house with Dagster in it."""
    house = House.build(tmp_path_factory.mktemp("instance"))
    house.add(ENV, simulator={"seed": 7, "markets": 40, "rate_per_second": 400})
    try:
        house.ssmd("up", ENV, "--detach")
        yield Instance(house)
    finally:
        house.down()


def test_a_cancelled_run_leaves_a_failed_day_that_a_re_execution_starts(dagster_instance: Instance) -> None:
    """Cancelled in `archive`, a run stops what it started, journals it and gives the lease back; then it is done again."""
    house = dagster_instance.house
    day = house.today()
    obstacle = segments_dir(house.home, ENV, day).parent
    obstacle.parent.mkdir(mode=0o700, exist_ok=True)
    obstacle.write_text("in the way")
    cancelled = dagster_instance.launch("start")
    until(lambda: dagster_instance.step(cancelled, "archive") == "IN_PROGRESS", RUN_TIMEOUT_S)
    assert dagster_instance.ask(TERMINATE, id=cancelled)["__typename"] == "TerminateRunSuccess"
    assert dagster_instance.end_of(cancelled)["status"] == "CANCELED"
    left = house.day(ENV, day)
    assert (left["state"], left["error"], left["failed_step"]) == ("FAILED", "interrupted during archiver", "archiver")
    events = [event.get("message", "") for event in dagster_instance.ask(LOGS, id=cancelled)["events"]]
    assert f"{day} Starting archiver failed: interrupted during archiver" in events
    obstacle.unlink()

    again = dagster_instance.ask(RETRY, params={"parentRunId": cancelled, "strategy": "FROM_FAILURE"})
    ended = dagster_instance.end_of(again["run"]["runId"])
    assert ended["status"] == "SUCCESS"
    assert {entry["stepKey"] for entry in ended["stepStats"]} == {"archive", "gateway", "health"}
    active = house.day(ENV, day)
    assert (active["state"], active["epoch"] > left["epoch"]) == ("ACTIVE", True)


def test_one_run_at_a_time_works_on_an_environment(dagster_instance: Instance) -> None:
    """Two runs of one lane go one after the other; the Partitions tab knows of all; the day is COMPLETE."""
    house = dagster_instance.house
    first, second = dagster_instance.launch("start"), dagster_instance.launch("start")
    started, again = dagster_instance.end_of(first), dagster_instance.end_of(second)
    assert (started["status"], again["status"]) == ("SUCCESS", "SUCCESS")
    assert again["startTime"] >= started["endTime"]
    assert dagster_instance.end_of(dagster_instance.launch("end"))["status"] == "SUCCESS"
    assert house.day(ENV, house.today())["state"] == "COMPLETE"
    for verb in ("start", "end"):
        name = f"{ENV}_{verb}_day_partition_set"
        statuses = dagster_instance.ask(PARTITIONS, name=name, selector=LOCATION)["partitionStatusesOrError"]["results"]
        assert statuses[-1] == {"partitionName": house.today(), "runStatus": "SUCCESS"}


def test_the_catalog_knows_what_the_runs_and_the_command_line_did(dagster_instance: Instance) -> None:
    """Seconds after a day is COMPLETE its partition is materialised, with every transition beside it."""
    house, day = dagster_instance.house, dagster_instance.house.today()
    until(lambda: day in dagster_instance.materialised(ENV, "trading_day"), RUN_TIMEOUT_S)
    until(lambda: (day, "ENDING → COMPLETE") in dagster_instance.observed(ENV, "trading_day"), RUN_TIMEOUT_S)
    assert day in dagster_instance.materialised(ENV, "raw")
    house.ssmd("env", "pause", ENV, "--reason", "a look")
    until(lambda: (day, "paused") in dagster_instance.observed(ENV, "trading_day"), RUN_TIMEOUT_S)
    house.ssmd("env", "resume", ENV)


def test_a_reload_brings_a_changed_file_in_and_a_broken_one_takes_nothing_else_away(dagster_instance: Instance) -> None:
    """A new environment is there after a reload; broken, it is shown by a sensor of its own, and the others stay."""
    house = dagster_instance.house
    assert "another_start_day" not in dagster_instance.jobs()
    house.add("another", enabled=False)
    assert dagster_instance.reload() == "LOADED"
    until(lambda: "another_start_day" in dagster_instance.jobs(), RUN_TIMEOUT_S)
    changed(house.exchanges / "environments" / "another.yaml", {"schedule.day_end": "24:00"})
    assert dagster_instance.reload() == "LOADED"
    until(lambda: "another_start_day" not in dagster_instance.jobs(), RUN_TIMEOUT_S)
    assert {"broken_configuration", f"{ENV}_start_day"} <= dagster_instance.jobs()
    assert {"another_configuration", "journal", "reconcile"} <= dagster_instance.sensors()
