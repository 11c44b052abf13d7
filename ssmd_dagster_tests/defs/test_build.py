"""What Dagster is given: names, tags and partitions of all definitions, and what a broken file does to them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import dagster as dg
import pytest
from syrupy.assertion import SnapshotAssertion

from ssmd_dagster.defs.build import build_definitions
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster_tests.environments.folders import changed, copied


def names(defs: dg.Definitions) -> dict[str, dict[str, list[str]]]:
    """Return jobs with their ops in order of execution, and schedules with their times."""
    repository = defs.get_repository_def()
    return {
        "jobs": {
            job.name: [f"{node}" for node in _ops(job)]
            for job in sorted(repository.get_all_jobs(), key=lambda job: job.name)
            if not job.name.startswith("__")  # Dagster's own, for executing checks
        },
        "sensors": {
            sensor.name: [str(sensor.minimum_interval_seconds)]
            for sensor in sorted(repository.sensor_defs, key=lambda sensor: sensor.name)
        },
        "assets": {
            key.to_user_string(): sorted(
                check.name for check in repository.asset_graph.get_check_keys_for_assets({key})
            )
            for key in sorted(repository.asset_graph.get_all_asset_keys())
        },
        "schedules": {
            schedule.name: [schedule.job_name, str(schedule.cron_schedule), str(schedule.execution_timezone)]
            for schedule in sorted(repository.schedule_defs, key=lambda schedule: schedule.name)
        },
    }


def _ops(job: dg.JobDefinition) -> list[str]:
    return [
        f"{outer.name}.{inner.name}" if isinstance(outer.definition, dg.GraphDefinition) else outer.name
        for outer in job.graph.nodes_in_topological_order
        for inner in (
            outer.definition.nodes_in_topological_order if isinstance(outer.definition, dg.GraphDefinition) else [outer]
        )
    ]


def test_no_definition_is_renamed_by_accident(snapshot: SnapshotAssertion, tmp_path: Path) -> None:
    """The names that operators, scripts and run history depend on are those of the snapshot."""
    assert names(build_definitions(load_registry(copied(tmp_path)))) == snapshot


def test_every_definition_loads(tmp_path: Path) -> None:
    """Dagster accepts the whole code location, and the module that it loads."""
    dg.Definitions.validate_loadable(build_definitions(load_registry(copied(tmp_path))))
    from ssmd_dagster.definitions import defs

    assert {"kalshi_sim_start_day", "kalshi_sim_end_day", "kalshi_sim_roll_day"} <= names(defs)["jobs"].keys()


def test_jobs_carry_their_lane_limits_and_partitions(tmp_path: Path) -> None:
    """Start and roll of an environment share one lane, which no end holds up; each has its run time."""
    folder = copied(tmp_path)
    changed(folder / "environments" / "kalshi-prod.yaml", {"schedule.timezone": "America/New_York"})
    defs = build_definitions(load_registry(folder))
    for verb, runtime_s, lane in (("start", 900, "live"), ("end", 43_200, "end"), ("roll", 43_200, "live")):
        job = defs.resolve_job_def(f"kalshi_prod_{verb}_day")
        assert job.tags == {
            "ssmd/environment": "kalshi-prod",
            "ssmd/lane": f"kalshi-prod/{lane}",
            "dagster/max_runtime": str(runtime_s),
            "dagster/partition_set": f"kalshi_prod_{verb}_day_partition_set",
        } | ({"dagster/priority": "1"} if verb == "roll" else {})
        assert job.executor_def.name == "in_process"
        days = job.partitions_def
        assert isinstance(days, dg.DailyPartitionsDefinition)
        assert (days.timezone, days.end_offset, days.get_first_partition_key()) == ("America/New_York", 1, "2025-12-01")
        assert job.description
    assert all(op.description for op in defs.resolve_job_def("kalshi_prod_start_day").graph.node_defs)


def test_a_job_works_for_its_own_environment_only(tmp_path: Path) -> None:
    """The launchpad shows the environment as configuration; another one there fails the run before anything is done."""
    job = build_definitions(load_registry(copied(tmp_path))).resolve_job_def("kalshi_sim_sync_markets")
    config = {"resources": {"desk": {"config": {"environment": "kalshi-prod"}}}}
    run = job.execute_in_process(run_config=config, partition_key="2026-01-02", raise_on_error=False)
    (failed,) = [event for event in run.all_events if event.event_type is dg.DagsterEventType.PIPELINE_FAILURE]
    assert "This is a job of kalshi-sim, but its configuration names kalshi-prod" in str(failed.event_specific_data)


def test_only_enabled_environments_have_schedules(tmp_path: Path) -> None:
    """`enabled` gives an environment its schedules, running; `auto_roll` decides whether a day is rolled or ended."""
    folder = copied(tmp_path)
    changed(folder / "environments" / "kalshi-demo.yaml", {"enabled": True, "schedule.auto_roll": False})
    schedules = build_definitions(load_registry(folder)).get_repository_def().schedule_defs
    assert {schedule.name for schedule in schedules} == {
        "kalshi_sim_start_day_schedule",
        "kalshi_sim_roll_day_schedule",
        "kalshi_sim_sync_markets_schedule",
        "kalshi_demo_sync_markets_schedule",
        "kalshi_demo_start_day_schedule",
        "kalshi_demo_end_day_schedule",
    }
    assert {schedule.default_status for schedule in schedules} == {dg.DefaultScheduleStatus.RUNNING}


def test_a_broken_file_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its faults are logged and stand in a job's description, whose run names those that are left."""
    folder = copied(tmp_path)
    monkeypatch.setenv("SSMD_EXCHANGES", str(folder))
    path = folder / "environments" / "kalshi-prod.yaml"
    good = path.read_text()
    changed(path, {"schedule.day_start": "25:10"})
    with caplog.at_level(logging.ERROR):
        defs = build_definitions(load_registry())
    jobs = names(defs)["jobs"]
    assert {"kalshi_sim_start_day", "kalshi_demo_start_day", "broken_configuration"} <= jobs.keys()
    assert not any(name.startswith("kalshi_prod") for name in jobs)
    assert {"journal", "kalshi_prod_configuration"} <= names(defs)["sensors"].keys()
    fault = "kalshi-prod.yaml: schedule.day_start: got '25:10'"
    assert fault in caplog.text
    job = defs.resolve_job_def("broken_configuration")
    assert fault in str(job.description)
    failed = job.execute_in_process(raise_on_error=False)
    assert not failed.success
    data = failed.failure_data_for_node("check_configuration")
    assert data is not None
    assert data.user_failure_data is not None
    assert fault in str(data.user_failure_data.description)
    assert data.user_failure_data.metadata["exit_code"].value == 8
    path.write_text(good)
    assert job.execute_in_process().success


def test_a_folder_without_environments_loads(tmp_path: Path) -> None:
    """A folder that is not there is a fault like any other; the code location loads and says so."""
    defs = build_definitions(load_registry(tmp_path / "nowhere"))
    dg.Definitions.validate_loadable(defs)
    assert names(defs) == {
        "jobs": {"broken_configuration": ["check_configuration"]},
        "sensors": {"journal": ["5"]},
        "assets": {},
        "schedules": {},
    }


def test_fifty_environments_load(tmp_path: Path) -> None:
    """The code location of fifty environments is built and valid."""
    folder = copied(tmp_path)
    text = (folder / "environments" / "kalshi-prod.yaml").read_text()
    for number in range(50):
        name = f"copy-{number}"
        (folder / "environments" / f"{name}.yaml").write_text(text)
        buckets = {"raw": f"raw-{number}", "normalized": f"normalized-{number}"}
        changed(folder / "environments" / f"{name}.yaml", {"name": name, "enabled": True, "storage.buckets": buckets})
    defs = build_definitions(load_registry(folder))
    dg.Definitions.validate_loadable(defs)
    assert len(names(defs)["jobs"]) == 53 * 7, json.dumps(names(defs)["jobs"])[:500]
