"""The schedules of an environment, from the `schedule` of its YAML. An environment that is not enabled has none.

`day_start` starts the date that it falls on. `day_end` rolls (with `auto_roll`) or ends the day whose window it closes:
the calendar says which, over changes of the clocks too. With `auto_roll` the start is the fallback of the roll: it
finds the day ACTIVE and does nothing. They run once their code is loaded, until somebody switches one off in the UI.

Schedules fire by the host's clock, also those of a simulated environment, whose days follow its exchange's clock: where
that is shifted, the run's first op refuses a day that is not one and names today. Correctness never rests on a tick:
Dagster makes up for the latest of several missed ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta

import dagster as dg

from ssmd_dagster.day.calendar import TradingCalendar, parse_time
from ssmd_dagster.environments.models import Environment

_DateOf = Callable[[TradingCalendar, datetime], date]


def schedules_of(environment: Environment, jobs: Mapping[str, dg.JobDefinition]) -> list[dg.ScheduleDefinition]:
    """Return the schedules of an environment, none where it is not enabled."""
    if not environment.enabled:
        return []
    times = environment.schedule
    closing = "roll" if times.auto_roll else "end"
    return [
        _schedule(environment, jobs["start"], times.day_start, started_at, "Starts the day at day_start."),
        _schedule(
            environment,
            jobs[closing],
            times.day_end,
            closed_at,
            f"{closing.capitalize()}s the day whose window closes at day_end.",
        ),
    ]


def started_at(calendar: TradingCalendar, scheduled: datetime) -> date:
    """Return the day that a tick of `day_start` starts: the local date."""
    return calendar.local(_ns(scheduled)).date()


def closed_at(calendar: TradingCalendar, scheduled: datetime) -> date:
    """Return the day that a tick of `day_end` ends: the last one whose window is closed by then."""
    return calendar.date_at(_ns(scheduled)) - timedelta(days=1)


def _ns(at: datetime) -> int:
    return int(at.timestamp()) * 1_000_000_000


def _schedule(
    environment: Environment, job: dg.JobDefinition, at: str, date_of: _DateOf, description: str
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
        return dg.RunRequest(run_key=f"{job.name}:{day}", partition_key=day.isoformat())

    return tick
