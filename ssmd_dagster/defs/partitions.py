"""An environment's trading days as Dagster's partitions: one key `YYYY-MM-DD` per date, from `first_day` to today.

Dagster counts dates by the host's clock. The days of a simulated environment follow its exchange's clock, which can be
shifted: then a key that Dagster offers need not be a day that the environment has (the first op refuses it and names
today). Which instants belong to a day is the calendar's business, not this module's.
"""

from __future__ import annotations

from datetime import datetime, time

import dagster as dg

from ssmd_dagster.environments.models import Environment


def trading_days(environment: Environment) -> dg.DailyPartitionsDefinition:
    """Return one partition per date in the environment's timezone; `end_offset=1` makes today one from 00:00 on."""
    return dg.DailyPartitionsDefinition(
        start_date=datetime.combine(environment.first_day, time()),
        timezone=environment.schedule.timezone,
        end_offset=1,
    )
