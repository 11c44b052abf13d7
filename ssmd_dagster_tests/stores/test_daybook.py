"""The fold of a journal that the cache keeps: readers begin with it, and it is believed only as a copy of this very journal."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from nats.js import JetStreamContext
from redis.asyncio import Redis

from ssmd_dagster.day.events import Book, JournalBrokenError
from ssmd_dagster.day.payloads import Checkpoint
from ssmd_dagster.day.states import EventName
from ssmd_dagster.stores import daybook
from ssmd_dagster.stores.cache import DayCache
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster.stores.folded import folding_rules, pack, unpack
from ssmd_dagster.stores.journal import Journal, StoredEvent
from ssmd_dagster_tests.day.builders import DATA, DATE
from ssmd_dagster_tests.day.test_events import Try, histories, replayed

if TYPE_CHECKING:
    from ssmd_dagster.day.payloads import Payload

AT_NS = 1_765_670_400_000_000_000


class Watched(Journal):
    """A journal that counts how many events are read for a fold."""

    def __init__(self, js: JetStreamContext, env: str) -> None:
        super().__init__(js, env)
        self.folded = 0

    async def pages(self, after_seq: int = 0, up_to: int | None = None) -> AsyncGenerator[list[StoredEvent], None]:
        """Yield what the journal has, and count what is read up to its end."""
        async for page in super().pages(after_seq, up_to):
            if up_to is None:
                self.folded += len(page)
            yield page


class Place:
    """One environment's journal and cache, and new readers of it."""

    def __init__(self, js: JetStreamContext, redis: Redis, env: str) -> None:
        self.env = env
        self.journal = Watched(js, env)
        self.cache = DayCache(redis, env)

    def reader(self) -> DayBook:
        """Return what a new process would have."""
        return DayBook(self.env, self.journal, self.cache, lambda: AT_NS, "cli:test@host")

    async def read(self) -> tuple[Book, int]:
        """Read as a new process would; return the days and how many events were folded for that."""
        self.journal.folded = 0
        return await self.reader().refresh(), self.journal.folded


@pytest.fixture
async def place(js: JetStreamContext, redis_client: Redis, env_name: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A day that runs, with some checkpoints, of which ten make a fold worth keeping."""
    monkeypatch.setattr(daybook, "KEEP_FROM", 10)
    place = Place(js, redis_client, env_name)
    await place.journal.create()
    book = place.reader()
    for event in (EventName.DEFINED, EventName.START_REQUESTED, EventName.STARTED):
        await book.append(DATE, event, data=DATA.get(event))
    for number in range(12):
        counts: Payload = Checkpoint(component="connector", messages=number)
        await book.append(DATE, EventName.CHECKPOINT, data=counts)
    return place


async def test_a_reader_begins_with_what_another_one_has_folded(place: Place) -> None:
    """The second reader reads nothing, a third one after another event just that, and all have the same days."""
    whole, count = await place.read()
    assert count == whole.tip_seq == 15
    assert await place.read() == (whole, 0)
    writer = place.reader()
    await writer.append(DATE, EventName.GAP_OPENED, data=DATA[EventName.GAP_OPENED])
    assert await place.read() == (writer.book, 1)


async def test_what_was_folded_of_another_journal_is_not_believed(place: Place) -> None:
    """The last event's hash must be in the journal, in that place; otherwise all is read."""
    whole, _ = await place.read()
    await place.cache.put_folded(Book(env="x", days={}, tip_seq=7), "0" * 64)
    assert await place.read() == (whole, 15)
    await place.cache.put_folded(Book(env="x", days={}, tip_seq=700), "0" * 64)
    assert await place.read() == (whole, 15)


async def test_a_reader_that_has_another_journal_in_mind_folds_nothing_onto_it(place: Place) -> None:
    """A backup was restored under a process that goes on, and has more events by now than that had read."""
    reader = place.reader()
    before = await reader.refresh()
    assert reader._tip is not None
    reader._tip = msgspec.structs.replace(reader._tip, sha256="0" * 64)
    assert await reader.refresh() == before, "nothing stands behind it"
    await place.reader().append(DATE, EventName.GAP_OPENED, data=DATA[EventName.GAP_OPENED])
    with pytest.raises(JournalBrokenError, match="sequence 16"):
        await reader.refresh()
    with pytest.raises(JournalBrokenError, match="sequence 16"):
        await reader.append(DATE, EventName.VERIFIED, data=DATA[EventName.VERIFIED])


async def test_what_is_damaged_or_folded_by_other_rules_is_not_used(
    place: Place, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither bytes that were cut nor another version's fold come back."""
    whole, _ = await place.read()
    key = f"{place.env}:day:folded"
    raw = await redis_client.get(key)
    assert isinstance(raw, bytes)
    await redis_client.set(key, raw[:-1])
    assert await place.read() == (whole, 15)
    monkeypatch.setattr("ssmd_dagster.stores.folded.folding_rules", lambda: "of tomorrow")
    assert unpack(raw) is None


async def test_a_rebuild_folds_the_journal_itself(place: Place) -> None:
    """`refold` believes no copy, even one that names the journal's own last event."""
    whole, _ = await place.read()
    tip = (await place.journal.read())[-1]
    await place.cache.put_folded(Book(env=place.env, days={}, tip_seq=tip.seq), tip.sha256)
    book = place.reader()
    assert await book.refold() == whole
    assert await place.read() == (whole, 0)


async def test_a_reading_that_is_cut_off_gets_further_the_next_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was folded before the journal's pages ended is kept."""
    monkeypatch.setattr(daybook, "KEEP_WITHIN", 1)
    monkeypatch.setattr("ssmd_dagster.stores.journal._READ_BATCH", 4)
    ended = place.reader()
    pages = place.journal.pages

    async def cut(after_seq: int = 0, up_to: int | None = None) -> AsyncGenerator[list[StoredEvent], None]:
        async for page in pages(after_seq, up_to):
            yield page
            raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(place.journal, "pages", cut)
        with pytest.raises(TimeoutError):
            await ended.refresh()
    _, count = await place.read()
    assert 0 < count < 15


@given(histories)
def test_a_fold_comes_back_as_it_was(tries: list[Try]) -> None:
    """Whatever the days have been through."""
    book = replayed(tries).book
    folded = unpack(pack(book, "ab"))
    assert folded is not None
    assert (folded.book, folded.tip_sha256, folded.rules) == (book, "ab", folding_rules())
