"""The state table of a trading day: which event leads from which state to which, and who may append it.

The table is the only place that knows the arrows; `docs/day-states.md` is generated from it (`scripts/day_states.py`).
Guards that need more than the state (lease, window, "was ever ACTIVE") belong to `folding` and to the workflows.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from ssmd_dagster.errors import RefusedError


class DayState(StrEnum):
    """States of a trading day."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    ACTIVE = "ACTIVE"
    ENDING = "ENDING"
    COMPLETE = "COMPLETE"
    ERROR = "ERROR"
    FAILED = "FAILED"


class EventName(StrEnum):
    """Names of all events of the day journal."""

    DEFINED = "defined"
    START_REQUESTED = "start_requested"
    MISSED = "missed"
    STARTED = "started"
    START_FAILED = "start_failed"
    ERROR_RAISED = "error_raised"
    RECOVERED = "recovered"
    GAVE_UP = "gave_up"
    END_REQUESTED = "end_requested"
    COMPLETED = "completed"
    END_FAILED = "end_failed"
    STEP_STARTED = "step_started"
    STEP_FINISHED = "step_finished"
    STEP_FAILED = "step_failed"
    GAP_OPENED = "gap_opened"
    GAP_CLOSED = "gap_closed"
    CHECKPOINT = "checkpoint"
    VERIFIED = "verified"
    CONDITION_CHANGED = "condition_changed"
    SEALED = "sealed"
    PAUSED = "paused"
    RESUMED = "resumed"


class Transition(NamedTuple):
    """The state that an event leads to, and who may append it."""

    to: DayState
    who: str


class IllegalTransitionError(RefusedError):
    """The day's state does not take this event; the text says what may be done instead."""


_S = DayState
_E = EventName

TRANSITIONS: dict[tuple[DayState | None, EventName], Transition] = {
    (None, _E.DEFINED): Transition(_S.PENDING, "start, reconcile"),
    (_S.PENDING, _E.START_REQUESTED): Transition(_S.STARTING, "start"),
    (_S.PENDING, _E.MISSED): Transition(_S.FAILED, "reconcile, once the day is over"),
    (_S.STARTING, _E.STARTED): Transition(_S.ACTIVE, "the epoch's owner"),
    (_S.STARTING, _E.START_FAILED): Transition(_S.FAILED, "the owner; anyone once its lease is gone"),
    (_S.STARTING, _E.START_REQUESTED): Transition(_S.STARTING, "start, once the owner's lease is gone"),
    (_S.ACTIVE, _E.ERROR_RAISED): Transition(_S.ERROR, "health sensor, recover"),
    (_S.ERROR, _E.RECOVERED): Transition(_S.ACTIVE, "recover"),
    (_S.ERROR, _E.GAVE_UP): Transition(_S.FAILED, "recover, after its attempts"),
    (_S.ACTIVE, _E.END_REQUESTED): Transition(_S.ENDING, "end, roll"),
    (_S.ERROR, _E.END_REQUESTED): Transition(_S.ENDING, "end, roll"),
    (_S.ENDING, _E.END_REQUESTED): Transition(_S.ENDING, "end, once the owner's lease is gone"),
    (_S.ENDING, _E.COMPLETED): Transition(_S.COMPLETE, "the epoch's owner"),
    (_S.ENDING, _E.END_FAILED): Transition(_S.FAILED, "the owner; anyone once its lease is gone"),
    (_S.FAILED, _E.MISSED): Transition(
        _S.FAILED, "reconcile, end: if it never was ACTIVE, and another day recorded on through all of it"
    ),
    (_S.FAILED, _E.START_REQUESTED): Transition(
        _S.STARTING, "start; reconcile, with back-off, while the window is open and the cause was transient"
    ),
    (_S.FAILED, _E.END_REQUESTED): Transition(_S.ENDING, "end, if the day was ever ACTIVE"),
    (_S.COMPLETE, _E.START_REQUESTED): Transition(
        _S.STARTING, "start while the window is open, replay at any time (next revision)"
    ),
}

RECORDING = frozenset({_S.ACTIVE, _S.ERROR})
"""States in which a live day is recorded, with or without an error."""

OPENS_EPOCH = frozenset({_E.START_REQUESTED, _E.RECOVERED, _E.END_REQUESTED})
"""Events that may open an epoch: those of them that carry `epoch: null` do, and their own sequence is the epoch.

`start_requested` and `recovered` always do, `end_requested` does when it repeats an attempt (from ENDING or FAILED);
the first `end_requested` of a running day may stay in its epoch, so that the archiver goes on until it has flushed.
"""

ENVIRONMENT_EVENTS = frozenset({_E.PAUSED, _E.RESUMED})
"""Events that concern the whole environment; they make no day and touch none."""

STATELESS_EVENTS = frozenset(_E) - {event for _, event in TRANSITIONS}
"""Events that change no day's state."""

_VERB_OF_EVENT = {
    _E.DEFINED: "start",
    _E.START_REQUESTED: "start",
    _E.END_REQUESTED: "end",
    _E.ERROR_RAISED: "recover",
    _E.RECOVERED: "recover",
}


def possible_verbs(state: DayState | None) -> tuple[str, ...]:
    """Return the verbs of `ssmd day` that a day in `state` may take, as far as the table alone knows."""
    verbs = [_VERB_OF_EVENT[event] for from_, event in TRANSITIONS if from_ == state and event in _VERB_OF_EVENT]
    return tuple(dict.fromkeys(verbs))


def illegal_transition(state: DayState | None, event: EventName, *, where: str = "") -> IllegalTransitionError:
    """Make the error that names state, event, and what may be done instead."""
    subject = "a day that was never defined" if state is None else f"a day in state {state}"
    return IllegalTransitionError(
        f"{subject} does not take the event `{event}`",
        where=where,
        do=f"Possible now: ssmd day {'|'.join(possible_verbs(state))}",
    )


def next_state(state: DayState | None, event: EventName, *, where: str = "") -> DayState:
    """Return the state after `event`; an event that changes no state returns `state`.

    Args:
        state: The day's state, None for a day without events.
        event: What is to be appended.
        where: Environment and date, for the error's text.

    Raises:
        IllegalTransitionError: The table has no such arrow, or the day does not exist.
    """
    transition = TRANSITIONS.get((state, event))
    if transition is not None:
        return transition.to
    if state is not None and event in STATELESS_EVENTS:
        return state
    raise illegal_transition(state, event, where=where)


def state_diagram() -> str:
    """Return the table as a mermaid `stateDiagram-v2`, one arrow per row in the table's order."""
    arrows = [
        f"    {'[*]' if from_ is None else from_} --> {transition.to}: {event}"
        for (from_, event), transition in TRANSITIONS.items()
    ]
    return "\n".join(["stateDiagram-v2", *arrows, ""])


def states_document() -> str:
    """Return the whole text of `docs/day-states.md`."""
    rows = [
        f"| {'–' if from_ is None else from_} | `{event}` | {transition.to} | {transition.who} |"
        for (from_, event), transition in TRANSITIONS.items()
    ]
    stateless = ", ".join(f"`{event}`" for event in EventName if event in STATELESS_EVENTS)
    return "\n".join(
        [
            "# States of a trading day",
            "",
            "Generated from `ssmd_dagster/day/states.py` by `python scripts/day_states.py`; do not edit.",
            "",
            "```mermaid",
            state_diagram().rstrip("\n"),
            "```",
            "",
            "| from | event | to | who may |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Events that change no state: {stateless}.",
            "Anything else is refused with the current state, the event, and what may be done instead.",
            "",
        ]
    )
