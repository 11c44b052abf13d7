"""Delete what Dagster keeps of old syncs of markets: 288 runs a day and environment, with their events and logs.

`python deploy/prune_runs.py [DAYS]`, with DAGSTER_HOME set; 30 days by default. Runs that lead days stay.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

_JOB = "_sync_markets"
_OVER = [DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED]


def prune(instance: DagsterInstance, before: datetime) -> int:
    """Delete the syncs that are over and were created before; return how many."""
    old = instance.get_runs(RunsFilter(statuses=_OVER, created_before=before))
    found = [run.run_id for run in old if run.job_name.endswith(_JOB)]
    for run_id in found:
        instance.compute_log_manager.delete_logs(prefix=[run_id])
        instance.delete_run(run_id)
    return len(found)


if __name__ == "__main__":
    days = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with DagsterInstance.get() as instance:
        print(f"{prune(instance, datetime.now(UTC) - timedelta(days=days))} runs deleted")  # noqa: T201 - a command
