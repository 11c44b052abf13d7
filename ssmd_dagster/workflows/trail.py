"""The audit trail: every event of an environment's journal in order, with the place where its chain of hashes breaks.

Not for what the events make of the days: that is their fold (`day.folding`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import cast

import msgspec

from ssmd_dagster.day.events import JournalBrokenError
from ssmd_dagster.stores.journal import StoredEvent
from ssmd_dagster.workflows.desk import Desk

Show = Callable[[StoredEvent], None]


class Trail(msgspec.Struct, frozen=True, kw_only=True):
    """What was read: how many events, the last one's sequence, and where the chain breaks, if it does."""

    events: int
    last_seq: int
    broken: JournalBrokenError | None = None


async def read_trail(desk: Desk, show: Show) -> Trail:
    """Show every event that is in the journal now, in order, up to where its chain breaks.

    Raises `UnreachableError` where NATS does not answer.
    """
    journal, count, last_seq = desk.stores.journal, 0, 0
    try:
        tip = await journal.tip_seq()
        if tip:
            # Closed at once, so that its consumer does not outlive the connection.
            events = cast("AsyncGenerator[StoredEvent, None]", journal.follow())
            async with contextlib.aclosing(events):
                async for stored in events:
                    show(stored)
                    count, last_seq = count + 1, stored.seq
                    if stored.seq >= tip:
                        break
    except JournalBrokenError as error:
        return Trail(events=count, last_seq=last_seq, broken=error)
    return Trail(events=count, last_seq=last_seq)


async def follow(desk: Desk, after_seq: int, show: Show) -> None:
    """Show every event behind `after_seq` as it comes, until cancelled. Raises `JournalBrokenError` where the chain breaks."""
    async for stored in desk.stores.journal.follow(after_seq):
        show(stored)
