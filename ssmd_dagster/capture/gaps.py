"""What a connector tells the journal of the intervals in which it recorded nothing.

A gap's id is that of the connection that ended (`gap-812-a-3`), so telling the journal twice, or by the next process after a
crash, makes no second gap. Not here: what a gap means for the day.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from ssmd_dagster.capture.spool import read_spool, spool_path, spooled_connections, spooled_records
from ssmd_dagster.clock import Clock
from ssmd_dagster.day.payloads import GapClosed, GapOpened
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook

RETRY_AFTER_S = 1.0
STOPPING_NOTE = {"event": "stopping"}
"""What a connector that is told to stop notes in its `session` channel."""
MAX_WAITING = 10_000
"""Gap events that wait for the journal; a connector that reconnects every half second fills this in an hour and a half."""

_log = logging.getLogger(__name__)


class _Lost(msgspec.Struct):
    gap_id: str
    cause: str
    from_ns: int
    conn: str


def last_seen_ns(spool: Path, conn: str) -> int | None:
    """Return the receive time of a connection's last spooled record, None where nothing whole was written."""
    last = None
    for batch, _ in read_spool(spool_path(spool, conn)):
        last = max(last or 0, batch.header.recv_last_ns)
    return last


def was_told_to_stop(spool: Path, conn: str) -> bool:
    """Tell whether a connection ended because its connector was told to stop, by the note that it then leaves."""
    notes = [
        spooled_records(encoded, batch)
        for batch, encoded in read_spool(spool_path(spool, conn))
        if batch.header.channel == SESSION
    ]
    return any(STOPPING_NOTE["event"].encode() in records for records in notes[-2:])


class GapLog:
    """Opens a gap where a connection ends and closes it when the next one is up; tells the journal in the background."""

    def __init__(self, spool: Path, component: str) -> None:
        self._component = component
        self._open: _Lost | None = None
        self._events: asyncio.Queue[tuple[EventName, GapOpened | GapClosed]] = asyncio.Queue(MAX_WAITING)
        shard = component.removeprefix("connector-")
        earlier = [conn for conn in spooled_connections(spool) if conn.split("-")[1] == shard]
        if earlier and (seen_ns := last_seen_ns(spool, earlier[-1])) is not None:
            cause = "operator_stop" if was_told_to_stop(spool, earlier[-1]) else "process_crash"
            self.connection_lost(seen_ns, cause, earlier[-1])

    def connection_lost(self, from_ns: int, cause: str, conn: str) -> None:
        """Open the gap behind a connection, from its last record on."""
        self._open = _Lost(f"gap-{conn}", cause, from_ns, conn)
        scope = {"conn": conn, "component": self._component}
        self._put(EventName.GAP_OPENED, GapOpened(gap_id=self._open.gap_id, cause=cause, from_ns=from_ns, scope=scope))

    def connection_up(self, to_ns: int) -> None:
        """Close the open gap: from here on records come again. What is missing inside stays missing."""
        if self._open is not None:
            self._put(EventName.GAP_CLOSED, GapClosed(gap_id=self._open.gap_id, to_ns=to_ns, outcome="stays"))
            self._open = None

    def _put(self, event: EventName, data: GapOpened | GapClosed) -> None:
        try:
            self._events.put_nowait((event, data))
        except asyncio.QueueFull:
            # The session channel holds the same fact (`disconnected`, `connected`), and verification reads it there.
            _log.error("the journal has not taken %d gap events; %s %s is left out", MAX_WAITING, event, data.gap_id)

    async def run(self, stores: Stores, clock: Clock, env: str, date: str) -> None:
        """Append what is waiting, in order, until cancelled; a journal that does not answer is asked again."""
        book = DayBook(env, stores.journal, stores.cache, clock, f"capture:{self._component}")
        while True:
            event, data = await self._events.get()
            while not await self._append(book, date, event, data):
                await asyncio.sleep(RETRY_AFTER_S)

    async def _append(self, book: DayBook, date: str, event: EventName, data: GapOpened | GapClosed) -> bool:
        try:
            day = await book.day(date)
            known = next((gap for gap in day.gaps if gap.gap_id == data.gap_id), None) if day is not None else None
            if event is EventName.GAP_OPENED and known is not None:
                return True
            if event is EventName.GAP_CLOSED and (known is None or known.to_ns is not None):
                return True
            await book.append(date, event, data=data)
        except UnreachableError as error:
            _log.warning("%s of %s waits for the journal: %s", event, data.gap_id, error)
            return False
        except SsmdError as error:
            _log.error("the journal refuses %s of %s: %s", event, data.gap_id, error)
        return True
