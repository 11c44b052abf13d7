"""What a connector tells the journal of the intervals in which records are missing or may be.

The gap behind a connection has that connection's id (`gap-812-a-3`); every other gap is noted in the channel `session` too. So
telling the journal twice, or by the next process after a crash, makes no second gap. Not here: what a gap means for the day,
and whether another connection has healed it (`healing`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.capture.spool import (
    read_spool,
    read_spool_back,
    shard_of,
    spool_path,
    spooled_connections,
    spooled_records,
)
from ssmd_dagster.clock import Clock
from ssmd_dagster.day.causes import NEVER_DEGRADE, GapCause
from ssmd_dagster.day.payloads import Checkpoint, GapClosed, GapOpened
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook

RETRY_AFTER_S = 1.0
STOPPING = "stopping"
"""What a connector that is told to stop notes in its `session` channel before it closes the socket."""
SUBSCRIBED = "subscribed"
"""What it notes once everything is subscribed."""
_CUTS = (GapCause.BUFFER_OVERFLOW, GapCause.HOST_SUSPENDED)
"""Why it closes the socket itself, which it notes before."""
_PASSING = frozenset({GapCause.RATE_LIMITED, *NEVER_DEGRADE})
GAP = "gap"
"""The note of a gap: its id, cause, from, scope, and, once it is over, to and outcome."""
MAX_WAITING = 10_000
"""Gap events that wait for the journal; a connector that reconnects every half second fills this in an hour and a half."""
_BEGINNING_BATCHES = 50_000
_END_BATCHES = 5_000
_END_NS = 30_000_000_000
"""How far back from its last frame a connection's end is looked for: closing takes seconds."""

GapEvent = tuple[EventName, GapOpened | GapClosed]
Note = Callable[[dict[str, Any]], bool]
"""Records a note; False where the connection has ended."""

_log = logging.getLogger(__name__)


class Life(msgspec.Struct, frozen=True):
    """What a connection's spool says of its beginning and end.

    `up_ns` is when everything was subscribed, `last_ns` the receive time of its last frame, `cause` why it ended;
    `stopped_ns` is when it was told to stop, if it was.
    """

    conn: str
    up_ns: int
    last_ns: int
    cause: str
    stopped_ns: int | None = None

    @property
    def end_ns(self) -> int:
        """Return until when it is known to have recorded."""
        return self.last_ns if self.stopped_ns is None else max(self.last_ns, self.stopped_ns)


class Lost(msgspec.Struct, frozen=True):
    """The interval behind a connection in which nothing was recorded; `to_ns` None while no other has come up."""

    conn: str
    cause: str
    from_ns: int
    to_ns: int | None = None

    @property
    def gap_id(self) -> str:
        """Return the gap's id, which two who tell of it have in common."""
        return f"gap-{self.conn}"

    def events(self, component: str) -> list[GapEvent]:
        """Return what the journal is told of it."""
        scope = {"conn": self.conn, "component": component}
        opened = GapOpened(gap_id=self.gap_id, cause=self.cause, from_ns=self.from_ns, scope=scope)
        told: list[GapEvent] = [(EventName.GAP_OPENED, opened)]
        if self.to_ns is not None:
            # From there on records come again. What is missing inside stays missing.
            to_ns = max(self.from_ns, self.to_ns)  # the clock may have been set back in between
            told.append((EventName.GAP_CLOSED, GapClosed(gap_id=self.gap_id, to_ns=to_ns, outcome="stays")))
        return told


def life_of(spool: Path, conn: str) -> Life | None:
    """Read a connection's beginning and end from its spool file; None if it never came up.

    Its end is read from the back: however much was recorded, the next connection does not wait for it.
    """
    path = spool_path(spool, conn)
    up_ns = _noted_ns(path, SUBSCRIBED)
    if up_ns is None:
        return None
    last_n, last_ns = -1, up_ns
    events: dict[str, int] = {}
    for batch, encoded in islice(read_spool_back(path), _END_BATCHES):
        header = batch.header
        if last_n >= 0 and header.recv_last_ns < last_ns - _END_NS:
            break
        if header.channel == SESSION:
            events.update((event, at_ns) for event, at_ns, _ in _notes(spooled_records(encoded, batch)))
        elif header.n_last > last_n:  # by ordinals: the clock may have been set back
            last_n, last_ns = header.n_last, header.recv_last_ns
    if STOPPING in events:
        cause = GapCause.OPERATOR_STOP
    elif "disconnected" in events:
        cause = next((cause for cause in _CUTS if cause in events), GapCause.CONNECTION_LOST)
    else:
        cause = GapCause.PROCESS_CRASH
    return Life(conn, up_ns, last_ns, cause, events.get(STOPPING))


