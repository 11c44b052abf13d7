"""The ops of a trading day: each does one step of one verb and says what came of it.

Every environment's jobs share them; which environment is meant is in the resource `desk`. An op that runs in a new
process (a run that was re-executed from its failure) takes the day again under a new epoch and makes sure of the steps
before its own: see `workflows.attempt`. Rules do not belong here, nor does the order of ops, which is in `jobs`.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` with its own class.

from collections.abc import Callable
from typing import Any

import dagster as dg

from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.states import DayState
from ssmd_dagster.defs.resources import DayDesk, DaySession, VerbName
from ssmd_dagster.environments.home import exchanges_dir
from ssmd_dagster.environments.loader import broken_configuration, load_registry
from ssmd_dagster.errors import ExitCode, SsmdError
from ssmd_dagster.workflows.attempt import Attempt
from ssmd_dagster.workflows.desk import Progress, Report
from ssmd_dagster.workflows.views import ledger_of

Metadata = dict[str, dg.MetadataValue[Any]]
_Work = Callable[[DaySession, str | None, Report], Attempt]

_LEDGER_COLUMNS = ("received", "spooled", "published", "archived")


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
            raise _failure(error, verb, desk.environment, partition, seen) from error
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
    error: SsmdError, verb: VerbName, environment: str, partition: str | None, seen: list[Progress]
) -> dg.Failure:
    """Return the failure as Dagster shows it: what, where, what to do, and the command that does it."""
    date = next((progress.date for progress in seen), partition)
    if error.exit_code is ExitCode.CONFIGURATION:
        command = f"ssmd env validate {environment}"
    elif date is None or error.exit_code in (ExitCode.USAGE, ExitCode.NOT_FOUND, ExitCode.REFUSED):
        command = f"ssmd day status {environment}"
    else:
        command = f"ssmd day {verb} {environment} --date {date}"
    metadata: Metadata = {
        "exit_code": dg.MetadataValue.int(int(error.exit_code)),
        "what": dg.MetadataValue.text(error.what),
        "where": dg.MetadataValue.text(error.where),
        "do": dg.MetadataValue.text(error.do),
        "command": dg.MetadataValue.text(command),
    }
    return dg.Failure(description=str(error), metadata=metadata, allow_retries=False)


def _metadata(context: dg.OpExecutionContext, attempt: Attempt, seen: list[Progress]) -> Metadata:
    """Return what an operator wants to see of a step that is done; log what must not be overlooked."""
    day = attempt.day
    metadata: Metadata = {
        "day": dg.MetadataValue.text(day.date),
        "state": dg.MetadataValue.text(day.state.value),
        "epoch": dg.MetadataValue.text(str(day.epoch)),
    }
    if attempt.already:
        context.log.info(f"{day.date} is {day.state.value} already; nothing is done")
        metadata["already"] = dg.MetadataValue.bool(True)
    metadata |= {
        progress.title: dg.MetadataValue.text(progress.detail)
        for progress in seen
        if progress.kind == "done" and progress.detail
    }
    ledger = attempt.ledger
    if day.state is DayState.COMPLETE:
        ledger = ledger_of(day)
        metadata |= _completion(context, attempt)
    if ledger is not None and ledger.channels:
        metadata["ledger"] = _table(ledger)
    return metadata


def _completion(context: dg.OpExecutionContext, attempt: Attempt) -> Metadata:
    day = attempt.day
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


def _table(ledger: Ledger) -> dg.TableMetadataValue:
    columns = [dg.TableColumn("channel", "string"), *(dg.TableColumn(name, "int") for name in _LEDGER_COLUMNS)]
    records = [
        dg.TableRecord({"channel": sheet.channel, **{name: getattr(sheet, name) for name in _LEDGER_COLUMNS}})
        for sheet in ledger.channels
    ]
    return dg.MetadataValue.table(records=records, schema=dg.TableSchema(columns=columns))
