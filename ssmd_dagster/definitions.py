"""Dagster's door: what `ssmd up` and `dagster dev` load. Nothing else belongs here."""

from __future__ import annotations

from ssmd_dagster.defs.build import build_definitions
from ssmd_dagster.environments.loader import load_registry

defs = build_definitions(load_registry())
