"""What a connector tells the journal of the intervals in which it recorded nothing.

A gap's id is that of the connection that ended (`gap-812-a-3`), so telling the journal twice, or by the next process after a
crash, makes no second gap. Not here: what a gap means for the day.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

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
from ssmd_dagster.day.payloads import GapClosed, GapOpened
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
BUFFER_OVERFLOW = "buffer_overflow"
"""What it notes before it closes the socket because too much waits for the disk or the stream; also the gap's cause."""
MAX_WAITING = 10_000
"""Gap events that wait for the journal; a connector that reconnects every half second fills this in an hour and a half."""
_BEGINNING_BATCHES = 50_000
_END_BATCHES = 5_000
_END_NS = 30_000_000_000
"""How far back from its last frame a connection's end is looked for: closing takes seconds."""

GapEvent = tuple[EventName, GapOpened | GapClosed]

_log = logging.getLogger(__name__)


class Life(msgspec.Struct, frozen=True):
    """What a connection's spool says of its beginning and end.

    `up_ns` is when everything was subscribed, `last_ns` the receive time of its last frame, `cause` why it ended.
    """

    conn: str
    up_ns: int
    last_ns: int
    cause: str


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
            told.append((EventName.GAP_CLOSED, GapClosed(gap_id=self.gap_id, to_ns=self.to_ns, outcome="stays")))
        return told


def life_of(spool: Path, conn: str) -> Life | None:
    """Read a connection's beginning and end from its spool file; None if it never came up.

    Its end is read from the back: however much was recorded, the next connection does not wait for it.
    """
    path = spool_path(spool, conn)
    up_ns = _noted_ns(path, SUBSCRIBED)
    if up_ns is None:
        return None
    last_ns = up_ns
    events: set[str] = set()
    for batch, encoded in islice(read_spool_back(path), _END_BATCHES):
        header = batch.header
        if header.recv_last_ns < last_ns - _END_NS:
            break
        if header.channel == SESSION:
            events.update(event for event, _ in _notes(spooled_records(encoded, batch)))
        else:
            last_ns = max(last_ns, header.recv_last_ns)
    if STOPPING in events:
        cause = "operator_stop"
    elif "disconnected" in events:
        cause = BUFFER_OVERFLOW if BUFFER_OVERFLOW in events else "connection_lost"
    else:
        cause = "process_crash"
    return Life(conn, up_ns, last_ns, cause)


def gaps_between(spool: Path, shard: str) -> list[Lost]:
    """Return the intervals between the connections of a shard, the last one open unless it was told to stop."""
    lives = [life for conn in spooled_connections(spool) if shard_of(conn) == shard and (life := life_of(spool, conn))]
    lost = [Lost(life.conn, life.cause, life.last_ns, after.up_ns) for life, after in pairwise(lives)]
    if lives and lives[-1].cause != "operator_stop":
        lost.append(Lost(lives[-1].conn, lives[-1].cause, lives[-1].last_ns))
    return lost


def _noted_ns(path: Path, event: str) -> int | None:
    """Return when a connection noted an event for the first time, if it did so near its beginning."""
    session = (item for item in islice(read_spool(path), _BEGINNING_BATCHES) if item[0].header.channel == SESSION)
    for batch, encoded in session:
        for noted, recv_ns in _notes(spooled_records(encoded, batch)):
            if noted == event:
                return recv_ns
    return None


def _notes(session_records: bytes) -> Iterator[tuple[str, int]]:
    for line in session_records.splitlines():
        record = parse_record(line)
        if record.note is not None:
            yield str(record.note.get("event")), record.recv_ns


class GapLog:
    """Opens a gap where a connection ends and closes it when the next one is up; tells the journal in the background."""

    def __init__(self, spool: Path, component: str) -> None:
        self._component = component
        self._open: Lost | None = None
        self._up = False
        self._waiting: deque[GapEvent] = deque()
        self._more = asyncio.Event()
        shard = component.removeprefix("connector-")
        for conn in reversed(spooled_connections(spool)):
            if shard_of(conn) == shard and (life := life_of(spool, conn)) is not None:
                self._open = Lost(life.conn, life.cause, life.last_ns)
                self._put(*self._open.events(component))
                break

    def connection_lost(self, from_ns: int, cause: str, conn: str) -> None:
        """Open the gap behind a connection, from its last record on; one that never came up leaves the open gap open."""
        if self._up:
            self._up = False
            self._open = Lost(conn, cause, from_ns)
            self._put(*self._open.events(self._component))

    def connection_up(self, to_ns: int) -> None:
        """Close the open gap."""
        self._up = True
        if self._open is not None:
            self._put(msgspec.structs.replace(self._open, to_ns=to_ns).events(self._component)[-1])
            self._open = None

    @property
    def waiting(self) -> int:
        """Return how many events the journal has not been told of."""
        return len(self._waiting)

    def _put(self, *events: GapEvent) -> None:
        for event, data in events:
            if len(self._waiting) >= MAX_WAITING:
                # The spool holds the same facts, and the audit tells the journal of what it was not told of.
                _log.error("the journal has not taken %d gap events; %s %s waits", MAX_WAITING, event, data.gap_id)
            else:
                self._waiting.append((event, data))
        self._more.set()

    async def run(self, stores: Stores, clock: Clock, env: str, date: str) -> None:
        """Append what is waiting, in order, until cancelled; a journal that does not answer is asked again."""
        book = DayBook(env, stores.journal, stores.cache, clock, f"capture:{self._component}")
        while True:
            while self._waiting:
                if await self._append(book, date, *self._waiting[0]):
                    self._waiting.popleft()
                else:
                    await asyncio.sleep(RETRY_AFTER_S)
            self._more.clear()
            await self._more.wait()

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
    """Append one event of a gap unless the journal has it; tell whether it was appended."""
    day = await book.day(date)
    known = next((gap for gap in day.gaps if gap.gap_id == data.gap_id), None) if day is not None else None
    if event is EventName.GAP_OPENED and known is not None:
        return False
    if event is EventName.GAP_CLOSED and (known is None or known.to_ns is not None):
        return False
    await book.append(date, event, data=data)
    return True
