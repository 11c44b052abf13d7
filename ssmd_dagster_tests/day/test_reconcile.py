"""What reconcile decides: for every way in which days can lie after the daemon, the machine or a run was away."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.events import EMPTY_BOOK
from ssmd_dagster.day.reconcile import (
    BACK_OFF_MIN,
    LOOK_BACK_DAYS,
    MOST_TRIES,
    NOBODY,
    RECORDED_WITH,
    STALE_S,
    Facts,
    Plan,
    Run,
    permission,
    plan,
)
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster_tests.day.builders import ENV, Log

_E = EventName
DAY = date(2025, 12, 14)


def calendar(*, auto_roll: bool = True) -> TradingCalendar:
    """Return UTC days from midnight to midnight, started at 00:10."""
    return TradingCalendar(
        timezone="UTC", day_start="00:10", day_end="00:00", auto_roll=auto_roll, first_day=date(2025, 1, 1)
    )


def ns(day: date, clock: str = "12:00") -> int:
    """Return an instant in nanoseconds."""
    at = datetime.combine(day, datetime.strptime(clock, "%H:%M").time(), tzinfo=UTC)
    return int(at.timestamp()) * 1_000_000_000


TO_STATE: dict[DayState, tuple[EventName, ...]] = {
    DayState.STARTING: (_E.DEFINED, _E.START_REQUESTED),
    DayState.ACTIVE: (_E.DEFINED, _E.START_REQUESTED, _E.STARTED),
    DayState.ERROR: (_E.DEFINED, _E.START_REQUESTED, _E.STARTED, _E.ERROR_RAISED),
    DayState.ENDING: (_E.DEFINED, _E.START_REQUESTED, _E.STARTED, _E.END_REQUESTED),
    DayState.COMPLETE: (_E.DEFINED, _E.START_REQUESTED, _E.STARTED, _E.END_REQUESTED, _E.COMPLETED),
}


def put(log: Log, day: date, state: DayState, *, data: dict[str, Any] | None = None, clock: str = "00:05") -> None:
    """Bring a day into a state; `data` goes with its last event."""
    events = TO_STATE[state]
    for event in events:
        given = data or {} if event is events[-1] else {}
        log.add(event, date=day.isoformat(), at_ns=ns(day, clock), data=given)
    if state is DayState.COMPLETE:
        log.add(
            _E.SEALED, date=day.isoformat(), at_ns=ns(day, clock), data={"revision": log.day(day.isoformat()).revision}
        )


def failed(log: Log, day: date, event: EventName, *, transient: bool, exit_code: int = 1) -> None:
    """Fail a day's start or end."""
    put(log, day, DayState.STARTING if event is _E.START_FAILED else DayState.ENDING)
    data = {"error": "no answer", "step": "connector", "transient": transient, "exit_code": exit_code}
    log.add(event, date=day.isoformat(), at_ns=ns(day, "00:06"), data=data)


def decided(log: Log, at_ns: int, *, auto_roll: bool = True, **facts: Any) -> Plan:
    """Return what is to be done."""
    known = Facts(**{name: frozenset(day.isoformat() for day in days) for name, days in facts.items()})  # type: ignore[arg-type]
    return plan(ENV, log.book, calendar(auto_roll=auto_roll), at_ns, known)


def asked(made: Plan) -> list[tuple[str, str]]:
    """Return verbs and days in order."""
    return [(ask.verb, ask.date) for ask in made.asks]


def test_an_empty_journal_expects_nothing() -> None:
    """The first day of an environment is begun by its schedule or by hand."""
    assert plan(ENV, EMPTY_BOOK, calendar(), ns(DAY)) == Plan()


