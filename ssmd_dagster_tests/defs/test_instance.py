"""Dagster as `ssmd up` runs it: webserver, daemon and code server with the project's own `dagster.yaml`.

One instance and one environment for all tests of this module, so each begins where the one before it left the day.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from ssmd_dagster.environments.home import segments_dir
from ssmd_dagster_tests.house import House, until

ENV = "live"
ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
RUN_TIMEOUT_S = 60.0
LOCATION = {"repositoryLocationName": "ssmd_dagster", "repositoryName": "__repository__"}

LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RETRY = """mutation($params: ReexecutionParams!) { launchRunReexecution(reexecutionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
TERMINATE = """mutation($id: String!) { terminateRun(runId: $id) { __typename ... on PythonError { message } } }"""
RUN = """query($id: ID!) { runOrError(runId: $id) { ... on Run {
  status startTime endTime stepStats { stepKey status } } } }"""
PARTITIONS = """query($name: String!, $selector: RepositorySelector!) {
  partitionSetOrError(partitionSetName: $name, repositorySelector: $selector) { ... on PartitionSet {
    partitionStatusesOrError { ... on PartitionStatuses { results { partitionName runStatus } } } } } }"""
LOGS = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
  ... on LogMessageEvent { message } } } } }"""


class Instance:
    """The webserver of a house, asked as the UI asks it."""

    def __init__(self, house: House) -> None:
        self.house = house
        self._url = json.loads((house.home / "stack.json").read_text())["dagster"]

    def ask(self, query: str, **variables: Any) -> Any:
        """Return the data of a GraphQL answer's only field."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self._url}/graphql", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        (value,) = answer["data"].values()
        return value

    def launch(self, verb: str) -> str:
        """Launch a verb for today's partition and return the run's id."""
        params = {
            "selector": {**LOCATION, "jobName": f"{ENV}_{verb}_day"},
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": self.house.today()}]},
        }
        return str(self.ask(LAUNCH, params=params)["run"]["runId"])

    def run(self, run_id: str) -> dict[str, Any]:
        """Return a run's status, times and steps."""
        found: dict[str, Any] = self.ask(RUN, id=run_id)
        return found

    def step(self, run_id: str, step: str) -> str | None:
        """Return the status of one step, None before it has begun."""
        return next((entry["status"] for entry in self.run(run_id)["stepStats"] if entry["stepKey"] == step), None)

    def end_of(self, run_id: str) -> dict[str, Any]:
        """Wait for the end of a run."""
        until(lambda: self.run(run_id)["status"] in ENDED, RUN_TIMEOUT_S)
        return self.run(run_id)


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
    """Two runs of one lane go one after the other; the Partitions tab knows of both; the day is COMPLETE."""
    house = dagster_instance.house
    first, second = dagster_instance.launch("start"), dagster_instance.launch("end")
    started, ended = dagster_instance.end_of(first), dagster_instance.end_of(second)
    assert (started["status"], ended["status"]) == ("SUCCESS", "SUCCESS")
    assert ended["startTime"] >= started["endTime"]
    assert house.day(ENV, house.today())["state"] == "COMPLETE"
    for verb in ("start", "end"):
        name = f"{ENV}_{verb}_day_partition_set"
        statuses = dagster_instance.ask(PARTITIONS, name=name, selector=LOCATION)["partitionStatusesOrError"]["results"]
        assert statuses[-1] == {"partitionName": house.today(), "runStatus": "SUCCESS"}
