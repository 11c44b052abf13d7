"""Every interval without a connection is known from the spool, told once, and closed only by a connection that came up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ssmd_dagster.capture import gaps as gaps_module
from ssmd_dagster.capture.audit import declare_gaps, finish_connection
from ssmd_dagster.capture.gaps import GapLog, Life, Lost, gaps_between, life_of, tell
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.events import Gap, JournalBrokenError
from ssmd_dagster.day.payloads import GapClosed, GapOpened
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import UnreachableError
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster_tests.capture.recordings import DATE, START_NS, Recording, TickingClock, a_recording, eventually

MS = 1_000_000


def quiet_recording(conn: str, clock: TickingClock | None = None) -> Recording:
    """Return a recording that came up and recorded one frame, not ended."""
    recording = Recording(conn, clock=clock)
    recording.begin()
    recording.frame("trade")
    recording.recorder.flush()
    return recording


def test_a_connection_that_was_told_to_stop_is_no_loss(tmp_path: Path) -> None:
    """With data in all channels the note `stopping` is some batches before the end, and is found there."""
    recording = a_recording()
    recording.write(tmp_path)
    life = life_of(tmp_path, "812-a-0")
    assert life is not None
    assert life.cause == "operator_stop"
    assert gaps_between(tmp_path, "a") == []


def test_a_connection_that_was_told_to_stop_before_the_day_was_over_is_one(tmp_path: Path) -> None:
    """Its supervisor was stopped, and nobody started it again: the rest of the day lacks what it would have recorded."""
    a_recording().write(tmp_path)
    life = life_of(tmp_path, "812-a-0")
    assert life is not None
    assert gaps_between(tmp_path, "a", life.end_ns) == []
    assert gaps_between(tmp_path, "a", life.end_ns + 1) == [Lost("812-a-0", "operator_stop", life.last_ns)]


@pytest.mark.parametrize("finished", [False, True])
def test_a_killed_process_is_a_crash_from_its_last_frame_on(tmp_path: Path, finished: bool) -> None:
    """Whether or not the audit has written what it owed, hours later."""
    recording = quiet_recording("812-a-0")
    last_ns = recording.recorder.last_frame_ns
    path = recording.write(tmp_path)
    if finished:
        assert finish_connection(path, START_NS + 3_600_000 * MS) > 0
    assert last_ns is not None
    assert life_of(tmp_path, "812-a-0") == Life("812-a-0", START_NS + 2 * MS, last_ns, "process_crash")
    assert gaps_between(tmp_path, "a") == [Lost("812-a-0", "process_crash", last_ns)]


def test_a_clock_that_was_set_back_hides_no_end(tmp_path: Path) -> None:
    """A connection that recorded on for a day an hour back was told to stop all the same, and no gap has a negative length."""
    recording = quiet_recording("812-a-0")
    recording.clock.now_ns -= 3_600_000 * MS
    recording.frame("trade")
    recording.end()
    recording.write(tmp_path)
    life = life_of(tmp_path, "812-a-0")
    assert life is not None
    assert (life.cause, life.last_ns) == ("operator_stop", recording.recorder.last_frame_ns)
    ends = [
        data
        for event, data in Lost("812-a-0", "connection_lost", 100, 50).events("connector-a")
        if event == "gap_closed"
    ]
    assert [end.to_ns for end in ends if isinstance(end, GapClosed)] == [100]


def test_a_lost_connection_is_lost_from_its_last_frame_on(tmp_path: Path) -> None:
    """The silence before the loss was noticed belongs to the gap."""
    recording = quiet_recording("812-a-0")
    last_ns = recording.recorder.last_frame_ns
    recording.clock.now_ns += 25_000 * MS
    recording.recorder.note({"event": "silent", "for_s": 20.0})
    recording.end(told=False)
    recording.write(tmp_path)
    life = life_of(tmp_path, "812-a-0")
    assert life is not None
    assert (life.cause, life.last_ns) == ("connection_lost", last_ns)


def test_a_connection_that_was_closed_for_want_of_room_says_so(tmp_path: Path) -> None:
    """Overflow is a cause of its own."""
    recording = quiet_recording("812-a-0")
    recording.recorder.note({"event": GapCause.BUFFER_OVERFLOW, "bytes": 5})
    recording.end(told=False)
    recording.write(tmp_path)
    life = life_of(tmp_path, "812-a-0")
    assert life is not None
    assert life.cause == GapCause.BUFFER_OVERFLOW


def test_words_in_a_frame_or_a_note_are_no_events(tmp_path: Path) -> None:
    """Only a note's `event` tells how a connection ended, whatever a market or an error is called."""
    recording = quiet_recording("812-a-0")
    recording.frame("subscribed", ticker="stopping")
    recording.recorder.note({"event": "error", "text": "stopping"})
    recording.recorder.flush()
    recording.write(tmp_path)
    life = life_of(tmp_path, "812-a-0")
    assert life is not None
    assert life.cause == "process_crash"