def test_days_around_a_replayed_one_are_not_expected() -> None:
    """A backfill of an old day says nothing about the days after it."""
    log = Log()
    log.add(_E.DEFINED, date=DAY.isoformat(), at_ns=ns(DAY))
    log.add(_E.START_REQUESTED, date=DAY.isoformat(), at_ns=ns(DAY), data={"mode": "replay"})
    log.add(_E.STARTED, date=DAY.isoformat(), at_ns=ns(DAY))
    log.add(_E.END_REQUESTED, date=DAY.isoformat(), at_ns=ns(DAY))
    log.add(_E.COMPLETED, date=DAY.isoformat(), at_ns=ns(DAY))
    log.add(_E.SEALED, date=DAY.isoformat(), at_ns=ns(DAY))
    assert decided(log, ns(DAY + timedelta(days=9))) == Plan()


def test_a_day_that_was_cut_off_before_its_seal_is_ended_again() -> None:
    """The store was away, or the machine: COMPLETE without a manifest is not done, in a later revision neither."""
    log = Log()
    put(log, DAY, DayState.ENDING)
    log.add(_E.COMPLETED, date=DAY.isoformat(), at_ns=ns(DAY))
    assert decided(log, ns(DAY) + (STALE_S - 1) * 1_000_000_000) == Plan()
    assert decided(log, ns(DAY, "12:02"), held=[DAY]) == Plan()
    assert asked(decided(log, ns(DAY, "12:02"))) == [("end", DAY.isoformat())]
    log.add(_E.SEALED, date=DAY.isoformat(), at_ns=ns(DAY))
    assert decided(log, ns(DAY, "12:02")) == Plan()
    log.add(_E.START_REQUESTED, date=DAY.isoformat(), at_ns=ns(DAY), data={"mode": "replay", "revision": 2})
    for event in (_E.STARTED, _E.END_REQUESTED, _E.COMPLETED):
        log.add(event, date=DAY.isoformat(), at_ns=ns(DAY))
    assert asked(decided(log, ns(DAY, "12:02"))) == [("replay", DAY.isoformat())]


def test_a_forced_day_waits_for_no_seal() -> None:
    """Its verification, whenever somebody asks for it, seals it."""
    log = Log()
    put(log, DAY, DayState.ENDING)
    log.add(_E.COMPLETED, date=DAY.isoformat(), at_ns=ns(DAY), data={"forced_by": "cli:test@host"})
    assert decided(log, ns(DAY, "12:02")) == Plan()


def test_a_day_that_recorded_and_failed_is_recovered_and_not_started() -> None:
    """The run of a start stands in line behind a roll that proves the day before for hours; a recovery does not."""
    log = Log()
    put(log, DAY, DayState.ERROR)
    log.add(_E.GAVE_UP, date=DAY.isoformat(), at_ns=ns(DAY), data={"transient": True})
    made = decided(log, ns(DAY))
    assert asked(made) == [("recover", DAY.isoformat())]
    assert made.flags == (), "it was ACTIVE in time"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans())
def test_a_day_that_is_late_is_late_through_all_of_its_attempts(minutes: list[int], ends: bool) -> None:
    """Who is told once, and again after it was well in between, is told once: an attempt under way makes nothing well."""
    log = Log()
    put(log, DAY, DayState.COMPLETE)
    day = DAY + timedelta(days=1)
    put(log, day, DayState.ACTIVE if ends else DayState.STARTING)
    asks, fails = (_E.END_REQUESTED, _E.END_FAILED) if ends else (_E.START_REQUESTED, _E.START_FAILED)
    late_ns = ns(day + timedelta(days=1), "02:00") if ends else ns(day, "00:20")
    now_ns = late_ns - 30 * 60_000_000_000
    if not ends:
        log.add(fails, date=day.isoformat(), at_ns=now_ns, data={"transient": True})
    for number, minute in enumerate(minutes):
        now_ns += minute * 60_000_000_000
        data = {"transient": True} if number % 2 else {}
        log.add(fails if number % 2 else asks, date=day.isoformat(), at_ns=now_ns, data=data)
        made = decided(log, now_ns + 1_000_000_000, held=[] if number % 2 else [day])
        flagged = [flag.date for flag in made.flags if flag.kind == "late" and flag.date == day.isoformat()]
        assert flagged == ([day.isoformat()] if now_ns + 1_000_000_000 >= late_ns else [])


