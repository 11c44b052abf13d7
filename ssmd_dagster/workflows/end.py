"""End a trading day: let the clients and the archiver finish, stop recording, prove the archive, and say so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from typing import TYPE_CHECKING, Any

from ssmd_dagster.archive.drift import briefly
from ssmd_dagster.archive.layout import day_prefix
from ssmd_dagster.capture.archiver import COMPONENT as ARCHIVER
from ssmd_dagster.capture.control import control_subject, request
from ssmd_dagster.capture.gateway import COMPONENT as GATEWAY
from ssmd_dagster.capture.programs import audit_program, day_group, day_programs, is_connector
from ssmd_dagster.day.condition import condition, gaps_within
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.payloads import Completed, EndRequested
from ssmd_dagster.day.states import RECORDING, DayState, EventName
from ssmd_dagster.errors import ExitCode, RefusedError, SsmdError, UnreachableError
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.workflows.attempt import SKIPPED, Attempt, Step, Verb
from ssmd_dagster.workflows.damage import journal_losses, sort_out
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.late import late_of, tell_the_neighbours
from ssmd_dagster.workflows.lease import wait_until_gone
from ssmd_dagster.workflows.reconcile import name_recorder
from ssmd_dagster.workflows.recorded_on import take_over_gaps
from ssmd_dagster.workflows.replay import revision_note
from ssmd_dagster.workflows.retention import let_go_of_sealed_days
from ssmd_dagster.workflows.sealing import seal
from ssmd_dagster.workflows.start import create_streams, stop_capture, wait_until
from ssmd_dagster.workflows.trades import close_repaired_gaps, compare_trades, line_of
from ssmd_dagster.workflows.verify import (
    Telling,
    Verdict,
    journal_verdict,
    judge,
    read_back,
    reading_of,
    refuse,
    unexplained,
    with_filings,
)

if TYPE_CHECKING:
    from ssmd_dagster.workflows.normalize import Normalised

VERB = "end"
ARCHIVE_TIMEOUT_S = 4 * 3600.0
"""How long an archiver may take to catch up. Its progress is shown; `--force` is for those who cannot wait."""
FORCED_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
GATEWAY_COMING_UP_S = 15.0
"""How long a gateway that its supervisor has just started again may take to listen."""
OVERLAP_NS = 3_000_000_000
"""How long the old day's connector records on beyond the boundary of a roll."""
AUDIT_TIMEOUT_S = 3600.0
KILLED = -1
"""The supervisor's exit code of a program that a signal ended."""
POLL_S = 0.2
TELL_EVERY_S = 5.0


class AuditKilledError(SsmdError):
    """The audit of the spool was killed, as by a machine without memory; it begins anew and finishes what is left."""

    transient = True


async def may_end(attempt: Attempt) -> bool:
    """See whether the day may be ended; False where it is COMPLETE and sealed, or a roll leads on from a failed start.

    Raises `RefusedError` where it was never started or another actor is at work on it.
    """
    desk, date = attempt.desk, attempt.date
    await create_streams(desk)
    day = await desk.book.day(date)
    if day is None or day.state is DayState.PENDING or (day.state is DayState.FAILED and not day.ever_active):
        if day is not None and attempt.options.in_roll:
            attempt.tell("note", "drain", f"Trading day {date} never was ACTIVE: there is nothing to end")
            return False
        state = "was never started" if day is None else f"is {day.state} and never was ACTIVE"
        raise RefusedError(
            f"trading day {date} {state}, so there is nothing to end",
            where=desk.env,
            do=f"See `ssmd day history {desk.env}`, or start it: `ssmd day start {desk.env} --date {date}`.",
        )
    if day.state is DayState.COMPLETE:
        if day.is_unsealed:  # cut off between the completion and the seal
            readback, _books, _ids = await read_back(desk, day, lambda _key: None)
            made = await _tables(desk, day, lambda _text: None)
            await seal(desk, day, readback, made.tables, revision=made.revision, drift=briefly(made.drift))
        return False
    if day.state is DayState.STARTING:
        raise RefusedError(
            f"trading day {date} is being started by {day.actor}",
            where=desk.env,
            do=f"Wait for it, or, if that was killed: `ssmd day start {desk.env} --date {date}`, then end it.",
        )
    if day.state is DayState.ENDING:
        await wait_until_gone(desk, date, VERB)
    return True