def gaps_between(spool: Path, shard: str, close_ns: int = 0) -> list[Lost]:
    """Return the intervals between the connections of a shard, and one, still open, behind the last.

    There is none behind one that was told to stop, unless that was before `close_ns`, when the day closed: whoever stopped the
    supervisor stopped its processes too.
    """
    lives = [life for conn in spooled_connections(spool) if shard_of(conn) == shard and (life := life_of(spool, conn))]
    lost = [Lost(life.conn, life.cause, life.last_ns, after.up_ns) for life, after in pairwise(lives)]
    if lives and (lives[-1].cause != GapCause.OPERATOR_STOP or lives[-1].end_ns < close_ns):
        lost.append(Lost(lives[-1].conn, lives[-1].cause, lives[-1].last_ns))
    return lost


def _noted_ns(path: Path, event: str) -> int | None:
    """Return when a connection noted an event for the first time, if it did so near its beginning.

    Where nothing but a note that the disk has spoilt can have been it, that one was: else nobody would miss what came behind.
    """
    session = (item for item in islice(read_spool(path), _BEGINNING_BATCHES) if item[0].header.channel == SESSION)
    spoilt_ns: int | None = None
    for batch, encoded in session:
        records = spooled_records(encoded, batch)
        if not records and spoilt_ns is None:
            spoilt_ns = batch.header.recv_last_ns
        for noted, recv_ns, _ in _notes(records):
            if noted == event:
                return recv_ns
    return spoilt_ns


def _notes(session_records: bytes) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for line in session_records.splitlines():
        record = parse_record(line)
        if record.note is not None:
            yield str(record.note.get("event")), record.recv_ns, record.note


def noted_gaps(spool: Path) -> list[GapEvent]:
    """Return what the connectors of a day noted of gaps, as the journal is told of it; what a crash left open ends with it."""
    opened: dict[str, GapOpened] = {}
    closed: dict[str, GapClosed] = {}
    for conn in spooled_connections(spool):
        last_ns = 0
        for batch, encoded in read_spool(spool_path(spool, conn)):
            last_ns = max(last_ns, batch.header.recv_last_ns)
            if batch.header.channel == SESSION:
                for event, _, note in _notes(spooled_records(encoded, batch)):
                    if event == GAP:
                        gap = msgspec.convert(note, GapOpened)
                        opened[gap.gap_id] = gap
                        if note.get("to_ns") is not None:
                            closed[gap.gap_id] = msgspec.convert(note, GapClosed)
        for gap in opened.values():
            if gap.gap_id not in closed and gap.scope.get("conn") == conn:
                closed[gap.gap_id] = GapClosed(gap_id=gap.gap_id, to_ns=max(gap.from_ns, last_ns), outcome="stays")
    return [
        *((EventName.GAP_OPENED, gap) for gap in opened.values()),
        *((EventName.GAP_CLOSED, end) for gap_id, end in closed.items() if gap_id in opened),
    ]


class _Between:
    """The time between a connection and the next, in stretches of one cause each; `cause` None while it is not known."""

    def __init__(self, conn: str, from_ns: int, cause: str | None) -> None:
        self.conn, self.from_ns, self.cause = conn, from_ns, cause
        self.number = 1
        self.until_ns: int | None = None

    @property
    def gap_id(self) -> str:
        return f"gap-{self.conn}" if self.number == 1 else f"gap-{self.conn}-end-{self.number}"

    def next(self, from_ns: int, cause: str) -> None:
        self.from_ns, self.cause, self.until_ns = from_ns, cause, None
        self.number += 1


