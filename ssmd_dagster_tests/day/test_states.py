"""The state table, what it refuses, and the document made from it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from ssmd_dagster.day.states import (
    STATELESS_EVENTS,
    TRANSITIONS,
    DayState,
    EventName,
    IllegalTransitionError,
    next_state,
    possible_verbs,
    state_diagram,
    states_document,
)
from ssmd_dagster.errors import ExitCode, RefusedError

ALL_STATES: list[DayState | None] = [None, *DayState]


@pytest.mark.parametrize(("state", "event"), list(product(ALL_STATES, EventName)))
def test_every_pair_follows_the_table_or_is_refused(state: DayState | None, event: EventName) -> None:
    """A pair leads where the table says, stays where the event has no state, and is refused otherwise."""
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event].to
    elif state is not None and event in STATELESS_EVENTS:
        assert next_state(state, event) is state
    else:
        with pytest.raises(IllegalTransitionError):
            next_state(state, event)


def test_the_table_is_that_of_the_contracts() -> None:
    """The arrows are those that were agreed, counted per source state."""
    arrows = {(str(from_) if from_ else "-", str(event), str(row.to)) for (from_, event), row in TRANSITIONS.items()}
    assert arrows == {
        ("-", "defined", "PENDING"),
        ("PENDING", "start_requested", "STARTING"),
        ("PENDING", "missed", "FAILED"),
        ("FAILED", "missed", "FAILED"),
        ("STARTING", "started", "ACTIVE"),
        ("STARTING", "start_failed", "FAILED"),
        ("STARTING", "start_requested", "STARTING"),
        ("ACTIVE", "error_raised", "ERROR"),
        ("ERROR", "recovered", "ACTIVE"),
        ("ERROR", "gave_up", "FAILED"),
        ("ACTIVE", "end_requested", "ENDING"),
        ("ERROR", "end_requested", "ENDING"),
        ("ENDING", "end_requested", "ENDING"),
        ("ENDING", "completed", "COMPLETE"),
        ("ENDING", "end_failed", "FAILED"),
        ("FAILED", "start_requested", "STARTING"),
        ("FAILED", "end_requested", "ENDING"),
        ("COMPLETE", "start_requested", "STARTING"),
    }


def test_the_stateless_events_are_those_of_the_contracts() -> None:
    """The events that change no state are exactly the agreed ones."""
    names = {"step_started", "step_finished", "step_failed", "gap_opened", "gap_closed", "checkpoint", "verified"}
    assert names | {"condition_changed", "sealed", "paused", "resumed"} == STATELESS_EVENTS


def test_a_refusal_says_state_event_and_what_may_be_done() -> None:
    """The operator reads the state, the event, where, and the possible verbs; the exit code is 5."""
    with pytest.raises(IllegalTransitionError) as caught:
        next_state(DayState.COMPLETE, EventName.END_REQUESTED, where="kalshi-sim 2025-12-14")
    assert isinstance(caught.value, RefusedError)
    assert caught.value.exit_code is ExitCode.REFUSED
    assert str(caught.value) == (
        "a day in state COMPLETE does not take the event `end_requested` (kalshi-sim 2025-12-14). "
        "Possible now: ssmd day start"
    )


@pytest.mark.parametrize("state", ALL_STATES)
def test_every_state_has_a_way_on(state: DayState | None) -> None:
    """No state leaves the operator without a verb."""
    assert possible_verbs(state)


def test_the_diagram_has_one_arrow_per_row() -> None:
    """Mermaid's text begins as a state diagram and holds every row of the table once."""
    lines = state_diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == 1 + len(TRANSITIONS) == len(set(lines))
    assert "    [*] --> PENDING: defined" in lines


def test_the_document_is_up_to_date() -> None:
    """docs/day-states.md is what the table generates; `python scripts/day_states.py` writes it."""
    document = Path(__file__).resolve().parents[2] / "docs" / "day-states.md"
    assert document.read_text(encoding="utf-8") == states_document()
