"""Events folded into trading days: the only way in which a day's state comes about.

`new_event` is the gate before an append, `fold` the reading of the log; both follow the same rules, so what passed the
gate folds. Not here: reading and writing the journal, which belongs to the stores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from ssmd_dagster.day import payloads
from ssmd_dagster.day.events import (
    EMPTY_BOOK,
    BadEventError,
    Book,
    DayEvent,
    Failure,
    Gap,
    JournalBrokenError,
    Paused,
    Step,
    TradingDay,
)
from ssmd_dagster.day.states import (
    ENVIRONMENT_EVENTS,
    OPENS_EPOCH,
    RECORDING,
    TRANSITIONS,
    DayState,
    EventName,
    illegal_transition,
    next_state,
)
from ssmd_dagster.errors import RefusedError

_TOLD_BY_PROCESSES = frozenset({EventName.CHECKPOINT, EventName.GAP_OPENED, EventName.GAP_CLOSED})
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")


class StaleEpochError(RefusedError):
    """The actor's epoch is not (or no longer) the day's: another attempt has taken the day."""


def owns(day: TradingDay, epoch: int | None) -> bool:
    """Say whether `epoch` is the day's current one."""
    return epoch is not None and day.epoch == epoch


def check_epoch(day: TradingDay | None, event: DayEvent) -> None:
    """Refuse an event of an epoch that does not hold the day; an event that opens an epoch has none.

    Raises:
        StaleEpochError: Another attempt holds the day; the text names it.
    """
    if event.event in ENVIRONMENT_EVENTS or (event.epoch is None and event.event in OPENS_EPOCH):
        return
    held = None if day is None else day.epoch
    if event.epoch != held:
        holder = "" if day is None or held is None else f", which {day.actor} holds"
        raise StaleEpochError(
            f"`{event.event}` was made in epoch {event.epoch}; the day is in epoch {held}{holder}",
            where=f"{event.env} {event.date}",
            do="Read the journal again and take the day before going on",
        )


def check_event(day: TradingDay | None, event: DayEvent) -> None:
    """Refuse an event that the journal may not hold after `day`.

    Raises:
        IllegalTransitionError: The state does not take it.
        StaleEpochError: It belongs to another attempt.
        BadEventError: Its `data`, date, or states are not those of such an event.
    """
    _checked(day, event)


def new_event(
    day: TradingDay | None,
    event: EventName,
    *,
    id: str,
    env: str,
    date: str,
    epoch: int | None,
    at_ns: int,
    actor: str,
    reason: str | None = None,
    data: Mapping[str, Any] | payloads.Payload | None = None,
) -> DayEvent:
    """Make the next event of a day, with the states filled in, or refuse it.

    Args:
        day: The day as folded; None if it has no event yet (and for `paused` and `resumed`).
        event: What happened.
        id: A unique id, made by the caller; it is what makes a retried append recognisable.
        env: The environment's name.
        date: The day, `YYYY-MM-DD`.
        epoch: The epoch that the actor holds; None for events that open one, or for a day that has none.
        at_ns: Time of the event.
        actor: `cli:alice@host`, `dagster:RUN_ID` or `sensor:NAME`.
        reason: The operator's words.
        data: As `payloads.SHAPES` has it.

    Raises:
        IllegalTransitionError: The state does not take it.
        StaleEpochError: `epoch` does not hold the day.
        BadEventError: `data` or `date` has the wrong shape.
    """
    state = None if day is None else day.state
    transition = TRANSITIONS.get((state, event))
    made = DayEvent(
        id=id,
        env=env,
        date=date,
        event=event,
        from_=None if transition is None else state,
        to=None if transition is None else transition.to,
        epoch=epoch,
        at_ns=at_ns,
        actor=actor,
        reason=reason,
        data={} if data is None else msgspec.to_builtins(data),
    )
    check_event(day, made)
    return made


