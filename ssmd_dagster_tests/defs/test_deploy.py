"""The files of a production install: in step with the project's own, and with what they start."""

from __future__ import annotations

from typing import Any

import yaml
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.config import dagster_instance_config_schema

from ssmd_dagster.environments.home import project_dir

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
    assert services.keys() == {"capture", "code", "daemon", "webserver", "postgres"}
    for name, words in (
        ("capture", ["ssmd", "up", "--no-dagster"]),
        ("code", ["code-server", "start", "127.0.0.1", "4000", "ssmd_dagster.definitions"]),
        ("daemon", ["dagster._daemon", "run"]),
        ("webserver", ["dagster_webserver"]),
    ):
        assert all(word in units[f"ssmd-{name}"] for word in words)
        assert all(word in services[name]["command"] for word in words)
    assert "-h 127.0.0.1" in units["ssmd-webserver"]
    assert services["capture"]["ports"] == ["127.0.0.1:3000:3001"]