@pytest.mark.parametrize("was_active", [False, True])
def test_a_start_at_noon_that_nobody_waited_for_is_late_by_itself(was_active: bool) -> None:
    """An environment's first day is begun at any hour, and a day that is started again was in time."""
    log = Log()
    if was_active:
        put(log, DAY, DayState.COMPLETE)
        data = {"revision": 2}
        log.add(_E.START_REQUESTED, date=DAY.isoformat(), at_ns=ns(DAY, "12:00"), data=data)
    else:
        put(log, DAY, DayState.STARTING, clock="12:00")
    assert decided(log, ns(DAY, "12:10"), held=[DAY]).flags == ()
    assert [flag.kind for flag in decided(log, ns(DAY, "12:11"), held=[DAY]).flags] == ["late"]


@pytest.mark.parametrize("state", [DayState.STARTING, DayState.ACTIVE, DayState.ENDING])
def test_a_replay_at_work_is_not_late(state: DayState) -> None:
    """It starts and ends long after its day: nothing is asked for and nobody is told."""
    log = Log()
    for event in TO_STATE[state]:
        data = {"mode": "replay"} if event is _E.START_REQUESTED else {}
        log.add(event, date=DAY.isoformat(), at_ns=ns(DAY + timedelta(days=9), "11:59"), data=data)
    assert decided(log, ns(DAY + timedelta(days=9), "12:00"), held=[DAY]) == Plan()


def test_a_running_day_is_left_alone() -> None:
    """An ACTIVE day within its window, and all COMPLETE ones, need nothing."""
    log = Log()
    put(log, DAY - timedelta(days=1), DayState.COMPLETE)
    put(log, DAY, DayState.ACTIVE)
    assert decided(log, ns(DAY, "18:00"), recording=[DAY]) == Plan()


def test_a_day_that_the_schedule_did_not_start_is_started_after_a_grace() -> None:
    """Nothing two minutes after `day_start`, a start after that, a message ten minutes after it."""
    log = Log()
    put(log, DAY, DayState.COMPLETE)
    following = DAY + timedelta(days=1)
    assert asked(decided(log, ns(following, "00:11"))) == []
    made = decided(log, ns(following, "00:12"))
    assert (asked(made), made.flags) == ([("start", following.isoformat())], ())
    (flag,) = decided(log, ns(following, "00:20")).flags
    assert (flag.kind, flag.command) == ("late", f"ssmd day start {ENV} --date {following}")


def test_a_day_that_failed_to_start_while_another_recorded_on_is_named_like_a_missed_one() -> None:
    """So its tables are made of that archive, not of trades alone; what nobody recorded is replayed."""
    log = Log()
    put(log, DAY, DayState.ACTIVE)
    failed = DAY + timedelta(days=1)
    for event in (_E.DEFINED, _E.START_REQUESTED, _E.START_FAILED):
        log.add(event, date=failed.isoformat(), at_ns=ns(failed, "00:01"))
    now_ns = ns(failed + timedelta(days=1), "09:00")
    (missed,) = decided(log, now_ns, recording=[DAY]).missed
    assert (missed.date, missed.recorded_with) == (failed.isoformat(), DAY.isoformat())
    alone = decided(log, now_ns)
    assert alone.missed == ()
    assert ("replay", failed.isoformat()) in asked(alone)


