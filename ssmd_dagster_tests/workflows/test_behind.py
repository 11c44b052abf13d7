"""A journal that was lost or restored from an old backup, beside a store that remembers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from ssmd_dagster.archive.layout import manifest_key
from ssmd_dagster.day.events import EMPTY_BOOK, Book
from ssmd_dagster.day.states import EventName
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.stores.objects import LocalObjectStore
from ssmd_dagster.workflows.behind import refuse_journal_behind
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster_tests.day.builders import DATE, ENV, Log, started

TODAY = "2025-12-16"


def desk_of(store: object, book: Book) -> Desk:
    """Return a desk with a store and a journal as it was read."""
    return cast(
        "Desk",
        SimpleNamespace(
            env=ENV,
            today=lambda: TODAY,
            setting=SimpleNamespace(env=SimpleNamespace(feed="kalshi")),
            stores=SimpleNamespace(raw=store),
            book=SimpleNamespace(book=book),
        ),
    )


def sealed() -> Log:
    """Return the journal of a day that is COMPLETE and sealed."""
    log = started()
    for event in (EventName.END_REQUESTED, EventName.COMPLETED, EventName.SEALED):
        log.add(event)
    return log


async def test_a_journal_that_has_lost_a_sealed_day_is_refused(tmp_path: Path) -> None:
    """Empty, or shorter than the manifest says; one that knows the day, or a seal that it was not told of, is taken."""
    store = LocalObjectStore(tmp_path)
    log = sealed()
    await refuse_journal_behind(desk_of(store, EMPTY_BOOK))
    claims = {"env": ENV, "journal_seq": len(log.events), "v": 1}
    await store.create(manifest_key("kalshi", DATE), msgspec.json.encode(claims))
    await refuse_journal_behind(desk_of(store, log.book))
    with pytest.raises(SsmdError, match=f"{DATE} is sealed there as of event 6, and the journal has no such day"):
        await refuse_journal_behind(desk_of(store, EMPTY_BOOK))
    with pytest.raises(SsmdError, match="and the journal ends at event 3"):
        await refuse_journal_behind(desk_of(store, started().book))
    await store.create(manifest_key("kalshi", DATE, 2), msgspec.json.encode({**claims, "journal_seq": 5}))
    await refuse_journal_behind(desk_of(store, log.book))


async def test_another_environments_manifest_and_a_store_that_is_away_say_nothing(tmp_path: Path) -> None:
    """Recording does not wait for the store."""
    store = LocalObjectStore(tmp_path)
    await store.create(manifest_key("kalshi", DATE), msgspec.json.encode({"env": "other", "journal_seq": 9}))
    await refuse_journal_behind(desk_of(store, EMPTY_BOOK))

    async def away(folder: str) -> None:
        raise UnreachableError("no answer")

    await refuse_journal_behind(desk_of(SimpleNamespace(list=away), EMPTY_BOOK))
