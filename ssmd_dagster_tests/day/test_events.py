"""Events, the gate before an append, and the fold."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.events import EMPTY_BOOK, BadEventError, DayEvent, JournalBrokenError
from ssmd_dagster.day.folding import StaleEpochError, check_epoch, check_event, fold, fold_day, new_event, owns
from ssmd_dagster.day.payloads import SHAPES
from ssmd_dagster.day.states import (
    ENVIRONMENT_EVENTS,
    OPENS_EPOCH,
    STATELESS_EVENTS,
    TRANSITIONS,
    DayState,
    EventName,
    IllegalTransitionError,
)
from ssmd_dagster_tests.day.builders import DATE, ENV, Log, started

DATES = ["2025-12-13", "2025-12-14"]


Try = tuple[EventName | int, str, Any, dict[str, Any]]


@st.composite
def attempts(draw: st.DrawFn) -> Try:
    """One thing that some actor might try: any event, or (a number) one that the table allows then."""
    event = draw(st.one_of(st.sampled_from(list(EventName)), st.integers(0, 9), st.integers(0, 9)))
    epoch = draw(st.sampled_from(["own", "own", "own", "own", "own", None, 1, 3]))
    data: dict[str, Any] = {}
    if event is EventName.START_REQUESTED:
        data = {
            "mode": draw(st.sampled_from(["live", "replay"])),
            "revision": draw(st.integers(1, 3)),
            "open_ns": draw(st.sampled_from([None, 5])),
        }
    if event in (EventName.GAP_OPENED, EventName.GAP_CLOSED):
        data = {"gap_id": draw(st.sampled_from(["g1", "g2"]))}
    if event is EventName.CHECKPOINT:
        count = {"records": 1, "batches": 1, "bytes": 1, "last_n": draw(st.integers(0, 9))}
        data = {"connections": {draw(st.sampled_from(["2-a-0", "2-a-1"])): {"trade": count}}}
    return event, draw(st.sampled_from(DATES)), epoch, data


histories = st.integers(0, 40).flatmap(lambda size: st.lists(attempts(), min_size=size, max_size=size))
"""Lists whose length does not shrink by itself: most reach late states."""


def replayed(tries: list[Try]) -> Log:
    """Try everything in order; what is refused must leave the log as it was."""
    log = Log()
    for event, date, epoch, data in tries:
        before = log.book
        day = before.days.get(date)
        state = None if day is None else day.state
        if not isinstance(event, EventName):
            allowed = [name for from_, name in TRANSITIONS if from_ is state]
            event = allowed[event % len(allowed)]
        if event is EventName.START_REQUESTED and not data:
            data = {"revision": 1 if day is None else day.revision + (state is DayState.COMPLETE)}
        try:
            log.add(event, date=date, data=data, **({} if epoch == "own" else {"epoch": epoch}))
        except (IllegalTransitionError, StaleEpochError, BadEventError):
            assert log.book is before
            continue
        after = log.book.days.get(date)
        if (state, event) in TRANSITIONS:
            assert after is not None
            assert after.state is TRANSITIONS[state, event].to
        else:
            assert event in STATELESS_EVENTS
            assert (after and after.state) is state
            assert event not in ENVIRONMENT_EVENTS or after is day
    return log


@given(histories)
def test_any_sequence_follows_the_table_or_is_refused(tries: list[Any]) -> None:
    """Whatever is tried, states move by the table only, and a refusal changes nothing."""
    replayed(tries)


@given(histories, st.integers(0, 60))
def test_the_fold_is_deterministic_and_consistent_with_its_prefixes(tries: list[Any], cut: int) -> None:
    """Folding at once, in two parts, one by one, and after a trip through the bytes gives the same book."""
    log = replayed(tries)
    whole = fold(log.events)
    assert whole == log.book
    assert fold(log.events[cut:], fold(log.events[:cut])) == whole
    assert fold((seq, DayEvent.decode(event.encode())) for seq, event in log.events) == whole


@given(histories)
def test_a_day_depends_on_its_own_events_only(tries: list[Any]) -> None:
    """Folding one day's events alone gives that day as it is in the book."""
    log = replayed(tries)
    for date, day in log.book.days.items():
        alone = fold((seq, event) for seq, event in log.events if event.date == date)
        assert alone.days[date] == day


