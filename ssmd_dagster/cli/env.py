"""`ssmd env`: what is configured, and whether it is right. Nothing is started and no server is asked.

Rules and the texts of faults are the loader's; credentials are named, never printed.
"""

from __future__ import annotations

import json
from typing import Any

import click

from ssmd_dagster.environments.home import exchanges_dir, ssmd_home
from ssmd_dagster.environments.loader import Fault, Registry, broken_configuration, load_registry
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.errors import NotFoundError

_COLUMNS = (("NAME", 24), ("ENABLED", 9), ("FEED", 12), ("TIMEZONE", 18), ("START", 7), ("END", 7), ("STATUS", 0))

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("env")
def env_group() -> None:
    """Show and check the configured environments."""


@env_group.command("list")
@_json_option
def list_command(as_json: bool) -> None:
    """List all environments."""
    registry = load_registry()
    rows = [_summary(registry, name) for name in registry.names()]
    if as_json:
        _print_json({"environments": rows})
    else:
        click.echo(_line([title for title, _ in _COLUMNS]))
        for row in rows:
            cells = [row["name"], row["enabled"], row["feed"], row["timezone"], row["day_start"], row["day_end"]]
            status = f"{row['faults']} fault(s)" if row["faults"] else "ok"
            click.echo(_line([_cell(cell) for cell in cells] + [status]))
    if registry.faults:
        click.echo("Some files have faults; see: ssmd env validate", err=True)


@env_group.command("show")
@click.argument("name", metavar="[ENV]", envvar="SSMD_ENV", default="kalshi-sim")
@_json_option
def show_command(name: str, as_json: bool) -> None:
    """Show one environment as it is understood, and which credentials it needs."""
    registry = load_registry()
    environment = registry.get(name)
    secrets = load_secrets(ssmd_home())
    variables = [
        {"variable": variable, "credential": credential, "set": bool(secrets.get(variable))}
        for variable, credential in environment.secret_variables().items()
    ]
    plain: dict[str, Any] = environment.model_dump(mode="json", by_alias=True)
    shown = {
        **{key: value for key, value in plain.items() if key != "keys"},
        "feed_versions": [
            environment.feed_version(version.effective_from).model_dump(mode="json")
            for version in registry.feeds[environment.feed].versions
        ],
        "credentials": variables,
    }
    if as_json:
        _print_json(shown)
        return
    for key, value in _flattened(shown | {"credentials": None}):
        click.echo(f"{key}: {value}")
    for variable in variables:
        state = "set" if variable["set"] else "not set"
        click.echo(f"credentials.{variable['credential']}: {variable['variable']} ({state})")


@env_group.command("validate")
@click.argument("name", metavar="[ENV]", required=False)
@_json_option
def validate_command(name: str | None, as_json: bool) -> None:
    """Check all files, or those that one environment needs; one line per fault, exit code 8 if there is one."""
    registry = load_registry()
    faults = list(registry.faults) if name is None else _faults_of(registry, name)
    checked = registry.names() if name is None else [name]
    if as_json:
        _print_json(
            {
                "ok": not faults,
                "environments": checked,
                "faults": [
                    {"file": fault.file, "key": fault.key, "value": fault.value, "expected": fault.expected}
                    for fault in faults
                ],
            }
        )
    if faults:
        raise broken_configuration(faults, where=name or str(exchanges_dir()))
    if not as_json:
        click.echo(f"{len(checked)} environment{'' if len(checked) == 1 else 's'} ok: {', '.join(checked)}")


def _faults_of(registry: Registry, name: str) -> list[Fault]:
    if name not in registry.names():
        known = ", ".join(registry.names()) or "none"
        raise NotFoundError(f"there is no environment {name!r}", where=str(registry.directory), do=f"Known: {known}")
    return list(registry.broken.get(name, ()))


def _summary(registry: Registry, name: str) -> dict[str, Any]:
    environment = registry.environments.get(name)
    if environment is None:
        unknown = dict.fromkeys(("enabled", "feed", "schema", "timezone", "day_start", "day_end", "auto_roll"))
        return {"name": name, **unknown, "faults": len(registry.broken[name])}
    schedule = environment.schedule
    return {
        "name": name,
        "enabled": environment.enabled,
        "feed": environment.feed,
        "schema": environment.schema_ref,
        "timezone": schedule.timezone,
        "day_start": schedule.day_start,
        "day_end": schedule.day_end,
        "auto_roll": schedule.auto_roll,
        "faults": 0,
    }


def _flattened(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Return nested keys as dotted ones with printable values; what is not set is left out."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _flattened(inner, f"{key}.{name}" if key else name)]
    if value is None:
        return []
    return [(key, _cell(value))]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(cells: list[str]) -> str:
    # at least two spaces between columns, however long a name is
    return "".join(
        f"{cell:<{max(width, len(cell) + 2)}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    ).rstrip()


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
