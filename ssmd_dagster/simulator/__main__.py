"""`python -m ssmd_dagster.simulator`."""

from __future__ import annotations

from ssmd_dagster.simulator.main import sim_command

sim_command()
