"""Dagster as `ssmd up` runs it, asked as its UI asks: for tests with real webserver, daemon and code server."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

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
JOBS = """query($selector: RepositorySelector!) { repositoryOrError(repositorySelector: $selector) {
  ... on Repository { jobs { name } } } }"""
SENSORS = """query($selector: RepositorySelector!) { sensorsOrError(repositorySelector: $selector) {
  ... on Sensors { results { name } } } }"""
RELOAD = """mutation($name: String!) { reloadRepositoryLocation(repositoryLocationName: $name) {
  __typename ... on WorkspaceLocationEntry { loadStatus } ... on PythonError { message } } }"""
RUNS = """query($filter: RunsFilter!) { runsOrError(filter: $filter, limit: 200) { ... on Runs { results {
  id jobName status tags { key value } } } } }"""
ASSET = """query($key: AssetKeyInput!) { assetOrError(assetKey: $key) { ... on Asset {
  assetMaterializations(limit: 100) { partition description } assetObservations(limit: 500) { partition description } } } }"""
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

    def jobs(self) -> set[str]:
        """Return the names of all jobs that Dagster has loaded."""
        found = self.ask(JOBS, selector=LOCATION)
        return {job["name"] for job in found["jobs"]}

    def sensors(self) -> set[str]:
        """Return the names of all sensors that Dagster has loaded."""
        return {sensor["name"] for sensor in self.ask(SENSORS, selector=LOCATION)["results"]}

    def reload(self) -> str:
        """Load the code location anew, as the UI's button does; return its status."""
        return str(self.ask(RELOAD, name="ssmd_dagster")["loadStatus"])

    def runs(self, **tags: str) -> list[dict[str, Any]]:
        """Return runs, newest first, with their tags."""
        wanted = {"tags": [{"key": key.replace("__", "/"), "value": value} for key, value in tags.items()]}
        found = self.ask(RUNS, filter=wanted)["results"]
        return [{**run, "tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found]

    def materialised(self, env: str, name: str) -> list[str]:
        """Return the days of an asset that are materialised, newest first."""
        node = self.ask(ASSET, key={"path": [env, name]})
        return [entry["partition"] for entry in node.get("assetMaterializations", [])]

    def observed(self, env: str, name: str) -> list[tuple[str, str]]:
        """Return day and description of an asset's observations, newest first."""
        node = self.ask(ASSET, key={"path": [env, name]})
        return [(entry["partition"], entry["description"]) for entry in node.get("assetObservations", [])]
