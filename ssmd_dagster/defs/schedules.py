"""The schedules of an environment, from the `schedule` of its YAML. An environment that is not enabled has none.

`day_start` starts the date that it falls on. `day_end` ends the day whose window it closes: the calendar says which, over
changes of the clocks too. With `auto_roll` it rolls, and fires two minutes before, so that the next day is up by then; the
start is the fallback of the roll: it finds the day ACTIVE and does nothing. They run once their code is loaded, until
somebody switches one off in the UI.

Schedules fire by the host's clock. Where a simulated exchange's clock is moved, they do nothing, and a sensor fires by that
clock (`moved`). Correctness never rests on a tick: Dagster makes up for the latest of several missed ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from functools import partial

import dagster as dg

from ssmd_dagster.day.calendar import TradingCalendar, parse_time
from ssmd_dagster.day.states import DayState
from ssmd_dagster.defs.held import Seen, held_back, look
from ssmd_dagster.defs.partitions import request_run
from ssmd_dagster.defs.watch import Watch
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.workflows.roll import LEAD_S

LOOK_TIMEOUT_S = 5.0
"""How long a tick waits to learn whether somebody has paused the environment, or its exchange announced maintenance."""

_DateOf = Callable[[TradingCalendar, datetime], date]


def schedules_of(
    environment: Environment, jobs: Mapping[str, dg.JobDefinition], watch: Watch
) -> list[dg.ScheduleDefinition]:
    """Return the schedules of an environment, none where it is not enabled."""
    if not environment.enabled:
        return []
    times = environment.schedule
    _schedule = partial(_daily, environment, watch)
    start = [
        _schedule(jobs["start"], times.day_start, started_at, "Starts the day at day_start."),
        _sync(environment, watch, jobs["sync"]),
    ]
    if times.auto_roll:
        text = f"Rolls the day whose window closes at {times.day_end}, from {LEAD_S} s before on."
        return [*start, _schedule(jobs["roll"], before(times.day_end, LEAD_S), rolled_at, text)]
    text = "Ends the day whose window closes at day_end."
    return [*start, _schedule(jobs["end"], times.day_end, closed_at, text)]


def before(at: str, lead_s: int) -> str:
    """Return the local time that is `lead_s` before `at`, on a day without a change of the clocks."""
    time = datetime.combine(date(2000, 1, 2), parse_time(at)) - timedelta(seconds=lead_s)
    return f"{time:%H:%M}"


def rolled_at(calendar: TradingCalendar, scheduled: datetime) -> date:
    """Return the day that a tick before `day_end` rolls from: the one whose close is nearest, whatever the clocks do."""
    running = calendar.date_at(_ns(scheduled))
    return min((running - timedelta(days=1), running), key=lambda day: abs(calendar.close_ns(day) - _ns(scheduled)))


def started_at(calendar: TradingCalendar, scheduled: datetime) -> date:
    """Return the day that a tick of `day_start` starts: the local date."""
    return calendar.local(_ns(scheduled)).date()


def closed_at(calendar: TradingCalendar, scheduled: datetime) -> date:
    """Return the day that a tick of `day_end` ends: the last one whose window is closed by then."""
    return calendar.date_at(_ns(scheduled)) - timedelta(days=1)


def _ns(at: datetime) -> int:
    return int(at.timestamp()) * 1_000_000_000


def _seen(environment: Environment, watch: Watch) -> Seen | None:
    """Look at the environment; None where its servers do not answer."""
    return watch.look([environment.name], look, actor="schedule", timeout_s=LOOK_TIMEOUT_S)[environment.name].value


def _sync(environment: Environment, watch: Watch, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{job.name}_schedule",
        job=job,
        cron_schedule="*/5 * * * *",
        execution_timezone=environment.schedule.timezone,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Brings new markets in every five minutes while a day is ACTIVE.",
    )
    def tick(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        seen = _seen(environment, watch)
        if seen is None:
            return dg.SkipReason(f"{environment.name} cannot be looked at; see `ssmd day status {environment.name}`")
        if (why := held_back(environment, seen, connects=True)) is not None:
            return dg.SkipReason(why)
        day = seen.book.days.get(seen.book.current or "")
        if day is None or day.state is not DayState.ACTIVE:
            return dg.SkipReason(f"no day of {environment.name} is ACTIVE")
        return request_run(day.date, f"{context.scheduled_execution_time.timestamp():.0f}")

    return tick


def _daily(
    environment: Environment, watch: Watch, job: dg.JobDefinition, at: str, date_of: _DateOf, description: str
) -> dg.ScheduleDefinition:
    calendar, time = environment.calendar(), parse_time(at)

    @dg.schedule(
        name=f"{job.name}_schedule",
        job=job,
        cron_schedule=f"{time.minute} {time.hour} * * *",
        execution_timezone=environment.schedule.timezone,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"{description} {at} {environment.schedule.timezone}, from the environment's YAML.",
    )
    def tick(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        day = date_of(calendar, context.scheduled_execution_time)
        if day < calendar.first_day:
            return dg.SkipReason(f"{day} is before the first day of {environment.name}, {calendar.first_day}")
        seen = _seen(environment, watch)  # where nobody answers the run itself finds out why
        if seen is not None and seen.moved:
            return dg.SkipReason(f"the clock of {environment.name} is moved; the sensor `moved_clocks` fires by it")
        connects = not job.name.endswith("_end_day")
        if seen is not None and (why := held_back(environment, seen, connects=connects)) is not None:
            return dg.SkipReason(f"{why}; reconcile asks for the run after it")
        return request_run(day.isoformat(), f"{job.name}:{day}")

    return tick
