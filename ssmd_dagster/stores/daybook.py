"""The days of one environment as they stand, and the one way to change them: read, check by the rules, append.

Two actors that decide on the same reading cannot both win: the append names the sequence it follows, the loser reads on
and is judged again by the rules of `day/`. After the journal the cache is told, best effort: it can be rebuilt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from ulid import ULID

from ssmd_dagster.clock import Clock
from ssmd_dagster.day.events import EMPTY_BOOK, Book, JournalBrokenError, TradingDay
from ssmd_dagster.day.folding import fold, new_event
from ssmd_dagster.day.payloads import Payload
from ssmd_dagster.day.states import ENVIRONMENT_EVENTS, OPENS_EPOCH, EventName
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.stores.cache import DayCache
from ssmd_dagster.stores.journal import AppendConflictError, Journal, StoredEvent

KEEP_FROM = 2_000
"""Events that a reading has folded of its own from which on it leaves the fold with the cache: more than a day's."""
KEEP_WITHIN = 100_000
"""The same while it still reads: what is cut off by a time limit gets further the next time."""
ATTEMPTS = 32
"""Appends tried against other actors' before giving up: each round at least one of them got its event in."""

_log = logging.getLogger(__name__)


class DayBook:
    """The fold of an environment's journal, kept up to date on demand, for one actor."""

    def __init__(self, env: str, journal: Journal, cache: DayCache, clock: Clock, actor: str) -> None:
        self.env = env
        self.actor = actor
        self.clock = clock
        self.cache = cache
        self.book: Book = EMPTY_BOOK
        self._journal = journal
        self._tip: StoredEvent | None = None
        self._unkept = 0

    async def refresh(self) -> Book:
        """Read what came since the last reading and return all days."""
        if self._tip is None:
            await self._resume()
        await self._read_on()
        return self.book

    async def refold(self) -> Book:
        """Read the whole journal, whatever the cache has kept of its fold, and return all days."""
        self.book, self._tip = EMPTY_BOOK, None
        await self._read_on()
        return self.book

    async def keep(self) -> None:
        """Leave the fold with the cache, for readers to come; best effort."""
        self._unkept = 0
        if self._tip is None:
            return
        try:
            await self.cache.put_folded(self.book, self._tip.sha256)
        except SsmdError as error:
            _log.warning("the cache did not take the fold up to sequence %d: %s", self._tip.seq, error)

    async def _resume(self) -> None:
        """Begin with what the cache has kept, if it is of this very journal."""
        try:
            kept = await self.cache.folded()
        except SsmdError as error:
            _log.warning("the cache was not asked for what is folded, all is read: %s", error)
            return
        tip = None if kept is None else await self._journal.holds(kept.book.tip_seq, kept.tip_sha256)
        if kept is not None and tip is not None:
            self.book, self._tip = kept.book, tip

    async def _read_on(self, looked_for: str | None = None) -> bool:
        """Fold what is new, and say whether the event of the id that is looked for is in it."""
        found = False
        async with aclosing(self._journal.pages(self._tip.seq if self._tip else 0)) as pages:
            async for page in pages:
                if self._tip is not None and page[0].event.prev_sha256 != self._tip.sha256:
                    what = "it does not follow the event that was read before: another journal stands there now"
                    raise JournalBrokenError(page[0].seq, what, where=self.env)
                self.book = fold(((stored.seq, stored.event) for stored in page), self.book)
                self._tip = page[-1]
                found = found or any(stored.event.id == looked_for for stored in page)
                self._unkept += len(page)
                if self._unkept >= KEEP_WITHIN:
                    await self.keep()
        if self._unkept >= KEEP_FROM:
            await self.keep()
        return found

    async def day(self, date: str) -> TradingDay | None:
        """Read on and return a day, None where the journal has no event of it."""
        return (await self.refresh()).days.get(date)

    async def append(
        self,
        date: str,
        event: EventName,
        *,
        epoch: int | None = None,
        reason: str | None = None,
        data: Mapping[str, Any] | Payload | None = None,
    ) -> TradingDay:
        """Append one event of a day and return the day after it.

        `epoch` None means: open an epoch where the event can, else speak in the day's current one.

        Raises:
            IllegalTransitionError: The state, as it is by now, does not take the event.
            StaleEpochError: Another attempt holds the day by now.
            UnreachableError: NATS does not answer; whether the event got in is then unknown and the next reading shows it.
        """
        await self._append(date, event, epoch=epoch, reason=reason, data=data)
        return self.book.days[date]

    async def append_for_environment(self, date: str, event: EventName, *, reason: str | None = None) -> Book:
        """Append `paused` or `resumed`."""
        await self._append(date, event, epoch=None, reason=reason, data=None)
        return self.book

    async def _append(
        self,
        date: str,
        event: EventName,
        *,
        epoch: int | None,
        reason: str | None,
        data: Mapping[str, Any] | Payload | None,
    ) -> None:
        event_id = str(ULID.from_timestamp(self.clock() / 1e9))
        if self._tip is None:
            await self._resume()
        for _ in range(ATTEMPTS):
            if await self._read_on(event_id):
                break
            day = None if event in ENVIRONMENT_EVENTS else self.book.days.get(date)
            spoken = epoch
            if epoch is None and day is not None and event not in OPENS_EPOCH:
                spoken = day.epoch
            made = new_event(
                day,
                event,
                id=event_id,
                env=self.env,
                date=date,
                epoch=spoken,
                at_ns=self.clock(),
                actor=self.actor,
                reason=reason,
                data=data,
            )
            try:
                stored = await self._journal.append(made, self._tip)
            except AppendConflictError:
                continue  # what came in between may be this very event: an append whose answer was lost
            except UnreachableError:
                if await self._read_on(event_id):
                    break
                raise
            self.book = fold([(stored.seq, stored.event)], self.book)
            self._tip = stored
            break
        else:
            raise UnreachableError(
                f"`{event}` found no free place in {ATTEMPTS} appends",
                where=f"{self.env} {date}",
                do="Other actors write to this journal all the time; see `ssmd day history`",
            )
        await self._mirror()

    async def _mirror(self) -> None:
        try:
            await self.cache.apply(self.book)
        except SsmdError as error:
            # The cache is no source of truth: `ssmd day rebuild` and the next transition bring it up to date.
            _log.warning("the cache was not told of journal sequence %d: %s", self.book.tip_seq, error)
