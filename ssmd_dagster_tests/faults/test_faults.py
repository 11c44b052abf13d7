"""Every scenario of the fault matrix with its seeds: `make faults` runs all of them, the ordinary run a quick selection."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssmd_dagster_tests.faults import rows_archiver, rows_connector, rows_day, rows_nats
from ssmd_dagster_tests.faults.scenario import SCENARIOS, Scenario, SkippedError, perform

SEEDS = int(os.environ.get("SSMD_FAULT_SEEDS", "1"))
REPORTS = "SSMD_FAULT_REPORTS"
ROWS = (rows_nats, rows_archiver, rows_day, rows_connector)


def _cases() -> list[object]:
    return [
        pytest.param(
            chosen,
            seed,
            id=f"{chosen.id}-{seed}",
            marks=[] if chosen.quick and seed == 1 else [pytest.mark.long],
        )
        for chosen in SCENARIOS
        for seed in range(1, SEEDS + 1)
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("chosen", "seed"), _cases())
def test_what_breaks_costs_only_what_is_declared(chosen: Scenario, seed: int, tmp_path: Path) -> None:
    """Nothing is lost undeclared, invented, repeated or misfiled, and the day ends as the matrix says."""
    reports = Path(os.environ.get(REPORTS) or tmp_path / "reports")
    try:
        perform(chosen, seed, tmp_path / "stage", reports)
    except SkippedError as error:
        pytest.skip(str(error))


def test_every_row_that_this_part_of_the_matrix_names_has_a_scenario() -> None:
    """C1–C14, N1–N6, A1–A10, D1–D5, D8, D9, D11, D12 and W2."""
    wanted = {f"C{n}" for n in range(1, 15)} | {f"N{n}" for n in range(1, 7)} | {f"A{n}" for n in range(1, 11)}
    wanted |= {"D1", "D2", "D3", "D4", "D5", "D8", "D9", "D11", "D12", "W2"}
    assert {chosen.row for chosen in SCENARIOS} >= wanted