def fold_day(day: TradingDay | None, event: DayEvent, seq: int) -> TradingDay:
    """Return the day after `event`, whose sequence is `seq`; `day` is None before its first event.

    Raises:
        JournalBrokenError: The log holds what it can not hold; names `seq`.
    """
    where = f"{event.env} {event.date}"
    if event.event in ENVIRONMENT_EVENTS:
        raise JournalBrokenError(seq, f"`{event.event}` belongs to no day", where=where)
    try:
        data = _checked(day, event)
    except (RefusedError, BadEventError) as error:
        raise JournalBrokenError(seq, error.what, where=where) from error
    if day is None:
        return TradingDay(
            env=event.env,
            date=event.date,
            state=DayState.PENDING,
            actor=event.actor,
            first_seq=seq,
            last_seq=seq,
            updated_ns=event.at_ns,
            acted_ns=event.at_ns,
        )
    if event.epoch is None and event.event in OPENS_EPOCH:
        day = replace(day, epoch=seq, epochs=(*day.epochs, seq), actor=event.actor, steps=(), failure=None)
    effect = _EFFECTS.get(event.event)
    changes = {} if effect is None else effect(day, event, data)
    acted_ns = day.acted_ns if event.event in _TOLD_BY_PROCESSES else event.at_ns
    return replace(day, state=event.to or day.state, last_seq=seq, updated_ns=event.at_ns, acted_ns=acted_ns, **changes)


def fold(events: Iterable[tuple[int, DayEvent]], onto: Book = EMPTY_BOOK) -> Book:
    """Fold `(sequence, event)` pairs, in order, onto what was folded before.

    Raises:
        JournalBrokenError: Two environments in one journal, sequences that do not rise, or see `fold_day`.
    """
    days = dict(onto.days)
    env, current, paused, tip_seq = onto.env, onto.current, onto.paused, onto.tip_seq
    for seq, event in events:
        if seq <= tip_seq:
            raise JournalBrokenError(seq, f"it follows sequence {tip_seq}", where=event.env)
        if env is not None and event.env != env:
            raise JournalBrokenError(seq, f"an event of {event.env} in the journal of {env}", where=env)
        env, tip_seq = event.env, seq
        if event.event is EventName.PAUSED:
            paused = Paused(actor=event.actor, since_ns=event.at_ns, reason=event.reason)
        elif event.event is EventName.RESUMED:
            paused = None
        else:
            day = days[event.date] = fold_day(days.get(event.date), event, seq)
            if _becomes_current(day, event.event, days.get(current or "")):
                current = event.date
    return Book(env=env, days=days, current=current, paused=paused, tip_seq=tip_seq)


def _becomes_current(day: TradingDay, event: EventName, before: TradingDay | None) -> bool:
    """Say whether a live day becomes the current one: as it starts, or, where another one still runs, once it is ACTIVE."""
    if day.mode != "live":
        return False
    if event is EventName.STARTED:
        return True
    return event is EventName.START_REQUESTED and (before is None or before.state not in RECORDING)


def _checked(day: TradingDay | None, event: DayEvent) -> Any:
    """Do what `check_event` promises and return the event's data in its shape."""
    where = f"{event.env} {event.date}"
    if event.event in ENVIRONMENT_EVENTS:
        return _shaped(event, where)
    state = None if day is None else day.state
    to = next_state(state, event.event, where=where)
    if day is None:
        if not _DATE.match(event.date):
            raise BadEventError(f"a day's date is written YYYY-MM-DD, got {event.date!r}", where=event.env)
    else:
        if (event.env, event.date) != (day.env, day.date):
            raise BadEventError(f"an event of another day than {day.env} {day.date}", where=where)
        wants_active = {EventName.END_REQUESTED: True, EventName.MISSED: False}.get(event.event, day.ever_active)
        if state is DayState.FAILED and wants_active != day.ever_active:
            raise illegal_transition(state, event.event, where=where)
    if (state, event.event) in TRANSITIONS:
        if (event.from_, event.to) != (state, to):
            raise BadEventError(
                f"`{event.event}` says {event.from_} → {event.to}, it is {state} → {to}",
                where=where,
            )
        opens = event.event in OPENS_EPOCH
        if opens and event.epoch is not None and state not in RECORDING:
            raise BadEventError(f"`{event.event}` opens an epoch here, so its own must be null", where=where)
        if event.event is EventName.RECOVERED and event.epoch is not None:
            raise BadEventError("`recovered` opens an epoch, so its own must be null", where=where)
    check_epoch(day, event)
    data = _shaped(event, where)
    if day is not None:
        _check_against_day(day, event.event, data, where)
    return data


