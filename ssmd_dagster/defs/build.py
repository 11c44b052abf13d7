"""All definitions of the code location, made from what `exchanges/` configures. Nothing is computed at import."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import dagster as dg

from ssmd_dagster.defs.assets import assets_of
from ssmd_dagster.defs.checks import checks_definition_of
from ssmd_dagster.defs.jobs import faults_job, jobs_of
from ssmd_dagster.defs.schedules import schedules_of
from ssmd_dagster.defs.sensors import broken_sensor, sensors_of
from ssmd_dagster.defs.watch import Watch
from ssmd_dagster.environments.home import ssmd_home
from ssmd_dagster.environments.loader import Registry
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.workflows.alerts import LogTarget, Target

_log = logging.getLogger(__name__)


def build_definitions(
    registry: Registry, resource_overrides: Mapping[str, Any] | None = None, watch: Watch | None = None
) -> dg.Definitions:
    """Return jobs, schedules, sensors, assets and checks of every usable environment.

    An environment with a broken file is left out, without the others. Its faults are logged, and shown by a sensor
    `…_configuration` that fails with them and by a job `broken_configuration`, which are there only then.
    `resource_overrides` take the place of the jobs' resources, by key (`desk`); `watch` is how sensors look (default: one of
    their own).
    """
    watch = watch or Watch()
    jobs: dict[str, dict[str, dg.JobDefinition]] = {}
    schedules: list[dg.ScheduleDefinition] = []
    assets: list[dg.AssetSpec] = []
    checks: list[dg.AssetChecksDefinition] = []
    for name, environment in registry.environments.items():
        jobs[name] = jobs_of(environment, resource_overrides or {})
        schedules += schedules_of(environment, jobs[name], watch)
        assets += assets_of(environment)
        checks.append(checks_definition_of(environment, watch))
    targets = {name: targets_of(environment) for name, environment in registry.environments.items()}
    sensors = sensors_of(registry.environments, jobs, watch, targets)
    every_job = [job for of_environment in jobs.values() for job in of_environment.values()]
    if registry.faults:
        for fault in registry.faults:
            _log.error("broken configuration: %s", fault)
        every_job.append(faults_job(registry))
    for name, faults in registry.broken.items():
        slug = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
        sensors.append(broken_sensor(slug, "\n".join(f"- {fault}" for fault in faults)))
    return dg.Definitions(jobs=every_job, schedules=schedules, sensors=sensors, assets=assets, asset_checks=checks)


def targets_of(environment: Environment) -> list[Target]:
    """Return where the messages of an environment go: the log, and Slack where it is configured."""
    targets: list[Target] = [LogTarget()]
    if (slack := environment.alerts.slack) is not None:
        try:
            from ssmd_dagster.defs.slack import SlackTarget
        except ModuleNotFoundError as error:  # the other environments have their jobs all the same
            _log.error("%s: nothing is sent to Slack: %s; pip install 'ssmd-dagster[slack]'", environment.name, error)
            return targets

        targets.append(
            SlackTarget(slack.channel, lambda: environment.secret("slack", "token", load_secrets(ssmd_home())))
        )
    return targets