async def take(attempt: Attempt) -> TradingDay:
    """Append ENDING. The first request speaks in the running epoch, so that its archiver goes on; a repeated one opens one.

    A day that another one took over from closes where that one opened, or, where days between the two were missed, at its
    own close.
    """
    desk, date = attempt.desk, attempt.date
    day = await desk.book.day(date)
    running = day is not None and day.state in RECORDING
    closes_ns = None
    successor = desk.book.book.successor(date)
    if day is not None and day.mode == "live" and successor is not None:
        closes_ns = min(desk.window(successor).open_ns, desk.calendar.close_ns(Date.fromisoformat(date)))
        # Both days record the seconds around the boundary, so that each has all of its own by the exchange's time.
        await wait_until(desk, closes_ns + OVERLAP_NS)
    elif day is not None:
        # Journaled also where it is the schedule's: no later edit of that moves a recorded day's window.
        closes_ns = min(desk.setting.clock(), desk.window(day).close_ns)
    if day is not None and running and day.mode == "live":
        await name_recorder(desk, day)
    data = EndRequested(close_ns=closes_ns, forced_by=desk.actor if attempt.options.force else None)
    return await desk.book.append(
        date,
        EventName.END_REQUESTED,
        epoch=day.epoch if running and day is not None else None,
        reason=attempt.options.reason,
        data=data,
    )


async def drain_gateway(attempt: Attempt) -> str:
    """Let the gateway's clients have what is queued for them; their connections are closed unless another day took over."""
    desk = attempt.desk
    if attempt.day.mode == "replay":
        return "a replay has no clients"
    states = await desk.supervisor.states(desk.env)
    if not any(state.name == GATEWAY and state.alive for state in states):
        return "the gateway does not run"
    answer = await _asked(
        attempt,
        request(
            desk.stores.nc,
            control_subject(desk.env, GATEWAY),
            "drain",
            coming_up_s=0.0 if attempt.options.force else GATEWAY_COMING_UP_S,
            date=attempt.date,
            close=desk.book.book.successor(attempt.date) is None,
        ),
    )
    return "" if answer is None else f"{answer['clients']} clients connected"


async def flush_archiver(attempt: Attempt) -> str:
    """Have the archiver close and store what it holds, so that little is left when the connector has stopped."""
    return await _flush(attempt, _Deadline(attempt))


async def stop_connector(attempt: Attempt) -> str:
    """Stop the connectors after their last batch, then audit their spool: count it and publish what the stream lacks."""
    desk, date = attempt.desk, attempt.date
    group = day_group(desk.env, date)
    for state in await desk.supervisor.states(group):
        if is_connector(state.name):  # of a day that was started with more of them than the environment says now, too
            await desk.supervisor.stop(group, state.name)
    code = await desk.supervisor.run_once(group, audit_program(desk.setting, date), AUDIT_TIMEOUT_S)
    if code != 0:
        log = desk.setting.home / "logs" / group / "audit.log"
        kind = {int(ExitCode.UNREACHABLE): UnreachableError, KILLED: AuditKilledError}.get(code, SsmdError)
        what = "was killed" if kind is AuditKilledError else f"ended with exit code {code}"
        raise kind(f"the audit of the spool {what}", where=desk.where(date), do=f"See {log}; the same command goes on.")
    day = await desk.book.day(date)
    return f"{day.messages or 0:,} messages recorded" if day is not None else ""


async def verify_archive(attempt: Attempt) -> str:
    """Archive what was last published, stop the archiver, and read everything back."""
    desk, date = attempt.desk, attempt.date
    if attempt.options.force:
        return f"{SKIPPED} (--force)"
    verdict = await examine(attempt)
    refuse(desk, date, verdict)
    attempt.readback, attempt.ledger, attempt.verdict = verdict.readback, verdict.ledger, verdict
    return f"{verdict.readback.records:,} records in {len(verdict.readback.segments)} segments read back"