def test_gaps_lie_between_connections_that_came_up(tmp_path: Path) -> None:
    """A connection that never subscribed neither begins nor ends a gap, nor does one of the other shard or an empty file."""
    clock = TickingClock()
    first = quiet_recording("812-a-9", clock)
    first.end(told=False)
    never = Recording("812-a-10", clock=clock)
    never.recorder.note({"event": "connected"})
    never.end(told=False)
    (tmp_path / "812-a-11.batches").touch()
    other = quiet_recording("812-b-0", clock)
    last = quiet_recording("900-a-0", clock)
    for recording in (first, never, other, last):
        recording.write(tmp_path)
    up = life_of(tmp_path, "900-a-0")
    assert up is not None
    assert life_of(tmp_path, "812-a-10") is life_of(tmp_path, "812-a-11") is None
    first_ns, last_ns = first.recorder.last_frame_ns, last.recorder.last_frame_ns
    assert first_ns is not None
    assert last_ns is not None
    assert gaps_between(tmp_path, "a") == [
        Lost("812-a-9", "connection_lost", first_ns, up.up_ns),
        Lost("900-a-0", "process_crash", last_ns),
    ]
    assert [lost.conn for lost in gaps_between(tmp_path, "b")] == ["812-b-0"]


@contextlib.asynccontextmanager
async def telling(log: GapLog, setting: Setting, stores: Stores) -> AsyncIterator[None]:
    """Run a gap log's way to the journal until everything was told."""
    task = asyncio.create_task(log.run(stores, setting.clock, setting.env.name, DATE))
    try:
        yield
        await eventually(lambda: log.waiting == 0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def gaps_of(book: DayBook) -> list[Gap]:
    """Return the day's gaps as the journal has them."""
    day = await book.day(DATE)
    assert day is not None
    return list(day.gaps)


async def test_a_new_process_opens_the_gap_behind_the_last_one_that_came_up(
    tmp_path: Path, setting: Setting, stores: Stores, book: DayBook
) -> None:
    """Also where a later connection left an empty file; it is closed when its own first connection is up, and told once."""
    recording = quiet_recording("3-a-0")
    recording.write(tmp_path)
    (tmp_path / "3-a-1.batches").touch()
    for _ in range(2):
        log = GapLog(tmp_path, "connector-a")
        async with telling(log, setting, stores):
            log.connection_up(START_NS + 9 * MS)
        assert [(gap.gap_id, gap.cause, gap.from_ns, gap.to_ns) for gap in await gaps_of(book)] == [
            ("gap-3-a-0", "process_crash", recording.recorder.last_frame_ns, START_NS + 9 * MS)
        ]


async def test_a_journal_that_cannot_be_read_is_read_later(
    tmp_path: Path, setting: Setting, stores: Stores, book: DayBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error ends nothing: the connector's batches are published over the same connection."""
    refusals = [JournalBrokenError(7, "it follows nothing", where="here"), UnreachableError("no answer")]
    read = DayBook.day

    async def day(self: DayBook, date: str) -> Any:
        if refusals:
            raise refusals.pop()
        return await read(self, date)

    monkeypatch.setattr(gaps_module, "RETRY_AFTER_S", 0)
    log = GapLog(tmp_path, "connector-a")
    monkeypatch.setattr(DayBook, "day", day)
    async with telling(log, setting, stores):
        log.connection_up(START_NS)
        log.connection_lost(START_NS + 1, "connection_lost", "3-a-0")
    assert [gap.gap_id for gap in await gaps_of(book)] == ["gap-3-a-0"]


async def test_a_connection_that_never_came_up_leaves_the_open_gap_open(
    tmp_path: Path, setting: Setting, stores: Stores, book: DayBook
) -> None:
    """One gap from the loss to the next connection that records, however many tries lie between."""
    log = GapLog(tmp_path, "connector-a")
    async with telling(log, setting, stores):
        log.connection_up(START_NS)
        log.connection_lost(START_NS + 1, "connection_lost", "3-a-0")
        log.connection_lost(START_NS + 2, "connection_lost", "3-a-1")
        log.connection_lost(START_NS + 3, "connection_lost", "3-a-2")
        log.connection_up(START_NS + 4)
    assert [(gap.gap_id, gap.from_ns, gap.to_ns, gap.outcome) for gap in await gaps_of(book)] == [
        ("gap-3-a-0", START_NS + 1, START_NS + 4, "stays")
    ]
    assert (await gaps_of(book))[0].scope == {"conn": "3-a-0", "component": "connector-a"}


async def test_a_first_connection_that_never_came_up_is_no_gap(tmp_path: Path) -> None:
    """Before the first connection nothing was recorded that could be missing."""
    log = GapLog(tmp_path, "connector-a")
    log.connection_lost(START_NS, "connection_lost", "3-a-0")
    log.connection_up(START_NS + 1)
    assert log.waiting == 0


def into(notes: list[dict[str, Any]]) -> Callable[[dict[str, Any]], bool]:
    """Return a recorder's `note_if_open` that only keeps the notes."""

    def note(one: dict[str, Any]) -> bool:
        notes.append(one)
        return True

    return note


async def test_every_cause_of_an_absence_is_a_gap_of_its_own(tmp_path: Path) -> None:
    """Lost, then refused, then closed by a schedule that ends before the connection is up; nothing between them."""
    log = GapLog(tmp_path, "connector-a")
    notes: list[dict[str, Any]] = []
    log.connection_up(1)
    log.connection_lost(10, None, "3-a-0")
    assert log.waiting == 0
    log.cause_is("rate_limited", 20)
    log.cause_is("rate_limited", 25)
    log.cause_is("closed_by_schedule", 30, since_ns=15, until_ns=50)
    log.cause_is("closed_by_schedule", 40, since_ns=15, until_ns=50)
    log.connection_up(60, into(notes))
    assert [
        (note["gap_id"], note["cause"], note["from_ns"], note.get("to_ns")) for note in notes if "to_ns" in note
    ] == [
        ("gap-3-a-0", "rate_limited", 10, 30),
        ("gap-3-a-0-end-2", "closed_by_schedule", 30, 50),
        ("gap-3-a-0-end-3", "connection_lost", 50, 60),
    ]


async def test_a_schedule_excuses_nothing_from_before_it(tmp_path: Path) -> None:
    """What was lost before the exchange closed was just lost; a clock that was set back makes no gap negative."""
    log = GapLog(tmp_path, "connector-a")
    notes: list[dict[str, Any]] = []
    log.connection_up(1)
    log.connection_lost(10, None, "3-a-0")
    log.cause_is("closed_by_schedule", 30, since_ns=20, until_ns=90)
    log.cause_is_over(40)
    log.connection_up(15, into(notes))
    assert [(note["cause"], note["from_ns"], note["to_ns"]) for note in notes if "to_ns" in note] == [
        ("connection_lost", 10, 20),
        ("closed_by_schedule", 20, 40),
        ("connection_lost", 40, 40),
    ]


async def test_a_cause_that_is_known_from_the_start_stays(tmp_path: Path) -> None:
    """A crash or a full disk is no lost connection because the next attempt fails too."""
    log = GapLog(tmp_path, "connector-a")
    log.connection_up(1)
    log.connection_lost(10, GapCause.BUFFER_OVERFLOW, "3-a-0")
    log.cause_is_over(20)
    log.connection_up(30)
    assert log.waiting == 2


async def test_gaps_that_were_only_noted_are_told_by_the_audit(
    tmp_path: Path, setting: Setting, stores: Stores, book: DayBook
) -> None:
    """What a crash left open ends with its connection; what was healed since stays healed."""
    clock = TickingClock()
    recording = quiet_recording("3-a-0", clock)
    log = GapLog(tmp_path, "connector-a")
    log.connection_up(clock(), recording.recorder.note_if_open)
    scope = {"conn": "3-a-0", "component": "connector-a"}
    log.open(GapOpened(gap_id="gap-3-a-0-sub-1", cause="not_subscribed", from_ns=clock(), scope=scope))
    jump = GapOpened(gap_id="gap-3-a-0-1-5", cause="sequence_jump", from_ns=clock(), scope={**scope, "sid": 1})
    log.declare(jump, clock())
    log.declare(jump, clock(), "healed")
    recording.recorder.flush()
    recording.write(tmp_path)
    assert await declare_gaps(tmp_path, book, DATE) == 5
    assert await declare_gaps(tmp_path, book, DATE) == 0
    assert {(gap.gap_id, gap.outcome) for gap in await gaps_of(book)} == {
        ("gap-3-a-0-sub-1", "stays"),
        ("gap-3-a-0-1-5", "healed"),
        ("gap-3-a-0", "open"),
    }
    again = GapLog(tmp_path, "connector-a")
    async with telling(again, setting, stores):
        again.connection_up(clock())
    assert {gap.outcome for gap in await gaps_of(book)} == {"stays", "healed"}


async def test_the_audit_heals_what_the_second_socket_recorded(
    tmp_path: Path, setting: Setting, stores: Stores, book: DayBook
) -> None:
    """Shard b was up throughout: the crash of a is no loss, nor is it told twice."""
    clock = TickingClock()
    second = quiet_recording("3-b-0", clock)
    first = quiet_recording("3-a-0", clock)
    after = quiet_recording("3-a-1", clock)
    second.frame("trade")
    for recording in (after, second):
        recording.end()
    for recording in (first, second, after):
        recording.write(tmp_path)
    assert await declare_gaps(tmp_path, book, DATE) == 3
    assert await declare_gaps(tmp_path, book, DATE) == 0
    assert [(gap.gap_id, gap.cause, gap.outcome) for gap in await gaps_of(book)] == [
        ("gap-3-a-0", "process_crash", "healed")
    ]


async def test_what_the_journal_was_not_told_of_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Events that wait for a journal are bounded; the spool holds the same facts for the audit."""
    monkeypatch.setattr(gaps_module, "MAX_WAITING", 3)
    log = GapLog(tmp_path, "connector-a")
    for i in range(4):
        log.connection_up(START_NS + 2 * i)
        log.connection_lost(START_NS + 2 * i + 1, "connection_lost", f"3-a-{i}")
    assert log.waiting == 3
    assert "waits" in caplog.text


async def test_telling_the_journal_twice_makes_one_gap(stores: Stores, book: DayBook) -> None:
    """Whoever tells of a gap that is known appends nothing; the end of an unknown one is not appended either."""
    lost = Lost("3-a-0", "connection_lost", START_NS, START_NS + 5)
    (opened, closed) = (data for _, data in lost.events("connector-a"))
    assert not await tell(book, DATE, EventName.GAP_CLOSED, closed)
    assert await tell(book, DATE, EventName.GAP_OPENED, opened)
    assert not await tell(book, DATE, EventName.GAP_OPENED, opened)
    assert await tell(book, DATE, EventName.GAP_CLOSED, closed)
    assert not await tell(book, DATE, EventName.GAP_CLOSED, closed)
    assert len(await gaps_of(book)) == 1