@given(histories)
def test_epochs_are_the_sequences_of_the_events_that_opened_them(tries: list[Any]) -> None:
    """Every epoch is the sequence of an event without one, they rise, and the last is the day's."""
    log = replayed(tries)
    by_seq = dict(log.events)
    for day in log.book.days.values():
        assert list(day.epochs) == sorted(set(day.epochs))
        assert day.epoch == (day.epochs[-1] if day.epochs else None)
        for epoch in day.epochs:
            assert by_seq[epoch].event in OPENS_EPOCH
            assert by_seq[epoch].epoch is None


def test_the_bytes_of_an_event_are_those_of_the_contract() -> None:
    """Keys stand in the contract's order, states by name, nothing is left out."""
    event = DayEvent(
        id="01JF",
        env="kalshi-prod",
        date=DATE,
        event=EventName.STARTED,
        from_=DayState.STARTING,
        to=DayState.ACTIVE,
        epoch=812,
        at_ns=1765670400000000000,
        actor="cli:alice@host",
        data={"markets": 3},
    )
    assert event.encode() == (
        b'{"v":1,"id":"01JF","env":"kalshi-prod","date":"2025-12-14","event":"started","from":"STARTING",'
        b'"to":"ACTIVE","epoch":812,"at_ns":1765670400000000000,"actor":"cli:alice@host","reason":null,'
        b'"data":{"markets":3},"prev_sha256":null}'
    )
    assert DayEvent.decode(event.encode()) == event


def test_a_reader_ignores_unknown_keys() -> None:
    """Keys of a later version, outside and inside of data, do not disturb."""
    event = started().events[1][1]
    plain = msgspec.json.decode(event.encode())
    plain["shard"] = 7
    plain["data"]["later"] = {"x": 1}
    decoded = DayEvent.decode(msgspec.json.encode(plain))
    assert decoded.data["later"] == {"x": 1}
    check_event(fold(started().events[:1]).days[DATE], decoded)


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"{}", b"\xff", b'{"v":1,"id":"x"}', b"[" * 100_000, b'{"data":' + b'{"a":' * 100_000]
)
def test_bytes_that_are_no_event_are_refused(raw: bytes) -> None:
    """Broken bytes raise an error of ours, whatever they are."""
    with pytest.raises(BadEventError):
        DayEvent.decode(raw)


def test_every_event_has_a_shape() -> None:
    """The table of shapes covers all event names."""
    assert set(SHAPES) == set(EventName)


def test_an_old_epoch_is_fenced() -> None:
    """After a takeover the former owner's events are refused, by the gate and by the fold."""
    log = Log()
    log.add(EventName.DEFINED)
    log.add(EventName.START_REQUESTED)
    old = log.day()
    log.add(EventName.START_REQUESTED, actor="dagster:run-2")
    assert log.day().epochs == (2, 3)
    assert owns(log.day(), 3)
    assert not owns(log.day(), 2)
    late = new_event(
        old, EventName.STARTED, id="x", env=ENV, date=DATE, epoch=2, at_ns=1, actor="cli:test@host", data={}
    )
    with pytest.raises(StaleEpochError, match=r"epoch 2; the day is in epoch 3, which dagster:run-2 holds"):
        check_epoch(log.day(), late)
    with pytest.raises(JournalBrokenError, match="sequence 4"):
        fold_day(log.day(), late, 4)


def test_the_first_end_may_stay_in_the_running_epoch() -> None:
    """An end that names the day's epoch keeps it; one without opens its own; a repeated one must open its own."""
    log = started()
    assert log.add(EventName.END_REQUESTED, epoch=2)
    assert log.day().epochs == (2,)
    with pytest.raises(BadEventError, match="opens an epoch"):
        log.add(EventName.END_REQUESTED, epoch=2)
    log.add(EventName.END_REQUESTED)
    assert log.day().epochs == (2, 5)
    other = started()
    other.add(EventName.END_REQUESTED)
    assert other.day().epochs == (2, 4)


