"""The ops of a trading day: each does one step of one verb and says what came of it.

Every environment's jobs share them; which environment is meant is in the resource `desk`. An op that runs in a new
process (a run that was re-executed from its failure) takes the day again under a new epoch and makes sure of the steps
before its own: see `workflows.attempt`. Rules do not belong here, nor does the order of ops, which is in `jobs`.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` with its own class.

import traceback
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import dagster as dg
import msgspec

from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.maintenance import described
from ssmd_dagster.day.states import DayState
from ssmd_dagster.defs.assets import ledger_table
from ssmd_dagster.defs.resources import DayDesk, DaySession, VerbName
from ssmd_dagster.environments.home import exchanges_dir
from ssmd_dagster.environments.loader import broken_configuration, load_registry
from ssmd_dagster.errors import ExitCode, SsmdError
from ssmd_dagster.stores.secmaster import SyncResult
from ssmd_dagster.workflows.attempt import Attempt
from ssmd_dagster.workflows.backfill import is_done, replay_day
from ssmd_dagster.workflows.desk import Desk, Progress, Report
from ssmd_dagster.workflows.secmaster import sync as sync_security_master
from ssmd_dagster.workflows.verify_sealed import verify_sealed
from ssmd_dagster.workflows.views import ledger_of

_T = TypeVar("_T")

Metadata = dict[str, dg.MetadataValue[Any]]
_Work = Callable[[DaySession, str | None, Report], Attempt]


def _take(session: DaySession, partition: str | None, show: Report) -> Attempt:
    return session.begin("start", partition, show)


def _step(verb: VerbName, name: str) -> _Work:
    return lambda session, partition, show: session.step(verb, partition, name, show)


def _last_step(verb: VerbName, name: str) -> _Work:
    return lambda session, partition, show: session.last_step(verb, partition, name, show)


def _op(name: str, verb: VerbName, work: _Work, description: str) -> dg.OpDefinition:
    @dg.op(
        name=name,
        description=description,
        ins={"after": dg.In(dg.Nothing, description="The op before this one, where there is one, is done.")},
        out=dg.Out(dg.Nothing),
        required_resource_keys={"desk"},
    )
    def body(context: dg.OpExecutionContext) -> None:
        desk: DayDesk = context.resources.desk
        partition = context.partition_key if context.has_partition_key else None
        seen: list[Progress] = []

        def show(progress: Progress) -> None:
            seen.append(progress)
            _log_progress(context, progress)

        try:
            attempt = work(desk.session, partition, show)
        except SsmdError as error:
            _tell_failure(context, error)
            raise _failure(error, verb, desk.environment, partition, seen) from None
        context.add_output_metadata(_metadata(context, attempt, seen))

    return body


take_day = _op(
    "take_day",
    "start",
    _take,
    "Takes the day: appends STARTING to the journal and holds the lease. Refused where the day's state does not allow "
    "a start or somebody else is at work on it; a day that is ACTIVE already is a success.",
)
sync = _op("sync", "start", _step("start", "secmaster"), "Syncs the security master: the markets to record.")
capture = _op(
    "capture",
    "start",
    _step("start", "connector"),
    "Brings the connectors up and waits until the exchange has acknowledged all subscriptions.",
)
archive = _op("archive", "start", _step("start", "archiver"), "Brings the archiver up.")
gateway = _op("gateway", "start", _step("start", "gateway"), "Brings the gateway up; one that runs keeps its clients.")
health = _op(
    "health",
    "start",
    _last_step("start", "health"),
    "Sees that frames flow, or that the exchange says that it is closed, and appends ACTIVE.",
)

drain = _op(
    "drain",
    "end",
    _step("end", "drain"),
    "Takes the day for its end (ENDING), then lets the gateway's clients have what is queued for them. A day that is "
    "COMPLETE already is a success.",
)
flush = _op("flush", "end", _step("end", "flush"), "Has the archiver store all that it holds.")
stop_capture = _op(
    "stop_capture",
    "end",
    _step("end", "stop"),
    "Stops the connectors after their last batch and audits what they kept on disk.",
)
verify = _op(
    "verify",
    "end",
    _step("end", "verify"),
    "Archives what is left, reads everything back from the store and draws up the ledger. Fails where a difference has "
    "no explanation.",
)
complete = _op(
    "complete",
    "end",
    _last_step("end", "record"),
    "Appends COMPLETE with the ledger and the condition and seals the day with its manifest.",
)


recover = _op(
    "recover",
    "recover",
    lambda session, partition, show: session.go("recover", partition, show),
    "Asks the journal and the processes what is true, and goes on from there: brings dead processes back under a new epoch, "
    "or finishes a start or an end that was cut off. A day with nothing wrong is a success.",
)


@dg.op(
    name="replay_from_exchange",
    description="Replays the day from the exchange's history and ends it. A day that is COMPLETE already, and not "
    "empty, is left as it is.",
    out=dg.Out(dg.Nothing),
    required_resource_keys={"desk"},
)
def replay(context: dg.OpExecutionContext) -> None:
    """Start in replay mode, then end."""

    async def work(desk: Desk, date: str) -> tuple[TradingDay, bool]:
        before = await desk.book.day(date)
        already = before is not None and is_done(before)
        limit_s = context.resources.desk.session.limit_s
        return await replay_day(desk, date, reason=f"run {context.run_id[:8]}", limit_s=limit_s), already

    day, already = _called(context, work, "backfill")
    _tell_result(context, day.date, _state(day, already=already))
    context.add_output_metadata(_completion(context, day))


@dg.op(
    name="verify_from_store",
    description="Reads a COMPLETE day back from the store, draws its ledger up again and journals the verdict. Nothing that is "
    "stored is rewritten.",
    out=dg.Out(dg.Nothing),
    required_resource_keys={"desk"},
)
def verify_again(context: dg.OpExecutionContext) -> None:
    """Verify a sealed day; faults fail the run, after they are journaled."""
    found = _called(
        context, lambda desk, date: verify_sealed(desk, date, lambda text: context.log.debug(text)), "verify"
    )
    _tell_result(context, found.date, f"{found.condition}, {len(found.faults)} faults (r{found.revision})")
    metadata: Metadata = {
        "condition": dg.MetadataValue.text(found.condition),
        "revision": dg.MetadataValue.int(found.revision),
        "ledger": ledger_table(found.ledger),
        "examined": dg.MetadataValue.json(found.examined),
    }
    if found.faults:
        raise dg.Failure(description="\n".join(found.faults), metadata=metadata, allow_retries=False)
    context.add_output_metadata(metadata)


@dg.op(
    name="sync_from_exchange",
    description="Reads the selected markets from the exchange into the security master, while a day is ACTIVE.",
    out=dg.Out(dg.Nothing),
    required_resource_keys={"desk"},
)
def sync_markets(context: dg.OpExecutionContext) -> None:
    """Sync the security master and observe what changed."""

    async def work(desk: Desk, date: str) -> tuple[SyncResult, str]:
        result = await sync_security_master(desk, date)
        return result, described(await desk.stores.cache.maintenance(), desk.calendar)

    result, announced = _called(context, work, None)
    counts: Metadata = {name: dg.MetadataValue.int(count) for name, count in msgspec.structs.asdict(result).items()}
    if announced:
        counts["maintenance_announced"] = dg.MetadataValue.text(announced)
    context.log_event(
        dg.AssetObservation(
            [context.resources.desk.environment, "security_master"],
            partition=context.partition_key,
            description=f"{result.total} markets: {result.added} new, {result.updated} changed, {result.settled} settled",
            metadata=counts,
        )
    )
    context.add_output_metadata(counts)


def _called(
    context: dg.OpExecutionContext, work: Callable[[Desk, str], Coroutine[Any, Any, _T]], verb: str | None
) -> _T:
    """Do a whole workflow for the run's partition; fail as an op does."""
    desk: DayDesk = context.resources.desk
    partition = context.partition_key if context.has_partition_key else None
    try:
        return desk.session.call(partition, work, lambda progress: _log_progress(context, progress))
    except SsmdError as error:
        _tell_failure(context, error)
        raise _failure(error, verb, desk.environment, partition, []) from None


