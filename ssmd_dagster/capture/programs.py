"""Which programs the supervisor runs for a day and for an environment. Names only; starting them is the verbs' business."""

from __future__ import annotations

import sys

from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.supervisor import Program
from ssmd_dagster.environments.home import exchanges_dir
from ssmd_dagster.environments.models import Environment

ARCHIVER = "archiver"
LIVE = "live"
"""Stands for the date in the heartbeat of what outlives days: the gateway."""


def day_group(env: str, date: str) -> str:
    """Return the supervisor's group of one trading day."""
    return f"{env}-{date}"


def connector_names(env: Environment) -> tuple[str, ...]:
    """Return the components that record: one, or two with `connections: 2`."""
    return tuple(f"connector-{shard}" for shard in "ab"[: env.capture.connections])


def day_components(env: Environment) -> tuple[str, ...]:
    """Return every component that a running day must hear from."""
    return (*connector_names(env), ARCHIVER)


def day_programs(setting: Setting, date: str) -> list[Program]:
    """Return the programs of one trading day: its connectors and its archiver."""
    name = setting.env.name
    connectors = [
        _python(component, "connector", name, date, component.removeprefix("connector-"))
        for component in connector_names(setting.env)
    ]
    return [*connectors, _python(ARCHIVER, "archiver", name, date)]


def audit_program(setting: Setting, date: str) -> Program:
    """Return the program that audits a day's spool once."""
    return _python("audit", "audit", setting.env.name, date)


def gateway_program(setting: Setting) -> Program:
    """Return the program of an environment's gateway."""
    return _python("gateway", "gateway", setting.env.name)


def _python(name: str, module: str, *arguments: str) -> Program:
    return Program(
        name=name,
        command=(sys.executable, "-m", f"ssmd_dagster.capture.{module}", *arguments),
        # Always said, so that the program is the same whoever asks for it: another one would replace it.
        environment={"SSMD_EXCHANGES": str(exchanges_dir())},
    )
