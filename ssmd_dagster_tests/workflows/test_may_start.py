"""Which days may be started by whom: a person, a roll, a schedule or a sensor."""

from __future__ import annotations

from datetime import date
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from ssmd_dagster.day.calendar import TradingCalendar
from ssmd_dagster.day.events import Book, TradingDay
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import RefusedError
from ssmd_dagster.workflows import start
from ssmd_dagster.workflows.attempt import Attempt, Options
from ssmd_dagster.workflows.roll import dates_to_roll
from ssmd_dagster_tests.day.builders import DATE, ENV, Log

NEXT, LATER = "2025-12-15", "2025-12-17"
HOUR_NS = 3_600_000_000_000
CALENDAR = TradingCalendar(
    timezone="UTC", day_start="00:10", day_end="00:00", auto_roll=True, first_day=date.fromisoformat(DATE)
)
FAILED = (EventName.DEFINED, EventName.START_REQUESTED, EventName.START_FAILED)
ACTIVE = (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED)
ENDING = (*ACTIVE, EventName.END_REQUESTED)
END_FAILED = (*ENDING, EventName.END_FAILED)
COMPLETE = (*ENDING, EventName.COMPLETED)
ERROR = (*ACTIVE, EventName.ERROR_RAISED)
BY_SCHEDULE, IN_ROLL = Options(unattended=True), Options(mode="live", rolled_from="2025-12-13")
BY_HAND = Options()


def desk_of(monkeypatch: pytest.MonkeyPatch, book: Book, now_ns: int) -> Any:
    """Return as much of a desk as the decision looks at."""

    async def nothing(*_: object) -> None:
        return None

    async def day(wanted: str) -> TradingDay | None:
        return book.days.get(wanted)

    async def refresh() -> Book:
        return book

    monkeypatch.setattr(start, "create_streams", nothing)
    monkeypatch.setattr(start, "refuse_journal_behind", nothing)
    return SimpleNamespace(
        env=ENV,
        book=SimpleNamespace(day=day, refresh=refresh, book=book),
        calendar=CALENDAR,
        stores=SimpleNamespace(raw_stream=SimpleNamespace(check_payload=lambda: None)),
        setting=SimpleNamespace(
            clock=lambda: now_ns, env=SimpleNamespace(capture=SimpleNamespace(channels=("trade",)))
        ),
        today=lambda: CALENDAR.date_at(now_ns).isoformat(),
    )


def log_of(*events: EventName, dated: str = DATE) -> Log:
    """Return a journal with one day."""
    log = Log()
    for event in events:
        log.add(event, date=dated)
    return log


def at(day: str, hours: float) -> int:
    """Return the time so many hours after a day's opening."""
    return CALENDAR.open_ns(date.fromisoformat(day)) + int(hours * HOUR_NS)


@pytest.mark.parametrize(
    ("events", "options", "hours", "may"),
    [
        pytest.param(ACTIVE, BY_SCHEDULE, 1, False, id="a schedule finds it ACTIVE"),
        pytest.param(COMPLETE, BY_SCHEDULE, 25, False, id="a run of yesterday's schedule that waited behind the roll"),
        pytest.param(COMPLETE, BY_SCHEDULE, 1, False, id="a schedule after an operator has ended the day"),
        pytest.param(ERROR, BY_SCHEDULE, 1, False, id="a schedule beside a recovery"),
        pytest.param(FAILED, BY_SCHEDULE, 1, True, id="a schedule starts what has failed"),
        pytest.param(END_FAILED, BY_SCHEDULE, 1, False, id="a schedule after an operator's end that failed"),
        pytest.param((), BY_SCHEDULE, 1, True, id="a schedule starts what nobody has"),
        pytest.param(FAILED, BY_SCHEDULE, 25, None, id="a schedule replays nothing"),
        pytest.param((), BY_SCHEDULE, 25, None, id="a schedule whose run began too late"),
        pytest.param(COMPLETE, IN_ROLL, 1, False, id="an old roll again"),
        pytest.param(ENDING, IN_ROLL, 1, False, id="a roll into a day that is ended already"),
        pytest.param(ERROR, IN_ROLL, 1, False, id="a roll into a day in ERROR ends the old one all the same"),
        pytest.param(FAILED, IN_ROLL, 1, True, id="a roll again after its start failed"),
        pytest.param(FAILED, IN_ROLL, 25, None, id="a roll records nothing into a day that is over"),
        pytest.param(COMPLETE, BY_HAND, 1, True, id="a person opens a day again"),
        pytest.param(COMPLETE, BY_HAND, 25, True, id="a person replays a day"),
        pytest.param(ERROR, BY_HAND, 1, None, id="a person is told to recover"),
        pytest.param(FAILED, Options(mode="live"), 25, None, id="a day that is over is not recorded by hand either"),
    ],
)
async def test_who_may_start_a_day(
    monkeypatch: pytest.MonkeyPatch, events: tuple[EventName, ...], options: Options, hours: float, may: bool | None
) -> None:
    """True: it is started, False: it is as it should be, None: it is refused."""
    desk = desk_of(monkeypatch, log_of(*events).book, at(DATE, hours))
    attempt = Attempt(desk, DATE, start.START, options)
    if may is None:
        with pytest.raises(RefusedError):
            await start.may_start(attempt)
    else:
        assert await start.may_start(attempt) is may


