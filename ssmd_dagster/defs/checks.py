"""An environment's asset checks: the claims of `day/checks`, evaluated when a day is verified, and again on demand.

The journal sensor reports them for the day that was verified; "Execute" in the UI evaluates the latest COMPLETE day anew.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` with its own class.

from collections.abc import Iterator
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from typing import Any

import dagster as dg

from ssmd_dagster.day.checks import CHECKS, DESCRIPTIONS, Check, checks_of
from ssmd_dagster.day.events import Book, TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.defs.assets import key_of
from ssmd_dagster.defs.watch import Watch
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import NotFoundError
from ssmd_dagster.workflows.desk import Desk


def evaluations(environment: Environment, day: TradingDay) -> list[dg.AssetCheckEvaluation]:
    """Return all checks of a day as Dagster stores them."""
    planned = environment.calendar().window(Date.fromisoformat(day.date))
    return [
        dg.AssetCheckEvaluation(
            asset_key=key_of(environment, check.asset),
            check_name=check.name,
            passed=check.passed,
            severity=_severity(check),
            description=f"{day.date}: {check.text}",
            metadata=_metadata(environment, day, check),
            # No `partition`: Dagster refuses a second evaluation of one day outside of a run (a unique index on asset, check,
            # run and partition), and a day is evaluated whenever it is verified. The description names the day.
        )
        for check in checks_of(day, planned)
    ]


def checks_definition_of(environment: Environment, watch: Watch) -> dg.AssetChecksDefinition:
    """Return the checks of an environment, to be executed by hand for its latest COMPLETE day."""
    specs = [
        dg.AssetCheckSpec(name, asset=key_of(environment, asset), description=DESCRIPTIONS[name])
        for name, asset in CHECKS.items()
    ]

    @dg.multi_asset_check(name=f"{environment.slug}_checks", specs=specs, can_subset=True)
    def check(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        """Read the journal and evaluate what was asked for."""
        found = watch.look([environment.name], _book, actor="dagster:checks")[environment.name]
        if found.error is not None or found.value is None:
            raise dg.Failure(description=str(found.error), allow_retries=False)
        day = latest_complete(found.value, environment.name)
        planned = environment.calendar().window(Date.fromisoformat(day.date))
        wanted = {key.name for key in context.selected_asset_check_keys}
        for answer in checks_of(day, planned):
            if answer.name in wanted:
                yield dg.AssetCheckResult(
                    asset_key=key_of(environment, answer.asset),
                    check_name=answer.name,
                    passed=answer.passed,
                    severity=_severity(answer),
                    description=f"{day.date}: {answer.text}",
                    metadata=_metadata(environment, day, answer),
                )

    return check


def latest_complete(book: Book, env: str) -> TradingDay:
    """Return the latest COMPLETE day; raise `NotFoundError` where there is none."""
    complete = [day for day in book.days.values() if day.state is DayState.COMPLETE]
    if not complete:
        raise NotFoundError("no day is COMPLETE yet", where=env, do=f"See `ssmd day history {env}`")
    return max(complete, key=lambda day: day.date)


async def _book(desk: Desk) -> Book:
    return await desk.book.refresh()


def _severity(check: Check) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN


def _metadata(environment: Environment, day: TradingDay, check: Check) -> dict[str, dg.MetadataValue[Any]]:
    return {
        "day": dg.MetadataValue.text(day.date),
        "examined": dg.MetadataValue.int(check.examined),
        "command": dg.MetadataValue.text(f"ssmd day show {environment.name} {day.date}"),
    }
