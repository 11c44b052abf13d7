"""Read an environment's journal on from where somebody left off, what is news with the day as it was after it.

Counts and steps of processes at work are folded, and are no news.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from ssmd_dagster.day.events import DayEvent, TradingDay
from ssmd_dagster.day.folding import fold_day
from ssmd_dagster.day.states import ENVIRONMENT_EVENTS, EventName
from ssmd_dagster.stores.journal import StoredEvent
from ssmd_dagster.workflows.desk import Desk

AT_ONCE = 50
"""News that one look returns at most, a few days': the catalog reads the store for each that is done. A long journal that
nobody has read is caught up with in many looks."""
READ_AT_ONCE = 5_000
"""Events that one look reads at most to find them."""
FOLDED_AT_ONCE = 50_000
"""Events that one look folds at most on its way to where it was left off, a second's work: a long way takes several looks."""

_NEWS = ENVIRONMENT_EVENTS | {
    EventName.VERIFIED,
    EventName.CONDITION_CHANGED,
    EventName.SEALED,
    EventName.GAP_OPENED,
    EventName.GAP_CLOSED,
}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """How far a journal was read: the last event's sequence and SHA-256 (hex), None where it was not kept.

    `old_seq` is how far the journal went when its reading began: up to there the news may be old.
    """

    seq: int = 0
    sha256: str | None = None
    old_seq: int = 0


@dataclass(frozen=True)
class News:
    """One event, its sequence, and its day after it (None for an event of the whole environment)."""

    seq: int
    event: DayEvent
    day: TradingDay | None


@dataclass(frozen=True)
class Look:
    """What was found, how far it goes, and the place that was given up because it is none of this journal's."""

    news: list[News]
    place: Place
    lost: Place | None


def is_news(event: DayEvent) -> bool:
    """Say whether an event is told: every transition, and what changes what is known of a day."""
    return event.to is not None or event.event in _NEWS


@dataclass
class _Days:
    """Days after the event of sequence `seq`; those whose last event is a later one are to come yet."""

    seq: int
    days: dict[str, TradingDay]

    def fold(self, stored: StoredEvent) -> TradingDay | None:
        day: TradingDay | None = None
        if stored.event.event not in ENVIRONMENT_EVENTS:
            day = self.days.get(stored.event.date)
            if day is None or day.last_seq < stored.seq:
                day = self.days[stored.event.date] = fold_day(day, stored.event, stored.seq)
        self.seq = stored.seq
        return day


class Follower:
    """Remembers the days up to the last event that was read, so that the next look reads only what is new."""

    def __init__(self) -> None:
        self._from = -1
        self._before = _Days(0, {})  # at `_from`, or on the way there
        self._after = _Days(-1, {})

    async def look(self, desk: Desk, place: Place | None) -> Look:
        """Return what is news behind a place; None, or a place that another journal had, begins with the first event.

        Another journal stands there where a backup was restored, or an environment's servers were set up anew. Raises
        `JournalBrokenError`, `UnreachableError`.
        """
        journal = desk.stores.journal
        tip_seq = await journal.tip_seq()
        lost: Place | None = None
        if place is not None and tip_seq != place.seq and not await _holds(desk, place, tip_seq):
            lost, place = place, None
        if place is None or not place.seq:  # nothing has been read yet
            place = Place(old_seq=tip_seq)
            self._from = -1
        if tip_seq == place.seq:  # if it is another journal's event, the next one shows that
            return Look([], place, lost)
        if not await self._is_there(desk, place.seq):
            return Look([], place, lost)
        news: list[News] = []
        self._after = _Days(place.seq, dict(self._before.days))
        for stored in await journal.read(place.seq, place.seq + READ_AT_ONCE):
            day = self._after.fold(stored)
            place = Place(seq=stored.seq, sha256=stored.sha256, old_seq=place.old_seq)
            if is_news(stored.event):
                news.append(News(stored.seq, stored.event, day))
                if len(news) == AT_ONCE:
                    break
        return Look(news, place, lost)

    async def _is_there(self, desk: Desk, seq: int) -> bool:
        """Find the days as they stood after the event of a sequence, and say whether that is done."""
        if self._from != seq:
            self._before = self._after if self._after.seq == seq else await _known(desk, seq)
            self._from = seq
        if self._before.seq < seq:
            last_seq = min(seq, self._before.seq + FOLDED_AT_ONCE)
            async with aclosing(desk.stores.journal.pages(self._before.seq, last_seq)) as pages:
                async for page in pages:
                    for stored in page:
                        self._before.fold(stored)
        return self._before.seq == seq


async def _holds(desk: Desk, place: Place, tip_seq: int) -> bool:
    if place.sha256 is None:
        return place.seq <= tip_seq
    return await desk.stores.journal.holds(place.seq, place.sha256) is not None


async def _known(desk: Desk, seq: int) -> _Days:
    """Return the days without an event behind a sequence, and from where on the others are to be folded."""
    days = (await desk.book.refresh()).days.values()
    first_seq = min((day.first_seq - 1 for day in days if day.last_seq > seq), default=seq)
    return _Days(min(seq, first_seq), {day.date: day for day in days if day.last_seq <= seq})
