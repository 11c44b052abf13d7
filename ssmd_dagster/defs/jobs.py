"""The jobs of an environment: start, end, roll and recover one trading day. The graphs are written once, for all environments.

The partition of a roll is the day that it ends. The next day is started first, beside it, and is ACTIVE at the boundary;
where that fails, the old day records on and the run fails with what a re-execution from failure repeats.

A simulated environment's day is that of its exchange's clock, the partition that of the host's: see `partitions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from ssmd_dagster.defs import ops
from ssmd_dagster.defs.partitions import trading_days
from ssmd_dagster.defs.resources import MAX_RUNTIME, DayDesk
from ssmd_dagster.environments.loader import Registry
from ssmd_dagster.environments.models import Environment

START_TIMEOUT_S = 15 * 60
SYNC_TIMEOUT_S = 10 * 60
END_TIMEOUT_S = 12 * 3600
"""`dagster/max_runtime`: an end, a roll or a recovery may wait for an archiver with a backlog and reads the whole day back."""


@dg.graph(description="Bring up what records a trading day, step by step.")
def start_day() -> None:
    """Put the steps of a start in order."""
    ops.health(ops.gateway(ops.archive(ops.capture(ops.sync(ops.take_day())))))


@dg.graph(description="Let the recording of a trading day finish, and prove its archive.")
def end_day() -> None:
    """Put the steps of an end in order."""
    ops.complete(ops.verify(ops.stop_capture(ops.flush(ops.drain()))))


@dg.graph(description="Start the next day beside the partition's, change over, then end the partition's.")
def roll_day() -> None:
    """Put the steps of both halves in order."""
    up = ops.health(ops.gateway(ops.archive(ops.capture(ops.sync(ops.take_day())))))
    ops.complete(ops.verify(ops.stop_capture(ops.flush(ops.drain(up)))))


@dg.graph(description="Bring a trading day back to where it should be.")
def recover_day() -> None:
    """One op: what it has to do depends on what it finds."""
    ops.recover()


@dg.graph(description="Build a day that is over from the exchange's history.")
def replay_day() -> None:
    """One op: start in replay mode, then end."""
    ops.replay()


@dg.graph(description="Read a COMPLETE day back and hold it against every account of it.")
def verify_day() -> None:
    """One op."""
    ops.verify_again()


@dg.graph(description="Bring the markets in from the exchange.")
def sync_markets() -> None:
    """One op."""
    ops.sync_markets()


def faults_job(registry: Registry) -> dg.JobDefinition:
    """Return the job that shows, in its description, what is wrong with the configuration; its run says what is left."""
    faults = "\n".join(f"- `{fault}`" for fault in registry.faults)

    @dg.graph(
        name="broken_configuration",
        description=f"Not everything in {registry.directory} can be used. Left out: "
        f"{', '.join(sorted(registry.broken)) or 'no environment'}.\n\n{faults}\n\nCorrect that and launch this job "
        "to see what is left; Dagster has all environments once its code server is started again.",
    )
    def show() -> None:
        ops.check_configuration()

    return show.to_job(executor_def=dg.in_process_executor)


def jobs_of(environment: Environment, resource_overrides: Mapping[str, Any]) -> dict[str, dg.JobDefinition]:
    """Return the jobs of an environment by verb, and `sync`, which brings in its markets."""
    name, days = environment.name, trading_days(environment)
    simulated = environment.simulator is not None
    clock = " Days follow the simulated exchange's clock, partitions the host's." if simulated else ""

    def job(
        graph: dg.GraphDefinition,
        description: str,
        timeout_s: int,
        *,
        rolls: bool = False,
        lanes: Mapping[str, str] = {"ssmd/lane": f"{environment.name}/live"},
    ) -> dg.JobDefinition:
        job_name = f"{environment.slug}_{graph.name}"
        return graph.to_job(
            name=job_name,
            description=f"{description}{clock}",
            partitions_def=days,
            resource_defs={"desk": DayDesk(environment=name, rolls=rolls), **resource_overrides},
            executor_def=dg.in_process_executor,
            tags={
                "ssmd/environment": name,
                **lanes,
                MAX_RUNTIME: str(timeout_s),
                # The Partitions tab counts runs by this tag, which a launch over GraphQL or the CLI does not add.
                "dagster/partition_set": f"{job_name}_partition_set",
            },
        )

    return {
        "start": job(
            start_day,
            f"Starts the trading day of the partition in {name}: security master, connector, archiver, gateway, health "
            "check, ACTIVE. One that is ACTIVE already is a success. A day that is over is replayed and left ACTIVE: "
            f"`{environment.slug}_replay_day` replays and ends it. The same as `ssmd day start {name}`.",
            START_TIMEOUT_S,
        ),
        "end": job(
            end_day,
            f"Ends the trading day of the partition in {name}: drain, flush, stop, verify everything in the store, "
            "COMPLETE with ledger and condition. A day that is COMPLETE already is a success, a failed end goes on "
            f"with the same job. The same as `ssmd day end {name}`.",
            END_TIMEOUT_S,
            # However long it proves a day, the next one's start does not wait for it.
            lanes={"ssmd/lane": f"{name}/end"},
        ),
        "roll": job(
            roll_day,
            f"Rolls {name} from the trading day of the partition to the next one: that is started beside it and ACTIVE at "
            f"the boundary, then the partition's day is ended. The same as `ssmd day roll {name}`.",
            END_TIMEOUT_S,
            rolls=True,
            # Before starts that somebody has launched over a range.
            lanes={"ssmd/lane": f"{name}/live", "dagster/priority": "1"},
        ),
        "recover": job(
            recover_day,
            f"Recovers the trading day of the partition in {name} from whatever was killed, to ACTIVE or on to COMPLETE. "
            f"It waits for no other run: the journal's epoch is the lock. The same as `ssmd day recover {name}`.",
            END_TIMEOUT_S,
            lanes={},
        ),
        "replay": job(
            replay_day,
            f"Replays the trading day of the partition in {name} from the exchange's history, and ends it: trades and markets, "
            "not order books. The one to backfill over a range; a day that is COMPLETE, and not empty, is left as it is. "
            f"The same as `ssmd day backfill {name} --from DATE --to DATE`.",
            END_TIMEOUT_S,
            lanes={"ssmd/replay-lane": f"{name}/replay"},
        ),
        "verify": job(
            verify_day,
            f"Verifies the COMPLETE trading day of the partition in {name} again, from what the store holds, and journals the "
            f"verdict. The same as `ssmd day verify {name}`.",
            END_TIMEOUT_S,
            lanes={"ssmd/replay-lane": f"{name}/replay"},
        ),
        "sync": job(
            sync_markets,
            f"Brings the markets of {name} in from the exchange. Every five minutes while a day is ACTIVE. The same as "
            f"`ssmd secmaster sync {name}`.",
            SYNC_TIMEOUT_S,
            lanes={"ssmd/lane": f"{name}/sync"},
        ),
    }
