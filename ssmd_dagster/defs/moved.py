"""The daily schedules of simulated environments whose exchange's clock is moved, fired by that clock.

Dagster's schedules follow the host's clock. A simulated environment's days follow its exchange's, which can be set to another
day, or led through a week in minutes: there its schedules do nothing, and this sensor asks for the same runs when the
exchange's clock passes the same times. Like a schedule it makes up for the latest of several missed ticks only. What is due is
the calendar's; whoever was not asked for is found by `reconcile`.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` with its own class.

import json
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Literal, NamedTuple

import dagster as dg

from ssmd_dagster.day.calendar import TradingCalendar
from ssmd_dagster.defs.held import held_back, look
from ssmd_dagster.defs.partitions import request_run
from ssmd_dagster.defs.watch import Watch
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.workflows.roll import LEAD_S

EVERY_S = 10

_NS = 1_000_000_000


class Due(NamedTuple):
    """A verb whose time has come for a day."""

    verb: Literal["roll", "end", "start"]
    date: date


def passed(calendar: TradingCalendar, after_ns: int, now_ns: int) -> list[Due]:
    """Return the schedules whose time lies in `(after_ns, now_ns]`, each for its latest day, in the order to ask for them."""
    today = calendar.date_at(now_ns)
    ends: Literal["roll", "end"] = "roll" if calendar.auto_roll else "end"
    lead_ns = LEAD_S * _NS if calendar.auto_roll else 0
    found = []
    for back in (0, 1):
        day = today - timedelta(days=back)
        if day >= calendar.first_day:
            found.append((calendar.close_ns(day) - lead_ns, Due(ends, day)))
            found.append((calendar.start_due_ns(day), Due("start", day)))
    latest = {due.verb: (at_ns, due) for at_ns, due in sorted(found) if at_ns <= now_ns}
    return sorted((due for at_ns, due in latest.values() if at_ns > after_ns), key=lambda due: due.verb == "start")


def moved_clocks_sensor(
    environments: Mapping[str, Environment], jobs: Mapping[str, Mapping[str, dg.JobDefinition]], watch: Watch
) -> dg.SensorDefinition:
    """Return the sensor of the simulated environments; its cursor is the exchange's time by environment."""

    @dg.sensor(
        name="moved_clocks",
        minimum_interval_seconds=EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        jobs=[jobs[name][verb] for name in environments for verb in ("start", "roll", "end")],
        description="Fires the daily schedules of simulated environments by their exchange's clock, where that was moved.",
    )
    def moved_clocks(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        seen: dict[str, int] = json.loads(context.cursor or "{}")

        found = watch.look(environments, look, actor="sensor:moved_clocks")
        requests: list[dg.RunRequest] = []
        said: list[str] = []
        for name, answer in found.items():
            if answer.value is None:
                said.append(f"{name} cannot be looked at: {answer.error}")
                continue
            now = answer.value
            after_ns, seen[name] = seen.get(name, now.now_ns), now.now_ns
            if not now.moved:
                said.append(f"{name} follows the host's clock, and so do its schedules")
                continue
            if (why := held_back(environments[name], now, connects=True)) is not None:
                said.append(why)
            for due in passed(environments[name].calendar(), after_ns, now.now_ns):
                if held_back(environments[name], now, connects=due.verb != "end") is not None:
                    said.append(f"the {due.verb} of {due.date} is left to reconcile, after it")
                    continue
                job = jobs[name][due.verb]
                requests.append(request_run(due.date.isoformat(), f"{job.name}:{due.date}", job.name))
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else dg.SkipReason("; ".join(said) or "nothing is due"),
            cursor=json.dumps(seen, sort_keys=True),
        )

    return moved_clocks