async def examine(attempt: Attempt) -> Verdict:
    """Have the archiver finish, read everything back, ask the exchange for its trades, record those that are missing, judge.

    Where nothing differs, the tables are made. The verdict is journaled, and so is what became of the gaps.
    """
    desk, date = attempt.desk, attempt.date
    deadline = _Deadline(attempt)
    await desk.supervisor.ensure_group(day_group(desk.env, date), day_programs(desk.setting, date))
    await desk.supervisor.start(day_group(desk.env, date), ARCHIVER)
    while (status := await _archiver(attempt, "status", deadline))["backlog"]:
        await deadline.wait(attempt, _waited_for(f"{status['backlog']} batches to go", status))
    await _flush(attempt, deadline)
    day = await desk.book.day(date)
    assert day is not None
    day = await take_over_gaps(desk, day)
    telling = Telling(lambda text: attempt.tell("note", "verify", text))
    async with reading_of(desk, day, telling.read) as reading:
        await reading.read_new()
        losses = reading.losses()
        damage = await sort_out(desk, date, losses)
        day = await journal_losses(desk, day, damage.gone, losses)
        compared = await compare_trades(desk, day, reading.ids, repair=True, tell=telling.say)
        if compared.recorded:
            await _flush(attempt, deadline)
            await reading.read_new()
        await desk.supervisor.stop(day_group(desk.env, date), ARCHIVER)
        readback, books = await reading.finish()
    await close_repaired_gaps(desk, day, compared, line_of(compared, reading.ids), reading.ids)
    day = await desk.book.day(date)
    assert day is not None
    verdict = await judge(desk, day, readback, books, compared, reading.ids)
    verdict = verdict._replace(faults=(*verdict.faults, *damage.faults()), spoilt=bool(losses), lost=bool(damage.gone))
    if not verdict.faults:
        verdict = await _with_tables(desk, day, verdict, telling)
    await journal_verdict(desk, day, verdict)
    return verdict


async def _tables(desk: Desk, day: TradingDay, told: Callable[[str], None]) -> Normalised:
    from ssmd_dagster.workflows.normalize import normalise  # loads pyarrow, which most commands have no use for

    return await normalise(desk, day, told=told)


async def _with_tables(desk: Desk, day: TradingDay, verdict: Verdict, telling: Telling) -> Verdict:
    """Make the day's tables and file every record that was read back."""
    made = await _tables(desk, day, telling.say)
    await tell_the_neighbours(desk, made.late_elsewhere)
    ledger = with_filings(verdict.ledger, made.filings)
    return verdict._replace(
        ledger=ledger,
        faults=(*made.damaged, *unexplained(ledger)),
        tables=made.tables,
        revision=made.revision,
        late=late_of(day, made.late),
        drift=briefly(made.drift),
    )


async def record(attempt: Attempt) -> str:
    """Append COMPLETE with the ledger and the condition, and, unless forced, seal the day with its manifest."""
    desk, date = attempt.desk, attempt.date
    day = await desk.book.day(date)
    assert day is not None
    late = attempt.verdict.late if attempt.verdict is not None else day.late
    judged = condition(
        ledger=attempt.ledger,
        gaps=gaps_within(day.gaps, desk.window(day)),
        archived_records=attempt.readback.records if attempt.readback is not None else None,
        source=day.source,
        forced_by=desk.actor if attempt.options.force else None,
        late=late,
    )
    await desk.supervisor.remove_group(day_group(desk.env, date))
    archived = attempt.readback.archived if attempt.readback is not None else {}
    before = day.completed
    completed = await attempt.journal(
        EventName.COMPLETED,
        Completed(
            condition=judged.value,
            condition_reasons=judged.reasons,
            rules_version=judged.rules_version,
            ledger=attempt.ledger.to_json() if attempt.ledger is not None else None,
            messages=sum(n for name, n in archived.items() if name != SESSION) if archived else day.messages or 0,
            gaps=len(day.gaps),
            archive_url=desk.stores.raw.url(day_prefix(desk.setting.env.feed, date)),
            forced_by=desk.actor if attempt.options.force else None,
            late=late,
        ),
    )
    if before is not None:
        attempt.tell("note", "record", revision_note(before, completed))
    if attempt.verdict is not None:
        verdict = attempt.verdict
        await seal(desk, attempt.day, verdict.readback, verdict.tables, revision=verdict.revision, drift=verdict.drift)
    try:
        over = await let_go_of_sealed_days(desk)
    except SsmdError as error:  # the day is complete all the same; the next one's end tries again
        attempt.tell("note", "record", f"Stream and spool of older days are still there: {error}")
    else:
        if over:
            attempt.tell("note", "record", f"Stream and spool let go of {', '.join(over)}")
    return judged.value


