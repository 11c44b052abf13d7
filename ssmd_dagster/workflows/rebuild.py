"""Make the cache say again what the journal says."""

from __future__ import annotations

from ssmd_dagster.day.events import Book
from ssmd_dagster.workflows.desk import Desk


async def rebuild(desk: Desk) -> Book:
    """Empty the days' keys and write them from the journal; return the days."""
    await desk.stores.cache.rebuild(await desk.book.refold())
    book = await desk.book.refresh()
    await desk.stores.cache.apply(book)
    await desk.book.keep()
    return book
