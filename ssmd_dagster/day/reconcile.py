"""What should be done about the days of an environment: those that should exist, held against the journal.

Pure decisions: which verb to ask for and why, which day was missed, which is late. Schedules only hint; this is what
loses no day. Not here: asking Dagster for runs, appending events (`workflows/reconcile`), how to recover a process.

A day that nobody has journaled is expected once a day before it was started live, at most `LOOK_BACK_DAYS` back: an empty
journal expects nothing, its first day is begun by a schedule or by hand. What an operator ended or cancelled stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta
from typing import Literal

import msgspec

from ssmd_dagster.day.calendar import TradingCalendar, Window
from ssmd_dagster.day.events import Book, Paused, TradingDay
from ssmd_dagster.day.maintenance import window_at
from ssmd_dagster.day.states import RECORDING, DayState

Verb = Literal["start", "end", "roll", "recover", "replay"]

LOOK_BACK_DAYS = 31
START_GRACE_S = 120
"""How long after `day_start` the schedule is given before a start is asked for in its place."""
ROLL_GRACE_S = 180
START_LATE_S = 600
END_LATE_S = 2 * 3600
STALE_S = 60
"""How long a day stands in STARTING or ENDING without a lease before its attempt counts as cut off."""

NOBODY = "nobody started it"
RECORDED_WITH = "its messages are recorded with"
PAUSED_BY = "paused by"
"""How the reason of `missed` begins. What was paused is not replayed without being asked for."""

BACK_OFF_MIN = (1, 2, 4, 8, 15)
MOST_TRIES = {"start": 200, "recover": 200, "roll": 20, "end": 20, "replay": 3}
"""Failed runs of one verb and day after which a person is needed. A day is started and recovered while its window is open."""

_S = DayState
_NS = 1_000_000_000
_ONE_DAY = timedelta(days=1)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal does not say: `recording` are days all of whose processes live, `held` those with a lease.

    `maintenance` is what the exchange has announced: a start or a roll in it would fail.
    """

    recording: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    maintenance: tuple[Window, ...] = ()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A run that should be asked for."""

    verb: Verb
    date: str
    why: str


class Missed(msgspec.Struct, frozen=True, kw_only=True):
    """A day that is over and never was ACTIVE, with the reason to journal and the day that was recorded instead."""

    date: str
    reason: str
    recorded_with: str | None = None


class CutOff(msgspec.Struct, frozen=True, kw_only=True):
    """A start that was cut off, of a day that is over: it can only fail."""

    date: str
    error: str


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person should know: a day is `late`, or `stuck` until somebody acts."""

    date: str
    kind: Literal["late", "stuck"]
    cause: str
    command: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is to be done now, the most urgent first; `paused` says why nothing is, `waiting` what is put off."""

    asks: tuple[Ask, ...] = ()
    missed: tuple[Missed, ...] = ()
    cut_off: tuple[CutOff, ...] = ()
    flags: tuple[Flag, ...] = ()
    waiting: tuple[str, ...] = ()
    paused: str | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a verb for a day; `ended_s` is None while it is queued or runs."""

    run_id: str = ""
    ended_s: float | None
    succeeded: bool