@pytest.mark.parametrize(("hours", "late_start"), [(-0.02, False), (0.02, True)])
async def test_only_a_start_after_the_boundary_is_late(
    monkeypatch: pytest.MonkeyPatch, hours: float, late_start: bool
) -> None:
    """A roll from a day that failed: nobody else recorded, but the new day's own connectors were up before it began."""
    log = log_of(EventName.DEFINED, EventName.START_REQUESTED, dated=NEXT)
    now_ns = [at(NEXT, hours)]
    journaled: list[EventName] = []

    async def wait_until(_desk: object, until_ns: int) -> None:
        now_ns[0] = until_ns + 1_000_000

    async def journal(event: EventName, data: Any) -> TradingDay:
        journaled.append(event)
        log.add(event, date=NEXT, data=msgspec.to_builtins(data))
        return log.day(NEXT)

    async def nothing(*_: object) -> Any:
        return {}

    desk = desk_of(monkeypatch, log.book, now_ns[0])
    desk.setting.clock = lambda: now_ns[0]
    desk.window = lambda day: CALENDAR.window(date.fromisoformat(day.date))
    desk.stores = SimpleNamespace(cache=SimpleNamespace(heartbeats=nothing, maintenance=nothing))
    monkeypatch.setattr(start, "wait_until", wait_until)
    monkeypatch.setattr(start, "connector_names", lambda _env: ())
    monkeypatch.setattr(start, "markets_subscribed", lambda _env, _beats: 5)
    monkeypatch.setattr(start, "_recorded_since", nothing)
    options = Options(mode="live", rolled_from=DATE, boundary_ns=at(NEXT, 0))
    attempt: Any = SimpleNamespace(
        desk=desk, date=NEXT, options=options, day=log.day(NEXT), journal=journal, tell=lambda *_: None
    )
    day = await start.finish(attempt)
    assert (day.open_ns, EventName.GAP_OPENED in journaled) == (at(NEXT, 0), late_start)


async def test_a_roll_passes_over_a_day_that_failed_to_start_and_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes now is of today; the day in between is not opened for it."""
    log = log_of(*ACTIVE)
    for event in FAILED:
        log.add(event, date=NEXT)
    assert await dates_to_roll(desk_of(monkeypatch, log.book, at(NEXT, 1))) == (DATE, NEXT)
    assert await dates_to_roll(desk_of(monkeypatch, log.book, at(LATER, 9))) == (DATE, LATER)


async def test_an_old_roll_again_leads_to_the_day_that_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it finds both as they should be, and today is left alone."""
    log = log_of(*COMPLETE)
    for event in COMPLETE:
        log.add(event, date=NEXT)
    log.add(EventName.DEFINED, date=LATER)
    log.add(EventName.START_REQUESTED, date=LATER)
    desk = desk_of(monkeypatch, log.book, at(LATER, 9))
    assert await dates_to_roll(desk, DATE) == (DATE, NEXT)