def test_three_days_without_a_daemon_while_the_capture_records_on() -> None:
    """The day that records on is rolled into today; the dates in between are journaled as recorded with it."""
    log = Log()
    put(log, DAY, DayState.ACTIVE)
    today = DAY + timedelta(days=3)
    made = decided(log, ns(today, "09:00"), recording=[DAY])
    assert asked(made) == [("roll", DAY.isoformat())]
    between = [(DAY + timedelta(days=days)).isoformat() for days in (1, 2)]
    assert [(missed.date, missed.reason, missed.recorded_with) for missed in made.missed] == [
        (day, f"{RECORDED_WITH} {DAY}", DAY.isoformat()) for day in between
    ]
    assert {flag.kind for flag in made.flags} == {"late"}


def test_three_days_without_the_machine() -> None:
    """Nothing records: today is started, the day that was cut off is ended, and the dates in between were missed."""
    log = Log()
    put(log, DAY, DayState.ACTIVE)
    today = DAY + timedelta(days=3)
    made = decided(log, ns(today, "09:00"))
    assert asked(made) == [("start", today.isoformat()), ("end", DAY.isoformat())]
    assert [missed.reason.startswith(NOBODY) for missed in made.missed] == [True, True]


@pytest.mark.parametrize("recorder", [DayState.ACTIVE, DayState.COMPLETE])
def test_missed_days_are_replayed_and_those_recorded_with_another_once_that_is_complete(recorder: DayState) -> None:
    """Once journaled, a day that nobody started is replayed; the others have their messages."""
    log = Log()
    put(log, DAY, recorder)
    for days, reason in ((1, f"{NOBODY}, and it is over"), (2, f"{RECORDED_WITH} {DAY}"), (3, "paused by cli:a@b")):
        missed = (DAY + timedelta(days=days)).isoformat()
        log.add(_E.DEFINED, date=missed, at_ns=ns(DAY))
        data = {"recorded_with": DAY.isoformat()} if days == 2 else {}
        log.add(_E.MISSED, date=missed, at_ns=ns(DAY), reason=reason, data=data)
    today = DAY + timedelta(days=4)
    put(log, today, DayState.ACTIVE)
    made = decided(log, ns(today), recording=[DAY, today])
    nobodys, held = ("replay", (DAY + timedelta(days=1)).isoformat()), ("replay", (DAY + timedelta(days=2)).isoformat())
    expected = [nobodys, held] if recorder is DayState.COMPLETE else [("end", DAY.isoformat()), nobodys]
    assert asked(made) == expected
    assert made.missed == ()


def test_a_day_that_is_over_is_rolled_or_ended_after_the_schedules_grace() -> None:
    """Three minutes after midnight: with `auto_roll` a roll, else an end; before that the schedule's roll goes on."""
    log = Log()
    put(log, DAY, DayState.ACTIVE)
    after = DAY + timedelta(days=1)
    assert asked(decided(log, ns(after, "00:02"), recording=[DAY])) == []
    assert asked(decided(log, ns(after, "00:03"), recording=[DAY])) == [("roll", DAY.isoformat())]
    assert asked(decided(log, ns(after, "00:03"), auto_roll=False, recording=[DAY])) == [("end", DAY.isoformat())]
    assert asked(decided(log, ns(after, "00:12"), recording=[DAY])) == [("roll", DAY.isoformat())], "not a start too"
    put(log, after, DayState.ACTIVE)
    assert asked(decided(log, ns(after, "00:12"), recording=[DAY, after])) == [("end", DAY.isoformat())]


@pytest.mark.parametrize(("state", "verb"), [(DayState.STARTING, "start"), (DayState.ENDING, "end")])
def test_a_verb_that_was_cut_off_is_done_again_once_its_lease_is_gone(state: DayState, verb: str) -> None:
    """Not while somebody holds the lease, nor within the first minute."""
    log = Log()
    put(log, DAY, state, clock="11:59")
    soon, later = ns(DAY, "12:00"), ns(DAY, "12:01") + STALE_S * 1_000_000_000
    assert asked(decided(log, soon)) == []
    assert asked(decided(log, later, held=[DAY])) == []
    assert asked(decided(log, later)) == [(verb, DAY.isoformat())]