class GapLog:
    """A connector's gaps: opened, closed, noted in the connection's records, and told to the journal in the background.

    `note` is where notes go; None while there is no connection, whose notes then wait for the next.
    """

    def __init__(self, spool: Path, component: str) -> None:
        self._component = component
        self._between: _Between | None = None
        self._up = False
        self._first_up_ns: int | None = None
        self._note: Note | None = None
        self._unnoted: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING)
        self._opened: dict[str, GapOpened] = {}
        self._left_open: list[str] = []
        self._checkpoint: Checkpoint | None = None
        self._waiting: deque[GapEvent] = deque()
        self._more = asyncio.Event()
        self._all_told = asyncio.Event()
        shard = component.removeprefix("connector-")
        for conn in reversed(spooled_connections(spool)):
            if shard_of(conn) == shard and (life := life_of(spool, conn)) is not None:
                self._begin(_Between(life.conn, life.last_ns, life.cause))
                break

    def connection_lost(self, from_ns: int, cause: str | None, conn: str) -> None:
        """Open the gap behind a connection, from its last record on; one that never came up leaves the open gap open.

        With `cause` None it is told once `cause_is` has said it, or the next connection is up.
        """
        self.connection_over(from_ns, conn)
        self._note = None
        if self._up:
            self._up = False
            self._begin(_Between(conn, from_ns, cause))

    def connection_over(self, at_ns: int, conn: str) -> None:
        """Close what is open of a connection that is over: what it lacks from there on is the gap behind it."""
        for gap in list(self._opened.values()):
            if gap.scope.get("conn") == conn and (self._between is None or gap.gap_id != self._between.gap_id):
                self.close(gap.gap_id, at_ns)

    def cause_is(self, cause: str, now_ns: int, *, since_ns: int | None = None, until_ns: int | None = None) -> None:
        """Say why there is no connection now; where that changes, one gap ends and another begins.

        `since_ns` and `until_ns`: where the cause is known to hold from or to a time.
        """
        between = self._between
        if between is None:
            return
        if between.cause is None:
            if since_ns is not None and between.from_ns < since_ns <= now_ns:
                between.cause = GapCause.CONNECTION_LOST
                self._open_between()
                self._turn(since_ns, cause)
            else:
                between.cause = cause
                self._open_between()
        elif between.cause != cause:
            self._turn(now_ns, cause)
        between.until_ns = until_ns

    def cause_is_over(self, now_ns: int) -> None:
        """Say that nothing of what may pass keeps the connection away any more: it is just lost."""
        between = self._between
        if between is not None and (between.cause is None or between.cause in _PASSING):
            self.cause_is(GapCause.CONNECTION_LOST, now_ns)

    def connection_up(self, to_ns: int, note: Note | None = None) -> None:
        """Close the gap behind the last connection; `note` records in the new one."""
        self._up = True
        self._note = note
        self._first_up_ns = self._first_up_ns or to_ns
        between = self._between
        if between is not None:
            if between.cause is None:
                between.cause = GapCause.CONNECTION_LOST
                self._open_between()
            if between.until_ns is not None and between.from_ns < between.until_ns < to_ns:
                self._turn(between.until_ns, GapCause.CONNECTION_LOST)
            self.close(between.gap_id, to_ns)
            self._between = None
        self._record_waiting()
        self._close_left_open()

    def _begin(self, between: _Between) -> None:
        self._between = between
        if between.cause is not None:
            self._open_between()

    def _turn(self, at_ns: int, cause: str) -> None:
        assert self._between is not None
        self.close(self._between.gap_id, at_ns)
        self._between.next(max(at_ns, self._between.from_ns), cause)
        self._open_between()

    def _open_between(self) -> None:
        between = self._between
        assert between is not None
        assert between.cause is not None
        scope = {"conn": between.conn, "component": self._component}
        self.open(GapOpened(gap_id=between.gap_id, cause=between.cause, from_ns=between.from_ns, scope=scope))

    def open(self, gap: GapOpened) -> None:
        """Open a gap."""
        self._opened[gap.gap_id] = gap
        self._put(EventName.GAP_OPENED, gap)
        self._record(gap, None)

    def close(self, gap_id: str, to_ns: int, outcome: Literal["stays", "healed"] = "stays") -> None:
        """Close a gap that this log has opened; nothing happens where it is closed already."""
        gap = self._opened.pop(gap_id, None)
        if gap is not None:
            self._close(gap, to_ns, outcome)

    def declare(self, gap: GapOpened, to_ns: int, outcome: Literal["stays", "healed"] = "stays") -> None:
        """Tell of a gap that is over; told again, only a better outcome counts."""
        self._put(EventName.GAP_OPENED, gap)
        self._close(gap, to_ns, outcome)

    def _close(self, gap: GapOpened, to_ns: int, outcome: Literal["stays", "healed"]) -> None:
        # The clock may have been set back in between.
        end = GapClosed(gap_id=gap.gap_id, to_ns=max(gap.from_ns, to_ns), outcome=outcome)
        self._put(EventName.GAP_CLOSED, end)
        self._record(gap, end)

    def _record(self, gap: GapOpened, end: GapClosed | None) -> None:
        note = {"event": GAP, **msgspec.to_builtins(gap), **(msgspec.to_builtins(end) if end is not None else {})}
        self._unnoted.append(note)
        self._record_waiting()

    def _record_waiting(self) -> None:
        while self._unnoted and self._note is not None and self._note(self._unnoted[0]):
            self._unnoted.popleft()

    def checkpoint(self, counts: Checkpoint) -> None:
        """Tell the journal of counts; where it is away, the latest ones wait."""
        self._checkpoint = counts
        self._more.set()

    @property
    def waiting(self) -> int:
        """Return how many events the journal has not been told of."""
        return len(self._waiting)

    async def told(self) -> None:
        """Return once the journal has been told of everything."""
        self._all_told.clear()
        self._more.set()
        await self._all_told.wait()

    def _put(self, event: EventName, data: GapOpened | GapClosed) -> None:
        if len(self._waiting) >= MAX_WAITING:
            # The spool holds the same facts, and the audit tells the journal of what it was not told of.
            _log.error("the journal has not taken %d gap events; %s %s waits", MAX_WAITING, event, data.gap_id)
        else:
            self._waiting.append((event, data))
        self._more.set()

    async def run(self, stores: Stores, clock: Clock, env: str, date: str) -> None:
        """Append what is waiting, in order, until cancelled; a journal that does not answer is asked again."""
        book = DayBook(env, stores.journal, stores.cache, clock, f"capture:{self._component}")
        while not await self._find_left_open(book, date):
            await asyncio.sleep(RETRY_AFTER_S)
        while True:
            while self._waiting:
                if await self._append(book, date, *self._waiting[0]):
                    self._waiting.popleft()
                else:
                    await asyncio.sleep(RETRY_AFTER_S)
            counts, self._checkpoint = self._checkpoint, None
            if counts is not None:
                try:
                    await book.append(date, EventName.CHECKPOINT, data=counts)
                except SsmdError as error:
                    # The next one, a minute later, says more; the audit counts all of it again.
                    _log.warning("checkpoint not journaled: %s", error)
            self._more.clear()
            if not self._waiting and self._checkpoint is None:
                self._all_told.set()
                await self._more.wait()

    async def _find_left_open(self, book: DayBook, date: str) -> bool:
        """Take over the gaps that an earlier process of this component left open; False where the journal cannot be read."""
        try:
            day = await book.day(date)
        except SsmdError as error:  # publishing goes on beside it
            _log.warning("which gaps an earlier process left open is not known yet: %s", error)
            return False
        if day is None:
            return True
        mine = {*self._opened, *(data.gap_id for _, data in self._waiting)}
        self._left_open = [
            gap.gap_id
            for gap in day.gaps
            if gap.outcome == "open" and gap.scope.get("component") == self._component and gap.gap_id not in mine
        ]
        self._close_left_open()
        return True

    def _close_left_open(self) -> None:
        if self._first_up_ns is not None:
            for gap_id in self._left_open:
                self._put(EventName.GAP_CLOSED, GapClosed(gap_id=gap_id, to_ns=self._first_up_ns, outcome="stays"))
            self._left_open = []

    async def _append(self, book: DayBook, date: str, event: EventName, data: GapOpened | GapClosed) -> bool:
        try:
            await tell(book, date, event, data)
        except UnreachableError as error:
            _log.warning("%s of %s waits for the journal: %s", event, data.gap_id, error)
            return False
        except SsmdError as error:
            _log.error("the journal refuses %s of %s: %s", event, data.gap_id, error)
        return True


async def tell(book: DayBook, date: str, event: EventName, data: GapOpened | GapClosed) -> bool:
    """Append one event of a gap unless the journal has it, or a better outcome; tell whether it was appended."""
    day = await book.day(date)
    known = day.gap_by_id.get(data.gap_id) if day is not None else None
    if isinstance(data, GapOpened):
        if known is not None:
            return False
    elif known is None or (known.to_ns is not None and (data.outcome == "stays" or data.outcome == known.outcome)):
        return False
    await book.append(date, event, data=data)
    return True
