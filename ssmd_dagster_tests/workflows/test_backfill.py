"""The loop over days, without a server: what is tried again, and what is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ConfigurationError, SsmdError, UnreachableError
from ssmd_dagster.workflows import backfill as module
from ssmd_dagster.workflows.backfill import TRY_AGAIN_S, DayResult, Tally, backfill
from ssmd_dagster.workflows.desk import Progress
from ssmd_dagster.workflows.lease import held_by

DATES = ("2026-02-01", "2026-02-02", "2026-02-03")


def finished(date: str) -> Any:
    """A day that is COMPLETE and sealed."""
    ledger = {"trades": {"exchange": 5}}
    reasons = ("replayed source", "3 trades are missing") if date == DATES[1] else ("replayed source",)
    return SimpleNamespace(
        date=date,
        condition="degraded",
        condition_reasons=reasons,
        gaps=(),
        ledger=ledger,
        state=DayState.COMPLETE,
        is_unsealed=False,
    )


async def run(
    monkeypatch: pytest.MonkeyPatch, troubles: dict[str, list[SsmdError]], complete: dict[str, Any] | None = None
) -> tuple[list[DayResult], list[str]]:
    """Backfill three days of which some fail first; return the results and what was told."""
    told: list[str] = []

    @asynccontextmanager
    async def desk(*_: Any) -> AsyncIterator[Any]:
        async def day(_date: str) -> None:
            return None

        async def refresh() -> Any:
            return SimpleNamespace(days=complete or {})

        yield SimpleNamespace(book=SimpleNamespace(day=day, refresh=refresh))

    async def replayed(_desk: Any, date: str, **_: Any) -> Any:
        if troubles.get(date):
            raise troubles[date].pop(0)
        return finished(date)

    def report(progress: Progress) -> None:
        told.append(progress.title)

    monkeypatch.setattr(module, "open_desk", desk)
    monkeypatch.setattr(module, "replay_day", replayed)
    monkeypatch.setattr(module, "TRY_AGAIN_S", (0.0, 0.0))

    def on_day(result: DayResult, tally: Tally) -> None:
        left = "" if tally.left_s is None else f", {tally.left_s / tally.since_s:g} times as long to go"
        told.append(f"{result.date} is number {tally.done}{left}")

    found = await backfill(cast("Any", None), "cli:test", DATES, parallel=1, reason=None, report=report, on_day=on_day)
    return found, told


async def test_a_day_whose_server_was_away_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NATS that is restarted meanwhile costs no day; the operator is told what is waited for."""
    found, told = await run(monkeypatch, {DATES[1]: [UnreachableError("no answer"), UnreachableError("no answer")]})
    assert [(one.date, one.outcome, one.trades) for one in found] == [(date, "replayed", 5) for date in DATES]
    assert told[1:3] == ["no answer; trying again in 0 s"] * 2


async def test_a_day_that_a_killed_backfill_was_at_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease outlives it by some seconds: the same command, given at once, goes on with all days."""
    held = held_by(
        cast("Any", SimpleNamespace(env="sim", setting=load_setting("kalshi-sim"))), DATES[0], "cli:killed#1"
    )
    found, told = await run(monkeypatch, {DATES[0]: [held]})
    assert [one.outcome for one in found] == ["replayed"] * 3
    assert f"trading day {DATES[0]} is being worked on by cli:killed" in told[0]
    assert sum(TRY_AGAIN_S) > load_setting("kalshi-sim").env.lease_ttl_s


async def test_what_does_not_pass_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused key fails its day at once, a server that stays away in the end; the others are replayed."""
    away: list[SsmdError] = [UnreachableError("no answer") for _ in range(3)]
    found, told = await run(monkeypatch, {DATES[0]: [ConfigurationError("refused")], DATES[2]: away})
    assert [(one.outcome, one.exit_code) for one in found] == [("failed", 8), ("replayed", 0), ("failed", 7)]
    assert len([line for line in told if "trying again" in line]) == 2
    assert "as long to go" not in told[0]  # a failure says nothing of how long a day takes


async def test_complete_days_are_told_first_and_do_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Days that take no time say nothing of how long the others will: of two days to replay, one is half."""
    found, told = await run(monkeypatch, {}, {DATES[1]: finished(DATES[1])})
    assert [one.outcome for one in found] == ["replayed", "complete already", "replayed"]
    assert told == [
        f"{DATES[1]} is number 1",
        f"{DATES[0]} is number 2, 1 times as long to go",
        f"{DATES[2]} is number 3, 0 times as long to go",
    ]


async def test_a_complete_day_that_has_nothing_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced end left it `missing`; the range brings it back like one that was never recorded."""
    empty = finished(DATES[1])
    empty.condition = "missing"
    found, _ = await run(monkeypatch, {}, {DATES[1]: empty})
    assert [one.outcome for one in found] == ["replayed", "replayed", "replayed"]


async def test_what_no_replay_brings_back_stands_against_no_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replayed day is degraded by it; what else there is makes the exit code of the whole."""
    results, _ = await run(monkeypatch, {})
    assert [result.against for result in results] == [(), ("3 trades are missing",), ()]