def test_a_verb_that_was_cut_off_is_seen_although_its_connectors_go_on() -> None:
    """They tell their counts every minute; that is nobody at work on the end of the day."""
    log = Log()
    put(log, DAY, DayState.ENDING, clock="11:59")
    log.add(_E.CHECKPOINT, date=DAY.isoformat(), at_ns=ns(DAY, "12:02"), data={"component": "connector-a"})
    assert asked(decided(log, ns(DAY, "12:02"))) == [("end", DAY.isoformat())]


def test_a_start_that_was_cut_off_is_failed_once_its_day_is_over() -> None:
    """A live start of a day that is over would record another day's messages."""
    log = Log()
    put(log, DAY, DayState.STARTING)
    made = decided(log, ns(DAY + timedelta(days=1), "00:05"))
    assert [entry.date for entry in made.cut_off] == [DAY.isoformat()]
    assert ("start", DAY.isoformat()) not in asked(made)


@pytest.mark.parametrize(
    ("event", "transient", "after_days", "expected"),
    [
        (_E.START_FAILED, True, 0, "start"),
        (_E.START_FAILED, False, 0, None),
        (_E.START_FAILED, True, 1, "replay"),
        (_E.START_FAILED, False, 1, None),
        (_E.END_FAILED, True, 0, "end"),
        (_E.END_FAILED, True, 1, "end"),
        (_E.END_FAILED, False, 1, None),
    ],
)
def test_what_failed_is_tried_again_only_for_a_transient_cause(
    event: EventName, transient: bool, after_days: int, expected: str | None
) -> None:
    """Configuration, refused credentials and unexplained differences wait for a person, and are flagged."""
    log = Log()
    failed(log, DAY, event, transient=transient)
    today = DAY + timedelta(days=after_days)
    if after_days:
        put(log, today, DayState.ACTIVE)
    made = decided(log, ns(today), recording=[today])
    assert asked(made) == ([(expected, DAY.isoformat())] if expected else [])
    stuck = [flag.command for flag in made.flags if flag.kind == "stuck"]
    assert bool(stuck) is (expected is None)
    if stuck and event is _E.START_FAILED and after_days:
        assert stuck == [f"ssmd day backfill {ENV} --from {DAY} --to {DAY}"], "a start would leave the replay ACTIVE"


def test_what_gave_up_is_ended_once_its_day_is_over() -> None:
    """A day that recorded something is proved, whatever it gave up for."""
    log = Log()
    put(log, DAY, DayState.ERROR)
    log.add(_E.GAVE_UP, date=DAY.isoformat(), at_ns=ns(DAY, "01:00"), data={"transient": False})
    today = DAY + timedelta(days=1)
    put(log, today, DayState.ACTIVE)
    assert asked(decided(log, ns(DAY))) == []
    assert asked(decided(log, ns(today), recording=[today])) == [("end", DAY.isoformat())]


def test_a_paused_environment_is_left_alone() -> None:
    """Nothing is decided; who paused it, since when and why is said."""
    log = Log()
    put(log, DAY, DayState.ACTIVE)
    log.add(_E.PAUSED, date=DAY.isoformat(), at_ns=ns(DAY, "10:00"), reason="new disks")
    made = decided(log, ns(DAY + timedelta(days=3)))
    assert made == Plan(
        paused="paused by cli:test@host since 2025-12-14T10:00:00+00:00: new disks; `ssmd env resume kalshi-test`"
    )


def test_an_environment_that_rested_for_a_year_is_not_flooded() -> None:
    """Dates further back than a month are not journaled one by one."""
    log = Log()
    put(log, DAY, DayState.COMPLETE)
    assert len(decided(log, ns(DAY + timedelta(days=365))).missed) == LOOK_BACK_DAYS