class Permission(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an ask may become a run now: `attempt` is its number, or None, and then `why_not` says why.

    `given_up`: it will not be asked for again before a person acts.
    """

    attempt: int | None = None
    why_not: str = ""
    given_up: bool = False


def plan(env: str, book: Book, calendar: TradingCalendar, now_ns: int, facts: Facts = Facts()) -> Plan:  # noqa: B008 - frozen
    """Return what is to be done about the days of an environment at `now_ns` (its own clock)."""
    if book.paused is not None:
        return Plan(paused=paused_words(env, book.paused, calendar))
    if not book.days:
        return Plan()
    return _Planning(env, book, calendar, now_ns, facts).plan()


def paused_words(env: str, paused: Paused, calendar: TradingCalendar) -> str:
    """Say who paused an environment, since when, why, and how that is ended."""
    because = f": {paused.reason}" if paused.reason else ""
    return f"{PAUSED_BY} {paused.actor} since {calendar.local(paused.since_ns).isoformat()}{because}; `ssmd env resume {env}`"


def permission(verb: Verb, runs: Sequence[Run], now_s: float) -> Permission:
    """Say whether another run of a verb may be asked for, given all runs of that job and day (newest first).

    Nothing is asked for while one is queued or running; failed ones are followed by a pause of 1 to 15 minutes.
    """
    if any(run.ended_s is None for run in runs):
        return Permission(why_not="a run of it is queued or running")
    failed = 0
    for run in runs:
        if run.succeeded:
            break
        failed += 1
    if failed >= MOST_TRIES[verb]:
        return Permission(why_not=f"{failed} runs of it failed; a person is needed", given_up=True)
    if failed and runs[0].ended_s is not None:
        wait_s = 60 * BACK_OFF_MIN[min(failed, len(BACK_OFF_MIN)) - 1]
        left_s = runs[0].ended_s + wait_s - now_s
        if left_s > 0:
            return Permission(why_not=f"{failed} failed; the next one in {left_s:.0f} s")
    return Permission(attempt=len(runs) + 1)


def command_of(verb: Verb, env: str, date: str) -> str:
    """Return the command that does what an ask would have done."""
    match verb:
        case "replay":
            return f"ssmd day backfill {env} --from {date} --to {date}"
        case "roll":
            return f"ssmd day roll {env}"
        case _:
            return f"ssmd day {verb} {env} --date {date}"


def after_failure(env: str, day: TradingDay, *, over: bool) -> str:
    """Return the command that brings a FAILED day on; `over`: its window has closed."""
    verb: Verb
    if day.mode == "replay" or (over and not day.ever_active):  # a start would leave it ACTIVE
        verb = "replay"
    elif not day.ever_active:
        verb = "start"
    else:  # while it may still record, an end would cut the rest of the day off
        verb = "end" if over or day.ended_ns is not None else "recover"
    return command_of(verb, env, day.date)


def lacks_recorder(day: TradingDay) -> bool:
    """Tell whether a day failed to start, and no other day is known to have recorded on through it."""
    tried = day.epoch is not None
    return day.state is DayState.FAILED and tried and not day.ever_active and day.recorded_with is None


def covered_by(book: Book, calendar: TradingCalendar, date: Date, facts: Facts) -> str | None:
    """Return the day whose recording held this whole date, None where there is none: it recorded on, its roll was late."""
    opens, closes = calendar.open_ns(date), calendar.close_ns(date)
    for day in book.days.values():
        if day.date == date.isoformat() or not day.ever_active or day.mode != "live":
            continue
        began = day.open_ns if day.open_ns is not None else calendar.open_ns(Date.fromisoformat(day.date))
        if began > opens:
            continue
        runs_on = day.state in RECORDING and day.date in facts.recording
        if runs_on or (day.close_ns is not None and day.close_ns >= closes):
            return day.date
    return None


class _Planning:
    """One pass over the days."""

    def __init__(self, env: str, book: Book, calendar: TradingCalendar, now_ns: int, facts: Facts) -> None:
        self._env, self._book, self._calendar, self._now_ns, self._facts = env, book, calendar, now_ns, facts
        self._today = calendar.date_at(now_ns)
        self._asks: list[Ask] = []
        self._missed: list[Missed] = []
        self._cut_off: list[CutOff] = []
        self._flags: list[Flag] = []
        self._waiting: list[str] = []
        self._rolling: str | None = None
        # Days that were only replayed make nothing be expected of those around them.
        self._began = min((day.date for day in book.days.values() if day.mode == "live" and day.epoch), default=None)

    def plan(self) -> Plan:
        self._rolling = self._to_roll()
        first = max(Date.fromisoformat(min(self._book.days)), self._today - LOOK_BACK_DAYS * _ONE_DAY)
        last = max(self._today, Date.fromisoformat(max(self._book.days)))
        date = first
        while date <= last:
            day = self._book.days.get(date.isoformat())
            if day is None or day.state is _S.PENDING:
                if self._began is not None and date.isoformat() > self._began:
                    self._absent(date)
            else:
                self._present(date, day)
            date += _ONE_DAY
        # Today's recording comes first, and what is over is ended in the order of the days.
        today = self._today.isoformat()
        asks = sorted(self._asks, key=lambda ask: (ask.verb != "roll", ask.date != today, ask.date))
        return Plan(
            asks=tuple(asks),
            missed=tuple(self._missed),
            cut_off=tuple(self._cut_off),
            flags=tuple(self._flags),
            waiting=tuple(self._waiting),
        )

    def _to_roll(self) -> str | None:
        """Return the latest live day that is over and records on although the next one is not up."""
        if not self._calendar.auto_roll:
            return None
        if any(day.state is _S.ACTIVE and day.mode == "live" for day in self._of_today()):
            return None
        running = [
            day.date
            for day in self._book.days.values()
            if day.state in RECORDING
            and day.mode == "live"
            and day.date in self._facts.recording
            and self._over(Date.fromisoformat(day.date))
        ]
        return max(running, default=None)

    def _of_today(self) -> list[TradingDay]:
        day = self._book.days.get(self._today.isoformat())
        return [] if day is None else [day]

    def _over(self, date: Date, grace_s: int = 0) -> bool:
        return self._now_ns >= self._calendar.close_ns(date) + grace_s * _NS

    def _absent(self, date: Date) -> None:
        if self._over(date):
            cover = covered_by(self._book, self._calendar, date, self._facts)
            reason = f"{NOBODY}, and it is over" if cover is None else f"{RECORDED_WITH} {cover}"
            self._missed.append(Missed(date=date.isoformat(), reason=reason, recorded_with=cover))
            return
        due_ns = self._calendar.start_due_ns(date)
        if date > self._today or self._now_ns < due_ns + START_GRACE_S * _NS or self._rolling is not None:
            return
        self._ask("start", date, "it should be ACTIVE by now")
        self._late_start(date, "nobody has started it")

    def _present(self, date: Date, day: TradingDay) -> None:
        match day.state:
            case _S.STARTING:
                self._starting(date, day)
            case _S.ACTIVE | _S.ERROR:
                self._running(date, day)
            case _S.ENDING:
                if self._is_cut_off(day):
                    self._ask("replay" if day.mode == "replay" else "end", date, "its end was cut off")
                if day.mode == "live":  # a replay ends long after its day, and in no haste
                    self._late_end(date, "its end is under way")
            case _S.COMPLETE:
                if day.is_unsealed and self._is_cut_off(day):
                    self._ask(
                        "replay" if day.mode == "replay" else "end", date, "it is COMPLETE, and its seal was cut off"
                    )
            case _S.FAILED:
                self._failed(date, day)

    def _starting(self, date: Date, day: TradingDay) -> None:
        if day.mode == "replay":
            if self._is_cut_off(day):
                self._ask("replay", date, "its replay was cut off")
        elif self._is_cut_off(day) and self._over(date):
            self._cut_off.append(CutOff(date=day.date, error="its start was cut off, and the day is over"))
        elif self._is_cut_off(day):
            self._ask("start", date, "its start was cut off")
        # The first day is begun at any hour, and one that was ACTIVE before was in time: then its start alone may be late.
        begun_now = day.ever_active or (day.date == self._began and len(day.epochs) == 1)
        if not self._over(date) and (not begun_now or self._idle_s(day) > START_LATE_S):
            self._late_start(date, "its start is under way")

    def _running(self, date: Date, day: TradingDay) -> None:
        if day.mode == "replay":
            if day.date not in self._facts.held and self._idle_s(day) > STALE_S:
                self._flag(date, "stuck", "a replay of it is ACTIVE and nobody is at work on it", "end")
            return
        if not self._over(date, ROLL_GRACE_S):
            return
        if day.date == self._rolling:
            self._ask("roll", date, "it is over and records on")
        else:
            self._ask("end", date, "it is over")
        self._late_end(date, f"it is {day.state}")

    def _failed(self, date: Date, day: TradingDay) -> None:
        failure = day.failure
        transient = failure is not None and failure.transient
        cause = day.error or "it failed"
        over = self._over(date)
        if over and lacks_recorder(day):
            cover = covered_by(self._book, self._calendar, date, self._facts)
            if cover is not None:
                reason = f"{RECORDED_WITH} {cover}"
                self._missed.append(Missed(date=day.date, reason=reason, recorded_with=cover))
                return
        if not over:
            if day.ended_ns is not None:
                self._again("end", date, transient, cause)
                return
            if date == self._today and self._now_ns < self._calendar.start_due_ns(date) + START_GRACE_S * _NS:
                return  # a start or a roll before its time that failed: the schedule comes first
            # A start waits for the roll that still proves the day before; what has recorded once is brought back at once.
            self._again("recover" if day.ever_active else "start", date, transient, cause)
            if not day.ever_active:
                self._late_start(date, cause)
        elif not day.ever_active:
            if cause.startswith(RECORDED_WITH):
                # Its tables are made of that day's archive, which is whole and proved once that day is COMPLETE.
                recorder = self._book.days.get(day.recorded_with or "")
                if recorder is not None and recorder.state is _S.COMPLETE:
                    self._ask("replay", date, f"{cause}, which is COMPLETE")
            elif transient or cause.startswith(NOBODY):
                self._ask("replay", date, cause)
            elif not cause.startswith(PAUSED_BY):
                self._flag(date, "stuck", cause, "replay")
        elif day.ended_ns is None and day.mode == "live":
            self._ask("end", date, f"it is over, and what it holds is not proved: {cause}")
        else:
            self._again("replay" if day.mode == "replay" else "end", date, transient, cause)
        if day.ever_active and day.mode == "live":
            self._late_end(date, cause)

    def _again(self, verb: Verb, date: Date, transient: bool, cause: str) -> None:
        if transient:
            self._ask(verb, date, f"it failed for a cause that may pass: {cause}")
        else:
            self._flag(date, "stuck", cause, verb)

    def _ask(self, verb: Verb, date: Date, why: str) -> None:
        window = window_at(self._facts.maintenance, self._now_ns)
        if window is not None and verb in ("start", "roll"):
            until = self._calendar.local(window.close_ns).isoformat()
            self._waiting.append(
                f"the {verb} of {date} waits for the exchange's announced maintenance to end, at {until}"
            )
            return
        self._asks.append(Ask(verb=verb, date=date.isoformat(), why=why))

    def _flag(self, date: Date, kind: Literal["late", "stuck"], cause: str, verb: Verb) -> None:
        command = command_of(verb, self._env, date.isoformat())
        self._flags.append(Flag(date=date.isoformat(), kind=kind, cause=cause, command=command))

    def _late_start(self, date: Date, cause: str) -> None:
        due_ns = max(self._calendar.start_due_ns(date), self._calendar.open_ns(date))
        if date <= self._today and self._now_ns >= due_ns + START_LATE_S * _NS:
            self._flag(date, "late", f"not ACTIVE {START_LATE_S // 60} minutes after it was due: {cause}", "start")

    def _late_end(self, date: Date, cause: str) -> None:
        if self._over(date, END_LATE_S):
            self._flag(date, "late", f"not COMPLETE {END_LATE_S // 3600} hours after its close: {cause}", "end")

    def _is_cut_off(self, day: TradingDay) -> bool:
        return day.date not in self._facts.held and self._idle_s(day) > STALE_S

    def _idle_s(self, day: TradingDay) -> float:
        return (self._now_ns - day.acted_ns) / _NS  # its connectors go on telling their counts
