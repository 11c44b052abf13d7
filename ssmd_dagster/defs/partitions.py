"""An environment's trading days as Dagster's partitions: one key `YYYY-MM-DD` per date, from `first_day` to today.

Dagster counts dates by the host's clock. The days of a simulated environment follow its exchange's clock, which can be
shifted: then a key that Dagster offers need not be a day that the environment has (the first op refuses it and names
today). Which instants belong to a day is the calendar's business, not this module's.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def request_run(date: str, run_key: str, job_name: str | None = None, tags: Mapping[str, str] = {}) -> dg.RunRequest:
    """Return the request of a run for a day, be it a partition or not.

    A roll starts the next day before its midnight, and a moved clock may be anywhere. Dagster refuses a key that is no partition,
    and fails the tick of all environments with it; one that stands in the tags it takes as it is.
    """
    return dg.RunRequest(
        run_key=run_key, job_name=job_name, partition_key=date, tags={**tags, "dagster/partition": date}
    )
