"""From a flush to a durable acknowledgement: seal, fsync to the spool, publish in order, wait for the stream.

One pipeline belongs to one connection. When the stream is away, batches stay in the spool and are read from it again once
the stream is back, so what waits for the stream takes `HELD_BYTES` of memory at most, whatever the outage. What waits for a
disk that takes nothing is in memory: `unsealed_bytes` is for the connector, which closes its socket when it is too much.
Not here: what is in a batch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from ssmd_dagster.archive.batch import Batch, is_whole, scan
from ssmd_dagster.capture.recorder import Flush, Origin, seal
from ssmd_dagster.capture.spool import SpoolWriter, spool_path
from ssmd_dagster.crash_points import reached
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.stores.stream import BatchTooLargeError

IN_FLIGHT = 32
"""Batches published and not acknowledged yet, at most."""
HELD_BYTES = 8 << 20
"""Encoded batches kept in memory while they wait for their acknowledgement; the rest is read from the spool again."""
SEAL_BYTES = 4 << 20
"""Records that are sealed and written together, about."""
READ_BYTES = 4 << 20
"""How much is read from the spool again at once."""
RETRY_AFTER_S = 0.5

_log = logging.getLogger(__name__)


class SealedBatch(msgspec.Struct, frozen=True):
    """One batch in the spool, and where it lies."""

    channel: str
    batch: int
    records: int
    offset: int
    data: bytes


Publish = Callable[[str, str, int, int, bytes], Awaitable["asyncio.Future[int]"]]
"""`publish(conn, channel, batch, records, data)`: hands a batch over, in the order of the calls, and returns the future
acknowledgement. Both raise an `SsmdError` where the stream does not answer."""


class Pipeline:
    """Carries the flushes of one connection to the spool and to the stream, in order.

    `on_disk` is told of every refusal of the disk, and with None when it takes something again.
    """

    def __init__(
        self,
        origin: Origin,
        spool_directory: Path,
        publish: Publish,
        executor: ThreadPoolExecutor,
        *,
        on_disk: Callable[[OSError | None], None],
    ) -> None:
        self.origin = origin
        self.acked_batches = 0
        self.acked_records = 0
        self.unacked_batches = 0
        self.unacked_bytes = 0
        self.unsealed_bytes = 0
        self.writing_since: float | None = None
        self._directory = spool_directory
        self._publish = publish
        self._executor = executor
        self._on_disk = on_disk
        self._spool: SpoolWriter | None = None
        self._flushes: asyncio.Queue[Flush | None] = asyncio.Queue()
        # The oldest batches that wait for their acknowledgement are held; from `_unheld_from` on they are in the spool only.
        self._held: deque[SealedBatch] = deque()
        self._held_bytes = 0
        self._unheld_from: int | None = None
        self._spooled_to = 0
        self._more = asyncio.Event()
        self._ending = False
        self._sealed_all = False
        self._sealer = asyncio.create_task(self._seal_all())
        self._publisher = asyncio.create_task(self._publish_all())

    @property
    def writing_s(self) -> float:
        """Return for how long the disk has been at what it was last given: much more than a moment is a disk that hangs."""
        return 0.0 if self.writing_since is None else time.monotonic() - self.writing_since

    def submit(self, flush: Flush) -> None:
        """Take a flush; returns at once. Sealing outruns any socket, so what waits here is short unless the disk refuses."""
        self.unsealed_bytes += sum(len(unsealed.block) for unsealed in flush)
        self._flushes.put_nowait(flush)

    async def failed(self) -> None:
        """Return only if sealing or publishing has ended by an error that nobody foresaw, and raise that."""
        tasks = {self._sealer, self._publisher}
        while tasks:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        await asyncio.Event().wait()

    async def close(self, timeout_s: float | None) -> bool:
        """Seal what was submitted, then wait up to `timeout_s` for the acknowledgements; tell whether all came.

        None waits for as long as the stream is away, which costs no memory to speak of. What is not acknowledged by then, or
        when this is cancelled, stays in the spool, and the day's audit publishes it.
        """
        self._flushes.put_nowait(None)
        self._let_go()
        try:
            await self._sealer
            await asyncio.wait([self._publisher], timeout=timeout_s)
            if self._publisher.done():
                self._publisher.result()
        finally:
            for task in (self._sealer, self._publisher):
                task.cancel()
            await asyncio.gather(self._sealer, self._publisher, return_exceptions=True)
            # Behind whatever the executor's thread still writes.
            await asyncio.get_running_loop().run_in_executor(self._executor, self._close_spool)
        return self.unacked_batches == 0

    def _close_spool(self) -> None:
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.close()

    async def _seal_all(self) -> None:
        loop = asyncio.get_running_loop()
        refused = False
        while flush := await self._next_flushes():
            while True:
                self.writing_since = time.monotonic()
                try:
                    sealed = await loop.run_in_executor(self._executor, self._seal, flush)
                    break
                except FileExistsError:
                    raise  # another process records under this connection's id: trying again cannot help
                except OSError as error:
                    refused = True
                    self._on_disk(error)
                    await asyncio.sleep(RETRY_AFTER_S)
                finally:
                    self.writing_since = None
            if refused:
                refused = False
                self._on_disk(None)
            self.unsealed_bytes -= sum(len(unsealed.block) for unsealed in flush)
            for batch in sealed:
                self.unacked_batches += 1
                self.unacked_bytes += len(batch.data)
                self._spooled_to = batch.offset + len(batch.data)
                if self._unheld_from is None and self._held_bytes + len(batch.data) <= HELD_BYTES:
                    self._hold(batch)
                elif self._unheld_from is None:
                    self._unheld_from = batch.offset
            self._more.set()
        self._sealed_all = True
        self._more.set()

    async def _next_flushes(self) -> Flush:
        """Return what waits, about `SEAL_BYTES` of it, as one flush; empty at the end.

        Under load many flushes share one trip to the thread and one fsync: the more waits, the faster it goes.
        """
        flushes: Flush = []
        size = 0
        while not self._ending and (not flushes or (size < SEAL_BYTES and not self._flushes.empty())):
            flush = await self._flushes.get()
            if flush is None:
                self._ending = True
            else:
                flushes += flush
                size += sum(len(unsealed.block) for unsealed in flush)
        return flushes

    def _seal(self, flush: Flush) -> list[SealedBatch]:
        """Compress and write flushes with one fsync; runs in the executor's thread."""
        if self._spool is None:
            self._spool = SpoolWriter(self._directory, self.origin.conn)
        encoded = [seal(self.origin, unsealed) for unsealed in flush]
        reached("connector.spool.before")
        offsets = self._spool.append(encoded)
        return [
            SealedBatch(unsealed.channel, unsealed.batch, unsealed.records, offset, data)
            for unsealed, offset, data in zip(flush, offsets, encoded, strict=True)
        ]

    def _hold(self, batch: SealedBatch) -> None:
        self._held.append(batch)
        self._held_bytes += len(batch.data)

    def _let_go(self) -> None:
        """Keep in memory only what may be under way: a connection that is over shall not cost what a running one may."""
        while len(self._held) > IN_FLIGHT:
            batch = self._held.pop()
            self._held_bytes -= len(batch.data)
            self._unheld_from = batch.offset

    async def _publish_all(self) -> None:
        """Keep up to `IN_FLIGHT` batches under way; after a failure everything from the failed one on is sent again."""
        window: deque[asyncio.Future[int]] = deque()
        while True:
            try:
                while len(window) < IN_FLIGHT and await self._held_beyond(len(window)):
                    batch = self._held[len(window)]
                    try:
                        window.append(
                            await self._publish(self.origin.conn, batch.channel, batch.batch, batch.records, batch.data)
                        )
                    except BatchTooLargeError as error:
                        self._leave_in_spool(len(window), error)
                if not window:
                    if self._sealed_all:
                        return
                    self._more.clear()
                    if self._unheld_from is None and not self._held and not self._sealed_all:
                        await self._more.wait()
                    continue
                await window[0]
            except (SsmdError, OSError) as error:
                _log.warning("stream does not take batches of %s: %s", self.origin.conn, error)
                await _abandon(window)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            except asyncio.CancelledError:
                await _abandon(window)
                raise
            reached("connector.acked.before")
            window.popleft()
            done = self._held.popleft()
            self._held_bytes -= len(done.data)
            self.acked_batches += 1
            self.acked_records += done.records
            self.unacked_batches -= 1
            self.unacked_bytes -= len(done.data)

    async def _held_beyond(self, count: int) -> bool:
        """Tell whether more than `count` batches are held, after reading on in the spool where that is needed for it."""
        if len(self._held) <= count and self._unheld_from is not None:
            read, end = await asyncio.to_thread(self._read, self._unheld_from, self._spooled_to)
            for batch in read:
                self._hold(batch)
            self._unheld_from = end if end < self._spooled_to else None
        return len(self._held) > count

    def _read(self, start: int, end: int) -> tuple[list[SealedBatch], int]:
        """Read batches from `start` on in the spool, about `READ_BYTES` of them; return them and where they end."""
        with spool_path(self._directory, self.origin.conn).open("rb") as file:
            size = min(READ_BYTES, end - start)
            while True:
                file.seek(start)
                data = file.read(size)
                found = [item for item in scan(data) if isinstance(item, Batch)]
                if found or start + size >= end:
                    break
                size = min(4 * size, end - start)
        upto = size if start + size >= end else found[-1].end
        # Of what the disk has spoilt since, nothing is published: it would pass for a copy of what came in.
        found = [item for item in found if is_whole(data, item)]
        damaged = upto - sum(item.end - item.start for item in found)
        if damaged:  # what was sealed was whole; verification names what is missing
            _log.error("%d bytes of the spool of %s cannot be read back", damaged, self.origin.conn)
        batches = [
            SealedBatch(h.channel, h.batch, h.records, start + item.start, data[item.start : item.end])
            for item in found
            for h in (item.header,)
        ]
        return batches, start + upto

    def _leave_in_spool(self, index: int, error: BatchTooLargeError) -> None:
        """Pass over a batch that no message takes: the others shall not wait for it. It stays unacknowledged."""
        batch = self._held[index]
        _log.error("%s/%s/%d stays in the spool: %s", self.origin.conn, batch.channel, batch.batch, error)
        del self._held[index]
        self._held_bytes -= len(batch.data)


async def _abandon(window: deque[asyncio.Future[int]]) -> None:
    for future in window:
        future.cancel()
    await asyncio.gather(*window, return_exceptions=True)
    window.clear()
