"""What a scenario is, and how one is run and reported. The scenarios themselves are in the modules `rows_*`."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ssmd_dagster_tests.faults.stage import Stage
from ssmd_dagster_tests.faults.verdict import write_report

Run = Callable[[Stage], None]


class SkippedError(Exception):
    """This machine cannot bring the fault about; the text says why."""


@dataclass(frozen=True)
class Scenario:
    """One fault of one row of the matrix. `started`: the day is ACTIVE when it begins. `ends`: it is ended afterwards."""

    row: str
    name: str
    fault: str
    expected: str
    run: Run
    quick: bool = False
    started: bool = True
    ends: bool = True
    needs: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Return the name under which it is reported."""
        return f"{self.row}-{self.name}"


SCENARIOS: list[Scenario] = []


def scenario(
    row: str,
    fault: str,
    expected: str,
    *,
    quick: bool = False,
    started: bool = True,
    ends: bool = True,
    **needs: Any,
) -> Callable[[Run], Run]:
    """Register a function as a scenario; `needs` are settings of its stage and its environment."""

    def register(run: Run) -> Run:
        name = run.__name__.replace("_", "-")
        SCENARIOS.append(Scenario(row, name, fault, expected, run, quick, started, ends, needs))
        return run

    return register


def perform(chosen: Scenario, seed: int, folder: Path, reports: Path) -> dict[str, Any]:
    """Run a scenario with a seed, write `{reports}/{scenario}-{seed}/fault_report.json`, and return the report.

    Whatever fails is raised again, once it is in the report.
    """
    began = time.monotonic()
    report: dict[str, Any] = {
        "row": chosen.row,
        "scenario": chosen.id,
        "fault": chosen.fault,
        "expected": chosen.expected,
        "seed": seed,
        "result": "red",
        "error": None,
    }
    stage: Stage | None = None
    try:
        folder.mkdir()
        with Stage(folder, seed, chosen.needs) as stage:
            if chosen.started:
                stage.start()
            chosen.run(stage)
            if chosen.ends:
                stage.end()
            if stage.dates:
                stage.judge()
        report["result"] = "green"
    except SkippedError as error:
        report |= {"result": "skipped", "error": str(error)}
        raise
    except BaseException as error:
        report["error"] = "".join(traceback.format_exception_only(error)).strip()[:2000]
        raise
    finally:
        if stage is not None:
            report |= {
                "checks": msgspec.to_builtins(stage.verdict),
                "rto_s": stage.rto_s,
                "detect_s": stage.detect_s,
                "notes": stage.notes,
            }
        report["took_s"] = round(time.monotonic() - began, 1)
        target = reports / f"{chosen.id}-{seed}"
        shutil.rmtree(target, ignore_errors=True)
        write_report(target / "fault_report.json", report)
        logs = folder / "home" / "logs"
        if report["result"] == "red" and logs.is_dir():
            shutil.copytree(logs, target / "logs")
    return report
