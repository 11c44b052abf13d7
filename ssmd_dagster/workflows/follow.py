"""Read an environment's journal on from where somebody left off, each event with the day as it was after it."""

from __future__ import annotations

from dataclasses import dataclass

from ssmd_dagster.day.events import DayEvent, TradingDay
from ssmd_dagster.day.folding import fold, fold_day
from ssmd_dagster.day.states import ENVIRONMENT_EVENTS
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
    """Remembers the days up to the last event that was read, so that the next look reads only what is new."""

    def __init__(self) -> None:
        self._seq = 0
        self._days: dict[str, TradingDay] = {}

    async def news(self, desk: Desk, after_seq: int) -> list[News]:
        """Return the events after `after_seq`, at most `AT_ONCE`; raises `JournalBrokenError` where it ends before that."""
        stored = await desk.stores.journal.read(after_seq, after_seq + AT_ONCE)
        if self._seq != after_seq:  # a new process, or somebody has put the place back
            self._days = {}
        told = {entry.event.date for entry in stored if entry.event.event not in ENVIRONMENT_EVENTS}
        if unknown := told - self._days.keys():
            self._days |= await _days_at(desk, unknown, after_seq)
        found: list[News] = []
        for entry in stored:
            seq, event, day = entry.seq, entry.event, None
            if event.event not in ENVIRONMENT_EVENTS:
                day = self._days[event.date] = fold_day(self._days.get(event.date), event, seq)
            found.append(News(seq, event, day))
        self._seq = stored[-1].seq if stored else after_seq
        return found


async def _days_at(desk: Desk, dates: set[str], seq: int) -> dict[str, TradingDay]:
    """Return days as they stood after the event of a sequence, those that had an event by then."""
    now = (await desk.book.refresh()).days
    first_seq = min((now[date].first_seq for date in dates if date in now), default=seq + 1)
    past = await desk.stores.journal.read(first_seq - 1, seq) if first_seq <= seq else []
    return fold((entry.seq, entry.event) for entry in past if entry.event.date in dates).days
