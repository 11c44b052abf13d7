"""Following a journal: whoever begins anywhere sees each event with its day as it was then."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from ssmd_dagster.day.events import Book
from ssmd_dagster.day.folding import fold
from ssmd_dagster.day.states import ENVIRONMENT_EVENTS
from ssmd_dagster.workflows import follow
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.follow import Follower, News
from ssmd_dagster_tests.day.builders import Log
from ssmd_dagster_tests.day.test_events import Try, histories, replayed


class Reading:
    """A desk's journal and book over a log in memory."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.desk = cast("Desk", SimpleNamespace(stores=SimpleNamespace(journal=self), book=self))

    async def read(self, after_seq: int = 0, up_to: int | None = None) -> list[Any]:
        """Return a stretch of the journal."""
        last_seq = len(self.log.events) if up_to is None else up_to
        return [SimpleNamespace(seq=seq, event=event) for seq, event in self.log.events[after_seq:last_seq]]

    async def refresh(self) -> Book:
        """Return all days as they are now."""
        return self.log.book


@given(histories, st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=6), st.integers(1, 9))
def test_news_are_each_event_with_its_day_after_it(
    tries: list[Try], looks: list[tuple[int, bool]], at_once: int
) -> None:
    """Wherever a look begins, in the same process or a new one, and however few events it returns."""
    log = replayed(tries)
    expected, book = [], Book()
    for seq, event in log.events:
        book = fold([(seq, event)], book)
        day = None if event.event in ENVIRONMENT_EVENTS else book.days[event.date]
        expected.append(News(seq, event, day))
    follower, desk = Follower(), Reading(log).desk
    place = 0
    with patch.object(follow, "AT_ONCE", at_once):
        for jump, stays in looks:
            place = place if stays else min(jump, len(expected))
            found = asyncio.run(follower.news(desk, place))
            assert found == expected[place : place + at_once]
            place += len(found)
