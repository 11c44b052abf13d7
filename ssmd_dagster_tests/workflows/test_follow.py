"""Following a journal: whoever begins anywhere sees each event with its day as it was then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.events import Book
from ssmd_dagster.day.folding import fold
from ssmd_dagster.day.states import ENVIRONMENT_EVENTS, EventName
from ssmd_dagster.workflows import follow
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.follow import Follower, Look, News, Place, is_news
from ssmd_dagster_tests.day.builders import Log, started
from ssmd_dagster_tests.day.test_events import Try, histories, replayed


class Reading:
    """A desk's journal and book over a log in memory; `name` tells its hashes from another journal's."""

    def __init__(self, log: Log, name: str = "a") -> None:
        self.log, self.name = log, name
        self.desk = cast("Desk", SimpleNamespace(stores=SimpleNamespace(journal=self), book=self))
        self.decoded = 0

    async def tip_seq(self) -> int:
        """Return how many events there are."""
        return len(self.log.events)

    async def holds(self, seq: int, sha256: str) -> Any:
        """Say whether an event is of this journal."""
        return True if seq <= len(self.log.events) and sha256 == f"{self.name}{seq}" else None

    async def pages(self, after_seq: int, up_to: int) -> AsyncGenerator[list[Any], None]:
        """Yield a stretch of the journal."""
        for start in range(after_seq, min(up_to, len(self.log.events)), 3):
            events = self.log.events[start : min(start + 3, up_to)]
            self.decoded += len(events)
            yield [SimpleNamespace(seq=seq, event=event, sha256=f"{self.name}{seq}") for seq, event in events]

    async def read(self, after_seq: int, up_to: int) -> list[Any]:
        """Return a stretch of the journal."""
        return [stored async for page in self.pages(after_seq, up_to) for stored in page]

    async def refresh(self) -> Book:
        """Return all days as they are now."""
        return self.log.book


def looked(follower: Follower, reading: Reading, place: Place | None) -> Look:
    """Look once."""
    return asyncio.run(follower.look(reading.desk, place))


@given(
    histories,
    st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_news_are_each_with_its_day_after_it(
    tries: list[Try], looks: list[tuple[int, bool]], at_once: int, most: int
) -> None:
    """Wherever a look begins, in the same process or a new one, and however little one look reads."""
    log = replayed(tries)
    expected, book = [], Book()
    for seq, event in log.events:
        book = fold([(seq, event)], book)
        day = None if event.event in ENVIRONMENT_EVENTS else book.days[event.date]
        if is_news(event):
            expected.append(News(seq, event, day))
    reading, follower = Reading(log), Follower()
    with (
        patch.object(follow, "AT_ONCE", at_once),
        patch.object(follow, "READ_AT_ONCE", most),
        patch.object(follow, "FOLDED_AT_ONCE", most),
    ):
        for jump, is_new in looks:
            follower = Follower() if is_new else follower
            seq = min(jump, len(log.events))
            place, found = Place(seq=seq, sha256=f"a{seq}" if seq else None), list[News]()
            for _ in range(2 * len(log.events) + 1):
                reading.decoded = 0
                seen = looked(follower, reading, place)
                assert (seen.lost, len(seen.news) <= at_once, reading.decoded <= 2 * most) == (None, True, True)
                place = seen.place
                found += seen.news
            assert found == [news for news in expected if news.seq > seq]
            assert place.seq == len(log.events)


def test_an_old_day_that_is_verified_again_costs_no_reading_of_all_that_came_after_it() -> None:
    """A follower that has begun at the end knows the day: neither process nor journal keeps what lies in between."""
    log = started()
    for number in range(1, 30):
        log.add(EventName.DEFINED, date=f"2026-01-{number:02}")
    reading, follower, place = Reading(log), Follower(), Place(seq=32, sha256="a32")
    log.add(EventName.DEFINED, date="2026-01-30")
    place = looked(follower, reading, place).place
    reading.decoded = 0
    log.add(EventName.VERIFIED)
    (news,) = looked(follower, reading, place).news
    assert (news.day, reading.decoded) == (log.day(), 1)


@pytest.mark.parametrize("length", [0, 2, 3, 5])
@pytest.mark.parametrize("kept", [True, False])
def test_a_place_of_another_journal_is_given_up(length: int, kept: bool) -> None:
    """A backup is restored, or an environment is set up anew: it is read from its beginning, and nothing is passed over."""
    log = started()
    old = Reading(log)
    follower = Follower()
    first = looked(follower, old, None)
    follower = follower if kept else Follower()
    assert (first.place, len(first.news)) == (Place(seq=3, sha256="a3", old_seq=3), 3)
    other = Log()
    names = (EventName.DEFINED, EventName.START_REQUESTED, EventName.START_FAILED, *[EventName.START_REQUESTED] * 2)
    for event in names[:length]:
        other.add(event)
    reading = Reading(other, "b")
    place = first.place if kept else Place(seq=3)  # as it was before hashes were kept
    seen = looked(follower, reading, place)
    if length == 3:  # nothing new stands behind the place: the next event shows it
        assert seen == Look([], place, None)
        other.add(EventName.START_REQUESTED)
        seen = looked(follower, reading, place)
    if not kept and length >= 3:
        assert seen.lost is None
        return
    assert (seen.lost, seen.place.old_seq) == (place, len(other.events))
    assert [news.seq for news in seen.news] == list(range(1, len(other.events) + 1))
    assert looked(follower, reading, seen.place) == Look([], seen.place, None)
