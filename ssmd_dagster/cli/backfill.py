"""`ssmd day backfill`: replay a range of days. Parsing and printing only; the work is in `workflows/backfill`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import msgspec

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.cli.desk import actor, env_argument, json_option
from ssmd_dagster.cli.output import duration, mark, message, print_json, thousands
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.errors import ExitCode
from ssmd_dagster.workflows.backfill import MAX_PARALLEL, DayResult, Tally, backfill, days_of
from ssmd_dagster.workflows.desk import Progress, open_desk

COLUMNS = (("DATE", 12), ("RESULT", 20), ("CONDITION", 11), ("TRADES", 13), ("TIME", 10), ("", 0))


@click.command("backfill")
@env_argument
@click.option("--from", "first", metavar="YYYY-MM-DD", required=True, help="First day of the range.")
@click.option("--to", "last", metavar="YYYY-MM-DD", required=True, help="Last day of the range, included.")
@click.option(
    "--parallel", type=click.IntRange(1, MAX_PARALLEL), default=1, show_default=True, help="Days side by side."
)
@click.option("--mode", type=click.Choice(["replay"]), default="replay", show_default=True, help="How days are built.")
@click.option("--reason", help="Why; kept in the journal.")
@json_option
def backfill_command(
    env: str, first: str, last: str, parallel: int, mode: str, reason: str | None, as_json: bool
) -> int:
    """Build missed days from the exchange's history, a range of them; days that are COMPLETE are skipped.

    Run it again after it was killed: it goes on where it was.
    """
    setting = load_setting(env)
    from_, to = parse_date(first).isoformat(), parse_date(last).isoformat()

    def on_day(result: DayResult, tally: Tally) -> None:
        if not as_json:
            click.echo(_line(result))
        if result.outcome == "complete already":
            return
        left = tally.left_s
        rate = f"{tally.trades / max(tally.since_s, 0.001):,.0f} trades/s"
        ahead = f", about {duration(round(left * 1e9))} left" if left is not None and tally.done < tally.days else ""
        message(f"{tally.done} of {tally.days} days, {rate}{ahead}")

    def report(progress: Progress) -> None:
        if progress.kind in ("note", "failed"):
            message(f"  {progress.date} {progress.title}{f': {progress.detail}' if progress.detail else ''}")

    async def body() -> list[DayResult]:
        async with open_desk(setting, actor(), report) as desk:
            dates = days_of(desk, from_, to)
        if not as_json:
            click.echo(_row([title for title, _ in COLUMNS]))
        return await backfill(setting, actor(), dates, parallel=parallel, reason=reason, report=report, on_day=on_day)

    results = asyncio.run(body())
    failed = [result for result in results if result.outcome == "failed"]
    if as_json:
        print_json({"environment": env, "days": [_to_json(result) for result in results]})
    else:
        replayed = [result for result in results if result.outcome == "replayed"]
        click.echo(
            f"{len(replayed)} days replayed with {thousands(sum(result.trades or 0 for result in replayed))} trades, "
            f"{len(results) - len(replayed) - len(failed)} were complete, {len(failed)} failed"
        )
    if failed:
        message(
            f"Failed: {', '.join(result.date for result in failed)}. Run the same command again once the cause is gone."
        )
        return int(ExitCode.FAILURE)
    lacking = [result for result in results if result.outcome == "replayed" and result.against]
    for result in lacking:
        message(f"{result.date} is {result.condition}: {'; '.join(result.against)}")
    return int(ExitCode.DEGRADED if lacking else ExitCode.OK)


def _to_json(result: DayResult) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(result)
    return {**built, "seconds": round(result.seconds, 3)}


def _line(result: DayResult) -> str:
    trades = "-" if result.trades is None else thousands(result.trades)
    took = duration(round(result.seconds * 1e9)) if result.outcome != "complete already" else "-"
    line = _row([result.date, f"? {result.outcome}", result.condition or "-", trades, took, result.error or ""])
    return line.replace("?", mark(result.outcome != "failed", sys.stdout), 1)


def _row(cells: list[str]) -> str:
    return "".join(cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip()
