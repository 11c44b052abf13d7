"""The files of a production install: in step with the project's own, and with what they start."""

from __future__ import annotations

import configparser
import importlib.util
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
            assert service["image"] == services["base"]["image"]
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
    build = services["base"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()


def test_the_variables_of_a_production_install_are_those_that_are_read() -> None:
    """Every name of the example is one of the project's, of Dagster's, or of an environment's keys."""
    names = {
        line.partition("=")[0]
        for line in (DEPLOY / "ssmd.env.example").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert {"SSMD_HOME", "SSMD_EXCHANGES", "DAGSTER_HOME", "SSMD_DAGSTER_POSTGRES_URL"} <= names
    keys = {
        variable
        for environment in load_registry(project_dir() / "exchanges").environments.values()
        for key in environment.keys.values()
        for variable in key.fields.values()
    }
    assert {name for name in names if name.startswith("KALSHI")} <= keys
    compose = loaded("deploy/compose.yaml")["services"]["capture"]["environment"]
    assert compose.keys() <= names


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