def _shaped(event: DayEvent, where: str) -> Any:
    try:
        return msgspec.convert(event.data, payloads.SHAPES[event.event])
    except msgspec.ValidationError as error:
        raise BadEventError(f"the data of `{event.event}` has the wrong shape: {error}", where=where) from error


def _check_against_day(day: TradingDay, name: EventName, data: Any, where: str) -> None:
    """Refuse revisions that go back and gaps that are opened twice or closed unopened."""
    if name is EventName.START_REQUESTED:
        least = day.revision + 1 if day.state is DayState.COMPLETE else day.revision
        if data.revision < least:
            raise BadEventError(f"revision {data.revision} where at least {least} is due", where=where)
    elif name is EventName.SEALED:
        if data.revision < day.revision:
            raise BadEventError(f"revision {data.revision} was sealed after {day.revision}", where=where)
    elif name is EventName.GAP_OPENED:
        if data.gap_id in day.gap_by_id:
            raise BadEventError(f"the gap {data.gap_id} was opened before", where=where)
    elif name is EventName.GAP_CLOSED and data.gap_id not in day.gap_by_id:
        raise BadEventError(f"the gap {data.gap_id} was never opened", where=where)


def _start_requested(day: TradingDay, event: DayEvent, data: payloads.StartRequested) -> dict[str, Any]:
    changes: dict[str, Any] = {"mode": data.mode, "revision": data.revision, "ended_ns": None}
    if data.mode == "live":  # a replay opens no window again: where a roll by hand ended the day, the next one begins
        changes["close_ns"] = None
        changes["recorded_until_ns"] = None
    if not day.ever_active:  # what an attempt that never recorded anything claimed does not hold the window open
        changes["open_ns"] = data.open_ns
    if data.mode == "replay":
        changes["started_ns"] = None
    return changes


def _started(day: TradingDay, event: DayEvent, data: payloads.Started) -> dict[str, Any]:
    changes: dict[str, Any] = {"ever_active": True, "failure": None, "recorded": day.recorded or day.mode == "live"}
    if not day.ever_active and data.open_ns is not None:
        changes["open_ns"] = data.open_ns
    if day.started_ns is None:
        changes["started_ns"] = event.at_ns
    if day.recorded_from_ns is None and day.mode == "live":
        changes["recorded_from_ns"] = event.at_ns
    return changes


def _failed(day: TradingDay, event: DayEvent, data: payloads.Failed) -> dict[str, Any]:
    return {
        "failure": Failure(error=data.error, step=data.step, exit_code=data.exit_code, transient=data.transient),
    }


def _missed(day: TradingDay, event: DayEvent, data: payloads.Missed) -> dict[str, Any]:
    return {
        "failure": Failure(error=event.reason or "missed", step=None, exit_code=1, transient=False),
        "recorded_with": data.recorded_with,
    }


def _error_raised(day: TradingDay, event: DayEvent, data: payloads.ErrorRaised) -> dict[str, Any]:
    return {"failure": Failure(error=data.error, step=data.component, exit_code=1, transient=True)}


def _gave_up(day: TradingDay, event: DayEvent, data: payloads.GaveUp) -> dict[str, Any]:
    return {"failure": Failure(error=data.error, step="recover", exit_code=data.exit_code, transient=data.transient)}


def _end_requested(day: TradingDay, event: DayEvent, data: payloads.EndRequested) -> dict[str, Any]:
    recorded_until_ns = day.recorded_until_ns
    if recorded_until_ns is None and day.mode == "live":
        recorded_until_ns = event.at_ns
    return {
        "failure": None,
        "actor": event.actor,
        "ended_ns": day.ended_ns if day.ended_ns is not None else event.at_ns,
        "recorded_until_ns": recorded_until_ns,
        "close_ns": day.close_ns if day.close_ns is not None else data.close_ns,
    }


