"""Read an environment's journal on from where somebody left off, each event with the day as it was after it."""

from __future__ import annotations

from dataclasses import dataclass

from ssmd_dagster.day.events import EMPTY_BOOK, Book, DayEvent, TradingDay, fold
from ssmd_dagster.stores.journal import StoredEvent
from ssmd_dagster.workflows.desk import Desk

AT_ONCE = 200
"""Events that one look returns at most: a long journal that nobody has read is caught up with in several looks."""


@dataclass(frozen=True)
class News:
    """One event, its sequence, and its day after it (None for an event of the whole environment)."""

    seq: int
    event: DayEvent
    day: TradingDay | None


class Follower:
    """Remembers the fold up to the last event that was read, so that the next look reads only what is new."""

    def __init__(self) -> None:
        self._book: Book = EMPTY_BOOK

    async def news(self, desk: Desk, after_seq: int) -> list[News]:
        """Return the events after `after_seq`, at most `AT_ONCE`; raises `JournalBrokenError` where it ends before that."""
        stored: list[StoredEvent] = []
        if self._book.tip_seq != after_seq:  # a new process, or somebody has put the place back
            known = await desk.stores.journal.read(0)
            self._book = fold((entry.seq, entry.event) for entry in known if entry.seq <= after_seq)
            stored = [entry for entry in known if entry.seq > after_seq]
        else:
            stored = await desk.stores.journal.read(after_seq)
        found: list[News] = []
        for entry in stored[:AT_ONCE]:
            self._book = fold([(entry.seq, entry.event)], self._book)
            found.append(News(entry.seq, entry.event, self._book.days.get(entry.event.date)))
        return found