def _tell_result(context: dg.OpExecutionContext, date: str, text: str) -> None:
    """Put what a run did where the list of runs shows it, beside the partition; of another day (a roll) with its date."""
    context.log.info(f"{date}: {text}")
    shown = text if context.has_partition_key and date == context.partition_key else f"{date} {text}"
    context.instance.add_run_tags(context.run_id, {"ssmd/result": shown[:250]})


def _state(day: TradingDay, *, already: bool) -> str:
    if already and day.state is DayState.FAILED:
        return "FAILED to start, so there is nothing to end"
    condition = f", {day.condition}" if day.condition else ""
    return f"{'already ' if already else ''}{day.state}{condition}"


@dg.op(description="Reads the configuration again and fails with what is wrong with it.")
def check_configuration(context: dg.OpExecutionContext) -> None:
    """Fail with every fault of the configuration as it is by now."""
    faults = load_registry().faults
    if faults:
        error = broken_configuration(faults, where=str(exchanges_dir()))
        raise dg.Failure(
            description=str(error),
            metadata={
                "exit_code": dg.MetadataValue.int(int(error.exit_code)),
                "command": dg.MetadataValue.text("ssmd env validate"),
            },
            allow_retries=False,
        )
    context.log.info("Nothing is wrong any more. Dagster has all environments once its code server is started again.")