@given(
    states=st.lists(st.sampled_from([None, *TO_STATE]), min_size=1, max_size=6),
    hours=st.integers(0, 24 * 8),
    recording=st.sets(st.integers(0, 5)),
    held=st.sets(st.integers(0, 5)),
    auto_roll=st.booleans(),
)
def test_no_day_is_forgotten_and_none_is_asked_for_twice(
    states: list[DayState | None], hours: int, recording: set[int], held: set[int], auto_roll: bool
) -> None:
    """Whatever the states: at most one ask a day, and each day that is over is COMPLETE, asked for, journaled or held."""
    log = Log()
    put(log, DAY, DayState.COMPLETE)
    for number, state in enumerate(states, start=1):
        if state is not None:
            put(log, DAY + timedelta(days=number), state)
    now = ns(DAY + timedelta(days=1), "00:30") + hours * 3_600_000_000_000
    facts = {
        "recording": [DAY + timedelta(days=n) for n in recording],
        "held": [DAY + timedelta(days=n) for n in held],
    }
    made = decided(log, now, auto_roll=auto_roll, **facts)
    dates = [ask.date for ask in made.asks]
    assert len(set(dates)) == len(dates)
    handled = {*dates, *(entry.date for entry in made.missed), *(entry.date for entry in made.cut_off)}
    today = calendar().date_at(now)
    day = DAY
    while day < today - timedelta(days=1):
        known = log.book.days.get(day.isoformat())
        is_held = known is not None and known.state in (DayState.STARTING, DayState.ENDING) and day in facts["held"]
        done = known is not None and known.state is DayState.COMPLETE
        assert done or is_held or day.isoformat() in handled, (day, known and known.state)
        day += timedelta(days=1)


def test_pauses_between_failed_runs_grow_to_a_quarter_of_an_hour() -> None:
    """The number of an attempt counts all runs of that job and day; a success starts the pauses anew."""
    assert permission("start", [], 0.0).attempt == 1
    runs: list[Run] = []
    for failures, minutes in enumerate([*BACK_OFF_MIN, 15], start=1):
        runs.insert(0, Run(ended_s=1000.0, succeeded=False))
        assert "the next one in 1 s" in permission("start", runs, 1000 + 60 * minutes - 1).why_not
        assert permission("start", runs, 1000 + 60 * minutes).attempt == failures + 1
    runs.insert(0, Run(ended_s=5000.0, succeeded=True))
    assert permission("start", runs, 5000.0).attempt == len(runs) + 1
    runs.insert(0, Run(ended_s=None, succeeded=False))
    assert permission("start", runs, 9e9).why_not == "a run of it is queued or running"


def test_after_so_many_failures_a_person_is_needed() -> None:
    """A replay is tried three times."""
    runs = [Run(ended_s=0.0, succeeded=False)] * MOST_TRIES["replay"]
    assert permission("replay", runs, 9e9).why_not == "3 runs of it failed; a person is needed"


@pytest.mark.parametrize("state", [None, DayState.ACTIVE])
def test_a_start_or_a_roll_waits_for_announced_maintenance_to_end(state: DayState | None) -> None:
    """It would fail; what waits is said with the end of the window, what is late is flagged, and then it is asked for."""
    log = Log()
    put(log, DAY, state or DayState.COMPLETE)
    today = DAY + timedelta(days=1)
    verb = "start" if state is None else "roll"
    facts = Facts(recording=frozenset({DAY.isoformat()}), maintenance=(Window(ns(today, "00:00"), ns(today, "02:00")),))
    during, after = (plan(ENV, log.book, calendar(), ns(today, at), facts) for at in ("01:00", "02:00"))
    assert verb not in [ask.verb for ask in during.asks]
    date_ = (today if state is None else DAY).isoformat()
    until = "2025-12-15T02:00:00+00:00"
    assert during.waiting == (
        f"the {verb} of {date_} waits for the exchange's announced maintenance to end, at {until}",
    )
    assert (after.waiting, [ask.verb for ask in after.asks]) == ((), [verb])
