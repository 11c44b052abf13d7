"""All definitions of the code location, made from what `exchanges/` configures. Nothing is computed at import."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import dagster as dg

from ssmd_dagster.defs.jobs import jobs_of
from ssmd_dagster.defs.schedules import schedules_of
from ssmd_dagster.environments.loader import Registry

_log = logging.getLogger(__name__)


def build_definitions(registry: Registry, resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """Return the jobs and schedules of every usable environment.

    Environments with a broken file are left out: their faults are logged, and shown as the code location's metadata.
    `resource_overrides` take the place of the jobs' resources, by key (`desk`).
    """
    jobs: list[dg.JobDefinition] = []
    schedules: list[dg.ScheduleDefinition] = []
    for environment in registry.environments.values():
        of_environment = jobs_of(environment, resource_overrides or {})
        jobs += of_environment.values()
        schedules += schedules_of(environment, of_environment)
    for fault in registry.faults:
        _log.error("left out of Dagster: %s", fault)
    metadata: dict[str, dg.MetadataValue[Any]] = {
        "exchanges": dg.MetadataValue.path(str(registry.directory)),
        "environments": dg.MetadataValue.text(", ".join(registry.environments) or "none"),
    }
    if registry.faults:
        metadata["faults"] = dg.MetadataValue.md("\n".join(f"- {fault}" for fault in registry.faults))
    return dg.Definitions(jobs=jobs, schedules=schedules, metadata=metadata)