async def finish(attempt: Attempt) -> TradingDay:
    """Return the day; recording its completion was the last step."""
    return attempt.desk.book.book.days[attempt.date]


class _Deadline:
    """How long the archiver may take, and when the operator was told last."""

    def __init__(self, attempt: Attempt) -> None:
        self.at = time.monotonic() + (FORCED_TIMEOUT_S if attempt.options.force else ARCHIVE_TIMEOUT_S)
        self._tell_at = time.monotonic() + TELL_EVERY_S

    async def wait(self, attempt: Attempt, what: str) -> None:
        """Wait a moment, telling the operator now and then; raise `UnreachableError` once the time is up."""
        now = time.monotonic()
        if now > self.at:
            raise UnreachableError(
                f"the archiver is not done in time: {what}",
                where=attempt.desk.where(attempt.date),
                do=f"See `ssmd day status {attempt.desk.env}`; the same command goes on, --force ends the day as degraded.",
            )
        if now > self._tell_at:
            self._tell_at = now + TELL_EVERY_S
            attempt.tell("note", "archive", what)
        await asyncio.sleep(POLL_S)


def _waited_for(what: str, status: dict[str, Any]) -> str:
    return what if status["error"] is None else f"{what}; the archiver stands still: {status['error']}"


async def _flush(attempt: Attempt, deadline: _Deadline) -> str:
    """Have the archiver store all that it holds now, and wait until it has."""
    desk = attempt.desk
    await desk.supervisor.ensure_group(day_group(desk.env, attempt.date), day_programs(desk.setting, attempt.date))
    await desk.supervisor.start(day_group(desk.env, attempt.date), ARCHIVER)
    try:
        asked = await _archiver(attempt, "flush", deadline)
        while (status := await _archiver(attempt, "status", deadline))["flushing"] or _is_another(status, asked):
            if not status["flushing"]:
                # The one that was asked was killed, and what it held is to be stored by this one.
                asked = await _archiver(attempt, "flush", deadline)
            await deadline.wait(attempt, _waited_for(f"{status['open_batches']} batches to be stored", status))
    except UnreachableError as error:
        if not attempt.options.force:
            raise
        return f"{SKIPPED}: {error.what}"
    return f"{status['messages']:,} messages archived"


def _is_another(status: dict[str, Any], asked: dict[str, Any]) -> bool:
    return bool(status.get("since_ns") != asked.get("since_ns"))


async def _archiver(attempt: Attempt, command: str, deadline: _Deadline) -> dict[str, Any]:
    """Ask the archiver; one that does not answer is given `ANSWER_TIMEOUT_S` to be restarted by its supervisor."""
    desk = attempt.desk
    give_up = min(time.monotonic() + ANSWER_TIMEOUT_S, deadline.at)
    while True:
        try:
            return await request(desk.stores.nc, control_subject(desk.env, ARCHIVER, attempt.date), command)
        except UnreachableError:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(POLL_S)


async def _asked(attempt: Attempt, asking: Any) -> dict[str, Any] | None:
    """Return the answer; with `--force` a component that does not answer is left out."""
    try:
        answer: dict[str, Any] = await asking
    except UnreachableError:
        if attempt.options.force:
            return None
        raise
    return answer


END = Verb(
    name=VERB,
    steps=(
        Step("drain", "Draining gateway connections", drain_gateway),
        Step("flush", "Flushing archiver buffers", flush_archiver),
        Step("stop", "Stopping connector", stop_connector),
        Step("verify", "Verifying archive completeness", verify_archive),
        Step("record", "Recording day completion", record),
    ),
    may_begin=may_end,
    take=take,
    finish=finish,
    clean_up=stop_capture,
    failed=EventName.END_FAILED,
)
