"""The files of a production install: in step with the project's own, and with what they start."""

from __future__ import annotations

import configparser
import importlib.util
import os
import shlex
import subprocess
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.config import dagster_instance_config_schema

from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.environments.loader import load_registry

DEPLOY = project_dir() / "deploy"


def loaded(name: str) -> dict[str, Any]:
    """Return a YAML file of the project."""
    content: dict[str, Any] = yaml.safe_load((project_dir() / name).read_text())
    return content


def test_production_differs_from_a_desk_in_its_storage_only() -> None:
    """`deploy/dagster.yaml` is the project's instance on Postgres, and Dagster accepts both."""
    production, desk = loaded("deploy/dagster.yaml"), loaded("dagster.yaml")
    assert production.pop("storage") == {"postgres": {"postgres_url": {"env": "SSMD_DAGSTER_POSTGRES_URL"}}}
    assert production == desk
    assert process_config(resolve_to_config_type(dagster_instance_config_schema()), desk).success


def test_units_and_containers_start_the_same_programs() -> None:
    """Code server, daemon, webserver and the capture's supervisor, on the port that the workspace names, on loopback."""
    (server,) = loaded("deploy/workspace.yaml")["load_from"]
    assert server["grpc_server"] == {"host": "127.0.0.1", "port": 4000, "location_name": "ssmd_dagster"}
    units = {path.stem: path.read_text() for path in (DEPLOY / "systemd").glob("*.service")}
    services = loaded("deploy/compose.yaml")["services"]
    assert units.keys() == {"ssmd-capture", "ssmd-code", "ssmd-daemon", "ssmd-webserver"}
    assert services.keys() == {"base", "capture", "code", "daemon", "webserver", "postgres"}
    for name, words in (
        ("capture", ["ssmd", "up", "--no-dagster"]),
        ("code", ["ssmd_dagster.defs.code_server", "start", "127.0.0.1", "4000", "ssmd_dagster.definitions"]),
        ("daemon", ["dagster._daemon", "run"]),
        ("webserver", ["dagster_webserver"]),
    ):
        assert all(word in units[f"ssmd-{name}"] for word in words)
        assert all(word in services[name]["command"] for word in words)
    assert "-h 127.0.0.1" in units["ssmd-webserver"]
    assert services["base"]["ports"] == ["127.0.0.1:3000:3001"]


def test_what_the_units_name_is_there() -> None:
    """Programs, modules, files of the checkout, other units: an install that follows the documents finds each."""
    units = {path.name for path in (DEPLOY / "systemd").glob("*.service")} | {
        "network-online.target",
        "postgresql.service",
    }
    for path in (DEPLOY / "systemd").glob("*.service"):
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read(path)
        service = unit["Service"]
        assert service["EnvironmentFile"] == "/etc/ssmd/ssmd.env"
        assert service["WorkingDirectory"] == "/opt/ssmd"
        assert set(unit["Unit"]["After"].split(" ")) <= units
        _check_command([word.removeprefix("/opt/ssmd/") for word in shlex.split(service["ExecStart"])])


