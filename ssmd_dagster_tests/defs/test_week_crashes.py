"""Runs that are killed at the steps of a roll and a recovery (row D2): the sensors bring the days to where they should be.

One day after the other, each killed at another point; the exchange's clock is led over each midnight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from ssmd_dagster.capture.programs import day_group
from ssmd_dagster.capture.supervisord import connect_supervisor
from ssmd_dagster.day.states import DayState
from ssmd_dagster_tests.defs.week import ENV, Week

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

_S = DayState


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Week]:
    """A house with everything in it, its first day ACTIVE."""
    made = Week(tmp_path_factory.mktemp("crashes"))
    try:
        made.up()
        made.begin()
        yield made
    finally:
        made.house.down()


def test_a_recovery_that_is_killed_is_done_again(week: Week) -> None:
    """The archiver is gone; the run that brings it back dies behind taking the day, and another one is asked for."""
    before = week.reaches(0, _S.ACTIVE).epoch
    week.crash_at("recover.connector.before")
    asyncio.run(connect_supervisor(week.house.home).stop(day_group(ENV, week.date(0)), "archiver"))
    week.wait(week.crashed, "the crash")
    week.wait(lambda: week.reaches(0, _S.ACTIVE).epoch != before, "a new epoch")
    week.records(0)


@pytest.mark.parametrize(
    ("number", "point"),
    [
        (0, "start.take.after"),
        (1, "start.health.after"),
        (2, "end.take.after"),
        (3, "end.stop.after"),
        (4, "end.record.after"),
    ],
)
def test_a_roll_that_is_killed_is_finished(week: Week, number: int, point: str) -> None:
    """Whichever step it dies at: the new day is ACTIVE, the old one COMPLETE, and nothing between them is lost."""
    week.records(number)
    week.crash_at(point)
    week.leap(number, "23:57:50")
    if point.startswith("end."):
        week.is_ready(number + 1)
        week.leap(number, "23:59:57")
    week.wait(week.crashed, "the crash")
    if point.startswith("start."):
        week.leap(number + 1, "00:12:30")
    week.reaches(number + 1, _S.ACTIVE)
    week.reaches(number, _S.COMPLETE)
    shown = {day["date"]: day for day in week.history()}
    assert shown[week.date(number)]["condition"] == ("degraded" if week.gaps(number) else "available")
    done = {date: day for date, day in shown.items() if day["state"] == "COMPLETE"}
    verdict = week.judged(done)
    assert verdict.faults() == {}, verdict.examples
    causes = {gap["cause"] for date, day in done.items() for gap in day["gaps"] if date != week.date(0)}
    assert causes == set(), "the old day records on while its roll is dead"
