"""Days that another day's recording held: who names them, and from which archives a day's tables are made."""

from __future__ import annotations

from datetime import date, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.reconcile import PAUSED_BY, RECORDED_WITH, Facts
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.workflows import pause as pausing
from ssmd_dagster.workflows import reconcile
from ssmd_dagster.workflows.normalize import _beside
from ssmd_dagster_tests.day.builders import ENV, Log

FRIDAY = date(2025, 12, 12)
DATES = [(FRIDAY + timedelta(days=days)).isoformat() for days in range(4)]
CALENDAR = TradingCalendar(timezone="UTC", day_start="00:10", day_end="00:00", auto_roll=True, first_day=FRIDAY)
HOUR_NS = 3_600_000_000_000
MONDAY_NINE = CALENDAR.open_ns(FRIDAY + timedelta(days=3)) + 9 * HOUR_NS


class Journal:
    """A desk whose journal is in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, recording: bool = True) -> None:
        self.log = Log()
        self.now_ns = MONDAY_NINE
        for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED):
            self.add(DATES[0], event, CALENDAR.open_ns(FRIDAY))

        async def facts(_desk: object) -> Facts:
            return Facts(recording=frozenset(DATES[:1]) if recording else frozenset())

        async def nothing(_desk: object) -> None:
            return None

        monkeypatch.setattr(reconcile, "facts", facts)
        monkeypatch.setattr(pausing, "facts", facts)
        monkeypatch.setattr(pausing, "create_streams", nothing)
        self.desk: Any = SimpleNamespace(
            env=ENV,
            calendar=CALENDAR,
            book=self,
            setting=SimpleNamespace(clock=lambda: self.now_ns),
            today=lambda: CALENDAR.date_at(self.now_ns).isoformat(),
            window=self.window,
        )

    def add(self, day: str, event: EventName, at_ns: int, **fields: Any) -> None:
        """Journal an event."""
        self.log.add(event, date=day, at_ns=at_ns, **fields)

    @property
    def book(self) -> Any:
        """Return what is journaled."""
        return self.log.book

    async def refresh(self) -> Any:
        """Return what is journaled."""
        return self.log.book

    async def append(self, day: str, event: EventName, *, data: Any = None, **fields: Any) -> TradingDay:
        """Journal an event through the same gate as the real one."""
        self.add(day, event, self.now_ns, data=msgspec.to_builtins(data) if data is not None else {}, **fields)
        return self.log.day(day)

    async def append_for_environment(self, day: str, event: EventName, *, reason: str | None) -> Any:
        """Journal an event of the environment."""
        self.add(day, event, self.now_ns, reason=reason)
        return self.log.book

    def window(self, day: TradingDay) -> Window:
        """Return the calendar's window."""
        return CALENDAR.window(date.fromisoformat(day.date))

    def named(self) -> dict[str, str | None]:
        """Return the recorders of Saturday and Sunday."""
        return {day: one.recorded_with for day, one in self.log.book.days.items() if day in DATES[1:3]}


async def test_whoever_ends_a_recording_names_the_days_it_has_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it by hand, before reconcile has looked: a day that failed to start among them, today not."""
    journal = Journal(monkeypatch)
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.START_FAILED):
        journal.add(DATES[1], event, CALENDAR.open_ns(FRIDAY + timedelta(days=1)))
    await reconcile.name_recorder(journal.desk, journal.log.day(DATES[0]))
    assert journal.named() == {DATES[1]: DATES[0], DATES[2]: DATES[0]}
    assert DATES[3] not in journal.log.book.days
    assert journal.log.day(DATES[1]).error == f"{RECORDED_WITH} {DATES[0]}"


async def test_what_cannot_be_seen_to_run_has_held_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was off over the weekend: the journal alone still says ACTIVE."""
    journal = Journal(monkeypatch, recording=False)
    await reconcile.name_recorder(journal.desk, journal.log.day(DATES[0]))
    assert journal.named() == {}


@pytest.mark.parametrize("recording", [True, False])
async def test_a_pause_over_whole_days_does_not_hide_what_recorded_on(
    monkeypatch: pytest.MonkeyPatch, recording: bool
) -> None:
    """What runs goes on under a pause, so its days are named after it; where nothing ran, after the pause."""
    journal = Journal(monkeypatch, recording=recording)
    journal.now_ns = CALENDAR.open_ns(FRIDAY) + 12 * HOUR_NS
    await pausing.pause(journal.desk, "a move")
    journal.now_ns = MONDAY_NINE
    await pausing.resume(journal.desk, None)
    assert journal.named() == dict.fromkeys(DATES[1:3], DATES[0] if recording else None)
    begins = RECORDED_WITH if recording else PAUSED_BY
    assert all(str(journal.log.day(day).error).startswith(begins) for day in DATES[1:3])


async def test_tables_are_made_of_what_recorded_on_over_days_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Monday's first hours lie in Friday's raw files, whatever was journaled of Saturday and Sunday."""
    journal = Journal(monkeypatch)
    for day in DATES[1:3]:
        journal.add(day, EventName.DEFINED, MONDAY_NINE)
        journal.add(day, EventName.MISSED, MONDAY_NINE, reason="nobody started it")
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED):
        journal.add(DATES[3], event, MONDAY_NINE)
    journal.add(DATES[0], EventName.END_REQUESTED, MONDAY_NINE)
    (before,) = _beside(journal.desk, journal.log.day(DATES[3]))
    assert (before.day.date, before.edge, before.recorded_on) == (DATES[0], None, True)
    assert journal.log.day(DATES[0]).state is DayState.ENDING


async def test_a_day_far_before_that_ended_in_time_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window does not meet this one's; the next day's does."""
    journal = Journal(monkeypatch)
    journal.add(DATES[0], EventName.END_REQUESTED, CALENDAR.close_ns(FRIDAY) + 3_000_000_000)
    for day in (DATES[1], DATES[3]):
        for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED):
            journal.add(day, event, MONDAY_NINE, data={"mode": "replay"} if event is EventName.START_REQUESTED else {})
    assert [one.day.date for one in _beside(journal.desk, journal.log.day(DATES[1]))] == [DATES[0], DATES[3]]
    assert _beside(journal.desk, journal.log.day(DATES[3])) == []