def test_a_day_that_never_ran_cannot_be_ended() -> None:
    """FAILED takes an end only if the day was ever ACTIVE."""
    log = Log()
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.START_FAILED):
        log.add(event)
    with pytest.raises(IllegalTransitionError, match="FAILED"):
        log.add(EventName.END_REQUESTED)
    log.add(EventName.START_REQUESTED)
    log.add(EventName.STARTED)
    log.add(EventName.ERROR_RAISED)
    log.add(EventName.GAVE_UP)
    log.add(EventName.END_REQUESTED)
    assert log.day().state is DayState.ENDING


def test_a_failure_is_told_and_forgotten_with_the_next_attempt() -> None:
    """Step, error, code and transience of a failed start are there until somebody starts again."""
    log = Log()
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STEP_STARTED, EventName.STEP_FAILED):
        log.add(event)
    log.add(EventName.START_FAILED)
    day = log.day()
    assert (day.state, day.error, day.failed_step) == (DayState.FAILED, "no answer", "connector")
    assert day.failure is not None
    assert (day.failure.exit_code, day.failure.transient) == (7, True)
    assert [(step.step, step.error) for step in day.steps] == [("connector", "no answer")]
    log.add(EventName.START_REQUESTED)
    assert log.day().failure is None
    assert log.day().steps == ()


def test_times_of_a_day() -> None:
    """A day's start is its first ACTIVE, its end the first request that holds, and recovering moves neither."""
    log = started()
    log.add(EventName.ERROR_RAISED)
    log.add(EventName.RECOVERED)
    assert log.day().started_ns == 3_000
    log.add(EventName.END_REQUESTED, data={"close_ns": 77})
    log.add(EventName.END_FAILED)
    log.add(EventName.END_REQUESTED, data={"close_ns": 99})
    log.add(EventName.COMPLETED)
    day = log.day()
    assert (day.started_ns, day.ended_ns, day.close_ns) == (3_000, 6_000, 77)
    assert (day.condition, day.messages, day.archive_url) == ("pending", 12, "s3://raw/kalshi/")


def test_a_window_opens_with_the_attempt_that_became_active() -> None:
    """An attempt that never recorded does not hold the window open; later attempts do not move it."""
    log = Log()
    log.add(EventName.DEFINED)
    log.add(EventName.START_REQUESTED, data={"open_ns": 1})
    log.add(EventName.START_FAILED)
    log.add(EventName.START_REQUESTED, data={"open_ns": 2})
    assert log.day().open_ns == 2
    log.add(EventName.STARTED)
    log.add(EventName.END_REQUESTED)
    log.add(EventName.END_FAILED)
    log.add(EventName.START_REQUESTED, data={"open_ns": 3})
    assert log.day().open_ns == 2


def test_a_finished_day_starts_as_the_next_revision() -> None:
    """Starting a COMPLETE day needs a later revision; replaying it makes its own times."""
    log = started()
    log.add(EventName.END_REQUESTED)
    log.add(EventName.COMPLETED)
    log.add(EventName.SEALED)
    with pytest.raises(BadEventError, match="at least 2"):
        log.add(EventName.START_REQUESTED, data={"mode": "replay"})
    log.add(EventName.START_REQUESTED, data={"mode": "replay", "revision": 2})
    day = log.day()
    assert (day.mode, day.revision, day.started_ns, day.ended_ns) == ("replay", 2, None, None)
    assert day.completed is not None
    log.add(EventName.STARTED)
    log.add(EventName.END_REQUESTED)
    log.add(EventName.COMPLETED)
    with pytest.raises(BadEventError, match="sealed after"):
        log.add(EventName.SEALED)


def test_gaps_open_once_and_close_as_often_as_their_outcome_changes() -> None:
    """A gap is opened once, closed, and may be repaired later; unknown gaps cannot be closed."""
    log = started()
    with pytest.raises(BadEventError, match="never opened"):
        log.add(EventName.GAP_CLOSED)
    log.add(EventName.GAP_OPENED, data={"scope": {"conn": "2-a-0"}})
    with pytest.raises(BadEventError, match="opened before"):
        log.add(EventName.GAP_OPENED)
    assert log.day().gaps[0].outcome == "open"
    log.add(EventName.GAP_CLOSED, data={"outcome": "stays"})
    log.add(EventName.GAP_CLOSED, data={"outcome": "repaired"})
    (gap,) = log.day().gaps
    assert (gap.from_ns, gap.to_ns, gap.outcome, gap.scope) == (5, 9, "repaired", {"conn": "2-a-0"})


