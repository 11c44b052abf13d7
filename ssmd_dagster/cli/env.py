"""`ssmd env`: what is configured, whether it is right, and the switch that keeps schedules off an environment.

Rules and the texts of faults are the loader's; credentials are named, never printed. `list` and `show` ask the journal only
whether an environment is paused; servers that do not answer leave that unsaid.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import click

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.cli.desk import actor, env_argument, json_option, with_desk
from ssmd_dagster.cli.output import paused_text, plain_pause
from ssmd_dagster.day.events import Paused
from ssmd_dagster.environments.home import exchanges_dir, ssmd_home
from ssmd_dagster.environments.loader import Fault, Registry, broken_configuration, load_registry
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.errors import NotFoundError, SsmdError
from ssmd_dagster.workflows.desk import open_desk
from ssmd_dagster.workflows.pause import pause, resume

_COLUMNS = (("NAME", 24), ("ENABLED", 9), ("FEED", 12), ("TIMEZONE", 18), ("START", 7), ("END", 7), ("STATUS", 0))


@click.group("env")
def env_group() -> None:
    """Show and check the configured environments."""


@env_group.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List all environments."""
    registry = load_registry()
    enabled = [name for name, environment in registry.environments.items() if environment.enabled]
    paused = paused_of(enabled)
    rows = [{**_summary(registry, name), "paused": plain_pause(paused.get(name))} for name in registry.names()]
    if as_json:
        _print_json({"environments": rows})
    else:
        click.echo(_line([title for title, _ in _COLUMNS]))
        for row in rows:
            cells = [row["name"], row["enabled"], row["feed"], row["timezone"], row["day_start"], row["day_end"]]
            status = f"{row['faults']} fault(s)" if row["faults"] else _status(paused.get(row["name"]))
            click.echo(_line([_cell(cell) for cell in cells] + [status]))
    if registry.faults:
        click.echo("Some files have faults; see: ssmd env validate", err=True)


@env_group.command("show")
@env_argument
@json_option
def show_command(env: str, as_json: bool) -> None:
    """Show one environment as it is understood, and which credentials it needs."""
    registry = load_registry()
    environment = registry.get(env)
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
        "paused": plain_pause(paused_of([env]).get(env)),
    }
    if as_json:
        _print_json(shown)
        return
    for key, value in _flattened(shown | {"credentials": None}):
        click.echo(f"{key}: {value}")
    for variable in variables:
        state = "set" if variable["set"] else "not set"
        click.echo(f"credentials.{variable['credential']}: {variable['variable']} ({state})")


@env_group.command("pause")
@env_argument
@click.option("--reason", help="Why; kept in the journal.")
@json_option
def pause_command(env: str, reason: str | None, as_json: bool) -> None:
    """Keep schedules and sensors off an environment until it is resumed; what runs goes on, verbs by hand work."""
    result = with_desk(env, lambda desk: pause(desk, reason))
    if as_json:
        _print_json({"environment": env, "already": result.already, "paused": plain_pause(result.paused)})
    else:
        click.echo(f"{env} is {_status(result.paused)}{' already' if result.already else ''}")


@env_group.command("resume")
@env_argument
@click.option("--reason", help="Why; kept in the journal.")
@json_option
def resume_command(env: str, reason: str | None, as_json: bool) -> None:
    """Let schedules and sensors act on an environment again."""
    result = with_desk(env, lambda desk: resume(desk, reason))
    if as_json:
        _print_json({"environment": env, "already": result.already, "paused": None})
    else:
        click.echo(f"{env} is not paused" if result.already else f"{env} is resumed; it was {_status(result.paused)}")


@env_group.command("validate")
@click.argument("name", metavar="[ENV]", required=False)
@json_option
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


def paused_of(names: Sequence[str]) -> dict[str, Paused]:
    """Return who has paused which of some environments, as far as their servers answer."""

    async def one(name: str) -> Paused | None:
        try:
            async with open_desk(load_setting(name), actor()) as desk:
                return (await desk.book.refresh()).paused
        except SsmdError:
            return None

    async def every() -> list[Paused | None]:
        return await asyncio.gather(*(one(name) for name in names))

    return {name: found for name, found in zip(names, asyncio.run(every()), strict=True) if found is not None}


def _status(paused: Paused | None) -> str:
    return "ok" if paused is None else paused_text(paused)


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
