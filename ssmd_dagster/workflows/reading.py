"""Reading a day's archive back from the store: hashes, notes, numbers and trades in one pass, the order books in another.

The books are folded by a process of its own where there is much to fold, so that both passes have a core. Needs the store and
nothing else. Not here: what follows from a finding.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self

from ssmd_dagster.archive.layout import day_prefix, parse_segment_key
from ssmd_dagster.archive.losses import Loss
from ssmd_dagster.archive.proofs import BOOKS, BookFindings, BookProofs
from ssmd_dagster.archive.readback import DayReadback, Readback
from ssmd_dagster.archive.trade_ids import TradeIds
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import OTHER, SESSION
from ssmd_dagster.stores.objects import ObjectStore

OWN_PROCESS_BYTES = 16 << 20
"""Compressed order book data from which on its folding gets a process of its own; starting one takes a second."""

_proofs: BookProofs | None = None


def _begin_proofs(feed: str) -> None:
    global _proofs
    _proofs = BookProofs(feed)


def _feed_proofs(channel: str, data: bytes) -> None:
    assert _proofs is not None
    _proofs.feed(channel, data)


def _finish_proofs() -> BookFindings:
    assert _proofs is not None
    return _proofs.finish()


class DayReading:
    """One reading of a day. `read_new` may be called again when there are new segments; then `finish` once.

    Memory: a few segments, and a trade's id for every trade. A context manager.
    """

    def __init__(
        self, store: ObjectStore, env: str, feed: str, date: str, window: Window, told: Callable[[str], None]
    ) -> None:
        self.ids = TradeIds(feed, window.open_ns, window.close_ns)
        self._store, self._feed, self._date, self._told = store, feed, date, told
        self._readback = DayReadback(env, date, see=self.ids.see)
        self._seen: set[str] = set()
        self._folding: Executor | None = None
        self._feed_books: Callable[[str, bytes], None] = _feed_proofs
        self._finish_books: Callable[[], BookFindings] = _finish_proofs

    async def __aenter__(self) -> Self:
        """Begin; nothing is read yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the folding process."""
        if self._folding is not None:
            await asyncio.to_thread(self._folding.shutdown, cancel_futures=True)

    async def read_new(self) -> None:
        """Read every segment that has not been read yet. Raises what the store raises."""
        found = [
            (*parsed, info)
            for info in await self._store.list(day_prefix(self._feed, self._date))
            if (parsed := parse_segment_key(info.key)) is not None and info.key not in self._seen
        ]
        if self._folding is None:
            self._folding = self._begin_folding(sum(info.size for channel, _, info in found if channel == BOOKS))
        folded: asyncio.Future[None] | None = None
        # `session` first: it holds what the other channels are held against.
        order = {SESSION: 0, OTHER: 1}
        for channel, number, info in sorted(found, key=lambda entry: (order.get(entry[0], 2), entry[:2])):
            data = await self._store.get(info.key)
            if channel in (SESSION, OTHER, BOOKS):
                if folded is not None:
                    await self._folds(folded)
                folded = asyncio.get_running_loop().run_in_executor(self._folding, self._feed_books, channel, data)
            await asyncio.to_thread(self._readback.feed, info.key, channel, number, data)
            self._seen.add(info.key)
            self._told(info.key)
        if folded is not None:
            await self._folds(folded)

    def losses(self) -> tuple[Loss, ...]:
        """Return the batches that are missing in what was read so far."""
        return self._readback.losses()

    async def finish(self) -> tuple[Readback, BookFindings]:
        """Return the findings over everything that was read."""
        loop = asyncio.get_running_loop()

        def read_range(key: str, start: int, length: int) -> bytes:
            return asyncio.run_coroutine_threadsafe(self._store.get_range(key, start, length), loop).result()

        readback = await asyncio.to_thread(self._readback.finish, read_range)
        if self._folding is None:
            return readback, BookFindings(0, 0, 0, 0, ())
        try:
            return readback, await loop.run_in_executor(self._folding, self._finish_books)
        except BrokenProcessPool as error:
            raise _killed() from error

    def _begin_folding(self, books_bytes: int) -> Executor:
        if books_bytes >= OWN_PROCESS_BYTES:
            return ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_proofs, initargs=(self._feed,)
            )
        proofs = BookProofs(self._feed)
        self._feed_books, self._finish_books = proofs.feed, proofs.finish
        return ThreadPoolExecutor(1, thread_name_prefix="books")

    async def _folds(self, folded: asyncio.Future[None]) -> None:
        try:
            await folded
        except BrokenProcessPool as error:
            raise _killed() from error


def _killed() -> SsmdError:
    return SsmdError(
        "the process that folds the order books was killed", do="See whether memory ran out; the same command goes on."
    )
