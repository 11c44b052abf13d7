"""Runs whose process is gone are failed; those that live, are new, or are nobody's environment's, are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from ssmd_dagster.defs.code_server import wait_until_gone
from ssmd_dagster.defs.lost import GRACE_S, fail_lost_runs
from ssmd_dagster.environments.home import runs_dir

HOLDER = """import sys, pathlib
from ssmd_dagster.defs.code_server import wait_until_gone
from ssmd_dagster.defs.lost import hold
hold(pathlib.Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@dg.op
def nothing() -> None:
    """Do nothing."""


@dg.job
def idle() -> None:
    """Do nothing either."""
    nothing()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance with storage of its own."""
    with dg.instance_for_test() as made:
        yield made


def begun(instance: dg.DagsterInstance, *, ago_s: float, environment: str | None = "kalshi-sim") -> dg.DagsterRun:
    """Return a run that Dagster counts as running since a while."""
    tags = {"dagster/partition": "2026-11-10", **({} if environment is None else {"ssmd/environment": environment})}
    run = instance.create_run_for_job(idle, tags=tags)
    event = dg.DagsterEvent(event_type_value="PIPELINE_START", job_name="idle")
    instance.report_dagster_event(event, run.run_id, timestamp=time.time() - ago_s)
    return run


def status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    """Return a run's status by now."""
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


def test_a_run_is_failed_once_its_process_is_gone_and_not_before(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    """A live process keeps its run, SIGKILL gives it up; the file goes with it, and a later look finds nothing to do."""
    run = begun(instance, ago_s=GRACE_S + 1)
    command = [sys.executable, "-c", HOLDER, str(tmp_path), run.run_id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        file = runs_dir(tmp_path) / run.run_id
        os.utime(file, (0, 0))
        assert fail_lost_runs(instance, tmp_path) == []
        assert status(instance, run) is dg.DagsterRunStatus.STARTED
        process.kill()
    (said,) = fail_lost_runs(instance, tmp_path)
    assert said == f"the process of idle 2026-11-10 (run {run.run_id[:8]}) is gone"
    assert status(instance, run) is dg.DagsterRunStatus.FAILURE
    assert not file.exists()
    assert fail_lost_runs(instance, tmp_path) == []


def test_new_runs_and_those_of_no_environment_are_left_alone(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    """A run that has just begun has not locked its file yet; a run without an environment locks none."""
    runs = [begun(instance, ago_s=1), begun(instance, ago_s=GRACE_S + 1, environment=None)]
    assert fail_lost_runs(instance, tmp_path) == []
    assert {status(instance, run) for run in runs} == {dg.DagsterRunStatus.STARTED}


@pytest.mark.parametrize(
    ("looks", "taken"),
    [
        ([False, False, True, True, False, False, True], 6),  # killed
        ([False, False, False, False], 4),  # not yet started
        ([True, False, True, False], 4),  # seen badly
    ],
)
def test_a_code_server_ends_once_its_child_is_gone(looks: list[bool], taken: int) -> None:
    """One that has not been there yet is waited for, and one look in vain is none."""
    left = iter(looks)
    wait_until_gone(left)
    assert len(list(left)) == len(looks) - taken