def _completed(day: TradingDay, event: DayEvent, data: payloads.Completed) -> dict[str, Any]:
    return {
        "completed": data,
        "condition": data.condition,
        "condition_reasons": data.condition_reasons,
        "rules_version": data.rules_version,
        "messages": data.messages,
        "ledger": data.ledger if data.ledger is not None else day.ledger,
        "late": data.late if data.late is not None else day.late,
    }


def _step_started(day: TradingDay, event: DayEvent, data: payloads.Step) -> dict[str, Any]:
    return {"steps": _with_step(day, Step(step=data.step, started_ns=event.at_ns))}


def _step_finished(day: TradingDay, event: DayEvent, data: payloads.Step) -> dict[str, Any]:
    begun = next((step.started_ns for step in day.steps if step.step == data.step), event.at_ns)
    return {"steps": _with_step(day, Step(step=data.step, started_ns=begun, finished_ns=event.at_ns))}


def _step_failed(day: TradingDay, event: DayEvent, data: payloads.Failed) -> dict[str, Any]:
    name = data.step or "?"
    begun = next((step.started_ns for step in day.steps if step.step == name), event.at_ns)
    failed = Step(step=name, started_ns=begun, finished_ns=event.at_ns, error=data.error)
    return {"steps": _with_step(day, failed)}


def _with_step(day: TradingDay, step: Step) -> tuple[Step, ...]:
    """Put the step in the place of its namesake, or last: a step that is taken again replaces what it found before."""
    if any(known.step == step.step for known in day.steps):
        return tuple(step if known.step == step.step else known for known in day.steps)
    return (*day.steps, step)


def _gap_opened(day: TradingDay, event: DayEvent, data: payloads.GapOpened) -> dict[str, Any]:
    gap = Gap(gap_id=data.gap_id, cause=data.cause, from_ns=data.from_ns, scope=data.scope)
    return {"gap_by_id": {**day.gap_by_id, gap.gap_id: gap}}


def _gap_closed(day: TradingDay, event: DayEvent, data: payloads.GapClosed) -> dict[str, Any]:
    gap = replace(day.gap_by_id[data.gap_id], to_ns=data.to_ns, outcome=data.outcome, detail=data.detail)
    return {"gap_by_id": {**day.gap_by_id, gap.gap_id: gap}}


def _checkpoint(day: TradingDay, event: DayEvent, data: payloads.Checkpoint) -> dict[str, Any]:
    before = day.checkpoints.get(data.component)
    merged = data if before is None else replace(data, connections={**before.connections, **data.connections})
    return {
        "checkpoints": {**day.checkpoints, data.component: merged},
        "messages": day.messages if data.messages is None else data.messages,
    }


def _verified(day: TradingDay, event: DayEvent, data: payloads.Verified) -> dict[str, Any]:
    return {"ledger": data.ledger}


def _condition_changed(day: TradingDay, event: DayEvent, data: payloads.ConditionChanged) -> dict[str, Any]:
    return {
        "condition": data.condition,
        "condition_reasons": data.condition_reasons,
        "rules_version": data.rules_version,
        "late": data.late if data.late is not None else day.late,
    }


def _sealed(day: TradingDay, event: DayEvent, data: payloads.Sealed) -> dict[str, Any]:
    return {"sealed": data, "revision": data.revision, "seals": (*day.seals, (data.revision, event.at_ns))}


_EFFECTS: dict[EventName, Callable[[TradingDay, DayEvent, Any], dict[str, Any]]] = {
    EventName.START_REQUESTED: _start_requested,
    EventName.MISSED: _missed,
    EventName.STARTED: _started,
    EventName.START_FAILED: _failed,
    EventName.ERROR_RAISED: _error_raised,
    EventName.GAVE_UP: _gave_up,
    EventName.END_REQUESTED: _end_requested,
    EventName.COMPLETED: _completed,
    EventName.END_FAILED: _failed,
    EventName.STEP_STARTED: _step_started,
    EventName.STEP_FINISHED: _step_finished,
    EventName.STEP_FAILED: _step_failed,
    EventName.GAP_OPENED: _gap_opened,
    EventName.GAP_CLOSED: _gap_closed,
    EventName.CHECKPOINT: _checkpoint,
    EventName.VERIFIED: _verified,
    EventName.CONDITION_CHANGED: _condition_changed,
    EventName.SEALED: _sealed,
}