def test_checkpoints_gather_the_connections_of_a_component() -> None:
    """A restarted connector need not repeat what its predecessor counted."""
    log = started()

    def count(records: int) -> dict[str, Any]:
        return {"trade": {"records": records, "batches": 1, "bytes": 10, "last_n": records - 1}}

    log.add(EventName.CHECKPOINT, data={"connections": {"2-a-0": count(1)}})
    log.add(EventName.CHECKPOINT, data={"connections": {"2-a-0": count(2)}, "messages": 2})
    log.add(EventName.CHECKPOINT, data={"connections": {"2-a-1": count(5)}, "messages": None})
    checkpoint = log.day().checkpoints["connector"]
    assert {conn: counts["trade"].records for conn, counts in checkpoint.connections.items()} == {
        "2-a-0": 2,
        "2-a-1": 5,
    }
    assert log.day().messages == 2


def test_a_verdict_may_change_after_the_end() -> None:
    """verified and condition_changed update a COMPLETE day without moving its state."""
    log = started()
    log.add(EventName.END_REQUESTED)
    log.add(EventName.COMPLETED, data={"forced_by": "cli:alice@host"})
    log.add(EventName.VERIFIED, data={"ledger": {"channels": []}})
    log.add(EventName.CONDITION_CHANGED)
    day = log.day()
    assert (day.state, day.condition, day.condition_reasons) == (DayState.COMPLETE, "degraded", ("late rows",))
    assert (day.ledger, day.forced_by) == ({"channels": []}, "cli:alice@host")


def test_a_missed_day_is_failed_without_an_epoch() -> None:
    """A day that nobody started is FAILED, says why, and belongs to no attempt."""
    log = Log()
    log.add(EventName.DEFINED)
    log.add(EventName.MISSED, reason="not started before its window closed")
    day = log.day()
    assert (day.state, day.epoch, day.error) == (DayState.FAILED, None, "not started before its window closed")


def test_a_day_that_failed_to_start_gets_the_name_of_the_day_that_held_it() -> None:
    """Only where it never was ACTIVE: what recorded itself has raw files of its own."""
    log = Log()
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.START_FAILED):
        log.add(event)
    log.add(EventName.MISSED, reason="recorded with 2025-12-13", data={"recorded_with": "2025-12-13"})
    day = log.day()
    assert (day.state, day.recorded_with, day.error) == (DayState.FAILED, "2025-12-13", "recorded with 2025-12-13")
    ran = started()
    ran.add(EventName.ERROR_RAISED)
    ran.add(EventName.GAVE_UP)
    with pytest.raises(IllegalTransitionError):
        ran.add(EventName.MISSED)


def test_current_follows_live_starts_only() -> None:
    """A replay of another day leaves the current one alone."""
    log = started()
    log.add(EventName.DEFINED, date="2025-12-10")
    log.add(EventName.START_REQUESTED, date="2025-12-10", data={"mode": "replay"})
    assert log.book.current == DATE
    log.add(EventName.DEFINED, date="2025-12-15")
    assert log.book.current == DATE
    log.add(EventName.START_REQUESTED, date="2025-12-15")
    assert log.book.current == DATE  # which still runs
    log.add(EventName.STARTED, date="2025-12-15")
    assert log.book.current == "2025-12-15"


def test_pausing_concerns_the_environment() -> None:
    """paused and resumed make no day, touch none, and say who, since when and why."""
    log = Log()
    log.add(EventName.PAUSED, reason="moving house", at_ns=9)
    assert log.book.days == {}
    assert log.book.paused is not None
    assert (log.book.paused.actor, log.book.paused.since_ns, log.book.paused.reason) == (
        "cli:test@host",
        9,
        "moving house",
    )
    log.add(EventName.DEFINED)
    log.add(EventName.RESUMED)
    assert log.book.paused is None
    assert log.day().last_seq == 2