def _tell_failure(context: dg.OpExecutionContext, error: SsmdError) -> None:
    """Put the cause where the list of runs shows it; where it came from is kept for those who look for it."""
    context.instance.add_run_tags(context.run_id, {"ssmd/result": f"failed: {error}"[:250]})
    context.log.debug("".join(traceback.format_exception(error)))


def _log_progress(context: dg.OpExecutionContext, progress: Progress) -> None:
    detail = f": {progress.detail}" if progress.detail else ""
    match progress.kind:
        case "started":  # Dagster says so of the step already
            context.log.debug(f"{progress.date} {progress.title}")
        case "failed":
            context.log.error(f"{progress.date} {progress.title} failed{detail}")
        case "note":
            context.log.info(f"{progress.date} {progress.title}{detail}")
        case "done" | "skipped":
            context.log.info(f"{progress.date} {progress.title}: {progress.kind}{detail}")


def _failure(
    error: SsmdError, verb: str | None, environment: str, partition: str | None, seen: list[Progress]
) -> dg.Failure:
    """Return the failure as Dagster shows it: what, where, what to do, and the command that does it."""
    date = next((progress.date for progress in seen), partition)
    command = _next_command(error.exit_code, verb, environment, date)
    metadata: Metadata = {
        "exit_code": dg.MetadataValue.int(int(error.exit_code)),
        "what": dg.MetadataValue.text(error.what),
        "where": dg.MetadataValue.text(error.where),
        "do": dg.MetadataValue.text(error.do),
        "command": dg.MetadataValue.text(command),
    }
    return dg.Failure(description=str(error), metadata=metadata, allow_retries=False)


def _next_command(code: ExitCode, verb: str | None, environment: str, date: str | None) -> str:
    """Return the command that brings on a day whose run failed; `verb` None: the run was of no day's verb."""
    if code is ExitCode.CONFIGURATION:
        return f"ssmd env validate {environment}"
    if verb is None:
        return f"ssmd secmaster sync {environment}"
    if date is None or code in (ExitCode.USAGE, ExitCode.NOT_FOUND, ExitCode.REFUSED):
        return f"ssmd day status {environment}"
    if verb == "backfill":
        return f"ssmd day backfill {environment} --from {date} --to {date}"
    return f"ssmd day {verb} {environment} --date {date}"


def _metadata(context: dg.OpExecutionContext, attempt: Attempt, seen: list[Progress]) -> Metadata:
    """Return what an operator wants to see of a step that is done; log what must not be overlooked."""
    day = attempt.day
    metadata: Metadata = {
        "day": dg.MetadataValue.text(day.date),
        "state": dg.MetadataValue.text(day.state.value),
        "epoch": dg.MetadataValue.text(str(day.epoch)),
    }
    if attempt.verb.name == "start" and day.mode == "replay" and day.state is DayState.ACTIVE:
        replaying = f"{day.env.replace('-', '_')}_replay_day"
        context.log.warning(
            f"{day.date} is over: this replays it and leaves it ACTIVE. {replaying} replays and ends it."
        )
    if attempt.already or day.state in (DayState.ACTIVE, DayState.COMPLETE):
        _tell_result(context, day.date, _state(day, already=attempt.already))
    if attempt.already:
        metadata["already"] = dg.MetadataValue.bool(True)
    metadata |= {
        progress.title: dg.MetadataValue.text(progress.detail)
        for progress in seen
        if progress.kind == "done" and progress.detail
    }
    ledger = attempt.ledger
    if day.state is DayState.COMPLETE:
        ledger = ledger_of(day)
        metadata |= _completion(context, day)
    if ledger is not None and ledger.channels:
        metadata["ledger"] = ledger_table(ledger)
    return metadata


def _completion(context: dg.OpExecutionContext, day: TradingDay) -> Metadata:
    metadata: Metadata = {
        "condition": dg.MetadataValue.text(day.condition or ""),
        "messages": dg.MetadataValue.int(day.messages or 0),
        "gaps": dg.MetadataValue.int(len(day.gaps)),
        "command": dg.MetadataValue.text(f"ssmd day show {day.env} {day.date}"),
    }
    if day.condition_reasons:
        metadata["condition_reasons"] = dg.MetadataValue.md("\n".join(f"- {text}" for text in day.condition_reasons))
    if day.archive_url is not None:
        kind = dg.MetadataValue.text if "://" in day.archive_url else dg.MetadataValue.path
        metadata["archive"] = kind(day.archive_url)
    if day.condition in ("degraded", "missing"):
        context.log.warning(f"{day.date} is COMPLETE, but {day.condition}: {'; '.join(day.condition_reasons)}")
    return metadata
