"""Launching a verb as a run of Dagster's, through the webserver's GraphQL, and watching it. Does not import dagster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from ssmd_dagster.errors import SsmdError, UnreachableError

POLL_S = 0.5
REQUEST_TIMEOUT_S = 15.0
LOCATION = "ssmd_dagster"

_LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on PythonError { message }
  ... on PipelineNotFoundError { message }
  ... on InvalidSubsetError { message }
  ... on UnauthorizedError { message } } }"""

_WATCH = """query($id: ID!) { runOrError(runId: $id) { __typename
  ... on Run { status stepStats { stepKey status } }
  ... on RunNotFoundError { message }
  ... on PythonError { message } } }"""

_ENDED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})


class DagsterRuns:
    """The runs of one webserver, `http://127.0.0.1:PORT`."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def launch(self, job: str, partition: str) -> str:
        """Launch a job for a partition and return the run's id."""
        params = {
            "selector": {"repositoryLocationName": LOCATION, "repositoryName": "__repository__", "jobName": job},
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": partition}]},
        }
        answer = (await self._ask(_LAUNCH, {"params": params}))["launchRun"]
        if answer["__typename"] != "LaunchRunSuccess":
            raise SsmdError(
                f"Dagster does not launch {job}: {answer.get('message', answer['__typename'])}", where=self._url
            )
        return str(answer["run"]["runId"])

    async def wait(self, run_id: str, timeout_s: float, on_step: Callable[[str, str], None]) -> None:
        """Wait for a run to succeed, telling `on_step(step, status)` of every change; raise `SsmdError` where it does not."""
        deadline = time.monotonic() + timeout_s
        told: dict[str, str] = {}
        while True:
            run = (await self._ask(_WATCH, {"id": run_id}))["runOrError"]
            if run["__typename"] != "Run":
                raise SsmdError(f"Dagster knows no run {run_id}: {run.get('message', '')}", where=self._url)
            for step in run["stepStats"]:
                if step["status"] and told.get(step["stepKey"]) != step["status"]:
                    told[step["stepKey"]] = step["status"]
                    on_step(step["stepKey"], step["status"])
            if run["status"] in _ENDED:
                if run["status"] != "SUCCESS":
                    raise SsmdError(f"run {run_id} ended as {run['status']}", where=f"{self._url}/runs/{run_id}")
                return
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"run {run_id} is still {run['status']} after {timeout_s:.0f} s", where=f"{self._url}/runs/{run_id}"
                )
            await asyncio.sleep(POLL_S)

    async def _ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(f"{self._url}/graphql", json={"query": query, "variables": variables}) as response,
            ):
                body: dict[str, Any] = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(
                f"Dagster's webserver does not answer: {error}", where=self._url, do="Run `ssmd up`."
            ) from error
        if body.get("errors"):
            raise SsmdError(f"Dagster refuses the question: {body['errors'][0]['message']}", where=self._url)
        data: dict[str, Any] = body["data"]
        return data