@pytest.mark.parametrize("date", ["", "2025-1-1", "2025-12-14x", "../../etc", "2025-12-14\n", "x"])
def test_a_day_has_a_date(date: str) -> None:
    """What is no date never becomes a day (dates reach paths and keys)."""
    with pytest.raises(BadEventError, match="YYYY-MM-DD"):
        Log().add(EventName.DEFINED, date=date)


def test_wrong_data_is_refused_before_it_is_appended() -> None:
    """The gate names the event and what is wrong with its data."""
    log = started()
    with pytest.raises(BadEventError, match=r"`gap_opened` has the wrong shape: .*from_ns"):
        log.add(EventName.GAP_OPENED, data={"from_ns": "5"})


def test_a_broken_journal_names_the_sequence() -> None:
    """Illegal steps, wrong states, foreign events and sequences that stand still are named by sequence."""
    log = started()
    (seq, event) = log.events[2]
    broken = [
        [*log.events, (4, event)],
        [*log.events[:2], (4, msgspec.structs.replace(event, to=DayState.COMPLETE))],
        [*log.events[:2], (4, msgspec.structs.replace(event, env="other"))],
        [*log.events[:2], (2, event)],
        [*log.events[:2], (4, msgspec.structs.replace(event, epoch=1))],
        [*log.events[:2], (4, msgspec.structs.replace(event, data={"markets": "many"}))],
    ]
    for events in broken:
        with pytest.raises(JournalBrokenError) as caught:
            fold(events)
        assert caught.value.seq == events[-1][0]
        assert f"sequence {events[-1][0]}" in str(caught.value)
    assert seq == 3


def test_a_hundred_thousand_events_fold() -> None:
    """A journal with a year of checkpoints is read like any other."""
    log = started()
    counts = {channel: {"records": 1, "batches": 1, "bytes": 2, "last_n": 4} for channel in ("trade", "ticker")}
    checkpoint = new_event(
        log.day(),
        EventName.CHECKPOINT,
        id="x",
        env=ENV,
        date=DATE,
        epoch=2,
        at_ns=1,
        actor="cli:test@host",
        data={"component": "connector", "connections": {"2-a-0": counts}},
    )
    events = [*log.events, *((seq, checkpoint) for seq in range(4, 100_004))]
    assert fold(events).tip_seq == 100_003


def test_an_empty_journal_is_an_empty_book() -> None:
    """Nothing folded is nothing known."""
    assert fold([]) == EMPTY_BOOK
    assert EMPTY_BOOK.tip_seq == 0


def test_a_roll_that_was_cut_off_leaves_a_day_behind() -> None:
    """The new day took over and is the current one; until the old one is COMPLETE, it is the one that is left."""
    before, after = DATES
    log = Log()
    for date in (before, after):
        assert log.book.successor(before) is None
        for event in (EventName.DEFINED, EventName.START_REQUESTED):
            log.add(event, date=date)
        assert (log.book.current, log.book.left_behind) == (before, None), "nobody has taken over yet"
        log.add(EventName.STARTED, date=date)
    assert log.book.current == after
    assert log.book.successor(before) == log.day(after)
    assert log.book.successor(after) is None
    assert log.book.left_behind == log.day(before)
    log.add(EventName.END_REQUESTED, date=before, epoch=log.day(before).epoch)
    assert log.book.left_behind == log.day(before)
    log.add(EventName.COMPLETED, date=before)
    assert log.book.left_behind is None
    assert log.book.successor(before) == log.day(after)


def test_a_recorded_day_that_is_replayed_too_keeps_the_span_of_its_recording() -> None:
    """A replay takes seconds, months later; what was recorded when does not change by it."""
    log = started()
    log.add(EventName.END_REQUESTED, epoch=log.day().epoch)
    log.add(EventName.COMPLETED)
    span = log.day().span
    assert None not in span
    log.add(EventName.START_REQUESTED, data={"mode": "replay", "revision": 2})
    log.add(EventName.STARTED)
    log.add(EventName.END_REQUESTED, epoch=log.day().epoch)
    log.add(EventName.COMPLETED)
    assert log.day().span == span != (log.day().started_ns, log.day().ended_ns)