def test_what_the_containers_name_is_there() -> None:
    """Commands, mounted files, networks and healthchecks; only one container publishes a port, on loopback."""
    compose = loaded("deploy/compose.yaml")
    services = compose["services"]
    for name, service in services.items():
        if name != "postgres":
            assert (service["image"] == "ssmd-dagster") == (name != "base")
            _check_command(service["command"])
        for shared in ("network_mode", "pid"):
            assert service.get(shared, "service:base") == "service:base"
        assert set(service.get("depends_on", {})) <= services.keys()
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            assert source in compose["volumes"] or source == "./secrets" or (DEPLOY / source).exists(), volume
            assert target.startswith(("/var/lib/ssmd", "/etc/ssmd", "/var/lib/postgresql/data"))
        assert ("ports" in service) == (name == "base")
    assert services["webserver"]["command"][5:7] == ["-p", "3001"]
    assert ":3001/server_info" in services["webserver"]["healthcheck"]["test"][-1]
    assert services["code"]["healthcheck"]["test"][-1] == "4000"
    unit = (DEPLOY / "ssmd-compose.service").read_text()
    assert "WorkingDirectory=/opt/ssmd\n" in unit
    assert unit.count(" -f deploy/compose.yaml ") == 2
    build = services["code"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()


def test_the_variables_of_a_production_install_are_those_that_are_read() -> None:
    """Every name of the examples is one of the project's or of Dagster's; those of keys stand where a change of one is seen."""
    names, secrets = _names("ssmd.env.example"), _names("secrets.env.example")
    assert {"SSMD_HOME", "SSMD_EXCHANGES", "DAGSTER_HOME", "SSMD_DAGSTER_POSTGRES_URL"} <= names
    keys = {
        variable
        for environment in load_registry(project_dir() / "exchanges").environments.values()
        for key in environment.keys.values()
        for variable in key.fields.values()
    }
    assert secrets <= keys
    assert not names & keys
    compose = loaded("deploy/compose.yaml")["services"]["capture"]["environment"]
    assert compose.keys() <= names


@pytest.mark.parametrize(("asked", "meant"), [("", "kalshi-prod"), ("kalshi-demo", "kalshi-demo")])
def test_the_command_line_of_a_host_acts_for_its_caller(tmp_path: Path, asked: str, meant: str) -> None:
    """It has the units' settings but the caller's SSMD_ENV, name, folder and words; sudo lets none of them through."""
    settings, program, sudo = tmp_path / "ssmd.env", tmp_path / "ssmd", tmp_path / "sudo"
    settings.write_text("SSMD_ENV=kalshi-prod\nSSMD_URL='a&b;$c d'\n")
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$SSMD_ENV" "$LOGNAME" "$SSMD_URL" "$(pwd)" "$@"\n')
    sudo.write_text('#!/bin/sh\n[ "$1 $2" = "-u ssmd" ] && shift 2 && exec env -i PATH="$PATH" LOGNAME=ssmd "$@"\n')
    text = (DEPLOY / "ssmd").read_text()
    for path, known in ((settings, "/etc/ssmd/ssmd.env"), (program, "/opt/ssmd/.venv/bin/ssmd")):
        assert text.count(known) == 1
        text = text.replace(known, str(path))
        path.chmod(0o755)
    sudo.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", text, "ssmd", "day", "end", "a b"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SUDO_USER": "ada", "SSMD_ENV": asked},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout.splitlines() == [meant, "ada", "a&b;$c d", str(tmp_path), "day", "end", "a b"]


def test_old_syncs_are_forgotten_and_nothing_else_is(tmp_path: Path) -> None:
    """Runs of other jobs, newer ones and those under way stay; what goes takes its logs along."""
    spec = importlib.util.spec_from_file_location("prune_runs", DEPLOY / "prune_runs.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    over, under_way = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.STARTED
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        for job, status in (("a_sync_markets", over), ("a_sync_markets", under_way), ("a_end_day", over)):
            run = instance.create_run_for_job(dg.GraphDefinition(job).to_job(name=job), status=status)
            (tmp_path / "storage" / run.run_id / "compute_logs").mkdir(parents=True)
        now = datetime.now(UTC)
        assert script.prune(instance, now - timedelta(days=1)) == 0
        assert script.prune(instance, now + timedelta(days=1)) == 1
        left = {(run.job_name, run.status): run.run_id for run in instance.get_runs()}
        assert left.keys() == {("a_sync_markets", under_way), ("a_end_day", over)}
        logs = {path.parent.name for path in (tmp_path / "storage").glob("*/compute_logs")}
        assert logs == set(left.values())


def _names(example: str) -> set[str]:
    lines = (DEPLOY / example).read_text().splitlines()
    return {line.partition("=")[0] for line in lines if line and not line.startswith("#")}


def _check_command(words: Sequence[str]) -> None:
    """See that a command's program, module and workspace exist."""
    program = Path(words[0]).name
    if program == "python":
        assert words[1] == "-m"
        assert importlib.util.find_spec(words[2]) is not None
    else:
        scripts = tomllib.loads((project_dir() / "pyproject.toml").read_text())["project"]["scripts"]
        assert program in {*scripts, "sleep"}
    if "-w" in words:
        assert (project_dir() / words[words.index("-w") + 1]).exists()
    if "ssmd_dagster.definitions" in words:
        assert words[words.index("ssmd_dagster.definitions") - 1] == "-m"
