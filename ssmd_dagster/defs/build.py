"""All definitions of the code location, made from what `exchanges/` configures. Nothing is computed at import."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import dagster as dg

from ssmd_dagster.defs.jobs import faults_job, jobs_of
from ssmd_dagster.defs.schedules import schedules_of
from ssmd_dagster.environments.loader import Registry

_log = logging.getLogger(__name__)


def build_definitions(registry: Registry, resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """Return the jobs and schedules of every usable environment.

    An environment with a broken file is left out, without the others. Its faults are logged, and listed by a job
    `broken_configuration`, which is there only then. `resource_overrides` take the place of the jobs' resources, by key
    (`desk`).
    """
    jobs: list[dg.JobDefinition] = []
    schedules: list[dg.ScheduleDefinition] = []
    for environment in registry.environments.values():
        of_environment = jobs_of(environment, resource_overrides or {})
        jobs += of_environment.values()
        schedules += schedules_of(environment, of_environment)
    if registry.faults:
        for fault in registry.faults:
            _log.error("broken configuration: %s", fault)
        jobs.append(faults_job(registry))
    return dg.Definitions(jobs=jobs, schedules=schedules)
